"""Split training under faults for a while: whether anything ends, differs, or grows.

The server app and the devices are in this process, edge servers are processes of their own, each
behind a forwarder (`fedsys.commands.bench.soak_proxy`). Faults come by the clock: a link is reset
or cut, an edge server is killed, stopped for a while or restarted, from the end of a run's first
round on. Runs follow each other until the time is over; each must end, with the model of plain
training. Resident memory and descriptors
are told of this process and of the first edge server, which is spared what would replace it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from fedsys import config as configuration
from fedsys.commands.bench import Chart
from fedsys.config import Config, secret
from fedsys.errors import FedsysError, RuntimeFailure
from fedsys.runtime.apps import load_apps
from fedsys.runtime.local import play_local
from fedsys.runtime.processes import free_ports
from fedsys.transport.security import new_token

MIB = 2**20
SAMPLE_S = 5.0
RUN = "run"
START_S = 120.0
"""Longest time for an edge server to start, in seconds."""

_SPARED = frozenset({"kill", "restart"})


class Edge:
    """One edge server and the forwarder before it.

    Args:
        name: Of the edge server.
        kind: Of its links.
        token: What a controller must present.
        folder: For what it says.
    """

    def __init__(self, name: str, kind: str, token: str, folder: Path) -> None:
        self.name, self._kind, self._token, self._folder = name, kind, token, folder
        (self._port,) = free_ports(1)
        self._lock = threading.Lock()
        self.process = self._started()
        self._proxy = subprocess.Popen(
            [sys.executable, "-m", "fedsys.commands.bench.soak_proxy", str(self._port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._proxy.stdout is not None
        self.address = f"{kind}://127.0.0.1:{int(self._proxy.stdout.readline())}"

    def _started(self) -> subprocess.Popen[str]:
        with (self._folder / f"{self.name}.log").open("a") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "fedsys.main", "edge", f"edge.name={self.name}"),
                    *(f"edge.address={self._kind}://127.0.0.1:{self._port}", "edge.http=null"),
                ],
                stdout=log, stderr=log, text=True, env={**os.environ, secret.VARIABLE: self._token},
            )  # fmt: skip

    def wait(self) -> None:
        """Wait until it serves.

        Raises:
            RuntimeFailure: It does not.
        """
        log, deadline = self._folder / f"{self.name}.log", time.monotonic() + START_S
        with self._lock:
            while not self.serves:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeFailure(f"{self.name} does not start; see {log}")
                time.sleep(0.1)

    @property
    def serves(self) -> bool:
        """Whether its process is there and listens."""
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(self.process.pid).net_connections("tcp")
            return any(one.status == psutil.CONN_LISTEN for one in found)
        return False

    def strike(self, fault: str, pause_s: float) -> None:
        """Let a fault happen, and see to its end."""
        with self._lock:
            match fault:
                case "reset":
                    self._order("reset")
                case "cut":
                    self._order(f"cut {pause_s}")
                case "stop":
                    self.process.send_signal(signal.SIGSTOP)
                    time.sleep(pause_s)
                    self.process.send_signal(signal.SIGCONT)
                case "kill" | "restart":
                    self.process.send_signal(signal.SIGKILL if fault == "kill" else signal.SIGTERM)
                    self.process.wait()
                    self.process = self._started()

    def _order(self, text: str) -> None:
        stdin: IO[str] | None = self._proxy.stdin
        assert stdin is not None
        stdin.write(f"{text}\n")
        stdin.flush()

    def end(self) -> None:
        """End both processes."""
        with self._lock:
            for process in (self.process, self._proxy):
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()


@dataclass
class Watched:
    """What was seen over one kind of link.

    Attributes:
        faults: How many, by kind.
        ended: Runs that ended with an error.
        other: Runs with another model.
        runs: Runs in all.
        samples: Seconds since the begin; memory in MiB and descriptors of this process, and of the
            first edge server.
    """

    faults: Counter[str] = field(default_factory=Counter)
    ended: list[str] = field(default_factory=list)
    other: int = 0
    runs: int = 0
    samples: list[tuple[float, float, int, float, int]] = field(default_factory=list)


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures; see the module.

    Args:
        config: The runs.
        options: ``minutes``, ``links``, ``every_s``, ``faults``, ``edges``, ``pause_s``.
    """
    folder = Path(str(config.run.dir)) / "soak"
    folder.mkdir()
    expected = _carried_out(config, folder, "plain")
    rows, samples = [], []
    for kind in options["links"]:
        seen = _soaked(config, options, str(kind), folder, expected)
        rows.append(_row(str(kind), seen))
        samples += [
            {"link": kind, "s": round(s), "rss_mib": a, "fds": b, "edge_rss_mib": c, "edge_fds": d}
            for s, a, b, c, d in seen.samples
        ]
    return {"links": rows, "samples": samples, "model_sha256": expected}


