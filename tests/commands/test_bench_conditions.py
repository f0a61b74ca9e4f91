import json
import os

import pytest
import yaml

from fedsys.commands.bench.condition_sweep import ConditionSweep, read_samples, useful_cuts
from fedsys.commands.bench.conditions import sweep_of
from fedsys.config import CONF, compose_text, parse
from fedsys.errors import DataError
from fedsys.main import main
from fedsys.models import layered
from fedsys.partition.controlled import Load, come_first
from tests.serving.chains import SHAPE, model


def test_a_condition_is_what_its_digits_say():
    sweep = ConditionSweep((50e6, 10e6), 0.0, (0.0, 0.5, 1.0), (0, 10), repeats=1)
    assert len(sweep.conditions()) == 2 * 3 * 2 * 2 * 3
    # network, cloud_cpu, edge_memory, cloud_memory, edge_cpu
    assert sweep.loads((1, 2, 1, 0, 1)) == {"edge": (0.5, 10), "cloud": (1.0, 0)}


def test_levels_that_were_given_stay_with_quick():
    config = parse(compose_text(""))
    text = (CONF / "bench" / "conditions.yaml").read_text()
    options = {**yaml.safe_load(text)["bench"], "quick": True}
    sweep = sweep_of(config, options)
    assert (sweep.rates, sweep.cpu, sweep.repeats) == ((50e6, 10e6), (0.0, 1.0), 4)
    sweep = sweep_of(config, {**options, "rates": [9, 8, 7], "repeats": 6})
    assert (sweep.rates, sweep.cpu, sweep.repeats) == ((9e6, 8e6, 7e6), (0.0, 1.0), 6)


def test_loads_and_hosts_come_first_where_that_is_allowed():
    load = Load()
    allowed = come_first([load.pid])
    first = os.getpriority(os.PRIO_PROCESS, load.pid) == -20
    load.close()
    assert allowed == first and not come_first([])
    assert allowed or os.geteuid() != 0


def test_useful_cuts_are_those_where_less_crosses_than_at_all_before():
    layers = layered(model("mobilenet_v2"), SHAPE)
    every, useful = (useful_cuts(layers, choice) for choice in (True, False))
    assert every == [0, *layers.cuts, len(layers)] and set(useful) < set(every)
    assert {0, len(layers)} <= set(useful)


def test_a_load_takes_memory_and_time_until_it_is_closed():
    load = Load()
    load.set(0.5, 64 << 20)
    got = load.achieved(0.2)
    assert got.cpu > 0 and 60 << 20 < got.memory_bytes < 80 << 20
    load.set(0.0, 0)
    assert load.achieved(0.0).memory_bytes < 30 << 20
    load.close()


def test_published_files_are_analysed_without_measuring(tmp_path, capsys):
    for name, seconds in (("00000", (0.2, 0.1)), ("10000", (0.2, 0.4))):
        rows = [f"{total} 0.01 0.02 {cut}\n" for cut, total in enumerate(seconds, 1)]
        (tmp_path / f"weights_{name}.txt").write_text("".join(rows))
    call = ["bench", "conditions", "models=[]", f"bench.published={tmp_path}", "json=true"]
    assert main([*call, f"run.dir={tmp_path / 'run'}"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["gains"]
    assert row["best_cuts"] == 2 and row["static_s"] == 0.2 and not row["held_out"]
    assert row["gain_over_static"] == pytest.approx(0.25)
    assert main([*call[:3], f"run.dir={tmp_path / 'none'}"]) == 2
    assert "bench.models=[]: must name a model" in capsys.readouterr().err
    assert main([*call, "bench.rates=[10,50]", f"run.dir={tmp_path / 'wrong'}"]) == 2
    assert "must be levels, descending: the mildest first" in capsys.readouterr().err


@pytest.mark.slow  # two host processes
def test_a_sweep_goes_on_where_it_ended(forked_hosts, tmp_path, capsys):
    call = [
        "bench", "conditions", "models=[lenet]", "json=true", "bench.side=32", "bench.rates=[1000]",
        "bench.cpu=[0.0,1.0]", "bench.memory=[0.0]", "bench.repeats=2", "bench.verify_s=0.01",
        f"bench.samples={tmp_path / 'all.csv'}",
    ]  # fmt: skip
    assert main([*call, f"run.dir={tmp_path / 'run'}"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    samples = read_samples(tmp_path / "all.csv")
    cuts = {one.cut for one in samples}
    assert (
        len(samples)
        == 4 * 2 * len(cuts)
        == len({(one.condition, one.cut, one.repeat) for one in samples})
    )
    assert {one.condition for one in samples} == {"00000", "00001", "01000", "01001"}
    assert all(0 <= one.edge_s + one.cloud_s <= one.total_s for one in samples)
    assert all((one.edge_s == 0) == (one.cut == 0) for one in samples)
    (gains,) = figures["gains"]
    assert gains["held_out"] and gains["oracle_s"] <= gains["initial_s"] * 10
    assert {row["factor"] for row in figures["sensitivity"]} == {"edge_cpu", "cloud_cpu"}
    lines = (tmp_path / "all.csv").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("lenet,01001,")]
    (tmp_path / "all.csv").write_text("".join(kept))
    assert main([*call, f"run.dir={tmp_path / 'again'}"]) == 0
    again = read_samples(tmp_path / "all.csv")
    assert len(again) == len(samples) == len({(s.condition, s.cut, s.repeat) for s in again})
    assert (tmp_path / "all.csv").read_text().startswith("".join(kept))
    (tmp_path / "all.csv").write_text(lines[0] + "lenet,00000,x,0\n")
    with pytest.raises(DataError, match=r"all.csv:2: is no sample"):
        read_samples(tmp_path / "all.csv")
