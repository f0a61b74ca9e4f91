"""What a variant costs on this machine, measured, and which variants are worth their place.

Latency is measured in turns: every turn runs each variant once, in an order that rotates, so what
else the machine does meets all of them. Before each timed run the variant runs once untimed, so
that caches hold its weights as they would when it serves.

Peak memory is that of a process which loads the variant and answers a batch, beyond what it held
when it had only loaded the libraries (``VmHWM`` of Linux). `front` is a pure function of figures.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, fx, nn

from fedsys.config.targets import import_extra
from fedsys.errors import ModelError
from fedsys.identity import environment
from fedsys.models.measure import measure
from fedsys.pruning.portfolio import PARENT, Latency, Variant, ordered

WARM_UP = 3
"""Turns that are not counted."""

_WARM_S = 0.05
"""A run above this many seconds needs no untimed one before it: weights are the least of it."""

_PATIENCE_S = 300.0


# --------------------------------------------------------------------------------------------------
# Latency


def latencies(
    models: Mapping[str, nn.Module],
    input_shape: Sequence[int],
    *,
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    runs: int = 30,
) -> dict[str, tuple[Latency, ...]]:
    """Measure all models with every batch size and number of threads.

    Args:
        models: Modules in evaluation mode by name.
        input_shape: Of one input without the batch.
        batch_sizes: Examples in a batch.
        threads: Intra-op threads of torch, and of ONNX Runtime for int8.
        runs: Timed runs of each.

    Returns:
        By name one entry for each batch size and number of threads, in their order.
    """
    found: dict[str, list[Latency]] = {name: [] for name in models}
    for count in threads:
        with with_threads(count):
            for batch in batch_sizes:
                images = torch.randn(
                    batch, *input_shape, generator=torch.Generator().manual_seed(0)
                )
                for name, took in in_turns(models, images, runs).items():
                    found[name].append(
                        Latency(batch, count, _ms(took, 0.5), _ms(took, 0.95), len(took))
                    )
    order = [(b, t) for b in batch_sizes for t in threads]
    return {
        name: tuple(sorted(each, key=lambda e: order.index((e.batch, e.threads))))
        for name, each in found.items()
    }


def in_turns(
    models: Mapping[str, nn.Module],
    images: Tensor,
    runs: int,
    warm_up: int = WARM_UP,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run each model on `images` once per turn; return the seconds of its `runs` timed runs.

    Args:
        models: Modules in evaluation mode by name.
        images: ``(batch, …)``.
        runs: Timed runs of each.
        warm_up: Turns before them.
        clock: In seconds; with one thread `time.thread_time` leaves out what the machine does else.
    """
    names = list(models)
    took: dict[str, list[float]] = {name: [] for name in names}
    last = dict.fromkeys(names, 0.0)
    with torch.inference_mode():
        for turn in range(warm_up + runs):
            start = turn % len(names)
            for name in (*names[start:], *names[:start]):
                model = models[name]
                if last[name] < _WARM_S:
                    model(images)
                began = clock()
                model(images)
                last[name] = clock() - began
                if turn >= warm_up:
                    took[name].append(last[name])
    return took


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the values lie, between neighbours linearly.

    >>> quantile([3.0, 1.0, 2.0], 0.5), quantile([0.0, 10.0], 0.95)
    (2.0, 9.5)
    """
    ascending = sorted(values)
    place = share * (len(ascending) - 1)
    low = int(place)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (place - low) * (ascending[high] - ascending[low])


def speedup(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Return the median over the turns of how many times faster `fast` was than `slow`."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def _ms(seconds: Sequence[float], share: float) -> float:
    return 1000.0 * quantile(seconds, share)


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------
# Multiply-accumulates, memory, machine


def macs(model: fx.GraphModule, input_shape: Sequence[int]) -> int:
    """Count the multiply-accumulates of one example in float32, without computing anything."""
    example = torch.empty(1, *input_shape, device="meta")
    return sum(node.macs for node in measure(model, example).values())


def peak_bytes(folder: Path, names: Sequence[str], batch: int) -> dict[str, int]:
    """Measure the peak memory of variants of the portfolio in `folder`, each in a fresh process.

    Args:
        folder: A portfolio.
        names: Its variants.
        batch: Examples in the batch that each answers.

    Returns:
        Bytes by name; 0 for all where the system does not tell (not Linux).

    Raises:
        ModelError: A process fails; says what it said.
    """
    if not Path("/proc/self/clear_refs").exists():
        return dict.fromkeys(names, 0)
    command = [sys.executable, "-m", "fedsys.pruning.measuring", str(folder), str(batch), *names]
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"memory could not be measured: {last}; variants.memory=false leaves it out"
        )
    return {name: int(value) for name, value in json.loads(done.stdout).items()}


def _measure_memory(folder: Path, batch: int, names: Sequence[str]) -> dict[str, int]:
    """Measure each variant in a child of this process, which has loaded the libraries only."""
    from fedsys.pruning.portfolio import ONNX, Portfolio

    portfolio = Portfolio.load(folder)
    if any(ONNX in portfolio.variant(name).files for name in names):
        import_extra("onnxruntime")  # so that it is not counted as memory of the variant
    torch.set_num_threads(1)  # threads do not outlive a fork
    images = torch.zeros(batch, *portfolio.about.input_shape)
    found = {}
    for name in names:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            status = 1
            try:
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
                before = _status_kb("VmRSS")
                module = portfolio.module(name)
                with torch.inference_mode():
                    module(images)
                os.write(writer, str(1024 * max(0, _status_kb("VmHWM") - before)).encode())
                status = 0
            except Exception:
                traceback.print_exc()  # of a child, whose status says no more than that it failed
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader) as answer:
            text = answer.read()
        os.waitpid(child, 0)
        if not text:
            raise ModelError(f"the process of {name} ended without an answer")
        found[name] = int(text)
    return found


def _status_kb(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise ModelError(f"/proc/self/status has no {key}")


def machine() -> str:
    """Return what the figures were measured on, in words."""
    known = environment()
    cores = os.cpu_count()
    return f"{known['cpu']}, {cores} cores, {platform.system()}, torch {torch.__version__}"


# --------------------------------------------------------------------------------------------------
# The front


def front(
    variants: Sequence[Variant], margin: float = 0.0, max_drop: float | None = None
) -> tuple[tuple[Variant, ...], dict[str, str]]:
    """Choose the variants for which no other is better in all that counts.

    The parent always stays. Another stays if it is faster than the parent with every batch size
    and number of threads that was measured, and if no variant that stays is at least as accurate
    and, at the first of these, nearly as fast.

    Args:
        variants: All, among them the parent, with accuracy and latencies.
        margin: Share by which a variant must be faster than each one that is at least as accurate.
        max_drop: Largest loss of accuracy against the parent; None for any.

    Returns:
        Those that stay, the most accurate first, and by name why each other one does not.
    """
    parent = next(v for v in variants if v.name == PARENT)
    stay, refused = [parent], {}
    for variant in ordered(variants):
        if variant is parent:
            continue
        reason = _slower(variant, parent) or _dropped(variant, parent, max_drop)
        for better in [] if reason else stay:
            close = variant.p50_ms > better.p50_ms * (1.0 - margin)
            if better.accuracy >= variant.accuracy and close:
                reason = (
                    f"{better.name} is at least as accurate ({better.accuracy:.2%}, this "
                    f"{variant.accuracy:.2%}) at {better.p50_ms:.3g} ms, this {variant.p50_ms:.3g}"
                )
                break
        if reason:
            refused[variant.name] = reason
        else:
            stay.append(variant)
    return ordered(stay), refused


def _slower(variant: Variant, parent: Variant) -> str:
    for own, other in zip(variant.latencies, parent.latencies, strict=True):
        if own.p50_ms > other.p50_ms:
            return (
                f"slower than its parent: {own.p50_ms:.3g} ms, not {other.p50_ms:.3g} ms "
                f"(batch {own.batch}, {own.threads} threads)"
            )
    return ""


def _dropped(variant: Variant, parent: Variant, max_drop: float | None) -> str:
    drop = parent.accuracy - variant.accuracy
    if max_drop is None or drop <= max_drop:
        return ""
    return f"loses {drop:.2%} accuracy against its parent, more than {max_drop:.2%}"


def _main(arguments: Sequence[str]) -> None:
    folder, batch, *names = arguments
    print(json.dumps(_measure_memory(Path(folder), int(batch), names)))


if __name__ == "__main__":
    _main(sys.argv[1:])