def _soaked(
    config: Config, options: Mapping[str, Any], kind: str, folder: Path, expected: str
) -> Watched:
    seen, token, over = Watched(), new_token(), threading.Event()
    with contextlib.ExitStack() as stack:
        edges = [Edge(f"{kind}-{i}", kind, token, folder) for i in range(options["edges"])]
        for edge in edges:
            stack.callback(edge.end)
        for edge in edges:
            edge.wait()
        split = {
            "policy": {"kind": "fixed", "cut": 0.5},
            "fleet": {
                "edges": [{"name": edge.name, "address": edge.address} for edge in edges],
                "control_token": token,
            },
        }
        _one_run(config, folder, split, expected, seen)  # what is imported and made once
        seen.runs = 0
        trains = (folder / RUN / "metrics.csv").exists
        threads = [
            threading.Thread(
                target=_strike, args=(edges, options, seen, over, trains), daemon=True
            ),
            threading.Thread(target=_sample, args=(edges[0], seen, over), daemon=True),
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60 * float(options["minutes"])
        while not seen.runs or time.monotonic() < deadline:
            for edge in edges:  # a run begins with all of them, or says which one is missing
                edge.wait()
            _one_run(config, folder, split, expected, seen)
        over.set()
        for thread in threads:
            thread.join()
    return seen


def _one_run(
    config: Config, folder: Path, split: Mapping[str, Any], expected: str, seen: Watched
) -> None:
    seen.runs += 1
    try:
        seen.other += _carried_out(config, folder, RUN, **split) != expected
    except FedsysError as error:
        seen.ended.append(f"{type(error).__name__}: {error}")
        print(f"run {seen.runs} ended: {seen.ended[-1]}", file=sys.stderr, flush=True)


def _carried_out(config: Config, folder: Path, name: str, **values: Any) -> str:
    """Carry a run out and return the hash of its model; nothing is left of it."""
    path = folder / name
    given = {
        "json": True,
        "run": {"dir": str(path), "plots": False},
        "runtime": {"kind": "local", "workers": config.num_clients},
    }
    try:
        made = configuration.parse(configuration.with_values(config.text, **given, **values))
        play_local(made, *load_apps(made))
        told = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return str(told["result"]["model_sha256"])
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _strike(
    edges: Sequence[Edge],
    options: Mapping[str, Any],
    seen: Watched,
    over: threading.Event,
    trains: Callable[[], bool],
) -> None:
    """Let a fault happen every few seconds while a run trains, each in a thread of its own."""
    draws = random.Random(0)
    while not over.wait(float(options["every_s"])):
        if not trains():
            continue
        fault, edge = _drawn(draws, options["faults"], edges)
        seen.faults[fault] += 1
        threading.Thread(
            target=edge.strike, args=(fault, float(options["pause_s"])), daemon=True
        ).start()


def _drawn(draws: random.Random, faults: Sequence[str], edges: Sequence[Edge]) -> tuple[str, Edge]:
    """Return a fault and whom it strikes: one that serves, and not the first if it ends him."""
    fault = draws.choice(list(faults))
    open_to = edges[1:] if fault in _SPARED and len(edges) > 1 else edges
    serving = [edge for edge in open_to if edge.serves]
    return (fault, draws.choice(serving)) if serving else ("reset", edges[0])


def _sample(edge: Edge, seen: Watched, over: threading.Event) -> None:
    here, there = psutil.Process(), psutil.Process(edge.process.pid)
    began = time.monotonic()
    last = False
    while not last:
        last = over.wait(SAMPLE_S)
        with contextlib.suppress(psutil.Error):
            seen.samples.append((
                time.monotonic() - began,
                round(here.memory_info().rss / MIB, 1), here.num_fds(),
                round(there.memory_info().rss / MIB, 1), there.num_fds(),
            ))  # fmt: skip


def _row(kind: str, seen: Watched) -> dict[str, Any]:
    row: dict[str, Any] = {
        "link": kind, "runs": seen.runs, "ended": len(seen.ended), "other_model": seen.other,
        "faults": seen.faults.total(), **{f"{k}s": n for k, n in sorted(seen.faults.items())},
    }  # fmt: skip
    names = ("rss_mib", "fds", "edge_rss_mib", "edge_fds")
    for place, name in enumerate(names, 1):
        for part, values in _quarters(seen.samples, place):
            row[f"{name}_{part}"] = values
    if seen.ended:
        row["first_end"] = seen.ended[0]
    return row


def _quarters(samples: Sequence[Sequence[float]], place: int) -> Iterator[tuple[str, float]]:
    """Yield the medians of the second and the last quarter: what grows differs in them."""
    count = len(samples)
    for part, first, end in (("early", count // 4, count // 2), ("late", count * 3 // 4, count)):
        values = [row[place] for row in samples[first:end]]
        yield part, statistics.median(values) if values else float("nan")


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the picture of memory over time."""
    kinds = list(dict.fromkeys(row["link"] for row in figures["samples"]))
    by_kind = {k: [r for r in figures["samples"] if r["link"] == k] for k in kinds}
    longest = max(map(len, by_kind.values()), default=0)
    series = {
        f"{kind}, {whose}": [float(row[key]) for row in rows]
        + [float("nan")] * (longest - len(rows))
        for kind, rows in by_kind.items()
        for whose, key in (("server app and devices", "rss_mib"), ("edge server", "edge_rss_mib"))
    }
    labels = [str(round(SAMPLE_S * (i + 1))) for i in range(longest)]
    return Chart("Memory under faults", "seconds", "MiB", labels, series, lines=True)
