"""A device's end of a session, with real edge servers and sessions over memory links."""

import threading
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from fedsys.config import EdgeAddress
from fedsys.errors import LinkClosed, LinkTimeout, RemoteError, SessionError
from fedsys.offload.asking import EdgesLost
from fedsys.offload.edge import EdgeServer
from fedsys.offload.fleet import Fleet
from fedsys.offload.operations import Operations
from fedsys.offload.remote import FRUITLESS, Moved, Remote
from fedsys.offload.session import Session
from fedsys.transport.addresses import dial
from fedsys.transport.faulty import Faulty, LinkFault
from fedsys.transport.patience import Patience
from tests.devices import is_trained, send, train
from tests.waiting import came_true

TOKEN = "control"


@pytest.fixture
def place(last_layer):
    """Return edge servers a and b, a fleet of both, and what makes devices."""
    edges = {n: EdgeServer(n, f"memory://{n}-of-remote", control_token=TOKEN) for n in "ab"}
    addresses = [EdgeAddress(name, edge.address) for name, edge in edges.items()]
    with Fleet(addresses, control_token=TOKEN) as fleet:

        def device(connect=dial, name="s", **more):
            spec = last_layer.spec(name, **more)
            fleet.open(spec, last_layer.start(), "a")
            return Remote(fleet.device_addresses("a"), name, spec.token, connect)

        yield SimpleNamespace(edges=edges, fleet=fleet, device=device, layer=last_layer)
    for edge in edges.values():
        edge.kill()


def trained_to(place, steps):
    """Return whether the session is where undisturbed training would be."""
    return is_trained(place.layer, place.fleet.collect("s"), steps)


def counted(edge, event, count):
    """Return whether an edge counts so many events in the end: it does after it has answered."""
    came_true(lambda: edge.counters[event] >= count)
    return edge.counters[event] == count


class Mute:
    """A link through which nothing comes any more from a frame on, though it stays open."""

    def __init__(self, link, heard=None, wait=time.sleep):
        self._link, self._left, self._wait, self.closed = link, heard, wait, False

    def recv(self, timeout_s=None):
        if self._left == 0:
            self._wait(timeout_s)
            raise LinkTimeout("nothing arrived")
        if self._left is not None:
            self._left -= 1
        return self._link.recv(timeout_s)

    def close(self):
        self.closed = True
        self._link.close()

    def __getattr__(self, name):
        return getattr(self._link, name)


def test_operations_are_answered_and_bytes_counted(place):
    remote = place.device()
    assert remote.open() == 0
    train(remote, place.layer, range(3))
    remote.close()
    assert trained_to(place, 3)
    assert remote.traffic.bytes_up > 3 * place.layer.activation(0).tensors["x"].nbytes
    assert remote.traffic.bytes_down > 0
    assert remote.traffic.recoveries == []


@pytest.mark.parametrize(
    "fault",
    [
        LinkFault("cut", frame=2, when="before"),
        LinkFault("cut", frame=2, when="after"),
        LinkFault("cut", frame=2, direction="recv", when="before"),
        LinkFault("corrupt", frame=2),
        LinkFault("corrupt", frame=2, direction="recv"),
    ],
)
def test_a_lost_link_is_made_again_and_nothing_is_computed_twice(fault, place):
    faults = [fault]

    def connect(address):
        return Faulty(dial(address), [faults.pop()] if faults else [])

    remote = place.device(connect)
    remote.open()
    train(remote, place.layer, range(3))
    assert trained_to(place, 3)
    (entry,) = remote.traffic.recoveries
    assert (entry["what"], entry["from"], entry["to"]) == ("link", *[place.edges["a"].address] * 2)
    assert counted(place.edges["a"], "steps", 3)


def test_a_session_whose_edge_is_gone_is_found_at_the_other_one(place):
    remote = place.device()
    remote.open()
    train(remote, place.layer, range(2))
    place.edges["a"].kill()
    with pytest.raises(Moved) as moved:
        train(remote, place.layer, [2])
    assert moved.value.step == 0
    train(remote, place.layer, range(3))
    assert trained_to(place, 3)
    (entry,) = remote.traffic.recoveries
    assert (entry["what"], entry["to"]) == ("edge", place.edges["b"].address)


def test_a_late_answer_of_an_edge_that_is_alive_costs_a_question_and_not_the_link(
    place, monkeypatch
):
    """A limit that was five seconds whatever the network was gave up links that were only slow."""
    links, handle = [], Session.handle

    def slowly(session, frame):
        if frame.meta["step"] == 2:
            time.sleep(0.3)
        yield from handle(session, frame)

    def connect(address):
        links.append(dial(address))
        return links[-1]

    monkeypatch.setattr(Session, "handle", slowly)
    remote = place.device(connect)
    remote._patience = Patience(0.05, 0.05)
    remote.open()
    train(remote, place.layer, range(3))
    assert remote.traffic.recoveries == []
    assert len(links) > 1  # it did ask
    assert trained_to(place, 3)
    assert counted(place.edges["a"], "steps", 3)


def test_an_edge_that_falls_silent_is_left_for_the_one_that_has_the_session_now(place):
    """Its machine is off: no link is closed, nobody refuses, nothing is answered."""
    off = threading.Event()
    alive, links = place.edges["b"].address, []

    def connect(address):
        if off.is_set() and address != alive:
            raise LinkClosed(f"{address} does not answer")
        links.append(Mute(dial(address), None if address == alive else 3))
        return links[-1]

    remote = place.device(connect)
    remote.open()
    train(remote, place.layer, range(2))
    send(remote, place.layer, 2)
    off.set()
    place.edges["a"].kill()
    with pytest.raises(Moved):
        remote.receive("activation", 2, 0)
    assert links[0].closed
    train(remote, place.layer, range(3))
    assert trained_to(place, 3)


