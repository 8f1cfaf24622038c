"""Whether a vLLM model holds the weights that it was sent: which part of which tensor a module must have, and checks.

What is expected comes from the model that vLLM built, never from the sender. A weight that the engine reads as it is
stored is compared by checksum. On CPU vLLM multiplies by a prepacked copy that nothing can read back, so there the
module itself is asked: one-hot rows must give the columns of the weight exactly, and a row of random signs must give
the product within rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from actors.weights import Manifest, WeightMismatchError, checksum, checksum_kind

NUM_PROBED_COLUMNS = 4
# The product of a row w [in] and random signs is a random walk of about |w|_2; its rounding errors in float32 add up to
# about 2**-24 sqrt(in) |w|_2. Another order of summation was seen to differ by 2**-22 sqrt(in) |w|_2 in the worst of
# 300,000 rows, of a model of 500 million parameters.
SUM_TOLERANCE = 2.0**-19
# In addition, of the larger of the product and |w|_2: the rounding of the 16-bit types.
ROUNDING_TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
FLOAT_BYTES = 1 << 24  # of rows that are float32 at once for their product, so that there is no second copy of a weight


@dataclass(frozen=True, eq=False)
class Piece:
    """The rows (and columns) of checkpoint tensor `name` that a module holds from row `at` of its `parameter` on.

    `shape` is that of the whole checkpoint tensor as [out, in].
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    rows: slice
    columns: slice | None
    at: int

    @property
    def held_rows(self) -> slice:
        return slice(self.at, self.at + self.rows.stop - self.rows.start)

    def cut(self, tensor: Tensor) -> Tensor:
        """The part of the whole checkpoint tensor, [out, in] or any other shape, that is held."""
        return tensor[self.rows] if self.columns is None else tensor[self.rows, self.columns]


@dataclass
class Evidence:
    """What is remembered of a piece as it was received: never the piece itself, unless it is a vector."""

    checksum: int | None = None  # where the engine keeps a weight as it is stored
    vector: Tensor | None = None  # the piece, where it has one dimension
    columns: Tensor | None = None  # [rows, NUM_PROBED_COLUMNS], where the module must be probed
    product: Tensor | None = None  # [rows] float32: the piece times the row of signs
    norm: Tensor | None = None  # [rows] float32: the square root of the sum of squares


@dataclass
class Holder:
    """One module of the vLLM model, what it must hold, and for a probed one the inputs it is asked with."""

    path: str
    module: Any
    pieces: list[Piece]
    freed: frozenset[str]  # the parameters that vLLM has freed after packing them
    evidence: dict[Piece, Evidence] = field(default_factory=dict)
    columns: Tensor | None = None  # [NUM_PROBED_COLUMNS] input features
    signs: Tensor | None = None  # [in] +1 or -1

    @property
    def probed(self) -> bool:
        """Whether the module multiplies by something else than its `weight` parameter."""
        return getattr(self.module, "cpu_linear", nn.functional.linear) is not nn.functional.linear


class WeightAudit:
    """Remembers what each module of `model` must hold after an update, and verifies it.

    `note` every received tensor between `begin` and `verify`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._holders = list(_holders(model))
        self._by_name: dict[str, list[tuple[Holder, Piece]]] = {}
        for holder in self._holders:
            for piece in holder.pieces:
                self._by_name.setdefault(piece.name, []).append((holder, piece))

    def check_manifest(self, manifest: Manifest) -> None:
        """Raise ValueError unless `manifest` has every parameter of the model, whole, and nothing else."""
        sent = {meta.name: meta for meta in manifest}
        for name in self._by_name:
            if name not in sent:
                raise ValueError(f"{name}: the generator's model has this parameter and the weight manifest lacks it")
        for name, meta in sent.items():
            if name not in self._by_name:
                raise ValueError(f"{name}: the weight manifest has it and the generator's model does not")
            shape = self._by_name[name][0][1].shape
            given = tuple(reversed(meta.shape)) if meta.transposed else meta.shape
            if given != shape:
                raise ValueError(f"{name}: sent as {given} [out, in], the generator's model has {shape}")
            if meta.torch_dtype != self._dtype:
                raise ValueError(f"{name}: sent as {meta.dtype}, the generator computes in {self._dtype}")

    def begin(self, seed: int) -> None:
        """Forget the last update and draw new probes from `seed`."""
        generator = torch.Generator().manual_seed(seed)
        for holder in self._holders:
            holder.evidence.clear()
            if holder.probed:
                width = holder.module.input_size_per_partition
                holder.columns = torch.randperm(width, generator=generator)[:NUM_PROBED_COLUMNS]
                holder.signs = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1.0

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that have parameters."""
        return [holder.module for holder in self._holders]

    def note(self, name: str, tensor: Tensor) -> None:
        """Remember what follows from `tensor`, the whole parameter `name` as [out, in]."""
        for holder, piece in self._by_name[name]:
            holder.evidence[piece] = _evidence(holder, piece, piece.cut(tensor))

    def verify(self) -> None:
        """Raise WeightMismatchError for the first parameter that the model does not hold as it was received."""
        for holder in self._holders:
            for piece in holder.pieces:
                _verify_stored(holder, piece)
            if holder.probed:
                _verify_probed(holder)


