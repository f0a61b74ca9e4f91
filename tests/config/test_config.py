import dataclasses
import shlex
from collections.abc import Mapping

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from fedsys.config import (
    CONF,
    ClientConfig,
    Config,
    LearningRate,
    call_target,
    compose_text,
    composing,
    divided,
    from_run_config,
    locate,
    options_of,
    parse,
    to_text,
)
from fedsys.config.rules import RULES
from fedsys.errors import ConfigError, first_line
from fedsys.planning.traces import network_of


@pytest.fixture(scope="module")
def tree():
    """Return a function that gives the composed configuration as plain values to change."""
    text = compose_text("")
    return lambda: yaml.safe_load(text)


def parsed(values):
    return parse(yaml.safe_dump(values))


def put(values, path, value):
    """Put `value` at a path with dots."""
    *groups, key = path.split(".")
    for group in groups:
        values = values[group]
    values[key] = value


# --------------------------------------------------------------------------------------------------
# From YAML to values


def test_the_default_run_is_that_of_the_yaml_and_of_the_dataclasses(tree):
    config = parsed(tree())
    assert (config.num_clients, config.rounds, config.seed, config.json) == (8, 10, 0, False)
    assert config.data["source"] == "digits"
    assert config.strategy["_target_"] == "flwr.serverapp.strategy.FedAvg"
    assert dataclasses.replace(config.client, lr=0.5) == ClientConfig(lr=0.5)


