"""Options that change nothing are said to, and those that count are not."""

from dataclasses import fields

import pytest

from fedsys.config import MobilityConfig, compose_text, parse, without_effect
from fedsys.config.effect import _OF_KINDS, IDLE
from fedsys.config.rules import RULES

MOVES = ("policy=fixed", "num_edges=2")
WAYPOINT = "mobility=waypoint"
TRACE = ("mobility=trace", "mobility.file=x.xml")
NETWORK = ("mobility=network", "network=wifi")


def said(*overrides):
    config = parse(compose_text(" ".join(overrides)))
    given = {override.partition("=")[0].lstrip("+"): override for override in overrides}
    return without_effect(config, given)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["network=wifi"], "network=wifi is without effect: no fleet is modelled"),
        (["network.latency_ms=5"], "network.latency_ms=5 is without effect: no fleet"),
        (["policy=fixed", "network=wifi"], "network.emulate=true makes links that slow"),
        (["num_edges=3"], "num_edges=3 is without effect: devices train alone with policy=none"),
        (["fleet=pi_lab"], "only the virtual time is told of it"),
        (["fleet.devices=[pi3]"], "only the virtual time is told of it"),
        (["schedule=pipelined"], "only the pieces of a mini-batch count"),
        (["policy=fixed", "schedule=pipelined", "schedule.depth=3"], "schedule=bounded"),
        (["link=tcp"], "link=tcp is without effect"),
        (["link.skip_zero_gradients=never"], "devices train alone"),
        (["policy=fixed", "privacy=cut", "link.skip_zero_gradients=always"], "leaves no zeros"),
        (["fleet.replicate_every=5"], "devices train alone"),
        (["edge.device=cpu"], "devices train alone"),
        (["edge.max_sessions=5"], "it is of fedsys edge only"),
        (["policy=fixed", "edge.max_sessions=5"], "it is of fedsys edge only"),
        (["serving.max_batch=2"], "it is of fedsys serve and query only"),
        (["portfolio=x"], "it is of fedsys serve and partition only"),
        (["client.label_private=true"], "devices train alone"),
        (["client.lr_schedule.gamma=0.5"], "client.lr_schedule.kind=step"),
        (["client.optimizer=adam", "client.momentum=0.5"], "the optimizer has no momentum"),
        (["data=synthetic", "data.partition.alpha=0.1"], "data.partition.kind=dirichlet"),
        (["+pruning.sparsity=0.5"], "nothing is pruned with pruning=none"),
        (["runtime=deployment", "runtime.workers=3"], "one message at a time"),
    ],
)
def test_an_option_that_changes_nothing_is_named_with_the_reason(overrides, words):
    assert any(words in line for line in said(*overrides)), said(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["network=none", "num_edges=1", "policy=none", "schedule=sequential", "fleet=local"],
        ["policy=fixed", "num_edges=3", "link=tcp", "edge.device=cpu", "schedule=pipelined"],
        ["policy=fixed", "network=wifi", "network.emulate=true"],
        ["policy=auto", "fleet=pi_lab", "network=wifi", "schedule=pipelined"],
        ["client.lr_schedule.kind=step", "client.lr_schedule.gamma=0.5", "client.momentum=0.5"],
        ["data.partition.alpha=0.1", "client.lr=0.1", "rounds=3", "runtime.workers=3"],
        ["pruning=group_norm", "pruning.sparsity=0.5"],
        ["schedule.micro_batches=2"],
    ],
)
def test_an_option_that_counts_is_not(overrides):
    assert said(*overrides) == []


