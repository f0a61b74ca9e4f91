"""Sessions that move between real edge servers: commands, strangers, and what is sent ahead."""

import dataclasses
import gc
import threading
import time

import pytest
import torch

from fedsys.commands.edge import moved
from fedsys.config import EdgeAddress, EdgeConfig, with_values
from fedsys.errors import ConfigError, RemoteError, SessionError
from fedsys.offload import absences, delta, edge_arrivals, mirror
from fedsys.offload.asking import Asking
from fedsys.offload.edge import EdgeServer
from fedsys.offload.fleet import Fleet
from fedsys.offload.peers import PeerGroup, Peers
from fedsys.offload.remote import Moved
from fedsys.runs import happened
from fedsys.transport.addresses import dial
from fedsys.transport.network import Network
from fedsys.transport.patience import Patience
from fedsys.transport.security import Authority
from fedsys.transport.wire import Frame, Limits
from strategies.offload_totals import in_words
from tests.devices import device, train
from tests.waiting import until

TOKEN = "control"
WAIT_S = 60.0


@pytest.fixture
def pair():
    """Return two edge servers over TCP, and the fleet of both."""
    edges = {n: EdgeServer(n, "tcp://127.0.0.1:0", control_token=TOKEN) for n in ("a", "b")}
    fleet = Fleet([EdgeAddress(n, e.address) for n, e in edges.items()], control_token=TOKEN)
    yield edges, fleet
    fleet.close()
    for edge in edges.values():
        edge.kill()


def test_a_fleet_that_is_long_gone_is_forgotten(pair, monkeypatch, last_layer):
    """Each run left its fleet, and the link of its server app, at every edge server for ever."""
    monkeypatch.setattr(edge_arrivals, "ORPHAN_S", 0.0)
    edges, _ = pair
    addresses = [EdgeAddress(name, edge.address) for name, edge in edges.items()]

    def ran(opens=False):
        fleet = Fleet(addresses, control_token=TOKEN)
        if opens:
            fleet.open(last_layer.spec(), last_layer.start(), "a")
        fleet._edges.close()  # as when its process is killed: it releases nothing
        return fleet._edges.secret

    def known(secrets):
        ran()  # who comes tidies up after those who are gone
        found = [o.secret for o in gc.get_objects() if type(o) is PeerGroup]
        return sum(secret in secrets for secret in found)

    with_session, without = ran(opens=True), {ran(), ran()}
    until(lambda: not known(without))
    assert known({with_session}) == 1, "its server app may come back for its session at a"


def test_an_operator_moves_a_session_and_its_device_finds_it(pair, last_layer):
    edges, fleet = pair
    fleet.open(last_layer.spec(), last_layer.start(), "a")
    remote = device(edges)
    remote.open()
    train(remote, last_layer, range(2))
    asked = EdgeConfig(address=edges["a"].address, control_token=TOKEN, move={"to": "b"})
    assert moved(asked) == {"sessions": ["s"]}
    until(lambda: edges["b"].sessions == ["s"])
    train(remote, last_layer, range(2, 4))
    until(lambda: edges["a"].sessions == [])
    assert remote.edge == edges["b"].address
    (leaving,) = remote.traffic.moves
    assert (leaving.how, remote.traffic.recoveries) == ("commanded", [])
    assert fleet.collect("s", "b").step == 4
    fleet.release("s")
    assert edges["b"].sessions == []


@pytest.mark.parametrize("to", ["a", "c"])
def test_a_session_moves_to_another_edge_of_its_run_only(to, pair, last_layer):
    edges, fleet = pair
    fleet.open(last_layer.spec(), last_layer.start(), "a")
    with pytest.raises(SessionError, match="no other edge server of this run: b"):
        moved(EdgeConfig(address=edges["a"].address, control_token=TOKEN, move={"to": to}))


def test_a_command_that_names_nobody_is_refused():
    with pytest.raises(ConfigError, match=r"edge\.move"):
        moved(EdgeConfig(move={"client": 3}))


def test_nobody_but_edges_of_a_fleet_speaks_as_one(pair):
    edges, _ = pair
    for secret in ("", "guessed"):
        link = dial(edges["a"].address)
        link.send(Frame("peer", {"secret": secret, "name": "b"}))
        with pytest.raises(RemoteError, match="no edge server of a fleet that is known here"):
            link.recv(WAIT_S)
        link.close()


