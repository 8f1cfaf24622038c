"""How the batches of a run divide, and what they come to. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import Config, ConfigError


@dataclass(frozen=True)
class Finding:
    """One figure of a run, what is to be said of it, and what cannot work."""

    what: str
    value: str
    remark: str = ""
    error: ConfigError | None = None


def longest(config: Config) -> int:
    """Return the tokens of the longest prompt with the longest response."""
    limit = config.generator.max_model_len
    most = config.data.max_prompt_tokens + config.generator.max_new_tokens
    return most if limit is None else min(limit, most)


def batch_arithmetic(config: Config) -> list[Finding]:
    """Return the sizes of batches, in rollouts, with the nearest value that divides for each that does not."""
    algorithm, cluster, generator = config.algorithm, config.cluster, config.generator
    train, mini = algorithm.train_batch_size, algorithm.mini_batch_size
    shared_by, generators = config.learner.sequence_parallel_size, cluster.num_generators
    hands = cluster.num_learners // shared_by
    who = "learner ranks" if shared_by == 1 else f"groups of {shared_by} ranks"
    most = longest(config)
    budget = config.learner.micro_batch_tokens
    in_micro = max(budget // most, 1)
    of_hand = -(-mini // hands)
    updates = algorithm.num_steps * algorithm.ppo_epochs * algorithm.num_mini_batches
    rollouts = algorithm.num_steps * train
    chunk = config.reward.batch_size
    too_few = None
    if hands > mini:
        why = f"a mini-batch of {mini} rollouts leaves ranks without any; set it to {mini * shared_by} or less"
        too_few = ConfigError("cluster.num_learners", cluster.num_learners, why)
    return [
        Finding(
            "train batch",
            f"{train:,}",
            f"{algorithm.prompts_per_step} prompts x {algorithm.samples_per_prompt} samples, a step",
        ),
        Finding("mini-batches", str(algorithm.num_mini_batches), f"of {mini}, one optimizer step each"),
        Finding("of a mini-batch, a rank has", _share(mini, hands), _uneven(mini, hands, who), too_few),
        Finding(
            "micro-batches of it",
            f"1 to {-(-of_hand // in_micro)}",
            f"of at most {budget:,} tokens: {in_micro} of the longest sequences ({most:,} tokens)"
            + ("; one of these is longer than learner.micro_batch_tokens" if most > budget else ""),
        ),
        Finding(
            "of a train batch, a generator has", _share(train, generators), _uneven(train, generators, "generators")
        ),
        Finding(
            "at a time, a generator samples",
            f"{min(generator.max_num_seqs, -(-train // generators)):,}",
            f"generator.max_num_seqs={generator.max_num_seqs}",
        ),
        Finding(
            "chunks",
            f"{-(-train // chunk):,}",
            f"of {chunk} rollouts, scored and evaluated together" + _fewer(train, chunk, generators, hands),
        ),
        Finding("optimizer steps of the run", f"{updates:,}", f"{algorithm.num_steps:,} steps of the loop"),
        Finding(
            "rollouts of the run", f"{rollouts:,}", f"at most {rollouts * generator.max_new_tokens:,} response tokens"
        ),
    ]


def _share(count: int, among: int) -> str:
    low, high = count // among, -(-count // among)
    return str(low) if low == high else f"{low} or {high}"


def _uneven(count: int, among: int, who: str) -> str:
    """Return the nearest number that divides evenly, if this one does not."""
    if count % among == 0:
        return f"{among} {who}"
    low, high = count - count % among, count - count % among + among
    near = low if low and count - low <= high - count else high
    return f"{among} {who} do not divide {count}: some wait for others; the nearest that they divide is {near}"


def _fewer(train: int, chunk: int, generators: int, hands: int) -> str:
    chunks = -(-train // chunk)
    if chunks < generators:
        return f"; fewer than generators: cut smaller, into {-(-train // generators)}"
    if chunks < 2 * hands:
        smaller = max(train // (2 * hands), 1)
        return f"; fewer than two a rank, of which few are evaluated early; reward.batch_size={smaller} makes more"
    return ""
