import math
import queue
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.errors import ConfigError, FrameError, LinkClosed, LinkTimeout
from fedsys.transport.addresses import dial, serve
from fedsys.transport.faulty import Faulty, LinkFault
from fedsys.transport.network import Network, Rate, finish_time
from fedsys.transport.shaping import Lane, Shaped
from fedsys.transport.wire import Frame, decode, encode

SOON = 20.0


def close_to(x):
    return pytest.approx(x, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("start", "nbytes", "rate", "finish"),
    [
        (2.0, 125, Rate.constant(1000), 3.0),
        (2.0, 0, Rate.constant(1000), 2.0),
        (2.0, 10**9, Rate.constant(math.inf), 2.0),
        (0.0, 125, Rate((0, 0.5), (1000, 250)), 2.5),  # 500 bits, then 500 at a quarter
        (0.5, 125, Rate((0, 0.5), (1000, 250)), 4.5),
        (0.0, 250, Rate((0, 1, 3), (1000, 0, 1000)), 4.0),  # an outage of two seconds
        (1.5, 125, Rate((0, 1, 3), (1000, 0, 1000)), 4.0),
        (0.0, 125, Rate((0, 1, 3), (1000, 0, 1000)), 1.0),
        (0.0, 1000, Rate((0, 1, 2), (1000, math.inf, 8)), 1.0),
        (0.0, 375, Rate((0, 1), (1000, 0), 2.0), 5.0),  # 1000 bits every 2 s
        (2.5, 125, Rate((0, 1), (1000, 0), 2.0), 4.5),
        (1.0, 125_000, Rate((0, 1), (1000, 0), 2.0), 2001.0),
    ],
)
def test_finish_times_of_closed_form(start, nbytes, rate, finish):
    assert finish_time(start, nbytes, rate) == close_to(finish)


rates = st.lists(st.tuples(st.floats(0.1, 5), st.floats(0, 1e4)), min_size=1, max_size=5).flatmap(
    lambda rows: st.tuples(st.just(rows), st.booleans(), st.floats(1.0, 1e4))
)


def build(drawn) -> Rate:
    rows, repeats, last = drawn
    starts = [0.0]
    for length, _ in rows[:-1]:
        starts.append(starts[-1] + length)
    speeds = [*[speed for _, speed in rows[:-1]], last]
    return Rate(tuple(starts), tuple(speeds), starts[-1] + rows[-1][0] if repeats else None)


def bits_until(t: float, rate: Rate) -> float:
    """The integral of the rate from 0 to t, by its definition."""
    ends = [*rate.starts_s[1:], math.inf if rate.period_s is None else rate.period_s]
    whole, rest = (0.0, t) if rate.period_s is None else divmod(t, rate.period_s)

    def upto(x):
        pieces = zip(rate.starts_s, ends, rate.bits_s, strict=True)
        return sum(max(0.0, min(x, b) - a) * speed for a, b, speed in pieces)

    return whole * upto(rate.period_s or 0.0) + upto(rest)


@given(rates.map(build), st.floats(0, 100), st.floats(0, 1e5))
@settings(max_examples=300, deadline=None)
def test_the_rate_integrates_to_the_bits_that_were_sent(rate, start, nbytes):
    finish = finish_time(start, nbytes, rate)
    sent = bits_until(finish, rate) - bits_until(start, rate)
    assert finish >= start
    assert sent == pytest.approx(8 * nbytes, rel=1e-6, abs=1e-2)


@given(rates.map(build), st.floats(0, 100), st.floats(0, 1e4), st.floats(0, 1e4))
@settings(max_examples=200, deadline=None)
def test_two_frames_in_a_row_end_when_one_of_their_sum_ends(rate, start, a, b):
    one_by_one = finish_time(finish_time(start, a, rate), b, rate)
    assert one_by_one == pytest.approx(finish_time(start, a + b, rate), rel=1e-6, abs=1e-6)


def test_a_lane_serves_in_turn_and_adds_its_latency_to_each():
    lane = Lane(Rate.constant(8000), latency_s=0.25)
    assert lane.arrival(1.0, 500) == close_to(1.75)
    assert lane.arrival(1.0, 500) == close_to(2.25)  # had to wait for the first
    assert lane.arrival(5.0, 1000) == close_to(6.25)  # found the lane free


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"up_bits_s": 0.0}, "network.up_bits_s=0.0"),
        ({"down_bits_s": -1.0}, "network.down_bits_s=-1.0"),
        ({"latency_s": -0.1}, "network.latency_s"),
        ({"latency_s": math.inf}, "network.latency_s"),
        ({"trace": ((1.0, 5.0, 5.0), (1.0, 6.0, 6.0))}, "must ascend"),
        ({"trace": ((1.0, 5.0, -5.0),)}, "rates of 0 or more"),
        ({"trace": ((1.0, 0.0, 5.0),)}, "for ever"),
        ({"trace": ((1.0, 5.0, 5.0),), "period_s": 1.0}, "end in the period"),
    ],
)
def test_a_network_that_cannot_be_is_refused(network, words):
    with pytest.raises(ConfigError, match=words):
        Network(**network)


