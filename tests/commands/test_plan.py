"""``fedsys plan``: what it says, in figures and in words."""

from __future__ import annotations

import json

import pytest

from fedsys.commands import plan
from fedsys.main import main
from fedsys.planning.assignment import Assignment
from fedsys.runs.lines import folded


def planned(capsys, *arguments):
    status = main(["plan", "model=vgg5", "json=true", *arguments])
    assert status == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_plans_of_two_networks_differ_and_say_why(capsys):
    slow = planned(capsys, "fleet=pi_lab", "network=4g")
    fast = planned(capsys, "fleet=pi_lab", "network=ethernet")
    assert all(row["edge"] is None for row in slow["devices"])
    assert any(row["edge"] is not None for row in fast["devices"])
    assert "on the uplink" in slow["devices"][0]["why"]
    assert "times faster than alone" in fast["devices"][3]["why"]
    assert fast["predicted_s"] <= fast["best_static_s"] <= fast["all_on_device_s"]
    for row in fast["devices"]:
        assert row["next_best"]["round_s"] >= row["round_s"] * 0.98
        assert {"device_s", "up_s", "edge_s", "down_s", "device_waits_s"} <= set(row)


def test_the_table_is_for_people(capsys):
    assert main(["plan", "model=vgg5", "fleet=pi3_lab", "network=wifi", "num_clients=2"]) == 0
    out = capsys.readouterr().out
    assert "next best" in out and "best for all alike" in out and "client 1 pi3" in out


def test_a_plan_says_for_which_data_it_is(capsys):
    assert main(["plan", "model=vgg5", "fleet=pi3_lab", "num_clients=2"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("vgg5 on digits 1x8x8 (") and "training examples) over none" in first


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_plan_fits_a_terminal(capsys, monkeypatch, columns):
    """Its table was cut off to a letter or two in each column."""
    found = planned(capsys, "fleet=pi_lab", "network=ethernet", "num_clients=5")
    monkeypatch.setattr(plan, "width_of", lambda stream: columns)
    monkeypatch.setattr(plan, "fitted", lambda text, stream: folded(text, columns))
    plan.show(found)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns and "…" not in out
    words = " ".join(out.split())
    assert "pi3 (client 3 to 4)" in words and "a mini-batch: device " in words
    for row in found["devices"]:
        assert plan._words(row) in words and plan._words(row["next_best"]) in words


def test_a_plan_says_which_link_each_device_has(capsys):
    """It said the name of ``network=`` while it planned for the links of the fleet file."""
    near = "{name: near, up_mbit_s: 500, down_mbit_s: 500}"
    links = f"fleet.links=[{near}, {{up_mbit_s: 1, down_mbit_s: 2}}]"
    own = planned(capsys, "fleet=pi3_lab", links, "num_clients=2")
    assert own["network"] == "near, 1/2 Mbit/s"
    assert [row["network"] for row in own["devices"]] == ["near", "1/2 Mbit/s"]
    assert own["devices"][0]["round_s"] < own["devices"][1]["round_s"]
    chosen = planned(capsys, "fleet=pi3_lab", links, "num_clients=2", "network=4g")
    assert chosen["network"] == "4g"
    plain = planned(capsys, "fleet=pi3_lab", "num_clients=2", "network=4g")
    assert chosen["predicted_s"] == plain["predicted_s"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["fleet=local"], "fleet.devices=[]: must name machines"),
        (["fleet=pi_lab", "fleet.devices=[pi5]"], "fleet.devices[0]=pi5: must be one of"),
        (["fleet=pi_lab", "fleet.machines.pi4.macs_per_s=0"], "macs_per_s=0: must be more than 0"),
        (["fleet=pi_lab", "~fleet.machines.pi4.macs_per_s"], "macs_per_s=None: must be given"),
        (
            ["fleet=pi_lab", "fleet.links=[{name: a}]"],
            "fleet.links[0].up_mbit_s=None: must be given",
        ),
        (
            ["fleet=pi_lab", "fleet.links=[{up_mbit_s: 1, down_mbit_s: 0}]"],
            "fleet.links[0].down_mbit_s=0.0: must be given, above 0",
        ),
        (
            ["fleet=pi_lab", "fleet.links=[{up_mbit_s: 1, down_mbit_s: 1, emulate: true}]"],
            "fleet.links[0].emulate=True: must be left out",
        ),
        (
            ["fleet=pi_lab", "fleet.links=[{up_mbit_s: 1, down_mbit_s: 1, latency_ms: -1}]"],
            "fleet.links[0].latency_ms=-1.0: must not be negative",
        ),
        (
            [
                "fleet=pi_lab",
                "fleet.links=[{up_mbit_s: 1, down_mbit_s: 1}]",
                "network.latency_ms=5",
            ],
            "network=none: must be chosen",
        ),
        (["fleet=pi_lab", "fleet.servers=[]"], "fleet.servers=[]: must name"),
        (["fleet=pi_lab", "policy=auto", "policy.codec=zip"], "policy.codec=zip: must be one of"),
        (
            ["fleet=pi_lab", "policy=auto", "policy.micro_batches=[99]"],
            "schedule.micro_batches=99: must be from 1 to client.batch_size=32",
        ),
        # was planned with labels on the uplink, and one way to the edge of two
        (
            ["fleet=pi_lab", "policy=fixed", "policy.cut=2", "client.label_private=true"],
            "client.label_private=True: cannot be planned: every piece goes to the edge twice",
        ),
    ],
)
def test_what_cannot_be_planned_is_said_with_status_two(capsys, arguments, names):
    assert main(["plan", "model=vgg5", *arguments]) == 2
    assert names in capsys.readouterr().err


