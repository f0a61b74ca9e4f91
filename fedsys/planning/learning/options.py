"""The ``policy`` group of ``policy=fedadapt``, as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedsys.config import Spec
from fedsys.config.building import build
from fedsys.errors import ConfigError, did_you_mean
from fedsys.planning.leakage import without_limit
from fedsys.planning.learning.fleets import Draws
from fedsys.planning.learning.grouping import LowBandwidth
from fedsys.planning.learning.observing import REWARDS
from fedsys.planning.learning.scenarios import Ranges
from fedsys.planning.learning.view import View
from fedsys.transport.codecs import check_codec


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of proximal policy optimisation.

    Attributes:
        layers: Units of the hidden layers of each network.
        lr: Adam's learning rate.
        gamma: Discount of later rewards.
        gae_lambda: 1: Monte Carlo returns.
        clip: Largest relative change of the probability of an action that still counts.
        epochs: Passes over what was collected, for each update.
        every: Steps of each environment between two updates.
        batch: Steps in a mini-batch; None: all that were collected.
        environments: Fleets that are trained on side by side.
        updates: Updates in all; with cuts 0 for an agent that is not trained.
        entropy: Weight of the entropy.
        value: Weight of the critic's loss.
        std: Standard deviation of an action, as a share of the work.
        std_hold: Updates in which it stays.
        std_decay: Factor of each later one.
    """

    layers: tuple[int, ...] = (64, 32)
    lr: float = 3e-4
    gamma: float = 0.9
    gae_lambda: float = 1.0
    clip: float = 0.2
    epochs: int = 50
    every: int = 10
    batch: int | None = None
    environments: int = 1
    updates: int = 50
    entropy: float = 0.01
    value: float = 0.5
    std: float = 0.5
    std_hold: int = 20
    std_decay: float = 0.9

    @property
    def steps(self) -> int:
        """Steps of all environments together."""
        return self.updates * self.every * self.environments

    def std_at(self, update: int) -> float:
        """Return the standard deviation before an update, from 0.

        >>> [round(Hyper().std_at(n), 4) for n in (0, 20, 21, 22)]
        [0.5, 0.5, 0.45, 0.405]
        """
        return float(self.std * self.std_decay ** max(0, update - self.std_hold))


@dataclass(frozen=True)
class Training:
    """What an agent is trained on, where no file of one is given.

    Attributes:
        where: ``timeline``, on fleets that are drawn, or ``clients``, in truncated rounds of the
            run's own.
        iterations: Mini-batches of a truncated round.
        fleets: Fleets that are drawn around the run's.
        moments: States of the links of each.
        change: Probability that links change after a step.
        reward: What a step is worth: ``log`` or ``saved``, as in
            `fedsys.planning.learning.observing.REWARDS`.
        ranges: What fleets are drawn from.
        draws: What fleets are drawn from where cuts are scored; of the others only `where` and
            `iterations` matter then.
    """

    where: str = "timeline"
    iterations: int = 5
    fleets: int = 200
    moments: int = 2
    change: float = 0.05
    reward: str = "log"
    ranges: Ranges = field(default_factory=Ranges)
    draws: Draws = field(default_factory=Draws)