def test_an_edge_of_another_name_than_its_certificate_is_refused(last_layer):
    authority = Authority.create()
    own = {n: authority.issue(n, ["127.0.0.1"], role="both") for n in ("a", "b")}
    edges = {n: EdgeServer(n, "tcp://127.0.0.1:0", credentials=c) for n, c in own.items()}
    server = authority.issue("server")
    addresses = [EdgeAddress(n, e.address) for n, e in edges.items()]
    try:
        with Fleet(addresses, credentials=server) as fleet:
            fleet.open(last_layer.spec(), last_layer.start(), "a")
            secret = fleet._edges.secret
            link = dial(edges["a"].address, credentials=authority.issue("device-0"))
            link.send(Frame("peer", {"secret": secret, "name": "b"}))
            with pytest.raises(RemoteError, match="device-0 says that it is b"):
                link.recv(WAIT_S)
            fleet.move("s", "b")  # the real ones accept each other
            until(lambda: "s" in edges["b"].sessions)
    finally:
        for edge in edges.values():
            edge.kill()


def test_what_is_sent_ahead_is_not_sent_again(pair, last_layer):
    edges, fleet = pair
    fleet.open(last_layer.spec(), last_layer.start(), "a")
    remote = device(edges)
    remote.open()
    train(remote, last_layer, range(2))
    remote.foresee(edges["b"].address)
    train(remote, last_layer, range(2, 4))
    until(lambda: "s" in edges["a"]._moving._bases._ahead)  # the other one said that it has it
    remote.leave(edges["b"].address, "foreseen", step=4)
    train(remote, last_layer, range(4, 6))
    (leaving,) = remote.traffic.moves
    assert leaving.precopied > 0
    assert fleet.collect("s", "b").step == 6


@pytest.mark.parametrize("how", ["announced", "foreseen"])
def test_a_device_whose_move_comes_to_nothing_says_why(pair, last_layer, how):
    """It was a warning in the log of the device, and no word in the run."""
    edges, fleet = pair
    edges["b"]._table._limits = EdgeConfig(max_sessions=1)
    fleet.open(last_layer.spec("other"), last_layer.start(), "b")
    fleet.open(last_layer.spec(), last_layer.start(), "a")
    remote = device(edges)
    remote.open()
    train(remote, last_layer, range(2))
    remote.leave(edges["b"].address, how, step=2)
    train(remote, last_layer, range(2, 4))
    (entry,) = remote.traffic.recoveries
    assert (entry["what"], entry["from"], entry["to"]) == (
        "stays",
        *(e.address for e in edges.values()),
    )
    told = in_words({**entry, "round": 1, "client": 0, "from": "a", "to": "b"})
    event = {**entry, "client": 0, "from": "a", "to": "b", "kind": "recovery"}
    assert happened.in_words(event).startswith("device 0 stays at a, not b; ")  # not: trained alone
    assert told.startswith("round 1: client 0 stays at a, not b: ") and "b is full" in told
    assert (remote.traffic.moves, fleet.collect("s", "a").step) == ([], 4)


@pytest.fixture
def foreseen(pair, last_layer, monkeypatch):
    """Have a device move that was foreseen; return what it took, the counters, and its end."""
    monkeypatch.setattr(mirror, "SETTLES_S", WAIT_S)

    def moves(name="s", before=lambda: None, first=2):
        edges, fleet = pair
        text = with_values(last_layer.config.text, mobility={"mirror": True})
        spec = dataclasses.replace(last_layer.spec(name, replicate_every=2), config=text)
        fleet.open(spec, last_layer.start(), "a")
        remote = device(edges, name)
        remote.open()
        train(remote, last_layer, range(first))
        remote.foresee(edges["b"].address)
        until(lambda: name in edges["b"]._moving._shadows.names())
        before()
        train(remote, last_layer, range(first, 4))
        remote.leave(edges["b"].address, "foreseen", step=4)
        train(remote, last_layer, range(4, 6))
        (leaving,) = remote.traffic.moves
        end = fleet.collect(name, "b")
        assert end.step == 6 and fleet.recoveries() == []
        assert edges["b"]._moving._shadows.names() == []
        return leaving, edges["a"].counters, end

    return moves


def test_a_shadow_that_did_the_same_is_the_session(pair, foreseen, last_layer):
    """Nothing of its state moves in the pause, and it has the bits of one that stayed."""
    leaving, counters, end = foreseen()
    assert (counters["shadows_became"], counters["moved_away"]) == (1, 1)
    assert (leaving.how, leaving.repeated_steps) == ("foreseen", 0)
    operation = sum(t.nbytes for t in last_layer.activation(0).tensors.values())
    assert leaving.bytes <= 2 * operation < leaving.precopied + leaving.bytes
    edges, fleet = pair
    fleet.open(last_layer.spec("stays"), last_layer.start(), "a")
    stays = device(edges, "stays")
    stays.open()
    train(stays, last_layer, range(6))
    same = fleet.collect("stays", "a").tensors()
    assert end.tensors().keys() == same.keys()
    assert all(torch.equal(t, same[n]) for n, t in end.tensors().items())


