"""What a crowd that only takes places, memory and time costs those who want an answer.

``fedsys serve`` runs as a process of its own, and the crowd in another
(`fedsys.commands.bench.crowd`): idle connections, slow headers, headers without an end, large JSON
bodies. Honest clients ask in the quiet and then under it, each over one connection that it keeps,
and a supervisor asks for the health over a new connection each time.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedsys.commands.bench import Chart
from fedsys.commands.bench.crowd import HEALTH, Crowd, Heard, ask, command, forms
from fedsys.commands.bench.switch_portfolio import make_portfolio
from fedsys.config import Config
from fedsys.errors import RuntimeFailure
from fedsys.pruning.portfolio import Portfolio

_END_S = 240.0
_SAMPLE_S = 0.05
_LONE = 300  # requests of a client that is alone
_WARM = 20


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the quiet, and then the crowd.

    Args:
        config: ``portfolio``, or data, model and pruning that make one; ``serving``.
        options: See ``conf/bench/serving_load.yaml``.

    Returns:
        ``lone``: times of a client that is alone, by what it asks; ``clients``: what honest clients
        and the supervisor heard in the quiet and under the crowd; ``crowd``: what it met;
        ``p99_ratio``, ``failed`` and ``memory_mb``, the most that the endpoint and its processes
        took more than in the quiet.

    Raises:
        FedsysError: No portfolio can be made or read, or the endpoint does not start.
    """
    portfolio = _portfolio(config, options)
    with _endpoint(config, portfolio, options) as (address, memory):
        asked = forms(config.serving.name, portfolio.about.input_shape)
        lone = [_lone(address, name, form) for name, form in {**asked, "health": HEALTH}.items()]
        quiet = _clients(address, config, portfolio, options)
        base, memory.most = memory.now(), 0
        with _crowd(address, _of(config, portfolio, options)) as met:
            time.sleep(float(options["head_start"]))
            pressed = _clients(address, config, portfolio, options)
    clients = [*_rows("quiet", quiet), *_rows("crowd", pressed)]
    return {
        "lone": lone,
        "clients": clients,
        "crowd": [{"what": what, "times": times} for what, times in sorted(met.items())],
        "p99_ratio": pressed["clients"].quantile(0.99) / quiet["clients"].quantile(0.99),
        "failed": sum(row["failed"] for row in clients),
        "memory_mb": (memory.most - base) / 1e6,
    }


def _portfolio(config: Config, options: Mapping[str, Any]) -> Portfolio:
    if config.portfolio is not None:
        return Portfolio.load(Path(config.portfolio))
    folder = Path(str(config.run.dir)) / "portfolio"
    return make_portfolio(config, folder, int(options["epochs"]), _say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class _Memory:
    """Resident memory of a process and its children, sampled by a thread."""

    process: psutil.Process
    most: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def now(self) -> int:
        total = 0
        for process in [self.process, *self.process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def watch(self) -> None:
        while not self.ended.wait(_SAMPLE_S):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.most = max(self.most, self.now())


@contextlib.contextmanager
def _endpoint(
    config: Config, portfolio: Portfolio, options: Mapping[str, Any]
) -> Iterator[tuple[str, _Memory]]:
    """Start ``fedsys serve`` on loopback, and end it with the block."""
    arguments = [
        *("serve", f"portfolio={portfolio.folder}", "serving.address=http://127.0.0.1:0"),
        *(f"serving.name={config.serving.name}", f"serving.threads={config.serving.threads or 1}"),
        *("json=true", *map(str, options["overrides"])),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsys.main", *arguments], stdout=subprocess.PIPE, text=True
    )
    memory = _Memory(psutil.Process(process.pid))
    watching = threading.Thread(target=memory.watch, daemon=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeFailure("the endpoint of the benchmark did not start")
        watching.start()
        yield str(json.loads(line)["ready"]["address"]), memory
    finally:
        memory.ended.set()
        process.terminate()
        try:
            process.communicate(timeout=_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def _crowd(address: str, crowd: Crowd) -> Iterator[dict[str, int]]:
    """Start the crowd, and tell at the end what it met."""
    met: dict[str, int] = {}
    process = subprocess.Popen(
        command(address, crowd), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeFailure("the crowd of the benchmark did not begin")
        yield met
        met.update(json.loads(process.communicate("", timeout=_END_S)[0]))
    finally:
        process.kill()
        process.wait()


def _of(config: Config, portfolio: Portfolio, options: Mapping[str, Any]) -> Crowd:
    return Crowd(
        idle=int(options["idle"]),
        slow=int(options["slow"]),
        header_bytes=int(options["header_mib"]) << 20,
        bodies=int(options["bodies"]),
        body_bytes=int(options["body_mib"]) << 20,
        name=config.serving.name,
        input_shape=tuple(portfolio.about.input_shape),
        rows=int(options["rows"]),
    )


def _lone(address: str, name: str, form: Any) -> dict[str, Any]:
    heard = ask(address, form, lambda asked: asked >= _LONE, 0.0)
    heard.ms = heard.ms[_WARM:]
    return {
        "asks": name, "bytes": len(form.body or b""),
        "p50_ms": heard.quantile(0.5), "p99_ms": heard.quantile(0.99),
    }  # fmt: skip


def _clients(
    address: str, config: Config, portfolio: Portfolio, options: Mapping[str, Any]
) -> dict[str, Heard]:
    count, pause_s = int(options["clients"]), float(options["pause"])
    end = time.monotonic() + float(options["seconds"])
    asked = list(forms(config.serving.name, portfolio.about.input_shape).values())

    def is_over(_: int) -> bool:
        return time.monotonic() >= end

    with ThreadPoolExecutor(count + 1) as pool:
        health = pool.submit(ask, address, HEALTH, is_over, pause_s, keep=False)
        asking = [
            pool.submit(ask, address, asked[number % len(asked)], is_over, pause_s)
            for number in range(count)
        ]
        together = Heard()
        for future in asking:
            heard = future.result()
            together.ms += heard.ms
            together.failures += heard.failures
    return {"clients": together, "supervisor": health.result()}


def _rows(phase: str, heard: Mapping[str, Heard]) -> list[dict[str, Any]]:
    return [
        {
            "phase": phase, "who": who, "answers": len(one.ms), "failed": one.failures.total(),
            "failures": json.dumps(one.failures), "p50_ms": one.quantile(0.5),
            "p99_ms": one.quantile(0.99), "max_ms": one.quantile(1.0),
        }
        for who, one in heard.items()
    ]  # fmt: skip


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return what those who want an answer wait for it."""
    rows = figures["clients"]
    return Chart(
        "Waiting for an answer, in the quiet and beside a crowd",
        "who asks, and when",
        "milliseconds",
        [f"{row['who']}, {row['phase']}" for row in rows],
        {name: [row[f"{name}_ms"] for row in rows] for name in ("p50", "p99")},
        log=True,
    )
