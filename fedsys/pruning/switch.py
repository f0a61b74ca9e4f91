"""Changing the variant that answers, without a request that is lost, mixed or kept waiting.

DNNShifter (Eccles et al., FGCS 152, 2024) keeps one small variant in memory and loads another when
conditions change; its public code has no switcher. Here::

    request ──▶ lease() ──▶ run ──▶ leave            the pointer is one attribute: a request has
                  │                                  the old variant or the new one, never both
                  ▼
    switch:   load and warm up ─▶ swap the pointer ─▶ drain the old one ─▶ free it
              beside the old one                      requests in it end

`Loaded` does that, and where there is no room for two, stop-load-start: requests wait meanwhile.
`Resident` has all variants in memory, for comparison: the pointer changes and nothing else. A
slimmable network (`fedsys.pruning.switch_slimmable`) is a `Resident` whose variants share weights.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor, nn

from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.pruning.switch_memory import trim

Run = Callable[[Tensor], Tensor]
"""Images ``(batch, C, H, W)`` to outputs ``(batch, classes)``."""

Load = Callable[[str], nn.Module]
"""The module of a variant by its name, read anew at each call."""

DRAIN_S = 60.0
"""How long a switch waits for the requests in the old variant, in seconds."""


@dataclass(frozen=True)
class Cost:
    """What a switch took, in milliseconds.

    Attributes:
        before: Variant that answered.
        after: Variant that answers now.
        prepare_ms: Loading and warming up.
        blocked_ms: Time in which no request could begin.
        drain_ms: Until the last request had left the old variant.
        free_ms: Giving its memory back.
        drained: Whether all requests had left it within `DRAIN_S`.
    """

    before: str
    after: str
    prepare_ms: float
    blocked_ms: float
    drain_ms: float = 0.0
    free_ms: float = 0.0
    drained: bool = True

    @property
    def total_ms(self) -> float:
        """The whole switch."""
        return self.prepare_ms + self.drain_ms + self.free_ms


class Switcher(Protocol):
    """Holds what answers, and changes it."""

    @property
    def current(self) -> str:
        """Name of the variant that requests get now."""

    def lease(self) -> AbstractContextManager[Active]:
        """Give a request its variant, from its beginning to its end."""

    def switch(self, name: str, *, beside: bool = True) -> Cost:
        """Make `name` the variant of all requests that begin from now on."""

    def close(self) -> None:
        """Let nobody in any more, and free everything."""


@final
class Active:
    """One variant in memory, and how many requests are in it.

    Args:
        name: Of the variant.
        run: Computes it.

    Attributes:
        name: Of the variant.
    """

    def __init__(self, name: str, run: Run) -> None:
        self.name, self._run = name, run
        self._inside, self._retired = 0, False
        self._change = threading.Condition()

    def run(self, images: Tensor) -> Tensor:
        """Return the outputs of the variant, without gradients."""
        with torch.inference_mode():
            return self._run(images)

    def enter(self) -> bool:
        """Let a request in; False if the variant is on its way out."""
        with self._change:
            if self._retired:
                return False
            self._inside += 1
            return True

    def leave(self) -> None:
        """End a request."""
        with self._change:
            self._inside -= 1
            self._change.notify_all()

    def retire(self) -> None:
        """Let nobody in any more."""
        with self._change:
            self._retired = True

    def drain(self, timeout_s: float) -> bool:
        """Wait until nobody is inside; return whether that came true."""
        with self._change:
            return self._change.wait_for(lambda: self._inside == 0, timeout_s)


@final
class _Pointer:
    """Which variant requests get; without one they wait.

    The pointer is a single attribute and is read without a lock, so changing it blocks nobody.
    """

    def __init__(self) -> None:
        self.active: Active | None = None
        self._there = threading.Event()
        self._closed = False

    def enter(self) -> Active:
        while True:
            active = self.active
            if active is not None and active.enter():
                return active
            if self._closed:
                raise RuntimeFailure("no variant answers any more: it has been closed")
            if active is None:
                self._there.wait()
            # A variant that lets nobody in has had its successor in the pointer since before.

    @contextmanager
    def lease(self) -> Iterator[Active]:
        active = self.enter()
        try:
            yield active
        finally:
            active.leave()

    def put(self, active: Active) -> Active | None:
        """Change the pointer, then close the old variant; return it."""
        old, self.active = self.active, active
        self._there.set()
        if old is not None:
            old.retire()
        return old

    def take(self) -> Active | None:
        """Leave requests waiting; return the old variant."""
        old = self.active
        self._there.clear()
        self.active = None
        if old is not None:
            old.retire()
        return old

    def close(self) -> Active | None:
        self._closed = True
        old = self.take()
        self._there.set()
        return old


@final
class Loaded:
    """One variant in memory; another is loaded when it is wanted.

    Args:
        load: Reads a variant.
        first: Name of the one that answers first; it is loaded and warmed up here.
        warm: Inputs that each variant computes before it answers, one for each batch size that
            matters. PyTorch chooses and caches kernels at the first of each.

    Raises:
        ModelError: The first variant cannot be read.
    """

    def __init__(self, load: Load, first: str, warm: tuple[Tensor, ...] = ()) -> None:
        self._load, self._warm = load, warm
        self._pointer = _Pointer()
        self._one_at_a_time = threading.Lock()
        self._module = self._prepare(first)
        self._pointer.put(Active(first, self._module))
        self._name = first

    @property
    def current(self) -> str:
        """Name of the variant that requests get now."""
        return self._name

    def lease(self) -> AbstractContextManager[Active]:
        """Give a request its variant, from its beginning to its end.

        Raises:
            RuntimeFailure: The switcher has been closed.
        """
        return self._pointer.lease()

    def switch(self, name: str, *, beside: bool = True) -> Cost:
        """Make `name` the variant of all requests that begin from now on, and free the old one.

        Args:
            name: Of the variant.
            beside: Load it beside the old one. If not, requests wait while the old one is
                drained and freed and the new one loaded.

        Returns:
            What it took; returns when the old one has been freed.

        Raises:
            FedsysError: The variant cannot be read; the old one answers on.
        """
        with self._one_at_a_time:
            if name == self._name:
                return Cost(name, name, 0.0, 0.0)
            return self._beside(name) if beside else self._instead(name)

    def _beside(self, name: str) -> Cost:
        before, start = self._name, time.perf_counter()
        module = self._prepare(name)
        fresh = Active(name, module)
        ready = time.perf_counter()
        old = self._pointer.put(fresh)
        swapped = time.perf_counter()
        leaving, self._module, self._name = self._module, module, name
        drained = old is None or old.drain(DRAIN_S)
        empty = time.perf_counter()
        del old
        if drained:
            _free(leaving)
        end = time.perf_counter()
        return Cost(
            before, name, (ready - start) * 1e3, (swapped - ready) * 1e3,
            (empty - swapped) * 1e3, (end - empty) * 1e3, drained,
        )  # fmt: skip

    def _instead(self, name: str) -> Cost:
        before, start = self._name, time.perf_counter()
        old = self._pointer.take()
        drained = old is None or old.drain(DRAIN_S)
        empty = time.perf_counter()
        if not drained and old is not None:  # what is stuck in it may end; others must not wait
            self._pointer.put(Active(before, self._module))
            raise RuntimeFailure(f"requests are stuck in {before}: it cannot be replaced")
        del old
        _free(self._module)
        freed = time.perf_counter()
        try:
            self._module, self._name = self._prepare(name), name
        except BaseException:
            self._module = self._prepare(before)
            raise
        finally:
            self._pointer.put(Active(self._name, self._module))
        end = time.perf_counter()
        return Cost(
            before, name, (end - freed) * 1e3, (end - start) * 1e3,
            (empty - start) * 1e3, (freed - empty) * 1e3,
        )  # fmt: skip

    def _prepare(self, name: str) -> nn.Module:
        module = self._load(name).eval()
        with torch.inference_mode():
            for images in self._warm:
                module(images)
        return module

    def close(self) -> None:
        """Let nobody in any more, wait for those inside, and free the variant."""
        with self._one_at_a_time:
            old = self._pointer.close()
            if old is not None and old.drain(DRAIN_S):
                _free(self._module)


def _free(module: nn.Module) -> None:
    """Give the memory of a module back now.

    Graphs and modules of torch.fx refer to each other, so the weights would wait for a garbage
    collection, and collecting the whole process stops every request meanwhile.
    """
    module.to("meta")
    trim()


@final
class Resident:
    """All variants in memory at all times: the pointer changes and nothing else.

    Args:
        variants: What computes each, by name.
        first: Name of the one that answers first.

    Raises:
        ConfigError: There is no such variant.
    """

    def __init__(self, variants: Mapping[str, Run], first: str) -> None:
        self._variants, self._pointer = dict(variants), _Pointer()
        self._name = first
        self._pointer.put(Active(first, self._find(first)))

    @property
    def current(self) -> str:
        """Name of the variant that requests get now."""
        return self._name

    def lease(self) -> AbstractContextManager[Active]:
        """Give a request its variant, from its beginning to its end.

        Raises:
            RuntimeFailure: The switcher has been closed.
        """
        return self._pointer.lease()

    def switch(self, name: str, *, beside: bool = True) -> Cost:
        """Make `name` the variant of all requests that begin from now on.

        Raises:
            ConfigError: There is no such variant.
        """
        before, start = self._name, time.perf_counter()
        self._pointer.put(Active(name, self._find(name)))
        self._name = name
        return Cost(before, name, 0.0, (time.perf_counter() - start) * 1e3)

    def _find(self, name: str) -> Run:
        if name not in self._variants:
            rule = f"must be one of {', '.join(self._variants)}"
            raise ConfigError.of("variant", name, rule)
        return self._variants[name]

    def close(self) -> None:
        """Let nobody in any more, wait for those inside, and forget the variants."""
        old = self._pointer.close()
        if old is not None:
            old.drain(DRAIN_S)
        self._variants.clear()
        trim()
