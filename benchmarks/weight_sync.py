"""How fast new weights come into generators, verified, beside a plain copy of the same bytes.

    python -m benchmarks.weight_sync --millions 1 10 100 --generators 1 2

The sender is this process, each generator one of its own with a vLLM engine on CPU; models are random
Llamas in float32.
In each round the contestants take turns: the copy (this process copies all bytes into shared memory, then every
generator copies them out into memory of its own), and the whole update, from the first tensor that is asked for to the
last check of what the engines hold. The weights change before each update.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import Result, in_turns, median_ratio, seconds

# (hidden, intermediate, layers, vocabulary) of a tied Llama with heads of 32, or 64 from 768 on
SHAPES = {1: (128, 352, 5, 260), 10: (320, 896, 7, 4096), 100: (768, 2048, 11, 32_000), 500: (1280, 3456, 23, 32_000)}
WARM_UP = 2


def make_checkpoint(millions: int, folder: Path) -> Any:
    """Write a random model of about so many million parameters, with a tokenizer; return the model."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.tiny_models import tiny_tokenizer

    hidden, intermediate, layers, vocabulary = SHAPES[millions]
    heads = hidden // (64 if hidden >= 768 else 32)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        ),
        dtype=torch.float32,
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.requires_grad_(False)


class Clock:
    """Seconds spent in named calls, each without the time of those that it makes itself."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inner.append(0.0)
        yield
        total = time.perf_counter() - start
        self.spent[name] += total - self._inner.pop()
        self._inner[-1] += total

    def wrap(self, owner: Any, function: str, name: str) -> None:
        """Measure every call of `owner.function` from now on."""
        inner: Callable[..., Any] = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.measured(name):
                return inner(*args, **kwargs)

        setattr(
            owner, function, staticmethod(timed) if isinstance(owner.__dict__.get(function), staticmethod) else timed
        )


def profiled() -> Clock:
    """Measure the parts of an update in this process, which runs a generator."""
    import vllm._custom_ops
    from vllm.model_executor.model_loader import reload

    from actors import weight_receiver
    from actors.weight_audit import WeightAudit
    from actors.weight_transport import GlooTransport, SharedMemoryTransport

    clock = Clock()
    for transport in (GlooTransport, SharedMemoryTransport):
        clock.wrap(transport, "receive", "wait")
        clock.wrap(transport, "broadcast", "wait")
    clock.wrap(weight_receiver, "checksum", "checksum")
    clock.wrap(WeightAudit, "note", "evidence")
    clock.wrap(WeightAudit, "verify", "verify")
    clock.wrap(weight_receiver.WeightReceiver, "_load", "load")
    clock.wrap(weight_receiver.WeightReceiver, "_keep", "keep")
    clock.wrap(weight_receiver.WeightReceiver, "_take_in", "cut tensors")
    clock.wrap(reload, "initialize_layerwise_reload", "begin")
    clock.wrap(reload, "finalize_layerwise_reload", "finish")
    clock.wrap(vllm._custom_ops, "create_onednn_mm", "pack")
    return clock


def generate(*args: Any) -> None:
    """A generator's process. As under Ray, calls run beside the main thread: malloc may work otherwise there."""
    thread = threading.Thread(target=serve, args=args)
    thread.start()
    thread.join()


def serve(folder: str, shared: str, connection: Any) -> None:
    """Do what is told, and answer with the seconds that each part of it took so far."""
    import torch

    from actors.generator import VLLMGenerator, configure_environment
    from conf.schema import GeneratorConfig

    configure_environment("cpu")
    torch.set_num_threads(1)
    config = GeneratorConfig(max_new_tokens=16, max_model_len=128, max_num_seqs=4, kv_cache_mib=64, dtype="float32")
    generator = VLLMGenerator(folder, config, device="cpu", seed=0)
    outside = mapped(shared)
    own = torch.zeros_like(outside)
    clock = profiled()

    def update(version: int) -> None:
        with clock.measured("rest"):
            generator.start_weight_update()
            generator.update_weights({"version": version})
            generator.finish_weight_update(version)

    calls: dict[str, Callable[..., Any]] = {
        "join": generator.init_weight_transfer,
        "copy": lambda: own.copy_(outside),
        "update": update,
        "profile": lambda: None,
    }
    connection.send("up")
    while (told := connection.recv()) is not None:
        name, *args = told
        calls[name](*args)
        connection.send(dict(clock.spent))
        if name == "profile":
            clock.spent.clear()
    generator.shutdown()


