"""What learner ranks write of themselves, and that new ones made of it train on as if nothing had been.

With the workers of both kinds on real gloo ranks; the sessions of ranks read each other's files. About a minute and a
half.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.schema import ConfigError, LoraConfig
from learner.checkpoint import ShardFiles, Snapshot, random_states, rank_files, set_random_states
from learner.networks import LearnerSetup
from learner.ranks import Ranks
from learner.shards import Shard
from learner.supervised import SupervisedSetup
from tests import test_learner, test_supervised
from tests.learner_ranks import on_ranks
from tests.runs import reproducible
from tests.tiny_models import VOCAB_SIZE, tiny_checkpoint

# The files, without any engine


def snapshots(whole: dict[str, torch.Tensor], world_size: int) -> list[Snapshot]:
    """What ranks would write that have each tensor of `whole` in equal parts, the last ones short or empty."""
    result = []
    for rank in range(world_size):
        tensors = {}
        for name, tensor in whole.items():
            size = -(-len(tensor) // world_size)
            tensors[name] = tensor[rank * size : (rank + 1) * size].clone()
        tensors["rng/torch"] = torch.full((3,), rank, dtype=torch.uint8)
        result.append(Snapshot(rank, tensors, {"rank": rank, "world_size": world_size}))
    return result


WHOLE = {"policy/master/a": torch.arange(13.0), "policy/master/b": torch.tensor([7.0]), "ema/a": torch.arange(6.0)}


@pytest.mark.parametrize("written_by", [1, 2, 3, 5])
@pytest.mark.parametrize("read_by", [1, 2, 4])
def test_any_number_of_ranks_reads_its_parts(tmp_path: Path, written_by: int, read_by: int) -> None:
    for snapshot in snapshots(WHOLE, written_by):
        snapshot.write(tmp_path)
    with ShardFiles.of(tmp_path) as files:
        files.check({name: len(tensor) for name, tensor in WHOLE.items()})
        for name, tensor in WHOLE.items():
            size = -(-len(tensor) // read_by)
            read = []
            for rank in range(read_by):
                part = tensor[rank * size : (rank + 1) * size]
                shard = Shard(torch.full_like(part, -1.0), min(rank * size, len(tensor)), len(tensor))
                files.read_into(shard, name)
                read.append(shard.values)
            assert torch.equal(torch.cat(read), tensor), name
        for rank in range(read_by):
            assert files.facts(rank)["rank"] == rank % written_by
            assert files.random_tensors(rank)["rng/torch"].tolist() == [rank % written_by] * 3


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"policy/master/a": 12}, "of policy/master/a it holds 13 elements, and this run's networks have 12 elements"),
        ({"policy/master/c": 4}, "of policy/master/c it holds nothing, and this run's networks have 4 elements"),
        ({"ema/a": None}, "of ema/a it holds 6 elements, and this run's networks have nothing"),
    ],
)
def test_another_model_is_refused_by_its_first_parameter(
    tmp_path: Path, wanted: dict[str, int | None], message: str
) -> None:
    for snapshot in snapshots(WHOLE, 2):
        snapshot.write(tmp_path)
    sizes = {name: len(tensor) for name, tensor in WHOLE.items()} | wanted
    with ShardFiles.of(tmp_path) as files, pytest.raises(ConfigError, match=f"resume=.*{message}.*of another model"):
        files.check({name: size for name, size in sizes.items() if size is not None})


def test_write_returns_the_size_and_checksum_of_every_file(tmp_path: Path) -> None:
    written = snapshots(WHOLE, 2)[1].write(tmp_path / "new" / "learner")
    assert sorted(written) == sorted(p.name for p in (tmp_path / "new" / "learner").iterdir())
    assert sorted(written) == ["rank_00001.json", "rank_00001.safetensors"]
    for name, (size, digest) in written.items():
        content = (tmp_path / "new" / "learner" / name).read_bytes()
        assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("fault", ["missing", "truncated", "empty"])
def test_a_torn_file_is_refused_by_its_name(tmp_path: Path, which: int, fault: str) -> None:
    for snapshot in snapshots(WHOLE, 2):
        snapshot.write(tmp_path)
    torn = rank_files(tmp_path, 1)[which]
    match fault:
        case "missing":
            torn.unlink()
        case "truncated":
            torn.write_bytes(torn.read_bytes()[:-1])
        case "empty":
            torn.write_bytes(b"")
    with pytest.raises(ConfigError, match=f"resume=.*{torn.name}.*cannot be read"), ShardFiles.of(tmp_path):
        pass


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """What a full disk is like: writing fails in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_is_an_oserror_that_names_the_file(tmp_path: Path) -> None:
    snapshot = Snapshot(0, {"policy/master/a": torch.zeros(1 << 19)}, {})
    with files_limited_to(1 << 20), pytest.raises(OSError, match=r"rank_00000\.safetensors: .*too large"):
        snapshot.write(tmp_path)


