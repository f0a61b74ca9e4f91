"""One way of changing variants under a constant load, in a process of its own.

Its memory is read in that process alone, so that nothing of the other ways, and nothing of the
benchmark, is in it. The parent process gets one JSON object.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import psutil
import torch
from torch import Tensor

from fedsys.commands.bench import python_path
from fedsys.commands.serve import SWITCH_S
from fedsys.errors import RequestError, RuntimeFailure
from fedsys.pruning.dense import architecture
from fedsys.pruning.measuring import quantile
from fedsys.pruning.memory import resident_bytes
from fedsys.pruning.portfolio import VARIANTS, Portfolio
from fedsys.serving.batching import Batcher, BatchLimits, Served
from fedsys.serving.engine import CALM, Answer, Array, Pressure
from fedsys.serving.portfolio import card_of
from fedsys.serving.switch.slimmable import slimmable
from fedsys.serving.switch.switcher import Cost, Loaded, Resident, Switcher

WAYS = ("beside", "instead", "resident", "slimmable")
"""Load beside the running one; stop, load, start; all resident; one network of several widths."""

_PATIENCE_S = 3600.0
_SAMPLE_S = 0.02


@dataclass(frozen=True)
class Case:
    """What a process is to do.

    Attributes:
        portfolio: Folder.
        way: One of `WAYS`.
        switches: How many.
        rate: Requests per second.
        threads: Intra-op threads.
        quiet_s: Of load without switches before, for comparison, in seconds.
    """

    portfolio: str
    way: str
    switches: int
    rate: float
    threads: int
    quiet_s: float = 2.0


def measure(case: Case) -> dict[str, Any]:
    """Carry `case` out in a process of its own and return its figures.

    Raises:
        RuntimeFailure: The process failed; with its last words.
    """
    command = [sys.executable, "-m", "fedsys.commands.bench.switch_load", json.dumps(asdict(case))]
    environment = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeFailure(f"the process of {case.way} failed: {last}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


@final
class Unwatched:
    """Is told what happens, and does nothing with it."""

    def arrived(self, rows: int) -> None:
        """Images came."""

    def left(self, rows: int) -> None:
        """Images wait no more."""

    def received(self, size: int, seconds: float) -> None:
        """A body came."""

    def answered(self, milliseconds: float) -> None:
        """A request was answered."""


@final
class LeasedEngine:
    """Answers by a switcher, and notes how long each request waited for its variant.

    Args:
        portfolio: For what a client must know.
        switcher: Holds the variant.
        quick: Variants that are computed by whoever takes a request in.
    """

    def __init__(
        self, portfolio: Portfolio, switcher: Switcher, quick: Collection[str] = ()
    ) -> None:
        self.card, self.watch = card_of(portfolio), Unwatched()
        self._switcher, self._quick = switcher, frozenset(quick)
        self.waits_ms: list[float] = []

    @property
    def ready(self) -> bool:
        """Whether a variant is in memory."""
        return self._switcher.ready

    @property
    def lanes(self) -> int:
        """One batch at a time."""
        return 1

    def is_quick(self, rows: int) -> bool:
        """Return whether the variant that answers is quick."""
        return self._switcher.current in self._quick

    def answer(self, images: Array, pressure: Pressure = CALM, by: str = "") -> Answer:
        """Compute the scores."""
        asked = time.perf_counter()
        with self._switcher.lease() as active:
            self.waits_ms.append((time.perf_counter() - asked) * 1e3)
            return Answer(active.run(torch.from_numpy(images)).numpy(), active.name)

    def status(self) -> Mapping[str, Any]:
        """Return nothing."""
        return {}

    def close(self) -> None:
        """End."""
        self._switcher.close()


@final
class RequestStream:
    """Requests at a constant rate, each of which is looked at when it is answered.

    An answer is *right* if it is, to the bit, what the variant that it names gives.

    Args:
        batcher: Takes the requests.
        image: What each asks about.
        right: Scores of each variant.
        rate: Requests per second.
    """

    def __init__(
        self, batcher: Batcher, image: Tensor, right: Mapping[str, Tensor], rate: float
    ) -> None:
        self._batcher, self._image, self._right, self._rate = batcher, image, right, rate
        self.issued = self.answered = self.failed = self.wrong = 0
        self.moments: list[float] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._send, name="load", daemon=True)
        self._thread.start()

    def _send(self) -> None:
        due = time.perf_counter()
        while not self._stop.is_set():
            due += 1 / self._rate
            time.sleep(max(0.0, due - time.perf_counter()))
            self.issued += 1
            try:
                future = self._batcher.submit(self._image.numpy())
            except RequestError:
                with self._lock:
                    self.failed += 1
                continue
            future.add_done_callback(self._look)

    def _look(self, future: Future[Served]) -> None:
        now, error = time.perf_counter(), future.exception()
        with self._lock:
            if error is not None:
                self.failed += 1
                return
            served = future.result()
            self.answered += 1
            self.moments.append(now)
            self.wrong += not np.array_equal(served.scores, self._right[served.by].numpy())

    def stop(self) -> None:
        """Send no more."""
        self._stop.set()
        self._thread.join()

    def longest_gap_ms(self, since: float, until: float) -> float:
        """Return the longest time without an answer in a span, in milliseconds."""
        inside = [since, *(m for m in self.moments if since <= m <= until), until]
        return 1e3 * max(b - a for a, b in itertools.pairwise(inside))


def _switcher(
    portfolio: Portfolio, way: str, image: Tensor
) -> tuple[Switcher, list[str], Callable[[str], Tensor]]:
    """Return the switcher, the names that it knows, and what each of them computes."""
    first = portfolio.parent.name
    names = [first, *(v.name for v in portfolio.variants if v.name != first)]

    def by_file(name: str) -> Tensor:
        with torch.inference_mode():
            output: Tensor = portfolio.module(name)(image)
            return output

    if way in ("beside", "instead"):
        return Loaded(portfolio.module, first, (image,)), names, by_file
    if way == "resident":
        modules = {name: portfolio.module(name) for name in names}
        return Resident(modules, first), names, by_file
    widths = [round(1 - i / len(names), 4) for i in range(len(names))]
    with_norms = architecture.load(portfolio.folder / VARIANTS / first)  # each width has its own
    views = slimmable(with_norms, image, widths)
    variants = {f"width {width:g}": view for width, view in views.items()}

    def by_width(name: str) -> Tensor:
        with torch.inference_mode():
            output: Tensor = variants[name](image)
            return output

    return Resident(variants, "width 1"), list(variants), by_width


def carry_out(case: Case) -> dict[str, Any]:
    """Do it in this process."""
    torch.set_num_threads(case.threads)
    sys.setswitchinterval(SWITCH_S)
    portfolio = Portfolio.load(Path(case.portfolio))
    image = torch.randn(1, *portfolio.about.input_shape, generator=torch.Generator().manual_seed(0))
    smallest = min(portfolio.variants, key=lambda v: v.bytes).name
    with torch.inference_mode():  # what the libraries take at their first use is no model's
        portfolio.module(smallest)(image)
    base = resident_bytes()
    switcher, names, compute = _switcher(portfolio, case.way, image)
    right = {name: compute(name).clone() for name in names}
    engine = LeasedEngine(portfolio, switcher)
    batcher = Batcher(engine, BatchLimits(max_batch=1, max_delay_ms=0.0, max_queue=1 << 20))
    stream = RequestStream(batcher, image, right, case.rate)
    began = time.perf_counter()
    time.sleep(case.quiet_s)
    one = resident_bytes()  # while it serves: threads and their buffers are not of a switch
    calm = time.perf_counter()
    quiet = len(engine.waits_ms)
    costs, peak = _switch(switcher, names, case)
    ended = time.perf_counter()
    stream.stop()
    batcher.close(60.0)
    after = resident_bytes()
    waits = engine.waits_ms[quiet:]
    figures = _figures(costs, waits) | {
        "requests": stream.issued,
        "answered": stream.answered,
        "failed": stream.failed,
        "lost": stream.issued - stream.answered - stream.failed,
        "wrong": stream.wrong,
        "gap_quiet_ms": stream.longest_gap_ms(began, calm),
        "gap_ms": stream.longest_gap_ms(calm, ended),
        "memory_mb": (one - base) / 1e6,
        "memory_after_mb": (after - base) / 1e6,
        "memory_peak_mb": (peak - base) / 1e6,
        "process_mb": base / 1e6,
    }
    engine.close()
    return figures


def _switch(switcher: Switcher, names: Sequence[str], case: Case) -> tuple[list[Cost], int]:
    """Go through the variants, end at the first one, and note the peak of the memory."""
    process, stop, peak = psutil.Process(), threading.Event(), [0]

    def sample() -> None:
        shared = process.memory_full_info()
        other = shared.rss - shared.uss
        while not stop.wait(_SAMPLE_S):
            peak[0] = max(peak[0], process.memory_info().rss - other)

    sampler = threading.Thread(target=sample, name="memory", daemon=True)
    sampler.start()
    costs = []
    for number in range(1, case.switches + 1):
        costs.append(switcher.switch(names[number % len(names)], beside=case.way != "instead"))
        if case.way in ("resident", "slimmable"):
            time.sleep(1 / case.rate)  # so that requests come in between
    if switcher.current != names[0]:  # memory is compared with what the first one took
        costs.append(switcher.switch(names[0], beside=case.way != "instead"))
    stop.set()
    sampler.join()
    return costs, peak[0]


def _figures(costs: Sequence[Cost], waits: Sequence[float]) -> dict[str, float]:
    real = [cost for cost in costs if cost.before != cost.after]
    return {
        "switches": len(real),
        "switch_ms": quantile([c.total_ms for c in real], 0.5),
        "prepare_ms": quantile([c.prepare_ms for c in real], 0.5),
        "blocked_ms": quantile([c.blocked_ms for c in real], 0.5),
        "blocked_ms_max": max(c.blocked_ms for c in real),
        "drain_ms": quantile([c.drain_ms for c in real], 0.5),
        "wait_ms_p99": quantile(waits, 0.99),
        "wait_ms_max": max(waits),
        "undrained": sum(not c.drained for c in real),
    }


if __name__ == "__main__":
    print(json.dumps(carry_out(Case(**json.loads(sys.argv[1])))))