def test_every_option_that_may_be_idle_exists():
    config = parse(compose_text("runtime=local"))
    groups = {path.partition(".")[0] for path, *_ in RULES}
    for idle in IDLE:
        first, _, rest = idle.key.partition(".")
        assert hasattr(config, first) or first in groups
        if first in ("client", "fleet", "schedule", "edge", "runtime") and rest:
            value = getattr(config, first)
            for part in rest.rstrip(".").split("."):  # a rule may be of all below a group
                value = getattr(value, part)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["policy=fixed", "num_edges=2", "fleet.between.mbit_s=75"], "no session moves"),
        (["policy=auto", "fleet=pi_lab", "policy.migrate=true"], "there is one edge server"),
        (["policy=fixed", "num_edges=2", "mobility=halfway", "mobility.notice=0.3"], "is foreseen"),
        ([*MOVES, "mobility=halfway", "mobility.mirror=true"], "is foreseen"),
        (["policy=fixed", "num_edges=2", "mobility=waypoint", "mobility.unreachable=alone"], "any"),
        (["+mobility.devices=[1]"], "nobody moves"),
        ([*MOVES, "mobility=halfway", "mobility.away_s=5"], "no virtual clock counts it"),
        ([*MOVES, "mobility=halfway", "mobility.mode=restart", "mobility.how=foreseen"], "anew"),
        ([*MOVES, "mobility=halfway", "mobility.mode=restart", "mobility.piece=0"], "anew"),
        ([*MOVES, WAYPOINT, "mobility.how=unannounced", "mobility.foresee_s=3"], "unannounced"),
        ([*MOVES, "mobility=halfway", "fleet.places=[{x:0,y:0},{x:9,y:9}]"], "has a position"),
        ([*MOVES, *NETWORK, "network.emulate=true", "mobility.seconds_per_round=9"], "watch"),
        ([*MOVES, WAYPOINT, "+mobility.at=[0.2]"], "mobility=halfway and mobility=commuters only"),
        ([*MOVES, WAYPOINT, "+mobility.every=2"], "mobility=commuters only"),
        ([*MOVES, WAYPOINT, "+mobility.piece=0"], "mobility=commuters only"),
        ([*MOVES, WAYPOINT, "+mobility.notice=0.2"], "mobility=commuters only"),
        ([*MOVES, WAYPOINT, "+mobility.away_s=2"], "mobility=commuters only"),
        ([*MOVES, WAYPOINT, "+mobility.begin_s=2"], "mobility=trace only"),
        ([*MOVES, WAYPOINT, "+mobility.coordinates=metres"], "mobility=trace only"),
        ([*MOVES, WAYPOINT, "+mobility.vehicles={a:1}"], "mobility=trace only"),
        ([*MOVES, WAYPOINT, "+mobility.file=x.xml"], "mobility=trace only"),
        ([*MOVES, WAYPOINT, "+mobility.below_mbit_s=2"], "mobility=network only"),
        ([*MOVES, WAYPOINT, "+mobility.above_ms=2"], "mobility=network only"),
        ([*MOVES, WAYPOINT, "+mobility.hysteresis=2"], "mobility=network only"),
        ([*MOVES, WAYPOINT, "+mobility.steady_s=2"], "mobility=network only"),
        ([*MOVES, "mobility=halfway", "+mobility.hysteresis_m=2"], "mobility=trace only"),
        ([*MOVES, "mobility=halfway", "+mobility.speed_m_s=[1,2]"], "mobility=waypoint only"),
        ([*MOVES, "mobility=halfway", "+mobility.pause_s=[1,2]"], "mobility=waypoint only"),
        ([*MOVES, "mobility=halfway", "+mobility.area_m=[1,2]"], "mobility=waypoint only"),
        ([*MOVES, *TRACE, "+mobility.share=0.5"], "mobility=network only"),
    ],
)  # fmt: skip
def test_options_of_moves_that_count_for_nothing_are_named(overrides, words):
    assert any(words in line for line in said(*overrides)), said(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["mobility=halfway", "mobility.at=[0.2]", "mobility.every=2", "mobility.cut=1"],
        ["mobility=commuters", "mobility.how=foreseen", "mobility.notice=0.3"],
        ["mobility=commuters", "mobility.how=foreseen", "mobility.mirror=true"],
        ["mobility=halfway", "mobility.away_s=5", "fleet=pi_lab", "mobility.share=0.5"],
        ["mobility=waypoint", "mobility.hysteresis_m=5", "mobility.foresee_s=2"],
        ["mobility=waypoint", "mobility.seconds_per_round=5", "mobility.devices=[1]"],
        [*TRACE, "mobility.begin_s=4", "mobility.coordinates=metres", "mobility.how=unannounced"],
        [*NETWORK, "mobility.below_mbit_s=5", "mobility.steady_s=1", "mobility.hysteresis=0.5"],
        [*NETWORK, "mobility.above_ms=5", "mobility.seconds_per_round=9", "mobility.share=0.5"],
        ["mobility=halfway", "mobility.mode=restart", "mobility.cut=1"],
    ],
)
def test_options_of_moves_that_count_are_not_named(overrides):
    assert said(*MOVES, *overrides) == []


def test_every_option_of_moves_is_of_some_choice_or_of_all():
    listed = {name for names in _OF_KINDS.values() for name in names}
    of_all = {"kind", "mirror", "mode", "how", "cut"}
    assert listed | of_all == {field.name for field in fields(MobilityConfig)}