def draws() -> tuple[list[float], list[float], list[float]]:
    """Three of each generator: an odd number of Gaussians, of which they make two at a time."""
    return (
        torch.randn(3).tolist(),
        [random.gauss(0.0, 1.0) for _ in range(3)],
        np.random.standard_normal(3).tolist(),
    )


def test_random_states_go_through_files(tmp_path: Path) -> None:
    before = random_states()
    try:
        draws()
        tensors, facts = random_states()
        Snapshot(0, tensors, {"world_size": 1, "rng": facts}).write(tmp_path)
        want = draws()
        assert draws() != want
        with ShardFiles.of(tmp_path) as files:
            set_random_states(files.random_tensors(5), files.facts(5)["rng"])
        assert draws() == want
    finally:
        set_random_states(*before)


# The workers

UPDATES = 2
SEPARATE, SHARED, ADAPTERS, SUPERVISED = (
    "bfloat16, separate critic, average",
    "shared critic, average",
    "adapters",
    "SFT",
)
VARIANTS = (SEPARATE, SHARED, ADAPTERS, SUPERVISED)
ON_TWO = (SEPARATE, SHARED, SUPERVISED)


@dataclass(frozen=True)
class Held:
    """A snapshot, and what a gather sees of the weights, in float32 arrays."""

    tensors: dict[str, Any]
    facts: dict[str, Any]
    gathered: dict[str, Any]


@dataclass(frozen=True)
class Course:
    """A worker from the moment of a checkpoint on."""

    start: Held
    end: Held
    metrics: list[dict[str, float]]


def make_setups(models: dict[str, str]) -> dict[str, LearnerSetup | SupervisedSetup]:
    def of_learner(name: str, **learner: Any) -> LearnerSetup:
        setup = test_learner.make_setup(name, models, micro_batch_tokens=10_000, **learner)
        return replace(setup, algorithm=replace(setup.algorithm, ppo_epochs=1))

    supervised = test_supervised.make_setup(Path(models["policy"]))
    return {
        SEPARATE: of_learner("gae", dtype="bfloat16", ema_decay=0.7),
        # Without settings of DeepSpeed it keeps parameters as small as these whole on every rank.
        SHARED: of_learner("shared critic, entropy, KL loss", deepspeed={}, ema_decay=0.7),
        ADAPTERS: of_learner("rloo, gspo, lora"),
        SUPERVISED: replace(supervised, lora=LoraConfig(rank=3, dropout=0.2)),
    }


def chosen(setups: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: setups[name] for name in names}


def make_worker(setup: LearnerSetup | SupervisedSetup, ranks: Ranks) -> Any:
    from learner.sft import SFTWorker
    from learner.worker import LearnerWorker

    return LearnerWorker(setup, ranks) if isinstance(setup, LearnerSetup) else SFTWorker(setup, ranks)


def advance(worker: Any, step: int) -> dict[str, float]:
    ranks: Ranks = worker.ranks
    if isinstance(worker.setup, SupervisedSetup):
        metrics: dict[str, float] = worker.train_step(test_supervised.examples(step)[ranks.rank :: ranks.world_size])
        return metrics
    hands = [test_learner.hand(p, ranks, step=step, index=i) for i, p in enumerate(test_learner.train_batch(step))]
    update: dict[str, float] = worker.update(hands, kl_coef=test_learner.KL_COEF, seed=step, step=step)
    return update


def held(worker: Any) -> Held:
    from learner import zero

    snapshot = worker.snapshot()
    gathered: dict[str, Any] = {}
    for name, engine in worker_engines(worker).items():
        dtype = worker.setup.learner.dtype
        state = zero.full_state(engine.module.model, dtype=dtype)
        gathered |= {f"{name}/{which}": tensor.float().numpy() for which, tensor in state.items()}
    tensors = {name: tensor.numpy().copy() for name, tensor in snapshot.tensors.items()}
    return Held(tensors, json.loads(json.dumps(snapshot.facts)), gathered)


def worker_engines(worker: Any) -> dict[str, Any]:
    return {"network": worker.engine} if isinstance(worker.setup, SupervisedSetup) else worker._engines


def interrupted(ranks: Ranks, setups: dict[str, Any], folder: Path, others: dict[str, Path]) -> dict[str, Any]:
    """Of each variant: train, write a checkpoint to `folder` while training on, and train on from it and from `others`.

    Returns the courses by variant and by where they have begun.
    """
    return {name: of_variant(ranks, setup, name, folder, others) for name, setup in setups.items()}