def test_a_session_that_has_not_begun_is_shadowed_too(pair, foreseen, last_layer):
    """Next to nothing was sent ahead of it, and the difference was taken to be as little."""
    pair[1].open(last_layer.spec("other"), last_layer.start(), "b")  # it has the round's start
    leaving, counters, _ = foreseen(first=0)
    assert (counters["shadows_became"], counters["shadows_left"]) == (1, 0)
    assert leaving.repeated_steps == 0


@pytest.mark.parametrize("what", ["other bits", "one is missing", "one came twice", "refused"])
def test_where_the_shadow_is_another_one_the_difference_is_sent(what, pair, foreseen, monkeypatch):
    """The shadow trained with the very tensors from which that is a difference, so nothing came."""
    edges, _ = pair
    shadows = edges["b"]._moving._shadows
    does = shadows.mirror

    def differs():
        if what == "other bits":  # as on a processor that adds in another order
            stage = shadows._kept["s"].session._part._stage
            with torch.no_grad():
                next(stage.parameters()).view(-1)[0] += 2**-20

    def mirrored(name, fleet, epoch, frame):
        if what == "one is missing" and frame.meta["number"] == 0:
            return
        if what == "refused":
            raise SessionError("no more")
        does(name, fleet, epoch, frame)
        if what == "one came twice":
            does(name, fleet, epoch, frame)

    monkeypatch.setattr(shadows, "mirror", mirrored)
    _, counters, _ = foreseen(before=differs)
    became = what == "one came twice"
    assert counters["shadows_became"] == became
    assert counters["shadows_refused"] + counters["shadows_left"] == (not became)
    assert counters["moved_away"] == 1


@pytest.mark.parametrize("how", ["unannounced", "announced"])
def test_what_a_session_is_a_difference_from_stays_until_it_came(
    how, pair, last_layer, monkeypatch
):
    """Two devices changed places unannounced: what both had begun with was gone with the first.

    The other one was sent as a difference from it, which nobody could read: in schedule 28 of
    `bench migration` the server app was asked to open the session anew. Where it was announced, the
    device stayed: of 4 moves of `mobility=halfway` on a starved machine one was not made.
    """
    edges, fleet = pair
    for name, edge in (("s", "a"), ("t", "b")):
        fleet.open(last_layer.spec(name), last_layer.start(), edge)
    remote, peers = device(edges), edges["ab"[how == "unannounced"]]._moving._peers
    remote.open()
    train(remote, last_layer, range(2))
    asks = peers.ask

    def ask(group, source, question):
        if question.kind in ("fetch", "transfer"):
            fleet.release("t")
        return asks(group, source, question)

    monkeypatch.setattr(peers, "ask", ask)
    remote.leave(edges["b"].address, how, step=2)
    train(remote, last_layer, range(2, 4))
    assert [moved.how for moved in remote.traffic.moves] == [how]
    assert (fleet.collect("s", "b").step, fleet.recoveries()) == (4, [])
    fleet.release("s")
    assert edges["b"]._moving._bases.keys() == []


def test_a_device_that_was_foreseen_at_one_edge_may_go_to_another(last_layer):
    """The first one had its session on offer for ten minutes, and it could go nowhere else."""
    edges = {n: EdgeServer(n, "tcp://127.0.0.1:0", control_token=TOKEN) for n in ("a", "b", "c")}
    addresses = [EdgeAddress(n, e.address) for n, e in edges.items()]
    try:
        with Fleet(addresses, control_token=TOKEN) as fleet:
            fleet.open(last_layer.spec(), last_layer.start(), "a")
            remote = device(edges)
            remote.open()
            train(remote, last_layer, range(2))
            for to in ("b", "c"):
                remote.foresee(edges[to].address)
                until(lambda to=to: "s" in edges[to]._moving._bases._ahead)
            until(lambda: "s" not in edges["b"]._moving._bases._ahead)
            remote.remain()
            until(lambda: "s" not in edges["c"]._moving._bases._ahead)
            remote.leave(edges["b"].address, "announced", step=2)
            train(remote, last_layer, range(2, 4))
            assert fleet.collect("s", "b").step == 4
            assert len(remote.traffic.moves) == 1
    finally:
        for edge in edges.values():
            edge.kill()


