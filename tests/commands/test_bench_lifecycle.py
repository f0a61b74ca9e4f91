"""The life of a model: what its stages say, what is kept of them, and the page of it all."""

import json
import re
import threading
from datetime import datetime

import pytest

from fedsys.commands.bench import lifecycle
from fedsys.commands.bench.lifecycle_answers import (
    LoadPhase,
    chain_decisions,
    chain_figures,
    phase_rows,
    switch_decisions,
    thinned,
)
from fedsys.commands.bench.lifecycle_load import PacedLoad, TimedAnswer
from fedsys.commands.bench.lifecycle_making import (
    moves_of,
    partition_decisions,
    pruning_decisions,
    rounds_of,
    training_decisions,
)
from fedsys.commands.bench.lifecycle_serving import busiest
from fedsys.commands.bench.lifecycle_stages import Life, options_for, overrides_of
from fedsys.config import compose_text, parse
from fedsys.errors import ConfigError
from fedsys.main import main
from fedsys.runs.decisions import OffloadDecision
from fedsys.runs.folder import RunFolder
from fedsys.runs.report.life import TITLES, decision_table, off_by, page
from tests.waiting import until

WRITTEN = datetime(2026, 11, 30, 18, 0)


def config(text=""):
    return parse(compose_text(f"+bench=lifecycle {text}"))


def decided(number, client, **more):
    return OffloadDecision(
        number, client, "pi4", 2, "block1", False, 0.25, 2, "fp32", "edge-0", **more
    )


MADE = [
    decided(1, 0, predicted_s=2.0, measured_s=3.0, reason="the link is fast"),
    decided(1, 1, predicted_s=4.0, measured_s=2.5),
    decided(2, 0, predicted_s=1.0),
]


def test_rounds_are_as_long_as_their_slowest_device():
    rows = list(rounds_of(MADE, [{"round": 1, "seconds_round": 3.5}, {"round": 2}]))
    assert [(row["predicted_s"], row["measured_s"]) for row in rows] == [(4.0, 3.0), (1.0, None)]


def test_training_tells_cuts_moves_losses_and_the_promise():
    figures = {
        "privacy": {"noise_multiplier": 0.8, "claim": "of each example", "epsilon": 7.9},
        "moves": [{"round": 1, "client": 0, "source": "edge-0", "target": "edge-1", "how": "",
                   "predicted_pause_s": 0.1, "pause_s": 0.3, "bytes": 9, "predicted_bytes": 8}],
        "recoveries": [{"client": 1, "round": 2, "what": "edge", "why": "closed", "from": "edge-2",
                        "to": "edge-0", "repeated_steps": 1, "seconds": 0.8}],
    }  # fmt: skip
    rows = list(training_decisions(MADE, figures, config()))
    told = {(row.who, row.quantity): (row.predicted, row.measured) for row in rows}
    assert told["all devices", "epsilon"] == (8.0, 7.9)
    assert told["device 0", "pause, s"] == (0.1, 0.3)
    assert told["device 1", "without an edge server, s"] == (None, 0.8)
    assert told["device 1, pi4", "round, s"] == (4.0, 2.5)
    assert rows[1].why == "the link is fast" and "cut after block1" in rows[1].decision
    assert next(moves_of(figures["moves"]))["pause_s"] == 0.3


def test_pruning_and_partitioning_tell_what_stays_and_what_is_served():
    row = {"name": "parent", "accuracy": 0.8, "test_accuracy": 0.75, "params": 10, "p50_ms": 2.0,
           "parent_params": 10}  # fmt: skip
    made = {"variants": [row], "refused": {"half": "slower than its parent"}}
    stays, refused = pruning_decisions(made)
    assert (stays.predicted, stays.measured, refused.why) == (0.8, 0.75, "slower than its parent")
    plans = [{"variant": name, "accuracy": 0.8, "chain": f"device {name}", "latency_ms": ms}
             for name, ms in (("parent", 20.0), ("half", 10.0))]  # fmt: skip
    rows = list(partition_decisions({"variant": "half", "variants": plans, "why": "it is faster"}))
    assert [one.decision for one in rows] == [
        "is not served: device parent",
        "is served: device half",
    ]
    assert rows[1].why == "it is faster"


