"""Sampling responses with vLLM: token ids in, rollouts out, and new weights in between.

Wraps `vllm.LLMEngine` itself rather than `vllm.LLM`, so that each rollout is handed on as soon as it is finished. Knows
nothing of Ray or of the learner.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from actors.importing import uncollected
from actors.rollout import Prompt, Rollout
from conf.schema import ConfigError, GeneratorConfig

CPU_KV_CACHE_MIB = 256  # vLLM itself would take most of the machine's memory
WEIGHT_TRANSFER_BACKEND = "manta"


@dataclass(frozen=True)
class SampleRequest:
    """One response to sample: the `sample`-th of `prompt`, drawn with `seed`; at temperature 0 the greedy one."""

    prompt: Prompt
    sample: int
    seed: int
    temperature: float
    max_new_tokens: int


def sampling_seed(run_seed: int, prompt_id: int, sample: int) -> int:
    """A seed of 63 bits that depends on all three numbers and on nothing else."""
    state = np.random.SeedSequence((run_seed, prompt_id, sample)).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def configure_environment(device: str) -> None:
    """Set what vLLM reads from the environment. Must run before vllm is first imported.

    On CPU the engine runs in this process, where weights reach it without a second copy, and is not compiled: that
    costs half a minute at the start and gains nothing. On a GPU it has its own process, as vLLM intends.
    """
    settings = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if device == "cpu" else "1"}
    if device == "cpu":
        settings |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.update(settings)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings at every start and update are benign here


def import_engine(device: str) -> None:
    """Import vLLM's engine, which takes seconds, so that a generator that is made later starts at once."""
    configure_environment(device)
    with uncollected():
        import vllm.v1.engine.llm_engine

        if device == "cpu":
            import vllm.v1.worker.cpu_worker  # noqa: F401


