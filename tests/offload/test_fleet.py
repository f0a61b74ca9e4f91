"""The server app's handle on edge servers, with real ones over memory links."""

import threading
import time
from types import SimpleNamespace

import pytest

from fedsys.config import EdgeAddress, EdgeConfig
from fedsys.errors import LinkClosed, LinkError, RemoteError, SessionError
from fedsys.faults import Fault, Faults
from fedsys.offload import fleet_edges as module
from fedsys.offload.edge import EdgeServer
from fedsys.offload.edge_control import EdgeControl
from fedsys.offload.fleet import Fleet
from fedsys.offload.fleet_edges import FleetEdges
from fedsys.offload.placing import Placing
from fedsys.offload.recovery import EdgeRecovery
from fedsys.offload.remote import Moved, Remote
from fedsys.transport.addresses import dial
from fedsys.transport.patience import Patience
from fedsys.transport.wire import Frame
from tests.devices import is_trained
from tests.waiting import until

TOKEN = "control"
WAIT_S = 60.0


@pytest.fixture
def place(last_layer):
    """Return edge servers by name, and what starts more of them and fleets."""
    edges, fleets = {}, []

    def start(name, **more):
        address = f"memory://{name}-of-fleet"
        edges[name] = EdgeServer(name, address, control_token=TOKEN, **more)

    def fleet(*names, **more):
        addresses = [EdgeAddress(name, f"memory://{name}-of-fleet") for name in names]
        fleets.append(Fleet(addresses, control_token=TOKEN, **more))
        return fleets[-1]

    yield SimpleNamespace(edges=edges, start=start, fleet=fleet, layer=last_layer)
    for one in fleets:
        one.close()
    for edge in edges.values():
        edge.kill()


@pytest.fixture
def pair(place):
    """Return the place with edges a and b and a fleet of both."""
    place.start("a")
    place.start("b")
    place.pair = place.fleet("a", "b")
    return place


def train(place, edge, steps, name="s"):
    """Train a session as its device does."""
    link = dial(place.edges[edge].address)
    link.send(Frame("hello", {"session": name, "token": f"token of {name}"}))
    welcome = link.recv(WAIT_S)
    for step in range(welcome.meta["step"], steps):
        link.send(place.layer.activation(step))
        assert link.recv(WAIT_S).kind == "gradient"
    link.send(Frame("done"))
    assert link.recv(WAIT_S).meta == {"step": steps}
    link.close()
    return welcome.meta["step"]


def test_a_session_is_opened_where_it_is_wanted_collected_and_released(pair):
    assert pair.pair.open(pair.layer.spec(), pair.layer.start(), "b") == "b"
    assert (pair.edges["a"].sessions, pair.edges["b"].sessions) == ([], ["s"])
    train(pair, "b", 2)
    assert is_trained(pair.layer, pair.pair.collect("s"), 2)
    pair.pair.release("s")
    pair.pair.release("s")
    assert pair.edges["b"].sessions == []
    with pytest.raises(SessionError, match="session s is not open"):
        pair.pair.collect("s")


def test_devices_ask_first_where_their_session_is_by_the_address_that_they_can_reach(place):
    place.start("a")
    place.start("b")
    addresses = [
        EdgeAddress("a", place.edges["a"].address, "grpc://seen-by-devices:1"),
        EdgeAddress("b", place.edges["b"].address),
    ]
    with Fleet(addresses, control_token=TOKEN) as fleet:
        b = place.edges["b"].address
        assert fleet.device_addresses("b") == [b, "grpc://seen-by-devices:1"]
        assert fleet.device_addresses("a") == ["grpc://seen-by-devices:1", b]


def test_what_does_not_fit_on_one_edge_is_opened_on_another(place):
    place.start("a", limits=EdgeConfig(max_sessions=1))
    place.start("b", limits=EdgeConfig(max_sessions=1))
    fleet = place.fleet("a", "b")
    spec, start = place.layer.spec, place.layer.start()
    assert [fleet.open(spec(name), start, "a") for name in ("s", "t")] == ["a", "b"]
    with pytest.raises(SessionError, match=r"session of client 0: .* is full: 1 sessions"):
        fleet.open(spec("u"), start, "a")


