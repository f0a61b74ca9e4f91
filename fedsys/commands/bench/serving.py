"""``fedsys serve`` beside what people would use instead: the same model, clients and machine.

All servers stand at the same time, each a process of its own with one intra-op thread, and are
asked in turns, so that whatever else the machine does meets all of them. Rivals
(`fedsys.commands.bench.serving_rival`) are installed, pinned, into a folder of their own; PyTorch
and ONNX Runtime are those of this installation. MLServer has JSON alone over HTTP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from fedsys.commands.bench import Chart, python_path
from fedsys.commands.bench.crowd import Form, forms, whole
from fedsys.commands.bench.rivals import installed
from fedsys.commands.bench.serving_clients import Errand, written
from fedsys.commands.bench.serving_rival import PATH
from fedsys.commands.bench.switch_portfolio import make_portfolio
from fedsys.config import Config
from fedsys.errors import RuntimeFailure
from fedsys.pruning.measuring import machine, quantile
from fedsys.pruning.portfolio import PARENT, Portfolio
from fedsys.runtime.processes import free_ports

PINNED: Mapping[str, tuple[str, ...]] = {
    "fastapi": ("fastapi==0.138.2", "uvicorn==0.49.0", "httptools==0.9.0", "uvloop==0.23.0"),
    "mlserver": ("mlserver==1.7.1",),
}
"""What rivals are, by the folder that they are installed into."""

SERVERS: Mapping[str, str] = {
    "fedsys-torch": "", "fedsys-onnx": "", "fastapi-torch": "fastapi", "fastapi-onnx": "fastapi",
    "mlserver": "mlserver",
}  # fmt: skip
"""Folder in which a server is installed; empty for this installation."""

PAIRS = (
    ("fedsys-torch", "fastapi-torch"), ("fedsys-onnx", "fastapi-onnx"), ("fedsys-onnx", "mlserver"),
)  # fmt: skip
"""Ours, and whom it is measured by: with the same engine."""

_START_S = 120.0


@dataclass
class _Cell:
    """What one server did in one cell, turn by turn."""

    rates: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    rss: int = 0
    wrong: int = 0

    def row(self) -> dict[str, float]:
        return {
            "requests_s": median(self.rates),
            "p50_ms": quantile(self.took, 0.5),
            "p99_ms": quantile(self.took, 0.99),
            "cpu_ms": 1e3 * self.cpu_s / len(self.took),
            "rss_mb": self.rss / 1e6,
            "wrong": self.wrong,
        }


@dataclass(frozen=True)
class _Server:
    """One that stands."""

    name: str
    port: int
    process: psutil.Process

    def everybody(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def cpu_s(self) -> float:
        return sum(sum(one.cpu_times()[:2]) for one in self.everybody())

    def rss(self) -> int:
        return sum(one.memory_info().rss for one in self.everybody())


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure all servers in turns.

    Args:
        config: ``portfolio``, or data, model, pruning and variants that make one.
        options: See ``conf/bench/serving.yaml``.

    Returns:
        ``cells``: a row for each server, number of clients and encoding; ``ratios``: ours to its
        rival in each, medians of those of a turn for requests; ``left_out``: servers that could
        not be installed or started, and why.

    Raises:
        FedsysError: No portfolio can be made or read, or fedsys does not start.
    """
    portfolio = _portfolio(config, options)
    folder = Path(str(config.run.dir))
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        servers = []
        for name in options["servers"]:
            try:
                servers.append(stack.enter_context(_server(name, portfolio, options, folder)))
            except RuntimeFailure as error:
                if not SERVERS[name]:
                    raise
                left_out[name] = str(error)
        clients = stack.enter_context(_clients())
        cells = _measured(servers, clients, portfolio, options, folder)
    rows = [
        {"server": name, "clients": count, "encoding": encoding, **cell.row()}
        for (name, count, encoding), cell in cells.items()
    ]
    left = [{"server": name, "why": why} for name, why in left_out.items()]
    return {"machine": machine(), "cells": rows, "ratios": _ratios(cells), "left_out": left}


