"""The group ``privacy``: what a run promises about examples or clients, and by how much noise.

One mechanism at a time: ``record`` (DP-SGD, a promise to each example), ``client`` (noise on the
average of clipped updates, a promise to each client), ``cut`` (noise on the activations that leave
a device, a promise to each example). All of them spend from one budget, `PrivacyConfig.epsilon` at
`PrivacyConfig.delta`, and a run ends before the release that would exceed it.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsys.errors import ConfigError, did_you_mean

MECHANISMS = ("record", "client", "cut")
ACCOUNTANTS = ("pld", "rdp", "prv")
"""By which epsilon is computed."""


@dataclass(frozen=True)
class PrivacyConfig:
    """What is promised, and from which budget.

    Attributes:
        mechanism: One of `MECHANISMS`, or ``none``.
        epsilon: Budget of the whole run.
        delta: Of the budget, below one over the number of units that are protected.
        accountant: ``pld``, ``rdp`` or ``prv``.
        clip_norm: Largest norm of what one unit contributes: of an example's gradient, of a
            client's update, of an example's activation.
        noise_multiplier: Standard deviation of the noise over `clip_norm`; None: the smallest
            with which the rounds of the run stay within the budget.
        secure: Whether noise and sampling come from the operating system's generator, as a claim
            needs; else they are functions of the run's seed, which whoever knows it can subtract.
        noise: At the cut: ``gaussian``, or ``laplace`` with norms of absolute values.
        label_epsilon: At the cut: of randomised response, by which labels leave a device once for
            the whole run; None: as they are.
        clipping: Of updates: ``fixed``, or ``adaptive``: `clip_norm` is the first, and follows
            `quantile`.
        quantile: Share of the clients whose updates are to be within the norm.
        where: Who adds the noise of updates: the ``server``, once to their mean, or each
            ``device`` to its own, so that the server is not to be trusted either.
    """

    mechanism: str = "none"
    epsilon: float = 8.0
    delta: float = 1e-5
    accountant: str = "pld"
    clip_norm: float = 1.0
    noise_multiplier: float | None = None
    secure: bool = False
    noise: str = "gaussian"
    label_epsilon: float | None = None
    clipping: str = "fixed"
    quantile: float = 0.5
    where: str = "server"

    @property
    def active(self) -> bool:
        """Whether anything is promised."""
        return self.mechanism != "none"

    @property
    def per_example(self) -> bool:
        """Whether the gradient of each example is clipped, and noise added to their sum."""
        return self.mechanism == "record"

    @property
    def local(self) -> bool:
        """Whether devices clip their updates and add noise, before anything leaves them."""
        return self.mechanism == "client" and self.where == "device"


def check(privacy: PrivacyConfig) -> None:
    """Refuse values out of range.

    Raises:
        ConfigError: Names the key, its value, the rule and the way out.
    """
    _choice("mechanism", privacy.mechanism, ("none", *MECHANISMS))
    _choice("accountant", privacy.accountant, ACCOUNTANTS)
    _choice("noise", privacy.noise, ("gaussian", "laplace"))
    _choice("clipping", privacy.clipping, ("fixed", "adaptive"))
    _choice("where", privacy.where, ("server", "device"))
    noise = privacy.noise_multiplier
    rules = (
        ("epsilon", privacy.epsilon > 0, "must be above 0", "1 to 8 are usual budgets"),
        ("delta", 0 < privacy.delta < 1, "must be above 0 and below 1", "try privacy.delta=1e-5"),
        ("clip_norm", privacy.clip_norm > 0, "must be above 0", "try privacy.clip_norm=1.0"),
        (
            "label_epsilon",
            privacy.label_epsilon is None or privacy.label_epsilon > 0,
            "must be above 0",
            "null tells labels as they are",
        ),
        ("quantile", 0 < privacy.quantile < 1, "must be above 0 and below 1", "0.5 is usual"),
        (
            "noise_multiplier",
            noise is None or noise > 0,
            "must be above 0",
            "null computes it from the budget",
        ),
    )
    for key, holds, rule, way_out in rules:
        if not holds:
            raise ConfigError.of(f"privacy.{key}", getattr(privacy, key), rule, way_out)


def _choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        hint = did_you_mean(value, known)
        if value == "gdp":
            hint = "Gaussian DP's central limit lies below the true epsilon: it is no bound"
        rule = f"must be one of {', '.join(known)}"
        raise ConfigError.of(f"privacy.{key}", value, rule, hint)
