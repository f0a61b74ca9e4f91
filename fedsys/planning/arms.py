"""What a bandit chooses from, and what it expects of each choice: LinUCB with an offset per arm.

An *arm* is a legal cut. The seconds of an iteration of a device, divided by those of its first one
(alone, the *baseline*), are linear in a context x of four numbers, with weights that are learned:

=========  ==============================================================  ===============
context    of arm c                                                        weight at first
=========  ==============================================================  ===============
device     share of the multiply-accumulates on the device                 1
link       bits at the cut over the rates, and latency, over the baseline  1/2, for overlap
edge       share of the work on the edge, times who shares the edge        a guess
offloaded  1 below the whole model                                         0
=========  ==============================================================  ===============

Work is not quite in proportion to multiply-accumulates, so each arm has an offset of its own beside
the line, normal around 0 with a spread of `own` times the share on the device. Weights are those of
a ridge regression for each device, to which devices of its kind add what they saw, discounted. An
arm that was tried is known as it was measured; one that was not has the uncertainty of the weights
and of its offset, and is judged by its lower bound (Li et al., "A contextual-bandit approach to
personalized news article recommendation", WWW 2010; here the reward is time that is saved).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from fedsys.models.layers import LayeredModel
from fedsys.planning.contention import Indices, alone_s
from fedsys.planning.costs import frame_bytes
from fedsys.planning.workload import Array, StageTimes, Workload

CONTEXT = 4
"""Numbers of a context."""

MOST: Final = 100.0
"""Times the baseline up to which transfers, and what an iteration took, are told apart."""


@dataclass(frozen=True)
class Arms:
    """The legal cuts of a run, ascending; the last one is the whole model.

    Attributes:
        cuts: The cuts, C of them.
        device: Share of the multiply-accumulates on the device, ``(C,)``.
        up_bits: Bits of a mini-batch that a device sends, ``(C,)``; 0 for the whole model.
        down_bits: Bits that it receives.
        state_bits: Bits of the device's part of the model, ``(C,)``.
        codec: How tensors are written: of those that may be chosen, the one with the fewest bytes.
    """

    cuts: tuple[int, ...]
    device: Array
    up_bits: Array
    down_bits: Array
    state_bits: Array
    codec: str

    @classmethod
    def of(cls, load: Workload, layers: LayeredModel) -> Arms:
        """Return the arms of a workload."""
        cuts = (*sorted(load.cuts), load.units)
        macs = np.cumsum([0.0, *(unit.macs for unit in layers.units)])
        held = 8.0 * np.cumsum([0.0, *load.state_bytes])
        at = [load.crossings[cut - 1] for cut in cuts[:-1]]
        size = load.batch_size

        def sent(codec: str, labels: bool) -> Array:
            frames = [frame_bytes(crossing, size, codec, labels=labels) for crossing in at]
            return 8.0 * np.array([*frames, 0.0])

        codec = min(load.codecs, key=lambda name: float(sent(name, False).sum()))
        index = list(cuts)
        return cls(
            cuts,
            macs[index] / max(1.0, macs[-1]),
            sent(codec, True),
            sent(codec, False),
            held[index] if load.exchange else np.zeros(len(cuts)),
            codec,
        )

    def link_s(self, rates: Array, latency_s: Array) -> Array:
        """Return the seconds in which a mini-batch crosses both ways, ``(K, C)``.

        Args:
            rates: Bits per second up and down, ``(K, 2)``.
            latency_s: One way, ``(K,)``.
        """
        moved = self.up_bits / rates[:, :1] + self.down_bits / rates[:, 1:]
        seconds: Array = moved + np.where(self.up_bits > 0, 2 * latency_s[:, None], 0.0)
        return seconds

    def least_s(self, rates: Array) -> Array:
        """Return the seconds of the busier way: no iteration can take less, ``(K, C)``."""
        seconds: Array = np.maximum(self.up_bits / rates[:, :1], self.down_bits / rates[:, 1:])
        return seconds

    def exchange_s(self, rates: Array, latency_s: Array) -> Array:
        """Return the seconds in which devices fetch and return their part, ``(K, C)``."""
        per_bit = (1 / rates).sum(axis=1)[:, None]
        latency = np.where(self.state_bits > 0, 2 * latency_s[:, None], 0.0)
        seconds: Array = per_bit * self.state_bits + latency
        return seconds

    def contexts(self, link: Array, crowd: Array) -> Array:
        """Return the contexts of all arms, ``(K, C, 4)``.

        Args:
            link: Seconds of transfers over the baseline, ``(K, C)``.
            crowd: Devices at the edge of each device, itself included, ``(K, C)``.
        """
        made = np.empty((*link.shape, CONTEXT))
        made[..., 0] = self.device
        made[..., 1] = np.minimum(link, MOST)
        made[..., 2] = (1.0 - self.device) * crowd
        made[..., 3] = self.up_bits > 0
        return made


@dataclass(frozen=True)
class Guess:
    """What is believed of the weights of contexts before anything is measured.

    Attributes:
        mean: Of each weight.
        spread: Standard deviation of each.
        own: Standard deviation of an arm's offset, for a device that has all of the work.
        noise: Standard deviation of what is measured in a round, over the baseline.
        shared: How much what another device of the kind saw counts.
        piece: What each forward and backward of a piece takes beside its work, over the baseline.
        piece_spread: Standard deviation of that.
    """

    mean: tuple[float, ...] = (1.0, 0.5, 0.1, 0.0)
    spread: tuple[float, ...] = (0.3, 0.5, 0.2, 0.05)
    own: float = 0.3
    noise: float = 0.03
    shared: float = 0.3
    piece: float = 0.002
    piece_spread: float = 0.02


def expected(
    arms: Arms, contexts: Array, tried: Array, kinds: Indices, guess: Guess
) -> tuple[Array, Array, Array]:
    """Return what an iteration takes at each arm over the baseline: mean and deviation, ``(K, C)``.

    Third are the weights of contexts, ``(K, 4)``.

    Args:
        arms: The arms.
        contexts: Of the round to come, ``(K, C, 4)``.
        tried: Of each arm the number of rounds, and means of time, transfers and crowd in them,
            first of what is kept of it, ``(K, C, 4)`` or more.
        kinds: Number of the kind of each device, ``(K,)``.
        guess: What is believed at first.
    """
    rounds, took = tried[..., 0], tried[..., 1]
    before = arms.contexts(tried[..., 2], tried[..., 3])
    own = (guess.own * arms.device) ** 2
    known = rounds > 0
    noise = guess.noise**2 / np.where(known, rounds, 1.0)
    weights = np.where(known, 1.0 / (own + noise), 0.0)
    weighted = before * weights[..., None]
    seen = weighted.transpose(0, 2, 1) @ before
    sums = (weighted * took[..., None]).sum(axis=1)
    prior = np.diag(1.0 / np.square(guess.spread))
    precision = prior + _with_kind(seen, kinds, guess.shared)
    right = prior @ np.array(guess.mean) + _with_kind(sums, kinds, guess.shared)
    covariance = np.linalg.inv(precision)
    theta = (covariance @ right[..., None])[..., 0]
    # An offset is believed as far as it was measured; the line carries it to other links and crowds
    share = np.where(known, own / (own + noise), 0.0)
    offset = share * (took - (before @ theta[..., None])[..., 0])
    mean = (contexts @ theta[..., None])[..., 0] + offset
    moved = contexts - share[..., None] * before
    variance = ((moved @ covariance) * moved).sum(axis=-1) + own * (1.0 - share)
    return mean, np.sqrt(np.maximum(variance, 0.0)), theta


def _with_kind(own: Array, kinds: Indices, shared: float) -> Array:
    """Return what each device saw, with a share of what the others of its kind saw."""
    sums = np.zeros((int(kinds.max(initial=-1)) + 1, *own.shape[1:]))
    np.add.at(sums, kinds, own)
    mixed: Array = own * (1.0 - shared) + shared * sums[kinds]
    return mixed


def best_pieces(
    arms: Arms,
    arm: Indices,
    rates: Array,
    latency_s: Array,
    base_s: Array,
    edge: Array,
    load: Workload,
    piece: Array,
) -> list[int]:
    """Return the number of micro-batches of each device that is fastest by what is known of it.

    The closed form of planners, with a third of the computing forward.

    Args:
        arms: The arms.
        arm: Index of the one of each device, ``(K,)``.
        rates: Bits per second up and down, ``(K, 2)``.
        latency_s: One way, ``(K,)``.
        base_s: Seconds of an iteration alone, ``(K,)``.
        edge: Seconds that the edge takes for the whole model, over the baseline, ``(K,)``.
        load: Which numbers may be chosen, and how many pieces are in flight.
        piece: What each forward and backward takes beside its work, over the baseline, ``(K,)``.
    """
    counts = np.array(sorted(load.micro_batches), dtype=float)
    if len(counts) == 1:
        return [int(counts[0])] * len(arm)
    pieces = np.broadcast_to(counts, (len(arm), len(counts)))
    each, zeros = base_s[:, None] / pieces, np.zeros(pieces.shape)
    share = arms.device[arm][:, None]
    stages = StageTimes(
        forward=each * share / 3 + (piece * base_s)[:, None],
        up=(arms.up_bits[arm] / rates[:, 0])[:, None] / pieces,
        edge=each * (1 - share) * edge[:, None],
        down=(arms.down_bits[arm] / rates[:, 1])[:, None] / pieces,
        backward=each * share * 2 / 3 + (piece * base_s)[:, None],
        pieces=pieces,
        device_update=zeros,
        edge_update=zeros,
        load=zeros,
        latency=zeros + latency_s[:, None],
        offloaded=zeros == 0,
    )
    best = alone_s(stages, load.in_flight).argmin(axis=1)
    return [int(count) for count in counts[best]]