class VLLMGenerator:
    """Samples from a causal language model with continuous batching.

    Rollouts carry the log-probabilities of the distribution that was sampled from: at the request's temperature, cut by
    `generator.top_k` and `top_p` and renormalised. Each is drawn with its own seed, so it does not depend on what else
    is in the batch.

    New weights come in by `init_weight_transfer` once, then `start_weight_update`, `update_weights` and
    `finish_weight_update` for each version; see actors/weight_receiver.py. From the start of an update until it has
    been verified, and for ever after a failed one, nothing is sampled.

    `generate` samples a fixed set of requests; with `add` and `step` requests come and go while others run.
    """

    def __init__(
        self,
        model_path: str,
        config: GeneratorConfig,
        *,
        device: str,
        seed: int,
        tokenizer: str | None = None,
        stop_tokens_of: str | None = None,
        trust_remote_code: bool = False,
        shares_gpus: bool = False,
    ) -> None:
        """Load the checkpoint `model_path` and start the engine on `device`, "cpu" or "cuda".

        `tokenizer` is the folder or name of another tokenizer than the one at `model_path`; `stop_tokens_of` is that of
        another checkpoint whose end-of-text tokens end a response. One that `shares_gpus` can `sleep`.
        """
        import_engine(device)
        self._config = config
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            tokenizer or model_path, trust_remote_code=trust_remote_code
        )
        self._stop_ids = _stop_token_ids(
            stop_tokens_of or model_path, self._tokenizer, trust_remote_code=trust_remote_code
        )
        from vllm import LLMEngine
        from vllm.usage.usage_lib import UsageContext

        arguments = _engine_args(model_path, config, device=device, seed=seed, trust_remote_code=trust_remote_code)
        arguments.enable_sleep_mode = shares_gpus and device == "cuda"  # on a CPU vLLM sleeps without being able to
        # Which decides how many prompt tokens a step takes: without it, far fewer than LLM.generate takes.
        self._engine: Any = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
        self._max_model_len: int = self._engine.model_config.max_model_len
        self._request_numbers = count()
        self._pending: dict[int, SampleRequest] = {}  # requests that are not finished
        self._refusal: str | None = None
        self._awake, self._has_weights = True, True
        self._set_version(0)

    @property
    def version(self) -> int:
        """The policy version that the engine holds: 0 is the checkpoint it was started from."""
        return self._version

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[Rollout]:
        """Yield a rollout for each request, as each is finished, in no fixed order.

        Sampling starts with the first `next()`; closing the iterator drops what is unfinished. Raises ValueError for a
        prompt that leaves no room for a response, RuntimeError after a failed weight update or beside other requests.
        """
        self._check_idle()
        self.check_lengths(requests)
        return self._sample(requests)

    def _sample(self, requests: Sequence[SampleRequest]) -> Iterator[Rollout]:
        self._check_idle()
        numbers: list[int] = []
        try:
            numbers += map(self.add, requests)
            while self._pending:
                yield from (rollout for _, rollout in self.step())
        finally:
            if self._engine is not None:
                self.abort(numbers)

    def add(self, request: SampleRequest) -> int:
        """Take on a request, whatever else is being sampled; return the number under which `step` answers it."""
        from vllm.inputs.engine import tokens_input

        self._check_ready()
        number = next(self._request_numbers)
        # The salt keeps keys and values that older weights computed out of the prefix cache.
        prompt = tokens_input(request.prompt.token_ids.tolist(), cache_salt=f"version-{self._version}")
        self._engine.add_request(str(number), prompt, _sampling_params(request, self._config, self._stop_ids))
        self._pending[number] = request
        return number

    def step(self) -> list[tuple[int, Rollout]]:
        """Sample a token for requests that have been added; return those that are finished with it, by their numbers.

        Raises RuntimeError after a failed weight update.
        """
        self._check_ready()
        outputs = [output for output in self._engine.step() if output.finished]
        numbers = [int(output.request_id) for output in outputs]
        return [
            (number, self._rollout(self._pending.pop(number), output.outputs[0]))
            for number, output in zip(numbers, outputs, strict=True)
        ]

    def abort(self, numbers: Iterable[int]) -> None:
        """Drop those of these requests that are not finished."""
        unfinished = [number for number in numbers if self._pending.pop(number, None) is not None]
        self._engine.abort_request([str(number) for number in unfinished])

    def check_lengths(self, requests: Sequence[SampleRequest]) -> None:
        """Raise ValueError for a prompt that leaves no room for a response."""
        for request in requests:
            length, longest = len(request.prompt.token_ids), self._max_model_len - 1
            if not 1 <= length <= longest:
                raise ValueError(
                    f"prompt {request.prompt.id} has {length} tokens; with a context of {self._max_model_len} tokens "
                    f"(generator.max_model_len) a prompt has 1 to {longest}"
                )

    def _check_ready(self) -> None:
        if self._refusal is not None:
            raise RuntimeError(f"this generator cannot sample: {self._refusal}")

    def _check_idle(self) -> None:
        self._check_ready()
        if self._pending:
            raise RuntimeError("this generator is still sampling: exhaust or close the iterator of generate() first")

    def _rollout(self, request: SampleRequest, completion: Any) -> Rollout:
        token_ids = list(completion.token_ids)
        if not token_ids or completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(
                f"vLLM ended prompt {request.prompt.id} with reason {completion.finish_reason!r} "
                f"after {len(token_ids)} tokens"
            )
        logprobs = [step[token].logprob for step, token in zip(completion.logprobs, token_ids, strict=True)]
        versions = np.full(len(token_ids), self._version, dtype=np.int32)
        for span in completion.weight_versions or ():
            versions[span.start : span.end] = int(span.version)
        return Rollout(
            prompt=request.prompt,
            sample=request.sample,
            response_ids=np.asarray(token_ids, dtype=np.int32),
            rollout_logprobs=np.asarray(logprobs, dtype=np.float32),
            response_mask=np.ones(len(token_ids), dtype=np.bool_),
            policy_versions=versions,
            finish_reason=completion.finish_reason,
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True),
        )

    def init_weight_transfer(self, workers: Sequence[Mapping[str, Any]]) -> None:
        """Join the learner's weight transport; blocks until all have joined.

        `workers` has what `WeightSender.receiver_info` says, for each of the engine's tensor-parallel processes.

        Raises ValueError naming the first parameter that the sender's manifest lacks, or has in excess, or in another
        shape or dtype than the model that vLLM built.
        """
        self._engine.collective_rpc(
            "init_weight_transfer_engine", args=({"workers": [dict(info) for info in workers]},)
        )

    @property
    def awake(self) -> bool:
        """Whether the engine can take steps."""
        return self._awake

    def sleep(self) -> None:
        """Leave the GPU to others: weights go to the host, the cache is dropped. Requests that run stand still.

        One that has woken for an update alone keeps its weights there until `wake`.
        """
        if self._awake:
            self._engine.sleep(level=1, mode="keep")
            self._awake, self._has_weights = False, False

    def wake_weights(self) -> None:
        """Bring the weights back to the GPU, and not yet the cache, for an update."""
        if not self._has_weights:
            self._engine.wake_up(["weights"])
            self._has_weights = True

    def wake(self) -> None:
        """Bring everything back; requests that stood still go on, their keys and values computed anew."""
        if not self._awake:
            self.wake_weights()
            if not self._engine.wake_up(["kv_cache"]):
                raise RuntimeError("vLLM has not woken up")
            self._awake = True

    def start_weight_update(self) -> None:
        """Make ready for new weights. Requests that run stand still until `finish_weight_update`.

        They go on with the new weights over the keys and values that the old ones computed, and each of their tokens
        carries the version that sampled it.
        """
        self._check_ready()
        self._refusal = "a weight update has begun and not been finished"
        with self._failing_for_good():
            if self._pending:
                self._engine.sleep(level=0, mode="keep")
            self._engine.collective_rpc("start_weight_update")

    def update_weights(self, info: Mapping[str, Any]) -> None:
        """Receive and load one whole update, `{"version": int}`; blocks until the sender has sent it."""
        with self._failing_for_good():
            self._engine.collective_rpc("update_weights", args=(dict(info),))

    def finish_weight_update(self, version: int) -> None:
        """Put the received weights in use, verify what the engine now computes with, and take on `version`."""
        with self._failing_for_good():
            self._engine.collective_rpc("finish_weight_update")
            if self._pending:  # their cache cannot be reset; the salt keeps it from later requests
                self._engine.wake_up(["scheduling"])
            elif not self._engine.reset_prefix_cache():
                raise RuntimeError("vLLM could not reset its prefix cache after a weight update")
            self._set_version(version)
        self._refusal = None

    @contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        from actors.weights import WeightMismatchError

        try:
            yield
        except Exception as error:
            mismatch = WeightMismatchError.parse(str(error))
            self._refusal = f"its weight update failed ({mismatch or error})"
            if mismatch is None or isinstance(error, WeightMismatchError):
                raise
            raise mismatch from error  # a worker process can only send its message

    def _set_version(self, version: int) -> None:
        self._version = version
        self._engine.set_weight_version(str(version))

    def shutdown(self) -> None:
        """Stop the engine and its processes. May be called again."""
        self._refusal = "it has been shut down"
        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine = None


