"""A policy that learns, without the extra that trains agents."""

import importlib.util
from contextlib import nullcontext

import pytest

from fedsys.errors import ModelError
from fedsys.planning.learning.cut_agent import untrained
from strategies.policies.fedadapt import FedAdaptPolicy

WITHOUT = r"must have the extra rl.*pip install 'fedsys\[rl\]'.*policy\.ppo\.updates=0.*agent=FILE"


@pytest.mark.parametrize(
    ("options", "is_refused"),
    [
        ((), True),
        (("policy.action=shares",), True),
        (("policy.training.where=clients",), True),
        (("policy.agent=AGENT",), False),
        (("policy.agent=AGENT", "policy.learn=true"), True),
        (("policy.ppo.updates=0",), False),
    ],
)
def test_what_trains_agents_is_asked_for_before_anything_is_done(
    options, is_refused, configure, monkeypatch, tmp_path
):
    """The error named a module and neither the extra nor what goes without it.

    With ``policy.learn`` it came in the middle of the run, where the agent was to be improved.
    """
    untrained({}).save(tmp_path / "agent")
    given = [option.replace("AGENT", str(tmp_path / "agent")) for option in options]
    config = configure("policy=fedadapt", *given)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused = pytest.raises(ModelError, match=WITHOUT) if is_refused else nullcontext()
    with refused:
        FedAdaptPolicy(config, [10] * 8)
