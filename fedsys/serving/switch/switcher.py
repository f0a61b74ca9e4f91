"""Changing the variant that answers, without a request that is lost, mixed or kept waiting.

DNNShifter (Eccles et al., FGCS 152, 2024) keeps one small variant in memory and loads another when
conditions change; its public code has no switcher. Here::

    request ──▶ lease() ──▶ run ──▶ leave            the pointer is one attribute: a request has
                  │                                  the old variant or the new one, never both
                  ▼
    switch:   load and warm up ─▶ swap the pointer ─▶ drain the old one ─▶ free it
              beside the old one                      requests in it end

`Loaded` does that, and where there is no room for two, stop-load-start: requests wait meanwhile.
What it is told to keep beside stays in memory and answers without being loaded. `Resident` has all
variants in memory, for comparison: the pointer changes and nothing else. A slimmable network
(`fedsys.serving.switch.slimmable`) is a `Resident` whose variants share weights.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.pruning.memory import dismantle, trim
from fedsys.serving.switch.pointer import Active, Lease, Pointer, Run, without_gradients

Load = Callable[[str], Run]
"""What computes a variant, by its name, read anew at each call; a module in evaluation mode."""

Free = Callable[[Any], None]
"""Gives back what took memory that nobody runs any more."""

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
        drained: Whether all requests had left it in time.
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

    @property
    def spare(self) -> tuple[str, ...]:
        """Names of the others that are in memory and could answer at once."""

    @property
    def ready(self) -> bool:
        """Whether requests are answered; else they wait, also until a switch has succeeded."""

    def lease(self, name: str | None = None) -> AbstractContextManager[Active]:
        """Give a request a variant, from its beginning to its end: `name` if it is in memory."""

    def keep(self, names: Sequence[str], *, drain_s: float = DRAIN_S) -> None:
        """Have these in memory beside the one that answers, and no others."""

    def switch(self, name: str, *, beside: bool = True, drain_s: float = DRAIN_S) -> Cost:
        """Make `name` the variant of all requests that begin from now on."""

    def renew(self, *, drain_s: float = DRAIN_S) -> Cost:
        """Have the variant that answers loaded anew: what stands of it is of no use any more."""

    def close(self) -> None:
        """Let nobody in any more, and free everything."""


@dataclass(eq=False, slots=True)
class _Held:
    """A variant in memory.

    `loading_ms` is what no switch has told yet. `left` are its earlier turns as the current one,
    in which requests may still be.
    """

    module: Run
    active: Active
    loading_ms: float
    left: tuple[Active, ...] = ()

    def again(self) -> _Held:
        """Return it for requests that begin from now on; those in work stay counted."""
        left = tuple(active for active in (*self.left, self.active) if not active.drain(0.0))
        return _Held(self.module, Active(self.active.name, self.module), self.loading_ms, left)

    def drain(self, seconds: float = DRAIN_S) -> bool:
        """Let nobody in any more; return whether all have left in time."""
        self.active.retire()
        return all([active.drain(seconds) for active in (*self.left, self.active)])


def free_memory_of(module: Any) -> None:
    """Give the memory of a module back now.

    Graphs and modules of torch.fx refer to each other, so the weights would wait for a garbage
    collection, and collecting the whole process stops every request meanwhile.
    """
    dismantle(module)
    trim()


@final
class Loaded:
    """One variant in memory, and those that are kept beside it; another is loaded when wanted.

    Args:
        load: Reads a variant.
        first: Name of the one that answers first; it is loaded and warmed up here.
        warm: Inputs that each variant computes before it answers, one for each batch size that
            matters. PyTorch chooses and caches kernels at the first of each.
        free: Gives back what a variant took.

    Raises:
        ModelError: The first variant cannot be read.
    """

    def __init__(
        self,
        load: Load,
        first: str,
        warm: tuple[Any, ...] = (),
        free: Free = free_memory_of,
    ) -> None:
        self._load, self._warm, self._free = load, warm, free
        self._pointer = Pointer()
        self._one_at_a_time = threading.Lock()
        self._one_keeper = threading.Lock()
        self._wanted: frozenset[str] = frozenset()
        self._spare: Mapping[str, _Held] = {}  # never changed in place: read without a lock
        self._leaving: set[threading.Thread] = set()
        self._name = first
        self._held: _Held | None = self._prepare(first)
        self._pointer.put(self._held.active)

    @property
    def current(self) -> str:
        """Name of the variant that requests get now; of the last one while none is there."""
        return self._name

    @property
    def ready(self) -> bool:
        """Whether requests are answered; else they wait."""
        return self._pointer.active is not None

    @property
    def spare(self) -> tuple[str, ...]:
        """Names of the others that are in memory and could answer at once."""
        return tuple(self._spare)

    def lease(self, name: str | None = None) -> AbstractContextManager[Active]:
        """Give a request its variant, from its beginning to its end.

        Args:
            name: Of a variant in memory; the current one if it is not there (any more).

        Raises:
            RuntimeFailure: The switcher has been closed.
        """
        held = self._spare.get(name) if name is not None else None
        return Lease(self._pointer, held.active if held else None)

    def keep(self, names: Sequence[str], *, drain_s: float = DRAIN_S) -> None:
        """Have these in memory beside the one that answers, and no others.

        The one that answers stays when it is left if it is among them. Requests and switches go on
        meanwhile.

        Args:
            names: Of the variants.
            drain_s: How long requests in one that goes are waited for, in seconds; if they need
                longer, it is freed beside, when they have left.

        Raises:
            FedsysError: A variant cannot be read; those before it are kept.
        """
        with self._one_keeper:
            self._wanted = frozenset(names)
            with self._one_at_a_time:
                gone = [self._take(name) for name in self._spare if name not in self._wanted]
            for held in gone:
                if held.drain(drain_s):
                    self._free(held.module)
                else:
                    self._free_beside(held, drain_s)
            del gone
            for name in names:
                if name not in self._spare and name != self._name:
                    self._add(self._prepare(name))

    def _free_beside(self, held: _Held, waited_s: float) -> None:
        """Free a variant when requests have left it, unless that took `DRAIN_S` already."""

        def leave() -> None:
            if held.drain():
                self._free(held.module)
            self._leaving.discard(thread)

        thread = threading.Thread(target=leave, name=f"leaving {held.active.name}", daemon=True)
        if waited_s < DRAIN_S:
            self._leaving.add(thread)
            thread.start()

    def _add(self, held: _Held) -> None:
        name = held.active.name
        with self._one_at_a_time:
            there = self._held is not None and name == self._name
            if there or name in self._spare or self._pointer.closed:
                self._free(held.module)
            else:
                self._spare = {**self._spare, name: held}

    def _take(self, name: str) -> _Held:
        held = self._spare[name]
        self._spare = {key: value for key, value in self._spare.items() if key != name}
        return held

    def switch(self, name: str, *, beside: bool = True, drain_s: float = DRAIN_S) -> Cost:
        """Make `name` the variant of all requests that begin from now on, and free the old one.

        Args:
            name: Of the variant.
            beside: Load it beside the old one. If not, requests wait while the old one is
                drained and freed and the new one loaded. One that is in memory is not loaded.
            drain_s: As for `keep`, if it is left beside.

        Returns:
            What it took; returns when the old one has been freed, unless it is kept.

        Raises:
            FedsysError: The variant cannot be read. The old one answers on; or requests wait for
                the next switch that succeeds, if it had been freed and cannot be read again.
        """
        fresh = None
        if beside and name not in (self._name, *self._spare):
            fresh = self._prepare(name)  # others may switch meanwhile, to what is in memory
        with self._one_at_a_time:
            if self._pointer.closed:
                unwanted, left, cost = fresh, None, Cost(self._name, self._name, 0.0, 0.0)
            elif self._held is None or name == self._name or not (beside or name in self._spare):
                unwanted, left, cost = fresh, None, self._there_or_instead(name)
            else:
                unwanted, left, cost = self._swap(self._held, name, fresh)
        if unwanted is not None:  # it came into memory meanwhile
            self._free(unwanted.module)
        return cost if left is None else self._leave(left, cost, drain_s)

    def renew(self, *, drain_s: float = DRAIN_S) -> Cost:
        """Load the variant that answers anew, let that answer, and free what was there of it.

        Nothing changes if another one has come to answer meanwhile.

        Args:
            drain_s: As for `switch`.

        Raises:
            FedsysError: It cannot be read. The pointer stays where it is.
        """
        name = self._name
        fresh = self._prepare(name)
        with self._one_at_a_time:
            other = self._pointer.closed or name != self._name
            unwanted, left = (fresh, None) if other else (None, self._held)
            cost = Cost(name, self._name, 0.0 if other else fresh.loading_ms, 0.0)
            if not other:
                self._answer_by(fresh)
        if unwanted is not None:
            self._free(unwanted.module)
        return cost if left is None else self._leave(left, cost, drain_s)

    def _there_or_instead(self, name: str) -> Cost:
        if self._held is None:
            return self._again(name)
        if name == self._name:
            return Cost(name, name, 0.0, 0.0)
        return self._instead(self._held, name)

    def _answer_by(self, held: _Held) -> None:
        self._pointer.put(held.active)
        self._name, self._held = held.active.name, held
        held.loading_ms = 0.0  # the switch tells it

    def _swap(
        self, left: _Held, name: str, fresh: _Held | None
    ) -> tuple[_Held | None, _Held | None, Cost]:
        """Change the pointer; return what was loaded in vain, what was left, and the cost."""
        unwanted = None
        if name in self._spare:
            fresh, unwanted = self._take(name), fresh
        elif fresh is None:  # it was in memory a moment ago
            fresh = self._prepare(name)
        loading_ms, ready = fresh.loading_ms, time.perf_counter()
        self._answer_by(fresh)
        cost = Cost(left.active.name, name, loading_ms, (time.perf_counter() - ready) * 1e3)
        if cost.before not in self._wanted:
            return unwanted, left, cost
        self._spare = {**self._spare, cost.before: left.again()}
        return unwanted, None, cost

    def _leave(self, left: _Held, cost: Cost, drain_s: float) -> Cost:
        """Free what was left when requests have left it; others may switch meanwhile."""
        swapped = time.perf_counter()
        drained = left.drain(drain_s)
        empty = time.perf_counter()
        if drained:
            self._free(left.module)
        else:
            self._free_beside(left, drain_s)
        drain_ms, free_ms = (empty - swapped) * 1e3, (time.perf_counter() - empty) * 1e3
        return replace(cost, drain_ms=drain_ms, free_ms=free_ms, drained=drained)

    def _instead(self, left: _Held, name: str) -> Cost:
        before, start = self._name, time.perf_counter()
        self._pointer.take()
        drained = left.drain()
        empty = time.perf_counter()
        if not drained:  # what is stuck in it may end; others must not wait
            self._answer_by(left.again())
            raise RuntimeFailure(f"requests are stuck in {before}: it cannot be replaced")
        self._held = None
        self._free(left.module)
        freed = time.perf_counter()
        try:
            self._answer_by(self._prepare(name))
        except BaseException:
            self._answer_by(self._prepare(before))
            raise
        end = time.perf_counter()
        return Cost(
            before, name, (end - freed) * 1e3, (end - start) * 1e3,
            (empty - start) * 1e3, (freed - empty) * 1e3,
        )  # fmt: skip

    def _again(self, name: str) -> Cost:
        """Answer after a switch that left nothing in memory."""
        before, start = self._name, time.perf_counter()
        self._answer_by(self._take(name) if name in self._spare else self._prepare(name))
        took = (time.perf_counter() - start) * 1e3
        return Cost(before, name, took, took)

    def _prepare(self, name: str) -> _Held:
        start = time.perf_counter()
        module = self._load(name)
        with without_gradients():
            for images in self._warm:
                module(images)
        return _Held(module, Active(name, module), (time.perf_counter() - start) * 1e3)

    def close(self) -> None:
        """Let nobody in any more, wait for those inside, and free the variants."""
        with self._one_at_a_time:
            self._pointer.close()
            for held in (self._held, *self._spare.values()):
                if held is not None and held.drain():
                    self._free(held.module)
            self._spare = {}
        for thread in tuple(self._leaving):
            thread.join()


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
        self._variants, self._pointer = dict(variants), Pointer()
        self._name = first
        self._pointer.put(Active(first, self._find(first)))
        self._spare: Mapping[str, Active] = {
            name: Active(name, run) for name, run in variants.items() if name != first
        }

    @property
    def current(self) -> str:
        """Name of the variant that requests get now."""
        return self._name

    @property
    def spare(self) -> tuple[str, ...]:
        """Names of the others."""
        return tuple(self._spare)

    @property
    def ready(self) -> bool:
        """True, until it is closed."""
        return self._pointer.active is not None

    def lease(self, name: str | None = None) -> AbstractContextManager[Active]:
        """Give a request the variant `name`, or the current one, from its beginning to its end.

        Raises:
            RuntimeFailure: The switcher has been closed.
        """
        return Lease(self._pointer, self._spare.get(name) if name is not None else None)

    def keep(self, names: Sequence[str], *, drain_s: float = DRAIN_S) -> None:
        """Do nothing: all are in memory."""

    def switch(self, name: str, *, beside: bool = True, drain_s: float = DRAIN_S) -> Cost:
        """Make `name` the variant of all requests that begin from now on.

        Raises:
            ConfigError: There is no such variant.
        """
        before, start = self._name, time.perf_counter()
        if name == before:
            return Cost(name, name, 0.0, 0.0)
        run = self._find(name)
        left = Active(before, self._find(before))
        others = {key: value for key, value in self._spare.items() if key != name}
        self._pointer.put(Active(name, run))
        self._name, self._spare = name, {**others, before: left}
        return Cost(before, name, 0.0, (time.perf_counter() - start) * 1e3)

    def renew(self, *, drain_s: float = DRAIN_S) -> Cost:
        """Do nothing: all are in memory, and stay of use."""
        return Cost(self._name, self._name, 0.0, 0.0)

    def _find(self, name: str) -> Run:
        if name not in self._variants:
            rule = f"must be one of {', '.join(self._variants)}"
            raise ConfigError.of("variant", name, rule)
        return self._variants[name]

    def close(self) -> None:
        """Let nobody in any more, wait for those inside, and forget the variants."""
        old = self._pointer.close()
        for active in (old, *self._spare.values()):
            if active is not None:
                active.retire()
                active.drain(DRAIN_S)
        self._spare = {}
        self._variants.clear()
        trim()
