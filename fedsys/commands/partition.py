"""``fedsys partition``: which host of a chain computes which units, what a request takes, and why.

Beside the choice stand what a person would compare it with: the next best ones, and the whole model
on each host. With ``portfolio=`` the variant is chosen together with the cuts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsys import config as configuration
from fedsys.commands.partition_picture import draw_chain
from fedsys.config import Config
from fedsys.errors import ConfigError, ModelError
from fedsys.models.layers import LayeredModel, layered
from fedsys.partition.configured import links_between, problem_of
from fedsys.partition.evaluation import RequestCost
from fedsys.partition.finer_chain import finer_chain, finer_problem
from fedsys.partition.minimum_cut import best_division
from fedsys.partition.planner import Choice, PartitionPlan, pareto, plan_partition
from fedsys.partition.problem import Problem
from fedsys.partition.reasons import reasons
from fedsys.pruning.portfolio import ONNX, Portfolio
from fedsys.runs.folder import RunFolder, default_path
from fedsys.runs.lines import aligned, fitted, seconds_text
from fedsys.training import federation

CLASSES = 1000
"""Outputs of a model whose input is not that of ``data=``."""


@dataclass(frozen=True, eq=False)
class DividedModel:
    """One model and how it is divided.

    Attributes:
        name: Of the model or variant.
        accuracy: Of a variant; None for a model.
        whole: The model as a chain that one tensor crosses.
        layers: The chain that is divided.
        shape: Of an image.
        problem: What was asked.
        plan: The answer.
    """

    name: str
    accuracy: float | None
    whole: LayeredModel
    layers: LayeredModel
    shape: tuple[int, ...]
    problem: Problem
    plan: PartitionPlan


def job(tree: Any) -> Mapping[str, Any]:
    """Divide the model of the command line, or a variant of a portfolio, among the hosts.

    Args:
        tree: The composed configuration (a DictConfig), of which ``model``, ``data``,
            ``portfolio``, ``hosts``, ``network`` and ``partition`` count.

    Returns:
        The figures of `figures`, for a portfolio ``variant`` and ``variants`` besides, and
        ``run_dir``, the folder with ``run.json`` and the picture of the chain.

    Raises:
        ConfigError: A value is not usable, or constraints contradict each other; names them.
    """
    config = configuration.parse(configuration.to_text(tree))
    tried = list(_variants(config)) if config.portfolio else [_of_model(config)]
    chosen = _choose(tried, config)
    found = figures(chosen, config)
    if config.portfolio:
        found |= {"variant": chosen.name, "variants": [_variant_row(one) for one in tried]}
    if config.partition.images:
        from fedsys.commands.partition_codecs import effect

        found["codec_effect"] = effect(config, chosen.plan.best.partition)
    path = Path(config.run.dir or default_path(Path("outputs"), "partition")).absolute()
    with RunFolder.create(path, config.text) as folder:
        if config.run.plots:
            draw_chain(chosen.problem, chosen.plan, found["model"], path / "plots" / "chain.png")
        found["run_dir"] = str(path)
        folder.finish(found)
    if not config.json:
        show(found)
    return found


def _of_model(config: Config) -> DividedModel:
    layers, shape = model_of(config)
    name = str(config.model.get("name") or config.model["_target_"]).rpartition(".")[2]
    return _planned(config, name, None, layers, shape)


def model_of(config: Config) -> tuple[LayeredModel, tuple[int, ...]]:
    """Return the model of a configuration as a chain of units on ``meta``, and its input.

    Raises:
        ConfigError: ``partition.input`` is that of no data, and codecs are to be measured on some.
    """
    options = config.partition
    if options.input is None:
        dataset = federation.federation(config).dataset
        shape, classes = dataset.input_shape, dataset.num_classes
    else:
        shape, classes = tuple(options.input), CLASSES  # type: ignore[assignment]  # three of them
        if options.images:
            way_out = "give partition.input=null"
            raise ConfigError.of("partition.images", options.images, "must be of data=", way_out)
    layers = federation.layered_model(config, shape, classes)
    if not options.fc_as_one:
        layers = layered(layers.graph, shape, fc_as_one=False)
    return layers, shape


def _planned(
    config: Config,
    name: str,
    accuracy: float | None,
    whole: LayeredModel,
    shape: tuple[int, ...],
) -> DividedModel:
    options = config.partition
    layers = finer_chain(config, whole, shape)
    problem = finer_problem(config, whole, layers, shape)
    solver = "auto" if options.solver == "min_cut" else options.solver
    plan = plan_partition(problem, options.objective, solver, options.alternatives)
    return DividedModel(name, accuracy, whole, layers, shape, problem, plan)


def _variants(config: Config) -> Iterator[DividedModel]:
    """Yield the plans of all variants that can be cut, the most accurate first.

    Raises:
        ConfigError: A constraint allows no partition of any variant.
    """
    portfolio = Portfolio.load(Path(str(config.portfolio)).expanduser())
    refused: ConfigError | None = None
    count = 0
    for variant in portfolio.variants:
        if ONNX in variant.files:
            _say(f"{variant.name} is left out: an ONNX file has no units to be cut between")
            continue
        module, shape = portfolio.module(variant.name), portfolio.about.input_shape
        layers = layered(module, shape, fc_as_one=config.partition.fc_as_one)
        try:
            yield _planned(config, variant.name, variant.accuracy, layers, shape)
            count += 1
        except ConfigError as error:
            refused = error
            _say(f"{variant.name} is left out: {error}")
    if not count:
        raise refused or ModelError(f"{portfolio.folder}: no variant has units to be cut between")


def _choose(tried: Sequence[DividedModel], config: Config) -> DividedModel:
    """Return the most accurate within the time limit, or the best that loses little accuracy."""
    options = config.partition
    if options.time_limit_ms is not None:  # all that were planned are within it
        return max(tried, key=lambda one: (one.accuracy or 0.0, -_value(one)))
    top = max(one.accuracy or 0.0 for one in tried)
    good = [one for one in tried if (one.accuracy or 0.0) >= top - options.max_drop]
    return min(good, key=_value)


def _value(one: DividedModel) -> float:
    return one.plan.best.cost.value(one.plan.objective)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# Figures


def figures(one: DividedModel, config: Config) -> dict[str, Any]:
    """Return a plan as plain values.

    Returns:
        ``model``, ``input``, ``objective``, ``solver``, ``planned_ms``, ``cuts`` (the unit that
        each host but the first begins with), ``latency_ms``, ``requests_per_s`` (at most),
        ``sent_bytes`` and ``energy_j`` of a request; ``hosts`` and ``links`` with their parts;
        ``whole``, the whole model on each host; ``alternatives``; ``why``; and where asked for,
        ``pareto`` and the ``minimum_cut``.
    """
    problem, plan = one.problem, one.plan
    names = [link.name for link in links_between(config)]
    found: dict[str, Any] = {
        "model": one.name,
        "input": list(one.shape),
        "batch": problem.rows,
        "objective": plan.objective,
        "solver": plan.solver,
        "planned_ms": 1e3 * plan.planned_s,
        **_summary(problem, plan.best),
        "hosts": _hosts(problem, plan.best.cost),
        "links": _links(one, names),
        "whole": [
            {
                "host": problem.hosts[host].name,
                **_totals(choice.cost),
                "allowed": host not in plan.forbidden,
            }
            for host, choice in enumerate(plan.whole)
        ],
        "alternatives": [_summary(problem, choice) for choice in plan.alternatives],
        "why": reasons(problem, plan),
    }
    if config.partition.pareto:
        choices = pareto(problem, config.partition.pareto)
        found["pareto"] = [_summary(problem, choice) for choice in choices]
    if config.partition.solver == "min_cut":
        found["minimum_cut"] = _minimum_cut(one, config)
    return found


def _minimum_cut(one: DividedModel, config: Config) -> dict[str, Any]:
    problem, objective = problem_of(config, one.whole, one.shape), one.plan.objective
    division = best_division(problem, one.whole, one.shape, objective)
    single = plan_partition(problem, objective).best.cost.value(objective)
    return {
        "steps_on_device": len(division.device),
        "tensors": list(division.crossing),
        "cost": division.cost,
        "saves": 1 - division.cost / single if single else 0.0,
    }


def _totals(cost: RequestCost) -> dict[str, Any]:
    return {
        "latency_ms": 1e3 * cost.latency_s,
        "requests_per_s": 1 / cost.bottleneck_s if cost.bottleneck_s else None,
        "sent_bytes": cost.sent_bytes,
        "energy_j": cost.energy_j,
    }


def _summary(problem: Problem, choice: Choice) -> dict[str, Any]:
    parts = [
        f"{problem.hosts[p.host].name} {_units(problem, p.first, p.last)}"
        for p in choice.cost.portions
        if p.last > p.first
    ]
    codecs = {t.codec for t in choice.cost.transfers}
    return {
        "cuts": list(choice.partition.cuts),
        "chain": " | ".join(parts),
        "codecs": sorted(codecs),
        **_totals(choice.cost),
    }


def _units(problem: Problem, first: int, last: int) -> str:
    if last <= first:
        return "nothing"
    names = problem.units[first:last]
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _hosts(problem: Problem, cost: RequestCost) -> list[dict[str, Any]]:
    portions = {p.host: p for p in cost.portions}
    rows: list[dict[str, Any]] = []
    for index, host in enumerate(problem.hosts):
        row = {"host": host.name, "machine": host.costs.name.rpartition(".")[2]}
        if (p := portions.get(index)) is None:
            rows.append({**row, "units": "nothing", "takes_part": False})
            continue
        rows.append({
            **row,
            "units": _units(problem, p.first, p.last),
            "takes_part": True,
            "first": p.first,
            "last": p.last,
            "compute_ms": 1e3 * p.compute_s,
            "messages_ms": 1e3 * p.messages_s,
            "wait_ms": 1e3 * p.wait_s,
            "memory_mb": p.memory_bytes / 1e6,
            "sent_bytes": p.sent_bytes,
        })  # fmt: skip
    return rows


def _links(one: DividedModel, names: Sequence[str]) -> list[dict[str, Any]]:
    problem, units = one.problem, one.layers.units
    return [
        {
            "from": problem.hosts[t.first].name,
            "to": problem.hosts[t.last].name,
            "network": " + ".join(names[t.first : t.last]),
            "after": problem.units[t.cut - 1] if t.cut else "the input",
            "tensors": len(units[t.cut - 1].outputs) if t.cut else 1,
            "codec": t.codec,
            "bytes": t.up_bytes,
            "up_ms": 1e3 * t.up_s,
            "answer_ms": 1e3 * t.down_s,
            "latency_ms": 1e3 * t.latency_s,
            "wait_ms": 1e3 * t.wait_s,
        }
        for t in one.plan.best.cost.transfers
    ]


def _variant_row(one: DividedModel) -> dict[str, Any]:
    return {
        "variant": one.name,
        "accuracy": one.accuracy,
        **_summary(one.problem, one.plan.best),
    }


# --------------------------------------------------------------------------------------------------
# For people


def show(found: Mapping[str, Any]) -> None:
    """Print a plan: a line for each host with what it sends on, then what it is compared with."""
    shape = "x".join(map(str, found["input"]))
    _print(f"{found['model']} on {shape}, {found['objective']} by {found['solver']}")
    links = {row["from"]: row for row in found["links"]}
    rows = [_cells(row, links.get(row["host"])) for row in found["hosts"]]
    print(aligned(("host", "units", "computes", "memory", "sends", "over"), rows))
    rate = found["requests_per_s"]
    limit = f", at most {rate:.3g} requests/s" if rate else ""
    _print(f"a request takes {seconds_text(found['latency_ms'] / 1e3)}{limit}")
    others = [[a["chain"], seconds_text(a["latency_ms"] / 1e3)] for a in found["alternatives"]]
    others += [
        [f"all on {w['host']}{'' if w['allowed'] else ' (not allowed)'}",
         seconds_text(w["latency_ms"] / 1e3)]
        for w in found["whole"]
    ]  # fmt: skip
    print(aligned(("instead", "a request"), others))
    for row in found.get("variants", ()):
        took = seconds_text(row["latency_ms"] / 1e3)
        _print(f"{row['variant']}: accuracy {row['accuracy']:.2%}, {took}, {row['chain']}")
    for codec, row in found.get("codec_effect", {}).items():
        _print(
            f"{codec} at these cuts: {row['same_answers']:.2%} of answers stay, accuracy "
            f"{row['accuracy']:.2%} instead of {row['accuracy_alone']:.2%}"
        )
    if "minimum_cut" in found:
        cut = found["minimum_cut"]
        tensors = ", ".join(cut["tensors"]) or "nothing"
        _print(f"minimum cut: {tensors} cross, {cut['saves']:.1%} less than with one tensor")
    _print(found["why"])
    _print(f"picture and figures in {found['run_dir']}")


def _cells(row: Mapping[str, Any], link: Mapping[str, Any] | None) -> list[str]:
    name = f"{row['host']} {row['machine']}"
    if not row["takes_part"]:
        return [name, "nothing", "", "", "", ""]
    sends = "" if link is None else f"{link['bytes'] / 1e3:,.1f} kB {link['codec']}"
    if link is not None and link["tensors"] > 1:
        sends += f" in {link['tensors']} tensors"
    over = "" if link is None else f"{link['network']}, {link['up_ms']:.3g} ms"
    memory = f"{row['memory_mb']:.3g} MB"
    return [name, row["units"], f"{row['compute_ms']:.3g} ms", memory, sends, over]


def _print(text: str) -> None:
    print(fitted(text, sys.stdout))
