"""Devices that move between edge servers in the middle of a round train the model of those that
stay, to the bit."""

import threading
from dataclasses import replace

import pytest

from fedsys.errors import SessionError
from fedsys.offload import absences, mirror, mirroring
from fedsys.offload.remote import Remote
from fedsys.offload.session_table import SessionTable
from fedsys.planning.moves import Move
from tests.moving import Listed
from tests.small_runs import SMALL

RUN = (*SMALL, "client.batch_size=20", "client.epochs=2")
SPLIT = ("policy=fixed", "policy.cut=0.3", "num_edges=2")


@pytest.fixture
def still(model_of):
    """Return the model of devices that train alone and stay where they are."""
    return lambda *overrides: model_of(*RUN, *overrides)


@pytest.fixture
def travel(configure, carry_out):
    """Train with devices that move."""

    def travelled(*moves, more=()):
        return carry_out(configure(*RUN, *SPLIT, *more), mobility=Listed(moves))

    return travelled


@pytest.mark.parametrize(
    ("how", "at"),
    [
        ("announced", 0.0),
        ("announced", 0.5),
        ("announced", 1.0),
        ("foreseen", 0.5),
        ("unannounced", 0.5),
    ],
)
def test_a_move_changes_nothing_in_the_model(how, at, travel, still):
    run = travel(Move(0, 1, at, 1, how))
    (moved,) = run.figures["moves"]
    assert run.sha256 == still()
    assert run.figures["recoveries"] == []
    assert (moved["source"], moved["target"], moved["repeated_steps"]) == ("edge-0", "edge-1", 0)
    assert moved["step"] == int(at * 10)
    assert moved["pause_s"] > 0 and all(part >= 0 for part in moved["parts_s"].values())


@pytest.mark.parametrize("how", ["announced", "foreseen", "unannounced"])
def test_the_parts_of_a_pause_that_edges_measure_make_it_up(how, travel):
    """What was left over was called the way to the edge servers: so the parts could not but add up.

    And a device that left while its state was not yet sent ahead had the time before counted, too.
    Between these edge servers every word takes a while, so that the machine's load is little of it.
    """
    far = ("network.emulate=true", "fleet.between.latency_ms=200")
    run = travel(Move(0, 1, 0.5, 1, how), more=("rounds=1", *far))
    (moved,) = run.figures["moves"]
    parts = moved["parts_s"]
    assert moved["pause_s"] == pytest.approx(sum(parts.values()), rel=0.05)
    assert parts["transfer"] > 0.4 * moved["pause_s"] > 4 * parts["reconnect"]


def test_a_round_that_begins_anew_where_the_device_arrives_repeats_its_steps(travel, still):
    run = travel(Move(0, 1, 0.5, 1), more=("mobility=halfway", "mobility.mode=restart"))
    (moved,) = run.figures["moves"]
    assert run.sha256 == still()
    assert (moved["how"], moved["target"], moved["repeated_steps"]) == ("restart", "edge-1", 5)


SEVERAL = (
    Move(0, 1, 0.2, 1),
    Move(1, 1, 0.2, 0, "foreseen"),
    Move(0, 1, 0.6, 0, "unannounced"),
    Move(1, 1, 0.7, 1),
    Move(0, 2, 0.45, 1, "announced", piece=2),
    Move(1, 2, 0.5, 0, "unannounced", piece=1),
)


@pytest.mark.parametrize(
    "more",
    [
        ("schedule=pipelined", "schedule.micro_batches=4"),
        ("schedule=pipelined", "schedule.micro_batches=3", "client.label_private=true"),
        ("schedule.micro_batches=3", "client.clip_norm=0.5", "model.norm=deferred"),
        ("policy.codec=fp16", "strategy=fedprox"),
    ],
    ids=" ".join,
)
def test_devices_move_there_and_back_with_the_pipeline_full(more, travel, carry_out, configure):
    run = travel(*SEVERAL, more=more)
    assert run.sha256 == carry_out(configure(*RUN, *SPLIT, *more)).sha256
    assert [(m["client"], m["target"]) for m in run.figures["moves"]].count((1, "edge-0")) == 2
    assert len(run.figures["moves"]) == 6
    assert run.figures["recoveries"] == []


@pytest.mark.parametrize(
    "more",
    [
        ("schedule=pipelined", "schedule.micro_batches=3", "client.label_private=true"),
        ("client.clip_norm=0.5", "policy.codec=fp16", "fleet.replicate_every=2"),
    ],
    ids=" ".join,
)
def test_a_shadow_has_the_bits_of_its_session(more, travel, carry_out, configure, monkeypatch):
    """Also with pieces on their way; each move finds a shadow that is the same."""
    counted, count = [], SessionTable.count

    def note(table, event, by=1):
        counted.append(event)
        count(table, event, by)

    monkeypatch.setattr(SessionTable, "count", note)
    monkeypatch.setattr(mirror, "SETTLES_S", 60.0)
    for rule in ("keeps_up", "pays"):  # activations are larger than so small a model
        monkeypatch.setattr(mirroring, rule, lambda *sizes: True)
    moves = (
        Move(0, 1, 0.5, 1, "foreseen", notice=0.3),
        Move(0, 2, 0.5, 1, "foreseen", piece=2 * ("schedule=pipelined" in more), notice=0.3),
    )
    run = travel(*moves, more=("mobility=halfway", "mobility.mirror=true", *more))
    assert run.sha256 == carry_out(configure(*RUN, *SPLIT, *more)).sha256
    assert len(run.figures["moves"]) == 2
    assert counted.count("shadows_became") == 2 and "shadows_refused" not in counted