# --------------------------------------------------------------------------------------------------
# The chain

PHASES = [
    LoadPhase("calm", 0.0, 10.0, 2.0, 20.0),
    LoadPhase("load rises", 10.0, 20.0, 6.0, 25.0, "", "3/7", "the best already"),
    LoadPhase("bandwidth falls", 20.0, 30.0, 6.0, None),
    LoadPhase("a host dies", 30.0, 40.0, 6.0, 50.0, "edge"),
]
ANSWERS = [
    *(TimedAnswer(float(at), 20.0, cuts="3/7") for at in range(30)),
    TimedAnswer(29.9, 40.0),
    TimedAnswer(30.1, 0.0, error="status 503"),
    TimedAnswer(30.2, 300.0, "repartition", "3/3"),
    *(TimedAnswer(float(at), 60.0, "repartition", "3/3") for at in range(31, 40)),
]
FAILOVER = {
    "time_s": 30.4, "event": "failover", "host": "edge", "technique": "repartition",
    "route": "3/3", "predicted_ms": 50.0, "decide_ms": 0.4, "replayed": 1, "reason": "no other",
    "candidates": [{"route": "3/3", "downtime_ms": 350.0}],
}  # fmt: skip
MOVE = {"time_s": 22.0, "cuts": [2, 7], "reason": "9 instead of 20 ms", "best_ms": 9.0,
        "blocked_ms": 0.1}  # fmt: skip


def test_phases_have_what_was_expected_beside_what_requests_took():
    rows = phase_rows(PHASES, ANSWERS, 15.0)
    assert [(row["planned_ms"], row["expected_ms"], row["p50_ms"]) for row in rows] == [
        (15.0, 20.0, 20.0), (None, 25.0, 20.0), (None, None, 20.0), (None, 50.0, 60.0),
    ]  # fmt: skip
    assert [row["failed"] for row in rows] == [0, 0, 0, 1]
    assert (rows[3]["technique"], rows[3]["cuts"]) == ("repartition", "3/3")
    assert phase_rows(PHASES, [], 15.0)[0]["p50_ms"] is None


def test_the_gap_goes_from_the_death_to_the_first_answer_of_the_new_route():
    figures = chain_figures(PHASES, ANSWERS, [FAILOVER])
    assert figures["gap_ms"] == pytest.approx(500.0)
    assert figures["predicted_gap_ms"] == 350.0
    assert figures["silence_ms"] == pytest.approx(1000.0)
    assert (figures["requests"], figures["failed"]) == (len(ANSWERS), 1)
    alive = [*PHASES[:3], LoadPhase("a host dies", 30.0, 40.0, 6.0)]
    assert chain_figures(alive, ANSWERS, [])["gap_ms"] is None


def test_a_loss_that_interrupts_nobody_has_no_gap_and_who_computes_most_dies():
    assert chain_figures(PHASES, ANSWERS, [])["gap_ms"] is None
    chain = [{"host": h, "units": u} for h, u in (("a", [1, 2, 3]), ("b", [1]), ("c", [1]))]
    assert (busiest(chain), busiest(chain[:2])) == ("c", "b")


def test_each_decision_of_the_chain_has_what_requests_took_until_the_next():
    plan = {"chain": "device a | edge b", "why": "the fastest", "cuts": [3, 7]}
    lost = {"time_s": 30.3, "event": "lost", "host": "edge", "why": "its link ended"}
    told = {"move": [MOVE], "recovery": [lost, FAILOVER]}
    rows = list(chain_decisions(plan, told, PHASES, ANSWERS, phase_rows(PHASES, ANSWERS, 15.0)))
    assert [(one.when, one.predicted, one.measured) for one in rows] == [
        ("before", 15.0, 20.0),
        ("load rises, in the end", 25.0, 20.0),
        ("bandwidth falls, 2.0 s", 9.0, 20.0),
        ("a host dies, 0.3 s", None, None),
        ("a host dies, 0.4 s", 50.0, 60.0),
        ("a host dies, 0.4 s", 350.0, pytest.approx(500.0)),
    ]
    assert (rows[1].why, rows[2].decision) == ("the best already", "cuts become 2/7")
    failed = {"time_s": 1.0, "cuts": [1], "error": "no memory"}
    rows = list(chain_decisions(plan, {"move": [failed]}, PHASES, [], phase_rows(PHASES, [], 1.0)))
    assert rows[0].measured is None and rows[2].why == "no memory"


