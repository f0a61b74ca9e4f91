"""What stands above the rounds of a run."""

from types import SimpleNamespace

from fedsys.config import compose_text, parse
from fedsys.runs.decisions import read_plan
from strategies.heading import Plans, surroundings
from strategies.offload import Offload

CUT = {"index": 1, "unit": "conv1", "device_share": 0.1, "machine": "pi3"}


def lines(*overrides):
    return surroundings(parse(compose_text(" ".join(overrides))))


def test_a_plain_run_has_no_surroundings():
    assert lines("rounds=3") == []


def test_a_split_run_names_policy_edges_link_fleet_and_network():
    assert lines("policy=fixed", "num_edges=2", "link=tcp") == [
        "policy fixed, schedule sequential, 2 edge servers, link tcp"
    ]
    assert lines("policy=auto", "fleet=pi_lab", "network=wifi", "num_clients=5") == [
        "policy auto, schedule sequential, 1 edge server, link memory",
        "fleet of 2 pi4, 1 jetson, 2 pi3, edge 1 edge_cpu, network wifi 50/50 Mbit/s, 3 ms",
    ]
    emulated = lines("policy=fixed", "network=4g", "network.emulate=true")
    assert len(emulated) == 2 and emulated[1].startswith("links emulated as 4g ")


def test_a_plan_is_told_once_and_again_where_it_changes(tmp_path):
    offload = Offload.__new__(Offload)
    offload.totals = SimpleNamespace(cuts={"0": dict(CUT), "1": dict(CUT)})
    offload.assigned, offload.lost = {0: None, 1: None}, {}
    said = []
    plans = Plans(parse(compose_text("policy=auto fleet=pi_lab")), offload, said.append, tmp_path)
    plans.tell(1)
    plans.tell(2)
    assert said == ["pi3 (clients 0, 1): cut 1 after conv1, 10% of the work on the device"]
    offload.totals.cuts["1"] = {**CUT, "index": 5, "device_share": 1.0}
    plans.tell(3)
    assert said[1:] == ["round 3, planned anew: pi3 (client 1): the whole model on the device"]
    assert read_plan(tmp_path) == (3, {0: CUT, 1: {**CUT, "index": 5, "device_share": 1.0}})
