"""The workload of a run: what `fedsys.planning.planner` is to plan for, from the configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsys.config import Config, Spec
from fedsys.errors import ConfigError, did_you_mean, is_number
from fedsys.models.layers import LayeredModel
from fedsys.planning.costs import norm_bytes
from fedsys.planning.hardware import Hardware, hardware
from fedsys.planning.leakage import allowed_cuts, without_limit
from fedsys.planning.planner import METHODS
from fedsys.planning.workload import Device, EdgeLink, Workload, counts, workload
from fedsys.training.optimizers import state_share
from fedsys.transport.codecs import check_codec

PLANNED = tuple(method for method in METHODS if method != "classic")
"""Policies that plan."""


@dataclass(frozen=True)
class PlanOptions:
    """How a policy plans: the ``policy`` group of those in `PLANNED`.

    Attributes:
        kind: The method, a name of `fedsys.planning.planner.METHODS`.
        codec: Codecs that may be chosen.
        micro_batches: Numbers of pieces that may be chosen; empty:
            `fedsys.planning.workload.counts`.
        offload: Whether each device must offload.
        objective: ``round``: iterations and the exchange of models; ``iteration``: without it.
        drift: Relative change of a measured rate from which on it is believed.
        hysteresis: Share of the time that a new plan must save to replace the old one.
        forget: Rounds without a measurement after which a link is believed to be as before.
        learn: Whether what is measured corrects the costs of machines unit by unit
            (`fedsys.planning.learned`), instead of by one factor for each.
        doubt: With `learn`: standard deviation of the factor by which each unit may be off.
        optimism: With `learn`: standard deviations by which costs may be better than believed.
        migrate: Whether devices are ordered to other edge servers in the middle of a round
            (`fedsys.planning.ordering`).
    """

    kind: str = "auto"
    codec: tuple[str, ...] = ("fp32",)
    micro_batches: tuple[int, ...] = ()
    offload: bool = False
    objective: str = "round"
    drift: float = 0.2
    hysteresis: float = 0.05
    forget: int = 5
    learn: bool = False
    doubt: float = 0.4
    optimism: float = 1.0
    migrate: bool = False

    @classmethod
    def of(cls, spec: Spec) -> PlanOptions:
        """Return the options of a ``policy`` group.

        Raises:
            ConfigError: A key is unknown, or its value not usable.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for key in without_limit(spec):
            if key not in known:
                hint = did_you_mean(key, known)
                raise ConfigError.of(f"policy.{key}", spec[key], "must be a known key", hint)
        codecs = _listed(spec.get("codec", "fp32"))
        for codec in codecs:
            check_codec(codec, ", or a list of them to choose from")
        pieces = _listed(spec.get("micro_batches"))
        if not all(type(count) is int and count > 0 for count in pieces):
            raise ConfigError.of(
                "policy.micro_batches", pieces, "must be whole numbers to choose from",
                "null leaves the choice to the planner",
            )  # fmt: skip
        plain = {key: _checked(key, spec[key]) for key in _RULES if key in spec}
        offload = plain.pop("offload", "free") == "forced"
        kind = str(spec.get("kind", cls.kind))
        return cls(kind, tuple(codecs), tuple(pieces), offload, **plain)


def _share(value: object) -> bool:
    return is_number(value) and 0 <= value < 1


def _factor(value: object) -> bool:
    return is_number(value) and 0 < value <= 10


def _rounds(value: object) -> bool:
    return type(value) is int and value > 0


_RULES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "offload": (lambda value: value in ("free", "forced"), "must be free or forced"),
    "objective": (lambda value: value in ("round", "iteration"), "must be round or iteration"),
    "drift": (_share, "must be a share from 0 to below 1"),
    "hysteresis": (_share, "must be a share from 0 to below 1"),
    "forget": (_rounds, "must be a number of rounds, at least 1"),
    "learn": (lambda value: isinstance(value, bool), "must be true or false"),
    "migrate": (lambda value: isinstance(value, bool), "must be true or false"),
    "doubt": (_factor, "must be above 0, and at most 10"),
    "optimism": (_factor, "must be above 0, and at most 10"),
}


