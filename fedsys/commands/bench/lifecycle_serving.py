"""The second half of a life: what was made is served, by ``fedsys serve`` in a process of its own.

First the portfolio alone, while load rises: variants are switched. Then the chain of hosts, on
which load rises, bandwidth falls, and a host dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from fedsys.commands.bench.crowd import Form, Heard, ask, forms
from fedsys.commands.bench.lifecycle_answers import (
    LoadPhase,
    chain_decisions,
    chain_figures,
    phase_rows,
    switch_decisions,
    thinned,
)
from fedsys.commands.bench.lifecycle_load import PacedLoad, asked
from fedsys.commands.bench.lifecycle_stages import Found, Life, say
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.pruning.portfolio import Portfolio
from fedsys.runtime.processes import wait_or_kill

_END_S = 40.0
_PAUSE_S = 0.1
_SETTLED_S = 0.4
_LEAST_MS = 5.0  # of an objective


@dataclass(frozen=True)
class RunningEndpoint:
    """An endpoint that runs.

    Attributes:
        address: As ``http://host:port``.
        ready: What it said when it was ready.
        began_s: When the traces of its links began, by `time.time`.
        log: Where it says what happens.
    """

    address: str
    ready: Mapping[str, Any]
    began_s: float
    log: Path

    def status(self) -> dict[str, Any]:
        """Return what it says of itself."""
        found: dict[str, Any] = httpx.get(f"{self.address}/status", timeout=_END_S).json()
        return found

    def told(self, kind: str) -> list[dict[str, Any]]:
        """Return what it said of a kind: ``move``, ``recovery`` or ``switch``."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.startswith(f'{{"{kind}":')]
        return [one[kind] for one in found]


@contextlib.contextmanager
def served(overrides: Sequence[str], log: Path) -> Iterator[RunningEndpoint]:
    """Start ``fedsys serve``, and end it with the block.

    Args:
        overrides: As on the command line.
        log: What it says goes there.

    Raises:
        RuntimeFailure: It did not start; with its last words.
    """
    given = [*(o for o in overrides if not o.startswith("json=")), "json=true"]
    command = [sys.executable, "-m", "fedsys.main", "serve", *given]
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            process.wait()
            last = (log.read_text(encoding="utf-8").strip().splitlines() or ["no message"])[-1]
            raise RuntimeFailure(f"fedsys serve did not start: {last}; see {log}")
        ready = json.loads(line)["ready"]
        began_s = float(ready.get("began_s", time.time()))
        yield RunningEndpoint(str(ready["address"]), ready, began_s, log)
    finally:
        process.terminate()
        wait_or_kill(process, _END_S)
        if process.stdout is not None:
            process.stdout.close()


def _form(life: Life, portfolio: Portfolio) -> Form:
    return forms(life.config.serving.name, portfolio.about.input_shape, ("scores",))["binary"]


# --------------------------------------------------------------------------------------------------
# The portfolio alone


def switch_stage(life: Life) -> Found:
    """Serve the portfolio by one process, and let load rise."""
    portfolio = Portfolio.load(Path(life.needed("prune")["portfolio"]))
    goal = max(_LEAST_MS, round(float(life.options["p95_factor"]) * portfolio.parent.p95_ms, 1))
    own = ["hosts.list=[]", f"portfolio={portfolio.folder}", f"serving.objective.p95_ms={goal}"]
    seconds, many = float(life.options["switch_s"]), int(life.options["clients"])
    form = _form(life, portfolio)
    with served([*life.overrides, *own], life.folder / "switch.log") as endpoint:
        calm = _heard(endpoint.address, form, 1, _PAUSE_S, seconds)
        busy = _heard(endpoint.address, form, many, 0.0, seconds)
        status = endpoint.status()
    rows = [
        {"phase": "calm", "clients": 1, **_quantiles(calm)},
        {"phase": "load rises", "clients": many, **_quantiles(busy)},
    ]
    return {
        "objective_p95_ms": goal,
        "switching": rows,
        "switches": status["switches"],
        "variant": status["variant"],
        "decisions": [one.row() for one in switch_decisions(status, rows, goal)],
    }


def _heard(address: str, form: Form, clients: int, pause_s: float, seconds: float) -> Heard:
    """Return what clients hear that ask for so many seconds."""
    end, together = time.monotonic() + seconds, Heard()

    def is_over(_: int) -> bool:
        return time.monotonic() >= end

    with ThreadPoolExecutor(clients) as pool:
        for heard in pool.map(lambda _: ask(address, form, is_over, pause_s), range(clients)):
            together.ms += heard.ms
            together.failures += heard.failures
    return together