def test_switches_have_predicted_and_measured_tails():
    status = {
        "variant": "half", "reason": "it is fast enough", "predicted_p95_ms": {"half": 8.0},
        "records": [
            {"before": "parent", "after": "half", "reason": "late", "predicted_p95_ms": 8.0,
             "p95_after_ms": 9.0, "error": ""},
            {"before": "half", "after": "parent", "error": "damaged"},
        ],
    }  # fmt: skip
    rows = list(switch_decisions(status, [{"phase": "load rises", "p95_ms": 9.5}], 30.0))
    assert [(one.decision, one.predicted, one.measured) for one in rows] == [
        ("parent → half", 8.0, 9.0),
        ("half → parent failed", None, None),
        ("half answers", 8.0, 9.5),
    ]  # fmt: skip


def test_of_many_requests_some_are_drawn():
    many = [TimedAnswer(float(at), 1.0) for at in range(1000)]
    points = thinned(many, 0.0)
    assert 200 < len(points) <= 300 and points[0]["at_s"] == 0.0


def test_load_is_sent_at_its_rate_whether_or_not_answers_come():
    held, sent = threading.Event(), []

    def ask():
        sent.append(1)
        held.wait(30)
        return TimedAnswer(0.0, 1.0)

    load = PacedLoad(ask, 200.0)
    try:
        assert until(lambda: len(sent) == 32 and load.late > 0)  # as many as may be under way
    finally:
        held.set()
    assert len(load.close()) == len(sent)


# --------------------------------------------------------------------------------------------------
# Stages that are kept


def test_quick_makes_smaller_what_was_not_given():
    given = {"bench": "+bench=lifecycle", "bench.quick": "bench.quick=true", "rounds": "rounds=9",
             "run.dir": "run.dir=x", "json": "json=true"}  # fmt: skip
    assert overrides_of(given, ["rounds=3", "seed=1"]) == [
        "+experiment=lifecycle", "seed=1", "rounds=9",
    ]  # fmt: skip
    options = dict(config("bench.quick=true bench.switch_s=2.5").bench)
    made = options_for(options)
    assert (made["phase_s"], made["switch_s"]) == (6.0, 2.5)


def test_a_stage_that_is_kept_is_not_done_again_and_another_life_is_refused(tmp_path):
    options = {**config().bench, "stages": ["chain", "train"]}
    life = Life(tmp_path, options, {}, True)
    assert life.stages == ["train", "chain"]
    done = []

    def work(life):
        done.append(life)
        return {"decisions": [], "accuracy": 0.5}

    first = life.carried_out("train", work)
    again = Life(tmp_path, options, {}, True).carried_out("train", work)
    assert len(done) == 1 and again == json.loads(json.dumps(first))
    with pytest.raises(ConfigError, match="must have prune before what needs it"):
        life.needed("prune")
    other = Life(tmp_path, options, {"seed": "seed=5"}, True)
    with pytest.raises(ConfigError, match=r"bench.kept=.* must be of the same configuration"):
        other.kept("train")
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        life.kept("train")


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"bench.stages=.* must name at least one of train"):
        Life(tmp_path, {**config().bench, "stages": ["trian"]}, {}, True)


# --------------------------------------------------------------------------------------------------
# The page


def row(stage, **more):
    return {"stage": stage, "when": "round 1", "who": "device 0", "decision": "cut <b>", "why": "x",
            "quantity": "round, s", "predicted": 1.0, "measured": 2.0, **more}  # fmt: skip


