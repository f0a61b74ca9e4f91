"""The live page: it shows the figures of the run's folder, to whom may see them, and ends with the
run."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from fedsys.config.dashboard import address_of, place_of
from fedsys.errors import ConfigError
from fedsys.runs import decisions
from fedsys.runs.decisions import OffloadDecision
from fedsys.runs.folder import RunFolder
from fedsys.runs.live import process as page_process
from fedsys.runs.live.process import live_page
from fedsys.runs.live.script import SCRIPT
from fedsys.runs.live.server import LivePage
from fedsys.runs.live.snapshot import EVENTS, POINTS, Snapshots

CONFIG = """
num_clients: 3
num_edges: 2
rounds: 4
seed: 7
strategy: {_target_: flwr.serverapp.strategy.FedAvg}
policy: {kind: fixed}
privacy: {epsilon: 4.0}
model: {_target_: mine.net, api_key: hush-hush}
"""


OWN = "task: {metric: {_target_: mine.within, name: within, percent: true}}"
OWN_SHOWN = ["within", "within", True]


def decided(number, client, edge, **more):
    return OffloadDecision(
        number, client, "pi4", 2, "conv2", edge == "", 0.25, 2, "fp32", edge, **more
    )


def told(path, rounds=2):
    """Write a run of which some rounds are done; the caller closes it."""
    folder = RunFolder.create(path, CONFIG)
    for k in range(1, rounds + 1):
        folder.add_round({
            "round": k, "val_accuracy": k / 4, "train_loss": math.nan, "seconds_round": 0.5,
            "epsilon": 0.5 * k, "note": "text",
        })  # fmt: skip
    decisions.write(path, [decided(1, c, f"edge-{c % 2}") for c in (0, 1, 2)])
    again = decided(2, 0, "edge-1", reason="its link fell", predicted_s=2.0, measured_s=2.5)
    decisions.write(path, [again, decided(2, 1, "edge-1"), decided(2, 2, "edge-0")])
    return folder


def test_a_snapshot_has_the_figures_of_the_files(tmp_path):
    path = tmp_path / "run"
    with told(path) as folder:
        folder.event("client_lost", client=2, round=2, reason="killed")
        folder.event(
            "recovery", what="edge", round=2, client=1, **{"from": "edge-0", "to": "edge-1"}
        )
        shots = Snapshots(path)
        shot = shots.take()
        assert (shot["status"], shot["rounds"], shot["budget"]) == ("running", 4, 4.0)
        assert shot["last"] == {**folder.rounds()[-1], "train_loss": None}
        assert [row["val_accuracy"] for row in shot["rows"]] == [0.25, 0.5]
        assert [d["edge"] for d in shot["devices"]] == ["edge-1", "edge-1", "edge-0"]
        assert [d["lost"] for d in shot["devices"]] == [False, False, True]
        assert shot["devices"][0]["reason"] == "its link fell"
        assert shot["edges"] == [
            {"name": "edge-0", "lost": True}, {"name": "edge-1", "lost": False},
        ]  # fmt: skip
        kinds = [(event["kind"], event["round"]) for event in shot["happened"]]
        assert kinds == [("client lost", 2), ("recovery", 2), ("move", 2)]
        assert shot["happened"][-1]["text"] == "device 0 went from edge-0 to edge-1"
        assert "hush-hush" not in json.dumps(shot)
        folder.event("move", client=0, round=2, source="edge-0", target="edge-1")
        texts = [e["text"] for e in shots.take()["happened"] if e["kind"] == "move"]
        assert texts == ["device 0 went from edge-0 to edge-1"]  # and not a second time
        folder.add_round({"round": 3, "val_accuracy": 0.75})
        folder.finish({"accuracy": 0.5, "run_dir": str(path), "faults": []})
        shot = shots.take()
    assert not any(device["lost"] for device in shot["devices"])  # it was lost in a round before
    assert (shot["status"], shot["last"]["round"]) == ("finished", 3)
    assert shot["result"] == {"accuracy": 0.5, "run_dir": str(path)}


def test_what_devices_do_is_seen_before_their_round_has_ended(tmp_path):
    """The page said in the first round that every device trains the whole model, for minutes."""
    path = tmp_path / "run"
    cut = {"index": 2, "unit": "conv2", "device_share": 0.25, "machine": "pi4"}
    cut |= {"edge": "edge-1", "micro_batches": 2, "codec": "fp32"}
    with RunFolder.create(path, CONFIG) as folder:
        shots = Snapshots(path)
        assert [d.get("undecided") for d in shots.take()["devices"]] == [True] * 3
        whole = {**cut, "index": 5, "device_share": 1.0, "edge": ""}
        decisions.write_plan(path, 1, {"0": cut, "1": whole})
        first, second, third = shots.take()["devices"]
        assert (first["unit"], first["edge"], first["pieces"]) == ("conv2", "edge-1", 2)
        assert first["predicted_s"] is None and "round 1 goes on" in first["reason"]
        assert second["whole"] and third["undecided"]
        decisions.write(path, [decided(1, c, "edge-1", reason="measured") for c in (0, 1)])
        folder.add_round({"round": 1})
        assert [d["reason"] for d in shots.take()["devices"][:2]] == ["measured"] * 2
        moved = {**cut, "edge": "edge-0"}
        decisions.write_plan(path, 2, {"0": cut, "1": moved})  # the same as before, and another
        same, other, _ = shots.take()["devices"]
        assert (same["reason"], same["edge"]) == ("measured", "edge-1")
        assert other["edge"] == "edge-0" and "round 2 goes on" in other["reason"]
        (path / "plan.json").write_text("[]")
        assert shots.take()["devices"][1]["edge"] == "edge-0"  # what was read before


def test_a_device_is_shown_where_its_round_ended(tmp_path):
    """After an edge server was killed, the map had its devices there until the end of the run."""
    path = tmp_path / "run"
    with told(path) as folder:
        recovery = {"what": "edge", "client": 1, "from": "edge-1", "to": "edge-0"}
        folder.event("recovery", round=1, **{**recovery, "to": "edge-9"})  # of a round before
        folder.event("recovery", round=2, **recovery, seconds=0.5, repeated_steps=1)
        folder.event("move", round=2, client=2, source="edge-0", target="edge-1", why="", at=0.5)
        shot = Snapshots(path).take()
    assert [device["edge"] for device in shot["devices"]] == ["edge-1", "edge-0", "edge-1"]
    texts = [event["text"] for event in shot["happened"]]
    assert "device 2 went from edge-0 to edge-1, at 50% of its round" in texts
    after = "after 0.50 s, 1 step repeated"
    assert f"device 1 lost edge-1 and went on at edge-0 {after}" in texts


def test_a_run_that_is_judged_by_another_metric_is_shown_by_that(tmp_path):
    """The page showed no validation accuracy, and no curve, where the metric was another one."""
    for config, known in (("{seed: 1}", ["mae", "mean absolute error", False]), (OWN, OWN_SHOWN)):
        path = tmp_path / known[0]
        with RunFolder.create(path, config) as folder:
            assert Snapshots(path).take()["metric"]["name"] == "accuracy"  # nothing is known yet
            folder.add_round({"round": 1, f"val_{known[0]}": 0.25, "val_loss": 0.5})
            metric = Snapshots(path).take()["metric"]
            assert [metric[key] for key in ("name", "title", "percent")] == known
    assert not re.search(r"(val|train)_accuracy|result\.accuracy", SCRIPT)


def test_a_snapshot_of_what_is_not_there_or_is_damaged_is_empty(tmp_path):
    assert Snapshots(tmp_path / "none").take()["rows"] == []
    path = tmp_path / "run"
    told(path).close()
    shots = Snapshots(path)
    assert len(shots.take()["devices"]) == 3
    (path / "decisions.csv").write_text("round,client\n1,x\n")
    (path / "run.json").write_text("{")
    shot = shots.take()  # what was read before stands
    assert (shot["status"], shot["devices"][0]["edge"]) == ("running", "edge-1")
    assert Snapshots(path).take()["devices"] == []


def test_files_are_read_again_only_when_they_changed(tmp_path, monkeypatch):
    path = tmp_path / "run"
    with told(path) as folder:
        shots = Snapshots(path)
        before = shots.take()
        monkeypatch.setattr(RunFolder, "rounds", lambda self: pytest.fail("read again"))
        assert shots.take() == before
        monkeypatch.undo()
        folder.add_round({"round": 3, "val_accuracy": 0.75})
        assert shots.take()["last"]["round"] == 3


def test_what_grows_without_end_is_shown_in_bounds(tmp_path):
    path = tmp_path / "run"
    with RunFolder.create(path, CONFIG) as folder:
        text = "round,loss\n" + "".join(f"{k},{1 / k!r}\n" for k in range(1, 5001))
        (path / "metrics.csv").write_text(text)
        for k in range(EVENTS + 50):
            folder.event("client_lost", client=0, round=k + 1, reason="x")
        shot = Snapshots(path).take()
    rounds = [row["round"] for row in shot["rows"]]
    assert len(rounds) <= POINTS + 1
    assert (rounds[0], rounds[-1]) == (1, 5000)
    assert [e["round"] for e in shot["happened"]] == list(range(51, EVENTS + 51))


@pytest.fixture
def page(tmp_path):
    opened = []

    def open_page(token=""):
        told(tmp_path / "run").close()
        opened.append(LivePage(Snapshots(tmp_path / "run"), "127.0.0.1:0", token))
        return opened[0]

    yield open_page
    for one in opened:
        one.close()


def test_the_page_asks_for_nothing_from_elsewhere(page):
    address = page().address
    with httpx.Client(base_url=address) as client:
        texts = {name: client.get(name) for name in ("/", "/page.js", "/page.css", "/run.json")}
    assert {answer.status_code for answer in texts.values()} == {200}
    assert texts["/run.json"].json()["name"] == "run"
    policy = texts["/"].headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    known = {"http://www.w3.org/2000/svg"}  # the name of a namespace
    for name, answer in texts.items():
        found = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w./]*", answer.text))
        assert found <= known, name


def test_on_loopback_a_page_of_another_site_gets_nothing(page):
    address = page().address
    port = address.rpartition(":")[2]
    for host in (f"evil.example:{port}", "evil.example", "", "127.0.0.1:1"):
        assert httpx.get(f"{address}/run.json", headers={"Host": host}).status_code in (400, 403)
    assert httpx.get(f"{address}/run.json", headers={"Host": f"localhost:{port}"}).is_success
    assert httpx.post(f"{address}/run.json").status_code == 405


def test_with_a_token_only_who_has_it_sees_the_run(page):
    address = page("secret-token").address
    for path in ("/", "/run.json", "/page.js", "/?token=wrong", "/run.json?token="):
        assert httpx.get(f"{address}{path}").status_code == 401
    with httpx.Client(base_url=address) as client:
        answer = client.get("/?token=secret-token")
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        flags = answer.headers["set-cookie"].lower()
        assert "httponly" in flags and "samesite=strict" in flags
        assert client.get("/run.json").json()["name"] == "run"
    bearer = {"Authorization": "Bearer secret-token"}
    assert httpx.get(f"{address}/run.json", headers=bearer).is_success


def test_off_loopback_there_is_no_page_without_a_token(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDSYS_CONTROL_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="FEDSYS_CONTROL_TOKEN"):
        LivePage(Snapshots(tmp_path), "0.0.0.0:0")
    with (
        pytest.raises(ConfigError, match="FEDSYS_CONTROL_TOKEN"),
        live_page("0.0.0.0:0", tmp_path, print),
    ):
        pass


@pytest.mark.parametrize("given", ["8000", "127.0.0.1", "host:port", "http://127.0.0.1:80", ":80"])
def test_an_address_of_another_form_is_refused(given):
    with pytest.raises(ConfigError, match=r"dashboard=.* must be true, false or HOST:PORT"):
        address_of(given)


def test_the_option_says_where_the_page_is():
    assert (address_of(False), address_of(True)) == (None, "127.0.0.1:0")
    assert place_of("[::1]:80") == ("::1", 80)


def test_the_process_of_the_page_lives_as_long_as_the_block(tmp_path):
    path = tmp_path / "run"
    with told(path) as folder:
        said, heard = [], threading.Event()
        with live_page(True, path, lambda text: (said.append(text), heard.set())):
            assert heard.wait(60)
            address = said[0].removeprefix("live page at ")
            assert httpx.get(f"{address}/run.json").json()["status"] == "running"
            folder.finish({"accuracy": 0.5})
            seen = httpx.get(f"{address}/run.json").json()
            assert (seen["status"], seen["result"]) == ("finished", {"accuracy": 0.5})
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{address}/run.json")
    assert said[0] in (path / "run.log").read_text()  # with json=true nobody is told otherwise


def test_a_page_that_cannot_be_is_said_and_the_run_goes_on(tmp_path, page):
    taken = page().address.removeprefix("http://")
    said, heard = [], threading.Event()
    with live_page(taken, tmp_path / "run", lambda text: (said.append(text), heard.set())):
        assert heard.wait(60)
    assert said[0].startswith(f"there is no live page: dashboard={taken}: cannot be listened on")


def test_a_process_of_the_page_that_ends_at_once_is_said(tmp_path, monkeypatch):
    """Its output ended before it did, and so nobody was told."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec >&-\nsleep 0.2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(page_process.sys, "executable", str(program))
    said, heard = [], threading.Event()
    with live_page(True, tmp_path / "run", lambda text: (said.append(text), heard.set())):
        assert heard.wait(30)
    assert said == ["there is no live page: its process ended with status 1"]


