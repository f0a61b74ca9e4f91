"""What overlaps in the trace of real split rounds over TCP, and what does not.

Nothing is left to chance or to a fast machine: where two things are said to happen at once, each of
them waits for the other one to be at work. If they came one after the other, they would not meet.
"""

import itertools
import threading

import pytest
import torch

from clients import split_round
from clients.steps import Batches
from fedsys.config import parse, with_values
from fedsys.offload.edge_part import EdgePart
from fedsys.randomness import piece_of
from fedsys.runs import trace_plots
from fedsys.training import plain as training
from strategies.around import find
from strategies.offload import Offload

SHAPE, PIECES, ROWS, STEPS = (1, 8, 8), 4, 5, 3
MEET_S = 30.0
"""How long one waits for the other, which is for ever if they never meet."""


class Meetings:
    """Lets device and edge meet inside of their forwards, and the edge wait for the loader.

    Args:
        depth: Pieces in flight. With one, nobody meets.
    """

    def __init__(self, depth):
        self.missed, self._depth = [], depth
        self._forward, self._ahead = training.forward, EdgePart.ahead
        self._meetings = [threading.Barrier(2) for _ in range(PIECES - 1)] if depth > 1 else []
        self._loading = threading.Semaphore(0)

    def forward(self, model, x, precision="fp32"):
        """Compute a piece on the device, of which the one before must be in work on the edge."""
        piece = piece_of(model)
        if piece is not None and x.shape[1:] == SHAPE:
            self._meet(piece.start // ROWS - 1)
        return self._forward(model, x, precision)

    def ahead(self, part, inputs, start, stop):
        """Compute a piece on the edge, of which the one after it must be begun meanwhile."""
        index = start // ROWS
        self._meet(index)
        if index == self._depth - 1 and not self.missed:
            self._note(self._loading.acquire(timeout=MEET_S), "the loader")
        return self._ahead(part, inputs, start, stop)

    def batches(self, source):
        """Yield mini-batches, and say when each of them but the first one is asked for."""
        for number in itertools.count():
            if number:
                self._loading.release()
            if (batch := next(source, None)) is None:
                return
            yield batch

    def _meet(self, piece):
        if 0 <= piece < len(self._meetings):
            try:
                self._meetings[piece].wait(0.0 if self.missed else MEET_S)
            except threading.BrokenBarrierError:
                self._note(False, f"piece {piece + 1} on the device while the edge has {piece}")

    def _note(self, met, what):
        self.missed += [] if met else [what]


@pytest.fixture
def traced(configure, carry_out, monkeypatch):
    """Return a function that trains a round and returns the events of its device by mini-batch."""

    def train(kind, depth):
        meetings, own_batches = Meetings(depth), split_round.own_batches
        monkeypatch.setattr(training, "forward", meetings.forward)
        monkeypatch.setattr(EdgePart, "ahead", lambda *about: meetings.ahead(*about))
        monkeypatch.setattr(
            split_round, "own_batches", lambda *about: meetings.batches(own_batches(*about))
        )
        base = configure("data=synthetic", "model=cnn", "policy=fixed", "link=tcp")
        values = {
            "num_clients": 1,
            "rounds": 1,
            "client": {"epochs": 1, "batch_size": PIECES * ROWS},
            "data": {"examples": 80, "validation": 0.25, "test_examples": 10, "shape": list(SHAPE)},
            "schedule": {"kind": kind, "micro_batches": PIECES, "depth": depth},
            "model": {"width": 4, "hidden": 16},
            "policy": {"cut": 2},
        }
        run = carry_out(parse(with_values(base.text, **values)))
        assert not meetings.missed
        (events,) = find(run.strategy, Offload).traces.values()
        return events

    return train


def spans(events, step):
    """Return by lane and name the spans of a mini-batch in the order of the pieces."""
    found = {}
    for event in sorted((e for e in events if e.step == step), key=lambda e: e.piece):
        found.setdefault((event.lane, event.name), []).append((event.start_s, event.end_s))
    return found


def edge_spans(of):
    """Return from when to when the edge had each piece."""
    both = zip(of["edge", "forward"], of["edge", "backward"], strict=True)
    return [(ahead[0], back[1]) for ahead, back in both]


def at_once(one, other):
    return one[0] < other[1] and other[0] < one[1]


@pytest.mark.parametrize(("kind", "depth"), [("pipelined", PIECES), ("bounded", 2)])
def test_device_links_and_edge_are_at_work_at_once(kind, depth, traced):
    events = traced(kind, depth)
    for step in range(STEPS):
        of = spans(events, step)
        forwards, arrivals = of["device", "forward"], of["downlink", "transfer"]
        served = edge_spans(of)
        for piece in range(PIECES - 1):
            assert forwards[piece + 1][0] < arrivals[piece][1]
            assert at_once(served[piece], forwards[piece + 1])


@pytest.mark.parametrize(
    ("kind", "depth"), [("pipelined", PIECES), ("bounded", 2), ("sequential", 1)]
)
def test_the_next_mini_batch_is_loaded_while_an_answer_is_awaited(kind, depth, traced):
    events = traced(kind, depth)
    for step in range(STEPS - 1):
        of = spans(events, step)
        ((begun, ended),) = spans(events, step + 1)["loader", "load"]
        assert begun >= of["device", "forward"][depth - 1][1]
        assert begun < of["downlink", "transfer"][depth - 1][1] <= of["device", "backward"][-1][0]
        assert ended <= spans(events, step + 1)["device", "forward"][0][0]


def test_one_after_the_other_nothing_is_at_once(traced):
    events = traced("sequential", 1)
    for step in range(STEPS):
        of = spans(events, step)
        forwards, arrivals = of["device", "forward"], of["downlink", "transfer"]
        own = [s for name in ("forward", "backward", "update") for s in of["device", name]]
        for piece in range(PIECES - 1):
            assert forwards[piece + 1][0] >= arrivals[piece][1]
        assert not any(at_once(one, other) for one in own for other in edge_spans(of))


@pytest.mark.parametrize(("kind", "depth"), [("pipelined", PIECES), ("sequential", 1)])
def test_nothing_overlaps_within_a_lane(kind, depth, traced):
    events = traced(kind, depth)
    for lane in {e.lane for e in events}:
        for one, other in itertools.pairwise(e for e in events if e.lane == lane):
            assert one.end_s <= other.start_s, (lane, one, other)
    (shares,) = trace_plots.idle_shares({"device": events}).values()
    assert set(shares) == {"device", "uplink", "edge", "downlink", "loader"}
    assert all(0.0 < share < 1.0 for share in shares.values())


def test_what_fails_while_loading_fails_in_the_round_and_the_thread_ends_with_it():
    def source():
        yield torch.zeros(2, 1), torch.zeros(2)
        raise OSError("the disk is gone")

    before = set(threading.enumerate())
    with Batches(source(), torch.device("cpu")) as batches:
        assert batches.take() is not None
        batches.load()
        assert set(threading.enumerate()) - before  # those of other tests may just be ending
        with pytest.raises(OSError, match="the disk is gone"):
            batches.take()
    assert set(threading.enumerate()) <= before


def test_the_last_mini_batch_is_followed_by_none_however_often_it_is_asked_for():
    with Batches(iter([(torch.zeros(2, 1), torch.zeros(2))]), torch.device("cpu")) as batches:
        assert batches.load() is not None and batches.load() is None
        assert [batches.take() is None for _ in range(3)] == [False, True, True]
