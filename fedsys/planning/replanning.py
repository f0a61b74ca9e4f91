"""Planning anew in a run: a new plan replaces the old one if it saves enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedsys.planning.assignment import Assignment
from fedsys.planning.planner import Plan, evaluate, plan
from fedsys.planning.stage_table import score
from fedsys.planning.workload import Workload


def must_offload(load: Workload, told: bool, most_bytes: int | None) -> bool:
    """Return whether devices must offload: they are told to, or the model is too large for them."""
    return told or (most_bytes is not None and sum(load.state_bytes) > most_bytes)


def replanned(
    state: Mapping[str, Any],
    load: Workload,
    clients: Sequence[int],
    method: str,
    *,
    offload: bool,
    hysteresis: float,
) -> dict[str, Any]:
    """Return the state of a policy after it has planned anew.

    Args:
        state: Before: ``choices`` of each client as `Assignment.to_list` gives them, ``clients`` of
            the last plan, and ``plans``, their number.
        load: What is trained by `clients`, as it is believed to be.
        clients: Who takes part.
        method: A name of `fedsys.planning.planner.METHODS`.
        offload: Whether each device must offload.
        hysteresis: Share of the time of the old plan that the new one must save.
    """
    made = plan(load, method, offload=offload)
    known = [state["choices"].get(client) for client in clients]
    choices = made.choices
    if all(choice is not None for choice in known):
        old = evaluate(load, [Assignment.of_list(choice) for choice in known])
        if _scored(made) > _scored(old) * (1 - hysteresis):
            choices = old.choices
    fresh = {client: c.to_list() for client, c in zip(clients, choices, strict=True)}
    return {
        **state,
        "choices": state["choices"] | fresh,
        "clients": list(clients),
        "plans": state["plans"] + 1,
    }


def _scored(made: Plan) -> float:
    return float(score(np.array([made.round_s]))[0])
