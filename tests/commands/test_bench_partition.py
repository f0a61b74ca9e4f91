import math
import random
import time

import pytest
import torch
import yaml

from fedsys.commands.bench.partition import SO_FAR, _quick, draw_trace
from fedsys.commands.bench.partition_moves import in_order
from fedsys.commands.bench.partition_planner import drawn_problem, planner_figures
from fedsys.commands.bench.partition_requests import taken
from fedsys.commands.bench.partition_trace import LinkTrace, PlayedChain, figures
from fedsys.config import CONF
from fedsys.main import main


def test_the_planner_is_compared_with_every_partition():
    found = planner_figures(compared=6, repeats=1, seed=0)
    assert found["planner_equal"] == found["planner_compared"] == 6
    assert found["plan_two_ms"] > 0 and found["plan_four_ms"] > 0
    assert len(drawn_problem(random.Random(0), 5, 3).networks) == 2


def test_a_trace_is_told_beside_the_best_that_stays_and_an_oracle():
    """In the first piece one cut takes 1 s and the other 3, in the second the other way round."""
    move = {"verdict": "move"}
    points = [(0.5, 1.0, "1"), (1.5, 2.0, "4")]
    moving = PlayedChain("moves", [[1.0], [2.0]], [move, {"verdict": "back"}], points)
    standing = [PlayedChain("a", [[1.0], [3.0]]), PlayedChain("b", [[3.5], [1.0]])]
    found = figures([moving, *standing], LinkTrace((2e6, 1e6), 1.0))
    rows = {row["contender"]: row for row in found["contenders"]}
    assert rows["oracle"]["mean_ms"] == 1000 and found["best_static"] == "a"
    assert found["mean_to_static"] == pytest.approx(0.75)
    assert found["share_of_oracle_gain"] == pytest.approx(0.5)
    assert (found["moves_per_change"], found["undone"]) == (2, 1)
    assert [point["mbit_s"] for point in found["points"]] == [2, 1]
    alone = figures([moving, standing[0]], LinkTrace((2e6, 1e6), 1.0))
    assert math.isnan(alone["share_of_oracle_gain"])  # the oracle gains nothing


def options(**given):
    text = (CONF / "bench" / "partition.yaml").read_text()
    return {**yaml.safe_load(text)["bench"], **given}


def test_what_was_given_stays_with_quick():
    """`quick=true` had 20 moves whatever `bench.moves` was."""
    plain = _quick(options())
    assert (plain["moves"], plain["models"]) == (20, ["alexnet", "lenet"])
    given = _quick(options(moves=3, models=("vgg16", "lenet"), networks=((5, 1),)))
    assert (given["moves"], given["models"]) == (3, ("vgg16", "lenet"))
    assert given["slow_moves"] == 2 and given["networks"] == ((5, 1),)


def test_the_order_of_the_ways_is_that_of_their_times():
    ways = {"warm": (0, 0.01), "beside": (80, 0.02), "process": (900, 0.01), "pause": (200, 300)}
    rows = [{"way": w, "prepare_ms": p, "blocked_ms": b} for w, (p, b) in ways.items()]
    assert in_order(rows)
    assert not in_order([*rows[:3], {"way": "pause", "prepare_ms": 200, "blocked_ms": 0.001}])
    assert not in_order([{**rows[0], "prepare_ms": 100}, *rows[1:]])


def test_requests_end_when_their_time_does():
    class Slow:
        took_s = 1.0

        def module(self, image):
            time.sleep(0.01)

    image = torch.zeros(1)
    assert len(taken(Slow(), image, 8)) == 8
    assert len(taken(Slow(), image, 1000, most_s=0.0)) == 3


def test_a_picture_shows_requests_above_the_link(tmp_path):
    points = [
        {"at_s": float(i), "ms": 100.0 + i, "cuts": "08"[i > 3], "mbit_s": 50 if i < 3 else 4}
        for i in range(8)
    ]
    assert draw_trace(points, tmp_path / "trace.png").stat().st_size > 10_000


def test_parts_that_there_are_not_are_refused(tmp_path, capsys):
    call = ["bench", "partition", "bench.parts=[plan]", f"run.dir={tmp_path / 'run'}"]
    assert main(call) == 2
    assert "bench.parts=['plan']: must name some of planner, latency" in capsys.readouterr().err


@pytest.mark.slow  # host processes
def test_requests_of_processes_have_the_bits_of_the_whole_model(forked_hosts, tmp_path, capsys):
    import json

    call = [
        "bench", "partition", "quick=true", "models=[lenet]", "bench.model=lenet", "bench.side=32",
        "bench.networks=[[1000,0]]", "bench.parts=[latency,moves]", "bench.moves=3",
        "bench.slow_moves=1",
    ]  # fmt: skip
    assert main([*call, "json=true", f"run.dir={tmp_path / 'run'}"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = json.loads((tmp_path / "run" / SO_FAR).read_text())
    assert kept.items() <= found.items()
    assert found["same_bits"] and found["off_max"] == 0
    assert [row["way"] for row in found["ways"]] == ["warm", "beside", "process", "pause"]
    assert [row["moves"] for row in found["ways"]] == [3, 3, 1, 1]
    assert all(row["lost"] == row["wrong"] == 0 < row["answers"] for row in found["ways"])
