"""What is told of the decisions of a policy: a record for each device in each round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsys.config import Config
from fedsys.models.layers import LayeredModel
from fedsys.planning.assignment import Assignment
from fedsys.planning.leakage import leakage_note
from fedsys.planning.oracle import Optimum
from fedsys.planning.ordering import in_words
from fedsys.runs.decisions import OffloadDecision
from strategies.offload import Offload
from strategies.offload_totals import place_of
from strategies.policies.policy import Explains, Observation, Probes


@dataclass(frozen=True)
class DeviceRound:
    """What the model of time says of a device in a round; None for what it does not know.

    Attributes:
        up_mbit_s: Mean rate of its link over the round, to the edge.
        down_mbit_s: Likewise, from it.
        predicted_s: Seconds that the policy expected, or the fleet file gives.
        measured_s: Seconds on the virtual clock, where time is not real.
        best: What the oracle would have done.
        best_s: Seconds of its round then.
    """

    up_mbit_s: float | None = None
    down_mbit_s: float | None = None
    predicted_s: float | None = None
    measured_s: float | None = None
    best: Assignment | None = None
    best_s: float | None = None


def best_of(optimum: Optimum | None, k: int) -> dict[str, Any]:
    """Return what an optimum says of its device k, as arguments of `DeviceRound`."""
    if optimum is None:
        return {}
    return {"best": optimum.choices[k], "best_s": optimum.played.device_s[k]}


def decisions_of(
    offload: Offload, config: Config, layers: LayeredModel, modelled: Mapping[int, DeviceRound]
) -> list[OffloadDecision]:
    """Return the records of the last round, by client.

    Args:
        offload: Whose policy decided.
        config: The run.
        layers: Its model.
        modelled: What the model of time says of clients; others are left without.
    """
    decided = offload.decided
    if decided is None:
        return []
    clients = sorted(offload.assigned)
    why = _reasons(offload, config, clients)
    note = leakage_note(config, layers)
    return [
        OffloadDecision(
            round=decided.round,
            client=client,
            reason=f"{why[client]}; {note}" if note else why[client],
            **_choice(offload, layers, client, offload.assigned[client]),
            **_seen(decided.seen[client]),
            **_outcome(offload, layers, client, modelled.get(client, DeviceRound())),
        )
        for client in clients
    ]


def probe_bytes(offload: Offload) -> int:
    """Return what policy and devices sent for the last decision, and in its round, for probes."""
    policy = offload.policy
    by_devices = sum(offload.seen_of(client).probe_bytes for client in offload.assigned)
    own = policy.probe_bytes(offload.policy_state) if isinstance(policy, Probes) else 0
    return by_devices + own


def _reasons(offload: Offload, config: Config, clients: Sequence[int]) -> Mapping[int, str]:
    policy = offload.policy
    default = dict.fromkeys(clients, f"as policy.kind={config.policy.get('kind')} decides")
    if not isinstance(policy, Explains):
        return default
    why = default | dict(policy.reasons(offload.policy_state, clients))
    for client, order in offload.orders.items():
        why[client] += f"; {in_words(order, offload.fleet.edges[order.move.edge].name)}"
    return why


def _choice(
    offload: Offload, layers: LayeredModel, client: int, choice: Assignment
) -> dict[str, Any]:
    place, manner = place_of(layers, choice.cut), offload.manner_of(client, choice)
    return {
        "machine": manner.get("machine", ""),
        "cut": place["index"],
        "unit": place["unit"],
        "whole": choice.cut == len(layers),
        "device_share": place["device_share"],
        "pieces": offload.pieces_of(choice),
        "codec": manner.get("codec", ""),
        "edge": manner.get("edge", ""),
    }


def _seen(seen: Observation) -> dict[str, Any]:
    return {
        "iteration_s": seen.iteration_s or None,
        "compute_s": seen.compute_s or None,
        "edge_s": seen.edge_s or None,
        "seen_up_mbit_s": _mbit_s(seen.up_bit_s),
        "seen_down_mbit_s": _mbit_s(seen.down_bit_s),
    }


def _mbit_s(bit_s: float) -> float | None:
    return 1e-6 / bit_s if bit_s > 0 else None


def _outcome(
    offload: Offload, layers: LayeredModel, client: int, modelled: DeviceRound
) -> dict[str, Any]:
    measured = modelled.measured_s or offload.seen_of(client).seconds or None
    told = {
        "up_mbit_s": modelled.up_mbit_s,
        "down_mbit_s": modelled.down_mbit_s,
        "predicted_s": modelled.predicted_s,
        "measured_s": measured,
    }
    if modelled.best is None:
        return told
    best = _choice(offload, layers, client, modelled.best)
    return told | {
        "oracle_cut": best["cut"],
        "oracle_unit": best["unit"],
        "oracle_share": best["device_share"],
        "oracle_pieces": best["pieces"],
        "oracle_codec": best["codec"],
        "oracle_edge": best["edge"],
        "oracle_s": modelled.best_s,
    }
