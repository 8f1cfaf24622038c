"""Scores of a reward model that vLLM runs with its pooling runner.

Knows vLLM, imported when a model is made, and nothing of Ray or of the learner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.generator import import_engine
from actors.reward_model import Conversations
from actors.reward_source import Fault
from actors.rollout import Rollout
from conf.schema import ConfigError, RewardSourceConfig

# Those whose scores were compared with transformers' and found equal.
ARCHITECTURES = tuple(f"{family}ForSequenceClassification" for family in ("Llama", "Qwen2", "Qwen3"))
LEAST_KV_CACHE_BYTES = 64 << 20


class VLLMRewardModel:
    """Scores of a whole checkpoint: the output of the head at the last token, without an activation.

    The conversations are those that `RewardModel` reads, sent as token ids, each by itself and without padding. The
    head works in float32. `source.max_batch_tokens` is how many tokens vLLM takes in one pass.
    """

    def __init__(self, source: RewardSourceConfig, *, key: str, device: str, trust_remote_code: bool = False) -> None:
        """Starts the engine on `device`, "cpu" or "cuda".

        Raises ConfigError naming `key`, where the source stands, for a checkpoint that cannot score or whose
        architecture has not been shown to score as with transformers.
        """
        self.conversations = Conversations(source, key=key, trust_remote_code=trust_remote_code)
        _check(self.conversations)
        import_engine(device)
        from vllm import LLM
        from vllm.config import PoolerConfig

        tokens = source.max_batch_tokens
        context = self.conversations.context
        self._llm: Any = LLM(
            source.path,
            runner="pooling",
            pooler_config=PoolerConfig(use_activation=False),  # or the score would go through a sigmoid
            trust_remote_code=trust_remote_code,
            load_format="safetensors",
            dtype=source.dtype,
            max_model_len=tokens if context is None else min(tokens, context),
            max_num_batched_tokens=tokens,
            max_num_seqs=min(256, tokens),
            kv_cache_memory_bytes=kv_cache_bytes(self.conversations.model_config, source),
            gpu_memory_utilization=0.01,  # with the line above, only how much has to be free at the start
            enable_prefix_caching=False,
            enforce_eager=device == "cpu",
            disable_log_stats=True,
            seed=0,
        )

    def score(self, rollouts: Sequence[Rollout]) -> list[float | Fault]:
        """As `RewardModel.score`."""
        from vllm.inputs import TokensPrompt

        read = [self.conversations.render(rollout) for rollout in rollouts]
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in read if not isinstance(ids, Fault)]
        outputs = self._llm.classify(prompts, use_tqdm=False) if prompts else []
        # vLLM calls them probabilities whatever they are.
        return self.conversations.answers(rollouts, read, [float(output.outputs.probs[0]) for output in outputs])

    def shutdown(self) -> None:
        """Stops the engine and its processes."""
        self._llm.llm_engine.engine_core.shutdown()


def kv_cache_bytes(model_config: Any, source: RewardSourceConfig) -> int:
    """Bytes of keys and values for two full passes, so that a pass never waits for room that a small cache lacks."""
    text = model_config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    element = 4 if source.dtype == "float32" else 2
    a_token: int = 2 * text.num_hidden_layers * text.num_key_value_heads * head * element  # keys and values
    return max(2 * source.max_batch_tokens * a_token, LEAST_KV_CACHE_BYTES)


def _check(conversations: Conversations) -> None:
    key, source = f"{conversations.key}.engine", conversations.source
    if conversations.adapter is not None:
        remedy = f"{source.path} is an adapter, which only transformers merges; set {key}=transformers"
        raise ConfigError(key, source.engine, remedy)
    architectures = conversations.model_config.architectures or ["none"]
    if architectures[0] not in ARCHITECTURES:
        remedy = f"{source.path} is {architectures[0]}; vLLM is known to score as transformers does for"
        raise ConfigError(key, source.engine, f"{remedy} {', '.join(ARCHITECTURES)}; set {key}=transformers")
