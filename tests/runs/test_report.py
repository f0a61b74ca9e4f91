import json
import re
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.main import main
from fedsys.runs.checkpoint import Checkpoints
from fedsys.runs.folder import RunFolder
from fedsys.runs.report.charts import Curve, heat_map, lines, number, stacked, ticks
from fedsys.runs.report.labels import labelled
from fedsys.runs.report.loading import differences, load, named
from fedsys.runs.report.page import page

NOW = datetime(2026, 11, 23, 14, 3)


def row(number, accuracy=0.5, seconds=1.0):
    return {
        "round": number,
        "val_accuracy": accuracy,
        "val_loss": 1.0 / number,
        "train_accuracy": accuracy + 0.1,
        "seconds_round": seconds,
        "seconds_elapsed": number * seconds,
        "seconds_train": 0.8 * seconds,
        "seconds_evaluate": 0.2 * seconds,
        "bytes_up": 1000,
        "bytes_down": 2000,
    }


@pytest.fixture
def make(tmp_path):
    def make(name, lr=0.1, rounds=3, end="finish", **result):
        path = tmp_path / name
        path.mkdir(parents=True)
        folder = RunFolder.create(path)
        folder.log_config(f"rounds: {rounds}\nclient: {{lr: {lr}}}\nrun: {{dir: {name}}}\n")
        for i in range(1, rounds + 1):
            folder.add_round(row(i, accuracy=min(lr * i, 1.0)))
        if end == "finish":
            folder.finish({"accuracy": 0.75, "model_sha256": "ab" * 32, **result})
        if end == "fail":
            folder.fail(RuntimeError("no <power>"))
        folder.close()
        return path

    return make


class Checked(HTMLParser):
    VOID = ("meta", "line", "polyline", "circle", "rect", "br")

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        assert tag != "script"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def rendered(*paths):
    html = page(named([load(path) for path in paths]), NOW)
    checked = Checked()
    checked.feed(html)
    assert checked.open == []
    assert checked.links == []  # nothing is fetched from anywhere
    assert "@import" not in html
    assert "url(" not in html
    return html


def test_a_page_of_one_run_tells_how_good_and_how_long(make):
    html = rendered(make("one"))
    for text in ("75.00%", "test accuracy", "30.00%", "finished", "abab", "Accuracy by time"):
        assert text in html
    assert "9 kB" in html  # 3 rounds of 3,000 bytes
    assert html.count('<svg class="chart"') == 5  # four curves and the time by round


def test_a_page_of_several_runs_compares_them(make):
    html = rendered(make("slow", lr=0.1), make("fast", lr=0.2))
    assert "2 runs compared" in html
    table = html[html.index("What differs") :]
    assert re.search(r"<th>client.lr</th><td>0.1</td><td>0.2</td>", table)
    assert "run.dir" not in table[: table.index("</table>")]
    assert "time to 30%" in html
    assert re.search(r'best">60.00%', html)
    assert "All of them ended with the same model" in html


def test_a_metric_of_the_users_own_is_compared_in_its_direction(tmp_path):
    """The largest error was marked as the best: what is better was asked of the name alone."""
    config = "task: {metric: {_target_: mine.worst, name: worst_error, higher: false, percent: p}}"
    for percent, best in (("false", "0.2500"), ("true", "25.00%")):
        paths = []
        for value in (0.25, 0.75):
            path = tmp_path / f"{percent}-{value}"
            with RunFolder.create(path, config.replace("percent: p", f"percent: {percent}")) as run:
                run.add_round({"round": 1, "val_worst_error": value, "val_loss": 1.0})
                run.finish({"worst_error": value, "val_worst_error": value})
            paths.append(path)
        assert set(re.findall(r'best">([^<]+)<', rendered(*paths))) == {best}


def test_the_model_is_not_called_the_same_when_it_is_not(make):
    html = rendered(make("a"), make("b", model_sha256="cd" * 32))
    assert "same model" not in html
    assert "All runs have the same configuration." in html


def test_a_failed_run_says_why_and_cannot_inject_anything(make):
    html = rendered(make("<b>bad", end="fail"))
    assert "RuntimeError: no &lt;power&gt;" in html
    assert "<b>bad" not in html.replace("<b>&lt;b&gt;bad", "")


def test_a_run_whose_process_is_gone_is_interrupted_and_one_at_work_is_running(make):
    path = make("open", end="none")
    assert load(path).status == "interrupted"
    assert "fedsys train resume=" in load(path).error
    with Checkpoints(path):
        assert load(path).status == "running"
    assert "interrupted" in rendered(path)


def test_what_is_left_of_a_damaged_folder_is_shown(make):
    path = make("damaged")
    (path / "run.json").write_text('{"status":')
    (path / "config.yaml").write_text("a: [")
    run = load(path)
    assert run.status == "damaged"
    assert len(run.rounds) == 3
    assert "30.00%" in rendered(path)
    assert differences([run, load(make("good")), load(make("other", lr=0.3))]).keys() == {
        "client.lr"
    }


