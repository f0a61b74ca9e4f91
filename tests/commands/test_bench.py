import copy
import csv
import io
import itertools
import json
import math
import re

import pytest
import torch

from fedsys.commands import bench
from fedsys.commands.bench import (
    codecs,
    link,
    memory,
    offload_fleets,
    planning,
    scale,
    sessions,
    simulation,
    training,
)
from fedsys.config import CONF, locate
from fedsys.errors import ConfigError, ModelError
from fedsys.main import COMMANDS, main
from fedsys.models.fused import compiler
from fedsys.runtime.local import LocalGrid
from fedsys.training import federation
from fedsys.transport import records

NAMES = COMMANDS["bench"].names
SMALL = {
    "coverage": ["bench.models=[squeezenet1_1,no_such_model]", "bench.columns=[traced,cut,saved]"],
    "prune": [
        "bench.families=[[mobilenet_v3_small,[0.5]],[mobilenet_v2,[0.999]],[mobilenet_v2,[0.996],4]]",
        "bench.conversions=[[mobilenet_v3_small,0.4]]",
        "bench.rivals=[]",
        "bench.rounded=[]",
        "bench.served=[]",
        "bench.repeats=1",
        "bench.images=20",
        "bench.epochs=1",
        "bench.fine_tune=0",
        "data.examples=200",
        "client.batch_size=50",
        "client.threads=1",
        "pruning.sparsity=[0.3,0.5]",
        "variants.batch_sizes=[1]",
        "variants.threads=[1]",
        "variants.memory=false",
    ],
    "privacy": [
        "bench.epsilons=[8]",
        "bench.mechanisms=[record,cut]",
        "bench.alone_seeds=1",
        "bench.alone_epochs=1",
        "bench.networks=[wifi]",
        "bench.turns=1",
        "bench.batch_size=4",
        "privacy.accountant=rdp",
        "num_clients=2",
        "rounds=1",
        "data=synthetic",
        "data.examples=60",
        "client.batch_size=20",
        "client.epochs=1",
    ],
    "training": ["bench.turns=1", "bench.batches=1", "data.examples=40", "client.batch_size=10"],
    "split": [
        "model=cnn",
        "data.shape=[3,8,8]",
        "data.examples=20",
        "client.batch_size=10",
        "bench.turns=1",
        "bench.memory=[1]",
    ],
    "kernels": [
        "data.examples=20",
        "data.validation=0",
        "client.batch_size=10",
        "bench.micro_batches=[2]",
        "bench.turns=1",
        "bench.rounds=1",
        "bench.steps=2",
    ],
    "sessions": [
        "model=cnn",
        "data.shape=[3,8,8]",
        "data.examples=40",
        "client.batch_size=8",
        "bench.sessions=3",
        "bench.steps=10",
        "bench.turns=1",
        "bench.workers=2",
    ],
    "codecs": [
        "model.width=4",
        "model.hidden=16",
        "data.max_examples=120",
        "num_clients=2",
        "rounds=1",
        "bench.codecs=[fp32,fp16,bf16,int8]",
        "bench.turns=1",
        "bench.seeds=[3]",
    ],
    "simulation": [
        "num_clients=3",
        "bench.bytes=[800]",
        "bench.arrays=2",
        "bench.turns=1",
        "bench.full_turns=1",
        "bench.flower_turns=0",
    ],
    "scale": [
        "rounds=2",
        "bench.clients.local=[2]",
        "bench.clients.simulation=[]",
    ],
    "planning": [
        "bench.models=[vgg5]",
        "bench.networks=[4g]",
        "bench.codecs=[[fp32,int8]]",
        "bench.devices=[2,6]",
        "bench.edges=[1]",
        "bench.workers=[null]",
        "bench.repeats=2",
        "bench.exhaustive=2",
    ],
    "offload": [
        "bench.methods=[classic,static,auto,untrained,exhaustive]",
        "bench.models=[vgg5]",
        "bench.examples=200",
        "bench.rounds=20",
        "bench.fleets=1",
        "bench.fleet_rounds=6",
        "bench.every=3",
        "bench.decide_rounds=3",
        "bench.most=200",
    ],
    "start": [
        "num_clients=2",
        "bench.cases.local='runtime=local data=synthetic'",
        "~bench.cases.simulation",
        "~bench.cases.deployment",
    ],
    "memory": [
        "num_clients=12",
        "rounds=3",
        "data.examples=120",
        "strategy.fraction_train=0.25",
        "bench.from_round=1",
        "bench.to_round=2",
    ],
}


