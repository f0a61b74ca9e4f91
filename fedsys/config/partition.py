"""The groups `hosts` and `partition`: machines of a chain, and how a model is divided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedsys.config.network import NetworkConfig

Spec = Mapping[str, Any]


@dataclass(frozen=True)
class HostConfig:
    """One machine of a chain.

    Attributes:
        name: Its name.
        machine: What it takes, by name, of ``hosts.machines``.
        address: Where ``fedsys host`` listens there; empty where nothing is served, only planned.
        start: Whether ``fedsys serve`` starts it as another process of this machine.
        memory_mb: For its part of the model; None: not known.
        power_w: Watts that it takes more while it computes; None: not known.
        radio_w: Watts that it takes more while it sends or receives.
        waiting_ms: Work that waits there before a request.
        slower: How many times as long it computes if it is started, by waiting.
    """

    name: str
    machine: str = ""
    address: str = ""
    start: bool = False
    memory_mb: float | None = None
    power_w: float | None = None
    radio_w: float = 0.0
    waiting_ms: float = 0.0
    slower: float = 1.0


@dataclass(frozen=True)
class HostsConfig:
    """The machines of a chain, in the order in which a request passes them.

    Attributes:
        name: What they are called.
        machines: Costs by name: nominal rates or a profile (`fedsys.planning.hardware`).
        list: The machines; the first has the input.
        links: Networks between neighbours; ``network=``, where it is chosen, is the first of them.
        way: How cuts change while requests come: ``beside``, ``pause``, ``process`` or ``warm``.
        keep: With the way ``warm``: pipelines that stand ready, at most.
        adapt: Whether cuts follow the conditions.
        interval_s: Between two decisions, in seconds.
        margin: Share by which a request must become faster for cuts to change.
        dwell_s: No change earlier after one, in seconds.
        emulate: Whether links are made as slow as `links`, in real time.
        other_arithmetic: Whether hosts may compute other bits than this machine.
        credentials: Folder with ``ca.pem``, ``cert.pem`` and ``key.pem`` for mutual TLS.
        control_token: What hosts want to hear instead of one.
        control_token_file: File that holds it.
    """

    name: str = "none"
    machines: Spec = field(default_factory=dict)
    list: tuple[HostConfig, ...] = ()
    links: tuple[NetworkConfig, ...] = ()
    way: str = "beside"
    keep: int = 4
    adapt: bool = True
    interval_s: float = 1.0
    margin: float = 0.1
    dwell_s: float = 5.0
    emulate: bool = False
    other_arithmetic: bool = False
    credentials: str | None = None
    control_token: str = field(default="", repr=False)
    control_token_file: str | None = None

    @property
    def to_start(self) -> bool:
        """Whether ``fedsys serve`` is to start hosts of the chain."""
        return any(host.start for host in self.list)

    @property
    def reachable(self) -> bool:
        """Whether hosts are named that requests pass."""
        return any(host.address for host in self.list)


@dataclass(frozen=True)
class HostServerConfig:
    """The group `host`: one host as a process of its own, ``fedsys host``.

    Attributes:
        name: In answers and messages.
        address: Where it listens, as ``tcp://host:port`` or ``grpc://host:port``.
        credentials: Folder with ``ca.pem``, ``cert.pem`` and ``key.pem``; for both roles, as it
            is dialled and dials the next host.
        controller: Name in the certificate of who may control it.
        control_token: What a controller without a certificate must present; on loopback only.
        control_token_file: File that holds it.
        drain_s: Longest time for chains to leave it out when it is told to stop, in seconds.
        memory_mb: Of weights.
        kept_mb: Of weights that no pipeline uses any more.
        threads: Intra-op threads of a forward pass; None for all cores.
        slower: How many times as long it computes, by waiting; 1: it does not wait.
        parent: Id of the process with which it ends; None: it ends when it is told to.
    """

    name: str = "host"
    address: str = "tcp://127.0.0.1:9500"
    credentials: str | None = None
    controller: str = "server"
    control_token: str = field(default="", repr=False)
    control_token_file: str | None = None
    drain_s: float = 10.0
    memory_mb: float = 16000.0
    kept_mb: float = 1000.0
    threads: int | None = None
    slower: float = 1.0
    parent: int | None = None


@dataclass(frozen=True)
class PartitionConfig:
    """How a model is divided among the hosts.

    Attributes:
        objective: What is to be small: ``latency``, ``throughput`` (the busy time that bounds it),
            ``bytes`` or ``energy``.
        solver: ``auto``, ``scan``, ``dynamic``, ``min_cut`` or ``exhaustive``.
        input: Channels, height and width of an image; None: those of ``data=``.
        batch: Images of a request.
        requests_per_s: Requests that arrive at random; 0: one at a time.
        codecs: In which tensors at cuts may be written.
        fc_as_one: Whether there are no cuts between linear layers at the end.
        tensors: Tensors that may cross a cut, at most.
        must: Host of a unit, by names; None as an empty one, as for the two that follow.
        must_not: Units that a host must not compute, by its name.
        upload_mb: Largest size of what a host sends for a request, by its name.
        time_limit_ms: Longest time of a request; None: any.
        max_drop: With a portfolio: largest loss of accuracy against its best variant, unless a
            time limit decides.
        pareto: Two objectives, for all choices that are best in one for what they cost in the
            other; empty: none.
        alternatives: Other choices that are shown.
        cuts: The unit that each host but the first begins with; None: planned.
        images: Images of ``data=`` on which the effect of codecs is measured; 0: not.
    """

    objective: str = "latency"
    solver: str = "auto"
    input: tuple[int, ...] | None = None
    batch: int = 1
    requests_per_s: float = 0.0
    codecs: tuple[str, ...] = ("fp32",)
    fc_as_one: bool = True
    tensors: int = 1
    must: Spec | None = None
    must_not: Spec | None = None
    upload_mb: Spec | None = None
    time_limit_ms: float | None = None
    max_drop: float = 0.02
    pareto: tuple[str, ...] = ()
    alternatives: int = 5
    cuts: tuple[int, ...] | None = None
    images: int = 0


OBJECTIVES = ("latency", "throughput", "bytes", "energy")
_SOLVERS = ("auto", "scan", "dynamic", "min_cut", "exhaustive")
_CODECS = ("fp32", "fp16", "bf16", "int8")


def _one_of(names: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in names), f"must be one of {', '.join(names)}"


RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("objective", *_one_of(OBJECTIVES)),
    ("solver", *_one_of(_SOLVERS)),
    (
        "input",
        lambda v: v is None or (len(v) == 3 and min(v) >= 1),
        "must be channels, height and width",
    ),
    ("batch", lambda v: v >= 1, "must be at least 1"),
    ("requests_per_s", lambda v: v >= 0, "must not be negative"),
    (
        "codecs",
        lambda v: bool(v) and set(v) <= set(_CODECS) and len(set(v)) == len(v),
        f"must be a list of {', '.join(_CODECS)}",
    ),
    ("tensors", lambda v: v >= 1, "must be at least 1"),
    ("time_limit_ms", lambda v: v is None or v > 0, "must be above 0"),
    ("max_drop", lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    (
        "pareto",
        lambda v: not v or (len(v) == 2 and set(v) <= set(OBJECTIVES) and v[0] != v[1]),
        f"must be two of {', '.join(OBJECTIVES)}",
    ),
    ("alternatives", lambda v: v >= 0, "must not be negative"),
    ("images", lambda v: v >= 0, "must not be negative"),
)
"""Path within the group, test, and rule of each value that is bounded."""

HOSTS_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("way", *_one_of(("beside", "pause", "process", "warm"))),
    ("keep", lambda v: v >= 2, "must be at least 2"),
    ("interval_s", lambda v: v > 0, "must be above 0"),
    ("margin", lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    ("dwell_s", lambda v: v >= 0, "must not be negative"),
)
"""The same of the group `hosts`."""

HOST_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("name", bool, "must not be empty"),
    ("memory_mb", lambda v: v > 0, "must be above 0"),
    ("kept_mb", lambda v: v >= 0, "must not be negative"),
    ("drain_s", lambda v: v >= 0, "must not be negative"),
    ("threads", lambda v: v is None or v >= 1, "must be at least 1"),
    ("slower", lambda v: 1 <= v <= 1000, "must be from 1 to 1000"),
)
"""The same of the group `host`."""