def test_a_fixed_plan_is_timed_beside_the_best(capsys):
    """It was planned as auto would, and nothing told that the cut of the user was another."""
    asked = ("fleet=pi_lab", "network=ethernet", "policy=fixed", "num_clients=2")
    deep = planned(capsys, *asked, "policy.cut=[1,5]", "policy.micro_batches=2")
    assert [row["cut"] for row in deep["devices"]] == [1, 5] and deep["method"] == "fixed"
    assert [row["micro_batches"] for row in deep["devices"]] == [2, 1]
    assert "policy.cut=1 says so" in deep["devices"][0]["why"]
    auto = planned(capsys, *asked[:2], "policy=auto", "num_clients=2", "policy.micro_batches=2")
    assert deep["best_s"] == auto["predicted_s"] < deep["predicted_s"]
    assert deep["regret"] == pytest.approx(deep["predicted_s"] / deep["best_s"] - 1)
    assert "policy=auto would take" in deep["why"]
    assert main(["plan", "model=vgg5", *asked, "policy.cut=0"]) == 2
    assert "policy.cut=0: cannot be planned at 0" in capsys.readouterr().err


class Halves:
    """A policy that trains alone at first, and is cut deeper with each round."""

    def __init__(self, num_edges, config, examples):
        self.examples = examples

    def init(self, layers, nodes):
        return len(layers)

    def plan(self, state, seen):
        return max(1, state - 1), {node: Assignment(state, micro_batches=2) for node in seen}

    def reasons(self, state, clients):
        return {0: f"because it is at {state}"}


def test_a_policy_that_learns_decides_on_the_virtual_clock_before_its_plan_is_shown(capsys):
    """It was planned as ``policy=auto`` would, and called that."""
    target = f"+policy._target_={Halves.__module__}.Halves"
    given = ("policy=none", "policy.kind=own", target, "fleet=pi_lab", "network=wifi")
    found = planned(capsys, *given, "num_clients=2")
    assert (found["method"], found["rounds"]) == ("own", plan.ROUNDS)
    assert [row["cut"] for row in found["devices"]] == [1, 1]
    assert [row["micro_batches"] for row in found["devices"]] == [2, 2]
    assert found["devices"][0]["why"] == "because it is at 1"
    assert "slower than alone" in found["devices"][1]["why"]
    assert found["regret"] >= 0 and found["decide_ms"] > 0
    assert "round 30 on the virtual clock" in found["how"]
    usual = planned(capsys, "policy=auto", "fleet=pi_lab", "network=wifi", "num_clients=2")
    assert usual["predicted_s"] <= found["predicted_s"] and "regret" not in usual


def test_a_bandit_is_shown_with_what_it_comes_to_and_why(capsys):
    given = ("policy=bandit", "fleet=pi_lab", "network=wifi", "data=synthetic_32x32")
    found = planned(capsys, *given, "num_clients=5", "client.batch_size=100")
    assert found["method"] == "bandit" and found["regret"] <= 0.1
    assert found["predicted_s"] <= found["all_on_device_s"]
    assert all("s alone" in row["why"] for row in found["devices"])