@dataclass(frozen=True)
class FedAdaptOptions:
    """How an agent sees devices, and how it is trained.

    Attributes:
        kind: ``fedadapt``.
        action: What an agent says: ``cuts``, a score for each legal cut of each device, or
            ``shares``, a share of the work for each group of devices, as the paper's.
        first: With cuts, on what the first round rests: ``told``, what the fleet file says, where
            there is one, or ``alone``: all train alone.
        agent: File of a trained agent; None: one is trained before the first round.
        groups: Number of groups of devices.
        low_mbit_s: Below this rate a device belongs to the group of slow links; None: no such one.
        hysteresis: Share by which the rate must be above that to leave the group.
        bandwidth: Whether bandwidth is a part of the state.
        times: ``log`` of the ratio to the baseline, or ``seconds``.
        each: Whether the agent is asked for each device by itself, as the one that stands for its
            group; else all devices of a group do the same.
        trials: Rounds after a change in which the agent is followed; then what was fastest is kept
            until something changes. None: the agent is always followed.
        veto: Share by which a device may be slower at a cut than alone; beyond it the device stays
            alone. None: it does what the agent says.
        spare_links: With cuts, whether a device that is ready before the slowest anyway takes the
            cut that transfers least.
        cuts: Cuts that may be chosen; None: all. The whole model always may.
        codec: Codecs that may be chosen.
        micro_batches: Numbers of pieces that may be chosen; None: what the batch allows.
        drift: Relative change of what a device takes to compute from which on it is grouped anew.
        probe_every: Rounds in which the link of a device that is alone because it is slow was not
            measured, until that is done; 0: never.
        probe_bytes: Bytes each way with which it is.
        learn: Whether the agent goes on learning in the run.
        learn_std: Standard deviation of its actions then, as a share of the work.
        learn_every: Rounds between two updates then.
        training: What it is trained on.
        ppo: Hyper-parameters.
    """

    kind: str = "fedadapt"
    action: str = "cuts"
    first: str = "told"
    agent: str | None = None
    groups: int = 3
    low_mbit_s: float | None = 5.0
    hysteresis: float = 0.2
    bandwidth: bool = True
    times: str = "log"
    each: bool = True
    trials: int | None = 4
    veto: float | None = 0.02
    spare_links: bool = True
    cuts: tuple[int, ...] | None = None
    codec: Any = "fp32"
    micro_batches: Any = None
    drift: float = 0.2
    probe_every: int = 5
    probe_bytes: int = 65_536
    learn: bool = False
    learn_std: float = 0.05
    learn_every: int = 10
    training: Training = field(default_factory=Training)
    ppo: Hyper = field(default_factory=Hyper)

    @classmethod
    def of(cls, spec: Spec) -> FedAdaptOptions:
        """Return the options of a ``policy`` group.

        Raises:
            ConfigError: A key is unknown, or its value not usable.
        """
        made: FedAdaptOptions = build(cls, without_limit(spec), "policy")
        for name, low, high in _BOUNDS:
            value: Any = made
            for part in name.split("."):
                value = getattr(value, part)
            if value is not None and not low <= value <= high:
                raise ConfigError.of(f"policy.{name}", value, f"must be from {low:g} to {high:g}")
        for name, given, known in (
            ("action", made.action, ("cuts", "shares")),
            ("first", made.first, ("told", "alone")),
            ("times", made.times, ("log", "seconds")),
            ("training.reward", made.training.reward, tuple(REWARDS)),
            ("training.where", made.training.where, ("timeline", "clients")),
        ):
            if given not in known:
                hint = did_you_mean(given, known)
                raise ConfigError.of(f"policy.{name}", given, f"must be {' or '.join(known)}", hint)
        if made.action == "shares" and not made.ppo.updates:
            raise ConfigError.of("policy.ppo.updates", 0, "must be at least 1 with action=shares")
        for codec in made.codecs:
            check_codec(codec)
        return made

    @property
    def codecs(self) -> tuple[str, ...]:
        """Codecs that may be chosen."""
        several = isinstance(self.codec, list | tuple)
        return tuple(self.codec) if several else (str(self.codec),)

    @property
    def view(self) -> View:
        """How the agent sees devices."""
        low = None if self.low_mbit_s is None else LowBandwidth(self.low_mbit_s, self.hysteresis)
        return View(self.groups, low, self.bandwidth, self.times)


_BOUNDS = (
    ("groups", 1, 8),
    ("low_mbit_s", 0, 1e6),
    ("hysteresis", 0, 10),
    ("trials", 1, 1_000_000),
    ("veto", 0, 10),
    ("drift", 0.01, 10),
    ("probe_every", 0, 1_000_000),
    ("probe_bytes", 1024, 1 << 20),
    ("learn_std", 0.001, 1),
    ("learn_every", 2, 10_000),
    ("training.iterations", 2, 10_000),
    ("training.fleets", 1, 100_000),
    ("training.moments", 1, 100),
    ("training.change", 0, 1),
    ("ppo.lr", 1e-8, 1),
    ("ppo.gamma", 0, 1),
    ("ppo.gae_lambda", 0, 1),
    ("ppo.clip", 0.001, 10),
    ("ppo.epochs", 1, 10_000),
    ("ppo.every", 2, 1_000_000),
    ("ppo.environments", 1, 100_000),
    ("ppo.updates", 0, 1_000_000),
    ("ppo.std", 0.001, 10),
    ("ppo.std_decay", 0.01, 1),
)
