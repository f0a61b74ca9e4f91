"""A session over a pipe is the session: same replies, same state, same errors."""

import gc
import socket
import threading

import pytest
import torch

from fedsys.errors import FrameError, LinkClosed, SessionError
from fedsys.offload.emulation import Workers
from fedsys.offload.session import Session
from fedsys.offload.session_proxy import SessionProxy
from fedsys.offload.session_worker import serve_session
from fedsys.transport.frame_pipe import FramePipe
from fedsys.transport.wire import Frame
from tests.waiting import until

CPU = torch.device("cpu")


@pytest.fixture
def far():
    """Return what opens a session whose other end is a thread, and the threads."""
    threads, gone = [], []

    def opened(spec, start, replicate=lambda *_: None):
        ours, theirs = socket.socketpair()
        pipe = FramePipe(theirs)
        threads.append(threading.Thread(target=serve_session, args=(pipe, Workers("edge"))))
        threads[-1].start()
        ends = FramePipe(ours)
        return SessionProxy(ends, spec, start, replicate, lambda: gone.append(spec.id)), pipe

    yield opened, threads, gone
    gc.collect()
    for thread in threads:
        thread.join(60.0)
        assert not thread.is_alive(), "who lets go of a session ends its other end"


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_it_answers_and_ends_as_a_session_here(far, last_layer):
    near = Session(last_layer.spec(), last_layer.start(), CPU)
    proxy, _ = far[0](last_layer.spec(), last_layer.start())
    assert proxy.nbytes() == near.nbytes() > 0
    for step in range(3):
        frame = last_layer.activation(step)
        ((one,), (other,)) = list(proxy.handle(frame)), list(near.handle(frame))
        assert (one.kind, one.meta["step"]) == (other.kind, step)
        assert same(one.tensors, other.tensors)
        (again,) = proxy.handle(frame)  # its link was lost
        assert same(again.tensors, other.tensors) and again.meta == one.meta
    assert (proxy.steps, proxy.position(), proxy.at_work()) == (3, 3, False)
    assert same(proxy.snapshot().tensors(), near.snapshot().tensors())
    assert proxy.sealed([("activation", 2, 0)]).digest == near.sealed([("activation", 2, 0)]).digest


def test_its_errors_are_those_of_a_session(far, last_layer):
    proxy, _ = far[0](last_layer.spec(), last_layer.start())
    with pytest.raises(SessionError, match="step 5 of session s, where step 0 is due"):
        list(proxy.handle(last_layer.activation(5)))
    frame = last_layer.activation(0)
    other = Frame(frame.kind, frame.meta, {**frame.tensors, "x": torch.zeros(2, 2)})
    with pytest.raises(FrameError, match="activation of shape"):
        list(proxy.handle(other))
    assert len(list(proxy.handle(last_layer.activation(0)))) == 1
    proxy.freeze()
    with pytest.raises(LinkClosed, match="session s is no longer here"):
        list(proxy.handle(last_layer.activation(1)))
    proxy.go_on()
    assert len(list(proxy.handle(last_layer.activation(1)))) == 1
    with pytest.raises(FrameError, match="units 7 to 9"):
        far[0](last_layer.spec("wrong", first=7, last=9), last_layer.start())
    gc.collect()
    assert far[2] == ["wrong"]


def test_a_step_in_work_goes_on_elsewhere(far, last_layer):
    """As when a session moves in the middle of a mini-batch, from a process to another."""
    spec = last_layer.spec(micro_batches=3)
    frames = [
        Frame(f.kind, {**f.meta, "piece": p}, {n: t[p : p + 1] for n, t in f.tensors.items()})
        for f in (last_layer.activation(0), last_layer.activation(1))
        for p in range(3)
    ]
    near = Session(spec, last_layer.start(), CPU)
    for frame in frames:
        list(near.handle(frame))
    source, _ = far[0](spec, last_layer.start())
    for frame in frames[:4]:
        list(source.handle(frame))
    position = source.hold_still()
    assert (position.snapshot.step, len(position.operations)) == (1, 1)
    assert position.incarnation == source.incarnation
    target, _ = far[0](spec, position.snapshot)
    target.take_up(position)
    assert target.incarnation == source.incarnation
    for frame in frames[4:]:
        list(target.handle(frame))
    assert same(target.snapshot().tensors(), near.snapshot().tensors())


def test_who_follows_it_takes_each_new_operation_once(far, last_layer):
    took, caught = [], []

    class Notes:
        def let_catch_up(self, step):
            caught.append(step)

        def take(self, operation):
            took.append(operation)

    proxy, _ = far[0](last_layer.spec(), last_layer.start())
    list(proxy.handle(last_layer.activation(0)))
    assert proxy.followed(Notes()).snapshot.step == 1
    frame = last_layer.activation(1)
    for _ in range(2):  # the second time it is answered again
        list(proxy.handle(frame))
    assert (took, caught) == ([frame], [1])
    proxy.followed(None)
    list(proxy.handle(last_layer.activation(2)))
    assert took == [frame]


def test_replicas_are_sent_from_here(far, last_layer):
    replicas = []
    spec = last_layer.spec(replicate_every=2)
    proxy, _ = far[0](spec, last_layer.start(), lambda *of: replicas.append(of))
    for step in range(5):
        list(proxy.handle(last_layer.activation(step)))
    assert [(told.id, snapshot.step) for told, snapshot in replicas] == [("s", 2), ("s", 4)]


def test_whose_replies_nobody_takes_is_in_step_all_the_same(far, last_layer):
    """The rest of an answer would be taken for that to the next call."""
    proxy, _ = far[0](last_layer.spec(), last_layer.start())
    replies = proxy.handle(last_layer.activation(0))
    next(replies)
    replies.close()
    assert (proxy.snapshot().step, proxy.steps) == (1, 1)
    assert len(list(proxy.handle(last_layer.activation(1)))) == 1


def test_it_says_that_its_process_is_gone(far, last_layer):
    proxy, end = far[0](last_layer.spec(), last_layer.start())
    end._socket.shutdown(socket.SHUT_RDWR)
    for call in (proxy.snapshot, proxy.freeze, proxy.hold_still, lambda: proxy.sealed(())):
        with pytest.raises(LinkClosed, match="at the other end is gone"):
            call()
    with pytest.raises(LinkClosed):
        list(proxy.handle(last_layer.activation(0)))
    proxy.go_on()  # which is no matter for what is lost
    assert proxy.position() == 0


def test_its_memory_is_free_when_nobody_has_it_any_more(far, last_layer):
    proxy, _ = far[0](last_layer.spec(), last_layer.start())
    thread = far[1][-1]
    assert thread.is_alive() and far[2] == []
    del proxy
    gc.collect()
    until(lambda: not thread.is_alive())
    assert far[2] == ["s"]
