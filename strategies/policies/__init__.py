"""Offloading policies, built from the ``policy`` group of the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from fedsys.config import Config, Spec, call_target
from fedsys.errors import ConfigError, did_you_mean
from fedsys.planning.leakage import without_limit
from fedsys.planning.options import PLANNED, PlanOptions
from strategies.policies.policy import OffloadPolicy


def build_policy(
    spec: Spec,
    num_edges: int,
    config: Config | None = None,
    examples: Sequence[int] = (),
    *,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> OffloadPolicy | None:
    """Return the policy of the ``policy`` group; None where everything stays on the devices.

    Only the policy that is asked for is imported: those that learn bring a fifth of all modules.

    Args:
        spec: The group; of kind ``own`` its ``_target_`` names the policy, which may take the
            other arguments too.
        num_edges: Number of edge servers.
        config: The run; needed by policies that plan.
        examples: Examples of each client; likewise.
        folder: Where policies keep what they have learned: that of the run; None: nowhere.
        say: Told how far a policy is that has to learn first.

    Raises:
        ConfigError: There is no such policy, or an argument is not usable.
    """
    kind = spec.get("kind", "none")
    if kind == "none":
        return None
    if kind == "fixed":
        from strategies.policies.fixed import FixedPolicy

        pieces = spec.get("micro_batches")
        return FixedPolicy(spec.get("cut"), spec.get("codec", "fp32"), num_edges, pieces)
    if kind in PLANNED and config is not None:
        return _planner(config, examples, learn=PlanOptions.of(spec).learn)
    if kind == "bandit" and config is not None:
        from strategies.policies.bandit import bandit

        return bandit(config, examples)
    if kind == "fedadapt" and config is not None:
        from strategies.policies.fedadapt import FedAdaptPolicy

        return FedAdaptPolicy(config, examples, folder, say)
    if kind == "own":
        target = {key: value for key, value in without_limit(spec).items() if key != "kind"}
        given = {"num_edges": num_edges, "config": config, "examples": examples}
        return cast(OffloadPolicy, call_target(target, "policy", **given))
    known = ("none", "fixed", *PLANNED, "bandit", "fedadapt", "own")
    hint = did_you_mean(str(kind), known)
    raise ConfigError.of("policy.kind", kind, f"must be one of {', '.join(known)}", hint.strip())


def _planner(config: Config, examples: Sequence[int], *, learn: bool) -> OffloadPolicy:
    if learn:
        from strategies.policies.learned import learned_planner

        return learned_planner(config, examples)
    from strategies.policies.planned import Planned

    return Planned(config, examples)
