"""Weight updates into real vLLM over real gloo: what was sent is what is served, or it is refused by name."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.generator import SampleRequest, VLLMGenerator, sampling_seed
from actors.rollout import Prompt, Rollout
from actors.weights import Bucket, Manifest, WeightMeta, WeightMismatchError, manifest_of
from conf.schema import GeneratorConfig
from learner.weight_sender import WeightSender
from tests.tiny_models import FAMILIES, VOCAB_SIZE, tiny_checkpoint

pytestmark = pytest.mark.engine

TIMEOUT = 20.0
BUCKET = 1 << 14  # bytes: less than an embedding or a layer of the tiny models
# Log-probabilities against Hugging Face in float32 on the same, rounded, weights. In bfloat16 the activations are
# rounded at every layer: measured at up to 0.06, on average up to 0.012; an update left out is worth 0.3 or more.
MAX_GAP = {"float32": 1e-5, "bfloat16": 0.1}
MEAN_GAP = {"float32": 2e-6, "bfloat16": 0.02}


class Pair:
    """A learner's model and a generator started from the same checkpoint, joined by a weight transport."""

    def __init__(self, folder: Path, dtype: str, num_workers: int = 1) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.manifest = manifest_of(self.model, dtype)
        self.num_workers = num_workers
        config = GeneratorConfig(
            max_new_tokens=16,
            max_model_len=256,
            max_num_seqs=8,
            kv_cache_mib=32,
            dtype=dtype,
            tensor_parallel_size=num_workers,
        )
        self.generator = VLLMGenerator(str(folder), config, device="cpu", seed=0)
        self.sender: WeightSender | None = None

    def connect(self, *, timeout: float = TIMEOUT) -> None:
        self.sender = WeightSender(self.manifest, num_receivers=self.num_workers, bucket_bytes=BUCKET, timeout=timeout)
        with alongside(self.sender.connect):
            workers = [self.sender.receiver_info(1 + number) for number in range(self.num_workers)]
            self.generator.init_weight_transfer(workers)

    def change_weights(self, seed: int) -> None:
        """Move every parameter by about half its size, to values that the generator's dtype can hold."""
        torch.manual_seed(seed)
        dtypes = {meta.name: meta.torch_dtype for meta in self.manifest}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                changed = parameter + 0.05 * torch.randn_like(parameter)
                parameter.copy_(changed.to(dtypes[name]))

    def groups(self) -> Iterator[list[tuple[str, Tensor]]]:
        parameters = dict(self.model.named_parameters())
        for group in self.manifest.groups:
            yield [(meta.name, parameters[meta.name].detach().to(meta.torch_dtype)) for meta in group]

    def sync(self, version: int) -> None:
        """Send the learner's weights as `version`, and put them to use."""
        assert self.sender is not None
        self.generator.start_weight_update()
        with alongside(lambda: self.sender.send(self.groups(), version=version)):  # type: ignore[union-attr]
            self.generator.update_weights({"version": version})
        self.generator.finish_weight_update(version)

    def sample(self) -> list[Rollout]:
        generator = np.random.default_rng(5)
        prompts = [
            Prompt(i, generator.integers(4, VOCAB_SIZE, 6).astype(np.int32), text="", messages=()) for i in range(6)
        ]
        return list(self.generator.generate([SampleRequest(p, 0, sampling_seed(0, p.id, 0), 1.0, 16) for p in prompts]))

    def gaps(self, rollouts: list[Rollout]) -> np.ndarray[Any, Any]:
        """|generator - learner| of the log-probability of every response token."""
        gaps = []
        for rollout in rollouts:
            prompt = len(rollout.prompt.token_ids)
            ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.response_ids])).long()
            with torch.no_grad():
                logprobs = self.model(ids[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
            gaps.append(np.abs(logprobs.gather(1, ids[prompt:, None])[:, 0].numpy() - rollout.rollout_logprobs))
        return np.concatenate(gaps)

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()
        self.generator.shutdown()


class alongside:  # noqa: N801
    """Run `call` in a thread during the block; an error of the block goes before one of the thread."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.error: Exception | None = None
        self.call = call
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.call()
        except Exception as error:
            self.error = error

    def __enter__(self) -> alongside:
        self.thread.start()
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.thread.join(2 * TIMEOUT)
        assert not self.thread.is_alive()
        if kind is None and self.error is not None:
            raise self.error


@pytest.fixture
def make_pair(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(family: str = "llama", *, tied: bool = True, dtype: str = "float32", num_workers: int = 1) -> Pair:
        folder = tiny_checkpoint(tmp_path / f"{family}{len(pairs)}", family, tied=tied, dtype=dtype)
        pairs.append(Pair(folder, dtype, num_workers))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    """A connected tied Llama in float32, which has been through one good update."""
    pair = make_pair()
    pair.connect()
    pair.change_weights(0)
    pair.sync(1)
    pair.change_weights(1)
    return pair


def assert_refused(pair: Pair, name: str, check: str, *, version: int = 2) -> WeightMismatchError:
    """The next update names `name`, and the generator never samples or updates again."""
    with pytest.raises(WeightMismatchError, match=re.escape(f"{name}: {check} check failed")) as caught:
        pair.sync(version)
    assert (caught.value.name, caught.value.check) == (name, check)
    assert pair.generator.version == 1
    with pytest.raises(RuntimeError, match=re.escape(name)):
        pair.sample()
    with pytest.raises(RuntimeError, match="update failed"):
        pair.generator.start_weight_update()
    return caught.value


@pytest.mark.parametrize(("family", "tied", "dtype"), product(FAMILIES, (True, False), ("float32", "bfloat16")))
def test_after_three_updates_the_generator_samples_from_the_learners_model(
    make_pair: Callable[..., Pair], family: str, tied: bool, dtype: str
) -> None:
    pair = make_pair(family, tied=tied, dtype=dtype)
    pair.connect()
    before = pair.sample()
    assert pair.gaps(before).max() < MAX_GAP[dtype]
    for version in (1, 2, 3):
        pair.change_weights(version)
        assert pair.gaps(before).max() > 0.3, "the change must be visible"
        pair.sync(version)
        assert pair.generator.version == version
        rollouts = pair.sample()
        gaps = pair.gaps(rollouts)
        assert gaps.max() < MAX_GAP[dtype]
        assert gaps.mean() < MEAN_GAP[dtype]
        assert all((rollout.policy_versions == version).all() for rollout in rollouts)
        before = rollouts


def test_two_tensor_parallel_processes_hold_their_shares(
    make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases, a key-value head that both must hold, and an error that comes back from another process."""
    pair = make_pair("qwen2", num_workers=2)
    pair.connect()
    pair.change_weights(1)
    pair.sync(1)
    assert pair.gaps(pair.sample()).max() < MAX_GAP["float32"]
    pair.change_weights(2)
    flip_on_the_wire(monkeypatch, "model.layers.1.self_attn.v_proj.bias")
    assert_refused(pair, "model.layers.1.self_attn.v_proj.bias", "wire")


def flip_on_the_wire(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make the sender flip a bit of `name` in the packed bucket of its next update."""
    pack = WeightSender._pack

    def flip(self: WeightSender, bucket: Bucket, tensors: Mapping[str, Tensor], slot: Tensor) -> list[int]:
        checksums = pack(self, bucket, tensors, slot)
        for part in bucket.parts:
            if part.meta.name == name and part.last:
                part.within(slot)[5] ^= 1
        return checksums

    monkeypatch.setattr(WeightSender, "_pack", flip)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_bit_flipped_on_the_wire_is_refused_by_name(pair: Pair, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    flip_on_the_wire(monkeypatch, name)
    assert_refused(pair, name, "wire")


def test_an_output_head_that_kept_its_old_copy_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.weight_receiver.WeightReceiver._refresh_heads", lambda self: None)
    error = assert_refused(pair, "model.embed_tokens.weight", "held")
    assert "lm_head.weight" in str(error)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.weight",  # a third of a fused matrix
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ],
)
def test_a_tensor_that_arrived_and_was_not_loaded_is_refused_by_name(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from actors.weight_receiver import WeightReceiver

    load = WeightReceiver._load

    def forget(self: WeightReceiver, weights: list[tuple[str, Tensor]]) -> None:
        load(self, [(other, tensor) for other, tensor in weights if other != name])
        self._received.append(name)

    monkeypatch.setattr(WeightReceiver, "_load", forget)
    assert_refused(pair, name, "held")


def spoil_after_loading(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], None]) -> None:
    from actors.weight_receiver import WeightReceiver

    refresh = WeightReceiver._refresh_heads

    def then_spoil(self: WeightReceiver) -> None:
        refresh(self)
        spoil(self.model)

    monkeypatch.setattr(WeightReceiver, "_refresh_heads", then_spoil)


def test_a_stored_weight_altered_in_one_bit_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: Any) -> None:
        model.model.layers[1].input_layernorm.weight.data.view(torch.int32)[3] ^= 1

    spoil_after_loading(monkeypatch, spoil)
    error = assert_refused(pair, "model.layers.1.input_layernorm.weight", "held")
    assert "max difference" in str(error)


def test_an_embedding_altered_in_one_bit_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: Any) -> None:
        model.model.embed_tokens.weight.data.view(torch.int32)[VOCAB_SIZE - 1, 7] ^= 1

    spoil_after_loading(monkeypatch, spoil)
    assert_refused(pair, "model.embed_tokens.weight", "held")


def last_two_swapped(outputs: Tensor) -> Tensor:
    return torch.cat([outputs[:, :-2], outputs[:, -2:].flip(1)], dim=1)


@pytest.mark.parametrize("alter", [lambda outputs: outputs * (1.0 + 1e-4), last_two_swapped])
def test_a_packed_weight_altered_in_some_rows_is_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, alter: Callable[[Tensor], Tensor]
) -> None:
    """The engine's copy of gate_up_proj cannot be read; the second half of its rows is up_proj."""

    def spoil(model: Any) -> None:
        layer = model.model.layers[0].mlp.gate_up_proj
        multiply, half = layer.cpu_linear, layer.output_size_per_partition // 2

        def altered(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            outputs = multiply(x, weight, bias)
            return torch.cat([outputs[:, :half], alter(outputs[:, half:])], dim=1)

        layer.cpu_linear = altered

    spoil_after_loading(monkeypatch, spoil)
    assert_refused(pair, "model.layers.0.mlp.up_proj.weight", "held")


def test_a_packed_weight_altered_in_one_place_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most likely outside the columns that are probed: the row of signs must find it."""

    def spoil(model: Any) -> None:
        layer = model.model.layers[0].self_attn.o_proj
        multiply = layer.cpu_linear
        error = torch.zeros(layer.output_size_per_partition, layer.input_size_per_partition)
        error[11, 13] = 0.01
        layer.cpu_linear = lambda x, weight, bias: multiply(x, weight, bias) + x @ error.t()

    spoil_after_loading(monkeypatch, spoil)
    assert_refused(pair, "model.layers.0.self_attn.o_proj.weight", "held")


def test_an_update_without_weights_is_refused_by_the_first_name(pair: Pair) -> None:
    pair.generator.start_weight_update()
    with pytest.raises(WeightMismatchError, match=r"model\.embed_tokens\.weight: wire check failed"):
        pair.generator.finish_weight_update(2)
    with pytest.raises(RuntimeError, match=r"model\.embed_tokens\.weight"):
        pair.sample()


def test_a_generator_does_not_sample_between_start_and_finish(pair: Pair) -> None:
    assert pair.sender is not None
    running = pair.generator.generate([SampleRequest(make_prompt(), 0, 1, 1.0, 8)] * 2)
    pair.generator.start_weight_update()
    with pytest.raises(RuntimeError, match="begun and not been finished"):
        next(running)
    with pytest.raises(RuntimeError, match="begun and not been finished"):
        pair.sample()


def make_prompt() -> Prompt:
    return Prompt(0, np.arange(10, 16, dtype=np.int32), text="", messages=())


def test_another_version_than_announced_is_refused(pair: Pair) -> None:
    sender = pair.sender
    assert sender is not None
    pair.generator.start_weight_update()
    with (
        pytest.raises(RuntimeError, match="sent version 9, this update is version 2"),
        alongside(lambda: sender.send(pair.groups(), version=9)),
    ):
        pair.generator.update_weights({"version": 2})


def test_a_learner_that_dies_midway_leaves_the_generator_refusing(pair: Pair) -> None:
    sender = pair.sender
    assert sender is not None

    def gather() -> Iterator[list[tuple[str, Tensor]]]:
        yield next(pair.groups())
        raise OSError("rank 3 is gone")

    pair.generator.start_weight_update()
    learner = alongside(lambda: sender.send(gather(), version=2))
    with pytest.raises(RuntimeError), learner:
        pair.generator.update_weights({"version": 2})
    assert "group 1 (model.layers.0.self_attn.q_proj.weight to" in str(learner.error)
    with pytest.raises(RuntimeError, match="update failed"):
        pair.sample()


def test_a_learner_that_stands_still_is_an_error_after_the_timeout_that_names_the_group(
    make_pair: Callable[..., Pair],
) -> None:
    pair, timeout, over = make_pair(), 4.0, threading.Event()
    pair.connect(timeout=timeout)
    sender = pair.sender
    assert sender is not None

    def gather() -> Iterator[list[tuple[str, Tensor]]]:
        yield from islice(pair.groups(), 2)
        over.wait(60)

    pair.generator.start_weight_update()
    learner = alongside(lambda: sender.send(gather(), version=7))
    begun, waited = time.monotonic(), []

    def update() -> None:
        try:
            pair.generator.update_weights({"version": 7})
        finally:
            waited.append(time.monotonic() - begun)
            over.set()

    with (
        pytest.raises(RuntimeError, match=r"weight update 7 failed at group 2 \(model\.layers\.1\..*imed out"),
        learner,
    ):
        update()
    assert timeout <= waited[0] < 2 * timeout
    with pytest.raises(RuntimeError, match="update failed"):
        pair.sample()


def with_meta(manifest: Manifest, name: str, *changed: WeightMeta) -> Manifest:
    """`manifest` with `changed` in place of `name`."""
    return Manifest(
        tuple(
            tuple(m for meta in group for m in (changed if meta.name == name else (meta,))) for group in manifest.groups
        )
    )


@pytest.fixture(scope="class")
def shared_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A connected tied Llama in float32, for tests that leave it whole."""
    pair = Pair(tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama"), "float32")
    pair.connect()
    yield pair
    pair.close()


class TestGoodUpdates:
    """On one generator, gone before the next test: shutting down an engine breaks any other one in its process."""

    def test_a_new_connection_replaces_the_old_one(self, shared_pair: Pair) -> None:
        """As when another generator of the group has been replaced."""
        pair = shared_pair
        assert pair.sender is not None
        pair.sender.close()
        pair.connect()
        pair.change_weights(3)
        pair.sync(3)
        assert pair.gaps(pair.sample()).max() < 1e-5

    def test_keys_of_older_weights_are_not_reused(self, shared_pair: Pair) -> None:
        """A prompt of more than one cache block, sampled before and after an update."""
        pair = shared_pair
        length = pair.generator._engine.vllm_config.cache_config.block_size + 20
        prompt = Prompt(
            0, np.random.default_rng(0).integers(4, VOCAB_SIZE, length).astype(np.int32), text="", messages=()
        )
        request = SampleRequest(prompt, 0, 1, 1.0, 8)
        list(pair.generator.generate([request]))
        pair.change_weights(4)
        pair.sync(4)
        assert pair.gaps(list(pair.generator.generate([request]))).max() < 1e-5

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda meta: (),
                "k_proj.weight: the generator's model has this parameter and the weight manifest lacks it",
            ),
            (lambda meta: (meta, replace(meta, name="extra.weight")), "extra.weight: the weight manifest has it"),
            (lambda meta: (replace(meta, shape=(64, 64)),), "k_proj.weight: sent as .64, 64. .* has .32, 64."),
            (lambda meta: (replace(meta, transposed=True),), "k_proj.weight: sent as .64, 32. .* has .32, 64."),
            (lambda meta: (replace(meta, dtype="bfloat16"),), "k_proj.weight: sent as bfloat16"),
        ],
    )
    def test_a_manifest_that_does_not_cover_the_model_is_refused_at_once(
        self, shared_pair: Pair, change: Callable[[WeightMeta], tuple[WeightMeta, ...]], message: str
    ) -> None:
        name = "model.layers.1.self_attn.k_proj.weight"
        (meta,) = (meta for meta in shared_pair.manifest if meta.name == name)
        changed = with_meta(shared_pair.manifest, name, *change(meta))
        sender = WeightSender(changed, num_receivers=1, bucket_bytes=BUCKET, timeout=TIMEOUT)
        with pytest.raises(ValueError, match=message):
            shared_pair.generator.init_weight_transfer([sender.receiver_info(1)])
        shared_pair.sample()  # nothing has been touched


def test_registering_twice_is_harmless() -> None:
    from actors.weight_receiver import register_receiver

    register_receiver()
    register_receiver()
