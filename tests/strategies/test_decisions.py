"""What a run tells of the decisions of its policy."""

from __future__ import annotations

import dataclasses

import pytest

from fedsys.runs import decisions
from fedsys.runs.folder import RunFolder
from fedsys.runtime import run
from strategies.policies.policy import Assignment

RUN = (
    "schedule=pipelined", "num_clients=2", "data=synthetic",
    "data.examples=400", "data.test_examples=20", "data.shape=[1,8,8]", "model=cnn",
    "client.batch_size=16", "client.epochs=1",
    "run.plots=false", "json=true",
)  # fmt: skip
FLEET = (
    "fleet=nominal", "fleet.devices=[pi3,pi3]", "network=ethernet", "network.trace=[[2,0.2,0.2]]",
    "network.trace_by=rounds",
)  # fmt: skip


class OfOwn:
    """A policy that says what it sends, and why for one of its devices."""

    def __init__(self, num_edges, config, examples):
        self.num_edges = num_edges

    def init(self, layers, nodes):
        return {"rounds": 0}

    def plan(self, state, seen):
        state = {"rounds": state["rounds"] + 1}
        return state, {node: Assignment(2, edge=node) for node in seen}

    def reasons(self, state, clients):
        return {0: f"in its round {state['rounds']}"}

    def probe_bytes(self, state):
        return 1000 * state["rounds"]


@pytest.fixture
def done(configure, tmp_path):
    def train(*options, name="run", fleet=FLEET):
        folder = tmp_path / name
        run(configure(*RUN, *fleet, *options, f"run.dir={folder}"))
        return RunFolder.open(folder), decisions.read(folder)

    return train


def test_each_device_has_its_decision_in_each_round_with_the_oracles(done):
    folder, made = done("policy=auto", "rounds=4")
    assert [(entry.round, entry.client) for entry in made] == [
        (n, k) for n in (1, 2, 3, 4) for k in (0, 1)
    ]
    rows = folder.rounds()
    by_round = {n: [entry for entry in made if entry.round == n] for n in (1, 2, 3, 4)}
    first, third, fourth = by_round[1], by_round[3], by_round[4]
    assert {entry.machine for entry in made} == {"pi3"}
    assert all(entry.seen_up_mbit_s is None and entry.iteration_s is None for entry in first)
    assert [entry.up_mbit_s for entry in first] == [1000.0, 1000.0]
    assert third[0].seen_up_mbit_s == pytest.approx(1000.0)  # what the round before has shown
    assert [entry.up_mbit_s for entry in third] == pytest.approx([0.2, 0.2])
    assert fourth[0].seen_up_mbit_s == pytest.approx(0.2)
    # told the truth the planner is the oracle, but for the round in which the network fails
    assert [row["regret"] < 0.01 for row in rows] == [True, True, False, True]
    for n, row in enumerate(rows, start=1):
        assert max(entry.measured_s for entry in by_round[n]) == row["virtual_s"]
        best = max(entry.oracle_s for entry in by_round[n])
        assert row["regret"] == pytest.approx(row["virtual_s"] / best - 1)
        assert row["decide_ms"] > 0 and row["probe_bytes"] == 0
    for entry in made:
        assert entry.reason.endswith(".") is False and len(entry.reason) > 20
        assert entry.whole == (entry.device_share == 1.0) == (entry.edge == "")
        assert entry.predicted_s > 0
    result = folder.info["result"]
    assert result["regret"] == pytest.approx(sum(row["regret"] for row in rows) / 4)
    assert result["decide_ms"] > 0 and result["probe_bytes"] == 0


def test_a_run_that_continues_goes_on_with_its_decisions(done, configure, tmp_path):
    _, whole = done("policy=auto", "rounds=4", name="whole")
    done("policy=auto", "rounds=2", name="parts")
    folder = tmp_path / "parts"
    decisions.write(folder, [dataclasses.replace(whole[0], round=9)])  # of a round that is lost
    run(configure(*RUN, *FLEET, "policy=auto", "rounds=4", f"run.dir={folder}", f"resume={folder}"))
    assert decisions.read(folder) == whole


def test_policies_of_ones_own_say_what_they_know(done):
    target = f"{OfOwn.__module__}.OfOwn"
    folder, made = done("policy=none", "policy.kind=own", f"+policy._target_={target}", "rounds=2")
    assert [entry.reason for entry in made] == [
        "in its round 1", "as policy.kind=own decides",
        "in its round 2", "as policy.kind=own decides",
    ]  # fmt: skip
    assert [row["probe_bytes"] for row in folder.rounds()] == [1000, 2000]
    assert folder.info["result"]["probe_bytes"] == 3000
    assert all(row["regret"] >= 0 for row in folder.rounds())


def test_without_a_fleet_or_an_oracle_decisions_stand_alone(done):
    fixed = ("policy=fixed", "policy.cut=conv2", "rounds=1")
    folder, made = done(*fixed, name="a", fleet=())
    assert [entry.unit for entry in made] == ["conv2", "conv2"]
    assert made[0].reason == "policy.cut=conv2 says so"
    assert made[0].oracle_s is made[0].predicted_s is made[0].up_mbit_s is None
    assert made[0].measured_s > 0  # by the clock of this machine
    assert not {"regret", "decide_ms", "probe_bytes"} & set(folder.rounds()[0])
    folder, made = done(*fixed, "run.oracle=false", name="b")
    assert made[0].oracle_cut is None and made[0].predicted_s > 0
    assert "regret" not in folder.rounds()[0] and folder.rounds()[0]["decide_ms"] > 0
    assert "regret" not in folder.info["result"]
    folder, made = done("policy=none", "rounds=1", name="c")
    assert made == [] and "decide_ms" not in folder.rounds()[0]
    assert not (folder.path / decisions.FILE).exists()
