"""Which variant should answer now: a pure function of small records.

The rule is DNNShifter's (Eccles et al., FGCS 152, 2024): the most accurate variant that meets the
objective. The paper leaves the signals and the prediction open; here they are

* capacity and latency from the measured profile of each variant, by batch size;
* how much slower than in its profile the running variant is (`Signals.slowdown`);
* waiting by the arrival rate: the exponential tail of an M/D/1 queue in heavy traffic
  (Kingman, "The single server queue in heavy traffic", 1961), the batch in work, and the queue that
  is there now;
* what small variants in memory take over (`fedsys.serving.switch.relief`): a variant that alone
  could not do the load stays where both together can;
* the transfer of one input over the link, if its rate is known.

A better variant must meet the objective even if all signals are worse by a margin m, and none is
entered before a dwell time has passed. Predictions grow with every signal, so a variant that was
entered with a margin stays while the signals stay within 1 + m of those at its entry; and while
they are within a factor of sqrt(1 + m) of constant values, no variant that was too slow is entered
again: noise makes no flapping (`tests/serving/test_switch_policy.py` holds both).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from fedsys.errors import ModelError
from fedsys.pruning.portfolio import Variant

TAIL = 0.05
"""Share of requests that may miss the latency of the objective."""


@dataclass(frozen=True)
class PassTime:
    """Measured time of one forward pass.

    Attributes:
        batch: Examples in it.
        p50_ms: Median in milliseconds.
        p95_ms: 95th percentile in milliseconds.
    """

    batch: int
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Profile:
    """What is known about one variant.

    Attributes:
        name: Its name in the portfolio.
        accuracy: Share of right answers on the validation part, or NaN if nobody measured it.
        bytes: Of its weights.
        peak_bytes: Largest memory that it takes while it answers, weights included.
        latency: By batch size, ascending; at least one.
    """

    name: str
    accuracy: float
    bytes: int
    peak_bytes: int
    latency: tuple[PassTime, ...]


@dataclass(frozen=True)
class Signals:
    """What was seen of load and machine at one moment.

    Attributes:
        time_s: The moment, on a clock that never goes back.
        arrival_rate: Examples per second that came lately.
        queue: Examples that wait, and do not go by themselves.
        p95_ms: Of the recent answers, from arrival to answer; None if there were none.
        slowdown: Recent time of forward passes over that of the profile; None if there were none.
        free_memory: Bytes that could be taken without hurting anybody; None if unknown.
        cpu_load: Share of the processors that others use, in [0, 1].
        link_mbit_s: Rate at which inputs come in; None if unknown.
    """

    time_s: float
    arrival_rate: float = 0.0
    queue: int = 0
    p95_ms: float | None = None
    slowdown: float | None = None
    free_memory: int | None = None
    cpu_load: float = 0.0
    link_mbit_s: float | None = None


@dataclass(frozen=True)
class Objective:
    """What is asked for, and how steady the choice must be.

    Attributes:
        p95_ms: 95 of 100 requests are to be answered within this time, in milliseconds.
        memory_bytes: The variant that answers may take this much; None for what is free. While one
            is loaded beside another, both take memory; that is bounded by what is free alone.
        margin: A better variant must meet the objective if all signals were worse by this share.
        dwell_s: No better variant is entered earlier after a switch, in seconds.
        down_dwell_s: No smaller one either, in seconds, unless memory is short.
        max_batch: Examples that are put together at most.
        input_bytes: Of one example on the link.
    """

    p95_ms: float
    memory_bytes: int | None = None
    margin: float = 0.1
    dwell_s: float = 5.0
    down_dwell_s: float = 0.5
    max_batch: int = 1
    input_bytes: int = 0


class How(Enum):
    """How a switch is to be done."""

    STAY = "stay"
    HOT = "hot"  # load beside the running one
    COLD = "cold"  # there is no room for two: stop, load, start


@dataclass(frozen=True)
class Predicted:
    """What the policy expects of one variant.

    Attributes:
        p95_ms: From arrival to answer; infinite if the load is above what it can do.
        fits: Whether it keeps within the memory.
    """

    p95_ms: float
    fits: bool

    def meets(self, objective: Objective) -> bool:
        """Return whether the objective is expected to be met."""
        return self.fits and self.p95_ms <= objective.p95_ms


@dataclass(frozen=True)
class Standing:
    """The state of the policy.

    Attributes:
        current: Variant that answers; None before the first decision.
        since_s: When it was entered.
        meets: Whether it was expected to meet the objective at the last decision.
    """

    current: str | None = None
    since_s: float = -math.inf
    meets: bool = True


@dataclass(frozen=True)
class Decision:
    """What was decided, and why.

    Attributes:
        time_s: When.
        before: Variant that answered.
        after: Variant that shall answer.
        how: How to get there.
        meets: Whether `after` is expected to meet the objective.
        reason: For a person.
        signals: What was seen.
        predicted: For each variant.
    """

    time_s: float
    before: str | None
    after: str
    how: How
    meets: bool
    reason: str
    signals: Signals
    predicted: Mapping[str, Predicted] = field(default_factory=dict)


def decide(
    standing: Standing,
    signals: Signals,
    variants: Sequence[Profile],
    objective: Objective,
    tails: Mapping[str, float] | None = None,
    helper: Profile | None = None,
) -> tuple[Standing, Decision]:
    """Take the most accurate variant that meets the objective; the smallest if none does.

    Args:
        standing: What the last decision returned.
        signals: What was seen since.
        variants: The portfolio, at least one variant.
        objective: What is asked for.
        tails: Share of the requests of each variant, by its name, that may take longer because
            others help (`fedsys.serving.switch.relief.tails_of`); `TAIL` where none is given.
        helper: Computes those; None for nobody.

    Returns:
        The new state, and the decision with its reason and the prediction for each variant.
    """
    ranked = sorted(variants, key=merit, reverse=True)
    current = next((v for v in ranked if v.name == standing.current), None)
    room = room_of(signals, objective, current)
    tails = {v.name: TAIL for v in ranked} | dict(tails or {})
    predicted = {
        v.name: Predicted(
            predict_ms(v, signals, objective, tails[v.name], helper), v.peak_bytes <= room
        )
        for v in ranked
    }
    view = _View(standing, signals, ranked, current, predicted, objective, room, tails, helper)
    chosen, reason = _choose(view)
    meets = predicted[chosen.name].meets(objective)
    how = How.STAY if chosen is current else How.HOT
    if current is not None and chosen is not current and not _both_fit(signals, chosen):
        how = How.COLD
    decision = Decision(
        signals.time_s, standing.current, chosen.name, how, meets, reason, signals, predicted
    )
    since = standing.since_s if chosen is current else signals.time_s
    return Standing(chosen.name, since, meets), decision


def merit(variant: Profile) -> tuple[float, float, int]:
    """Order by accuracy, then speed, then size; a variant of unknown accuracy comes last."""
    accuracy = -1.0 if math.isnan(variant.accuracy) else variant.accuracy
    return accuracy, -variant.latency[0].p50_ms, -variant.bytes


def smallest(variants: Sequence[Profile]) -> Profile:
    """Return the variant that answers when none meets the objective: the one of fewest bytes."""
    return min(variants, key=lambda v: (v.bytes, v.latency[0].p50_ms, v.name))


@dataclass(frozen=True)
class _View:
    """All that a choice is made of."""

    standing: Standing
    signals: Signals
    ranked: Sequence[Profile]
    current: Profile | None
    predicted: Mapping[str, Predicted]
    objective: Objective
    room: float
    tails: Mapping[str, float]
    helper: Profile | None


def _choose(view: _View) -> tuple[Profile, str]:
    standing, signals, objective = view.standing, view.signals, view.objective
    ranked, current, predicted, room = view.ranked, view.current, view.predicted, view.room
    worse = stressed(signals, objective.margin)

    def meets(variant: Profile) -> bool:
        return predicted[variant.name].meets(objective)

    def is_safe(variant: Profile) -> bool:
        fits = variant.peak_bytes * (1 + objective.margin) <= room
        expected = predict_ms(variant, worse, objective, view.tails[variant.name], view.helper)
        return fits and expected <= objective.p95_ms

    safe = next((v for v in ranked if is_safe(v)), None)
    bare = next((v for v in ranked if meets(v)), None)
    target = safe or bare or smallest(ranked)
    aim = f"p95 {objective.p95_ms:g} ms"
    if current is None:
        if safe or bare:
            return target, f"the most accurate that meets {aim}"
        return target, f"none meets {aim}: the smallest answers"
    waited = signals.time_s - standing.since_s
    if meets(current):
        if safe is None or merit(safe) <= merit(current):
            return current, f"meets {aim}"
        if waited < objective.dwell_s:
            return current, f"{safe.name} would do, {objective.dwell_s - waited:.1f} s too early"
        return safe, f"more accurate, and meets {aim} with a margin of {objective.margin:.0%}"
    short = not predicted[current.name].fits
    cause = f"{current.name} needs {current.peak_bytes:,} bytes of {room:,.0f}" if short else (
        f"{current.name} {_expected(predicted[current.name].p95_ms)}, not {aim}"
    )  # fmt: skip
    if target is current:
        return current, f"{cause}; none does better, and it is the smallest"
    if current is smallest(ranked) and safe is None and not short:
        # Without a margin, noise would bring it back here at once.
        return current, f"{cause}; {target.name} would do, but with no margin"
    if waited < objective.down_dwell_s and not short:
        return current, f"{cause}; {objective.down_dwell_s - waited:.1f} s too early to leave it"
    if not (safe or bare):
        return target, f"{cause}; none meets it: the smallest answers"
    return target, cause


def profile_of(variant: Variant, threads: int, *, onnx: bool = False) -> Profile:
    """Return what the policy needs of a variant of a portfolio.

    Args:
        variant: Of the manifest.
        threads: Intra-op threads that it will run with; where nothing was measured with so many,
            the figures of the nearest number count.
        onnx: Whether it is computed by ONNX Runtime beside PyTorch, so that those figures count.

    Raises:
        ModelError: No latency was measured.
    """
    latencies = (variant.onnx_latencies if onnx else ()) or variant.latencies
    if not latencies:
        raise ModelError(
            f"variant {variant.name} of the portfolio has no measured latency, so nothing can be "
            "expected of it; make the portfolio again by fedsys prune"
        )
    nearest = min({row.threads for row in latencies}, key=lambda t: (abs(t - threads), t))
    rows = sorted(
        (PassTime(row.batch, row.p50_ms, row.p95_ms) for row in latencies
         if row.threads == nearest),
        key=lambda row: row.batch,
    )  # fmt: skip
    peak = max(variant.peak_bytes, variant.bytes)
    return Profile(variant.name, variant.accuracy, variant.bytes, peak, tuple(rows))


# --------------------------------------------------------------------------------------------------
# Predictions


def predict_ms(
    variant: Profile,
    signals: Signals,
    objective: Objective,
    tail: float = TAIL,
    helper: Profile | None = None,
) -> float:
    """Return the time from arrival to answer that a share `tail` is expected to exceed.

    In milliseconds; it is the 95th percentile unless another share is given.

    Args:
        variant: Its profile; batch sizes up to ``objective.max_batch`` count.
        signals: Load and machine.
        objective: Gives batch and input size.
        tail: In (0, 1).
        helper: Takes over the share `tail`, and the load of it, where that is above `TAIL`.

    Returns:
        The least over the batch sizes; infinite if the load is too high at each of them.
    """
    slow, transfer = slowdown(signals), transfer_ms(signals, objective)
    sizes = {row.batch for row in variant.latency if row.batch <= objective.max_batch}
    others_share, others_ms = 0.0, 0.0
    if helper is not None and helper is not variant and tail > TAIL:
        most = objective.max_batch
        others_share, others_ms = tail, latency_at(helper, most).p50_ms * slow / most
    best = math.inf
    for size in sorted(sizes | {objective.max_batch}):
        row = latency_at(variant, size)
        service = row.p50_ms * slow
        each = (1 - others_share) * service / row.batch + others_share * others_ms
        busy = signals.arrival_rate / 1e3 * each
        # Gaps even out over the b arrivals of a batch: Kingman's bound is b times less.
        waiting = max(tail_wait_ms(busy, each, tail), signals.queue * each)
        if row.batch > 1:  # the batch that runs when an example comes is not in it
            waiting += busy * service
        best = min(best, waiting + row.p95_ms * slow + transfer)
    return best


def transfer_ms(signals: Signals, objective: Objective) -> float:
    """Return the time of one input on the link, in milliseconds; 0 if its rate is unknown."""
    if not signals.link_mbit_s:
        return 0.0
    return objective.input_bytes * 8 / (signals.link_mbit_s * 1e3)


def latency_at(variant: Profile, batch: int) -> PassTime:
    """Return the latency of a batch: between measured sizes on a line.

    Above the largest size, time grows as the batch; below the smallest it is that of the smallest.
    """
    table = variant.latency
    for low, high in itertools.pairwise((table[0], *table)):
        if batch <= high.batch:
            share = (batch - low.batch) / max(1, high.batch - low.batch)
            share = max(0.0, share)
            p50 = low.p50_ms + share * (high.p50_ms - low.p50_ms)
            return PassTime(batch, p50, low.p95_ms + share * (high.p95_ms - low.p95_ms))
    last, factor = table[-1], batch / table[-1].batch
    return PassTime(batch, last.p50_ms * factor, last.p95_ms * factor)


def stressed(signals: Signals, margin: float) -> Signals:
    """Return the signals if load, slowness and the time on the link were larger by `margin`."""
    more = 1 + margin
    return dataclasses.replace(
        signals,
        arrival_rate=signals.arrival_rate * more,
        queue=math.ceil(signals.queue * more),
        slowdown=slowdown(signals) * more,
        link_mbit_s=signals.link_mbit_s / more if signals.link_mbit_s else None,
    )


def slowdown(signals: Signals) -> float:
    """Return the factor on profiled times: the measured one, or what the load of others suggests.

    Under fair scheduling a process that wants all processors, of which others use a share u, gets
    at least 1 - u of them or half, whichever is more.
    """
    if signals.slowdown is not None:
        return max(signals.slowdown, 1e-3)
    return 1 / max(0.5, 1 - signals.cpu_load)


def tail_wait_ms(busy: float, service_ms: float, tail: float = TAIL) -> float:
    """Return the waiting time that a share `tail` exceeds in an M/D/1 queue, in heavy traffic.

    P(W > t) is about r exp(-2 (1 - r) t / s): the mean of M/D/1, r s / (2 (1 - r)), with an
    exponential tail.

    Args:
        busy: r, arrival rate times service time.
        service_ms: s.
        tail: In (0, 1).
    """
    if busy >= 1:
        return math.inf
    if busy <= tail:
        return 0.0
    return service_ms / (2 * (1 - busy)) * math.log(busy / tail)


# --------------------------------------------------------------------------------------------------
# Memory


def _expected(p95_ms: float) -> str:
    """Return in words what a variant is expected to take.

    >>> _expected(48.0), _expected(1424.0), _expected(math.inf)
    ('is expected at 48 ms', 'is expected at 1,424 ms', 'cannot keep up with the requests')
    """
    if math.isinf(p95_ms):
        return "cannot keep up with the requests"
    return f"is expected at {f'{p95_ms:.3g}' if p95_ms < 999.5 else f'{p95_ms:,.0f}'} ms"


def room_of(signals: Signals, objective: Objective, current: Profile | None) -> float:
    """Return the bytes that what answers may take: the one that runs gives its share back."""
    room = math.inf if objective.memory_bytes is None else float(objective.memory_bytes)
    if signals.free_memory is not None:
        room = min(room, signals.free_memory + (current.peak_bytes if current else 0))
    return room


def _both_fit(signals: Signals, chosen: Profile) -> bool:
    return signals.free_memory is None or chosen.peak_bytes <= signals.free_memory