# --------------------------------------------------------------------------------------------------
# A run, and a browser that looks at it

ARGUMENTS = ["policy=fixed", "policy.cut=0.5", "num_edges=2", "num_clients=4", "client.epochs=1"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def train(folder, *more):
    command = [sys.executable, "-m", "fedsys.main", "train", *ARGUMENTS, *more]
    return subprocess.Popen(
        [*command, f"run.dir={folder}"], cwd=folder.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip


@pytest.mark.slow
def test_a_browser_sees_the_run_while_it_trains(tmp_path):
    """Without console errors, with a keyboard, at the width of a phone, and in its true figures."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium, for instance Debian's package chromium")
    rounds = 10
    process = train(
        tmp_path / "run", f"rounds={rounds}", "dashboard=true", "mobility=commuters",
        "network=wifi", "network.emulate=true", "network.latency_ms=60",  # time, and no work
    )  # fmt: skip
    lines, address = [], None
    for line in process.stdout:
        lines.append(line)
        if match := re.search(r"live page at (http://127\.0\.0\.1:\d+)", line):
            address = match[1]
            break
    assert address, "".join(lines)
    drain = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    drain.start()
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-sync",
            ],
        )
        try:
            _looked_at(browser, address, rounds, tmp_path)
        finally:
            browser.close()
    assert process.wait(120) == 0, "".join(lines)
    drain.join(10)
    process.stdout.close()


def _looked_at(browser, address, rounds, tmp_path):
    problems = []
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address)
    tab.wait_for_selector(".device >> nth=3", timeout=60_000)
    first = tab.inner_text("[data-figure=rounds] b")
    tab.wait_for_function(
        "before => document.querySelector('[data-figure=rounds] b').textContent !== before",
        arg=first, timeout=60_000,
    )  # fmt: skip
    tab.focus(".scroll")
    tab.keyboard.press("Shift+Tab")
    while tab.evaluate("document.activeElement.dataset.device") != "3":
        tab.keyboard.press("Shift+Tab")
    assert tab.inner_text("#chosen-device").startswith("device 3")
    tab.set_viewport_size({"width": 360, "height": 740})
    tab.wait_for_timeout(400)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.screenshot(path=tmp_path / "phone.png", full_page=True)
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.wait_for_selector("#status.finished", timeout=200_000)
    tab.screenshot(path=tmp_path / "desktop.png", full_page=True)
    run = RunFolder.open(tmp_path / "run")
    last = run.rounds()[-1]
    assert tab.inner_text("[data-figure=rounds] b") == f"{rounds} of {rounds}"
    assert tab.inner_text("[data-figure=accuracy] b") == f"{100 * last['val_accuracy']:.2f} %"
    assert tab.inner_text("[data-figure=test] b") == f"{100 * run.info['result']['accuracy']:.2f} %"
    assert tab.locator("[data-kind=move]").count() > 0
    assert problems == []
    assert all(url.startswith((address, "data:")) for url in asked)


@pytest.mark.slow
def test_a_run_with_a_page_has_the_model_of_one_without(tmp_path):
    hashes = set()
    for name, more in (("with", ["dashboard=true"]), ("without", [])):
        process = train(tmp_path / name, "rounds=2", "run.plots=false", *more)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
        hashes.add(RunFolder.open(tmp_path / name).info["result"]["model_sha256"])
    assert len(hashes) == 1