def test_a_device_that_is_cut_off_waits_as_long_as_its_work_took(place):
    now = 0.0
    off = threading.Event()

    def wait(seconds):
        nonlocal now
        now += seconds

    def connect(address):
        if off.is_set():
            raise LinkClosed(f"{address} does not answer")
        return Mute(dial(address), 2, wait)

    spec = place.layer.spec()
    place.fleet.open(spec, place.layer.start(), "a")
    addresses = place.fleet.device_addresses("a")
    remote = Remote(addresses, "s", spec.token, connect, clock=lambda: now, sleep=wait)
    remote.open()
    now = 100.0
    train(remote, place.layer, [0])
    send(remote, place.layer, 1)
    off.set()
    with pytest.raises(EdgesLost, match="none of 2 edge servers answers"):
        remote.receive("activation", 1, 0)
    assert 200.0 < now < 320.0  # the last question is at most as far away as all before


def test_where_everybody_refuses_the_edges_are_lost_without_waiting(place):
    remote = place.device()
    remote.open()
    for edge in place.edges.values():
        edge.kill()
    with pytest.raises(EdgesLost, match="at none of 2 edge servers, of which 2 are gone"):
        train(remote, place.layer, [0])


def test_links_that_lose_every_answer_are_given_up(place):
    def connect(address):
        return Faulty(dial(address), [LinkFault("corrupt", frame=1)])

    remote = place.device(connect)
    remote.open()
    with pytest.raises(EdgesLost, match=f"{FRUITLESS} links in a row"):
        train(remote, place.layer, [0])


def test_a_wrong_token_is_told_and_not_tried_again(place):
    place.device()
    remote = Remote(place.fleet.device_addresses("a"), "s", "guessed", dial)
    with pytest.raises(SessionError, match="refuses session s: SecurityError: session s: the tok"):
        remote.open()
    assert place.edges["a"].counters["refused_SecurityError"] == 1


@pytest.mark.parametrize("ended", [LinkClosed("a is full: it has 8 links"), LinkTimeout("none")])
def test_what_an_edge_says_of_its_links_is_no_refusal(place, ended):
    """A full edge server, or one too busy to read in time, said so in an error of its own, and the
    device left the round."""
    links = []

    def connect(address):
        links.append(dial(address))
        if len(links) == 1:
            links[0].recv = Mock(side_effect=RemoteError(f"{type(ended).__name__}: {ended}"))
        return links[-1]

    remote = place.device(connect)
    remote.open()
    train(remote, place.layer, [0])


def test_a_probe_leaves_the_link_of_the_session_alone_and_needs_its_token(place):
    remote = place.device()
    remote.open()
    train(remote, place.layer, [0])
    assert remote._asking.probe(place.edges["a"].address) == remote._incarnation
    assert remote._asking.probe(place.edges["b"].address) == ""
    other = Remote([place.edges["a"].address], "s", "guessed", dial)
    assert other._asking.probe(place.edges["a"].address) == ""
    assert place.edges["a"].counters["refused_SecurityError"] == 1
    train(remote, place.layer, [1])
    assert remote.traffic.recoveries == []


def test_a_device_whose_edges_die_again_and_again_gives_up(place, monkeypatch):
    """It did the same steps over and over, for as long as a phase of a round may take."""
    monkeypatch.setattr("fedsys.offload.remote.STANDING", 3)
    remote = place.device()
    remote.open()
    train(remote, place.layer, range(2))
    deaths = 0

    def die():
        nonlocal deaths
        deaths += 1
        place.fleet.release("s")
        place.fleet.open(place.layer.spec(), place.layer.start(), "ab"[deaths % 2])

    with pytest.raises(EdgesLost, match="lost 3 times at the same step"):
        while True:
            die()
            try:
                train(remote, place.layer, [0, 1])  # answered, and no further than before
                die()
                train(remote, place.layer, [2])
            except Moved:
                continue
    assert 3 <= deaths <= 10


@pytest.mark.parametrize("edge", ["works on", "stands still"])
def test_a_device_that_comes_back_waits_for_the_operation_in_work_and_not_for_ever(
    edge, place, monkeypatch
):
    """An edge that was stopped right after it had said "wait" held its device without a bound."""
    begun, let_go, activate = threading.Event(), threading.Event(), Operations.activate

    def slowly(operations, frame, piece):
        if frame.meta["step"] == 1:
            begun.set()
            let_go.wait(60)
        return activate(operations, frame, piece)

    monkeypatch.setattr(Operations, "activate", slowly)
    if edge == "stands still":
        monkeypatch.setattr("fedsys.offload.remote.ASKING_S", 0.0)
        monkeypatch.setattr("fedsys.offload.peers.ANSWER_S", 0.1)  # the other edge asks it, too
        monkeypatch.setattr("fedsys.offload.peers.LEAST_BYTES_S", 1 << 30)
    else:
        monkeypatch.setattr("fedsys.offload.asking.WAITS", 10**6)
    remote = place.device()
    remote.open()
    train(remote, place.layer, [0])
    remote._patience = Patience(0.01, 0.01)
    send(remote, place.layer, 1)
    assert begun.wait(60)
    remote._link.close()
    if edge == "works on":
        threading.Timer(0.3, let_go.set).start()
        assert remote.receive("activation", 1, 0).kind == "gradient"
        assert trained_to(place, 2)
    else:
        with pytest.raises(EdgesLost):
            remote.receive("activation", 1, 0)
        let_go.set()
