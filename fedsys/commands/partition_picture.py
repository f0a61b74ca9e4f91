"""The picture of a chain: what runs where, what it takes, and what goes over the links."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsys.partition.evaluation import Portion, Transfer
from fedsys.partition.planner import PartitionPlan
from fedsys.partition.problem import Problem
from fedsys.partition.reasons import milliseconds
from fedsys.runs.plots import COLORS, draw_panels

_COMPUTES, _MESSAGES, _SENDS, _WAYS, _WAITS = (COLORS[i] for i in (0, 3, 2, 5, 6))
_ROOM = 0.055  # of the time of a request: what is narrower has no number in it


def draw_chain(problem: Problem, plan: PartitionPlan, title: str, path: Path) -> Path:
    """Draw a request along the chain, and the whole model on each host below it.

    Args:
        problem: What was divided.
        plan: How.
        title: Of the picture.
        path: The PNG file.
    """
    lanes = _lanes(problem, plan)
    height = 1.2 + 0.42 * len(lanes)
    bars = 1.1 + 0.3 * (1 + len(problem.hosts))
    panels = [(lambda axes: _timeline(axes, lanes, title), height),
              (lambda axes: _compared(axes, problem, plan), bars)]  # fmt: skip
    return draw_panels(path, panels, 9.0)


Lane = tuple[str, list[tuple[float, float, str]]]
"""A label, and spans of it: begin and length in milliseconds, and colour."""


def _lanes(problem: Problem, plan: PartitionPlan) -> list[Lane]:
    """Return what each host and link does from the beginning of a request to its answer."""
    cost, now = plan.best.cost, 0.0
    lanes: list[Lane] = []
    for place, portion in enumerate(cost.portions):
        spans = [(now, portion.wait_s, _WAITS)]
        now += portion.wait_s
        spans.append((now, portion.compute_s, _COMPUTES))
        now += portion.compute_s
        spans.append((now, portion.messages_s, _MESSAGES))
        now += portion.messages_s
        lanes.append((_host_label(problem, portion), spans))
        if place < len(cost.transfers):
            sent = cost.transfers[place]
            spans = [(now, sent.wait_s, _WAITS), (now + sent.wait_s, sent.up_s, _SENDS)]
            now += sent.wait_s + sent.up_s
            spans.append((now, sent.latency_s / 2, _WAYS))
            now += sent.latency_s / 2
            lanes.append((_link_label(problem, sent), spans))
    for place in reversed(range(len(cost.transfers))):
        sent = cost.transfers[place]
        spans = lanes[2 * place + 1][1]
        spans += [(now, sent.down_s, _SENDS), (now + sent.down_s, sent.latency_s / 2, _WAYS)]
        now += sent.down_s + sent.latency_s / 2
    return [(name, [(1e3 * a, 1e3 * b, c) for a, b, c in spans if b > 0]) for name, spans in lanes]


def _host_label(problem: Problem, portion: Portion) -> str:
    names = problem.units[portion.first : portion.last]
    units = "nothing" if not names else names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
    took = f"{portion.memory_bytes / 1e6:.3g} MB, {milliseconds(portion.compute_s)}"
    return f"{problem.hosts[portion.host].name}: {units}\n{took}"


def _link_label(problem: Problem, sent: Transfer) -> str:
    ends = f"{problem.hosts[sent.first].name} → {problem.hosts[sent.last].name}"
    return f"{ends}\n{sent.up_bytes / 1e3:,.1f} kB {sent.codec}, {milliseconds(sent.up_s)}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _timeline(axes: Any, lanes: list[Lane], title: str) -> None:
    whole = max((a + b for _, spans in lanes for a, b, _ in spans), default=1.0)
    for row, (_, spans) in enumerate(lanes):
        for begin, length, color in spans:
            axes.barh(row, length, left=begin, height=0.6, color=color)
            if length > _ROOM * whole:
                middle = begin + length / 2
                axes.text(middle, row, _digits(length), ha="center", va="center", color="white")
    axes.set_yticks(range(len(lanes)), [name for name, _ in lanes])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(title=f"{title}: a request takes {milliseconds(whole / 1e3)}", xlabel="ms")
    words = {"computes": _COMPUTES, "messages": _MESSAGES, "sends": _SENDS, "on the way": _WAYS,
             "waits": _WAITS}  # fmt: skip
    for word, color in words.items():
        axes.barh(0, 0, color=color, label=word)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=len(words))


def _compared(axes: Any, problem: Problem, plan: PartitionPlan) -> None:
    rows = [("chosen", plan.best.cost.latency_s, COLORS[0])]
    for host, choice in enumerate(plan.whole):
        refused = " (not allowed)" if host in plan.forbidden else ""
        name = f"all on {problem.hosts[host].name}{refused}"
        rows.append((name, choice.cost.latency_s, COLORS[6]))
    for row, (_, seconds, color) in enumerate(rows):
        axes.barh(row, 1e3 * seconds, height=0.6, color=color)
        axes.text(1e3 * seconds, row, f" {milliseconds(seconds)}", va="center")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
    axes.set(xlabel="ms")
