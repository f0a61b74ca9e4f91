import json
import time
from dataclasses import replace

import pytest
import torch

from fedsys.commands.bench.switch_load import LeasedEngine, RequestStream
from fedsys.commands.bench.switch_portfolio import make_portfolio
from fedsys.commands.bench.switch_trace import arrivals, front, make_trace, play
from fedsys.config.serving import ObjectiveConfig, ServingConfig
from fedsys.main import main
from fedsys.pruning.portfolio import Portfolio
from fedsys.serving.batching import Batcher, BatchLimits
from fedsys.serving.switch.policy import profile_of
from fedsys.serving.switch.switcher import Loaded
from tests.waiting import until


@pytest.fixture
def portfolio(portfolio_folder):
    return Portfolio.load(portfolio_folder)


@pytest.mark.slow
def test_the_benchmark_compares_ways_and_contenders(portfolio_folder, tmp_path, capsys):
    call = [
        "bench", "switch", "json=true", f"run.dir={tmp_path / 'run'}",
        f"portfolio={portfolio_folder}", "bench.switches=4",
        "bench.other_switches=2", "bench.quiet_seconds=0.2", "bench.segments=2",
        "bench.segment_seconds=0.3", "bench.traces=[balanced,drawn]",
        "bench.http_seconds=0.2", "bench.http_switches=3",
    ]  # fmt: skip
    assert main(call) == 0
    out, said = capsys.readouterr()
    order = [line.split(": ")[1] for line in said.splitlines() if line.startswith("drawn trace")]
    contenders = ["switching", "parent", "half", "tenth"]
    assert order == contenders + contenders[::-1]  # what drifts is as hard on one as on the other
    figures = json.loads(out.splitlines()[-1])
    ours = figures["ways"][0]
    ways = [row["way"] for row in figures["ways"]]
    assert ways == ["beside", "instead", "resident", "slimmable"]
    assert ours["switches"] == 5  # the last one goes back to the parent
    assert figures["lost_or_mixed"] == 0
    assert figures["goal_requests"] is True
    assert [row["way"] for row in figures["ratios"]] == ways[1:]
    assert all(r["requests"] == r["answered"] + r["failed"] for r in figures["requests"])
    assert [row["trace"] for row in figures["traces"]] == ["balanced", "drawn"]
    names = [row["contender"] for row in figures["contenders"]]
    assert names == contenders * 2
    for row in figures["contenders"]:
        assert 0 <= row["attainment_x_accuracy"] <= row["attainment"] <= 1
    for row in figures["traces"]:
        alone = [r for r in figures["contenders"] if r["trace"] == row["trace"]][1:]
        assert row["best_single"] == max(r["attainment_x_accuracy"] for r in alone)
        assert row["best_single"] <= row["oracle"] <= 0.9 + 1e-9
        assert sum(r["right_for"] for r in alone) == pytest.approx(1)
    assert len(figures["segments"]) == 3 + 2
    assert len(figures["http"]) == 4 and figures["goal_requests"] is True
    assert (tmp_path / "run" / "plots" / "switch.png").exists()
    assert (tmp_path / "run" / "contenders.csv").exists()


def test_without_a_portfolio_one_is_trained_and_pruned(configure, tmp_path):
    config = configure(
        "+bench=switch", "data=synthetic", "data.examples=200", "data.test_examples=20",
        "model=cnn", "pruning.sparsity=[0.5]", "variants.memory=false",
        "client.threads=1",
    )  # fmt: skip
    told = []
    made = make_portfolio(config, tmp_path / "made", 1, told.append)
    assert "epoch 1 of 1" in told[0]
    assert made.parent.accuracy > 0
    assert Portfolio.load(tmp_path / "made").digest == made.digest


def test_a_way_that_does_not_exist_is_refused(portfolio_folder, capsys):
    assert main(["bench", "switch", f"portfolio={portfolio_folder}", "bench.ways=[besides]"]) == 2
    assert "bench.ways=['besides']: must name beside" in capsys.readouterr().err


def test_turns_that_are_none_are_refused(portfolio_folder, capsys):
    assert main(["bench", "switch", f"portfolio={portfolio_folder}", "bench.turns=0"]) == 2
    assert "bench.turns=0: must be an integer of at least 1" in capsys.readouterr().err


def test_the_stream_counts_an_answer_of_another_variant_as_wrong(portfolio):
    """What the benchmark looks for must be found: here two variants have changed their names."""
    image = torch.ones(1, *portfolio.about.input_shape)
    with torch.inference_mode():
        right = {name: portfolio.module(name)(image) for name in ("parent", "half")}
    for swapped in (False, True):
        names = ("half", "parent") if swapped else ("parent", "half")
        claimed = dict(zip(("parent", "half"), (right[n] for n in names), strict=True))
        engine = LeasedEngine(portfolio, Loaded(portfolio.module, "parent"))
        batcher = Batcher(engine, BatchLimits(max_batch=1, max_delay_ms=0.0))
        began = time.perf_counter()
        stream = RequestStream(batcher, image, claimed, 200.0)
        until(lambda s=stream: s.answered >= 5)
        stream.stop()
        batcher.close(10)
        assert stream.issued == stream.answered
        assert stream.wrong == (stream.answered if swapped else 0)
        assert stream.longest_gap_ms(began, time.perf_counter()) > 0
        assert len(engine.waits_ms) == stream.answered
        engine.close()


