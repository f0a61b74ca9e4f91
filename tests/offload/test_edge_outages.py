"""However edge servers are lost, opening sessions comes to its end, and says where they are.

A soak once stood still for more than five minutes while sessions were opened: each attempt that
failed doubled the time limit of the next one, also where it failed at once, and attempts, edges and
sessions multiplied it. Edges are real ones in this process; the time that silence takes is that of
a clock of the test.
"""

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.config import EdgeAddress
from fedsys.errors import LinkClosed, LinkRefused, LinkTimeout
from fedsys.offload import edge_client, fleet_edges
from fedsys.offload.edge import EdgeServer
from fedsys.offload.edge_client import EdgeClient, Hooks
from fedsys.offload.fleet import Fleet, Unreachable
from fedsys.transport.addresses import dial, serve
from fedsys.transport.link_around import LinkAround
from fedsys.transport.patience import Allowance
from fedsys.transport.wire import Frame

LOST = ("killed", "behind a forwarder", "stopped", "dies when asked", "never answers")


class Clock:
    """Seconds that pass when somebody waits in vain; stands for `time` and for an event."""

    def __init__(self):
        self.now, self._lock = 0.0, threading.Lock()

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        with self._lock:
            self.now += seconds
        return False

    def is_set(self):
        return False

    def set(self):
        pass


class Struck(LinkAround):
    """A link of a controller to an edge that something may have become of."""

    def __init__(self, inner, fate):
        super().__init__(inner)
        self._fate = fate

    def send(self, frame):
        kind, asked = self._fate(), getattr(_asked, "now", None)
        if kind in ("killed", "behind a forwarder") or (
            kind == "dies when asked" and frame.kind == "open"
        ):
            self.inner.close()
            raise LinkClosed("the link was lost")
        if kind == "stopped" or (kind == "never answers" and frame.kind == "open"):
            if asked is not None:
                asked.in_vain = True
            return
        super().send(frame)


_asked = threading.local()


def futures_of(clock):
    """Return what stands for the replies of edges: time passes at once where none will come."""

    class Reply(Future):
        def __init__(self):
            super().__init__()
            self.in_vain, _asked.now = False, self

        def result(self, timeout=None):
            if self.in_vain and not self.done():
                clock.wait(timeout)
                raise FutureTimeout
            return super().result(60.0)

    return Reply


def outage(kinds, monkeypatch):
    """Return a fleet of edges, a clock, and what each edge is to become."""
    clock, fates = Clock(), {}

    def fate(name):
        return fates.get(name, "")

    def connect(address, *, timeout_s, **more):
        name = address.removeprefix("memory://")
        match fate(name):
            case "killed":
                raise LinkRefused("nobody listens")
            case "behind a forwarder":
                raise LinkClosed("the connection was ended")
            case "stopped":
                clock.wait(timeout_s)
                raise LinkClosed("no answer in time")
        return Struck(dial(address, timeout_s=timeout_s, **more), lambda: fate(name))

    monkeypatch.setattr(fleet_edges, "dial", connect)
    monkeypatch.setattr(fleet_edges, "time", clock)
    monkeypatch.setattr(fleet_edges.FleetEdges, "watch", lambda self: None)
    monkeypatch.setattr(edge_client, "Future", futures_of(clock))
    monkeypatch.setattr(edge_client, "LONGEST_S", 2 * edge_client.ASK_S)
    servers = [EdgeServer(f"outage-{i}", f"memory://outage-{i}", control_token="t")
               for i in range(len(kinds))]  # fmt: skip
    fleet = Fleet([EdgeAddress(s.name, s.address) for s in servers], control_token="t")
    fleet._edges.closing = clock
    fleet._edges.allowance = Allowance(fleet_edges.AGAIN_S, clock.monotonic)
    for _ in range(3):  # as it is after a few heartbeats
        fleet._edges._patience.saw(0.001)
    fates |= {s.name: kind for s, kind in zip(servers, kinds, strict=True)}
    return SimpleNamespace(fleet=fleet, clock=clock, servers=servers, fates=fates)


def end(place):
    place.fates.clear()
    place.fleet.close()
    for server in place.servers:
        server.kill()


@settings(max_examples=30)
@given(
    st.lists(st.sampled_from([*LOST, ""]), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 2),
)
def test_opening_sessions_is_bounded_for_all_edges_and_sessions_together(kinds, sessions, phases):
    with pytest.MonkeyPatch.context() as monkeypatch:
        place, layer = outage(kinds, monkeypatch), LAYER[0]
        good = {s.name for s, kind in zip(place.servers, kinds, strict=True) if not kind}
        try:
            for phase in range(phases):
                began = place.clock.now
                for i in range(sessions):
                    spec = layer.spec(f"s{phase}-{i}")
                    try:
                        opened = place.fleet.open(spec, layer.start(), "outage-0")
                    except Unreachable:
                        assert not good
                    else:
                        assert opened in good
                place.fleet.revive()
                # once for each edge
                asked = 3 * edge_client.ASK_S + 4 * fleet_edges.LEAST_ANSWER_S
                most = fleet_edges.AGAIN_S + len(kinds) * (asked + fleet_edges.REVIVE_S)
                assert place.clock.now - began <= most
        finally:
            end(place)


LAYER = []


@pytest.fixture(autouse=True)
def layer(last_layer):
    """Hypothesis takes no fixtures that last for a test."""
    LAYER[:] = [last_layer]
    return last_layer


@pytest.mark.parametrize("kind", LOST)
def test_an_edge_that_is_there_again_is_used_again_in_the_next_phase(kind, layer, monkeypatch):
    place = outage([kind], monkeypatch)
    try:
        with pytest.raises(Unreachable):
            place.fleet.open(layer.spec(), layer.start(), "outage-0")
        place.fates.clear()
        place.fleet.revive()
        assert place.fleet.open(layer.spec("t"), layer.start(), "outage-0") == "outage-0"
    finally:
        end(place)


def test_a_request_that_an_edge_does_not_even_take_is_given_up(monkeypatch):
    """An edge that is stopped takes nothing, its system answers for it, and senders waited."""
    monkeypatch.setattr(edge_client, "ASK_S", 0.05)
    over = threading.Event()

    def greet_and_stop(link):
        link.recv(10)
        link.admit()
        link.send(Frame("ready", {"request": 1}))
        over.wait(60)

    server = serve("tcp://127.0.0.1:0", greet_and_stop, queue_bytes=1 << 16)
    link = dial(server.address, queue_bytes=1 << 16)
    lost = threading.Event()
    hooks = Hooks(
        lambda _: None, lambda _: None, lambda _, __: None, lambda _: lost.set(), lambda _: False
    )
    client = EdgeClient("stopped", link, "t", hooks)
    problems = []

    def ask():
        try:
            client.request("open", {}, {"w": torch.zeros(1 << 24)})
        except (LinkClosed, LinkTimeout) as error:
            problems.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not client.is_late():
        assert thread.is_alive()
        over.wait(0.01)
    client.abandon(["s"])
    thread.join(60)
    assert not thread.is_alive() and len(problems) == 1
    assert lost.wait(60)
    over.set()
    server.stop()
