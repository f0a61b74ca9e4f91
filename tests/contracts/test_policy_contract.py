"""What every offloading policy promises, whatever it decides by."""

import copy
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys import models
from fedsys.config import compose_text, parse
from fedsys.errors import ConfigError, ModelError
from fedsys.models.layers import layered
from fedsys.runs.trees import keepable
from fedsys.transport.codecs import CODECS
from strategies.policies import build_policy
from strategies.policies.fixed import FixedPolicy, codecs_of
from strategies.policies.policy import Assignment, Observation, Predicts

EDGES = 3
LAYERS = layered(
    models.skeleton(
        {"_target_": "fedsys.models.small.cnn", "width": 4, "hidden": 8, "init": None},
        input_shape=(1, 8, 8),
        num_classes=10,
    ),
    (1, 8, 8),
)
PLANNED = parse(
    compose_text(
        "model=cnn fleet=pi_lab network=4g num_clients=21 num_edges=3 client.batch_size=16 "
        "schedule=pipelined"
    )
)
POLICIES = {
    "fraction": {"kind": "fixed", "cut": 0.3, "codec": "fp32"},
    "index": {"kind": "fixed", "cut": 0, "codec": "fp16"},
    "unit": {"kind": "fixed", "cut": "conv2", "codec": {"up": "int8", "down": "bf16"}},
    "list": {"kind": "fixed", "cut": [1, 0.9, "conv1", 4], "codec": "fp32"},
    "auto": {"kind": "auto", "codec": ["fp32", "int8"]},
    "forced": {"kind": "auto", "offload": "forced", "objective": "iteration"},
    "exhaustive": {"kind": "exhaustive", "micro_batches": [1, 8]},
    "pipar": {"kind": "pipar"},
    "bandit": {"kind": "bandit", "codec": ["fp32", "int8"], "forget": 1},
    "corrected": {"kind": "auto", "learn": True, "codec": ["fp32", "int8"]},
    "corrected pipar": {"kind": "pipar", "learn": True, "forget": 1},
    "splitfed": {"kind": "splitfed", "forget": 1},
    "fedadapt": {"kind": "fedadapt", "training": {"fleets": 3}, "ppo": {"updates": 2}},
    "fedadapt shares": {
        "kind": "fedadapt",
        "action": "shares",
        "training": {"fleets": 3},
        "ppo": {"updates": 2},
    },
    "learning": {
        "kind": "fedadapt",
        "learn": True,
        "learn_every": 2,
        "ppo": {"updates": 1, "epochs": 4},
    },
    "learning shares": {
        "kind": "fedadapt",
        "action": "shares",
        "learn": True,
        "learn_every": 2,
        "training": {"fleets": 2},
        "ppo": {"updates": 1},
    },
}


def built(spec):
    return build_policy(spec, EDGES, dataclasses.replace(PLANNED, policy=spec), [100, 40, 7])


observations = st.builds(
    Observation,
    steps=st.integers(0, 10**6),
    seconds=st.floats(0, 1e6),
    waited_s=st.floats(0, 1e6),
    bytes_up=st.integers(0, 10**12),
    bytes_down=st.integers(0, 10**12),
    compute_s=st.floats(0, 1e3),
    up_bit_s=st.floats(0, 1.0),
    down_bit_s=st.floats(0, 1.0),
    edge_s=st.floats(0, 1e3),
    iteration_s=st.floats(0, 1e3),
)
rounds = st.lists(
    st.dictionaries(st.integers(0, 20), observations, min_size=1), min_size=1, max_size=4
)


@pytest.fixture(params=POLICIES.values(), ids=POLICIES.keys(), scope="module")
def policy(request):
    return built(request.param)


@pytest.fixture(scope="module")
def begun(policy):
    """The state that a run of 21 devices begins with; an agent is trained for it."""
    return policy.init(LAYERS, range(21))