def test_sessions_of_a_killed_edge_begin_anew_on_the_other_one(pair):
    for name in ("s", "t"):
        pair.pair.open(pair.layer.spec(name), pair.layer.start(), "a")
    train(pair, "a", 3)
    pair.edges["a"].kill()
    until(lambda: sorted(pair.edges["b"].sessions) == ["s", "t"])
    assert train(pair, "b", 2) == 0
    assert is_trained(pair.layer, pair.pair.collect("s"), 2)
    assert pair.pair.alive == ["b"]
    until(lambda: len(pair.pair._recovery.done) == 2)
    told = {(r.session, r.source, r.target, r.step) for r in pair.pair.recoveries()}
    assert told == {("s", "a", "b", 0), ("t", "a", "b", 0)}
    assert pair.pair.recoveries() == []


def test_a_session_goes_on_from_the_newest_replica_to_which_its_device_can_return(pair):
    pair.pair.open(pair.layer.spec(replicate_every=2), pair.layer.start(), "a")
    train(pair, "a", 5)
    until(lambda: pair.pair._held["s"].newest.step == 4)
    pair.edges["a"].kill()
    until(lambda: pair.edges["b"].sessions == ["s"])
    assert train(pair, "b", 6) == 4
    assert is_trained(pair.layer, pair.pair.collect("s"), 6)


def test_an_edge_that_stops_hands_over_and_no_step_is_lost(pair):
    pair.pair.open(pair.layer.spec(), pair.layer.start(), "a")
    train(pair, "a", 3)
    assert pair.edges["a"].stop() == []
    until(lambda: pair.edges["b"].sessions == ["s"])
    assert train(pair, "b", 4) == 3
    assert is_trained(pair.layer, pair.pair.collect("s"), 4)


def test_what_a_device_did_where_its_session_is_just_being_opened_is_collected(pair, monkeypatch):
    """The state that the former edge had handed back was taken for the newest: a step was lost.

    A device may go on as soon as the session is open, before the fleet has noted where.
    """
    collecting = threading.Event()
    open_at = Placing.open_at

    def slowly(fleet, edge, spec, start):
        open_at(fleet, edge, spec, start)
        if edge == "b":
            assert collecting.wait(WAIT_S)

    def request(fleet, edge, kind, *more):
        try:
            return obey(fleet, edge, kind, *more)
        finally:
            if kind == "collect":
                collecting.set()

    obey = FleetEdges.request
    monkeypatch.setattr(Placing, "open_at", slowly)
    monkeypatch.setattr(FleetEdges, "request", request)
    pair.pair.open(pair.layer.spec(), pair.layer.start(), "a")
    train(pair, "a", 3)
    pair.edges["a"].stop()
    until(lambda: pair.edges["b"].sessions == ["s"])
    assert train(pair, "b", 4) == 3
    assert is_trained(pair.layer, pair.pair.collect("s"), 4)


@pytest.mark.parametrize("others", ["b", "none"])
def test_an_edge_may_be_lost_while_the_others_are_being_reached(place, monkeypatch, others):
    """The thread that dealt with the loss looked for an edge that was not entered yet.

    It did so too where the fleet was given up, as another edge could not be reached.
    """
    reach, on_lost, begun = FleetEdges.reach, EdgeRecovery.on_lost, threading.Event()

    def lose(fleet, edge, **more):
        client = reach(fleet, edge, **more)
        if edge.name == "a" and not more:
            place.edges["a"].kill()
            assert begun.wait(WAIT_S)
            time.sleep(0.02)  # as far as that thread gets
        return client

    def note(fleet, name):
        begun.set()
        on_lost(fleet, name)

    monkeypatch.setattr(FleetEdges, "reach", lose)
    monkeypatch.setattr(EdgeRecovery, "on_lost", note)
    place.start("a")
    place.start("b")
    if others == "b":
        assert place.fleet("a", "b").alive == ["b"]
    else:
        with pytest.raises(LinkError, match="edge server none"):
            place.fleet("a", "none")
        for thread in threading.enumerate():
            if thread.name == "recover-a":
                thread.join(WAIT_S)


def test_the_last_edge_hands_over_and_its_sessions_can_still_be_collected(place):
    place.start("a")
    fleet = place.fleet("a")
    fleet.open(place.layer.spec(), place.layer.start(), "a")
    train(place, "a", 3)
    place.edges["a"].stop()
    until(lambda: fleet.alive == [])
    assert is_trained(place.layer, fleet.collect("s"), 3)
    with pytest.raises(SessionError, match="no edge server is left"):
        fleet.open(place.layer.spec("t"), place.layer.start(), "a")


