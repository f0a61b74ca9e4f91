"""When a shadow is given up, because the difference is nearer; with a real queue and its thread."""

import threading

import pytest
import torch

from fedsys.errors import LinkClosed
from fedsys.offload import mirroring
from fedsys.offload.fencing import Copy, Epoch
from fedsys.offload.mirror import Mirror
from fedsys.transport.wire import Frame
from tests.waiting import until

WAIT_S = 60.0


def operation(nbytes, step=0):
    return Frame("activation", {"step": step}, {"x": torch.zeros(nbytes, dtype=torch.uint8)})


@pytest.fixture
def mirror():
    """Return a mirror whose destination answers when it may; and the gate, and what came."""
    gate, came = threading.Event(), []

    def ask(frame):
        came.append(frame)
        if not gate.wait(WAIT_S):
            raise LinkClosed("nobody opened the gate")
        return Frame("mirrored")

    made = Mirror(ask, {"session": "s"}, 100)
    made.start(100)
    yield made, gate, came
    gate.set()
    made.end()


def test_what_is_taken_goes_on_in_its_order(mirror):
    made, gate, came = mirror
    for nbytes in (10, 20, 30):
        made.take(operation(nbytes))
    assert made.waiting() == 60
    gate.set()
    assert (made.settled(), made.sent, made.waiting()) == (3, 60, 0)
    told = [(f.meta["number"], f.tensors["x"].nbytes, f.meta["operation"]) for f in came]
    assert told == [(n, 10 * (n + 1), ["activation", {"step": 0}]) for n in range(3)]


@pytest.mark.parametrize("sizes", [(100,), (90,) * 5, (60, 60)], ids=str)
def test_a_shadow_that_is_further_away_than_the_difference_is_left(sizes, mirror):
    """A mini-batch as large as it, too many that wait, or too much when the device leaves."""
    made, _, _ = mirror
    for nbytes in sizes:
        made.take(operation(nbytes))
    assert made.settled() is None
    made.take(operation(1))
    assert made.waiting() == 0


def test_a_mini_batch_begins_once_its_shadow_is_near_or_has_gained():
    """Two mini-batches that the shadow had not done took as long in the pause as the difference."""
    may, done, begun = threading.Semaphore(0), [], []

    def ask(frame):
        assert may.acquire(timeout=WAIT_S)
        done.append(frame.meta["number"])
        return Frame("mirrored")

    def train(first, last):
        for step in range(first, last):
            made.let_catch_up(step)
            begun.append((step, len(done)))
            made.take(operation(10, step))

    made = Mirror(ask, {"session": "s"}, 1 << 40)  # so much that waiting always pays
    made.start(1 << 40)
    train(0, 5)  # nothing is known of the shadow's pace yet
    assert [step for step, _ in begun] == list(range(5))
    may.release()
    until(lambda: made.sent == 10)
    rest = threading.Thread(target=train, args=(5, 7), daemon=True)
    rest.start()
    for allowed, shadow in ((1, 2), (2, 4)):
        may.release(allowed)
        before = len(begun)
        until(lambda before=before: len(begun) > before)
        assert begun[-1] == (before, shadow)
    rest.join(WAIT_S)
    may.release(9)
    assert made.settled() == 7
    made.end()


def test_a_session_waits_for_its_shadow_no_longer_than_that_saves():
    assert mirroring.patience_s(difference=100, sent=0, took_s=0.0, waited_s=0.0) == 0.0
    assert mirroring.patience_s(difference=100, sent=50, took_s=0.2, waited_s=0.1) == pytest.approx(
        0.3
    )
    slow = mirroring.patience_s(difference=500 << 20, sent=200_000, took_s=0.5, waited_s=0.4)
    assert slow == pytest.approx(0.6)  # the destination computes for so long: it was 1,250 s
    assert mirroring.may_begin(behind=0, gained=0) and mirroring.may_begin(behind=9, gained=2)
    assert not mirroring.may_begin(behind=1, gained=1)


def test_a_shadow_that_is_lost_is_left():
    def gone(frame):
        raise LinkClosed("it is gone")

    made = Mirror(gone, {"session": "s"}, 100)
    made.start(100)
    made.take(operation(10))
    assert made.settled() is None


def test_a_later_move_has_its_own_shadow():
    first, later = mirroring.Shadow(Epoch(1, 1, "b"), 3), Epoch(1, 2, "b")
    assert mirroring.on_ahead(first, None, Epoch(1, 1, "b")) is first
    assert mirroring.on_ahead(first, None, later) == mirroring.Shadow(later)
    assert mirroring.on_ahead(mirroring.Shadow(later), None, first.epoch).epoch == later
    assert mirroring.on_ahead(None, Copy(later), first.epoch) is None
    assert not mirroring.may_become(first, later, 3, True)