def of_variant(ranks: Ranks, setup: Any, name: str, folder: Path, others: dict[str, Path]) -> dict[str, Course]:
    torch.manual_seed(17 + ranks.rank)  # from here on every rank has a random state of its own
    worker = make_worker(setup, ranks)
    torch.manual_seed(17 + ranks.rank)
    advance(worker, 0)
    if isinstance(setup, LearnerSetup):
        worker.training.nonfinite_in_a_row = 2
    start = held(worker)
    written: list[dict[str, tuple[int, str]]] = []
    snapshot = worker.snapshot()
    writer = threading.Thread(target=lambda: written.append(snapshot.write(folder / name)))
    writer.start()
    courses = {"uninterrupted": train_on(worker, start)}
    writer.join()
    assert sorted(written[0]) == [f"rank_{ranks.rank:05d}.json", f"rank_{ranks.rank:05d}.safetensors"]
    torch.distributed.barrier()
    for whence, other in {"resumed": folder, **(others if name == SEPARATE else {})}.items():
        again = make_worker(setup, ranks)
        if (whence, name) == ("resumed", SHARED):  # not only into engines as they begin
            advance(again, 2)
        again.restore(other / name)
        courses[whence] = train_on(again, held(again))
    return courses


def train_on(worker: Any, start: Held) -> Course:
    metrics = reproducible([advance(worker, step) for step in range(1, UPDATES)])
    return Course(start, held(worker), metrics)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("models")
    paths = {name: str(tiny_checkpoint(folder / name, seed=i)) for i, name in enumerate(("policy", "reference"))}
    torch.manual_seed(0)
    critic = AutoModelForSequenceClassification.from_pretrained(paths["policy"], num_labels=1, dtype=torch.float32)
    critic.save_pretrained(folder / "critic")
    larger = tiny_checkpoint(folder / "larger", vocab_size=VOCAB_SIZE + 1)
    return {**paths, "critic": str(folder / "critic"), "larger": str(larger)}