def test_a_link_that_is_lost_is_made_again_and_sessions_stay(pair):
    pair.pair.open(pair.layer.spec(), pair.layer.start(), "a")
    train(pair, "a", 2)
    former = pair.pair._edges.clients["a"]
    former._link.close()
    until(lambda: pair.pair._edges.clients["a"] is not former)
    assert pair.pair.alive == ["a", "b"]
    assert is_trained(pair.layer, pair.pair.collect("s"), 2)
    assert pair.pair.recoveries() == []


def test_an_edge_that_was_started_anew_is_used_again(pair):
    pair.edges["a"].kill()
    until(lambda: pair.pair.alive == ["b"])
    pair.start("a")
    pair.pair.revive()
    assert pair.pair.alive == ["b", "a"] or pair.pair.alive == ["a", "b"]
    assert pair.pair.open(pair.layer.spec(), pair.layer.start(), "a") == "a"


class Cable:
    """A link that can be unplugged: nothing arrives any more, and nothing is closed."""

    def __init__(self, link, unplugged):
        self._link, self._unplugged = link, unplugged
        self._closed = threading.Event()

    def recv(self, timeout_s=None):
        frame = self._link.recv(timeout_s)
        if self._unplugged.is_set():
            self._closed.wait(WAIT_S)
            raise LinkClosed("closed here")
        return frame

    def send(self, frame):
        if not self._unplugged.is_set():
            self._link.send(frame)

    def close(self):
        self._closed.set()
        if not self._unplugged.is_set():
            self._link.close()

    def __getattr__(self, name):
        return getattr(self._link, name)


def unplug_a(monkeypatch):
    """Return an event after which edge server a is there no more."""
    unplugged = threading.Event()

    def dial_a(address, **more):
        if not address.endswith("//a-of-fleet"):
            return dial(address, **more)
        if unplugged.is_set():
            raise LinkClosed(f"{address} does not answer")
        return Cable(dial(address, **more), unplugged)

    monkeypatch.setattr(module, "dial", dial_a)
    return unplugged


def test_an_edge_that_falls_silent_is_given_up(place, monkeypatch):
    """The power of its machine is gone: no link is closed, and nobody refuses new ones.

    Only the keepalive of the connection noticed that, after longer than a device asks around.
    """
    unplugged = unplug_a(monkeypatch)
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    place.start("a")
    place.start("b")
    fleet = place.fleet("a", "b")
    fleet.open(place.layer.spec(), place.layer.start(), "a")
    unplugged.set()
    until(lambda: place.edges["b"].sessions == ["s"])
    assert fleet.alive == ["b"]


def test_an_edge_that_falls_silent_in_a_request_is_given_up(place, monkeypatch):
    """Each request found out anew, in minutes: no heartbeat is due while one is under way."""
    unplugged = unplug_a(monkeypatch)
    monkeypatch.setattr(module, "BEAT_S", 1000.0)
    monkeypatch.setattr("fedsys.offload.edge_client.ASK_S", 0.05)
    place.start("a")
    place.start("b")
    fleet = place.fleet("a", "b")
    fleet.open(place.layer.spec(), place.layer.start(), "a")
    unplugged.set()
    assert fleet.open(place.layer.spec("t"), place.layer.start(), "a") == "b"
    assert fleet.alive == ["b"]
    until(lambda: sorted(place.edges["b"].sessions) == ["s", "t"])


def test_an_edge_that_is_only_busy_is_not_given_up(place, monkeypatch):
    held = threading.Event()
    obey = EdgeControl._answer

    def slowly(edge, link, frame):
        if frame.kind == "ping" and not held.is_set():
            held.set()
            time.sleep(0.3)
        return obey(edge, link, frame)

    monkeypatch.setattr(EdgeControl, "_answer", slowly)
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr("fedsys.offload.edge_client.Patience", lambda: Patience(0.05, 0.05))
    place.start("a")
    fleet = place.fleet("a")
    edge = fleet._edges.clients["a"]
    fleet.open(place.layer.spec(), place.layer.start(), "a")
    assert held.wait(WAIT_S)
    until(lambda: edge._patience._missed > 0)
    until(lambda: edge._patience._missed == 0)  # the reply came after all
    assert fleet._edges.clients["a"] is edge and not edge.lost
    assert place.edges["a"].sessions == ["s"]