def test_a_session_that_is_released_while_it_is_built_is_not_held(pair, last_layer, monkeypatch):
    """Its server app had lost the link over which it had asked, and spoke over another one.

    The session of nobody stayed for a quarter of an hour.
    """
    edges, _ = pair
    building, released, make = threading.Event(), threading.Event(), edges["a"]._control._make

    def slowly(spec, start):
        building.set()
        assert released.wait(WAIT_S)
        return make(spec, start)

    monkeypatch.setattr(edges["a"]._control, "_make", slowly)
    links = [dial(edges["a"].address) for _ in range(2)]
    for link in links:
        link.send(Frame("control", {"token": TOKEN}))
        assert link.recv(WAIT_S).kind == "ready"
    start = last_layer.start()
    meta = {"spec": last_layer.spec("t").to_meta(), "step": start.step, "request": 1}
    links[0].send(Frame("open", meta, start.tensors()))
    assert building.wait(WAIT_S)
    links[1].send(Frame("release", {"session": "t", "request": 1}))
    assert links[1].recv(WAIT_S).kind == "released"
    released.set()
    assert links[0].recv(WAIT_S).kind == "refused"
    assert edges["a"].sessions == []
    for link in links:
        link.close()


def test_a_device_that_left_and_arrives_nowhere_is_missing_until_it_is_back(
    pair, last_layer, monkeypatch
):
    monkeypatch.setattr(absences, "TIMES", 0.0)
    edges, fleet = pair
    fleet.open(last_layer.spec(), last_layer.start(), "a")
    remote = device(edges)
    remote.open()
    train(remote, last_layer, range(2))
    assert fleet.missing({}) == {}
    remote.leave(edges["b"].address, "announced", step=2)
    train(remote, last_layer, range(2, 4))  # it came; that it was gone is told late or soon
    remote.close()
    until(lambda: fleet.missing({}))
    assert fleet.missing({0: 60.0}) == {}, "it is known to be out of reach"
    (reason,) = fleet.missing({}).values()
    assert "left b and arrived at no edge server within 0 s" in reason
    other = device(edges)
    other.open()  # as it is after its process was started again
    until(lambda: not fleet.missing({}))
    other.close()


def test_a_device_whose_return_was_not_told_is_asked_for(pair, last_layer, monkeypatch):
    monkeypatch.setattr(absences, "TIMES", 0.0)
    edges, fleet = pair
    fleet.open(last_layer.spec(), last_layer.start(), "a")
    remote = device(edges)
    remote.open()
    fleet._held["s"].gone_s = time.monotonic() - 1.0  # the link of its server app was lost then
    assert fleet.missing({}) == {}
    assert fleet._held["s"].gone_s is None
    remote.close()


def test_a_device_that_is_lost_behind_a_round_trip_is_gone(pair, last_layer, monkeypatch):
    """What measures a round trip was taken for the end of the round."""
    monkeypatch.setattr(absences, "TIMES", 0.0)
    edges, fleet = pair
    fleet.open(last_layer.spec(), last_layer.start(), "a")
    remote = device(edges)
    remote.open()
    train(remote, last_layer, range(1))
    assert remote.trip(1) > 0
    remote.close()
    until(lambda: fleet.missing({}))


def test_devices_may_go_and_come_at_the_same_time(pair, last_layer, monkeypatch):
    """A set was changed while another thread went through it, and a device's leaving not told."""
    edges, fleet = pair
    fleet.open(last_layer.spec(), last_layer.start(), "a")
    devices, get, came = edges["a"]._devices, edges["a"]._table.get, []
    devices._is_gone("s")

    def slowly(name):
        if not came:
            came.append(threading.Thread(target=devices._was_gone, args=("s",)))
            came[0].start()
            came[0].join(0.2)  # as long as it can
        return get(name)

    monkeypatch.setattr(edges["a"]._table, "get", slowly)
    devices._is_gone("t")
    came[0].join()
    assert devices._gone == {"t"}


def test_a_device_that_comes_back_while_another_one_is_asked_for_is_not_missing(
    pair, last_layer, monkeypatch
):
    """The run ended with an AssertionError: when it was gone was read again, after the asking.

    And all edge servers were asked again for every look at the replies, five times in a second.
    """
    monkeypatch.setattr(absences, "TIMES", 0.0)
    _, fleet = pair
    for client, name in enumerate(("s", "t")):
        spec = dataclasses.replace(last_layer.spec(name), client=client)
        fleet.open(spec, last_layer.start(), "a")
        fleet._held[name].gone_s = time.monotonic() - 1.0
    asked = []

    def request(edge, kind, meta):
        asked.append((edge, meta["session"]))
        fleet._moves.told("a", Frame("back", {"session": "t"}))
        return Frame("present", {"device": False})

    monkeypatch.setattr(fleet._edges, "request", request)
    assert list(fleet.missing({})) == [0]
    assert list(fleet.missing({})) == [0]
    assert asked == [("a", "s"), ("b", "s")]
    monkeypatch.undo()