def test_values_are_frozen_and_typed(configure):
    config = configure(
        "client.lr=1", "client.lr_schedule={kind: step, milestones: [3, 5]}", "runtime.workers=2"
    )
    assert type(config.client.lr) is float and config.client.lr == 1.0
    assert config.client.lr_schedule == LearningRate("step", milestones=(3, 5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.client.lr = 2.0
    assert hash(config.client.lr_schedule)


def test_the_text_of_a_run_gives_the_run_again(configure):
    config = configure("client.lr=1e-5", "seed=9223372036854775807", "client.clip_norm=.5")
    assert (config.client.lr, config.seed, config.client.clip_norm) == (1e-5, 2**63 - 1, 0.5)
    again = parse(to_text(OmegaConf.create(config.text)))
    assert again == config and parse(config.text) is parse(config.text)


def test_interpolations_are_resolved_before_the_text_leaves(configure):
    config = configure("strategy=qfedavg", "client.lr=0.25")
    assert config.strategy["client_learning_rate"] == 0.25 and "${" not in config.text


def test_a_flower_app_finds_the_composed_text_or_composes_it_from_overrides(configure):
    config = configure("client.lr=0.125", "model=lenet")
    assert from_run_config({"hydra-config": config.text, "overrides": "client.lr=9"}) is config
    again = from_run_config({"hydra-config": "", "overrides": "client.lr=0.125 model=lenet"})
    assert again == config
    quoted = from_run_config({"overrides": "'run.dir=a folder' rounds=3"})
    assert (quoted.run.dir, quoted.rounds) == ("a folder", 3)
    assert from_run_config({}).rounds == 10


def test_the_same_run_can_be_divided_among_others(configure):
    config = configure()
    assert divided(config, 3) == dataclasses.replace(config, num_clients=3)


def test_hydras_own_settings_do_not_reach_the_run(tree):
    values = {**tree(), "hydra": {"run": {"dir": "x"}}}
    assert parsed(values) == parsed(tree())


OF_OTHER_COMMANDS = {"bench", "report", "variants", "__pycache__"}


@pytest.mark.parametrize(
    "group", sorted({p.name for p in CONF.iterdir() if p.is_dir()} - OF_OTHER_COMMANDS)
)
def test_every_choice_of_every_group_is_a_run(configure, group):
    for name in options_of(group):
        edges = {"faults": ["policy=fixed"], "mobility": ["policy=fixed", "num_edges=2"]}
        added = "+" if group == "experiment" else ""
        needed = {
            ("mobility", "trace"): "mobility.file=fcd.xml",
            ("pruning", "own"): "pruning.score={_target_: mine.score}",
        }
        more = [needed[group, name]] if (group, name) in needed else []
        chosen = [*edges.get(group, []), f"{added}{group}={name}", *more]
        assert isinstance(configure(*chosen), Config)


def test_an_experiment_chooses_from_other_groups_and_stands_behind_what_is_typed(configure):
    config = configure("+experiment=fedadapt_bandwidth", "rounds=7", "network.trace.first=2")
    assert (config.policy["kind"], config.fleet.devices[2], config.rounds) == (
        "fedadapt", "jetson", 7,
    )  # fmt: skip
    rates = [network_of(config.network, k).at(3).up_bits_s for k in (0, 1)]
    assert rates == [5e6, 75e6]
    with pytest.raises(ConfigError, match=r"=NAME, of chain_of_three, fedadapt_bandwidth, fed"):
        configure("experiment=fedadapt_paper")


# --------------------------------------------------------------------------------------------------
# What is refused

WRONG = {
    "num_clients": (0, -1),
    "num_edges": (0,),
    "rounds": (0,),
    "seed": (-1, 2**63),
    "client.epochs": (0,),
    "client.batch_size": (0,),
    "client.lr": (0.0, -0.5),
    "client.momentum": (-0.1, 1.0),
    "client.weight_decay": (-1e-9,),
    "client.clip_norm": (0.0, -1.0),
    "client.threads": (0,),
    "client.device": ("gpu",),
    "client.memory_format": ("nhwc",),
    "client.kernels": ("fast",),
    "client.precision": ("fp16",),
    "link.skip_zero_gradients": ("often", True),
    "client.lr_schedule.kind": ("linear",),
    "client.lr_schedule.gamma": (0.0,),
    "client.lr_schedule.final": (1.5, -0.5),
    "client.lr_schedule.warmup": (-1,),
    "schedule.micro_batches": (0,),
    "schedule.kind": ("random",),
    "checkpoint.every": (0,),
    "runtime.workers": (0,),
    "runtime.timeout_s": (0.0,),
}


@pytest.mark.parametrize(("path", "value"), [(p, v) for p, values in WRONG.items() for v in values])
def test_a_value_that_breaks_its_rule_is_named_with_rule_and_way_out(tree, path, value):
    values = tree()
    put(values, path, value)
    [rule] = [r for r in RULES if r[0] == path]
    with pytest.raises(ConfigError) as caught:
        parsed(values)
    way_out = f"; {rule[3]}" if rule[3] else ""
    assert str(caught.value) == f"{path}={value}: {rule[2]}{way_out}"
    assert caught.value.exit_status == 2


def test_every_rule_is_about_an_option_that_there_is(configure):
    for path, test, *_ in RULES:
        value = configure()
        for part in path.split("."):
            value = getattr(value, part)
        assert test(value), path


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("rounds", "two", "rounds=two: must be of type int"),
        ("rounds", 2.0, "rounds=2.0: must be of type int"),
        ("rounds", True, "rounds=True: must be of type int"),
        ("rounds", None, "rounds=None: must be of type int"),
        ("json", 1, "json=1: must be of type bool"),
        ("client.lr", "fast", "client.lr=fast: must be of type float"),
        ("client.lr", True, "client.lr=True: must be of type float"),
        ("client.lr", float("nan"), "client.lr=nan: must be a finite number"),
        ("client.lr", float("inf"), "client.lr=inf: must be a finite number"),
        ("client.clip_norm", "x", "client.clip_norm=x: must be of type float"),
        ("client.optimizer", ["sgd"], "client.optimizer=['sgd']: must be of type str"),
        ("client.optimizer_args", 3, "client.optimizer_args=3: must be a group of keys"),
        (
            "client.lr_schedule.milestones",
            3,
            "client.lr_schedule.milestones=3: must be a list; write client.lr_schedule.milest",
        ),
        ("client.lr_schedule.milestones", [1, "x"], "client.lr_schedule.milestones[1]=x: must be"),
        ("client", 3, "client=3: must be a group of keys"),
        ("data", "digits", "data=digits: must be a group of keys"),
        ("client.learning_rate", 1.0, "client.learning_rate: no such option; "),
        ("clients", 3, "clients: no such option; did you mean 'client'? see --help"),
        ("text", "x", "text: no such option; "),
        (
            "edge.address",
            "127.0.0.1:9443",
            "edge.address=127.0.0.1:9443: must be tcp://host:port or grpc://host:port; "
            "did you mean tcp://127.0.0.1:9443?",
        ),
        (
            "fleet.edges",
            [{"name": "a", "address": "b:1"}],
            "fleet.edges[0].address=b:1: must be tcp://host:port or grpc://host:port; did you",
        ),
        ("schedule.micro_batches", 64, "schedule.micro_batches=64: must not exceed client.batch_"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(tree, path, value, message):
    values = tree()
    put(values, path, value)
    with pytest.raises(ConfigError) as caught:
        parsed(values)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("text", ["- 1", "3", "a: ${nothing}", "a: [", "a: b: c"])
def test_a_text_that_is_no_configuration_is_refused(text):
    with pytest.raises(ConfigError, match=r"^configuration: "):
        parse(text)


def test_a_missing_key_is_named(tree):
    values = tree()
    del values["rounds"]
    with pytest.raises(ConfigError, match=r"^rounds: missing from the configuration$"):
        parsed(values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy=fedav", "strategy=fedav: no such choice; did you mean 'fedavg'? known are"),
        ("optimizer=adam", "optimizer: no such option; "),
        ("client.learning_rate=1", "client.learning_rate: no such option; "),
        ("model=vgg6", "model=vgg6: no such choice; did you mean 'vgg"),
        ("client.lr=${nothing}", "Interpolation key 'nothing' not found"),
        ("rounds=[", "no viable alternative"),
        ("client=[]", "client=[]: must be a group of options; client.OPTION=VALUE sets"),
        ("fleet.edges={a: 1}", "fleet.edges={a: 1}: must be a list"),
        ("network=[1]", "network=[1]: must be one of its choices: "),  # was a TypeError of Hydra
        ("network=[]", "network=[]: must be one of its choices: "),
    ],
)
def test_hydras_errors_are_one_sentence_of_ours(configure, override, message):
    with pytest.raises(ConfigError) as caught:
        configure(override)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        "policy=fixed policy.cut=0.3 num_edges=2 data.max_examples=${num_clients} num_clients=5",
        "data=synthetic data.shape=[3,8,8] 'faults.list=[{kind: server_killed, round: 1}]'",
        "+bench=planning bench.repeats=2 run.dir='/a b/c' network=4g network.up_mbit_s=null",
        "+client.optimizer_args.nesterov=true ~faults.list rounds=3 '+fleet.machines.a={s: 1}'",
    ],
)
def test_values_that_are_set_afterwards_are_those_that_hydra_sets(overrides):
    """Hydra is asked once for the choices of many runs; twice here, and once for each with all."""
    arguments = shlex.split(overrides)
    whole = to_text(composing._by_hydra(CONF, arguments))
    assert to_text(composing.composed([*arguments, "seed=7"])) != whole
    assert to_text(composing.composed(arguments)) == whole