def test_a_run_without_rounds_has_a_page(make):
    assert "No round has ended yet." in rendered(make("early", rounds=0, end="none"))


def test_numbers_that_are_not_finite_are_left_out_of_pictures(make):
    path = make("nan", end="none")
    folder = RunFolder.open(path)
    folder.add_round(row(4) | {"val_accuracy": float("nan"), "val_loss": float("inf")})
    folder.close()
    html = rendered(path)
    assert "nan," not in html
    assert "inf," not in html


def test_what_machines_take_tells_only_runs_apart_that_have_them(tmp_path):
    """A run with a fleet differed from one without in 50 figures of its machines."""
    texts = {
        "plain": "fleet: {devices: [], machines: {}}",
        "fleet": "fleet: {devices: [pi3], machines: {pi3: {load_s: 1.0}}}\ndashboard: true",
        "other": "fleet: {devices: [pi3], machines: {pi3: {load_s: 2.0}}}",
    }
    for name, text in texts.items():
        RunFolder.create(tmp_path / name, text).close()
    plain, fleet, other = (load(tmp_path / name) for name in texts)
    assert list(differences([plain, fleet])) == ["fleet.devices"]
    assert differences([fleet, other]) == {"fleet.machines.pi3.load_s": [1.0, 2.0]}


def test_events_faults_and_lost_clients_are_listed(make):
    faults = [{"kind": "device_killed", "who": 2, "round": 1, "step": None, "fired": True}]
    path = make("eventful", faults=faults, cuts={"0": {"index": 3, "unit": "pool"}})
    folder = RunFolder.open(path)
    folder.event("fault", fault={"kind": "device_killed", "who": 2, "round": 1, "step": None})
    folder.event("client_lost", client=2, round=1, reason="gone")
    html = rendered(path)
    assert "Clients were lost 1 time: 2." in html
    assert "<td>round 1: device 2 was lost: gone</td>" in html
    assert "<td>round 1: device killed: who 2</td>" in html
    assert re.search(
        r"<h3>Where each device is cut</h3>.*<td>0</td><td>cut 3 after pool</td>", html
    )


def test_a_split_run_shows_who_is_cut_where_and_who_waits(make):
    """Cuts were indices and shares with fifteen digits, and its pictures were not on the page."""
    cut = {"index": 1, "unit": "conv1", "device_share": 0.10423138, "machine": "pi3"}
    cut |= {"edge": "edge-0", "micro_batches": 16, "codec": "fp32"}
    path = make(
        "planned",
        cuts={"0": cut, "1": cut},
        idle={"device": 0.27, "edge": 0.92},
        virtual_s=2.037874944,
        bytes_up=33155254,
        startup={"imports": 6.7513463},
    )
    html = rendered(path)
    words = "<td>cut 1 after conv1, 10.4% of the work on the device</td><td>16 pieces, fp32</td>"
    assert f"<th>pi3</th><td>0, 1</td>{words}<td>edge-0</td>" in html
    assert "How long each waits" in html and "edge servers" in html and "waits: 92%" in html
    assert "<td>2.04 s</td>" in html and "<td>33.2 MB</td>" in html and "<td>6.75 s</td>" in html
    assert not re.search(r"<td>\d+\.\d{5,}", html[: html.index("Everything else")])
    (path / "plots").mkdir(exist_ok=True)
    for name in ("timeline.png", "idle.png"):
        (path / "plots" / name).write_bytes(b"picture")
    html = rendered(path)
    assert html.count("data:image/png;base64,cGljdHVyZQ==") == 2


PROMISED = """\
privacy: {mechanism: record, epsilon: 4.0}
policy: {kind: fixed, leakage: null}
"""


def promised(tmp_path, end=True):
    folder = RunFolder.create(tmp_path / "run", PROMISED)
    for round_ in (1, 2):
        folder.add_round({**row(round_), "epsilon": 1.5 * round_})
    if end:
        folder.finish({"privacy": {"claim": "(3, 1e-05)-private for each example"}})
    folder.close()
    return folder.path


def test_a_private_run_shows_its_claim_its_budget_and_what_it_does_not_protect(tmp_path):
    text = rendered(promised(tmp_path))
    assert "(3, 1e-05)-private for each example." in text
    assert "Privacy spent by round" in text and "budget 4" in text and "round 2: 3<" in text
    assert "nothing about what edge servers see" in text


def test_a_private_run_that_is_not_over_tells_what_is_spent(tmp_path):
    assert "3 spent of the epsilon of 4 for each example" in rendered(promised(tmp_path, False))


