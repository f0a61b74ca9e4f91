"""Requests that no client sent, into pipelines that stand ready: what they take is then known.

They are sent one by one with a pause, as requests come, not in a row: what is computed a hundred
times in a row finds its weights in the cache. A pipeline is rehearsed when it stands, and again
after a while; that which answers too, so that both kinds of requests can be compared. Nothing is
rehearsed while something is built: that takes processors which requests have later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

from fedsys.errors import FedsysError, first_line
from fedsys.serving.chain import ChainEngine, ChainModule

_FIRST, _REQUESTS = 2, 7  # that do not count, and that do
_PAUSE_S, _LOOK_S, _AGAIN_S = 0.02, 0.25, 120.0

_log = logging.getLogger(__name__)


class Rehearsals:
    """Rehearses what stands, in a thread of its own, until it is closed.

    Args:
        engine: Its pipelines.
        busy: Whether something is built now.
    """

    def __init__(self, engine: ChainEngine, busy: Callable[[], bool] = lambda: False) -> None:
        self._engine, self._busy = engine, busy
        self._when: WeakKeyDictionary[ChainModule, float] = WeakKeyDictionary()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="rehearsals", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether a pipeline stands that has not been rehearsed."""
        return any(self._is_due(module) for module in self._engine.live)

    def _is_due(self, module: ChainModule) -> bool:
        there = {self._engine.switcher.current, *self._engine.switcher.spare}
        again_s = self._when.get(module, -_AGAIN_S) + _AGAIN_S
        due = time.monotonic() > again_s and module.label in there
        return due and not module.pipeline.diverted and self._engine.chain.is_whole(module)

    def _work(self) -> None:
        while not self._end.wait(_LOOK_S):
            for module in self._engine.live:
                if self._is_due(module) and not self._end.is_set() and not self._busy():
                    self._rehearse(module)
                    self._when[module] = time.monotonic()  # also if it could not be

    def _rehearse(self, module: ChainModule) -> None:
        image, found = torch.zeros(1, *self._engine.card.input_shape), []
        try:
            with torch.inference_mode():
                for number in range(_FIRST + _REQUESTS):
                    passed, took_s = module.rehearse(image)
                    if passed.by != module.label or passed.again:
                        return  # it was left meanwhile
                    if number >= _FIRST:
                        found.append((passed, took_s))
                    if self._end.wait(_PAUSE_S):
                        return
        except FedsysError as error:  # it was taken down, or a host is lost
            _log.debug("%s was not rehearsed: %s", module.label, first_line(error))
            return
        self._engine.times.rehearsed(module.label, found)

    def close(self) -> None:
        """Send no more; one under way is answered, or fails with its pipeline."""
        self._end.set()
        self._thread.join(2.0)
