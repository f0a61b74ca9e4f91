"""Whichever request between server app and edge servers is lost, the run ends with its model.

Two resets within half a second, while a session was being opened, ended a run whose edge servers
were both alive: the link of the first was lost, the session was asked of the second, its link was
lost too, and the run took the answer of the last edge that it had asked for that of all. Each row
of the table is a request, the moment at which its link is cut, and how many links in a row are;
all must end with the hash of plain training and with the scores of an undisturbed run.
"""

import threading

import pytest

from fedsys.config import EdgeAddress, EdgeConfig
from fedsys.errors import LinkClosed, RuntimeFailure
from fedsys.offload import fleet_edges
from fedsys.offload.edge import EdgeServer
from fedsys.offload.fleet import Fleet
from fedsys.offload.held_sessions import HeldSessions
from fedsys.transport.addresses import dial
from fedsys.transport.link_around import LinkAround
from strategies.edge_loss import ATTEMPTS
from tests.waiting import until

SMALL = (
    "data.max_examples=200", "rounds=2", "num_clients=2", "client.epochs=1", "model.width=4",
    "model.hidden=16", "strategy.fraction_evaluate=1", "json=true",
)  # fmt: skip
SPLIT = ("policy=fixed", "policy.cut=0.3", "num_edges=2")
REQUESTS = {"control": "ready", "open": "opened", "collect": "state", "release": "released"}
NAMES = ("first", "second")
WAIT_S = 60.0


class Cuts:
    """Cuts links of a server app at one kind of frame, whichever edge it is for.

    Args:
        kind: The frame.
        skipped: How many of them pass before.
        count: How many links are cut then, each as it carries its next such frame.
    """

    def __init__(self, kind, skipped, count):
        self.kind, self.skipped, self.left, self.done = kind, skipped, count, 0
        self._lock = threading.Lock()

    def due(self, kind):
        with self._lock:
            if kind != self.kind or not self.left:
                return False
            if self.skipped:
                self.skipped -= 1
                return False
            self.left -= 1
            self.done += 1
            return True


class CutLink(LinkAround):
    def __init__(self, inner, cuts):
        super().__init__(inner)
        self._cuts = cuts

    def send(self, frame):
        if self._cuts.due(frame.kind):
            self.inner.close()
            raise LinkClosed("cut before a request")
        super().send(frame)

    def recv(self, timeout_s=None):
        frame = self.inner.recv(timeout_s)
        if self._cuts.due(frame.kind):
            self.inner.close()
            raise LinkClosed("cut before an answer")
        return frame


@pytest.fixture
def edges():
    """Return the addresses of two edge servers, and the servers."""
    servers = [EdgeServer(n, f"memory://{n}-of-lost", control_token="t") for n in NAMES]
    yield [EdgeAddress(s.name, s.address) for s in servers], servers
    for server in servers:
        server.kill()


@pytest.fixture
def cut(monkeypatch):
    """Return a function that has links of server apps cut from now on."""

    def begin(cuts):
        connect = lambda address, **options: CutLink(dial(address, **options), cuts)  # noqa: E731
        monkeypatch.setattr(fleet_edges, "dial", connect)

    return begin


@pytest.fixture
def split(edges, configure, carry_out, cut, monkeypatch):
    """Return a function that trains with edges whose links are cut."""

    def train(cuts, *more):
        monkeypatch.setattr(fleet_edges, "LAST_REDIALS", 1)
        cut(cuts)
        with Fleet(edges[0], control_token="t") as fleet:
            run = carry_out(configure(*SMALL, *SPLIT, *more), fleet)
            fleet.revive()
            assert not any(server.sessions for server in edges[1]), "sessions are left behind"
        return run

    return train


_known = {}


@pytest.fixture
def plain(configure, carry_out):
    if not _known:
        _known["run"] = carry_out(configure(*SMALL))
    return _known["run"]


def scores(run):
    """Return what the clients found when they evaluated, by round."""
    return [(row["clients_eval_loss"], row["clients_eval_accuracy"]) for row in run.rows]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", [*REQUESTS, *REQUESTS.values()])
def test_a_lost_request_costs_time_alone(kind, count, split, plain):
    cuts = Cuts(kind, 0 if kind in ("control", "ready") and count < 3 else 1, count)
    run = split(cuts)
    assert cuts.done == count or kind in ("control", "ready")
    assert run.sha256 == plain.sha256
    assert run.lost == [{}, {}]
    assert scores(run) == scores(plain)


@pytest.mark.parametrize("kind", ["opened", "release"])
def test_a_session_is_not_left_where_the_edge_is_reached_again_at_once(
    kind, edges, last_layer, cut, monkeypatch
):
    """It was released by whoever made the link again, if it was noted as left before that.

    The thread whose request was lost may come later, on a machine that is busy. Then an edge that
    could be reached kept a session of nobody for a quarter of an hour.
    """
    leave = HeldSessions.leave

    def late(held, session, edge):
        until(lambda: not fleet._edges.clients[edge].lost)
        for thread in threading.enumerate():
            if thread.name == f"recover-{edge}":
                thread.join(WAIT_S)
        leave(held, session, edge)

    cuts = Cuts(kind, 0, 1)
    monkeypatch.setattr(HeldSessions, "leave", late)
    cut(cuts)
    with Fleet(edges[0], control_token="t") as fleet:
        other = fleet.open(last_layer.spec(), last_layer.start(), "first")
        if kind == "release":
            fleet.release("s")
        assert cuts.done == 1
        assert edges[1][0].sessions == []
        assert edges[1][1].sessions == (["s"] if other == "second" else [])


def test_without_a_session_ever_devices_train_alone(split, plain):
    run = split(Cuts("open", 0, 10**6))
    assert run.sha256 == plain.sha256
    assert {e["what"] for e in run.figures["recoveries"]} == {"alone"}


def test_a_device_that_is_too_small_is_left_out_when_its_edges_cannot_be_reached(split):
    with pytest.raises(RuntimeFailure, match="no edge server is left, and the model"):
        split(Cuts("open", 0, 10**6), "client.max_model_bytes=1000")


def test_a_device_that_is_too_small_is_not_left_out_for_one_lost_link(split, plain):
    """The session of its repeat was asked for once, and then it was said that no edge is left."""
    run = split(Cuts("state", 1, 2 * ATTEMPTS), "client.max_model_bytes=1000")
    assert run.sha256 == plain.sha256
    assert run.lost == [{}, {}]


def test_an_edge_that_is_full_in_a_later_round_does_not_end_the_run(
    edges, configure, carry_out, plain
):
    """Others may fill it. At the beginning it is an error: there are too few, or too small ones."""
    (first, *_), servers = edges

    def fill(_):
        servers[0]._table._limits = EdgeConfig(max_sessions=1)

    with Fleet([first], control_token="t") as fleet:
        open_, opened = fleet.open, []

        def open_at(spec, *more):
            opened.append(spec)
            if spec.round == 2:
                fill(spec)
            return open_(spec, *more)

        fleet.open = open_at
        run = carry_out(configure(*SMALL, *SPLIT), fleet)
    assert run.sha256 == plain.sha256
    assert [(e["round"], e["what"]) for e in run.figures["recoveries"]] == [(2, "alone")]
