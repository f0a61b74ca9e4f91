"""The live page of an endpoint: what it says of itself, as it happens, to whom may see it."""

import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from fedsys.runs.live.served import AboutServed, ServedSnapshots, shown_of
from fedsys.runs.live.server import OF_ENDPOINT, LivePage
from tests.waiting import until

FRONT = [
    {"name": "parent", "accuracy": 0.9, "p50_ms": 8.0, "p95_ms": 9.0},
    {"name": "small", "accuracy": 0.8, "p50_ms": 2.0, "p95_ms": 3.0},
]
ABOUT = AboutServed("digits", "/p", FRONT, {"device": 11, "edge": 12}, 50.0)

CHAIN = {
    "variant": "small@2", "model": "parent", "ready": True, "answers": {"3/7": 5, "small@2": 2},
    "p95_ms": 12.5, "moves": 1, "technique": "replica", "route": "small@2", "hosts_lost": 1,
    "failovers": 1, "in_memory": ["small@2", "3/7"],
    "chain": [
        {"host": "device", "address": "tcp://127.0.0.1:1", "units": ["a", "b"], "state": "alive",
         "round_trip_ms": 0.5, "why": "", "compute_ms": 4.0, "queue_ms": 0.1, "link_ms": 2.0},
        {"host": "edge", "address": "tcp://127.0.0.1:2", "units": [], "state": "lost",
         "round_trip_ms": None, "why": "its link ended"},
    ],
    "decision": {"verdict": "stay", "cuts": [2], "now_ms": 10.0, "reason": "the best already",
                 "conditions": {"up_mbit_s": [24.0]}},
    "estimate": {"latency_ms": 9.0},
    "records": [{"time_s": 101.0, "before": "3/7", "after": "2/7", "blocked_ms": 0.2,
                 "reason": "9 ms instead of 20 ms", "predicted_ms": 9.0, "measured_ms": 10.0}],
    "events": [
        {"time_s": 104.0, "event": "lost", "host": "edge", "why": "its link ended"},
        {"time_s": 104.1, "event": "failover", "host": "edge", "technique": "replica",
         "route": "small@2", "replayed": 3, "predicted_ms": 9.0, "reason": "it is the fastest"},
        {"time_s": 105.0, "event": "proved", "route": "small@2", "predicted_ms": 9.0,
         "measured_ms": 11.0},
    ],
}  # fmt: skip

ALONE = {
    "variant": "small", "ready": True, "answers": {"parent": 3, "small": 4}, "switches": 1,
    "reason": "the load is high", "signals": {"p95_ms": 7.0}, "predicted_p95_ms": {"small": 6.0},
    "in_memory": ["small"],
    "records": [{"time_s": 5.0, "before": "parent", "after": "small", "reason": "late",
                 "predicted_p95_ms": 6.0, "p95_after_ms": 7.5, "error": ""}],
}  # fmt: skip


def card(shown, name):
    return next(value for key, _, value in shown["cards"] if key == name)


def test_a_chain_is_shown_with_what_runs_where_and_what_stands_in():
    shown = shown_of(CHAIN, ABOUT, 100.0)
    assert [(h["name"], h["state"], h["where"], h["pid"]) for h in shown["hosts"]] == [
        ("device", "alive", "a … b", 11), ("edge", "lost", "nothing", 12),
    ]  # fmt: skip
    assert shown["links"] == [
        {"from": "device", "to": "edge", "mbit_s": 24.0, "ms": 2.0, "lost": True}
    ]
    assert (card(shown, "answers"), card(shown, "p95")) == ("7", "12.5 of 50")
    assert (card(shown, "technique"), card(shown, "lost")) == ("replica", "1")
    assert [(v["name"], v["now"]) for v in shown["front"]] == [("parent", False), ("small", True)]
    assert [event["kind"] for event in shown["happened"]] == ["move", "lost", "failover", "proved"]
    assert shown["happened"][1]["text"] == "edge is lost: its link ended"
    assert shown["happened"][1]["after_s"] == pytest.approx(4.0)
    told = {row["text"]: (row["predicted_ms"], row["measured_ms"]) for row in shown["decided"]}
    assert told == {
        "replica small@2 stands in for edge, 3 requests went on": (9.0, 11.0),
        "cuts 3/7 → 2/7, 0.2 ms without service": (9.0, 10.0),
    }
    assert ("replica small@2 for edge", "it is the fastest") in map(tuple, shown["why"])
    assert json.loads(json.dumps(shown)) == shown


def test_a_portfolio_alone_is_shown_with_its_front_and_switches():
    shown = shown_of(ALONE, ABOUT, 100.0)
    assert shown["hosts"] == [] and card(shown, "variant") == "small"
    assert [v["now"] for v in shown["front"]] == [False, True]
    (row,) = shown["decided"]
    assert (row["predicted_ms"], row["measured_ms"]) == (6.0, 7.5)
    assert shown["why"] == [["small answers", "the load is high"]]