def _engine_args(model_path: str, config: GeneratorConfig, *, device: str, seed: int, trust_remote_code: bool) -> Any:
    from vllm import EngineArgs
    from vllm.config import WeightTransferConfig

    from actors.weight_receiver import WorkerExtension, register_receiver

    register_receiver()
    kv_cache_mib = CPU_KV_CACHE_MIB if config.kv_cache_mib is None and device == "cpu" else config.kv_cache_mib
    return EngineArgs(
        model=model_path,
        skip_tokenizer_init=True,
        trust_remote_code=trust_remote_code,
        load_format="safetensors",
        dtype=config.dtype,
        seed=seed,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_memory_bytes=None if kv_cache_mib is None else kv_cache_mib << 20,
        enforce_eager=config.enforce_eager or device == "cpu",
        # On CPU a request with a seed fails in the step that takes a part of its prompt alone: so none does.
        enable_chunked_prefill=False if device == "cpu" else None,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        disable_log_stats=True,
        weight_transfer_config=WeightTransferConfig(backend=WEIGHT_TRANSFER_BACKEND),
        worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
    )


def _sampling_params(request: SampleRequest, config: GeneratorConfig, stop_ids: Sequence[int]) -> Any:
    """Every field that shapes the distribution, sent explicitly: no default of the model or of vLLM may change it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=1,
        temperature=request.temperature,
        seed=request.seed,
        max_tokens=request.max_new_tokens,
        min_tokens=0,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        logit_bias=None,
        allowed_token_ids=None,
        bad_words=[],
        watermarking=False,
        repetition_detection=None,
        ignore_eos=False,
        stop=[],
        stop_token_ids=list(stop_ids),
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _stop_token_ids(model_path: str, tokenizer: Any, *, trust_remote_code: bool) -> list[int]:
    """The end-of-text ids that the config, the generation config and the tokenizer of the model name, together."""
    from transformers import AutoConfig, GenerationConfig

    sources: list[Any] = [AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code), tokenizer]
    with suppress(OSError):  # a checkpoint need not have one
        sources.append(GenerationConfig.from_pretrained(model_path))
    ids: set[int] = set()
    for source in sources:
        eos = getattr(source, "eos_token_id", None)
        ids.update([] if eos is None else [eos] if isinstance(eos, int) else eos)
    if not ids:
        raise ConfigError("model.path", model_path, "neither model nor tokenizer has an EOS token: no response can end")
    return sorted(ids)
