"""Hosts fail again and again for a long time: memory and descriptors, and no request is lost."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from fedsys.commands.bench.failure_chain import (
    ConstantLoad,
    HostProcess,
    host_processes,
    opened_chain,
)
from fedsys.commands.bench.failure_models import BenchChain
from fedsys.pruning.portfolio import Portfolio
from fedsys.transport.security import new_token

_IMAGES, _SAMPLES = 16, 60
_FAULT_S, _TICK_S = 2.0, 0.05  # how long a host is stopped, cut off or slowed; between two looks
_SEED = 1


def soak(chain: BenchChain, options: Mapping[str, Any]) -> dict[str, Any]:
    """Let a host fail every ``soak_every_s`` seconds, for ``soak_s``.

    Returns:
        Requests that were issued, answered, lost, refused, and answered twice; failures by kind;
        memory and descriptors of the process at the entry: medians of the second and the last
        sixth of the time (in the first what is to stand ready is built), and ``samples``.

    Raises:
        FedsysError: The chain cannot be opened.
    """
    portfolio, token = Portfolio.load(Path(str(chain.config.portfolio))), new_token()
    with (
        host_processes(chain.config, token) as (own, hosts),
        opened_chain(own, portfolio, lambda event: None) as (engine, continuer),
    ):
        images = torch.randn(_IMAGES, *engine.card.input_shape)
        load = ConstantLoad(engine, images, float(options["requests_per_s"]))
        counts, samples = _strike_on(hosts, options)
        ledger, failovers = load.close(), continuer.status()["failovers"]
    return {
        "issued": ledger.issued,
        "answered": len(ledger.answers),
        "lost": ledger.issued - len(ledger.answers) - len(ledger.failed),
        "refused": len(ledger.failed),
        "twice": ledger.twice,
        "why": next(iter(ledger.failed.values()), ""),
        "failovers": failovers,
        **{f"{fault}s": count for fault, count in counts.items()},
        **_growth(samples),
        "samples": samples,
    }


def _strike_on(
    hosts: Sequence[HostProcess], options: Mapping[str, Any]
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Let hosts fail one after the other; return how often, and what was seen of processes."""
    faults, draw = [str(fault) for fault in options["faults"]], random.Random(_SEED)
    seconds, every = float(options["soak_s"]), float(options["soak_every_s"])
    counts, samples = dict.fromkeys(faults, 0), list[dict[str, Any]]()
    began, due, look = time.monotonic(), every, 0.0
    while (now := time.monotonic() - began) < seconds:
        if now >= due:
            fault, host = draw.choice(faults), draw.choice(hosts)
            counts[fault] += 1
            host.strike(fault, _FAULT_S, float(options["slow"]))
            time.sleep(_FAULT_S)
            host.mend(fault)
            due += every
        if now >= look:
            samples.append(_sample(now, hosts))
            look += max(1.0, seconds / _SAMPLES)
            print(f"soak: {now:.0f} of {seconds:.0f} s", file=sys.stderr, flush=True)
        time.sleep(_TICK_S)
    return counts, samples


def _sample(now: float, hosts: Sequence[HostProcess]) -> dict[str, Any]:
    own, theirs = psutil.Process(), []
    for host in hosts:
        try:
            theirs.append(psutil.Process(host.pid).memory_info().rss)
        except psutil.Error:  # it was killed a moment ago
            continue
    return {
        "minute": now / 60,
        "entry_mb": own.memory_info().rss / 1e6,
        "hosts_mb": max(theirs, default=0) / 1e6,
        "descriptors": own.num_fds(),
        "threads": own.num_threads(),
    }


def _growth(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    sixth = max(1, len(samples) // 6)
    early, late = samples[sixth : 2 * sixth] or samples, samples[-sixth:]
    found = {}
    for key in ("entry_mb", "hosts_mb", "descriptors", "threads"):
        found[f"{key}_early"] = median(row[key] for row in early)
        found[f"{key}_late"] = median(row[key] for row in late)
    return found