def test_a_trace_replaces_the_rates_from_its_first_time_on():
    network = Network(8.0, 16.0, trace=((2.0, 80.0, 160.0), (4.0, 800.0, 1600.0)))
    assert network.up == Rate((0.0, 2.0, 4.0), (8.0, 80.0, 800.0))
    assert network.down == Rate((0.0, 2.0, 4.0), (16.0, 160.0, 1600.0))


class StillClock:
    """Time that stands still and remembers what was waited for."""

    def __init__(self, now: float = 0.0):
        self.time = now
        self.waits: list[float] = []

    def now(self):
        return self.time

    def wait_until(self, moment_s, stop):
        self.waits.append(moment_s)


class Recorder:
    """A link that keeps what is sent and gives what it is fed."""

    peer = "recorder"

    def __init__(self):
        self.sent: list[Frame] = []
        self.feed: queue.Queue = queue.Queue()
        self.closed = threading.Event()

    def send(self, frame):
        self.send_encoded([encode(frame)])

    def send_encoded(self, parts):
        if self.closed.is_set():
            raise LinkClosed("closed")
        self.sent.append(decode(b"".join(parts)))

    def recv(self, timeout_s=None):
        item = self.feed.get(timeout=SOON if timeout_s is None else timeout_s)
        if item is None:
            raise LinkClosed("closed")
        return item

    def close(self):
        self.closed.set()
        self.feed.put(None)


def received(kind: str, size: int = 0) -> Frame:
    return decode(encode(Frame(kind, {"pad": "x" * size})))


def test_frames_leave_at_the_times_of_the_formula_counted_in_whole_frames():
    clock, inner = StillClock(), Recorder()
    shaped = Shaped(inner, Network(up_bits_s=8000, latency_s=0.5), clock=clock)
    frames = [Frame("a"), Frame("b", {"pad": "x" * 1000}), Frame("c")]
    for frame in frames:
        shaped.send(frame)
    shaped.close()
    sizes = [len(encode(frame)) for frame in frames]
    ends = [sum(sizes[: i + 1]) / 1000 for i in range(3)]
    assert clock.waits == [close_to(end + 0.5) for end in ends]
    assert [frame.kind for frame in inner.sent] == ["a", "b", "c"]
    assert inner.closed.wait(SOON)


def test_frames_are_handed_over_when_the_network_would_have_brought_them():
    clock, inner = StillClock(), Recorder()
    shaped = Shaped(inner, Network(down_bits_s=8000, latency_s=0.5), clock=clock)
    frames = [received("a", 100), received("b", 2000)]
    for frame in frames:
        inner.feed.put(frame)
    assert [shaped.recv(SOON).kind for _ in frames] == ["a", "b"]
    first, second = (frame.encoded_bytes / 1000 for frame in frames)
    assert clock.waits == [close_to(first + 0.5), close_to(first + second + 0.5)]
    shaped.close()


def test_a_frame_still_on_the_way_is_a_timeout_and_comes_later():
    clock, inner = StillClock(), Recorder()
    shaped = Shaped(inner, Network(down_bits_s=8), clock=clock)
    inner.feed.put(received("slow"))
    with pytest.raises(LinkTimeout):
        shaped.recv(SOON)
    clock.time = 1e6
    assert shaped.recv(SOON).kind == "slow"
    shaped.close()


def test_an_error_of_the_link_reaches_both_directions():
    inner = Recorder()
    shaped = Shaped(inner, Network())
    inner.feed.put(None)
    with pytest.raises(LinkClosed):
        shaped.recv(SOON)
    with pytest.raises(LinkClosed):
        shaped.send(Frame("x"))
    shaped.close()


# --------------------------------------------------------------------------------------------------
# Faults


def sent_through(faults, kinds="abcd"):
    inner = Recorder()
    naps: list[float] = []
    link = Faulty(inner, faults, sleep=naps.append)
    for kind in kinds:
        link.send(Frame(kind))
    return "".join(frame.kind for frame in inner.sent), naps, link