def test_a_classifier_of_torchvision_needs_no_file(configure):
    config = configure("model=squeezenet1_1", "model.norm=none")
    assert config.model["name"] == "squeezenet1_1" and config.model["norm"] == "none"


def test_the_first_line_that_says_something_stands_for_an_error():
    assert first_line(ValueError("\n\n  what\nwhere")) == "what"
    assert first_line(KeyError()) == "KeyError"


# --------------------------------------------------------------------------------------------------
# Targets


class Thing:
    def __init__(self, size: int, rate: float = 1.0, *, name: str = "x", part: object = None):
        if size < 0:
            raise ValueError("size is below zero")
        self.values = (size, rate, name, part)


def anything(**keywords: object) -> Mapping[str, object]:
    return keywords


@pytest.fixture
def targets(monkeypatch):
    """Make the two above importable by a dotted path."""
    import fedsys.config

    monkeypatch.setattr(fedsys.config, "Thing", Thing, raising=False)
    monkeypatch.setattr(fedsys.config, "anything", anything, raising=False)


THING = {"_target_": "fedsys.config.Thing", "size": 3}


@pytest.mark.usefixtures("targets")
def test_a_target_is_called_with_its_keys_and_with_what_is_given_where_it_fits():
    nested = {**THING, "rate": 2, "part": {**THING, "size": 4}}
    thing = call_target(nested, "thing", name="given", unknown=5)
    size, rate, name, part = thing.values
    assert (size, rate, name, part.values[0]) == (3, 2.0, "given", 4) and type(rate) is float
    assert call_target({"_target_": "fedsys.config.anything", "a": 1}, "g", b=2) == {"a": 1, "b": 2}


