"""The trace of a round: what devices and edges note, as lanes, sums, and a file for Perfetto."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.planning.resources import Event
from fedsys.runs import trace_plots
from fedsys.runs.tracing import LANES, NAMES, Recorder, pack, perfetto, unpack

events = st.builds(
    Event,
    st.sampled_from(list(LANES)),
    st.sampled_from(NAMES),
    st.integers(0, 2**31 - 1),
    st.integers(-1, 2**31 - 1),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
    job=st.just(0),
    cause=st.none(),
)


def us(*seconds):
    return [round(1e6 * s) for s in seconds]


def recorded(ahead=0.0):
    """Return two mini-batches of two pieces; the clock of the edge is `ahead` of the device's."""
    recorder = Recorder()
    for step, t in ((0, 100.0), (1, 110.0)):
        recorder.note("forward", step, 0, (t, t + 1))
        recorder.note("forward", step, 1, (t + 1, t + 2))
        recorder.note("wait", step, 0, (t + 2, t + 5))
        for piece, sent in ((0, t + 1), (1, t + 2)):
            told = us(*(sent + ahead + n for n in (2, 2.25, 2.5, 3)))
            recorder.answer(step, piece, (sent, 1000), (sent + 4, 500), told)
            recorder.note("backward", step, piece, (t + 5 + piece, t + 6 + piece))
        recorder.note("update", step, -1, (t + 7, t + 8))
        recorder.finished(t + 8)
    return recorder


@given(st.lists(events, max_size=40))
def test_events_survive_packing(many):
    assert unpack(pack(many)) == many
    assert unpack(pack(many)[:-1]) == many[:-1]


@pytest.mark.parametrize("ahead", [0.0, 5e5, -90.0])
def test_lanes_join_what_device_and_edge_noted_whatever_clock_the_edge_has(ahead):
    found = recorded(ahead).events()
    first = [e for e in found if e.step == 0 and e.lane != "device"]
    # where clocks differ, the shortest ways up (2 s) and down (1 s) are taken to be equal
    shift = 0.5 if ahead else 0.0
    assert [(e.lane, e.name, e.piece) for e in first] == [
        ("uplink", "transfer", 0), ("uplink", "transfer", 1),
        ("edge", "forward", 0), ("edge", "backward", 0), ("downlink", "transfer", 0),
        ("edge", "forward", 1), ("edge", "backward", 1), ("downlink", "transfer", 1),
    ] or ahead  # fmt: skip
    at = {(e.lane, e.name, e.piece): (e.start_s, e.end_s) for e in first}
    assert at["uplink", "transfer", 0] == pytest.approx((101, 103 - shift))
    assert at["uplink", "transfer", 1] == pytest.approx((103 - shift, 104 - shift))  # it queued
    assert at["edge", "forward", 0] == pytest.approx((103.25 - shift, 103.5 - shift))
    assert at["downlink", "transfer", 0] == pytest.approx((104 - shift, 105))


def test_sums_are_per_mini_batch_and_bits_are_timed_where_they_queued():
    sums = recorded().sums()
    assert sums.iteration_s == 10.0
    assert sums.compute_s == pytest.approx(5.0)  # two forwards, two backwards, the update
    assert sums.edge_s == pytest.approx(1.5)
    assert sums.up_bit_s == pytest.approx(1.0 / 8000)
    assert sums.down_bit_s == pytest.approx(1.0 / 4000)


def test_loading_is_not_computing():
    """Planners count it beside what a device computes, so a device looked slower than it was."""
    recorder = recorded()
    recorder.note("load", 0, -1, (108.0, 109.5))  # on an emulated device
    recorder.note("load", 1, -1, (102.0, 104.0), "loader")
    assert recorder.sums().compute_s == pytest.approx(5.0)


def test_latency_is_no_time_of_bits_where_no_transfer_waited_for_another():
    """One small piece after the other over 4G looked like a link many times slower."""
    recorder = Recorder()
    for step, t in ((0, 100.0), (1, 110.0)):  # 1 s of bits and 3 s of latency, each way
        recorder.answer(step, 0, (t, 1000), (t + 9, 500), us(t + 4, t + 4, t + 4.5, t + 5))
    sums = recorder.sums(3.0)
    assert sums.up_bit_s == pytest.approx(1.0 / 8000)
    assert sums.down_bit_s == pytest.approx(1.0 / 4000)
    assert recorder.sums(6.0).up_bit_s == 0.0  # it says nothing of bits


@pytest.mark.parametrize("wait", [0.0, 1.0, 4.0, 6.0])
def test_a_bit_takes_the_same_time_however_soon_the_next_transfer_follows(wait):
    """Whoever sent before the last one had arrived was taken to have waited for it."""
    recorder, sent, left = Recorder(), 100.0, 0.0
    for piece in range(4):  # 2 s of bits, 3 s of latency
        left = max(sent, left) + 2
        recorder.answer(0, piece, (sent, 1000), (left + 9, 0), us(*[left + 3] * 3, left + 4))
        sent += wait
    assert recorder.sums(3.0).up_bit_s == pytest.approx(2.0 / 8000)


def test_what_an_edge_tells_is_not_believed_when_it_makes_no_sense():
    recorder = Recorder()
    for told in (None, [1, 2, 3], ["a"] * 4, [True] * 4):
        recorder.answer(0, 0, (1.0, 10), (2.0, 10), told)
    assert recorder.events() == []
    assert recorder.sums().edge_s == 0.0


def test_a_trace_has_the_form_that_perfetto_reads(tmp_path):
    devices = {"device 0": recorded().events(), "device 3": recorded().events()}
    drawn = trace_plots.write(tmp_path, devices)
    assert [p.name for p in drawn] == ["trace.json", "timeline.png", "idle.png"]
    for picture in drawn[1:]:
        assert picture.read_bytes().startswith(b"\x89PNG")
    trace = json.loads(drawn[0].read_text())
    assert json.loads(json.dumps(perfetto(devices))) == trace
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    named = {}
    for event in trace["traceEvents"]:
        assert event["ph"] in ("M", "X")
        assert type(event["pid"]) is int and event["name"]
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] > 0 and type(event["tid"]) is int
            assert named[event["pid"], event["tid"]] == event["cat"]
        elif event["name"] == "thread_name":
            named[event["pid"], event["tid"]] = event["args"]["name"]
    assert set(named.values()) == set(LANES.values()) - {"moves"}  # nobody moved
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == 2 * len(recorded().events())


def test_nothing_is_written_where_nothing_was_split(tmp_path):
    assert trace_plots.write(tmp_path, {}) == trace_plots.write(tmp_path, {"device 0": []}) == []
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_waits_is_idle():
    shares = trace_plots.idle_shares({"device 0": recorded().events()})["device 0"]
    assert shares["device"] == pytest.approx(1 - 10 / 18)
    assert shares["edge"] == pytest.approx(1 - 3 / 18)


@given(st.lists(st.floats(0, 1e4), min_size=3, max_size=20))
def test_what_follows_without_a_gap_does_not_overlap_in_the_trace(moments):
    """Begin and length were rounded each on its own; Perfetto drops events that overlap."""
    ends = sorted(moments)
    many = [Event("device", "forward", 0, 0, a, b) for a, b in itertools.pairwise(ends)]
    spans = [e for e in perfetto({"device 0": many})["traceEvents"] if e["ph"] == "X"]
    for one, other in itertools.pairwise(spans):
        assert round(1000 * (one["ts"] + one["dur"])) <= round(1000 * other["ts"])