def _quantiles(heard: Heard) -> dict[str, Any]:
    return {
        "answers": len(heard.ms),
        "failed": heard.failures.total(),
        "p50_ms": heard.quantile(0.5),
        "p95_ms": heard.quantile(0.95),
    }


# --------------------------------------------------------------------------------------------------
# The chain


def chain_stage(life: Life) -> Found:
    """Serve the chosen variant by the chain of hosts, and let its conditions change."""
    made, options = life.needed("partition"), life.options
    portfolio = Portfolio.load(Path(life.needed("prune")["portfolio"]))
    phase_s = float(options["phase_s"])
    own = [f"portfolio={portfolio.folder}", f"serving.variant={made['variant']}"]
    own += [*made["hosts"], *_falling(life, phase_s)]
    with served([*life.overrides, *own], life.folder / "chain.log") as endpoint:
        _wait_for_turn(endpoint.began_s, 2 * phase_s)
        rates = [float(rate) for rate in options["requests_per_s"]]
        load = PacedLoad(partial(asked, endpoint.address, _form(life, portfolio)), rates[0])
        phases = list(_phases(life, endpoint, load, rates, phase_s))
        answers = load.close()
        status = endpoint.status()
    told = {kind: endpoint.told(kind) for kind in ("move", "recovery")}
    rows = phase_rows(phases, answers, made["latency_ms"])
    first = made["plan"]
    return {
        "phases": rows,
        **chain_figures(phases, answers, told["recovery"]),
        "late": load.late,
        "technique": status.get("technique", "none"),
        "latency": thinned(answers, phases[0].began_s),
        "log": str(endpoint.log),
        "decisions": [one.row() for one in chain_decisions(first, told, phases, answers, rows)],
    }


def _falling(life: Life, phase_s: float) -> list[str]:
    """Return what makes the first link good for two phases and bad for two, in turns."""
    network, low = life.config.network, float(life.options["falls_to_mbit_s"])
    up, down = network.up_mbit_s or 1e4, network.down_mbit_s or 1e4
    trace = f"[[0,{up:g},{down:g}],[{2 * phase_s:g},{low:g},{low:g}]]"
    return [f"network.trace={trace}", f"network.period_s={4 * phase_s:g}"]


def _wait_for_turn(began_s: float, half_s: float) -> None:
    """Wait until the first link begins to be good anew."""
    left = 2 * half_s - (time.time() - began_s) % (2 * half_s)
    say(f"chain: answers; the link is good anew in {left:.0f} s")
    time.sleep(left)


def _phases(
    life: Life, endpoint: RunningEndpoint, load: PacedLoad, rates: Sequence[float], phase_s: float
) -> Iterator[LoadPhase]:
    """Let things happen, one phase each, and yield what was expected at its end."""
    start = time.time()
    for number, what in enumerate(("calm", "load rises", "bandwidth falls", "a host dies")):
        load.rate = rates[min(number, 1)]
        began, more = time.time(), ""
        if number == 3:
            more = _kill(life, endpoint)
            began = time.time()
        say(f"chain: {what}{f', {more}' if more else ''}")
        time.sleep(max(_SETTLED_S, start + (number + 1) * phase_s - time.time()))
        status = endpoint.status()
        route, reason = str(status["variant"]), str(status.get("decision", {}).get("reason", ""))
        expected = _expected(status)
        yield LoadPhase(what, began, time.time(), load.rate, expected, more, route, reason)


def _expected(status: Mapping[str, Any]) -> float | None:
    """Return what a request is expected to take now, in milliseconds."""
    estimate = status.get("estimate")
    if estimate:
        return float(estimate["latency_ms"])
    now_ms = status.get("decision", {}).get("now_ms")
    return None if now_ms is None else float(now_ms)


def busiest(chain: Sequence[Mapping[str, Any]]) -> str:
    """Return the host behind the first that computes most units now, the last one of equals."""
    return str(max(reversed(chain[1:] or chain), key=lambda row: len(row["units"]))["host"])


def _kill(life: Life, endpoint: RunningEndpoint) -> str:
    """Let the host die, and return its name; empty where nobody can end it.

    Raises:
        ConfigError: There is no such host.
    """
    command = [str(word) for word in life.options["kill"]]
    rows = {row["host"]: row for row in endpoint.ready["chain"]}
    name = str(life.options["dies"] or busiest(endpoint.status()["chain"]))
    if name not in rows:
        raise ConfigError.of("bench.dies", name, f"must be one of {', '.join(rows)}")
    if command:
        subprocess.run(command, check=False, timeout=_END_S)
    elif "pid" in rows[name]:
        os.kill(int(rows[name]["pid"]), signal.SIGKILL)
    else:
        say(f"{name} is not a process of this machine, and bench.kill says no command: it lives on")
        return ""
    return name