def _checked(key: str, value: Any) -> Any:
    holds, rule = _RULES[key]
    if not holds(value):
        raise ConfigError.of(f"policy.{key}", value, rule)
    return value


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def machines_of(config: Config, layers: LayeredModel) -> Hardware:
    """Return the machines of a run that is to be planned, as policies believe them.

    Raises:
        ConfigError: The fleet names no devices, or costs that are not usable.
    """
    machines = hardware(config, layers, believed=True)
    if machines is None:
        raise ConfigError.of(
            "fleet.devices", [], "must name machines whose costs are known",
            "for instance fleet=pi_lab, or a profile of your own: fleet=PROFILE.yaml",
        )  # fmt: skip
    return machines


def _device(machines: Hardware, examples: Sequence[int], client: int) -> Device:
    """Return what a client is; machines and numbers of examples are gone through in turn."""
    kind = client % len(machines.devices)
    count = max(1, examples[client % len(examples)])
    return Device(f"client {client}", machines.devices[kind], machines.networks[kind], count)


def run_workload(
    config: Config,
    layers: LayeredModel,
    machines: Hardware,
    examples: Sequence[int],
    options: PlanOptions | None = None,
    clients: Sequence[int] | None = None,
) -> Workload:
    """Return what some clients of a run train in a round, with what may be chosen for it.

    Args:
        config: The run.
        layers: Its model.
        machines: Its machines.
        examples: Examples of each client; repeated if there are more clients.
        options: What may be chosen; None: anything.
        clients: Who takes part; None: all.

    Raises:
        ConfigError: More micro-batches than examples in a mini-batch.
    """
    options = options or PlanOptions()
    who = range(config.num_clients) if clients is None else clients
    load = workload(
        layers,
        [_device(machines, examples, client) for client in who],
        machines.edges,
        config.client.batch_size,
        micro_batches=pieces_of(config, options),
        codecs=options.codec,
        epochs=config.client.epochs,
        exchange=options.objective == "round",
    )
    between = config.fleet.between
    return dataclasses.replace(
        load,
        cuts=allowed_cuts(config, layers, load.cuts),
        schedule=config.schedule.kind,
        depth=config.schedule.depth,
        between=EdgeLink(
            math.inf if between.mbit_s is None else 1e6 * between.mbit_s, between.latency_ms / 1e3
        ),
        moments=state_share(config.client) if options.migrate or config.mobility.active else 0.0,
        mirror=config.mobility.mirror,
        norm_bytes=norm_bytes(config.client.batch_size) if config.privacy.per_example else 0.0,
    )


def choosable(policy: Spec) -> PlanOptions:
    """Return what may be chosen in place of a policy: what it may choose itself, if it says so.

    Args:
        policy: The ``policy`` group, of any kind.

    Raises:
        ConfigError: A value is not usable.
    """
    if policy.get("kind") == "own":
        return PlanOptions()
    codec, pieces = policy.get("codec", "fp32"), policy.get("micro_batches")
    codecs = list(codec.values()) if isinstance(codec, Mapping) else _listed(codec)
    asked = {
        "codec": list(dict.fromkeys(codecs)),
        "micro_batches": [count for count in _listed(pieces) if count is not None] or None,
        "offload": policy.get("offload", "free"),
    }
    return PlanOptions.of(asked)


def pieces_of(config: Config, options: PlanOptions) -> tuple[int, ...]:
    """Return the numbers of pieces that may be chosen.

    One after the other, they save nothing: then there is one, unless others are asked for.
    """
    if options.micro_batches:
        return options.micro_batches
    if config.schedule.kind == "sequential":
        return (1,)
    return counts(config.client.batch_size)