def whole():
    rows = phase_rows(PHASES, ANSWERS, 15.0)
    found = {
        "train": {"seconds": 3.0, "decisions": [row("train")], "accuracy": 0.5, "epsilon": 7.9,
                  "rounds": list(rounds_of(MADE, [{"round": 1}])), "run_dir": "/life/train",
                  "moves": [{"client": 0, "round": 1, "source": "edge-0", "target": "edge-1",
                             "predicted_pause_s": 0.1, "pause_s": 0.2}]},
        "prune": {"seconds": 1.0, "decisions": [row("prune")],
                  "variants": [{"name": "parent", "accuracy": 0.5, "p50_ms": 3.0},
                               {"name": "half", "accuracy": 0.4, "p50_ms": 1.0}]},
        "partition": {"seconds": 1.0, "decisions": [row("partition")], "variant": "half"},
        "switch": {"seconds": 1.0, "decisions": [], "switches": 1,
                   "switching": [{"phase": "calm", "p50_ms": 1.0}]},
        "chain": {"seconds": 5.0, "decisions": [row("chain", measured=None)], "phases": rows,
                  "latency": thinned(ANSWERS, 0.0), **chain_figures(PHASES, ANSWERS, [FAILOVER]),
                  "technique": "repartition"},
    }  # fmt: skip
    return found


def test_the_page_has_every_decision_and_asks_for_nothing_from_elsewhere(tmp_path):
    figures = lifecycle.figures_of(whole(), tmp_path)
    assert figures["seconds"] == 11.0 and figures["off_median"] == 0.5
    assert [one["stage"] for one in figures["stages"]] == list(TITLES)
    text = page(figures, WRITTEN)
    assert text.count("cut &lt;b&gt;") == 4 and "cut <b>" not in text
    assert all(title in text for title in TITLES.values())
    assert "bandwidth falls" in text and "repartition" in text and "Pauses of moves" in text
    assert not re.search(r"(?:src|href)=\"(?!data:)", text) and "<script" not in text
    drawn = lifecycle.chart(figures)
    assert drawn.series["expected"][:2] == [20.0, 25.0]


def test_a_life_of_one_stage_has_a_page(tmp_path):
    figures = lifecycle.figures_of({"train": whole()["train"]}, tmp_path)
    text = page(figures, WRITTEN)
    assert TITLES["train"] in text and TITLES["chain"] not in text
    assert lifecycle.chart(figures).labels == []


def test_predictions_are_marked_by_how_far_off_they_are():
    assert off_by(3.0, 2.0) == 0.5
    rows = [row("chain", predicted=p) for p in (2.1, 9.0, None)]
    kinds = re.findall(r'class="num (near|off|far)"', decision_table(rows))
    assert kinds == ["near", "far", "off"]


def test_large_numbers_of_the_page_are_written_out():
    """Answers after ten seconds stood there as 1.021e+04 ms."""
    table = decision_table([row("chain", quantity="request, ms", measured=10_212.4)])
    assert "10,212 ms" in table and "e+" not in table


# --------------------------------------------------------------------------------------------------

SMALL = [
    "bench", "lifecycle", "quick=true", "json=true", "model=cnn", "num_clients=2", "num_edges=2",
    "rounds=2", "client.epochs=1", "client.batch_size=16", "data.max_examples=200",
    "mobility.every=1",
    "faults.list=[{kind: edge_killed, who: 1, round: 2, step: 1}]", "fleet.emulate=false",
    "network.latency_ms=1", "hosts.list=[{name: device, machine: device, start: true, slower: 2},"
    "{name: edge, machine: edge, start: true}]", "hosts.links=[{name: wifi, source: nominal, "
    "up_mbit_s: 50, down_mbit_s: 50}]", "bench.phase_s=1.5", "bench.switch_s=1", "bench.clients=2",
    "bench.smaller=[]",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_life_is_lived_to_its_end_in_two_sittings(tmp_path, capsys):
    first, kept = tmp_path / "first", tmp_path / "kept"
    common = [*SMALL, f"bench.kept={kept}"]
    assert main([*common, "bench.stages=[train,prune,partition]", f"run.dir={first}"]) == 0
    begun = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["stage"] for one in begun["stages"]] == ["train", "prune", "partition"]
    trained = RunFolder.open(kept / "train").info["result"]
    assert trained["moves"] and trained["epsilon"] <= 8.0
    assert main([*common, f"run.dir={tmp_path / 'second'}"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["accuracy"] == trained["accuracy"]
    assert [one["stage"] for one in figures["stages"]] == list(TITLES)
    assert [one["phase"] for one in figures["phases"]][-1] == "a host dies"
    assert figures["requests"] > 0 and {"technique", "silence_ms"} <= set(figures)
    assert (tmp_path / "second" / "life.html").read_text().count("<tr>") > len(figures["decisions"])
