"""The `serving` group: where the endpoint is, what it promises, and its limits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ENGINES = ("auto", "torch", "onnx")
"""What computes variants (`fedsys.serving.computing`)."""

TECHNIQUES = ("repartition", "exit", "skip", "replica")
"""How a chain can answer on after a host failed (`fedsys.serving.recovery`)."""


@dataclass(frozen=True)
class WeightsConfig:
    """How much accuracy, latency and downtime count for each other after a failure."""

    accuracy: float = 1.0
    latency: float = 1.0
    downtime: float = 1.0


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is asked of the answers, and how steady the choice of a variant is.

    From `accuracy` on: what the way in which a chain answers on after a failure is chosen by.

    Attributes:
        p95_ms: 95 of 100 requests are to be answered within this time, in milliseconds.
        memory_bytes: The variant that answers may take this much; None for what is free.
        margin: A better variant must meet the objective if all signals were worse by this share.
        dwell_s: No better variant is entered earlier after a switch, in seconds.
        down_dwell_s: No smaller one either, in seconds, unless memory is short.
        accuracy: Least accuracy, in [0, 1]; None for any.
        latency_ms: Longest time of a request, in milliseconds; None for `p95_ms`.
        downtime_ms: Longest time without an answer, in milliseconds; None for any.
        weights: What counts how much among the ways that keep to these.
        resolution: Differences below this share of the largest value do not count in full.
        techniques: Those that may be chosen, of `TECHNIQUES`.
    """

    p95_ms: float = 100.0
    memory_bytes: int | None = None
    margin: float = 0.1
    dwell_s: float = 5.0
    down_dwell_s: float = 0.5
    accuracy: float | None = None
    latency_ms: float | None = None
    downtime_ms: float | None = None
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    resolution: float = 0.05
    techniques: tuple[str, ...] = TECHNIQUES


@dataclass(frozen=True)
class RecoveryConfig:
    """How the hosts of a chain are watched, and what stands ready in case one is lost.

    Attributes:
        enabled: Whether requests go on when a host is lost; if not, they fail.
        interval_s: From one heartbeat to the next, in seconds.
        floor_s: Silence that is never suspicious, in seconds, however short round trips are.
        ceiling_s: Silence that is suspicious, in seconds, however unsteady round trips are, if it
            is `patience` times the usual one.
        patience: Usual round trips that an answer may take without suspicion.
        dwell_s: How long a host that was lost must answer before it is used again, in seconds.
        warm: Techniques whose pipelines stand ready in advance, of `TECHNIQUES`.
    """

    enabled: bool = True
    interval_s: float = 0.05
    floor_s: float = 0.1
    ceiling_s: float = 1.0
    patience: float = 3.0
    dwell_s: float = 5.0
    warm: tuple[str, ...] = TECHNIQUES