Courses = list[dict[str, dict[str, Course]]]  # of each rank, by variant and by where they have begun


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to which one rank writes."""
    return tmp_path_factory.mktemp("one")


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two_ranks(models: dict[str, str], by_two: Path) -> Courses:
    return on_ranks(interrupted, 2, chosen(make_setups(models), ON_TWO), by_two, {})


@pytest.fixture(scope="module")
def one_rank(models: dict[str, str], by_one: Path, by_two: Path, two_ranks: Courses) -> Courses:
    return on_ranks(interrupted, 1, make_setups(models), by_one, {"from two": by_two})


def resumed(ranks: Ranks, setups: dict[str, Any], larger: str, folder: Path) -> tuple[Course, list[str]]:
    """Train on from the files in `folder`; return the course, and what is said of files that do not fit."""
    worker = make_worker(setups[SHARED], ranks)
    worker.restore(folder / SHARED)
    course = train_on(worker, held(worker))
    supervised = setups[SUPERVISED]
    model = replace(supervised.model, path=larger, tokenizer=larger)
    worker = make_worker(replace(supervised, model=model, lora=LoraConfig()), ranks)
    before = held(worker)
    said = []
    for name in (SUPERVISED, SHARED, SEPARATE):
        with pytest.raises(ConfigError) as caught:
            worker.restore(folder / name)
        said.append(str(caught.value))
    assert_equal(held(worker), before)
    return course, said


@pytest.fixture(scope="module")
def two_from_one(models: dict[str, str], by_one: Path, one_rank: Courses) -> list[tuple[Course, list[str]]]:
    return on_ranks(resumed, 2, make_setups(models), models["larger"], by_one)


def assert_equal(got: Held, want: Held) -> None:
    """Bit for bit."""
    assert got.facts == want.facts
    for mine, theirs in ((got.tensors, want.tensors), (got.gathered, want.gathered)):
        assert mine.keys() == theirs.keys()
        for name, values in theirs.items():
            np.testing.assert_array_equal(mine[name], values, err_msg=name)


def whole(courses: list[Held]) -> dict[str, Any]:
    """The flat tensors of all ranks, and what a gather sees, without random states."""
    names = [name for name in courses[0].tensors if not name.startswith("rng/")]
    return courses[0].gathered | {name: np.concatenate([one.tensors[name] for one in courses]) for name in names}


def furthest(courses: list[Held], others: list[Held]) -> float:
    one, other = whole(courses), whole(others)
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("session", "name"),
    [*(("one_rank", name) for name in VARIANTS), *(("two_ranks", name) for name in ON_TWO)],
)
def test_a_worker_that_is_restored_trains_on_bit_for_bit(
    request: pytest.FixtureRequest, session: str, name: str
) -> None:
    """Weights, optimizer, average, schedule, counters, random states and metrics."""
    courses: Courses = request.getfixturevalue(session)
    for of_rank in courses:
        want, got = of_rank[name]["uninterrupted"], of_rank[name]["resumed"]
        assert_equal(got.start, want.start)
        assert got.metrics == want.metrics
        assert_equal(got.end, want.end)
        moved = {n for n, values in want.end.tensors.items() if (values != want.start.tensors[n]).any()}
        kinds = {kind(n) for n in want.end.tensors} - {"rng/torch"}
        assert {kind(n) for n in moved} - {"rng/torch"} == kinds, "and it does train"
        if name != SUPERVISED:
            assert want.start.facts["counters"] == {"nonfinite_in_a_row": 2}
            assert want.end.facts["counters"] == {"nonfinite_in_a_row": 0}


def kind(name: str) -> str:
    """ "policy/exp_avg" of "policy/exp_avg/model.norm.weight"."""
    return name.rpartition("/")[0] if not name.startswith("rng/") else name


@pytest.mark.ranks
def test_dropout_of_adapters_goes_on_from_the_random_state_of_its_rank(two_ranks: Courses) -> None:
    states = [of_rank[SUPERVISED]["resumed"].start.tensors["rng/torch"] for of_rank in two_ranks]
    assert (states[0] != states[1]).any()
    for of_rank, state in zip(two_ranks, states, strict=True):
        assert (of_rank[SUPERVISED]["resumed"].end.tensors["rng/torch"] != state).any()


@pytest.mark.ranks
@pytest.mark.parametrize("resumed_by", [1, 2])
def test_another_number_of_ranks_has_the_same_state(
    one_rank: Courses, two_ranks: Courses, two_from_one: list[tuple[Course, list[str]]], resumed_by: int
) -> None:
    """And its later steps differ by the order of sums."""
    if resumed_by == 1:
        written, read, tolerance = two_ranks, [of_rank[SEPARATE]["from two"] for of_rank in one_rank], 1e-2
    else:
        written, read, tolerance = one_rank, [course for course, _ in two_from_one], 1e-6
    name = SEPARATE if resumed_by == 1 else SHARED
    want = [of_rank[name]["uninterrupted"] for of_rank in written]
    assert furthest([c.start for c in read], [c.start for c in want]) == 0.0
    assert read[0].start.facts["engines"] == want[0].start.facts["engines"]
    assert [m.keys() for m in read[0].metrics] == [m.keys() for m in want[0].metrics]
    assert 0.0 < furthest([c.end for c in read], [c.end for c in want]) < tolerance


@pytest.mark.ranks
@pytest.mark.parametrize("name", ON_TWO)
def test_the_files_hold_each_trained_element_once_and_no_padding(
    by_two: Path, two_ranks: Courses, one_rank: Courses, name: str
) -> None:
    from safetensors.numpy import load_file

    files = [load_file(rank_files(by_two / name, rank)[0]) for rank in range(2)]
    of_one = one_rank[0][name]["uninterrupted"].start.tensors
    assert files[0].keys() == files[1].keys() == of_one.keys()
    for which in of_one:
        if not which.startswith("rng/"):
            assert sum(len(of_rank[which]) for of_rank in files) == len(of_one[which]), which
            assert all(np.isfinite(of_rank[which]).all() for of_rank in files), which
    if name == SHARED:
        assert [len(of_rank["policy/master/value_head.bias"]) for of_rank in files] == [1, 0]


@pytest.mark.ranks
@pytest.mark.parametrize("name", [ADAPTERS, SUPERVISED])
def test_with_adapters_these_alone_are_in_the_files(one_rank: Courses, name: str) -> None:
    tensors = one_rank[0][name]["resumed"].start.tensors
    assert len(tensors) > 1
    assert all(".lora_" in which for which in tensors if not which.startswith("rng/"))


@pytest.mark.ranks
def test_checkpoints_of_other_networks_are_refused(
    two_from_one: list[tuple[Course, list[str]]],
) -> None:
    """By every rank; the networks stay as they were."""
    embedding = "of network/master/model.model.embed_tokens.weight"
    for _, said in two_from_one:
        assert f"{embedding} it holds nothing, and this run's networks have {(VOCAB_SIZE + 1) * 64} elements" in said[0]
        assert "it holds the networks ['policy'], this run has ['network']" in said[1]
        assert "it holds the networks ['critic', 'policy'], this run has ['network']" in said[2]
        assert all("of another model" in one for one in said)
