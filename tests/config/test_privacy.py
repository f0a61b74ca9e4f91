"""The group `privacy`: its rules, and what follows from choosing it."""

import pytest

from fedsys.config import compose_text, options_of, parse
from fedsys.config.privacy import MECHANISMS, PrivacyConfig
from fedsys.errors import ConfigError
from fedsys.runs import resume


def chosen(*overrides):
    return parse(compose_text(" ".join(overrides)))


def test_nothing_is_promised_by_default():
    assert chosen().privacy == PrivacyConfig() and not chosen().privacy.active


def test_there_is_a_choice_for_each_mechanism():
    assert options_of("privacy") == sorted((*MECHANISMS, "none"))
    for name in MECHANISMS:
        privacy = chosen(f"privacy={name}").privacy
        assert privacy.mechanism == name and privacy.active
        assert privacy.per_example == (name == "record")


def test_per_example_clipping_chooses_a_norm_that_does_not_mix_examples_unless_one_is_named():
    assert chosen("model=vgg5").model["norm"] == "batch"
    assert chosen("model=vgg5", "privacy=record").model["norm"] == "group"
    assert chosen("model=vgg5", "privacy=record", "model.norm=none").model["norm"] == "none"
    assert chosen("model=vgg5", "privacy=client", "model.norm=none").model["norm"] == "none"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("privacy.epsilon=0", "privacy.epsilon=0.0: must be above 0"),
        ("privacy.epsilon=-1", "privacy.epsilon=-1.0: must be above 0"),
        ("privacy.epsilon=inf", "privacy.epsilon=inf: must be a finite number"),
        ("privacy.delta=0", "privacy.delta=0.0: must be above 0 and below 1"),
        ("privacy.delta=1", "privacy.delta=1.0: must be above 0 and below 1"),
        ("privacy.clip_norm=0", "privacy.clip_norm=0.0: must be above 0"),
        ("privacy.noise_multiplier=0", "null computes it from the budget"),
        ("privacy.accountant=gdp", "it is no bound"),
        ("privacy.accountant=pdl", "did you mean 'pld'?"),
        ("privacy.mechanism=records", "did you mean 'record'?"),
    ],
)
def test_what_breaks_a_rule_is_refused(override, words):
    with pytest.raises(ConfigError) as caught:
        chosen("privacy=record", override)
    assert words in str(caught.value)


def test_an_option_without_its_mechanism_says_which_has_it():
    with pytest.raises(ConfigError, match="privacy=record has it"):
        chosen("privacy.epsilon=3")


def test_checkpoints_of_before_are_those_of_runs_that_promise_nothing():
    plain, private = chosen("model.norm=group"), chosen("privacy=record")
    assert resume.digest(plain) != resume.digest(private)
    assert resume.digest(private) != resume.digest(chosen("privacy=record", "privacy.epsilon=1"))
