"""Whatever fails while a device moves costs time and never changes the model."""

import threading
from dataclasses import replace

import pytest

from fedsys.errors import LinkClosed, SessionError
from fedsys.offload import fleet_edges, mirroring
from fedsys.offload import opening as edges
from fedsys.offload.edge_departures import Departures
from fedsys.offload.mirror import Mirror
from fedsys.offload.peers import Peers
from fedsys.planning.moves import Move
from tests.moving import Listed
from tests.small_runs import SMALL

RUN = (
    *(*SMALL, "client.batch_size=20", "client.epochs=2", "rounds=1"),
    *("policy=fixed", "policy.cut=0.3", "num_edges=2"),
)


@pytest.fixture
def servers(monkeypatch):
    """Return the edge servers of the runs of a test, by name."""
    monkeypatch.setattr(fleet_edges, "REDIAL_S", (0.0,))
    found, start = {}, edges._start

    def started(*arguments):
        server = start(*arguments)
        found[server.name] = server
        return server

    monkeypatch.setattr(edges, "_start", started)
    return found


@pytest.fixture
def still(model_of):
    return model_of(*RUN)


@pytest.fixture
def strike(monkeypatch, servers):
    """Let a fault strike once, at a message between edge servers."""
    struck = []

    def armed(kind, fault):
        ask = Peers.ask

        def asked(peers, group, name, question):
            if question.kind != kind or struck:
                return ask(peers, group, name, question)
            struck.append(kind)
            return fault(lambda q: ask(peers, group, name, q), question, servers, peers.name, name)

        monkeypatch.setattr(Peers, "ask", asked)
        return struck

    return armed


def refused(ask, question, servers, source, target):
    raise SessionError("there is no room")


def lost_before(ask, question, servers, source, target):
    raise LinkClosed("lost on its way")


def answer_lost(ask, question, servers, source, target):
    ask(question)
    raise LinkClosed("the answer is lost")


def twice(ask, question, servers, source, target):
    ask(question)
    return ask(question)


def damaged(ask, question, servers, source, target):
    tensors = {name: tensor.clone() for name, tensor in question.tensors.items()}
    first = next(t for t in tensors.values() if t.is_floating_point() and t.numel())
    first.view(-1)[0] += 1
    return ask(replace(question, tensors=tensors))


def of_another_version(ask, question, servers, source, target):
    return ask(replace(question, meta={**question.meta, "schema": 0}))


def of_another_step(ask, question, servers, source, target):
    return ask(replace(question, meta={**question.meta, "step": 1}))


def target_dies_before(ask, question, servers, source, target):
    servers[target].kill()
    return ask(question)


def target_dies_after(ask, question, servers, source, target):
    answer = ask(question)
    servers[target].kill()
    return answer


def source_dies_before(ask, question, servers, source, target):
    servers[source].kill()
    return ask(question)


def source_dies_after(ask, question, servers, source, target):
    answer = ask(question)
    servers[source].kill()
    return answer


FAULTS = [
    *(("prepare", fault) for fault in (refused, lost_before, answer_lost, twice)),
    *(("prepare", fault) for fault in (target_dies_before, source_dies_before)),
    *(("transfer", fault) for fault in (refused, lost_before, answer_lost, twice, damaged)),
    *(("transfer", fault) for fault in (of_another_version, of_another_step)),
    *(("transfer", fault) for fault in (target_dies_before, target_dies_after)),
    *(("transfer", fault) for fault in (source_dies_before, source_dies_after)),
    *(("release", fault) for fault in (lost_before, answer_lost, twice, source_dies_before)),
]


@pytest.mark.parametrize(("kind", "fault"), FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_fault_of_an_announced_move_does_not_change_the_model(
    kind, fault, configure, carry_out, still, strike
):
    struck = strike(kind, fault)
    run = carry_out(configure(*RUN), mobility=Listed((Move(0, 1, 0.5, 1),)))
    assert struck == [kind]
    assert run.sha256 == still
    assert run.lost == [{}]


@pytest.mark.parametrize(
    "fault", [lost_before, answer_lost, twice, target_dies_before], ids=lambda v: v.__name__
)
def test_a_fault_of_a_move_that_nobody_announced_does_not_change_the_model(
    fault, configure, carry_out, still, strike
):
    """The edge server at which the device appears asks the one that it left: the *target* here."""
    struck = strike("fetch", fault)
    more = ("fleet.replicate_every=2",)
    run = carry_out(configure(*RUN, *more), mobility=Listed((Move(0, 1, 0.5, 1, "unannounced"),)))
    assert struck == ["fetch"]
    assert run.sha256 == still
    assert run.lost == [{}]


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("ahead", answer_lost),
        *(("mirror", fault) for fault in (answer_lost, twice, target_dies_before)),
        *(("transfer", fault) for fault in (answer_lost, source_dies_after)),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_fault_of_a_session_with_a_shadow_does_not_change_the_model(
    kind, fault, configure, carry_out, still, strike, monkeypatch
):
    """The device goes on when there is a shadow: else it had often left before that."""
    asked, start, begun = Departures.asked, Mirror.start, threading.Event()

    def goes_on(departures, name, frame):
        asked(departures, name, frame)
        assert frame.kind != "foresee" or kind == "ahead" or begun.wait(60.0)

    def started(mirror, difference):
        start(mirror, difference)
        begun.set()

    monkeypatch.setattr(Departures, "asked", goes_on)
    monkeypatch.setattr(Mirror, "start", started)
    for rule in ("keeps_up", "pays"):  # activations are larger than so small a model
        monkeypatch.setattr(mirroring, rule, lambda *sizes: True)
    struck = strike(kind, fault)
    move = Move(0, 1, 0.5, 1, "foreseen", notice=0.3)
    more = ("mobility=halfway", "mobility.mirror=true")
    run = carry_out(configure(*RUN, *more), mobility=Listed((move,)))
    assert struck == [kind]
    assert run.sha256 == still
    assert run.lost == [{}]
