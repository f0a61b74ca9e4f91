"""Time without an answer of each technique, as the sum of parts that were measured.

An exit or a skip whose pipeline stands ready is a change of route; anything else has first to be
sent, built, warmed up and connected (CONTINUER, Abdul Majeed et al., IEEE EDGE 2022; the parts are
those of NEUKONFIG, Abdul Majeed et al., IC2E 2021, with detection before them). What building takes
grows with what is built: it is fitted on the pipelines that were built so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsys.serving.recovery.regression import Estimator, HeldOut

_KIND = "pipeline"


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
