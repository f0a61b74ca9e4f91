"""Time without an answer of each technique, as the sum of parts that were measured.

An exit or a skip whose pipeline stands ready is a change of route; anything else has first to be
sent, built, warmed up and connected (CONTINUER, Abdul Majeed et al., IEEE EDGE 2022; the parts are
those of NEUKONFIG, Abdul Majeed et al., IC2E 2021, with detection before them). What building takes
grows with what is built: it is fitted on the pipelines that were built so far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from fedsys.serving.recovery.regression import NOTHING, Estimator, HeldOut

_KIND = "pipeline"
_KEPT, _EVERY = 64, 4  # pipelines that are remembered, and from one fit to the next
_BUILD_S, _SWITCH_S, _DECIDE_S = 0.5, 0.002, 0.0003  # before each was measured
_LEARN = 0.3
_GUESSES = 256  # that are kept


@dataclass(frozen=True)
class BuildSample:
    """A pipeline that was built.

    Attributes:
        units: Units in it.
        bytes_sent: Weights that hosts did not have.
        seconds: From the first message to the answer of the last host.
    """

    units: int
    bytes_sent: int
    seconds: float


@dataclass(frozen=True)
class DowntimeParts:
    """What passes between the last answer by a lost host and the first one without it, in seconds.

    Attributes:
        detect_s: Until the host is taken for lost.
        decide_s: Until a technique is chosen.
        build_s: Until its pipeline answers; 0 if it stands ready.
        switch_s: Until requests are sent into it.
    """

    detect_s: float
    decide_s: float
    build_s: float
    switch_s: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.detect_s + self.decide_s + self.build_s + self.switch_s


class BuildTimes:
    """Estimates what building takes.

    Args:
        samples: At least one.

    Attributes:
        errors: On held-out pipelines.
    """

    def __init__(self, samples: Sequence[BuildSample]) -> None:
        features = np.array([[each.bytes_sent, each.units] for each in samples], dtype=float)
        values = np.array([each.seconds for each in samples])
        self._estimator = Estimator([_KIND] * len(samples), features, values)
        self.errors: HeldOut = self._estimator.errors

    def seconds(self, units: int, bytes_sent: int) -> float:
        """Return what a pipeline of so many units takes to which so many bytes are sent."""
        return self._estimator(_KIND, np.array([bytes_sent, units], dtype=float))


@final
class Downtimes:
    """What passes without an answer by each technique, from what changes took so far.

    Attributes:
        detect_s: Until the last lost host was taken for lost; 0 where its link ended.
    """

    def __init__(self) -> None:
        self.detect_s, self._decide_s, self._switch_s = 0.0, _DECIDE_S, _SWITCH_S
        self._samples: deque[BuildSample] = deque(maxlen=_KEPT)
        self._known: dict[str, float] = {}
        self._times: BuildTimes | None = None
        self._guesses: dict[tuple[int, int], float] = {}  # by units and bytes
        self._count = 0

    @property
    def errors(self) -> HeldOut:
        """On held-out pipelines."""
        return self._times.errors if self._times is not None else NOTHING

    def built(self, label: str, sample: BuildSample) -> None:
        """Take note of a pipeline that was built; the same one will take as long."""
        self._samples.append(sample)
        before = self._known.get(label, sample.seconds)
        self._known[label] = before + _LEARN * (sample.seconds - before)
        if self._count % _EVERY == 0 or self._count < _EVERY:
            self._times = times = BuildTimes(tuple(self._samples))
            # here, where nobody waits: a regression takes longer than all else of a decision
            self._guesses = {key: times.seconds(*key) for key in tuple(self._guesses)}
        self._count += 1

    def decided(self, seconds: float) -> None:
        """Take note of a decision."""
        self._decide_s += _LEARN * (seconds - self._decide_s)

    def switched(self, seconds: float) -> None:
        """Take note of requests that were sent into a pipeline."""
        self._switch_s += _LEARN * (seconds - self._switch_s)

    def build_s(self, label: str, units: int, bytes_sent: int) -> float:
        """Return what building a pipeline takes: as it took, or as others of its size did."""
        if label in self._known:
            return self._known[label]
        times, guesses, key = self._times, self._guesses, (units, bytes_sent)
        if key not in guesses:
            guess = _BUILD_S if times is None else times.seconds(units, bytes_sent)
            if len(guesses) > _GUESSES:
                guesses.clear()
            guesses[key] = guess
        return guesses.get(key, _BUILD_S)

    def parts(self, build_s: float) -> DowntimeParts:
        """Return the time without an answer, given what building takes; 0: it stands ready."""
        return DowntimeParts(self.detect_s, self._decide_s, build_s, self._switch_s)
