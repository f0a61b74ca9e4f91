"""What takes time beside requests: building pipelines, changing the pointer, letting hosts back in.

One thread does it, in the order in which it is told; what it is told anew replaces what it has not
begun. Whoever tells never waits, so a host that is lost while a pipeline is built on it is dealt
with at once, and the building fails. Nor does it wait for requests that are in a pipeline which is
left: they may wait for what is to be built next.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from fedsys.errors import FedsysError, first_line
from fedsys.serving.switch.switcher import Cost, Switcher

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltPipeline:
    """What became of an order.

    Attributes:
        label: Of the pipeline.
        took_s: Of building it; 0.0 if it stood.
        cost: Of making it the one that answers; None if that was not asked for.
        error: Why it could not be; empty if it could.
    """

    label: str
    took_s: float = 0.0
    cost: Cost | None = None
    error: str = ""


@final
class PipelineBuilder:
    """Carries out orders in a thread of its own until it is closed.

    Args:
        switcher: Holds the pipelines.
        done: Called with what became of each order.
        stood: Called with the label and the seconds of each pipeline that was built in advance.
        sound: Whether what stands of a label can answer; else it is taken down, and built anew.
    """

    def __init__(
        self,
        switcher: Switcher,
        done: Callable[[BuiltPipeline], None],
        stood: Callable[[str, float], None] = lambda label, seconds: None,
        sound: Callable[[str], bool] = lambda label: True,
    ) -> None:
        self._switcher, self._done, self._stood, self._sound = switcher, done, stood, sound
        self._kept: tuple[str, ...] = ()
        self._urgent: list[Callable[[], None]] = []
        self._later: Callable[[], None] | None = None
        self._change = threading.Condition()
        self._closed, self._spares_due, self._working = False, False, False
        self._thread = threading.Thread(target=self._work, name="pipelines", daemon=True)
        self._thread.start()

    def ready(self, label: str) -> bool:
        """Whether a pipeline stands and stays."""
        return label in self.standing

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        with self._change:  # else what was taken up a moment ago is neither waiting nor begun
            return self._working or self._anything()

    @property
    def standing(self) -> frozenset[str]:
        """Labels of the pipelines that stand and stay."""
        with self._change:
            kept = self._kept
        return frozenset({*kept}.intersection(self._switcher.spare)) | {self._switcher.current}

    def keep(self, labels: Sequence[str]) -> None:
        """Have these pipelines ready beside the one that answers, and no others, one by one."""
        with self._change:
            self._kept, self._spares_due = tuple(labels), True
            self._change.notify_all()

    def build(self, label: str) -> None:
        """Have a pipeline ready, before all others, and say so."""
        with self._change:
            if label not in self._kept:
                self._kept = (label, *self._kept)
            self._urgent.append(lambda: self._build(label))
            self._change.notify_all()

    def switch(self, label: str) -> None:
        """Make a pipeline the one that answers all requests from now on, and say so."""
        with self._change:
            self._urgent.append(lambda: self._switch(label))
            self._change.notify_all()

    def carry_out(self, work: Callable[[], None]) -> None:
        """Do something else that takes time."""
        with self._change:
            self._urgent.append(work)
            self._change.notify_all()

    def carry_out_later(self, work: Callable[[], None]) -> None:
        """Do something when nothing else is to be done, instead of what was to be before."""
        with self._change:
            self._later = work
            self._change.notify_all()

    def close(self) -> None:
        """Begin nothing more, and wait for what was begun."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()

    # ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(self._anything)
                if self._closed:
                    return
                work, self._working = self._next(), True
            try:
                work()
            except Exception:  # nothing that fails here may end what prepares for failures
                _log.exception("what was to be prepared failed")
            self._working = False

    def _anything(self) -> bool:
        return bool(self._urgent or self._later or self._spares_due or self._closed)

    def _next(self) -> Callable[[], None]:
        if self._urgent:
            return self._urgent.pop(0)
        later, self._later = self._later, None
        return self._next_spare if later is None else later

    def _next_spare(self) -> None:
        """Drop what is not wanted any more, and build one pipeline that is."""
        with self._change:
            wanted = self._kept
        there = {*filter(self._sound, self._switcher.spare), self._switcher.current}
        missing = [label for label in wanted if label not in there]
        keep = [label for label in wanted if label in there]
        with self._change:
            self._spares_due = len(missing) > 1 or self._kept != wanted
        began = time.monotonic()
        try:
            self._switcher.keep(keep, drain_s=0.0)
            for label in missing[:1]:
                self._switcher.keep([*keep, label], drain_s=0.0)
                self._stood(label, time.monotonic() - began)
        except FedsysError as error:
            if not missing:
                raise
            _log.info("%s cannot stand ready: %s", missing[0], first_line(error))
            with self._change:
                self._kept = tuple(label for label in self._kept if label != missing[0])

    def _build(self, label: str) -> None:
        began, current = time.monotonic(), self._switcher.current
        stays = [name for name in self._switcher.spare if name in self._kept and self._sound(name)]
        stood = label in stays or (label == current and self._sound(label))
        try:
            self._switcher.keep(stays, drain_s=0.0)
            if not stood and label == current:
                self._switcher.renew(drain_s=0.0)
            self._switcher.keep([*stays, label], drain_s=0.0)
        except FedsysError as error:
            self._done(BuiltPipeline(label, time.monotonic() - began, error=first_line(error)))
            return
        self._done(BuiltPipeline(label, 0.0 if stood else time.monotonic() - began))

    def _switch(self, label: str) -> None:
        try:
            cost = self._switcher.switch(label, drain_s=0.0)
        except FedsysError as error:
            self._done(BuiltPipeline(label, error=first_line(error)))
            return
        self._done(BuiltPipeline(label, cost=cost))