def test_an_edge_that_is_not_there_is_named_before_anything_begins(place):
    place.start("a")
    with pytest.raises(LinkError, match=r"edge server b: memory://b-of-fleet: nobody serves"):
        place.fleet("a", "b")


def test_an_edge_that_does_not_obey_is_an_error_that_says_so(place):
    place.start("a")
    with pytest.raises(RemoteError, match=r"edge server a: .* may not control"):
        Fleet([EdgeAddress("a", place.edges["a"].address)], control_token="guessed")


def test_faults_go_with_the_sessions_that_they_strike_and_are_noted_when_they_do(place):
    faults = [
        Fault("edge_killed", 1, "a", 1, "before_compute"),
        Fault("edge_killed", 1, "b", 1, "before_compute"),
        Fault("edge_killed", 2, "a", 1, "before_compute"),
        Fault("link_cut", 1, 0, 0, "after_step", 0.0),
        Fault("link_cut", 1, 7, 0, "after_step", 0.0),
    ]
    noted = []
    place.start("a", crash=EdgeServer.kill)
    place.start("b", crash=EdgeServer.kill)
    fleet = place.fleet("a", "b", faults=Faults(faults, record=noted.append))
    fleet.open(place.layer.spec(), place.layer.start(), "a")
    link = dial(place.edges["a"].address)
    link.send(Frame("hello", {"session": "s", "token": "token of s"}))
    link.recv(WAIT_S)
    link.send(place.layer.activation(0))
    assert link.recv(WAIT_S).kind == "gradient"
    with pytest.raises(LinkClosed):
        link.recv(WAIT_S)
    assert noted == [faults[3]]
    link = dial(place.edges["a"].address)
    link.send(Frame("hello", {"session": "s", "token": "token of s"}))
    link.recv(WAIT_S)
    link.send(place.layer.activation(1))
    with pytest.raises(LinkClosed):
        link.recv(WAIT_S)
    assert noted == [faults[3], faults[0]]
    until(lambda: place.edges["b"].sessions == ["s"])


@pytest.mark.parametrize("how", ["announced", "unannounced"])
def test_faults_move_with_the_sessions_that_they_strike(how, place):
    """They stayed where a session was opened: of 28 runs of `bench migration` 8 met none of theirs.

    The edge server that a device came to was not killed, and its link was not cut there any more.
    """
    faults = [
        Fault("link_cut", 1, 0, 1, "after_step", 0.0),
        Fault("edge_killed", 1, "b", 2, "before_compute"),
    ]
    noted = []
    for name in ("a", "b"):
        place.start(name, crash=EdgeServer.kill)
    fleet = place.fleet("a", "b", faults=Faults(faults, record=noted.append))
    fleet.open(place.layer.spec(), place.layer.start(), "a")
    remote = Remote([e.address for e in place.edges.values()], "s", "token of s", dial)
    remote.open()
    remote.leave(place.edges["b"].address, how)
    step = 0
    while step < 4:
        frame = place.layer.activation(step)
        meta = {k: v for k, v in frame.meta.items() if k not in ("step", "piece")}
        try:
            remote.send("activation", step, 0, meta, frame.tensors)
            remote.receive("activation", step, 0)
            step += 1
        except Moved as moved:
            step = moved.step
    assert noted == faults
    assert fleet.collect("s").step == 4


def test_a_fault_that_struck_elsewhere_does_not_strike_again(place):
    """A device that comes to an edge server that was killed and is back brings that fault, too."""
    struck = Fault("link_cut", 1, 0, 0, "before_compute", 0.0)
    place.start("a", crash=EdgeServer.kill)
    faults = Faults([struck])
    fleet = place.fleet("a", faults=faults)
    fleet.open(place.layer.spec(), place.layer.start(), "a")
    faults.fire(struck)
    link = dial(place.edges["a"].address)
    link.send(Frame("hello", {"session": "s", "token": "token of s"}))
    link.recv(WAIT_S)
    link.send(place.layer.activation(0))
    assert link.recv(WAIT_S).kind == "gradient"


def test_an_edge_that_may_not_be_struck_refuses_sessions_with_faults(place):
    place.start("a")
    fleet = place.fleet("a", faults=Faults([Fault("edge_killed", 1, "a", 1, "after_step")]))
    with pytest.raises(SessionError, match=r"start it with edge\.faults=true"):
        fleet.open(place.layer.spec(), place.layer.start(), "a")