def test_a_trace_is_a_function_of_its_seed(portfolio):
    profiles = [profile_of(v, 1) for v in portfolio.variants]
    trace = make_trace("drawn", profiles, 200, 5.0, 1)
    assert trace == make_trace("drawn", profiles, 200, 5.0, 1)
    assert trace != make_trace("drawn", profiles, 200, 5.0, 2)
    low = 200 / max(p.latency[0].p50_ms for p in profiles)
    high = 500 / min(p.latency[0].p50_ms for p in profiles)
    assert all(low <= segment.rate <= high for segment in trace)
    assert {segment.busy for segment in trace} == {True, False}
    smallest = min(p.peak_bytes for p in profiles)
    budgets = [s.memory_bytes for s in trace if s.memory_bytes is not None]
    assert budgets and min(budgets) >= smallest  # some variant fits at all times
    assert len(budgets) < len(trace)


def test_a_balanced_trace_gives_each_variant_of_the_front_as_many_requests(portfolio):
    profiles = [profile_of(v, 1) for v in portfolio.variants]
    profiles.append(replace(profiles[1], name="worse", accuracy=0.1))  # nowhere the right one
    assert [v.name for v in front(profiles)] == ["tenth", "half", "parent"]
    trace = make_trace("balanced", profiles, 13, 2.0, 1)
    assert trace == make_trace("balanced", profiles, 13, 2.0, 1)
    assert sum(segment.seconds for segment in trace) == pytest.approx(13 * 2.0)
    each = [segment.seconds * segment.rate for segment in trace]
    assert each == pytest.approx([each[0]] * 12)
    able = [1e3 / v.latency[0].p50_ms for v in front(profiles)]
    for rate, better in zip(able, (*able[1:], 0.0), strict=True):
        high = 0.7 * rate * (1 + 1e-9)
        mine = [s for s in trace if min(better, 0.69 * rate) <= s.rate <= high]
        assert len(mine) >= 4


def test_arrivals_come_at_the_rates_of_their_segments(portfolio):
    profiles = [profile_of(v, 1) for v in portfolio.variants]
    trace = make_trace("drawn", profiles, 5, 50.0, 3)
    moments = arrivals(trace, 4)
    assert moments == sorted(moments)
    for number, segment in enumerate(trace):
        count = sum(n == number for _, n in moments)
        assert count == pytest.approx(50.0 * segment.rate, rel=0.3)
        assert all(50 * number <= t < 50 * (number + 1) for t, n in moments if n == number)


def test_requests_over_the_budget_count_nothing(portfolio):
    profiles = {v.name: profile_of(v, 1) for v in portfolio.variants}
    options = ServingConfig(objective=ObjectiveConfig(p95_ms=60_000.0), max_batch=4)
    (segment,) = make_trace("drawn", list(profiles.values()), 1, 0.3, 0)
    tight = [replace(segment, rate=50.0, memory_bytes=profiles["tenth"].peak_bytes, busy=False)]
    parent = play(portfolio, options, tight, 1, variant="parent")
    row = parent.figures
    assert row["over_budget"] == row["requests"] == row["answered"] > 0
    assert row["attainment"] == row["attainment_x_accuracy"] == sum(parent.values) == 0
    assert parent.log[0]["over_budget"] == 1
    small = play(portfolio, options, tight, 1, variant="tenth")
    assert small.figures["attainment"] == 1
    assert small.figures["attainment_x_accuracy"] == pytest.approx(0.6)
    assert small.log[0]["by"] == f"tenth {small.figures['requests']}"
    both = parent + play(portfolio, options, tight, 1, variant="parent")
    assert both.figures == {**row, "requests": 2 * row["requests"], "answered": 2 * row["answered"],
                            "over_budget": 2 * row["over_budget"]}  # fmt: skip
    assert both.log[0]["by"] == f"parent {both.figures['requests']}"
    assert len(both.ledgers[0].queued_ms) == both.figures["answered"]


def test_what_is_kept_in_memory_counts_against_the_budget(portfolio):
    """Both play under a budget that the answering variant keeps, and all three together do not."""
    size = {v.name: v for v in portfolio.variants}
    budget = size["tenth"].peak_bytes + size["half"].bytes + size["parent"].bytes - 1
    options = ServingConfig(
        objective=ObjectiveConfig(p95_ms=60_000.0), max_batch=4, resident=True, variant=None
    )
    (segment,) = make_trace("drawn", [profile_of(v, 1) for v in portfolio.variants], 1, 0.3, 0)
    tight = [replace(segment, rate=50.0, memory_bytes=budget, busy=False)]
    played = play(portfolio, options, tight, 1).figures
    assert played["over_budget"] == played["answered"] > 0