def _portfolio(config: Config, options: Mapping[str, Any]) -> Portfolio:
    if config.portfolio is not None:
        return Portfolio.load(Path(config.portfolio))
    folder = Path(str(config.run.dir)) / "portfolio"
    with_onnx = dataclasses.replace(
        config, variants=dataclasses.replace(config.variants, onnx=True)
    )
    return make_portfolio(with_onnx, folder, int(options["epochs"]), _say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# Servers


@contextlib.contextmanager
def _server(
    name: str, portfolio: Portfolio, options: Mapping[str, Any], folder: Path
) -> Iterator[_Server]:
    """Start a server, and end it with the block.

    Raises:
        RuntimeFailure: It cannot be installed, or does not listen.
    """
    port, _, _ = free_ports(3)  # MLServer takes the two behind it, too, if they are free
    place = python_path()
    where = SERVERS[name]
    if where:
        environments = Path(options["environments"]).expanduser()
        place = python_path(installed(where, PINNED[where], environments))
        call = ["fedsys.commands.bench.serving_rival", name, str(portfolio.folder), PARENT]
        call.append(str(port))
    else:
        call = [
            *("fedsys.main", "serve", f"portfolio={portfolio.folder}", "serving.threads=1"),
            *(f"serving.address=http://127.0.0.1:{port}", f"serving.variant={PARENT}"),
            *(f"serving.engine={name.removeprefix('fedsys-')}", *map(str, options["overrides"])),
        ]
    environment = {
        **os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    log = folder / f"{name}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *call], stdout=out, stderr=out, env=environment
        )
    try:
        _until_it_listens(process, port, log)
        yield _Server(name, port, psutil.Process(process.pid))
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_it_listens(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    own = psutil.Process(process.pid)
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(psutil.Error):
            if any(
                one.status == psutil.CONN_LISTEN and one.laddr.port == port
                for one in own.net_connections("tcp")
            ):
                return
        time.sleep(0.1)
    raise RuntimeFailure(f"{log.stem} does not start; see {log}")


# --------------------------------------------------------------------------------------------------
# Measuring


@contextlib.contextmanager
def _clients() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsys.commands.bench.serving_clients"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _measured(
    servers: Sequence[_Server],
    clients: subprocess.Popen[str],
    portfolio: Portfolio,
    options: Mapping[str, Any],
    folder: Path,
) -> dict[tuple[str, int, str], _Cell]:
    cells: dict[tuple[str, int, str], _Cell] = {}
    requests = _requests(portfolio, folder)
    for count in map(int, options["clients"]):
        for encoding in options["encodings"]:
            able = [s for s in servers if (s.name, encoding) in requests]
            for server in able:
                order = Errand(server.port, requests[server.name, encoding], count, 0.5)
                _asked(clients, order)  # warm
                cells[server.name, count, encoding] = _Cell()
            for turn in range(int(options["turns"])):
                first = turn % len(able)
                for server in (*able[first:], *able[:first]):
                    cell = cells[server.name, count, encoding]
                    seconds = float(options["seconds"])
                    path = requests[server.name, encoding]
                    _turn(server, clients, Errand(server.port, path, count, seconds), cell)
            _say(f"{count} clients, {encoding}: " + ", ".join(
                f"{s.name} {median(cells[s.name, count, encoding].rates):.0f}/s" for s in able
            ))  # fmt: skip
    return cells


def _turn(server: _Server, clients: subprocess.Popen[str], order: Errand, cell: _Cell) -> None:
    before, began = server.cpu_s(), time.perf_counter()
    took, wrong = _asked(clients, order)
    cell.rates.append(len(took) / (time.perf_counter() - began))
    cell.cpu_s += server.cpu_s() - before
    cell.rss = max(cell.rss, server.rss())
    cell.took += took
    cell.wrong += wrong


def _asked(clients: subprocess.Popen[str], order: Errand) -> tuple[list[float], int]:
    assert clients.stdin is not None and clients.stdout is not None  # both are pipes
    clients.stdin.write(written(order))
    clients.stdin.flush()
    line = clients.stdout.readline()
    if not line:
        raise RuntimeFailure("the clients of the benchmark ended")
    took, wrong = json.loads(line)
    return took, wrong


def _requests(portfolio: Portfolio, folder: Path) -> dict[tuple[str, str], str]:
    """Write what each server is asked, by its name and the encoding; return the files."""
    shape = portfolio.about.input_shape
    ours = forms("classifier", shape, only=("scores",))
    size = 4 * shape[0] * shape[1] * shape[2]
    raw = (ours["binary"].body or b"")[-size:]
    plain = {
        "json": Form("POST", PATH, ours["json"].body, {"Content-Type": "application/json"}),
        "binary": Form("POST", PATH, raw, {"Content-Type": "application/octet-stream"}),
    }
    asked: dict[str, Mapping[str, Form]] = {name: plain for name in SERVERS}
    asked |= {name: ours for name in ("fedsys-torch", "fedsys-onnx")}
    asked["mlserver"] = {"json": dataclasses.replace(ours["json"], headers=plain["json"].headers)}
    files = {}
    for name, each in asked.items():
        for encoding, form in each.items():
            path = folder / f"{name}-{encoding}.http"
            path.write_bytes(whole(form))
            files[name, encoding] = str(path)
    return files


def _ratios(cells: Mapping[tuple[str, int, str], _Cell]) -> list[dict[str, Any]]:
    rows = []
    for ours, rival in PAIRS:
        least = 2.0 if rival == "mlserver" else 1.0
        for (name, count, encoding), cell in cells.items():
            other = cells.get((rival, count, encoding))
            if name != ours or other is None:
                continue
            own, theirs = cell.row(), other.row()
            turns = zip(cell.rates, other.rates, strict=True)
            row: dict[str, Any] = {
                "server": ours, "rival": rival, "clients": count, "encoding": encoding,
                "requests": median(a / b for a, b in turns),
            }  # fmt: skip
            row |= {
                key: own[f"{key}_{unit}"] / theirs[f"{key}_{unit}"]
                for key, unit in (("p99", "ms"), ("cpu", "ms"), ("rss", "mb"))
            }
            met = row["requests"] >= least and row["p99"] <= 1.5
            rows.append(row | {"goal": met and row["cpu"] <= 1.1 and row["rss"] <= 1.2})
    return rows


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return requests per second of all servers, by cell."""
    rows = figures["cells"]
    cells = list(dict.fromkeys((row["clients"], row["encoding"]) for row in rows))
    by_key = {(row["server"], row["clients"], row["encoding"]): row["requests_s"] for row in rows}
    return Chart(
        "The same model behind fedsys and others",
        "clients and encoding",
        "requests per second",
        [f"{count}, {encoding}" for count, encoding in cells],
        {
            name: [by_key.get((name, *cell), float("nan")) for cell in cells]
            for name in dict.fromkeys(row["server"] for row in rows)
        },
    )
