"""Moves that a policy orders: only where they shorten the round, with what they cost in it."""

import dataclasses

import pytest

from fedsys.planning.assignment import Assignment
from fedsys.planning.moves import Move
from fedsys.planning.ordering import Order, ordered
from fedsys.planning.virtual_clock import Ways, virtual_round
from fedsys.planning.workload import EdgeLink
from strategies.policies.planned import Planned
from tests.planning.test_handing_over import ONE, load_of

FAST = EdgeLink(1e9, 0.0)
AT_0 = Assignment(1, 0, micro_batches=1)
AT_1 = Assignment(1, 1, micro_batches=1)
BUSY = dataclasses.replace(ONE, workers=1)


def crowded(between=FAST):
    """Return two devices with much to do at one edge server, and one with little at the other."""
    return load_of(80, 80, 8, edges=(BUSY, BUSY), between=between), [AT_0, AT_0, AT_1]


def test_a_device_goes_where_an_edge_server_has_become_idle():
    load, choices = crowded()
    first, *others = ordered(load, choices, {0, 1, 2}, 3)
    assert (first.move.edge, first.move.round, first.move.how) == (1, 3, "foreseen")
    assert {order.move.client for order in (first, *others)} <= {0, 1}
    ways = Ways({order.move.client: (order.move,) for order in (first, *others)})
    played = virtual_round(load, choices, ways=ways)
    assert played.seconds <= 0.95 * virtual_round(load, choices).seconds
    assert first.after_s < first.before_s


def test_nobody_goes_where_that_costs_more_than_it_saves():
    load, choices = crowded(EdgeLink(10.0, 0.0))  # a session takes minutes
    assert ordered(load, choices, {0, 1, 2}, 1) == ()
    load, choices = crowded()
    assert ordered(load, choices, {2}, 1) == ()  # whoever is last is where mobility has it be
    assert ordered(load, [AT_0, AT_1, AT_1], {0, 1, 2}, 1, hysteresis=0.9) == ()


def test_a_move_that_is_ordered_changes_nothing_in_the_model(configure, carry_out, monkeypatch):
    common = (
        "data.max_examples=120", "rounds=1", "num_clients=2", "client.epochs=2",
        "client.batch_size=20", "model.width=4", "model.hidden=16", "fleet=pi3_lab",
    )  # fmt: skip
    split = ("policy=auto", "policy.offload=forced", "policy.migrate=true", "num_edges=2")

    def orders(policy, state, clients, free, round_):
        assert list(free) == list(clients)
        return {0: Order(Move(0, round_, 0.5, 1 - state["choices"][0][1], "foreseen"), 10.0, 8.0)}

    alone = carry_out(configure(*common)).sha256
    monkeypatch.setattr(Planned, "orders", orders)
    run = carry_out(configure(*common, *split))
    assert run.sha256 == alone
    (moved,) = run.figures["moves"]
    assert (moved["client"], moved["how"], moved["at"]) == (
        0,
        "foreseen",
        pytest.approx(0.5, abs=0.2),
    )