def _evidence(holder: Holder, piece: Piece, block: Tensor) -> Evidence:
    if block.ndim == 1:
        return Evidence(vector=block.clone())
    evidence = Evidence()
    if piece.parameter not in holder.freed:
        evidence.checksum = checksum(block, checksum_kind(block.device))
    if holder.probed and piece.parameter == "weight":
        assert holder.columns is not None
        assert holder.signs is not None
        evidence.columns = block.index_select(1, holder.columns)
        evidence.product, evidence.norm = torch.empty(2, len(block))
        rows = max(1, FLOAT_BYTES // (4 * block.shape[1]))
        for start in range(0, len(block), rows):
            part, at = block[start : start + rows].float(), slice(start, start + rows)
            torch.mv(part, holder.signs, out=evidence.product[at])
            torch.linalg.vector_norm(part, dim=1, out=evidence.norm[at])
    return evidence


def _verify_stored(holder: Holder, piece: Piece) -> None:
    """Compare the stored parameter bit by bit, unless vLLM has freed it after packing."""
    stored = getattr(holder.module, piece.parameter)
    if piece.parameter in holder.freed and holder.probed and stored.numel() == 0:
        return
    evidence, held = holder.evidence[piece], stored.detach()[piece.held_rows]
    if evidence.vector is not None:  # a kernel may keep a 16-bit bias as float32
        expected = evidence.vector.to(held.dtype)
        if not torch.equal(held, expected):
            _refuse(holder, piece, f"max difference {_difference(held, expected):.3g}")
    elif checksum(held, checksum_kind(held.device)) != evidence.checksum:
        columns = evidence.columns
        detail = "checksums differ"
        if columns is not None:
            difference = _difference(held[:, holder.columns], columns)
            detail += f"; max difference {difference:.3g} in the {columns.shape[1]} columns sampled"
        _refuse(holder, piece, detail)


def _verify_probed(holder: Holder) -> None:
    """Ask the module for columns of the matrix that it multiplies by, and for its product with a row of signs."""
    assert holder.columns is not None
    assert holder.signs is not None
    module, count = holder.module, len(holder.columns)
    rows = torch.zeros(count + 1, len(holder.signs))
    rows[torch.arange(count), holder.columns] = 1.0
    rows[count] = holder.signs
    dtype = module.params_dtype
    with torch.no_grad():
        outputs = module.quant_method.apply(module, rows.to(dtype), None).t()  # [out, count + 1]
    for piece in holder.pieces:
        if piece.parameter != "weight":
            continue
        evidence, held = holder.evidence[piece], outputs[piece.held_rows]
        assert evidence.columns is not None
        assert evidence.product is not None
        assert evidence.norm is not None
        if not torch.equal(held[:, :count], evidence.columns):
            difference = _difference(held[:, :count], evidence.columns)
            _refuse(holder, piece, f"max difference {difference:.3g} in the {count} columns probed")
        errors = (held[:, count].float() - evidence.product).abs()
        rounding = ROUNDING_TOLERANCE[dtype] * torch.maximum(evidence.norm, evidence.product.abs())
        if not bool((errors <= SUM_TOLERANCE * len(holder.signs) ** 0.5 * evidence.norm + rounding).all()):
            _refuse(holder, piece, f"max difference {float(errors.max()):.3g} in its product with a row of signs")


def _difference(held: Tensor, expected: Tensor) -> float:
    return float((held.double() - expected.double()).abs().max())


def _refuse(holder: Holder, piece: Piece, detail: str) -> None:
    raise WeightMismatchError(piece.name, "held", f"{holder.path}.{piece.parameter} holds something else: {detail}")


def _holders(model: nn.Module) -> Iterator[Holder]:
    """Every module with parameters of its own. A tied parameter goes by the name of its first holder."""
    packed = getattr(model, "packed_modules_mapping", {})
    first_path: dict[int, str] = {}
    for path, module in model.named_modules():
        pieces: list[Piece] = []
        freed = frozenset(name for name, tensor in module.named_parameters(recurse=False) if tensor.numel() == 0)
        for parameter, tensor in module.named_parameters(recurse=False):
            # An emptied weight is never tied, and two of them are two objects all the same.
            owner = first_path.setdefault(id(tensor), path)
            prefix, _, leaf = owner.rpartition(".")
            names = [f"{prefix}.{part}.{parameter}".lstrip(".") for part in packed.get(leaf, [leaf])]
            pieces += _pieces(module, parameter, tensor, names)
        if pieces:
            yield Holder(path, module, pieces, freed)


def _pieces(module: Any, parameter: str, tensor: Tensor, names: list[str]) -> list[Piece]:
    """How the checkpoint tensors `names` make up one parameter of `module` on this tensor-parallel rank."""
    _check_supported(module)
    if not isinstance(module, (LinearBase, VocabParallelEmbedding)):
        (name,) = names
        return [Piece(name, tuple(tensor.shape), parameter, slice(0, tensor.shape[0]), None, 0)]
    is_matrix = parameter == "weight"
    rest, columns = _columns(module) if is_matrix else ((), None)
    parts = _row_parts(module)
    held = sum(length for _, _, length in parts)
    assert held + _padding_rows(module) == module.output_size_per_partition, (module, parts)
    assert tensor.numel() in (
        0,
        module.output_size_per_partition * (module.input_size_per_partition if is_matrix else 1),
    )
    whole = sum(size for size, _, _ in parts)
    assert len(names) in (1, len(parts)), (names, parts)
    pieces, before, at = [], 0, 0
    for index, (size, start, length) in enumerate(parts):
        apart = len(names) == len(parts)  # else the checkpoint has one tensor with all parts below one another
        name, offset = (names[index], 0) if apart else (names[0], before)
        rows = slice(offset + start, offset + start + length)
        pieces.append(Piece(name, (size if apart else whole, *rest), parameter, rows, columns, at))
        before, at = before + size, at + length
    return pieces


def _check_supported(module: nn.Module) -> None:
    known = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear)
    if isinstance(module, LinearBase):
        supported = type(module) in known and type(module.quant_method) is UnquantizedLinearMethod
    elif isinstance(module, VocabParallelEmbedding):
        supported = type(module.quant_method) is UnquantizedEmbeddingMethod and module.num_added_embeddings == 0
    else:
        supported = True
    if not supported:
        raise NotImplementedError(f"weights of {type(module).__name__} with {type(module.quant_method).__name__}")


