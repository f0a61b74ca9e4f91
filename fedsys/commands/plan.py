"""``fedsys plan``: what each device of the run should do, how long it would take, and why.

Beside the plan stand what a person would compare it with: everything on the devices, the best
choice that is the same for all devices, and for each device the next best of its choices.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from fedsys import config as configuration
from fedsys.config import Config, NetworkConfig
from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel
from fedsys.planning.assignment import Assignment
from fedsys.planning.handing_over import mirrored_bytes, price
from fedsys.planning.hardware import link_of
from fedsys.planning.leakage import leakage_note
from fedsys.planning.options import PLANNED, PlanOptions, choosable, machines_of, run_workload
from fedsys.planning.oracle import Oracle, regret
from fedsys.planning.planner import Plan, best_static, evaluate, next_best, plan
from fedsys.planning.policy_rounds import decided_rounds
from fedsys.planning.resources import RESOURCES
from fedsys.planning.workload import Workload
from fedsys.runs import opening
from fedsys.runs.lines import aligned, fitted, folded, seconds_text, width_of
from fedsys.runs.reasons import Reasons, by_resource
from fedsys.training import federation
from fedsys.training.federation import layers_of
from fedsys.transport.several import said

ROUNDS = 30
"""Rounds on the virtual clock in which a policy learns before its plan is shown."""

POLICIES = "strategies.policies.build_policy"


def job(tree: Any) -> Mapping[str, Any]:
    """Plan the run that the command line describes.

    With ``policy=none`` it is planned as ``policy=auto`` would; what ``policy=fixed`` says is timed
    beside that. A policy that learns decides for `ROUNDS` rounds on the virtual clock, and its last
    plan is shown. With a sequential schedule it is planned as if it were pipelined, unless that is
    named.

    Args:
        tree: The composed configuration (a DictConfig).

    Returns:
        The figures of `figures`, ``data`` (its source and the shape of an example) and the number
        of training ``examples``.

    Raises:
        ConfigError: The fleet has no machines, or a value is not usable.
    """
    config = configuration.parse(configuration.to_text(tree))
    if "schedule" not in configuration.given_keys() and config.schedule.kind == "sequential":
        schedule = dataclasses.replace(config.schedule, kind="pipelined")
        config = dataclasses.replace(config, schedule=schedule)
    fed = federation.federation(config)
    layers = layers_of(config, fed.dataset)
    examples = [len(part) for part in fed.parts]
    shape = said(fed.dataset.input_shape)
    found = {"data": f"{config.data.get('source')} {shape}", "examples": sum(examples)}
    found |= figures(config, layers, examples)
    if not tree.json:
        show(found)
    return found


def _choosable(kind: str, config: Config) -> PlanOptions:
    """Return what the policy of a run may choose."""
    if kind in PLANNED:
        return PlanOptions.of(config.policy)
    return PlanOptions() if kind == "none" else choosable(config.policy)


def figures(config: Config, layers: LayeredModel, examples: Sequence[int]) -> dict[str, Any]:
    """Return the plan of a run as plain values.

    Args:
        config: The run.
        layers: Its model.
        examples: Examples of each client.

    Returns:
        For the round ``predicted_s``, ``all_on_device_s``, ``best_static``, ``how``, ``planned_s``,
        ``why``; and ``devices``, each with its choice, seconds by resource, and alternatives. Where
        another than a planner decides, its ``regret``; beside a fixed plan the ``best_s`` of the
        best one.

    Raises:
        ConfigError: Labels stay on the devices, or a value is not usable.
    """
    _refuse_private_labels(config)
    kind = str(config.policy.get("kind", "none"))
    options = _choosable(kind, config)
    load = run_workload(config, layers, machines_of(config, layers), examples, options)
    decided = _decided(kind, config, layers, examples, load)
    made = decided.plan if decided else plan(load, options.kind, offload=options.offload)
    whole = plan(load, "classic")
    static = best_static(load, offload=options.offload)
    others = next_best(load, made, offload=options.offload)
    reasons, note = Reasons(load, made), leakage_note(config, layers)
    words = [_summary(load, made, whole), decided.beside if decided else "", note]
    links = [_link_name(link_of(config, k)) for k in range(len(load.devices))]
    devices = [
        {
            "device": load.devices[k].name,
            "machine": load.devices[k].costs.name.rpartition(".")[2],
            "network": link,
            **(_planned(layers, load, made, k) | _moving(config, load, made, k)),
            "next_best": _choice(layers, others[k][0]) | {"round_s": others[k][1]},
            "all_on_device_s": whole.round_s[k],
            "best_static_s": static.round_s[k],
            "why": decided.why.get(k) or reasons.of(k) if decided else reasons.of(k),
        }
        for k, link in enumerate(links)
    ]
    return {
        "method": made.method,
        "model": str(config.model.get("name") or config.model["_target_"]).rpartition(".")[2],
        "network": ", ".join(dict.fromkeys(links)),
        "predicted_s": made.seconds,
        "all_on_device_s": whole.seconds,
        "best_static_s": static.seconds,
        "best_static": _choice(layers, static.choices[0]),
        "planned_s": made.planned_s,
        "how": made.how,
        "why": "; ".join(filter(None, words)),
        **({} if decided is None else decided.figures),
        "devices": devices,
    }


def _refuse_private_labels(config: Config) -> None:
    if config.client.label_private:
        raise ConfigError.of(
            "client.label_private", True,
            "cannot be planned: every piece goes to the edge twice, labels never, and planners and "
            "clock know one cut with labels", "client.label_private=false",
        )  # fmt: skip


@dataclass(frozen=True)
class DecidedPlan:
    """What a policy decides that is no planner: one that learns, or the user's own cuts.

    Attributes:
        plan: What it decided, at last.
        why: Its own reasons, by device.
        figures: ``regret`` against the best choices; of one that learns ``rounds`` that it had to
            learn in, and ``decide_ms``, the median; beside the user's cuts ``best_s``.
        beside: In words, how the best plan differs.
    """

    plan: Plan
    why: Mapping[int, str]
    figures: Mapping[str, float]
    beside: str = ""


def _decided(
    kind: str, config: Config, layers: LayeredModel, examples: Sequence[int], load: Workload
) -> DecidedPlan | None:
    """Return what another policy than a planner decides; None where planners do."""
    if kind in (*PLANNED, "none"):
        return None
    decide = _fixed if kind == "fixed" else _learned
    return decide(config, layers, examples, load)


def _learned(
    config: Config, layers: LayeredModel, examples: Sequence[int], load: Workload
) -> DecidedPlan:
    """Let a policy decide on the virtual clock, as in a run, and return its last plan."""
    build = configuration.locate(POLICIES, "policy")
    edges = max(1, len(configuration.edge_names(config)))
    policy = build(config.policy, edges, config, examples, say=opening.say)
    done = list(decided_rounds(policy, layers, load, ROUNDS))
    opening.clear()
    last, kind = done[-1], str(config.policy["kind"])
    how = f"as decided in round {last.number} on the virtual clock, in which nothing is trained"
    made = evaluate(last.load, last.choices, method=kind, how=how)
    best = Oracle().best(last.load, last.start_s, (last.choices, last.played))
    over = {} if best is None else {"regret": regret(last.played.seconds, best.seconds)}
    nodes = range(len(load.devices))
    why = policy.reasons(last.state, nodes) if hasattr(policy, "reasons") else {}
    decide_s = median(one.decide_s for one in done)
    figures = {**over, "rounds": last.number, "decide_ms": 1e3 * decide_s}
    return DecidedPlan(dataclasses.replace(made, planned_s=last.decide_s), why, figures)


def _fixed(
    config: Config, layers: LayeredModel, examples: Sequence[int], load: Workload
) -> DecidedPlan:
    """Return what the user's own cuts take, and what the best plan would.

    Raises:
        ConfigError: A cut is none of the model, or sends inputs as they are, which is not timed.
    """
    build = configuration.locate(POLICIES, "policy")
    policy = build(config.policy, max(1, len(configuration.edge_names(config))), config, examples)
    nodes = range(len(load.devices))
    state = policy.init(layers, nodes)
    _, chosen = policy.plan(state, dict.fromkeys(nodes))
    if any(chosen[node].cut == 0 for node in nodes):
        raise ConfigError.of(
            "policy.cut", config.policy["cut"],
            "cannot be planned at 0, where inputs are sent as they are", "policy.cut=1 or more",
        )  # fmt: skip
    choices = [_settled(chosen[node], config, load) for node in nodes]
    made = evaluate(load, choices, method="fixed", how="as policy.cut says")
    best = plan(load)
    over = regret(made.seconds, best.seconds)
    kinds = {_words(_choice(layers, choice)): None for choice in best.choices}
    beside = (
        f"policy=auto would take {seconds_text(best.seconds)}: {' or '.join(kinds)}"
        if over > 0
        else "policy=auto would be no faster"
    )
    figures = {"regret": over, "best_s": best.seconds}
    return DecidedPlan(made, policy.reasons(state, nodes), figures, beside)


def _settled(choice: Assignment, config: Config, load: Workload) -> Assignment:
    """Return a choice with its number of pieces; of a whole model there is one."""
    whole = choice.cut == load.units
    pieces = choice.micro_batches or config.schedule.micro_batches
    return dataclasses.replace(choice, micro_batches=1 if whole else pieces)


def _link_name(link: NetworkConfig) -> str:
    if link.name != NetworkConfig().name or link.up_mbit_s is None or link.down_mbit_s is None:
        return link.name
    return f"{link.up_mbit_s:g}/{link.down_mbit_s:g} Mbit/s"


def _choice(layers: LayeredModel, choice: Assignment) -> dict[str, Any]:
    whole = choice.cut == len(layers)
    return {
        "cut": choice.cut,
        "after": "all on the device" if whole else layers.units[choice.cut - 1].name,
        "micro_batches": choice.pieces,
        "codec": None if whole else choice.codec_up,
        "edge": None if whole else choice.edge,
    }


def _planned(layers: LayeredModel, load: Workload, made: Plan, k: int) -> dict[str, Any]:
    """Return the choice for a device, and the seconds in which each resource works for it."""
    choice, iteration_s = made.choices[k], made.iteration_s[k]
    busy = by_resource(load, load.devices[k], choice)
    return {
        **_choice(layers, choice),
        "iteration_s": iteration_s,
        "round_s": made.round_s[k],
        **{f"{kind}_s": value for kind, value in busy.items()},
        "device_waits_s": max(0.0, iteration_s - busy["device"]),
    }


def _moving(config: Config, load: Workload, made: Plan, k: int) -> dict[str, Any]:
    """Return what it costs a device to go to another edge server, where devices move."""
    choice = made.choices[k]
    moves = config.mobility.active or config.policy.get("migrate")
    if not moves or choice.cut == load.units:
        return {}
    weights = float(sum(load.state_bytes[choice.cut :]))
    latency_s, state = load.devices[k].network.latency_s, load.moments * weights
    anew = config.mobility.active and config.mobility.mode == "restart"
    told = price(weights, state, load.between, latency_s, anew=anew)
    shadow = mirrored_bytes(load, choice) if load.mirror else 0.0
    sent = price(weights, state, load.between, latency_s, ahead=True, mirrored=shadow)
    ahead = told if anew else sent
    return {
        "move": {
            "bytes": told.bytes,
            "pause_s": told.pause_s,
            "foreseen_bytes": ahead.bytes,
            "foreseen_pause_s": ahead.pause_s,
        }
    }


def _summary(load: Workload, made: Plan, whole: Plan) -> str:
    offloading = sum(choice.cut < load.units for choice in made.choices)
    slowest = max(range(len(made.round_s)), key=made.round_s.__getitem__)
    return (
        f"{offloading} of {len(made.choices)} devices offload; a round takes "
        f"{seconds_text(made.seconds)} instead of {seconds_text(whole.seconds)}, decided by "
        f"{load.devices[slowest].name}"
    )


# --------------------------------------------------------------------------------------------------
# For people


HEAD = ("device", "choice", "round", "device / up / edge / down", "next best", "alone", "static")

Row = Mapping[str, Any]


def show(found: Mapping[str, Any]) -> None:
    """Print a plan: a line for each device, or where these do not fit, a few for each kind."""
    rows = found["devices"]
    several = len({row["network"] for row in rows}) > 1
    width = width_of(sys.stdout)
    lines = aligned(HEAD, [_cells(row, several) for row in rows]).splitlines()
    if width is not None and max(map(len, lines)) > width:
        lines = [line for kind in _kinds(rows) for line in _kind_lines(kind, several)]
    static, known = found["best_static"], f"{found['examples']:,} training examples"
    _print(
        f"{found['model']} on {found['data']} ({known}) over {found['network']}, "
        f"planned by {found['method']}"
    )
    for line in lines:
        print(line if width is None or len(line) <= width else folded(line, width))
    _print(found["why"])
    _print(
        f"best for all alike: {_words(static)}, {seconds_text(found['best_static_s'])}; "
        f"{found['how']}, in {seconds_text(found['planned_s'])}"
    )
    _show_moves(rows)
    told: dict[str, list[str]] = {}
    for row in rows:
        told.setdefault(row["why"], []).append(row["device"])
    for reason, names in told.items():
        _print(f"{', '.join(names)}: {reason}")


def _show_moves(rows: Sequence[Row]) -> None:
    """Print what moves cost: the dearest of them."""
    moves = [row["move"] for row in rows if "move" in row]
    if moves:
        dear = max(moves, key=lambda move: float(move["pause_s"]))
        _print(
            f"a move to another edge server stops a device for {seconds_text(dear['pause_s'])} at "
            f"most ({dear['bytes'] / 1e6:.2f} MB), for {seconds_text(dear['foreseen_pause_s'])} "
            "if it is foreseen"
        )


def _print(text: str) -> None:
    print(fitted(text, sys.stdout))


def _device(row: Row, several: bool) -> str:
    return " ".join([row["device"], row["machine"], *([row["network"]] if several else [])])


def _cells(row: Row, several: bool) -> list[str]:
    other = row["next_best"]
    return [
        _device(row, several),
        _words(row),
        seconds_text(row["round_s"]),
        " / ".join(f"{1e3 * row[f'{name}_s']:.3g}" for name in RESOURCES) + " ms",
        f"{_words(other)}: {seconds_text(other['round_s'])}",
        seconds_text(row["all_on_device_s"]),
        seconds_text(row["best_static_s"]),
    ]


def _kinds(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the devices together that are alike and do the same."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row["machine"], row["network"], _words(row), _words(row["next_best"]))
        kinds.setdefault(key, []).append(row)
    return list(kinds.values())


def _kind_lines(kind: Sequence[Row], several: bool) -> list[str]:
    first = kind[0]
    names = [str(row["device"]) for row in kind]
    who = names[0] if len(names) == 1 else f"{names[0]} to {names[-1].rpartition(' ')[2]}"
    if len(names) > 1 and not _consecutive(names):
        who = ", ".join(names)
    network = f" over {first['network']}" if several else ""
    busy = ", ".join(f"{RESOURCES[name]} {1e3 * first[f'{name}_s']:.3g} ms" for name in RESOURCES)
    alone, static = (_span(kind, key) for key in ("all_on_device_s", "best_static_s"))
    other = [row["next_best"] for row in kind]
    return [
        f"{first['machine']} ({who}){network}: {_words(first)}",
        f"  a round: {_span(kind, 'round_s')}, alone {alone}, static {static}",
        f"  a mini-batch: {busy}",
        f"  next best: {_words(other[0])}: {_span(other, 'round_s')}",
    ]


def _consecutive(names: Sequence[str]) -> bool:
    numbers = [name.rpartition(" ")[2] for name in names]
    if not all(number.isdigit() for number in numbers):
        return False
    return int(numbers[-1]) - int(numbers[0]) == len(numbers) - 1


def _span(rows: Sequence[Row], key: str) -> str:
    """Return the least and the greatest of some seconds, or the one that all have."""
    low, high = (seconds_text(best(float(row[key]) for row in rows)) for best in (min, max))
    return low if low == high else f"{low} to {high}"


def _words(row: Mapping[str, Any]) -> str:
    if row["edge"] is None:
        return "all on the device"
    pieces = f"{row['micro_batches']} pieces" if row["micro_batches"] > 1 else "one piece"
    return f"cut {row['cut']} {row['after']}, {pieces}, {row['codec']}, edge {row['edge']}"