def test_the_pictures_and_figures_of_an_audit_stand_beside_the_claim(make, tmp_path, capsys):
    run, audit = promised(tmp_path), tmp_path / "audit"
    (audit / "plots").mkdir(parents=True)
    (audit / "plots" / "reconstructions.png").write_bytes(b"picture")
    seen = {"mechanism": "none", "epsilon": None, "cut": 1, "after": "conv1", "ssim": 0.993}
    (audit / "leakage.json").write_text(json.dumps({"cuts": [seen]}))
    bound = {"mechanism": "record", "epsilon": 8.0, "claim": 8.0, "epsilon_at_least": 0.25}
    (audit / "run.json").write_text(json.dumps({"result": {"models": [bound]}}))
    for path in (audit, audit / "leakage.json"):
        assert main(["report", str(run), f"report.audit={path}"]) == 0
        text = (run / "report.html").read_text()
        assert "data:image/png;base64,cGljdHVyZQ==" in text
        assert "conv1 (1)" in text and "0.993" in text
        assert "record, epsilon 8" in text and "0.25" in text
    assert "What leaks" not in rendered(make("plain"))
    assert main(["report", str(run), f"report.audit={tmp_path}"]) == 2
    assert "must be the folder of an audit" in capsys.readouterr().err


def test_runs_are_called_by_what_differs_where_that_tells_them_apart(make):
    runs = named([load(make("a", lr=0.1)), load(make("b", lr=0.25))])
    assert [run.name for run in labelled(runs)] == ["lr 0.1", "lr 0.25"]
    same = named([load(make("c", lr=0.1)), load(make("d", lr=0.1))])
    assert [run.name for run in labelled(same)] == ["c", "d"]


def test_who_holds_what_is_a_map(make):
    path = make("counted")
    (path / "class_counts.csv").write_text("client,cat,dog\n0,3,0\n1,1,40\n")
    assert load(path).counts.cells == ((3, 0), (1, 40))
    html = rendered(path)
    assert "client 1, dog: 40" in html
    (path / "class_counts.csv").write_text("client,cat\n0,three\n")
    assert load(path).counts is None


def test_names_are_as_short_as_they_can_be(make):
    runs = [load(make(name)) for name in ("x/one", "y/one", "y/two")]
    assert [run.name for run in named(runs)] == ["x/one", "y/one", "y/two"]
    assert [run.name for run in named(runs[1:])] == ["one", "two"]


# --- the command ---


def test_the_page_of_one_run_goes_into_its_folder(make, capsys):
    path = make("with=equals 'and quotes'")
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path / "report.html")
    assert "<!doctype html>" in (path / "report.html").read_text()


def test_the_page_of_several_runs_goes_where_it_is_asked_for(make, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [str(make(name)) for name in ("a", "b")]
    assert main(["report", *paths, "json=true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(tmp_path / "report.html")
    assert [run["name"] for run in told["runs"]] == ["a", "b"]
    assert told["runs"][0]["accuracy"] == 0.75
    assert main(["report", *paths, "report.out=other.html"]) == 0
    assert Path("other.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "report: must be followed by run folders"),
        (["nowhere"], "must be the folder of a run; there is no such folder"),
        (["."], "must be the folder of a run; there is no run in it"),
    ],
)
def test_what_is_no_run_is_refused(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    assert words in capsys.readouterr().err


# --- the charts ---


@settings(max_examples=100, deadline=None)
@given(
    st.floats(-1e6, 1e6, allow_subnormal=False),
    st.floats(1e-3, 1e6, allow_subnormal=False),
    st.integers(3, 8),
)
def test_ticks_are_few_round_and_inside(low, span, count):
    high = low + span
    found = ticks(low, high, count)
    assert 1 <= len(found) <= 2 * count + 2
    assert all(low - 1e-6 * span <= t <= high + 1e-6 * span for t in found)
    assert found == sorted(set(found))


def test_ticks_of_a_single_value_are_that_value():
    assert ticks(3.0, 3.0) == [3.0]
    assert number(3.0) == "3"


def test_a_line_is_inside_its_box_and_higher_values_are_above():
    svg = lines("t", [Curve("a", [1, 2, 3], [0.2, 0.9, 0.4], 0)], by="round", percent=True)
    points = re.search(r'points="([^"]+)"', svg)[1].split()
    ys = [float(p.split(",")[1]) for p in points]
    assert ys[1] < ys[2] < ys[0]
    assert all(0 < y < 260 for y in ys)


def test_one_point_is_a_chart_too():
    assert "<circle" in lines("t", [Curve("a", [1], [0.2], 0)], by="round")
    assert "<circle" in lines("t", [Curve("a", [0.0], [0.0], 0)], by="time")


def test_bars_are_as_high_as_their_seconds():
    svg = stacked("t", ["a", "b"], [("1", [1.0, 3.0]), ("2", [0.0, 2.0])])
    heights = [float(h) for h in re.findall(r'class="bar[^>]*height="([\d.]+)"', svg)]
    assert heights[1] == pytest.approx(3 * heights[0], rel=1e-3)
    assert heights[2] == 0
    assert heights[3] == pytest.approx(2 * heights[0], rel=1e-3)


def test_a_map_of_many_clients_and_classes_has_no_numbers_in_its_cells():
    cells = [[1] * 100 for _ in range(50)]
    svg = heat_map("t", [f"class {i}" for i in range(100)], cells)
    assert svg.count("<rect") == 5000
    assert 'class="off"' not in svg
    assert 'class="on"' not in svg