def _row_parts(module: Any) -> list[tuple[int, int, int]]:
    """(size in the checkpoint, first row held, number of rows held) of each output part of `module`."""
    if isinstance(module, QKVParallelLinear):
        kv_rank = module.tp_rank // module.num_kv_head_replicas
        return [
            (total * size, rank * held * size, held * size)
            for total, held, size, rank in (
                (module.total_num_heads, module.num_heads, module.head_size, module.tp_rank),
                (module.total_num_kv_heads, module.num_kv_heads, module.head_size, kv_rank),
                (module.total_num_kv_heads, module.num_kv_heads, module.v_head_size, kv_rank),
            )
        ]
    if isinstance(module, VocabParallelEmbedding):
        indices = module.shard_indices
        return [(module.org_vocab_size, indices.org_vocab_start_index, indices.num_org_elements)]
    if isinstance(module, MergedColumnParallelLinear):
        lengths = [size // module.tp_size for size in module.output_sizes]
        return [
            (size, module.tp_rank * length, length) for size, length in zip(module.output_sizes, lengths, strict=True)
        ]
    length = module.output_size_per_partition
    first = module.tp_rank * length if isinstance(module, ColumnParallelLinear) else 0
    return [(module.output_size, first, length)]


def _padding_rows(module: Any) -> int:
    indices = getattr(module, "shard_indices", None)
    return 0 if indices is None else indices.num_elements_padded - indices.num_org_elements


def _columns(module: Any) -> tuple[tuple[int], slice | None]:
    """The width of the checkpoint tensor and the columns of it that `module` holds, None for all."""
    if not isinstance(module, RowParallelLinear):
        return (module.input_size,), None
    width = module.input_size_per_partition
    return (module.input_size,), slice(module.tp_rank * width, (module.tp_rank + 1) * width)
