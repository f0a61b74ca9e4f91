"""From a configuration to a chain that answers on after a host is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from fedsys.config import Config
from fedsys.config.serving import RecoveryConfig
from fedsys.errors import ConfigError, ModelError
from fedsys.models.construct import build
from fedsys.models.layers import LayeredModel, layered
from fedsys.models.resilient import exit_chain, skip_chain
from fedsys.partition.configured import constraints_of, networks_of
from fedsys.partition.finer_chain import regrouped
from fedsys.partition.problem import Host, Problem
from fedsys.partition.remote_host import RemoteHost
from fedsys.planning.costs import MachineCosts
from fedsys.planning.hardware import machine_costs
from fedsys.pruning.portfolio import ONNX, PARENT, Portfolio
from fedsys.runs.resilience import Resilience
from fedsys.runs.resilience import load as load_exits
from fedsys.serving.chain import ChainEngine
from fedsys.serving.chain_parts import UnitParts
from fedsys.serving.recovery.candidates import ModelWays, Planner
from fedsys.serving.recovery.continuer import Continuer, RecoveryOptions
from fedsys.serving.recovery.decision import RecoveryObjective
from fedsys.serving.recovery.detector import DetectorRules, Heart
from fedsys.serving.recovery.path_accuracy import AccuracyEstimator
from fedsys.serving.recovery.unit_latency import LatencyEstimator, intra_op_threads, unit_samples
from fedsys.serving.recovery.watch import HostWatch
from fedsys.serving.routes import EXIT, SKIP, WHOLE, run_of
from fedsys.transport.network import Network

_MEASURE_S = 0.3  # of the units of one way, at most, if once is not more
_LOOPBACK = Network(1e10, 1e10, 1e-4)  # between them


def rules_of(config: RecoveryConfig) -> DetectorRules:
    """Return when a host counts as lost, from the group ``serving.recovery``."""
    return DetectorRules(
        interval_s=config.interval_s,
        floor_s=config.floor_s,
        ceiling_s=config.ceiling_s,
        patience=config.patience,
        dwell_s=config.dwell_s,
    )


def model_of(config: Config, portfolio: Portfolio, name: str) -> nn.Module:
    """Return the whole model: a variant of a portfolio, or the model whose exits are to be used.

    A portfolio calls the layers of a model by numbers, its run by their names, as exits know them.

    Raises:
        ConfigError: Exits are named, and not the parent is to answer.
        ModelError: A file is damaged.
    """
    if config.serving.exits is None:
        return portfolio.module(name)
    if name != PARENT:
        rule = f"must be {PARENT}, or none, with serving.exits: they are of no pruned variant"
        raise ConfigError.of("serving.variant", name, rule)
    about = portfolio.about
    spec = {**about.model, "init": str(Path(config.serving.exits) / "model.safetensors")}
    channels, height, width = about.input_shape
    shape, classes = (channels, height, width), len(about.classes)
    return build(spec, input_shape=shape, num_classes=classes, seed=0).eval()


@final
class OtherWays:
    """The ways through a model beside that of all its units, and what each would cost.

    Args:
        config: ``hosts`` and ``partition`` count.
        whole: The chain of all units.
        portfolio: Where its variants are.
        name: Of the variant that is the whole model.
        described: The chain whose units machines are described for; None: `whole`.

    Raises:
        RunError: The run with the exits cannot be read, or is of another model.
    """

    def __init__(
        self,
        config: Config,
        whole: LayeredModel,
        portfolio: Portfolio,
        name: str,
        described: LayeredModel | None = None,
    ) -> None:
        self._config, self._portfolio = config, portfolio
        self._described = described or whole
        self._chains = {WHOLE: whole}
        self._parts: dict[str, UnitParts] = {}
        self._latency: LatencyEstimator | None = None
        self._exits = _exits(config, whole, portfolio)
        given = ModelWays() if self._exits is None else _ways(self._exits)
        smaller = [v for v in portfolio.variants if ONNX not in v.files and v.name != name]
        accuracy = {v.name: v.accuracy for v in smaller}
        accuracy[WHOLE] = portfolio.variant(name).accuracy
        names, measured = tuple(v.name for v in smaller), given.measured | accuracy.keys()
        accuracy |= given.accuracy
        self._errors = {**given.errors}
        self.ways = ModelWays(given.exits, given.skips, names, accuracy, measured, self._errors)

    def chain(self, way: str) -> LayeredModel:
        """Return a way as a chain of units.

        Raises:
            ModelError: There is none of that name.
        """
        if way not in self._chains:
            self._chains[way] = self._chain(way)
        return self._chains[way]

    def _chain(self, way: str) -> LayeredModel:
        if self._exits is not None and way.startswith(EXIT):
            return exit_chain(self._exits.model, int(way.removeprefix(EXIT)))
        if self._exits is not None and way.startswith(SKIP):
            return skip_chain(self._exits.model, *run_of(way))
        if way not in self.ways.variants:
            raise ModelError(f"{way}: there is no such way through the model")
        shape, as_one = self._portfolio.about.input_shape, self._config.partition.fc_as_one
        return layered(self._portfolio.module(way), shape, fc_as_one=as_one)

    def parts(self, way: str) -> UnitParts:
        """Return the units of a way, for hosts.

        Raises:
            ModelError: There is none of that name.
        """
        if way not in self._parts:
            self._parts[way] = UnitParts(self.chain(way), self._portfolio.about.input_shape)
        return self._parts[way]

    def problem(self, way: str) -> Problem:
        """Return what the units of a way cost on the hosts."""
        config, layers = self._config, self.chain(way)
        listed = config.hosts.list
        named = all(host.machine for host in listed)
        links = networks_of(config) if named else (_LOOPBACK,) * (len(listed) - 1)
        hosts = tuple(
            Host(one.name, self._costs(one.machine, layers), *_limits(one.memory_mb, one.power_w))
            for one in listed
        )
        options = config.partition
        plain = constraints_of(config, layers, hosts) if way == WHOLE else None
        more = {} if plain is None else {"constraints": plain}
        shape = self._portfolio.about.input_shape
        return Problem.of(
            layers, shape, hosts, links, rows=options.batch, codecs=options.codecs, **more
        )

    @property
    def latency(self) -> LatencyEstimator:
        """What units take on this machine, measured when it is first asked for.

        Those of the whole model, of the first, the middle and the last exit, and of the adapters;
        of others it is estimated from their shapes.
        """
        if self._latency is None:
            rows, shape = self._config.partition.batch, self._portfolio.about.input_shape
            exits, image = self.ways.exits, torch.randn(rows, *shape)
            some = [
                WHOLE,
                *(f"{EXIT}{b}" for b in {*exits[:1], *exits[-1:], *exits[len(exits) // 2 :][:1]}),
            ]
            some += self._past_adapters()
            with intra_op_threads(self._config.serving.threads):
                chains = [self._described if way == WHOLE else self.chain(way) for way in some]
                found = [unit_samples(chain, image, seconds=_MEASURE_S) for chain in chains]
            self._latency = LatencyEstimator([sample for each in found for sample in each])
            self._errors["units"] = asdict(self._latency.errors["here"])
        return self._latency

    def _past_adapters(self) -> list[str]:
        """Return the skip past each single unit that has an adapter."""
        alone = [run for run, steps in self.ways.skips.items() if steps == run[1] - run[0] == 1]
        return [f"{SKIP}{first}-{last}" for first, last in alone]

    def _costs(self, machine: str, layers: LayeredModel) -> MachineCosts:
        """Return what units take on a machine: by its own profile, or as here in proportion."""
        if not machine:
            return self._here(layers)
        path, entry = f"hosts.machines.{machine}", self._config.hosts.machines[machine]
        try:
            return machine_costs(path, entry, layers)
        except ConfigError:  # a profile of the whole model: its speed counts for other units
            whole, rows = self._described, self._config.partition.batch
            there_s = machine_costs(path, entry, whole).seconds(rows)[0]
            here_s = self._here(whole).seconds(rows)[0]
            return self._here(layers).slower(there_s / max(here_s, 1e-9))

    def _here(self, layers: LayeredModel) -> MachineCosts:
        """Return what units take on this machine, which is measured for that."""
        shape, rows = self._portfolio.about.input_shape, self._config.partition.batch
        if layers is not self._chains[WHOLE]:
            return self.latency.costs("here", layers, shape, rows)
        here = self.latency.costs("here", self._described, shape, rows)
        if layers is self._described:
            return here
        return regrouped(here, self._described, layers, shape)


def _exits(config: Config, whole: LayeredModel, portfolio: Portfolio) -> Resilience | None:
    if config.serving.exits is None:
        return None
    about = portfolio.about
    folder, classes = Path(config.serving.exits), len(about.classes)
    norm = str(about.model.get("norm", "batch"))
    return load_exits(folder, whole, about.input_shape, classes, norm=norm)


def _ways(exits: Resilience) -> ModelWays:
    """Return the exits and skips of a run, with accuracies that were measured or are estimated."""
    model, known = exits.model, AccuracyEstimator(exits.scores)
    told = {f"{EXIT}{after}": known.exit(after) for after in model.boundaries}
    told |= {f"{SKIP}{first}-{last}": known.skip(first, last) for first, last in model.skips()}
    accuracy = {way: value for way, (value, _) in told.items()}
    measured = frozenset(way for way, (_, seen) in told.items() if seen)
    skips = {run: len(model.steps(*run)) for run in model.skips()}
    errors = {
        "exits": {"in": "points", **asdict(known.exit_errors)},
        "skips": {"in": "points", **asdict(known.skip_errors)},
    }
    return ModelWays(model.boundaries, skips, (), accuracy, measured, errors)


def _limits(memory_mb: float | None, power_w: float | None) -> tuple[float, float | None]:
    return (float("inf") if memory_mb is None else memory_mb * 1e6), power_w


@final
class LookedAfter:
    """Watches hosts from the moment on at which they are connected, and then looks after an engine.

    Args:
        hosts: In order.
        config: ``serving`` and ``partition`` count.
        stack: Closes it.

    Attributes:
        watch: Of the hosts.
        continuer: Keeps the engine answering; None before, and after the end.
    """

    def __init__(self, hosts: Sequence[RemoteHost], config: Config, stack: ExitStack) -> None:
        self._config = config
        self.continuer: Continuer | None = None
        self.watch = HostWatch(hosts, rules_of(config.serving.recovery), self._heard)
        stack.callback(self.close)

    def _heard(self, index: int, heart: Heart) -> None:
        if self.continuer is not None:
            self.continuer.heard(index, heart)

    def look_after(
        self, engine: ChainEngine, ways: OtherWays, tell: Callable[[Mapping[str, Any]], None]
    ) -> None:
        """Keep an engine answering from now on."""
        serving = self._config.serving
        options = RecoveryOptions(
            rules_of(serving.recovery),
            RecoveryObjective.of(serving.objective),
            serving.recovery.warm,
        )
        planner = Planner(ways.problem, self._config.partition.objective)
        self.continuer = Continuer(engine, planner, ways.ways, options, tell)
        self.continuer.start(self.watch)
        for index, heart in enumerate(self.watch.hearts):
            if not heart.health.usable:  # while the first pipeline was built
                self.continuer.heard(index, heart)

    def close(self) -> None:
        """Look after nothing any more."""
        if self.continuer is not None:
            self.continuer.close()
            self.continuer = None
        self.watch.close()