@dataclass(frozen=True)
class ServingConfig:
    """The endpoint; `fedsys query` uses `address`, `name`, `timeout_s` and `wait_s` of it.

    Attributes:
        address: Where it is, as ``http://host:port``; port 0: any that is free.
        grpc: Where the same protocol is served over gRPC, as ``grpc://host:port``; None: not.
        name: Of the model, in the paths of the protocol.
        objective: What is asked of the answers.
        recovery: How a chain answers on after a host is lost.
        exits: Folder of the training run whose exits and adapters a chain may answer by.
        engine: What computes variants of a portfolio: PyTorch, ONNX Runtime, or for each the one
            that was faster when the portfolio was made.
        variant: The only variant that answers; None lets the policy choose.
        resident: Whether all variants are in memory at all times.
        standby: The smallest variants stay in memory and help where the one that answers would be
            late, as many as together take at most this share of what the largest takes; 0: none.
        interval_s: Between two decisions, in seconds.
        threads: Intra-op threads of a forward pass; None for all cores.
        max_batch: Images that are put together at most.
        max_delay_ms: How long the first of them waits for others though nothing is computed, in
            milliseconds; a batch grows while another one is computed in any case.
        max_rows: Images of one request.
        max_queue: Images that may wait; further requests are refused.
        max_body_bytes: Of one request.
        max_waiting_bytes: Bodies above 64 KiB of all requests at one time; further ones wait.
        max_connections: At one time; fewer where the system allows fewer descriptors.
        max_header_bytes: Line and headers of one request.
        header_s: Longest time for them to arrive, in seconds.
        timeout_s: Longest time for a request to arrive, and to be answered, in seconds.
        drain_s: Longest time for the last requests when it stops, in seconds.
        wait_s: How long ``fedsys query`` waits until the endpoint is ready, in seconds.
        resize: Whether images of another size are resized, as image folders are for training.
    """

    address: str = "http://127.0.0.1:8080"
    grpc: str | None = None
    name: str = "classifier"
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    exits: str | None = None
    engine: str = "auto"
    variant: str | None = None
    resident: bool = False
    standby: float = 0.1
    interval_s: float = 0.1
    threads: int | None = None
    max_batch: int = 8
    max_delay_ms: float = 0.0
    max_rows: int = 256
    max_queue: int = 1024
    max_body_bytes: int = 16 << 20
    max_waiting_bytes: int = 64 << 20
    max_connections: int = 1024
    max_header_bytes: int = 16 << 10
    header_s: float = 10.0
    timeout_s: float = 30.0
    drain_s: float = 30.0
    wait_s: float = 30.0
    resize: bool = False


def _above(bound: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value is None or value > bound), f"must be above {bound:g}"


def _from(bound: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value is None or value >= bound), f"must be at least {bound:g}"


def _share(value: Any) -> bool:
    return value is None or 0 <= value <= 1


def _counts(weights: WeightsConfig) -> bool:
    """Whether weights are finite, none is below 0, and one is above."""
    values = weights.accuracy, weights.latency, weights.downtime
    return min(values) >= 0 < sum(values)


_PLAIN = "must be of letters, digits, '.', '_', '-'"

RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("name", lambda v: bool(re.fullmatch(r"[A-Za-z0-9._-]+", v)), _PLAIN),
    ("engine", lambda v: v in ENGINES, f"must be one of {', '.join(ENGINES)}"),
    ("objective.p95_ms", *_above(0)),
    ("objective.memory_bytes", *_above(0)),
    ("objective.margin", lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    ("objective.dwell_s", *_from(0)),
    ("objective.down_dwell_s", *_from(0)),
    ("objective.accuracy", _share, "must be in [0, 1]"),
    ("objective.latency_ms", *_above(0)),
    ("objective.downtime_ms", *_above(0)),
    ("objective.weights", _counts, "must be at least 0, and one of them above 0"),
    ("objective.resolution", _share, "must be in [0, 1]"),
    (
        "objective.techniques",
        lambda v: bool(v) and set(v) <= set(TECHNIQUES),
        f"must be a list of some of {', '.join(TECHNIQUES)}",
    ),
    ("recovery.interval_s", *_above(0)),
    ("recovery.floor_s", *_above(0)),
    ("recovery.ceiling_s", *_above(0)),
    ("recovery.patience", *_from(1)),
    ("recovery.dwell_s", *_from(0)),
    (
        "recovery.warm",
        lambda v: set(v) <= set(TECHNIQUES),
        f"must be a list of {', '.join(TECHNIQUES)}",
    ),
    ("standby", *_from(0)),
    ("interval_s", *_above(0)),
    ("threads", *_from(1)),
    ("max_batch", *_from(1)),
    ("max_delay_ms", *_from(0)),
    ("max_rows", *_from(1)),
    ("max_queue", *_from(1)),
    ("max_body_bytes", *_from(1)),
    ("max_waiting_bytes", *_from(1)),
    ("max_connections", *_from(1)),
    ("max_header_bytes", *_from(512)),
    ("header_s", *_above(0)),
    ("timeout_s", *_above(0)),
    ("drain_s", *_from(0)),
    ("wait_s", *_from(0)),
)
"""Path within the group, test, and rule of each value that is bounded."""
