"""`mode=plan`: where the processes of a run would stand, and whether they fit, without a GPU and without Ray.

Prints what it finds for the ppo stage, and ends with the one setting to change if it cannot work. The figures are
arithmetic (learner/sizes.py, actors/sizes.py); docs/cluster.md says how near they were to what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import floor
from typing import Any

from rich.console import Console
from rich.table import Table

from actors import sizes as actor_sizes
from cluster.batch_arithmetic import Finding, batch_arithmetic, longest
from cluster.placement import COLOCATED, Plan, missing, plan
from cluster.roles import processes_of
from cluster.shapes import Networks, networks_of
from conf.schema import Config, ConfigError
from learner import sizes, zero

GIB = 1 << 30
CONTEXT = {"cuda": int(1.5 * GIB), "cpu": 0}  # CUDA's own, with its kernels and NCCL's buffers, of each process
FRAGMENTS = 0.05  # of what a process allocates, lost between blocks
HOST_BASE = int(2.5 * GIB)  # of a process that has imported torch, vLLM or DeepSpeed with CUDA
OBJECT_STORE = 0.3  # of a node's memory, Ray's own default


@dataclass(frozen=True)
class Line:
    """What one role takes of one device in one phase, in bytes, by what it is for."""

    role: str
    phase: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass
class Estimate:
    """All that `mode=plan` says."""

    plan: Plan
    nodes: list[dict[str, float]]
    lines: list[Line]
    host: Mapping[str, int]  # of the fullest node
    disk: Mapping[str, int]
    findings: list[Finding]
    notes: list[str]
    problems: list[ConfigError] = field(default_factory=list)


def run_plan(config: Config) -> int:
    """Print the plan of a run; return 0 if it fits, 2 if a setting has to be changed."""
    estimate = estimated(config)
    console = Console(highlight=False)
    for table in tables(config, estimate):
        console.print(table)
        console.print()
    for note in estimate.notes:
        console.print(f"note: {note}")
    if estimate.problems:
        raise estimate.problems[0]
    console.print(verdict(config))
    return 0


def estimated(config: Config) -> Estimate:
    """Return the plan of the ppo stage and what it takes.

    Raises:
        ConfigError: the settings contradict each other, or say nothing of what there is.
    """
    device = planned_device(config)
    planned = plan(
        config.cluster,
        config.generator,
        device=device,
        roles=tuple(processes_of("ppo", config)),
        rewards_on_gpus=config.reward.holds_model,
    )
    networks, notes = networks_of(config)
    lines = device_lines(config, networks, device)
    findings = batch_arithmetic(config)
    nodes = nodes_of(config)
    estimate = Estimate(
        planned, nodes, lines, host_memory(config, networks, planned, device), disk(config, networks), findings, notes
    )
    estimate.problems = [*_misfits(config, estimate, networks), *(one.error for one in findings if one.error)]
    return estimate


def planned_device(config: Config) -> str:
    """Return the device that is planned for: with "auto" GPUs where the settings speak of nodes that have some."""
    device = config.cluster.device
    if device != "auto":
        return device
    return "cpu" if config.cluster.node_gpus is None else "cuda"


def nodes_of(config: Config) -> list[dict[str, float]]:
    """Return the nodes that the settings speak of; none if they do not."""
    cluster = config.cluster
    if cluster.node_gpus is None and cluster.node_cpus is None:
        return []
    node = {"CPU": float(cluster.node_cpus or 0), "GPU": float(cluster.node_gpus or 0)}
    return [dict(node) for _ in range(cluster.num_nodes)]


def device_lines(config: Config, networks: Networks, device: str) -> list[Line]:
    """Return the memory of one device of each role in each phase."""
    learner, cluster = config.learner, config.cluster
    num_ranks = cluster.num_learners
    critic_settings = zero.deepspeed_config(learner, learner.critic, device=device, num_ranks=num_ranks)
    settings = critic_settings["zero_optimization"]

    def of(network: Any, *, trained: bool) -> sizes.RankMemory:
        return sizes.rank_memory(network, learner, zero=settings, num_ranks=num_ranks, trained=trained)

    policy = of(networks.policy, trained=True)
    others = {} if networks.reference is None else {"reference": of(networks.reference, trained=False)}
    if networks.critic is not None:
        others["critic"] = of(networks.critic, trained=True)
    states = {f"policy: {name}": size for name, size in policy.device.items()}
    for name, memory in others.items():
        states |= {f"{name}: {part}": size for part, size in memory.device.items()}
    update = update_memory(config, networks, policy, others.get("critic"))
    bucket = cluster.sync_bucket_mib << 20
    gathered = sizes.BYTES[learner.dtype] * networks.policy.largest_group
    generator = actor_sizes.generator_memory(
        networks.policy, config.generator, gpu_bytes=gpu_bytes(config), device=device
    )
    context = {"context": CONTEXT[device]} if CONTEXT[device] else {}
    learning = context | states | update
    sync = context | states | {"gathered layer group": gathered, "sync buckets": 2 * bucket}
    receiving = dict(generator) | {"sync buckets": 2 * bucket}
    scoring = {}
    if networks.rewards:
        scoring = context | actor_sizes.reward_memory(networks.rewards, config.reward)
    if cluster.placement == COLOCATED:
        beside = {f"reward: {name}": size for name, size in scoring.items()}  # stays on its GPU, whoever's turn it is
        rested = {"learner at rest: context": CONTEXT[device]} if device == "cuda" else {}
        asleep = {"generator asleep: context": CONTEXT[device]} if device == "cuda" else {}
        awake_without_cache = {name: size for name, size in receiving.items() if name != "KV cache"}
        lines = [
            Line("shared", "sampling", dict(generator) | rested | beside),
            Line("shared", "learning", learning | asleep | beside),
            Line(
                "shared",
                "weight sync",
                sync | {f"generator: {name}": size for name, size in awake_without_cache.items()} | beside,
            ),
        ]
    else:
        lines = [
            Line("generator", "sampling", generator),
            Line("generator", "weight sync", receiving),
            Line("learner", "learning", learning),
            Line("learner", "weight sync", sync),
        ]
        if scoring:
            lines.append(Line("reward", "scoring", scoring))
    return [Line(one.role, one.phase, {**one.parts, "fragments": int(FRAGMENTS * one.total)}) for one in lines]


def update_memory(
    config: Config, networks: Networks, policy: sizes.RankMemory, critic: sizes.RankMemory | None
) -> dict[str, int]:
    """Return the most that a pass or a step of policy or critic takes for its time on a rank's device, by parts."""
    learner, shared_by = config.learner, config.learner.sequence_parallel_size
    of_hand = -(-config.algorithm.mini_batch_size * shared_by // config.cluster.num_learners) * longest(config)
    tokens = -(-min(max(learner.micro_batch_tokens, longest(config)), of_hand) // shared_by)
    responses = min(tokens, tokens * config.generator.max_new_tokens // longest(config) + 1)
    trained = [(networks.policy, policy, responses)]
    if networks.critic is not None and critic is not None:
        trained.append((networks.critic, critic, 0))
    moments: list[dict[str, int]] = []
    for network, memory, num_states in trained:
        kept = sizes.activations(network, learner, tokens=tokens, states=num_states)
        moments += [dict(memory.passing) | kept, dict(memory.stepping)]
    return max(moments, key=lambda parts: sum(parts.values()))


def gpu_bytes(config: Config) -> int | None:
    return None if config.cluster.gpu_memory_gib is None else int(config.cluster.gpu_memory_gib * GIB)


def host_memory(config: Config, networks: Networks, planned: Plan, device: str) -> dict[str, int]:
    """Return what the node with the most learner ranks needs of its own memory."""
    cluster, learner = config.cluster, config.learner
    num_nodes = max(cluster.num_nodes, 1)
    ranks = min(cluster.num_learners, cluster.node_gpus or cluster.num_learners)  # they are placed first
    processes = -(-len(planned.places) // num_nodes)
    settings = zero.deepspeed_config(learner, learner.critic, device=device, num_ranks=cluster.num_learners)
    host: dict[str, int] = {"processes": processes * HOST_BASE}
    offloaded = 0
    snapshot = 0
    for network, trained in ((networks.policy, True), (networks.reference, False), (networks.critic, True)):
        if network is None:
            continue
        memory = sizes.rank_memory(
            network, learner, zero=settings["zero_optimization"], num_ranks=cluster.num_learners, trained=trained
        )
        offloaded += ranks * sum(memory.host.values())
        if trained:
            snapshot += ranks * sizes.checkpoint_bytes(network) // cluster.num_learners
        if config.cluster.placement == COLOCATED and device == "cuda":  # while the generators sample
            host["learners at rest"] = host.get("learners at rest", 0) + ranks * sum(memory.device.values())
    if offloaded:
        host["offloaded states"] = offloaded
    host["copy for a checkpoint"] = snapshot
    host["export of a shard"] = min(sizes.BYTES[learner.dtype] * networks.policy.parameters, 4 * GIB)
    if cluster.placement == COLOCATED and device == "cuda":
        width = sizes.BYTES[config.generator.dtype]
        host["generators asleep"] = width * networks.policy.parameters * cluster.num_generators // num_nodes
    if cluster.node_memory_gib is not None:
        host["Ray's object store"] = int(OBJECT_STORE * cluster.node_memory_gib * GIB)
    return host


def disk(config: Config, networks: Networks) -> dict[str, int]:
    """Return what a run leaves on the disk."""
    trained = [one for one in (networks.policy, networks.critic) if one is not None]
    one = sum(map(sizes.checkpoint_bytes, trained))
    if config.learner.ema_decay is not None:
        one += sizes.FLOAT32 * networks.policy.parameters
    kept = config.checkpoint.keep + (config.evaluation.best_metric is not None) + 1  # one is being written
    export = sum(sizes.BYTES[config.learner.dtype] * network.parameters for network in trained)
    every = config.tracking.export_every
    exports = 1 + (config.algorithm.num_steps // every if every else 0)
    return {"a checkpoint": one, f"{kept} of them": kept * one, f"{exports} exports": exports * export}


def _misfits(config: Config, estimate: Estimate, networks: Networks) -> Iterable[ConfigError]:
    """Return what does not fit, the most telling first."""
    if estimate.nodes:
        error = missing(estimate.plan, estimate.nodes)
        if error is not None:
            yield error
    limit = gpu_bytes(config)
    if limit is not None:
        for line in sorted(estimate.lines, key=lambda one: -one.total):
            if line.total > limit:
                yield _too_large(config, line, limit)
        yield from actor_sizes.cache_problems(networks.policy, config.generator, limit=limit, needed=longest(config))
    host = config.cluster.node_memory_gib
    needed = sum(estimate.host.values())
    if host is not None and needed > host * GIB:
        most = max(estimate.host, key=lambda name: estimate.host[name])
        yield ConfigError(
            "cluster.num_nodes",
            config.cluster.num_nodes,
            f"a node needs {gib(needed)} of its own memory and has {host:g} GiB; most of it is {most}; take more nodes",
        )


def _too_large(config: Config, line: Line, limit: int) -> ConfigError:
    """Return what to change where a device is too small: what would take away the largest part."""
    most = max(line.parts, key=lambda name: line.parts[name])
    why = f"{line.role} needs {gib(line.total)} while {line.phase}, of a GPU of {gib(limit)}; most of it is {most}"
    learner = config.learner
    if line.role == "shared" and line.phase == "sampling":
        own = sum(line.parts[name] for name in ("weights", "passes", "KV cache"))
        beside = line.total / (1 + FRAGMENTS) - own
        room = floor(20 * (limit / (1 + FRAGMENTS) - beside) / limit) / 20
        share = config.generator.gpu_memory_utilization
        return ConfigError("generator.gpu_memory_utilization", share, f"{why}; set it to {room:g}")
    if line.role == "generator" or most.startswith("generator"):
        width = config.generator.tensor_parallel_size
        return ConfigError("generator.tensor_parallel_size", width, f"{why}; set it to {2 * width}")
    if line.role == "reward" or most.startswith("reward: "):
        return ConfigError("reward.sources", "model", f"{why}; take a smaller one, or a narrower dtype: bfloat16, nf4")
    if most in ("activations", "logits"):
        if not learner.gradient_checkpointing:
            return ConfigError("learner.gradient_checkpointing", False, f"{why}; set it to true")
        if longest(config) >= learner.micro_batch_tokens:  # one sequence alone is too long for a rank
            size, ranks = learner.sequence_parallel_size, config.cluster.num_learners
            if ranks % (2 * size):
                return ConfigError("cluster.num_learners", ranks, f"{why}; set it to {2 * ranks}, to share its tokens")
            return ConfigError("learner.sequence_parallel_size", size, f"{why}; set it to {2 * size}")
        halved = learner.micro_batch_tokens // 2
        return ConfigError("learner.micro_batch_tokens", learner.micro_batch_tokens, f"{why}; set it to {halved}")
    if ("moments" in most or "master" in most or "gradients" in most) and learner.offload_optimizer == "none":
        return ConfigError("learner.offload_optimizer", "none", f"{why}; set it to cpu, or take more learner ranks")
    if "in 4 bits" in most:
        remedy = f"{why}; every rank holds the whole; set it to null"
        return ConfigError("learner.reference_dtype", learner.reference_dtype, remedy)
    if "parameters" in most and learner.offload_parameters == "none":
        return ConfigError("learner.offload_parameters", "none", f"{why}; set it to cpu, or take more learner ranks")
    more = 2 * config.cluster.num_learners
    return ConfigError("cluster.num_learners", config.cluster.num_learners, f"{why}; set it to {more}")


def tables(config: Config, estimate: Estimate) -> list[Table]:
    return [
        _bundle_table(config, estimate),
        _memory_table(config, estimate),
        _sizes_table("memory of a node, the fullest", estimate.host, config.cluster.node_memory_gib),
        _sizes_table("disk, in run.dir", estimate.disk, None, total=False),
        _arithmetic_table(estimate.findings),
    ]


def verdict(config: Config) -> str:
    if planned_device(config) == "cpu":
        return "fits, as far as a machine without GPUs is planned: each process shares its memory and its cores"
    if config.cluster.gpu_memory_gib is None or config.cluster.node_gpus is None:
        return "set cluster.node_gpus, node_cpus, gpu_memory_gib and node_memory_gib to hear whether it fits"
    return "fits"


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.095 * GIB else f"{size / (1 << 20):.0f} MiB"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _bundle_table(config: Config, estimate: Estimate) -> Table:
    table = Table(title="places", title_justify="left", title_style="bold")
    for column in ("bundle", "CPU", "GPU", "who"):
        table.add_column(column, justify="left" if column in ("bundle", "who") else "right")
    by_content: dict[tuple[int, int, str], list[int]] = {}
    for number, bundle in enumerate(estimate.plan.bundles):
        roles = [place.role for place in estimate.plan.places if place.bundle == number]
        who = ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))
        by_content.setdefault((bundle.cpus, bundle.gpus, who), []).append(number)
    for (cpus, gpus, who), numbers in by_content.items():
        table.add_row(_ranges(numbers), str(cpus), str(gpus), who)
    count = len(estimate.nodes)
    has = f"{count} nodes of {config.cluster.node_cpus} CPU, {config.cluster.node_gpus} GPU" if count else "not said"
    cpus, gpus = (sum(getattr(one, name) for one in estimate.plan.bundles) for name in ("cpus", "gpus"))
    table.add_section()
    table.add_row("all", str(cpus), str(gpus), f"cluster: {has}; {config.cluster.placement}")
    return table


def _ranges(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _memory_table(config: Config, estimate: Estimate) -> Table:
    limit = gpu_bytes(config)
    of = "" if limit is None else f", of {gib(limit)}"
    table = _table(f"memory of one device{of}", "role, phase", "all", "what it is")
    table.columns[2].justify = "left"
    for line in estimate.lines:
        largest = sorted(line.parts.items(), key=lambda item: -item[1])
        words = ", ".join(f"{name} {gib(size)}" for name, size in largest if size >= 0.02 * line.total)
        table.add_row(f"{line.role}, {line.phase}", gib(line.total), words)
    return table


def _sizes_table(title: str, parts: Mapping[str, int], limit: float | None, *, total: bool = True) -> Table:
    table = _table(title, "what", "size")
    for name, size in parts.items():
        table.add_row(name, gib(size))
    if total:
        table.add_section()
        of = "" if limit is None else f" of {limit:g} GiB"
        table.add_row("all", gib(sum(parts.values())) + of)
    return table


def _arithmetic_table(findings: Iterable[Finding]) -> Table:
    table = Table(title="batches, in samples", title_justify="left", title_style="bold")
    for column in ("what", "value", "remark"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for finding in findings:
        table.add_row(finding.what, finding.value, finding.remark)
    return table