def mapped(path: str) -> Any:
    import torch

    descriptor = os.open(path, os.O_RDWR)
    memory = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.uint8)


def measure(millions: int, num_generators: int, *, rounds: int, bucket_mib: int) -> dict[str, Any]:
    """Return the row of one size and number of generators: medians over the rounds."""
    import torch

    from actors.weights import manifest_of
    from learner.weight_sender import WeightSender

    torch.set_num_threads(1)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile(dir="/dev/shm") as shared:
        model = make_checkpoint(millions, Path(folder))
        manifest = manifest_of(model, "float32")
        num_bytes = sum(meta.num_bytes for meta in manifest)
        os.posix_fallocate(shared.fileno(), 0, num_bytes)
        outside, source = mapped(shared.name), torch.ones(num_bytes, dtype=torch.uint8)
        pipes, processes = [], []
        for _ in range(num_generators):
            ours, theirs = spawn.Pipe()
            processes.append(spawn.Process(target=generate, args=(folder, shared.name, theirs), daemon=True))
            processes[-1].start()
            pipes.append(ours)
        assert [pipe.recv() for pipe in pipes] == ["up"] * num_generators

        def tell(*message: Any) -> None:
            for pipe in pipes:
                pipe.send(message)

        def answers() -> list[Any]:
            return [pipe.recv() for pipe in pipes]

        sender = WeightSender(manifest, num_receivers=num_generators, bucket_bytes=bucket_mib << 20)
        for number, pipe in enumerate(pipes):
            pipe.send(("join", [sender.receiver_info(1 + number)]))
        sender.connect()
        answers()
        parameters = dict(model.named_parameters())
        groups = [[(meta.name, parameters[meta.name]) for meta in group] for group in manifest.groups]
        versions = iter(range(1, 1000))
        sent: list[Any] = []

        def copy() -> None:
            outside.copy_(source)
            tell("copy")
            answers()

        def update() -> float:
            for parameter in parameters.values():
                parameter.mul_(1.01)
            version = next(versions)

            def whole() -> None:
                tell("update", version)
                sent.append(sender.send(groups, version=version))
                answers()

            return seconds(whole)

        for _ in range(WARM_UP):
            copy()
            update()
        tell("profile")
        answers()
        sent.clear()
        taken = in_turns({"copy": lambda: seconds(copy), "update": update}, rounds=rounds)
        tell("profile")
        profile = answers()[0]
        tell_end(pipes, processes)
        sender.close()
    parts = {name[:-2]: statistics.mean(getattr(times, name) for times in sent) for name in vars(sent[0])}
    return {
        "millions": round(num_bytes / 4e6, 1),
        "generators": num_generators,
        "copy_s": statistics.median(taken["copy"]),
        "update_s": statistics.median(taken["update"]),
        "bytes_per_s": num_bytes / statistics.median(taken["update"]),
        "of_copy": median_ratio(taken["copy"], taken["update"]),
        "sender_ms": milliseconds(parts),
        "generator_ms": milliseconds({name: spent / rounds for name, spent in profile.items()}),
    }


def milliseconds(parts: dict[str, float]) -> str:
    """Return the parts of a time, given in seconds, largest first."""
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {1e3 * spent:.0f}" for name, spent in ordered if spent >= 5e-4)


def tell_end(pipes: list[Any], processes: list[Any]) -> None:
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 10, 100], choices=SHAPES, help="parameters")
    parser.add_argument("--generators", type=int, nargs="+", default=[1], help="how many at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    os.environ["MALLOC_ARENA_MAX"] = "1"  # as in every CPU process of a run: cluster/session.py
    rows = [
        measure(millions, count, rounds=options.rounds, bucket_mib=options.bucket_mib)
        for millions in options.millions
        for count in options.generators
    ]
    notes = [
        "of_copy: the time of the copy divided by that of the update, median over rounds.",
        "sender_ms, generator_ms: where the time of one update went, in the sender and in the first generator.",
        "Nothing has to be gathered here: the sender's parameters are whole.",
    ]
    configuration = {"rounds": options.rounds, "warm_up": WARM_UP, "bucket_mib": options.bucket_mib, "dtype": "float32"}
    Result("weight_sync", rows, configuration, notes).say(options.json)


if __name__ == "__main__":
    main()