def got_through(faults, kinds="abcd"):
    inner = Recorder()
    naps: list[float] = []
    link = Faulty(inner, faults, sleep=naps.append)
    for kind in [*kinds]:
        inner.feed.put(received(kind))
    inner.feed.put(None)
    got = []
    try:
        while True:
            got.append(link.recv(SOON).kind)
    except LinkClosed:
        return "".join(got), naps, link


@pytest.mark.parametrize("direction", ["send", "recv"])
@pytest.mark.parametrize(
    ("faults", "seen", "slept"),
    [
        ([], "abcd", []),
        ([LinkFault("drop", 1)], "acd", []),
        ([LinkFault("duplicate", 1)], "abbcd", []),
        ([LinkFault("reorder", 1)], "acbd", []),
        ([LinkFault("delay", 2, delay_s=0.3)], "abcd", [0.3]),
        ([LinkFault("drop", 0, of_kind="c")], "abd", []),
        ([LinkFault("drop", 1, of_kind="c")], "abcd", []),
        ([LinkFault("drop", 0), LinkFault("duplicate", 3)], "bcdd", []),
    ],
)
def test_each_fault_does_what_it_says_in_both_directions(direction, faults, seen, slept):
    turned = [
        LinkFault(f.kind, f.frame, direction, f.when, f.of_kind, f.delay_s)  # type: ignore[arg-type]
        for f in faults
    ]
    order, naps, link = (sent_through if direction == "send" else got_through)(turned)
    assert order == seen
    assert naps == slept
    assert link.fired == [fault for fault in turned if fault.frame == 0 or not fault.of_kind]


def test_a_cut_before_a_frame_loses_it_and_one_after_does_not():
    inner = Recorder()
    link = Faulty(inner, [LinkFault("cut", 1)])
    link.send(Frame("a"))
    with pytest.raises(LinkClosed, match="a fault of the run"):
        link.send(Frame("b"))
    assert [frame.kind for frame in inner.sent] == ["a"]
    assert inner.closed.is_set()

    inner = Recorder()
    link = Faulty(inner, [LinkFault("cut", 1, when="after")])
    link.send(Frame("a"))
    link.send(Frame("b"))
    assert [frame.kind for frame in inner.sent] == ["a", "b"]
    with pytest.raises(LinkClosed):
        link.send(Frame("c"))


@pytest.mark.parametrize(("when", "seen"), [("before", "a"), ("after", "ab")])
def test_a_cut_while_receiving(when, seen):
    inner = Recorder()
    link = Faulty(inner, [LinkFault("cut", 1, "recv", when)])
    for kind in "ab":
        inner.feed.put(received(kind))
    got = []
    with pytest.raises(LinkClosed):
        while True:
            got.append(link.recv(SOON).kind)
    assert "".join(got) == seen
    assert inner.closed.is_set()


def test_a_reordered_last_frame_goes_out_before_its_answer_is_awaited():
    inner = Recorder()
    link = Faulty(inner, [LinkFault("reorder", 0)])
    link.send(Frame("a"))
    assert inner.sent == []
    inner.feed.put(received("answer"))
    assert link.recv(SOON).kind == "answer"
    assert [frame.kind for frame in inner.sent] == ["a"]


def test_corruption_is_seen_by_whoever_receives():
    link = Faulty(Recorder(), [LinkFault("corrupt", 0)])
    with pytest.raises(FrameError, match="checksum"):
        link.send(Frame("a"))  # the recorder parses what it is given
    inner = Recorder()
    inner.feed.put(received("a"))
    with pytest.raises(FrameError, match="checksum"):
        Faulty(inner, [LinkFault("corrupt", 0, "recv")]).recv(SOON)
    assert inner.closed.is_set()


def test_faults_and_shaping_wrap_a_real_link_together():
    def echo(link):
        while True:
            link.send(link.recv(SOON))

    server = serve("memory://shaped-and-faulty", echo)
    link = Shaped(Faulty(dial(server.address), [LinkFault("duplicate", 0)]), Network(1e9, 1e9))
    link.send(Frame("a"))
    link.send(Frame("b"))
    assert [link.recv(SOON).kind for _ in range(3)] == ["a", "a", "b"]
    link.close()
    server.stop()


@pytest.mark.parametrize(
    "values",
    [{"kind": "explode"}, {"kind": "cut", "frame": -1}, {"kind": "cut", "direction": "up"}],
)
def test_a_fault_that_cannot_be_is_refused(values):
    with pytest.raises(ConfigError, match="faults"):
        LinkFault(**values)
