"""Options that are usable and change nothing in the run that is asked for.

They are no errors, as a value may be meant for another run of the same command line; whoever gives
one wants to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedsys.config.values import Config, NetworkConfig

SPLIT = "policy=fixed or policy=auto trains with edge servers"
SCRIPTED = ("halfway", "commuters")
POSITIONED = ("waypoint", "trace")
FLEET = "fleet=pi_lab, or another one, says what devices take"


@dataclass(frozen=True)
class Idle:
    """One option that may count for nothing.

    Attributes:
        key: The option or group; with a dot at its end, all options of a group.
        when: Whether it counts for nothing in a run.
        reason: Why, as the end of a sentence.
        way_out: What would make it count.
    """

    key: str
    when: Callable[[Config], bool]
    reason: str
    way_out: str = ""


def _plain(config: Config) -> bool:
    return str(config.policy.get("kind", "none")) == "none"


def _unmodelled(config: Config) -> bool:
    """Whether nobody asks how fast the network is: no virtual time, and no emulation of links."""
    emulated = config.network.emulate and not _plain(config)
    return not config.fleet.devices and not emulated and config.mobility.kind != "network"


def _kind(config: Config) -> str:
    return config.client.lr_schedule.kind


def _positioned(config: Config) -> bool:
    return config.mobility.kind in POSITIONED


def _unwaited(config: Config) -> bool:
    """Whether nobody waits between two edge servers: neither devices nor the virtual clock."""
    real = config.runtime.kind == "deployment" or (config.network.emulate and config.fleet.emulate)
    return not real and not config.fleet.devices


def _watched(config: Config) -> bool:
    return config.runtime.kind == "deployment" or config.network.emulate


def _edges(config: Config) -> int:
    return len(config.fleet.edges) or config.num_edges


def _partition(config: Config) -> object:
    partition = config.data.get("partition")
    return partition.get("kind") if isinstance(partition, dict) else None


WITHOUT_MOMENTUM = (
    *("adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam"),
    *("rprop", "sparseadam"),
)
"""Optimizers of torch whose constructors take no ``momentum``."""

OF_OTHER_COMMANDS = {
    "serving": "fedsys serve and query",
    "portfolio": "fedsys serve and partition",
    "host": "fedsys host",
    "hosts": "fedsys partition and serve",
    "partition": "fedsys partition and serve",
    "input": "fedsys query",
    "profile": "fedsys profile",
    "prune": "fedsys prune",
    "bench": "fedsys bench",
}

_OF_KINDS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    SCRIPTED: ("at", "every", "notice", "piece", "away_s"),
    (*SCRIPTED, "waypoint", "network"): ("devices", "share"),
    ("trace",): ("file", "vehicles", "coordinates", "begin_s"),
    POSITIONED: ("hysteresis_m", "unreachable"),
    (*POSITIONED, "network"): ("seconds_per_round", "foresee_s"),
    ("waypoint",): ("speed_m_s", "pause_s", "area_m"),
    ("network",): ("below_mbit_s", "above_ms", "hysteresis", "steady_s"),
}
"""Options of `mobility` by the choices of which they are; the others are of all."""


def _of_another(kinds: tuple[str, ...]) -> Callable[[Config], bool]:
    """Return whether mobility is none of these in a run."""
    return lambda config: config.mobility.kind not in kinds


_MOVES: tuple[Idle, ...] = (
    Idle(
        "mobility.", lambda c: not c.mobility.active, "nobody moves with mobility=none",
        "mobility=halfway, or another choice, says who does",
    ),
    *(
        Idle(
            f"mobility.{name}", _of_another(kinds),
            f"it is of {' and '.join(f'mobility={kind}' for kind in kinds)} only",
        )
        for kinds, names in _OF_KINDS.items()
        for name in names
    ),
    Idle(
        "mobility.away_s", lambda c: c.mobility.away_s > 0 and _unwaited(c),
        "time is not real, and no virtual clock counts it", FLEET,
    ),
    Idle(
        "mobility.seconds_per_round", lambda c: c.mobility.kind == "network" and _watched(c),
        "devices watch their links while rounds last as long as they do",
    ),
    Idle(
        "mobility.notice", lambda c: c.mobility.how != "foreseen", "no move is foreseen",
        "mobility.how=foreseen",
    ),
    Idle(
        "mobility.mirror",
        lambda c: c.mobility.kind in SCRIPTED and c.mobility.how != "foreseen",
        "no move is foreseen", "mobility.how=foreseen",
    ),
    Idle(
        "mobility.foresee_s", lambda c: c.mobility.how == "unannounced",
        "devices leave unannounced",
    ),
    *(
        Idle(
            key, lambda c: c.mobility.mode == "restart",
            "a round that begins anew takes nothing along", "mobility.mode=migrate",
        )
        for key in (
            "mobility.how", "mobility.notice", "mobility.foresee_s", "mobility.piece",
            "mobility.mirror",
        )
    ),
    Idle(
        "mobility.unreachable", lambda c: all(place.radius_m is None for place in c.fleet.places),
        "every edge server is reached from anywhere", "a radius_m in fleet.places",
    ),
    Idle(
        "fleet.places", lambda c: bool(c.fleet.places) and not _positioned(c),
        "no device has a position", "mobility=trace or mobility=waypoint",
    ),
    *(
        Idle(
            key, lambda c: not c.mobility.active and not c.policy.get("migrate"),
            "no session moves between edge servers", "mobility=halfway, or policy.migrate=true",
        )
        for key in ("fleet.between", "fleet.between.")
    ),
    Idle(
        "policy.migrate", lambda c: bool(c.policy.get("migrate")) and _edges(c) < 2,
        "there is one edge server", "num_edges=2",
    ),
    Idle(
        "policy.migrate", lambda c: bool(c.policy.get("migrate")) and c.mobility.kind in SCRIPTED,
        "mobility says of every device where it is", "mobility=none",
    ),
    Idle(
        "policy.migrate", lambda c: bool(c.policy.get("migrate")) and bool(c.policy.get("learn")),
        "a policy that learns orders no moves", "policy.learn=false",
    ),
)  # fmt: skip

IDLE: tuple[Idle, ...] = (
    Idle(
        "network.emulate", lambda c: c.network.emulate and _plain(c),
        "there are no links to edge servers", SPLIT,
    ),
    *(
        Idle(
            key, lambda c: _unmodelled(c) and c.network != NetworkConfig(),
            "no fleet is modelled and no link is emulated",
            f"{FLEET}; with a policy, network.emulate=true makes links that slow",
        )
        for key in ("network", "network.")
    ),
    Idle(
        "num_edges", lambda c: _plain(c) and c.num_edges > 1,
        "devices train alone with policy=none", SPLIT,
    ),
    Idle(
        "num_edges", lambda c: not _plain(c) and bool(c.fleet.edges),
        "fleet.edges names the edge servers",
    ),
    *(
        Idle(
            key,
            lambda c: _plain(c) and bool(c.fleet.devices) and not c.fleet.emulate,
            "devices train alone with policy=none, and only the virtual time is told of it",
            "policy=auto plans for it",
        )
        for key in ("fleet", "fleet.devices")
    ),
    Idle("fleet.edges", _plain, "devices train alone with policy=none", SPLIT),
    Idle("fleet.replicate_every", _plain, "devices train alone with policy=none", SPLIT),
    Idle("fleet.servers", lambda c: _plain(c), "devices train alone with policy=none", SPLIT),
    Idle(
        "fleet.links", lambda c: bool(c.fleet.links) and c.network.name != "none",
        "network= was chosen, which comes before them",
    ),
    Idle(
        "fleet.emulate", lambda c: c.fleet.emulate and not c.fleet.devices,
        "no machines are named in fleet.devices", FLEET,
    ),
    Idle(
        "schedule", lambda c: _plain(c) and c.schedule.kind != "sequential",
        "devices train alone with policy=none, and of it only the pieces of a mini-batch count",
        SPLIT,
    ),
    Idle(
        "schedule.depth", lambda c: not _plain(c) and c.schedule.kind != "bounded",
        "nothing is bounded", "schedule=bounded",
    ),
    Idle(
        "link", lambda c: _plain(c) and c.link.kind != "auto",
        "devices train alone with policy=none", SPLIT,
    ),
    Idle(
        "link.skip_zero_gradients", lambda c: _plain(c) and c.link.skip_zero_gradients != "auto",
        "devices train alone with policy=none", SPLIT,
    ),
    Idle(
        "link.skip_zero_gradients",
        lambda c: c.privacy.mechanism == "cut" and c.link.skip_zero_gradients == "always",
        "noise at the cut leaves no zeros",
    ),
    *_MOVES,
    Idle("client.label_private", _plain, "devices train alone with policy=none", SPLIT),
    Idle("client.max_model_bytes", _plain, "devices train alone with policy=none", SPLIT),
    Idle("edge.device", _plain, "devices train alone with policy=none", SPLIT),
    Idle(
        "edge.device", lambda c: not _plain(c) and bool(c.fleet.edges),
        "fleet.edges names edge servers that run already",
    ),
    Idle(
        "client.lr_schedule.milestones", lambda c: _kind(c) != "step",
        "the schedule is another one", "client.lr_schedule.kind=step",
    ),
    Idle(
        "client.lr_schedule.gamma", lambda c: _kind(c) not in ("step", "exponential"),
        "the schedule is another one", "client.lr_schedule.kind=step, or exponential",
    ),
    Idle(
        "client.lr_schedule.final", lambda c: _kind(c) != "cosine",
        "the schedule is another one", "client.lr_schedule.kind=cosine",
    ),
    Idle(
        "client.lora.", lambda c: c.client.train != "lora", "all weights learn",
        "client.train=lora",
    ),
    Idle(
        "data.partition.alpha", lambda c: _partition(c) != "dirichlet",
        "the data are divided otherwise", "data.partition.kind=dirichlet",
    ),
    Idle(
        "data.partition.shards_per_client", lambda c: _partition(c) != "shards",
        "the data are divided otherwise", "data.partition.kind=shards",
    ),
    Idle(
        "data.partition.fractions", lambda c: _partition(c) != "fractions",
        "the data are divided otherwise", "data.partition.kind=fractions",
    ),
    Idle(
        "pruning.", lambda c: not c.pruning.active, "nothing is pruned with pruning=none",
        "pruning=group_norm, or another method, prunes",
    ),
    Idle(
        "resilience.", lambda c: not c.resilience.active, "there are no exits with resilience=none",
        "resilience=joint, or frozen, trains them",
    ),
    Idle(
        "privacy.", lambda c: not c.privacy.active, "nothing is promised with privacy=none",
        "privacy=record, or another mechanism, adds noise",
    ),
    Idle(
        "client.momentum", lambda c: c.client.optimizer.lower() in WITHOUT_MOMENTUM,
        "the optimizer has no momentum", "client.optimizer=sgd has one",
    ),
    Idle(
        "edge.workers", lambda c: c.runtime.kind != "deployment" or bool(c.fleet.edges),
        "edge servers are threads of the run, or have options of their own",
        "runtime=deployment starts them as processes",
    ),
    Idle(
        "runtime.workers", lambda c: c.runtime.kind == "deployment",
        "each node works on one message at a time",
    ),
)  # fmt: skip


LAUNCHED = frozenset({"edge.device", "edge.workers"})
"""Options of edge servers that are also those of the edge servers that a run starts."""


def without_effect(config: Config, given: Mapping[str, str]) -> list[str]:
    """Return a sentence for each option of ``fedsys train`` that counts for nothing in a run.

    Args:
        config: The run.
        given: What the command line says, by option or group with dots (`fedsys.config.given`).
    """
    return [
        f"{text} is without effect: {reason}"
        for name, text in given.items()
        if (reason := _reason(config, name))
    ]


def _reason(config: Config, name: str) -> str:
    owner = OF_OTHER_COMMANDS.get(name.partition(".")[0])
    if owner is None and name.startswith("edge.") and name not in LAUNCHED:
        owner = "fedsys edge"
    if owner is not None:
        return f"it is of {owner} only"
    for idle in IDLE:
        below = idle.key.endswith(".") and name.startswith(idle.key)
        if (name == idle.key or below) and idle.when(config):
            return f"{idle.reason}; {idle.way_out}" if idle.way_out else idle.reason
    return ""
