"""Whatever fails in split training costs time and never changes the model.

Each row is a fault; all rows of a table train the same configuration, whose model must be, to the
bit, that of the same run without faults and without edge servers.
"""

import pytest

from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.faults import AT_EDGE, KINDS
from tests.small_runs import SMALL

SPLIT = ("policy=fixed", "policy.cut=0.3", "num_edges=2")


def fault(kind, position, **more):
    values = {"kind": kind, "who": 0, "round": 2, "step": 1, "position": position, **more}
    return "faults.list=[" + ",".join([f"{{{pairs(values)}}}"]) + "]"


def pairs(values):
    return ",".join(f"{key}:{'null' if value is None else value}" for key, value in values.items())


@pytest.fixture
def train(configure, carry_out):
    """Train without what a run folder needs."""
    return lambda *overrides: carry_out(configure(*SMALL, *overrides))


_undisturbed = {}


@pytest.fixture
def undisturbed(train):
    """Return the model of plain training, without edges and faults."""

    def model(*overrides):
        if overrides not in _undisturbed:
            _undisturbed[overrides] = train(*overrides).sha256
        return _undisturbed[overrides]

    return model


TABLE = [
    (kind, position)
    for kind, about in KINDS.items()
    if about.target in ("edge", "link")
    for position in about.positions
]


@pytest.mark.parametrize(("kind", "position"), TABLE)
def test_a_fault_does_not_change_the_model(kind, position, train, undisturbed):
    run = train(*SPLIT, fault(kind, position))
    assert run.sha256 == undisturbed()
    assert [f["fired"] for f in run.faults] == [True]


@pytest.mark.parametrize("link", ["memory", "grpc", "tcp"])
def test_sessions_of_a_killed_edge_go_on_at_the_other_one_within_moments(link, train, undisturbed):
    run = train(*SPLIT, f"link={link}", "faults=edge_killed")
    (entry,) = run.figures["recoveries"]
    assert run.sha256 == undisturbed()
    assert (entry["what"], entry["client"], entry["round"]) == ("edge", 0, 2)
    assert (entry["from"], entry["to"]) == ("edge-0", "edge-1")
    assert entry["repeated_steps"] == 1  # from the start of the round
    assert entry["seconds"] < 30


def test_a_replica_spares_the_steps_before_it(train, undisturbed):
    more = ("client.epochs=2", "data.max_examples=260")
    strikes = fault("edge_killed", "after_compute", step=3)
    run = train(*SPLIT, *more, "fleet.replicate_every=2", strikes)
    (entry,) = run.figures["recoveries"]
    assert run.sha256 == undisturbed(*more)
    assert entry["repeated_steps"] == 1


def test_without_an_edge_devices_finish_alone_and_go_on_alone(train, undisturbed):
    alone = ("rounds=3", "num_edges=1")
    run = train(*SPLIT, *alone, "faults=edge_killed")
    assert run.sha256 == undisturbed("rounds=3")
    told = [(e["round"], e["client"], e["what"], e["to"]) for e in run.figures["recoveries"]]
    assert told == [
        (2, 0, "repeat", "device"),
        (2, 1, "repeat", "device"),
        (3, 0, "alone", "device"),
        (3, 1, "alone", "device"),
    ]


def test_a_device_too_small_for_the_whole_model_is_left_out_and_that_is_said(train):
    # device 1 has the whole model and never needs an edge
    small = ("policy.cut=[1,4]", "num_edges=1", "client.max_model_bytes=1000", "rounds=3")
    run = train(*SPLIT, *small, "faults=edge_killed")
    gone = [fault("device_killed", "before", round=r).removeprefix("faults.list=") for r in (2, 3)]
    planned = f"faults.list=[{','.join(g.strip('[]') for g in gone)}]"
    assert run.sha256 == train("rounds=3", planned).sha256
    assert [list(lost) for lost in run.lost] == [[], [0], [0]]
    assert "no edge server is left, and the model is larger" in run.lost[1][0]


def test_a_run_whose_devices_are_all_too_small_fails_with_the_reason(train):
    small = ("num_edges=1", "client.max_model_bytes=1000", "rounds=3")
    with pytest.raises(RuntimeFailure, match="no edge server is left, and the model is larger"):
        train(*SPLIT, *small, "faults=edge_killed")


def test_several_faults_in_one_round_strike_one_after_the_other(train, undisturbed):
    listed = [
        {"kind": "link_cut", "who": 1, "round": 1, "step": 0, "position": "after_compute"},
        {"kind": "link_corrupted", "who": 1, "round": 1, "step": 1},
        {"kind": "edge_killed", "who": 1, "round": 1, "step": 2},
        {"kind": "link_slow", "who": 1, "round": 1, "step": 2, "position": "receive"},
        {"kind": "link_cut", "who": 0, "round": 1, "step": 2, "seconds": 0.1},
    ]
    planned = ",".join(f"{{{pairs(values)}}}" for values in listed)
    run = train(*SPLIT, f"faults.list=[{planned}]")
    assert run.sha256 == undisturbed()
    assert all(f["fired"] for f in run.faults)


@pytest.mark.parametrize("step", [None, 1])
def test_a_killed_device_is_left_out_as_in_plain_training(step, train):
    killed = fault("device_killed", "before", step=step)
    assert train(*SPLIT, killed).sha256 == train(killed).sha256


@pytest.mark.parametrize("position", ["before_receive", *AT_EDGE])
def test_clipped_label_private_micro_batches_survive_a_cut_link(position, train, undisturbed):
    more = ("client.clip_norm=0.5", "schedule=pipelined", "schedule.micro_batches=3")
    run = train(*SPLIT, *more, "client.label_private=true", fault("link_cut", position))
    assert run.sha256 == undisturbed(*more)


def test_a_fault_of_split_training_is_refused_without_split_training(configure):
    with pytest.raises(ConfigError, match=r"edge_killed: must not stand there without edge serv"):
        configure("faults=edge_killed")


def test_an_edge_that_does_not_exist_cannot_be_killed(configure):
    with pytest.raises(ConfigError, match="its name or its index, 0 to 1"):
        configure(*SPLIT, fault("edge_killed", "after_step", who=2))


def test_an_emulated_network_does_not_change_the_model(train, undisturbed):
    fast = ("network=ethernet", "network.emulate=true")
    run = train(*SPLIT, *fast, fault("link_cut", "after_compute"))
    assert run.sha256 == undisturbed()