def cut_to(cut, *moves):
    return tuple(replace(move, cut=cut) for move in moves)


CUTS = (
    *cut_to(2, Move(0, 1, 0.3, 1), Move(1, 1, 0.2, 0, "unannounced")),
    *cut_to(1, Move(0, 1, 0.5, 0, "foreseen"), Move(1, 1, 0.4, 1, "announced", piece=1)),
    *cut_to(2, Move(0, 2, 0.1, 1), Move(1, 2, 0.9, 0)),
    *cut_to(1, Move(0, 2, 1.0, 0)),
)


@pytest.mark.parametrize(
    "more",
    [
        ("client.momentum=0.9", "client.clip_norm=0.5", "client.keep_optimizer=true"),
        ("strategy=fedprox", "client.label_private=true", "schedule.micro_batches=2"),
        ("client.optimizer=adam", "fleet.replicate_every=2", "model.norm=deferred"),
    ],
    ids=" ".join,
)
def test_the_cut_changes_where_a_device_arrives(more, travel, still):
    """Units go from the device to its edge and back, with all that is kept beside them."""
    pieces = ("schedule=pipelined", "schedule.micro_batches=2")
    run = travel(*CUTS, more=(*pieces, *more))
    kept = [one for one in more if "label_private" not in one and "replicate" not in one]
    assert run.sha256 == still(*pieces, *kept)
    assert run.figures["recoveries"] == []
    recut = [m for m in run.figures["moves"] if "recut" in m["parts_s"]]
    assert len(recut) >= 4
    for moved in recut:
        assert moved["pause_s"] >= moved["parts_s"]["recut"] > 0


def test_a_device_that_never_arrives_is_left_out_of_the_round(travel, monkeypatch):
    """The round waited for it until `runtime.timeout_s`, an hour."""
    monkeypatch.setattr(absences, "LEAST_S", 0.1)
    lost, go = threading.Event(), Remote._go

    def never(remote, leaving):
        remote.close()
        lost.wait(60)
        go(remote, leaving)

    monkeypatch.setattr(Remote, "_go", never)
    run = travel(Move(1, 1, 0.2, 0), more=("rounds=1",))
    lost.set()
    ((client, reason),) = run.lost[0].items()
    assert client == 1
    assert "it left edge-1 and arrived at no edge server within" in reason


def test_a_device_that_watches_its_link_goes_once_where_it_stays_poor(configure, carry_out, still):
    """It would go to and fro else, in each round and between two."""
    slow = ("network.emulate=true", "network.up_mbit_s=40", "network.down_mbit_s=40")
    own = ("mobility=network", "mobility.below_mbit_s=400", "mobility.steady_s=0")
    run = carry_out(configure(*RUN, *SPLIT, *slow, *own))
    assert run.sha256 == still()
    moves = run.figures["moves"]
    assert [(m["client"], m["round"], m["source"], m["target"]) for m in moves] == [
        (0, 1, "edge-0", "edge-1"), (1, 1, "edge-1", "edge-0")
    ]  # fmt: skip
    assert all("Mbit/s, less than 400" in m["why"] and not m["good_again"] for m in moves)
    assert run.figures["recoveries"] == []


def test_a_device_measures_the_latency_of_its_link_and_may_stay(configure, carry_out, still):
    slow = ("network.emulate=true", "network.latency_ms=30", "rounds=1")
    own = ("mobility=network", "mobility.below_mbit_s=null", "mobility.steady_s=0")
    for above, count in ((5, 2), (5000, 0)):
        run = carry_out(configure(*RUN, *SPLIT, *slow, *own, f"mobility.above_ms={above}"))
        assert len(run.figures["moves"]) == count
        assert all("ms, more than 5" in m["why"] for m in run.figures["moves"])
        assert run.figures["recoveries"] == []


def test_a_cut_for_which_the_new_edge_has_no_room_stays(travel, still, monkeypatch):
    """Units that came with a device were taken whatever `edge.max_session_bytes` said."""

    def full(table, nbytes):
        raise SessionError("edge-1 is full")

    monkeypatch.setattr(SessionTable, "check_growth", full)
    pieces = ("schedule=pipelined", "schedule.micro_batches=2")
    run = travel(*CUTS, more=pieces)
    assert run.sha256 == still(*pieces)
    assert run.figures["recoveries"] == []
    assert len(run.figures["moves"]) == len(CUTS)