@given(seen=rounds)
@settings(max_examples=12, deadline=None)
def test_every_device_of_the_round_has_a_valid_assignment(policy, begun, seen):
    state = copy.deepcopy(begun)
    for devices in seen:
        state, plan = policy.plan(state, devices)
        assert set(plan) == set(devices)
        for assignment in plan.values():
            assert 0 <= assignment.cut <= len(LAYERS)
            assert 0 <= assignment.edge < EDGES
            assert {assignment.codec_up, assignment.codec_down} <= set(CODECS)


@given(seen=rounds)
@settings(max_examples=8, deadline=None)
def test_the_same_state_and_observations_give_the_same_plan_and_change_nothing(policy, begun, seen):
    state = copy.deepcopy(begun)
    for devices in seen:
        state_before, devices_before = copy.deepcopy(state), copy.deepcopy(devices)
        first_state, first = policy.plan(state, devices)
        again_state, again = policy.plan(state, devices)
        assert first == again and first_state == again_state
        assert state == state_before and devices == devices_before
        assert keepable(first_state)
        state = first_state


def test_who_predicts_expects_something_of_each_device(policy):
    """A run of FedAdapt's published form ended when it was asked: it expected nothing."""
    if not isinstance(policy, Predicts):
        pytest.skip("it predicts nothing")
    state, plan = policy.plan(policy.init(LAYERS, range(6)), dict.fromkeys(range(6), Observation()))
    made = policy.predicted(state, [1, 4])
    assert [c.cut for c in made.choices] == [plan[1].cut, plan[4].cut]
    assert len(made.iteration_s) == len(made.rest_s) == 2 and min(made.iteration_s) > 0


def test_two_policies_of_one_specification_agree(policy, request):
    spec = request.node.callspec.params["policy"]
    other = built(spec)
    seen = {node: Observation() for node in range(6)}
    assert (
        other.plan(other.init(LAYERS, range(6)), seen)[1]
        == (policy.plan(policy.init(LAYERS, range(6)), seen)[1])
    )


def test_a_list_of_cuts_goes_round_the_devices_and_edges_too():
    policy = build_policy(POLICIES["list"], 2)
    _, plan = policy.plan(policy.init(LAYERS, range(5)), {n: Observation() for n in range(5)})
    assert [plan[n].cut for n in range(5)] == [1, 2, 1, 4, 1]
    assert [plan[n].edge for n in range(5)] == [0, 1, 0, 1, 0]


def test_codecs_are_given_by_direction():
    policy = build_policy(POLICIES["unit"], 1)
    _, plan = policy.plan(policy.init(LAYERS, [0]), {0: Observation()})
    assert plan == {0: Assignment(cut=2, edge=0, codec_up="int8", codec_down="bf16")}


@pytest.mark.parametrize("cut", [None, [], [1, None]])
def test_a_cut_that_is_not_named_is_refused(cut):
    with pytest.raises(ConfigError, match=r"policy\.cut=.*policy\.cut=0\.3"):
        FixedPolicy(cut, "fp32", 1)


@pytest.mark.parametrize("cut", [5, -1, 1.5, "conv9", True, 0.0])
def test_an_impossible_cut_is_refused_by_its_key(cut):
    with pytest.raises((ConfigError, ModelError), match=r"policy\.cut="):
        FixedPolicy(cut, "fp32", 1).init(LAYERS, [0])


@pytest.mark.parametrize("codec", ["gzip", None, {"up": "fp32"}, {"up": "fp32", "down": "f16"}])
def test_an_unknown_codec_is_refused_by_its_key(codec):
    with pytest.raises(ConfigError, match=r"policy\.codec="):
        codecs_of(codec)


def test_none_is_no_policy_and_an_unknown_one_is_refused():
    assert build_policy({"kind": "none"}, 1) is None
    with pytest.raises(ConfigError, match=r"policy\.kind=clever"):
        build_policy({"kind": "clever"}, 1)