def test_a_session_goes_on_with_the_bits_that_it_would_have_had(pair, last_layer):
    edges, fleet = pair
    ends = []
    for name, stays in (("s", True), ("t", False)):
        fleet.open(last_layer.spec(name), last_layer.start(), "a")
        remote = device(edges, name)
        remote.open()
        train(remote, last_layer, range(2))
        if not stays:
            remote.leave(edges["b"].address, "unannounced", step=2)
        train(remote, last_layer, range(2, 5))
        ends.append(fleet.collect(name, "a" if stays else "b"))
    assert ends[0].tensors().keys() == ends[1].tensors().keys()
    assert all(torch.equal(t, ends[1].tensors()[n]) for n, t in ends[0].tensors().items())


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("how", ["unannounced", "restart"])
def test_a_device_goes_on_where_edge_servers_serve_other_runs_too(pair, last_layer, how, ended):
    """A device's last place was looked up in the first fleet that had ever been there.

    Of every run but that one, nobody heard that a device was elsewhere: it waited until it gave up.
    """
    edges, _ = pair
    addresses = [EdgeAddress(name, edge.address) for name, edge in edges.items()]
    first, ours, last = (Fleet(addresses, control_token=TOKEN) for _ in range(3))
    if ended:
        first.close()
        last.close()
    ours.open(last_layer.spec(), last_layer.start(), "a")
    remote = device(edges)
    remote.open()
    train(remote, last_layer, range(2))
    if how == "restart":
        with pytest.raises(Moved) as moved:
            remote.leave(edges["b"].address, how, step=2)
        assert moved.value.step == 0
    else:
        remote.leave(edges["b"].address, how, step=2)
    (leaving,) = remote.traffic.moves
    assert (leaving.to, leaving.repeated_steps) == (edges["b"].address, 2 * (how == "restart"))
    until(lambda: ours._held["s"].edge == "b")
    for fleet in (first, ours, last):
        fleet.close()


def test_a_device_that_asks_while_it_moves_is_told_what_the_move_took(
    pair, last_layer, monkeypatch
):
    """An impatient device asked again, was sent on without a word of it, and told of 0 bytes.

    So in three of ten moves of `bench migration` all of the pause was the way to the edge servers.
    """
    edges, _ = pair
    addresses = [EdgeAddress(name, edge.address) for name, edge in edges.items()]
    far = {"mbit_s": 100.0, "latency_ms": 300.0}
    fleet = Fleet(addresses, control_token=TOKEN, between=far)
    fleet.open(last_layer.spec(), last_layer.start(), "a")
    remote = device(edges)
    remote.open()
    train(remote, last_layer, range(2))
    asked, ask = [], Asking.ask
    monkeypatch.setattr(Patience, "limit_s", 0.03)
    monkeypatch.setattr(Asking, "ask", lambda self, *a, **k: asked.append(k) or ask(self, *a, **k))
    remote.leave(edges["b"].address, "announced", step=2)
    monkeypatch.undo()
    assert asked, "it did not ask before it was told"
    (leaving,) = remote.traffic.moves
    assert leaving.bytes > 0
    assert {"freeze", "encode", "transfer", "restore", "reconnect"} <= leaving.parts.keys()
    assert sum(leaving.parts.values()) == pytest.approx(leaving.pause_s)
    fleet.close()


def test_links_between_edges_may_be_far_without_being_slow():
    """Where no rate was given, the latency was not heeded either."""
    peers = Peers("a", None, Limits())
    fleet = {"secret": 20 * "s", "edges": []}
    assert peers.tell(fleet).network is None
    assert peers.tell({**fleet, "latency_ms": 0.0}).network is None
    assert peers.tell({**fleet, "latency_ms": 5.0}).network == Network(latency_s=0.005)
    assert peers.tell({**fleet, "mbit_s": 8}).network == Network(8e6, 8e6)


def test_differences_are_exact_and_small():
    before = torch.randn(300, 40)
    after = before + 1e-4 * torch.randn(300, 40)
    packed = delta.encode({"w": after, "n": torch.tensor(3)}, {"w": before})
    found = delta.decode(packed, {"w": before})
    assert torch.equal(found["w"], after) and int(found["n"]) == 3
    assert sum(t.nbytes for t in packed.values()) < 0.9 * after.nbytes