def job(name, capsys, folder, *more):
    """Run a small benchmark by the command and return its figures."""
    call = ["bench", name, *SMALL[name], *more, "json=true", f"run.dir={folder}"]
    assert main(call) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------------
# All of them


def test_every_benchmark_has_a_file_of_choices_and_a_line_of_help():
    assert {path.stem for path in (CONF / "bench").glob("*.yaml")} == set(NAMES)


def test_the_options_of_a_benchmark_are_shown_by_its_help_and_all_by_that_of_bench(capsys):
    assert main(["bench", "training", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "bench:\n  name: training\n  batches: 2" in shown and NAMES["training"] in shown
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}: {text}" in shown for name, text in NAMES.items())


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (["bench"], "must be followed by one of"),
        (["bench", "trainign"], "did you mean 'training'?"),
        (["bench", "training", "simulation"], "must be followed by one of"),
        (["bench", "training", "bench.truns=3"], "bench.truns"),
    ],
)
def test_a_misspelt_benchmark_or_option_is_one_error(call, told, capsys):
    assert main(call) == 2
    assert told in capsys.readouterr().err


def test_a_benchmark_leaves_json_tables_and_a_picture_in_a_folder_of_its_own(tmp_path, capsys):
    figures = job("simulation", capsys, tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["status"] == "finished"
    assert info["result"] == figures
    assert figures["run_dir"] == str(tmp_path / "run")
    (row,) = table(tmp_path / "run" / "cases.csv")
    assert {k: float(v) for k, v in row.items()} == pytest.approx(figures["cases"][0])
    (single,) = table(tmp_path / "run" / "figures.csv")
    assert single["num_clients"] == "3"
    picture = (tmp_path / "run" / "plots" / "simulation.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_figures_are_shown_to_a_person_on_standard_error(tmp_path, capsys):
    assert main(["bench", "simulation", *SMALL["simulation"], f"run.dir={tmp_path / 'run'}"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "full_local_ms" in shown.err
    assert "num_clients  3" in shown.err


def test_a_table_of_many_columns_is_whole_on_a_narrow_screen(tmp_path):
    """Each of twenty columns was one letter and an ellipsis where 80 characters were found."""
    rows = [{f"seconds_of_column_{i}": 1234.5 + i for i in range(20)}]
    stream = io.StringIO()
    bench.show("any", {"rows": rows}, tmp_path, stream)
    assert "…" not in stream.getvalue()
    assert all(f"seconds_of_column_{i}" in stream.getvalue() for i in range(20))
    assert "1,254" in stream.getvalue()


def test_a_failed_benchmark_says_so_in_its_folder(tmp_path, capsys):
    call = ["bench", "simulation", *SMALL["simulation"], "bench.bytes=[7]"]
    assert main([*call, f"run.dir={tmp_path / 'run'}"]) == 2
    assert "bench.bytes=7: must be a multiple of 4 x bench.arrays=2" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_single_figures_are_a_table_of_one_row():
    figures = {"cases": [{"a": 1, "b": 2}, {"a": 3, "c": 4}], "total": 5, "name": "x"}
    tables = bench.tables_of(figures)
    assert tables == {"cases": figures["cases"], "figures": [{"total": 5, "name": "x"}]}
    assert bench.columns_of(tables["cases"]) == ["a", "b", "c"]


# --------------------------------------------------------------------------------------------------
# Each


def test_training_gives_examples_per_second_of_both_and_their_ratio(tmp_path, capsys):
    figures = job("training", capsys, tmp_path / "run", "model=lenet")
    assert min(figures["fedsys_per_s"], figures["plain_per_s"]) > 0
    assert figures["ratio"] == pytest.approx(figures["fedsys_per_s"] / figures["plain_per_s"])
    assert figures["turns"] == 1


def test_both_loops_of_the_training_benchmark_make_the_same_model_to_the_bit(configure):
    config = configure("+bench=training", "model=lenet", "data.examples=40", "client.batch_size=10")
    fed = federation.federation(config)
    model = federation.build_model(config, fed.dataset)
    ours = training._Ours(config, fed, copy.deepcopy(model), 2)
    plain = training._Plain(config, fed, model, 2)
    ours.turn()
    plain.turn()
    for name, tensor in ours._model.state_dict().items():
        assert torch.equal(tensor, plain._model.state_dict()[name]), name


def test_offload_plays_each_method_on_each_fleet_beside_the_optimum(tmp_path, capsys):
    figures = job("offload", capsys, tmp_path / "run")
    rows = {(row["name"], row["method"]): row for row in figures["scenarios"]}
    names = ("paper vgg5", "bandwidth vgg5", "unseen fleets", "wrong profiles")
    methods = ("classic", "static", "auto", "untrained", "exhaustive")
    assert set(rows) == {(name, method) for name in names for method in methods}
    for (name, method), row in rows.items():
        best = rows[name, "exhaustive"]
        assert row["regret"] >= -1e-9 and row["mean_round_s"] >= row["straggler_s"] * (1 - 1e-9)
        assert best["regret"] == 0.0 and best["rounds_to_5_percent"] == 1
        classic = rows[name, "classic"]["mean_round_s"]
        assert row["below_classic"] == pytest.approx(1 - row["mean_round_s"] / classic)
        if method == "classic":
            assert (row["below_classic"], row["worst_over_classic"]) == (0.0, 0.0)
    right = rows["paper vgg5", "auto"]
    assert right["regret"] < 0.01  # told the truth, the planner is the oracle
    assert rows["paper vgg5", "classic"]["regret"] > 0.5
    assert rows["paper vgg5", "auto"]["regret_after_change"] is None
    moved = rows["bandwidth vgg5", "auto"]
    assert moved["regret"] > 0.05  # the first round after each change is not known to it
    assert moved["regret_after_change"] < 0.05
    assert rows["paper vgg5", "untrained"]["regret"] < 0.01
    deciding = {row["method"]: row for row in figures["deciding"]}
    assert set(deciding) == {"auto", "untrained"} and deciding["auto"]["devices"] == 100
    for row in deciding.values():
        assert 0 < row["decide_ms"] <= row["most_ms"]
    assert figures["train_s"] is None and figures["skipped"] == []


def test_offload_says_which_methods_it_leaves_out_and_refuses_others(tmp_path, capsys):
    wrong = "bench.train='policy.nonsense=1'"
    small = ("bench.methods=[classic,fedadapt]", wrong, "bench.fleets=0")
    figures = job("offload", capsys, tmp_path / "run", *small)
    (left_out,) = figures["skipped"]
    assert left_out["method"] == "fedadapt" and "policy.nonsense" in left_out["why"]
    assert {row["method"] for row in figures["scenarios"]} == {"classic"}
    call = ["bench", "offload", *SMALL["offload"], "bench.methods=[atuo]"]
    assert main([*call, f"run.dir={tmp_path / 'other'}"]) == 2
    assert "bench.methods=atuo" in capsys.readouterr().err


def test_profiles_are_wrong_by_unit_and_kind_of_device(configure):
    drawn = {"models": ["vgg5"], "rounds": 10, "fleets": 2, "fleet_rounds": 8, "every": 4}
    made = [*offload_fleets.cases({**drawn, "examples": 100}, 7)]
    right, wrong = made[2:4], made[4:]
    assert [case.name for case in made] == [
        "paper vgg5", "bandwidth vgg5", *["unseen fleets"] * 2, *["wrong profiles"] * 2,
    ]  # fmt: skip
    for a, b in zip(right, wrong, strict=True):
        assert a.config == b.config and a.truth.edges == b.truth.edges  # believed alike
        factors = {}
        for one, other in zip(a.truth.devices, b.truth.devices, strict=True):
            assert one.network == other.network
            pairs = zip(one.costs.forward_s[0], other.costs.forward_s[0], strict=True)
            factors.setdefault(one.costs.name, set()).add(tuple(y / x for x, y in pairs if x))
        assert all(len(found) == 1 for found in factors.values())  # one for each kind
        apart = {ratios for found in factors.values() for ratios in found}
        assert len(apart) == len(factors)
        assert all(0.499 < ratio < 2.001 for ratios in apart for ratio in ratios)
        assert a.truth.at_round(1).devices != a.truth.at_round(5).devices
    assert right[0].truth.devices != right[1].truth.devices


def test_training_refuses_fewer_examples_than_a_batch(configure):
    config = configure("+bench=training", "data.examples=40")
    with pytest.raises(ConfigError, match="must be at most the 36 examples"):
        training.run(config, config.bench)


def test_simulation_gives_the_times_of_each_size(tmp_path, capsys):
    figures = job("simulation", capsys, tmp_path / "run", "bench.bytes=[800,1600]")
    assert [(case["bytes"], case["arrays"]) for case in figures["cases"]] == [(800, 2), (1600, 2)]
    for case in figures["cases"]:
        times = [value for key, value in case.items() if key.endswith("_ms")]
        assert len(times) == 5
        assert all(math.isfinite(value) and value > 0 for value in times)


def test_the_bare_loops_of_the_simulation_benchmark_do_what_the_round_does(configure, identity):
    config = configure("+bench=simulation", "num_clients=3")
    model = simulation.make_model(800, 2)
    roster = locate(config.bench["roster"], "bench")()
    strategy = locate(config.bench["strategy"], "bench")(config, model, roster)
    arrays = records.to_record(model.state_dict())
    with LocalGrid(simulation.app, 3) as grid:
        whole = simulation._round(strategy, grid, arrays, 1)
    bare = simulation._bare_round(model, arrays, 3)
    bytes_ = simulation._bare_bytes(model, arrays, 3)
    for name, data in zip(whole, bytes_, strict=True):
        assert records.view(bare[name]).tobytes() == data
        assert records.view(whole[name]) == pytest.approx(records.view(bare[name]), rel=1e-6)


def test_scale_gives_rate_and_memory_of_each_number_of_clients(tmp_path, capsys):
    figures = job("scale", capsys, tmp_path / "run")
    (case,) = figures["cases"]
    assert (case["runtime"], case["clients"], case["processes"]) == ("local", 2, 1)
    assert case["rounds_per_s"] > 0
    assert 50 < case["pss_mb"] <= case["rss_mb"]


def test_scale_needs_a_round_that_counts(configure):
    config = configure("+bench=scale", "rounds=1")
    with pytest.raises(ConfigError, match="rounds=1: must be at least 2"):
        scale.run(config, config.bench)


@pytest.mark.slow
def test_split_gives_each_cut_its_ratio_and_the_memory_of_its_device(tmp_path, capsys):
    figures = job("split", capsys, tmp_path / "run")
    assert [row["cut"] for row in figures["cuts"]] == [1, 2, 3]
    for row in figures["cuts"]:
        assert row["same_bits"] is True
        assert row["ratio"] > 0
    assert [row["of_unsplit"] is None for row in figures["cuts"]] == [False, True, True]
    assert figures["cuts"][0]["device_peak_mb"] > 0


@pytest.mark.skipif(not compiler(), reason="there is no C compiler")
def test_kernels_are_timed_beside_layers_and_their_gradients_compared(tmp_path, capsys):
    figures = job("kernels", capsys, tmp_path / "run")
    for table_ in (figures["units"], figures["devices"]):
        assert [(row["kernels"], row["micro_batches"]) for row in table_] == [
            *(("plain", 2), ("plain", 2), ("fused", 2)),
        ]
        assert all(row["cpu_s"] > 0 and row["of_plain"] > 0 for row in table_)
    layers, _, fused = figures["gradient_errors"]
    assert 0 < fused["error"] < max(1e-5, 2 * layers["error"])


def test_sessions_give_the_rate_of_many_and_of_one_and_what_a_session_takes(tmp_path, capsys):
    figures = job("sessions", capsys, tmp_path / "run")
    assert figures["sessions"] == 3
    assert figures["ratio"] == figures["many_examples_s"] / figures["one_examples_s"] > 0
    assert figures["session_peak_mb"] >= figures["session_rest_mb"]
    assert figures["held_mb"] > 0 < figures["activations_mb"]
    rates = figures["workers_examples_s"], figures["alone_examples_s"]
    assert figures["workers_ratio"] == pytest.approx(rates[0] / rates[1])
    assert min(figures["workers_cpu_ms"], figures["alone_cpu_ms"], *rates) > 0


def test_the_memory_that_a_session_needs_is_counted_by_hand(configure):
    """A linear layer keeps its input, cross-entropy the scores in logarithms, and the labels."""
    config = configure("data=synthetic_32x32", "model=vgg5", "data.examples=20")
    work = sessions._Work.of(config, 4)  # one linear layer, 128 to 10
    assert work.held_bytes() == 2 * 4 * (128 * 10 + 10)  # with momentum
    size = config.client.batch_size
    assert work.activation_bytes() == size * (4 * (128 + 10) + 8) + 4  # and the sum of weights


@pytest.mark.parametrize("wrong", [{"cut": 0}, {"cut": 5}, {"sessions": 0}, {"turns": 1.5}])
def test_sessions_refuse_what_cannot_be(wrong, configure):
    config = configure("data=synthetic_32x32", "model=vgg5", "data.examples=20")
    options = {"sessions": 1, "cut": 1, "steps": 1, "turns": 1, "in_flight": 1} | wrong
    with pytest.raises(ConfigError, match=rf"bench\.{next(iter(wrong))}="):
        sessions.run(config, options)


def test_codecs_stay_within_their_bounds_and_give_each_training_its_accuracy(tmp_path, capsys):
    figures = job("codecs", capsys, tmp_path / "run")
    for row in figures["cases"]:
        if row["codec"] == "fp32":
            assert (row["relative_rms"], row["of_fp32"], row["of_bound"]) == (0.0, 1.0, None)
        else:
            assert 0 < row["of_bound"] <= 1
            share = 1 / 4 if row["codec"] == "int8" else 1 / 2
            assert share <= row["of_fp32"] < 1.15 * share  # int8 has a scale per channel besides
    hashes = {row["codec"]: row["model_sha256"] for row in figures["trainings"]}
    assert len(set(hashes.values())) == len(hashes) == 4
    up = {row["codec"]: row["bytes_up"] for row in figures["trainings"]}
    assert up["fp32"] > 1.8 * up["fp16"] > 0
    assert [row["codec"] for row in figures["accuracy"]] == ["fp32", "fp16", "bf16", "int8"]
    assert figures["accuracy"][0]["points_to_fp32"] == 0


def test_codecs_sum_up_by_seed():
    rows = [
        {"codec": codec, "seed": seed, "accuracy": accuracy}
        for codec, *both in (("fp32", 0.5, 0.7), ("int8", 0.49, 0.72))
        for seed, accuracy in enumerate(both)
    ]
    assert codecs._summary(rows)[1] == {
        "codec": "int8",
        "accuracy": pytest.approx(0.605),
        "points_to_fp32": 0.5,
        "least": -1.0,
        "most": 2.0,
        "seeds": 2,
    }
    assert codecs._summary(rows[2:])[0]["points_to_fp32"] is None


def test_planning_is_timed_and_compared_with_the_optimum_of_few_devices(tmp_path, capsys):
    figures = job("planning", capsys, tmp_path / "run")
    few, many = figures["rows"]
    assert (few["devices"], many["devices"], few["units"]) == (2, 6, 5)
    assert few["workers"] == many["workers"] == 4  # as fleet=pi_lab says
    assert 1 <= few["over"] == few["auto_s"] / few["exhaustive_s"] <= 1.02
    assert many["over"] is None
    for row in figures["rows"]:
        assert row["auto_s"] <= row["classic_s"]
        assert 0 < row["least_ms"] <= row["ms"] <= row["most_ms"]


@pytest.mark.parametrize(
    ("name", "option", "said"),
    [
        ("planning", "bench.workers=3", "bench.workers=3: must be a list"),
        ("planning", "bench.repeats=[1]", r"bench\.repeats=\[1\]: must be a number"),
        ("pipeline", "bench.virtual=7", "bench.virtual=7: must be true or false"),
        ("planning", "bench.workers=[0]", "workers=0: must be at least 1"),
    ],
)
def test_an_option_of_another_kind_is_one_clear_error(name, option, said, tmp_path, capsys):
    """Each was a traceback, and 0 sessions meant those of the fleet."""
    small = [value for value in SMALL.get(name, []) if not value.startswith(option.split("=")[0])]
    assert main(["bench", name, *small, option, f"run.dir={tmp_path / 'run'}"]) == 2
    shown = capsys.readouterr().err
    assert re.search(said, shown) and "Traceback" not in shown


def test_planning_needs_a_fleet_whose_costs_are_known(configure):
    config = configure("+bench=planning", "fleet=local")
    with pytest.raises(ConfigError, match=r"fleet\.devices=\[\]: must name machines"):
        planning.run(config, config.bench)


@pytest.mark.slow
def test_start_divides_the_time_of_a_command(tmp_path, capsys):
    figures = job("start", capsys, tmp_path / "run")
    (case,) = figures["cases"]
    assert case["command_s"] == pytest.approx(
        case["to_first_round_s"] + case["rounds_s"] + case["after_last_round_s"]
    )
    assert case["after_last_round_s"] > 0
    stages = {row["stage"]: row["seconds"] for row in figures["stages"]}
    assert list(stages) == ["command and configuration", "imports", "nodes", "data and model"]
    assert sum(stages.values()) == pytest.approx(case["to_first_round_s"], abs=0.05)


def test_memory_gives_the_size_after_each_round(tmp_path, capsys):
    figures = job("memory", capsys, tmp_path / "run")
    assert [row["round"] for row in figures["sizes"]] == [0, 1, 2]
    sizes = [row["resident_mb"] for row in figures["sizes"]]
    assert figures["growth"] == pytest.approx(sizes[2] / sizes[1] - 1)
    inner = json.loads((tmp_path / "run" / "run" / "run.json").read_text())
    assert inner["status"] == "finished"
    assert inner["result"]["rounds"] == 3


def test_memory_refuses_rounds_that_the_run_does_not_have(configure):
    config = configure("+bench=memory", "rounds=20")
    with pytest.raises(ConfigError, match=r"rounds=20: must be above bench\.to_round=20"):
        memory.run(config, config.bench)


def test_prune_compares_dense_models_with_masked_ones(tmp_path, capsys):
    figures = job("prune", capsys, tmp_path / "run")
    exact, refused, alive = figures["exactness"]
    for row in (exact, alive):
        assert row["max_abs_diff_float64"] <= 1e-9
        assert row["max_abs_diff"] <= 1e-5 * max(1.0, row["max_abs_output"])
        assert row["other_answers"] == 0 and row["images"] == 20
    # where chance kills layers, or answers no longer vary with the image, nothing was exercised
    assert alive["spread"] > 1e-3 and alive["params"] < 20_000
    assert "would leave none" in refused["refused"] or ".weight" in refused["refused"]
    (conversion,) = figures["conversions"]
    assert conversion["params"] < conversion["reference_params"] <= conversion["parent_params"]
    (effort,) = figures["effort"]
    assert effort["variants"] == 2 and effort["slower_than_parent_on_the_front"] == 0
    assert effort["times_faster"] == pytest.approx(
        2 * effort["training_seconds"] / effort["seconds"]
    )
    for row in figures["trained"]:
        assert row["other_answers"] == 0
        assert row["test_accuracy"] == row["masked_test_accuracy"]
        assert row["times_fewer"] == pytest.approx(582_346 / row["params"])


def test_torch_pruning_is_given_the_parameters_of_ours():
    pytest.importorskip("torch_pruning")
    from fedsys.commands.bench.prune_rivals import torch_pruning
    from fedsys.models.vgg import vgg5

    model = vgg5((3, 32, 32), 10)
    pruned = torch_pruning(model, (3, 32, 32), 200_000, ["fc2.linear.weight"])
    left = sum(p.numel() for p in pruned.parameters())
    assert 150_000 < left <= 200_000
    assert pruned(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.slow  # models are exported, and sizes searched for
def test_prune_compares_engines_and_widths_at_equal_parameters(tmp_path, capsys):
    pytest.importorskip("torch_pruning")
    pytest.importorskip("onnxruntime")
    small = ["families", "conversions", "rivals"]
    options = ["bench.rounded=[vgg5]", "bench.served=[vgg5]", "bench.served_batches=[1,2]"]
    options += [*(f"bench.{key}=[]" for key in small), "bench.trains=false", "bench.rival_runs=5"]
    options += ["data.examples=200", "client.batch_size=50", "client.threads=1"]
    call = ["bench", "prune", *options, "json=true"]
    assert main([*call, f"run.dir={tmp_path / 'run'}"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["engine"] for row in figures["rounding"]] == ["torch", "onnx"]
    for row in figures["rounding"]:
        assert 0 <= row["rounded"] <= row["groups"] and row["chosen_ms"] <= row["exact_ms"]
        assert row["faster_than_exact"] == pytest.approx(row["exact_ms"] / row["chosen_ms"])
    cells = {(row["engine"], row["batch"], row["by"]): row for row in figures["served"]}
    ours = [f"fedsys, elements^1, for {engine}" for engine in ("torch", "onnx")]
    for engine, batch in itertools.product(("torch", "onnx"), (1, 2)):
        rival = cells[engine, batch, "Torch-Pruning"]
        assert rival["faster_than_torch_pruning"] == 1.0
        most = cells[engine, batch, "fedsys"]["params"]
        for by in (*ours, "Torch-Pruning"):
            assert cells[engine, batch, by]["ms"] > 0
            assert 0.8 * most < cells[engine, batch, by]["params"] <= most
    assert len(cells) == 2 * (2 * 4 + 1)


def test_the_link_benchmark_takes_its_defaults_from_the_file_of_choices(configure):
    options = {k: v for k, v in configure("+bench=link").bench.items() if k != "name"}
    assert options == dict(link.DEFAULTS)


def test_the_throughput_of_links_is_drawn(tmp_path):
    case = {"bytes": 1024, "ours_mb_s": 90.0, "grpc_mb_s": 100.0}
    figures = {"cases": [case | {"link": "grpc"}, case | {"link": "tcp"}]}
    file = bench.draw(link.chart(figures), tmp_path / "link.png")
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("most", "expected"), [(100, 100), (37, 37), (7, None)])
def test_rivals_are_the_largest_that_fit(most, expected):
    from fedsys.commands.bench.prune_rivals import largest

    def made(share):
        if share > 0.9:
            raise ModelError("a layer would be empty")
        return round(1000 * (1 - share) ** 2)

    found = largest(made, lambda size: size, most, steps=20)
    assert found == expected


# --------------------------------------------------------------------------------------------------
# Soak


@pytest.mark.slow  # edge servers are started
def test_a_soak_counts_faults_runs_and_what_became_of_them(tmp_path, capsys):
    more = ["bench.minutes=0.05", "bench.links=[tcp]", "bench.every_s=0.5", "rounds=8"]
    more = [*more, "bench.pause_s=0.3", "bench.edges=2"]
    call = ["bench", "soak", *more, "num_clients=2", "json=true"]
    assert main([*call, f"run.dir={tmp_path / 'run'}"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = figures["links"]
    assert row["runs"] >= 1 and row["faults"] >= 1
    assert (row["ended"], row["other_model"]) == (0, 0)
    assert {sample["link"] for sample in figures["samples"]} == {"tcp"}
    assert not (tmp_path / "run" / "soak" / "run").exists()
