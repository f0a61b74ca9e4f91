"""The bandit in a run: it needs no fleet of machines, and no other configuration."""

from __future__ import annotations

import pytest

from fedsys.config import compose_text, parse
from fedsys.errors import ConfigError
from fedsys.planning.bandit import Bandit
from fedsys.training.federation import layered_model
from strategies.policies import build_policy
from strategies.policies.policy import Explains, Observation

SHAPE = (3, 32, 32)


@pytest.mark.parametrize("fleet", ["local", "pi_lab"])
def test_it_is_built_with_and_without_machines_and_begins_alone(fleet):
    config = parse(compose_text(f"policy=bandit fleet={fleet} model=vgg5 num_clients=3"))
    layers = layered_model(config, SHAPE, 10)
    policy = build_policy(config.policy, 1, config, [100])
    assert isinstance(policy, Bandit) and isinstance(policy, Explains)
    nothing = dict.fromkeys(range(3), Observation())
    state, plan = policy.plan(policy.init(layers, range(3)), nothing)
    assert {choice.cut for choice in plan.values()} == {len(layers)}
    # What a device computes at an edge it does not know: a slow one without a link is worth a try
    seen = {k: Observation(iteration_s=1.0 + k, steps=3, seconds=3.0) for k in range(3)}
    _, plan = policy.plan(state, seen)
    assert plan[2].cut < len(layers)


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ("client.label_private=true", r"must be fixed with client\.label_private=true"),
        ("policy.movers=-1", r"policy\.movers=-1"),
        ("policy.codec=zip", r"zip: must be one of"),
    ],
)
def test_what_it_cannot_do_is_refused(more, names):
    config = parse(compose_text(f"policy=bandit fleet=pi_lab model=vgg5 {more}"))
    with pytest.raises(ConfigError, match=names):
        build_policy(config.policy, 1, config, [100])
