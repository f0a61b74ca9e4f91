"""Why a plan does with each device what it does: one sentence for each."""

from __future__ import annotations

from functools import cached_property

from fedsys.planning.assignment import Assignment
from fedsys.planning.planner import Plan, options
from fedsys.planning.resources import RESOURCES
from fedsys.planning.stage_table import StageTable
from fedsys.planning.workload import Device, Menu, Workload
from fedsys.runs.lines import seconds_text


class Reasons:
    """Puts plans of a workload into words. Devices of one kind share what is computed for them.

    Args:
        load: What is trained.
        made: A plan of it.
    """

    def __init__(self, load: Workload, made: Plan) -> None:
        self._load, self._made = load, made
        self._known: dict[tuple[object, ...], str] = {}

    def of(self, k: int) -> str:
        """Return the sentence about a device."""
        device, choice = self._load.devices[k], self._made.choices[k]
        key = id(device.costs), device.network, device.examples, choice, self._made.round_s[k]
        if key not in self._known:
            whole = choice.cut == self._load.units
            self._known[key] = self._alone(k) if whole else self._offloaded(device, choice, k)
        return self._known[key]

    @cached_property
    def _table(self) -> StageTable:
        return StageTable(self._load, options(self._load))

    def _whole_s(self, k: int) -> float:
        return float(self._table.alone()[k, self._table.course[0]])

    def _alone(self, k: int) -> str:
        if not self._load.cuts:
            return "the model has no cut"
        seconds = self._table.alone()[k, self._table.course[1:]]
        best = int(seconds.argmin())
        name, _ = busiest(self._load, self._load.devices[k], self._table.choices[1 + best])
        return (
            f"offloading would take {seconds_text(seconds[best])} even with an edge of its own, "
            f"most of it on the {name}; alone it takes {seconds_text(self._whole_s(k))}"
        )

    def _offloaded(self, device: Device, choice: Assignment, k: int) -> str:
        name, seconds = busiest(self._load, device, choice)
        iteration_s, round_s = self._made.iteration_s[k], self._made.round_s[k]
        share = seconds / iteration_s if iteration_s else 0.0
        alone_s = self._whole_s(k)
        gain = beside_alone(round_s, alone_s)
        return f"{gain}; the {name} is busy {share:.0%} of the time"


def by_resource(load: Workload, device: Device, choice: Assignment) -> dict[str, float]:
    """Return the seconds of an iteration in which each resource works for a device, by kind."""
    s = Menu(load, [choice]).stages(device)
    n = float(s.pieces[0])
    return {
        "device": n * float(s.forward[0] + s.backward[0]) + float(s.device_update[0]),
        "up": n * float(s.up[0]),
        "edge": n * float(s.edge[0]) + float(s.edge_update[0]),
        "down": n * float(s.down[0]),
    }


def busiest(load: Workload, device: Device, choice: Assignment) -> tuple[str, float]:
    """Return which resource works longest in an iteration of a device, and its seconds."""
    busy = by_resource(load, device, choice)
    kind = max(RESOURCES, key=busy.__getitem__)
    return RESOURCES[kind], busy[kind]


def beside_alone(round_s: float, alone_s: float) -> str:
    """Return how a round compares with training alone, in words."""
    slower = round_s > alone_s > 0  # as policy.offload=forced has it
    longer, shorter = (round_s, alone_s) if slower else (alone_s, round_s)
    times = f"{longer / shorter:.1f}" if shorter else "many"
    if times == "1.0":
        return "about as fast as alone"
    return f"{times} times {'slower' if slower else 'faster'} than alone"