@pytest.mark.usefixtures("targets")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sise": 3}, "thing.sise: Thing has no such parameter; did you mean 'size'? it has size"),
        ({"size": "big"}, "thing.size=big: must be of type int"),
        ({"rate": float("inf")}, "thing.rate=inf: must be a finite number"),
        ({"size": -1}, "thing: Thing refuses its arguments: size is below zero"),
        ({"name": "mine"}, "thing.name=mine: must not be set: fedsys sets it"),
        ({"part": THING | {"size": "x"}}, "thing.part.size=x: must be of type int"),
        ({"_target_": "fedsys.config.Thong"}, "thing._target_=fedsys.config.Thong: cannot be im"),
        ({"_target_": "fedsys.config.CONF"}, "thing._target_=fedsys.config.CONF: must name a cl"),
        ({"_target_": ""}, "thing._target_=: cannot be imported"),
    ],
)
def test_what_a_target_does_not_take_is_named(change, message):
    with pytest.raises(ConfigError) as caught:
        call_target(THING | change, "thing", name="given")
    assert str(caught.value).startswith(message)


@pytest.mark.usefixtures("targets")
def test_a_keyword_that_a_target_needs_is_named():
    with pytest.raises(ConfigError, match=r"^thing\.size: Thing needs a value for it$"):
        call_target({"_target_": "fedsys.config.Thing"}, "thing")
    assert locate("fedsys.config.Thing", "thing") is Thing


def test_a_configuration_is_composed_within_a_command():
    # `fedsys bench pipeline virtual=true` composes one for each model while Hydra runs the command,
    # and Hydra refused: "GlobalHydra is already initialized". Only a call without Hydra was tested.
    compose_text.cache_clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert parse(compose_text("num_clients=3")).num_clients == 3
        assert compose("config", overrides=["num_clients=4"]).num_clients == 4
    assert not GlobalHydra.instance().is_initialized()


# --------------------------------------------------------------------------------------------------
# Former names


def test_the_former_name_of_the_group_of_variants_means_the_same():
    """``prune=`` and ``pruning=`` were two groups with one root."""
    former = compose_text("+prune=portfolio prune.runs=40 ++prune.threads=[3]")
    present = compose_text("+variants=portfolio variants.runs=40 ++variants.threads=[3]")
    assert former == present and parse(former).variants.threads == (3,)
    assert parse(compose_text("+prune.recalibrate=7")).variants.recalibrate == 7


def test_a_file_with_the_former_name_opens_as_before(tree):
    values = {**tree(), "prune": {"runs": 40}}
    assert parsed(values).variants.runs == 40
    both = {**tree(), "variants": {"runs": 50, "margin": 0.5}, "prune": {"runs": 40}}
    assert (parsed(both).variants.runs, parsed(both).variants.margin) == (40, 0.5)
    with pytest.raises(ConfigError, match="variants=3: must be a group of keys"):
        parsed({**tree(), "prune": 3})


def test_a_command_line_with_the_former_name_still_works(capsys):
    from fedsys.main import main

    shown = []
    for group in ("prune", "variants"):
        assert main(["prune", f"{group}.runs=41", "--cfg", "job"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "runs: 41" in shown[0]