def test_an_endpoint_of_which_nothing_is_known_is_shown_as_empty():
    shown = shown_of({}, AboutServed(), 0.0)
    assert (shown["hosts"], shown["front"], shown["decided"]) == ([], [], [])
    assert not shown["ready"]


SAID = {}


class Telling(BaseHTTPRequestHandler):
    """An endpoint that says what `SAID` has."""

    def do_GET(self):
        body = json.dumps(SAID["status"]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given):
        pass


@pytest.fixture
def endpoint():
    SAID["status"] = CHAIN
    server = ThreadingHTTPServer(("127.0.0.1", 0), Telling)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", server
    server.shutdown()
    server.server_close()


def test_the_page_follows_the_endpoint_and_says_when_it_is_gone(endpoint):
    address, server = endpoint
    page = LivePage(ServedSnapshots(address, ABOUT), "127.0.0.1:0", "", OF_ENDPOINT)
    try:
        told = httpx.get(f"{page.address}/run.json").json()
        assert (told["status"], told["name"], told["rows"][0]["p95_ms"]) == (
            "running", "digits", 12.5,
        )  # fmt: skip
        SAID["status"] = {**CHAIN, "answers": {"3/7": 500}}
        assert until(lambda: httpx.get(f"{page.address}/run.json").json()["cards"][0][2] == "500")
        rows = httpx.get(f"{page.address}/run.json").json()["rows"]
        assert rows[0]["rate"] is None and rows[-1]["expected_ms"] == 9.0
        server.shutdown()
        server.server_close()
        assert until(lambda: httpx.get(f"{page.address}/run.json").json()["status"] == "gone")
        text = httpx.get(f"{page.address}/").text + httpx.get(f"{page.address}/page.js").text
        found = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w./]*", text))
        assert found <= {"http://www.w3.org/2000/svg"}
    finally:
        page.close()


# --------------------------------------------------------------------------------------------------
# A browser that looks at fedsys serve

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "portfolio"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTS = "hosts.list=[{name:device},{name:edge,start:true},{name:cloud,start:true}]"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_browser_sees_the_chain_and_the_loss_of_a_host(tmp_path):
    """Without console errors, with a keyboard, at the width of a phone, in its true figures."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium, for instance Debian's package chromium")
    command = [sys.executable, "-m", "fedsys.main", "serve", f"portfolio={GOLDEN}", "json=true"]
    command += ["serving.address=http://127.0.0.1:0", "serving.threads=1", "dashboard=true"]
    process = subprocess.Popen(
        [*command, "hosts=local", HOSTS, "partition.cuts=[1,2]"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    lines, drain = [], threading.Thread()
    try:
        ready = json.loads(process.stdout.readline())["ready"]
        for line in process.stderr:
            lines.append(line)
            if match := re.search(r"live page at (http://127\.0\.0\.1:\d+)", line):
                break
        drain = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
        drain.start()
        with api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM,
                args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            )
            try:
                _looked_at(browser, match[1], ready, tmp_path)
            finally:
                browser.close()
    finally:
        process.terminate()
        process.wait(60)
        if drain.ident:
            drain.join(10)
        process.stdout.close()
        process.stderr.close()


def _looked_at(browser, address, ready, tmp_path):
    problems, asked = [], []
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.set_default_timeout(200_000)
    tab.goto(address)
    tab.wait_for_selector(".host >> nth=2", timeout=200_000)
    tab.keyboard.press("Tab")
    while tab.evaluate("document.activeElement.dataset.host") != "edge":
        tab.keyboard.press("Tab")
    assert tab.inner_text("#chosen-host").startswith("edge at tcp://")
    assert str(next(row["pid"] for row in ready["chain"] if row["host"] == "edge")) in (
        tab.inner_text("#chosen-host")
    )
    tab.set_viewport_size({"width": 360, "height": 740})
    tab.wait_for_timeout(400)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.screenshot(path=tmp_path / "phone.png", full_page=True)
    tab.set_viewport_size({"width": 1280, "height": 900})
    subprocess.run(["kill", "-9", str(ready["chain"][1]["pid"])], check=True)
    tab.wait_for_selector(".host.lost[data-host=edge]", timeout=200_000)
    tab.wait_for_selector("#happened [data-kind=failover]", timeout=200_000)
    status = httpx.get(f"{ready['address']}/status").json()
    assert tab.inner_text("[data-figure=technique] b") == status["technique"]
    assert tab.inner_text("[data-figure=lost] b") == "1"
    tab.screenshot(path=tmp_path / "desktop.png", full_page=True)
    assert problems == []
    assert all(url.startswith((address, "data:")) for url in asked)
