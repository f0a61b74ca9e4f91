"""What measurements under many conditions say: does the best cut change, and what is that worth?

The questions of McNamee et al. (CLOUD 2021): which cut is best under each condition, how sensitive
requests are to each factor and to factors together, and what is gained by changing the cut, against
the cut that is best at first, the best one that stays, and an oracle.

The paper takes the best of noisy values and scores it by the same values, which makes every oracle
too good. Here choices are made on one half of the repeats and scored on the other, both ways round
(`gains`); where there is a single repeat, as in the published files, that is said.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsys.errors import DataError

Array = NDArray[np.float64]
Levels = tuple[int, ...]

FACTORS = ("network", "cloud_cpu", "edge_memory", "cloud_memory", "edge_cpu")
"""Of a condition, in the order of the digits in the names of the published files."""

_NAME = re.compile(r"weights_(\d{5})\.txt$")
_DRAWS = 500  # of the bootstrap


@dataclass(frozen=True)
class Sample:
    """One request.

    Attributes:
        condition: Level of each factor, 0 for the mildest.
        cut: Where the model was cut.
        repeat: Number of the turn, from 0.
        total_s: Seconds of the request.
        edge_s: Of computing at the near end.
        cloud_s: Of computing at the far end.
    """

    condition: Levels
    cut: int
    repeat: int
    total_s: float
    edge_s: float = math.nan
    cloud_s: float = math.nan


@dataclass(frozen=True, eq=False)
class Study:
    """Measurements as a table.

    Attributes:
        conditions: Levels of the factors, C of them, ascending.
        cuts: K of them.
        seconds: ``(C, K, R)``; NaN where there is none: a cut that is missing under a condition is
            not chosen there, and stays under none.
    """

    conditions: tuple[Levels, ...]
    cuts: tuple[int, ...]
    seconds: Array

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Study:
        """Return the table of samples.

        Raises:
            DataError: There is no sample, or no cut that was measured under all conditions.
        """
        found = list(samples)
        cuts = sorted({one.cut for one in found})
        repeats = 1 + max((one.repeat for one in found), default=0)
        by: dict[Levels, Array] = {}
        for one in found:
            place = by.setdefault(one.condition, np.full((len(cuts), repeats), np.nan))
            place[cuts.index(one.cut), one.repeat] = one.total_s
        study = cls(tuple(sorted(by)), tuple(cuts), np.array([by[key] for key in sorted(by)]))
        if not found or not study.complete.any():
            raise DataError("no cut was measured under all conditions")
        return study

    @property
    def complete(self) -> NDArray[np.bool_]:
        """Whether each cut was measured under all conditions, ``(K,)``."""
        return np.asarray(~np.isnan(self.seconds).all(axis=2).any(axis=0))

    @property
    def held_out(self) -> bool:
        """Whether there are two repeats of everything, so that choices are scored on others."""
        there = (~np.isnan(self.seconds)).sum(axis=2)
        return bool(there[there > 0].min() >= 2)

    def middle(self) -> Array:
        """Return the median seconds of each condition and cut, ``(C, K)``; infinite for none."""
        return _medians(self.seconds)

    def halves(self) -> tuple[Array, Array]:
        """Return the medians of every other repeat, twice ``(C, K)``; of all, twice, if one."""
        if not self.held_out:
            return self.middle(), self.middle()
        order = np.argsort(np.isnan(self.seconds), axis=2, kind="stable")  # those that are there
        values = np.take_along_axis(self.seconds, order, axis=2)
        return _medians(values[:, :, 0::2]), _medians(values[:, :, 1::2])


def _medians(seconds: Array) -> Array:
    none: NDArray[np.bool_] = np.asarray(np.isnan(seconds).all(axis=2))
    values = np.where(none[:, :, None], np.inf, seconds)
    return np.asarray(np.nanmedian(values, axis=2))


def read_published(folder: Path) -> Iterator[Sample]:
    """Yield the measurements of one model in the published files of the paper.

    A file ``weights_DDDDD.txt`` holds a condition, of which each digit is the level of one of
    `FACTORS`, and a row for each cut: seconds in all, at the edge, at the cloud, and the cut.

    Raises:
        DataError: There is no such file, or a row is not of that form.
    """
    files = sorted(file for file in folder.iterdir() if _NAME.search(file.name))
    if not files:
        raise DataError(f"{folder}: holds no files weights_DDDDD.txt")
    for file in files:
        found = _NAME.search(file.name)
        assert found is not None
        condition = tuple(map(int, found[1]))
        seen: dict[int, int] = defaultdict(int)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            total, edge, cloud, cut = _row(file, number, line)
            yield Sample(condition, cut, seen[cut], total, edge, cloud)
            seen[cut] += 1


def _row(file: Path, number: int, line: str) -> tuple[float, float, float, int]:
    words = line.split()
    try:
        total, edge, cloud = map(float, words[:3])
        (cut,) = map(int, words[3:])
    except ValueError as error:
        rule = "must be seconds in all, at the edge and at the cloud, and the cut"
        raise DataError(f"{file}:{number}: {line!r}: {rule}") from error
    return total, edge, cloud, cut


# --------------------------------------------------------------------------------------------------
# Which cut


def best_cuts(study: Study) -> list[dict[str, Any]]:
    """Return for each condition the best cut, its seconds with quartiles, and the next best."""
    middle, rows = study.middle(), []
    for c, condition in enumerate(study.conditions):
        order = np.argsort(middle[c], kind="stable")
        best = int(order[0])
        low, high = np.nanquantile(study.seconds[c, best], [0.25, 0.75])
        row: dict[str, Any] = {
            "condition": "".join(map(str, condition)),
            "best_cut": study.cuts[best],
            "seconds": float(middle[c, best]),
            "q1": float(low),
            "q3": float(high),
        }
        if len(order) > 1:
            following = int(order[1])
            row |= {"next_cut": study.cuts[following], "next_s": float(middle[c, following])}
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# How sensitive


def sensitivity(study: Study) -> list[dict[str, Any]]:
    """Return for each factor what one level more of it alone does to the cut that was the best.

    ``slowdown`` is the median over pairs of conditions that differ in one level of this factor;
    the cut is chosen on one half of the repeats of the milder condition, and timed on the other.
    ``moves`` is the share of pairs in which another cut is the best then.
    """
    place = {condition: c for c, condition in enumerate(study.conditions)}
    choose, score = study.halves()
    rows = []
    for f, name in enumerate(FACTORS):
        slower, moved = [], []
        for condition, c in place.items():
            worse = place.get((*condition[:f], condition[f] + 1, *condition[f + 1 :]))
            if worse is None:
                continue
            best = int(np.argmin(choose[c]))
            if math.isfinite(score[worse, best]):
                slower.append(score[worse, best] / score[c, best] - 1)
            moved.append(best != int(np.argmin(choose[worse])))
        if slower:
            low, mid, high = np.quantile(slower, [0.25, 0.5, 0.75])
            rows.append({"factor": name, "pairs": len(moved), "slowdown": float(mid),
                         "slowdown_q1": float(low), "slowdown_q3": float(high),
                         "moves": float(np.mean(moved))})  # fmt: skip
    return rows


def effects(study: Study) -> list[dict[str, Any]]:
    """Return what share of the variance each factor, and each two of them together, make.

    An analysis of variance of the logarithm of the median seconds, within each cut, of a full
    factorial: the squares of main effects and of two-way interactions as shares of all between
    conditions, means over the cuts that were measured under all; ``rest`` is what three and more
    factors, and noise, make.

    Returns:
        An empty list where the conditions are no full factorial.
    """
    levels = [sorted({c[f] for c in study.conditions}) for f in range(len(FACTORS))]
    shape = tuple(map(len, levels))
    if math.prod(shape) != len(study.conditions):
        return []
    values = np.log(study.middle()[:, study.complete]).reshape(*shape, -1)
    values = values - values.mean(axis=tuple(range(len(FACTORS))), keepdims=True)
    whole = (values**2).sum(axis=tuple(range(len(FACTORS))))
    used = [f for f, size in enumerate(shape) if size > 1]
    main = {f: _mean_over(values, {f}) for f in used}
    shares = {FACTORS[f]: _share(values, main[f], whole) for f in used}
    for a, b in combinations(used, 2):
        both = _mean_over(values, {a, b}) - main[a] - main[b]
        shares[f"{FACTORS[a]} x {FACTORS[b]}"] = _share(values, both, whole)
    shares["rest"] = max(0.0, 1 - sum(shares.values()))
    return [{"effect": name, "share": share} for name, share in shares.items()]


def _mean_over(values: Array, kept: set[int]) -> Array:
    axes = tuple(f for f in range(len(FACTORS)) if f not in kept)
    return np.asarray(values.mean(axis=axes, keepdims=True))


def _share(values: Array, effect: Array, whole: Array) -> float:
    squares = (np.broadcast_to(effect, values.shape) ** 2).sum(axis=tuple(range(len(FACTORS))))
    return float(np.mean(np.divide(squares, whole, out=np.zeros_like(whole), where=whole > 0)))


# --------------------------------------------------------------------------------------------------
# What it is worth


def gains(study: Study, seed: int = 0) -> dict[str, Any]:
    """Return what choosing cuts is worth: chosen on one half of the repeats, scored on the other.

    Args:
        study: The measurements.
        seed: Of the bootstrap over conditions that gives the interval.

    Returns:
        Mean and p95 seconds over the conditions with the cut that is best at first (``initial``),
        the best one that stays (``static``), that of each condition (``oracle``); ``gain_…``, the
        share of the mean that the oracle saves against the first two, with an interval of 95 %;
        ``gain_by_…``, what a policy saves against ``static`` that sees one factor alone; and
        whether scores are of other repeats (``held_out``).
    """
    one, other = study.halves()
    ways = [_scored(study, one, other)]
    if study.held_out:
        ways.append(_scored(study, other, one))
    took = {name: np.concatenate([way[name] for way in ways]) for name in ways[0]}
    result: dict[str, Any] = {"held_out": study.held_out, "conditions": len(study.conditions)}
    for name in ("initial", "static", "oracle"):
        result[f"{name}_s"] = float(took[name].mean())
        result[f"{name}_p95_s"] = float(np.quantile(took[name], 0.95))
    for name in ("initial", "static"):
        result |= _gain(took, name, seed)
    for factor in FACTORS:
        result[f"gain_by_{factor}"] = float(1 - took[factor].mean() / took["static"].mean())
    return result


def _gain(took: Mapping[str, Array], against: str, seed: int) -> dict[str, float]:
    count, draw = len(took["oracle"]), np.random.default_rng(seed)
    chosen = draw.integers(0, count, (_DRAWS, count))
    drawn = 1 - took["oracle"][chosen].mean(axis=1) / took[against][chosen].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    gain = float(1 - took["oracle"].mean() / took[against].mean())
    name = f"gain_over_{against}"
    return {name: gain, f"{name}_low": float(low), f"{name}_high": float(high)}


def _scored(study: Study, choose: Array, score: Array) -> dict[str, Array]:
    """Return the seconds of each condition under each policy, by its name."""
    every = np.arange(len(study.conditions))
    stays = np.where(study.complete, choose, np.inf)
    took = {
        "initial": score[:, int(np.argmin(stays[0]))],
        "static": score[:, int(np.argmin(stays.mean(axis=0)))],
        "oracle": score[every, np.argmin(choose, axis=1)],
    }
    for f, name in enumerate(FACTORS):
        levels = np.array([condition[f] for condition in study.conditions])
        known = set(levels.tolist())
        cut = {one: int(np.argmin(stays[levels == one].mean(axis=0))) for one in known}
        took[name] = score[every, [cut[level] for level in levels.tolist()]]
    return took


def tables(study: Study) -> dict[str, Any]:
    """Return all of it, as plain values."""
    return {
        "best": best_cuts(study),
        "sensitivity": sensitivity(study),
        "effects": effects(study),
        "gains": gains(study),
    }


def distinct_best(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return how many cuts are the best one somewhere."""
    return len({row["best_cut"] for row in rows})
