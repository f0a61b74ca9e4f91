"""The trace and the pictures of a round of the modelled fleet."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
from matplotlib.figure import Figure

from fedsys.planning.assignment import Assignment
from fedsys.planning.costs import Crossing, MachineCosts
from fedsys.planning.resources import Event
from fedsys.planning.virtual_clock import virtual_round
from fedsys.planning.workload import Device, Workload
from fedsys.runs import trace_plots
from fedsys.runs import virtual_trace as fleet_trace
from fedsys.runs.folder import RunFolder
from fedsys.runs.trace_plots import (
    MOST_BARS,
    MOST_DRAWN,
    idle_groups,
    idle_panel,
    lanes_of,
    lanes_panel,
)
from fedsys.runs.virtual_trace import ModelledRound, one_iteration, perfetto, workers
from fedsys.runtime import run
from fedsys.transport.network import Network

DEVICE = MachineCosts("m", (1,), ((0.1, 0.2, 0.3),), ((0.2, 0.4, 0.6),), (0.01,) * 3, load_s=0.01)
EDGE = MachineCosts(
    "e", (1,), ((0.01, 0.03, 0.05),), ((0.01, 0.02, 0.03),), (0.001,) * 3, workers=2
)
SPLIT, ALONE = Assignment(1, micro_batches=2), Assignment(3, micro_batches=1)


def played(*choices, examples=16, real=False, edges=1):
    network = Network(1e5, 2e5, 0.01)
    crossings = tuple(Crossing(n, 1) for n in (300, 100, 10))
    devices = tuple(Device(str(i), DEVICE, network, examples) for i in range(len(choices)))
    load = Workload(crossings, (40, 80, 8), (1, 2), 4, devices, (EDGE,) * edges, (1, 2), epochs=2)
    names = tuple(f"device {i} pi" for i in range(len(choices)))
    return ModelledRound(virtual_round(load, choices, 5.0), names, (2,) * edges, real)


def lanes(trace):
    """Return the spans of each thread by the names of process and thread."""
    spans = {}
    processes, threads = {}, {}
    for event in trace:
        assert event["ph"] in ("M", "X") and type(event["pid"]) is int and event["pid"] > 0
        if event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
        elif event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] > 0
            name = processes[event["pid"]], threads[event["pid"], event["tid"]]
            spans.setdefault(name, []).append(event)
    return spans


@pytest.mark.parametrize("choices", [(SPLIT, SPLIT, ALONE), (ALONE, ALONE), (SPLIT,) * 5])
def test_a_trace_has_every_event_in_a_lane_in_which_nothing_overlaps(choices):
    shown = played(*choices)
    found = lanes(json.loads(json.dumps(perfetto(shown))))
    assert {process for process, _ in found} == {"fleet (virtual)"}
    for spans in found.values():  # Perfetto drops what overlaps within a thread
        ends = sorted((round(1000 * e["ts"]), round(1000 * (e["ts"] + e["dur"]))) for e in spans)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
    path = found.pop(("fleet (virtual)", "critical path"))
    timeline = shown.played.timeline
    busy = Counter()
    for spans in found.values():
        for event in spans:
            busy[event["cat"]] += event["dur"] / 1e6
    expected = Counter()
    for resource, seconds in timeline.busy().items():
        expected[resource.partition(":")[0]] += seconds
    assert dict(busy) == pytest.approx(dict(expected), rel=1e-6)
    assert path[0]["ts"] == 0.0  # and not the 5 s at which the round began
    end = (path[-1]["ts"] + path[-1]["dur"]) / 1e6
    assert end == pytest.approx(timeline.seconds - 0.01)  # the latency of the last way


def test_workers_of_an_edge_have_lanes_of_their_own():
    """Sessions that one edge computes at once lay above each other in one thread."""
    names = [lane for _, lane in lanes(perfetto(played(*(SPLIT,) * 5)))]
    assert {"edge 0 worker 0", "edge 0 worker 1"} <= set(names)
    assert "edge 0 worker 2" not in names


def test_of_large_fleets_and_long_rounds_a_part_is_shown_and_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(fleet_trace, "MOST_EVENTS", 500)
    shown = played(*(SPLIT,) * 60)
    found = lanes(perfetto(shown))
    ((process,),) = {tuple({process for process, _ in found})}
    assert process.startswith("fleet (virtual), the 40 slowest of 60 devices, the first ")
    kept = {lane: spans for (_, lane), spans in found.items() if lane != "critical path"}
    assert sum(map(len, kept.values())) <= 500
    assert len({lane for lane in kept if lane.endswith(" pi")}) <= 40
    assert len(lanes_of(shown, one_iteration(shown))) <= 3 * MOST_DRAWN + 1
    assert len(idle_groups(shown)) == MOST_BARS + 2
    drawn = trace_plots.write(tmp_path, {}, shown)
    assert [path.name for path in drawn] == ["trace.json", "timeline.png", "idle.png"]


def test_titles_say_which_devices_and_edge_servers_are_not_drawn(tmp_path):
    """Of six edge servers four were drawn, not that of the critical path, and nothing said so."""
    shown = played(*(Assignment(1, micro_batches=2, edge=k % 6) for k in range(12)), edges=6)
    titles = []
    for paint, _ in (lanes_panel(shown), idle_panel(shown)):
        figure = Figure()
        axes = figure.subplots()
        paint(axes)
        titles.append(" ".join(axes.get_title().split()))
    drawn = lanes_of(shown, one_iteration(shown))
    assert len([name for name, _ in drawn if "edge" in name]) == 4
    there = {id(e) for name, several in drawn if "edge" in name for lane in several for e in lane}
    on_path = [e for e in shown.critical_path if e.resource.startswith("edge:")]
    assert on_path and {id(e) for e in on_path} & there  # edge 5, as busy as the others
    assert "the 8 slowest of 12 devices and 4 of 6 edge servers" in titles[0]
    assert "the 10 slowest of 12 devices and 4 of 6 edge servers" in titles[1]


def test_idle_shares_are_those_of_the_round():
    shown = played(SPLIT, SPLIT, ALONE)
    groups = idle_groups(shown)
    assert list(groups) == ["device 0\npi", "device 1\npi", "device 2\npi", "edge 0", "mean"]
    assert groups["mean"] == shown.played.idle
    for kind in ("device", "up", "down"):
        own = [groups[name][kind] for name in list(groups)[:3]]
        assert sum(own) / 3 == pytest.approx(shown.played.idle[kind])
    assert groups["edge 0"]["edge"] == pytest.approx(shown.played.idle["edge"])


@pytest.mark.parametrize("choices", [(SPLIT, SPLIT, ALONE), (ALONE,), (SPLIT,)])
@pytest.mark.parametrize("examples", [1, 4, 7, 40])
def test_one_mini_batch_is_shown_with_the_critical_path_in_it(choices, examples):
    shown = played(*choices, examples=examples)
    part = one_iteration(shown)
    assert part.device == shown.critical_path[-1].job
    assert 5.0 <= part.begin_s < part.end_s <= 5.0 + shown.played.seconds
    drawn = {id(e) for _, several in lanes_of(shown, part) for lane in several for e in lane}
    assert any(id(event) in drawn for event in shown.critical_path)


def test_workers_share_no_moment():
    events = played(*(SPLIT,) * 5).played.timeline.events
    split = workers([e for e in events if e.resource == "edge:0"])
    assert len(split) == 2
    for lane in split:
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(lane))


def test_what_was_measured_comes_first_where_time_is_real(tmp_path):
    own = {"device 0": [Event("device", "update", i, -1, i, i + 0.5) for i in range(3)]}
    names = []
    for real in (False, True):
        path = trace_plots.write(tmp_path, own, played(SPLIT, real=real))[0]
        events = json.loads(path.read_text())["traceEvents"]
        named = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
        names.append([named[pid] for pid in sorted(named)])
    assert names == [
        ["fleet (virtual)", "this machine: device 0"],
        ["measured: device 0", "fleet (predicted)"],
    ]


@pytest.mark.parametrize("split", [True, False])
def test_a_run_on_a_configured_fleet_shows_that_fleet(configure, tmp_path, split):
    """The trace and the pictures were of the machine that computed; without a split, of nothing."""
    path = tmp_path / "run"
    policy = ("policy=fixed", "policy.cut=1") if split else ("policy=none",)
    run(
        configure(
            *policy, "fleet=nominal", "fleet.devices=[pi3,pi4]", "network=wifi", "num_clients=2",
            "rounds=2", "data=synthetic", "data.examples=200", "model=cnn", "client.batch_size=16",
            "client.epochs=1", f"run.dir={path}", "run.plots=true",
        )
    )  # fmt: skip
    events = json.loads((path / "trace.json").read_text())["traceEvents"]
    found = lanes(events)
    own = [f"this machine: device {i}" for i in range(2)] if split else []
    assert {process for process, _ in found} == {"fleet (virtual)", *own}
    assert ("fleet (virtual)", "device 0 pi3") in found
    fleet = [e for (process, _), spans in found.items() if "fleet" in process for e in spans]
    row = RunFolder.open(path).rounds()[-1]
    last = max(e["ts"] + e["dur"] for e in fleet) / 1e6
    assert last == pytest.approx(row["virtual_s"], rel=0.02)
    for picture in ("timeline.png", "idle.png"):
        assert (path / "plots" / picture).read_bytes().startswith(b"\x89PNG")
