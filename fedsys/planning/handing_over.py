"""What a move between edge servers costs: bytes, and the parts of the pause.

The session of a device is its edge half with the state of the optimizer. What the destination has
of it is not sent again but as a difference (`fedsys.offload.delta`): of weights, from those at the
start of the round; of all, from what was sent ahead of a move that was foreseen. With
``mobility.mirror`` a shadow does the same there, and no state moves in the pause. How much smaller
differences are was measured with VGG-5 and SGD with momentum, over 1 to 12 steps of 100 examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fedsys.planning.assignment import Assignment
from fedsys.planning.costs import frame_bytes
from fedsys.planning.jobs import Job, LegChange
from fedsys.planning.moves import Move
from fedsys.planning.workload import Device, EdgeLink, Workload, job_of

WEIGHTS_CHANGED: Final = 0.73
"""Bytes of the difference of weights, as a share of theirs."""

STATE_CHANGED: Final = 0.87
"""Bytes of the difference of an optimizer's state some steps later, as a share of its own."""

ENCODE_BYTE_S: Final = 2e-8
"""Seconds to compare and check a byte of a session, on the edge server that it leaves."""

RESTORE_BYTE_S: Final = 1e-8
"""Seconds to put a byte back in its place and check it, where it arrives."""

DIGEST_BYTE_S: Final = 3e-9
"""Seconds to take a byte of a session into a digest, where it is and where its shadow is."""

TRIPS: Final = 2
"""Round trips of a device until it goes on: one for the link, one for the session."""


@dataclass(frozen=True)
class Price:
    """What a move costs.

    Attributes:
        bytes: That go between the edge servers while the device waits.
        precopied_bytes: That went before.
        parts_s: Seconds of each part of the pause, as in `fedsys.planning.moves.Handover`.
        ahead_s: Seconds in which the state is sent ahead.
    """

    bytes: int
    precopied_bytes: int
    parts_s: Mapping[str, float]
    ahead_s: float = 0.0

    @property
    def pause_s(self) -> float:
        """Seconds in which the device stands still, where nothing is left of what goes ahead."""
        return sum(self.parts_s.values())


def price(
    weights: float, state: float, link: EdgeLink, latency_s: float = 0.0, *,
    ahead: bool = False, anew: bool = False, recut_s: float = 0.0, mirrored: float = 0.0,
) -> Price:  # fmt: skip
    """Return what it costs to take a session along.

    Args:
        weights: Bytes of the weights and buffers of the edge half.
        state: Bytes of its optimizer's state.
        link: Between the edge servers.
        latency_s: Between the device and its edge servers, one way.
        ahead: Whether it was sent ahead.
        anew: Whether nothing goes along, because the round begins anew.
        recut_s: Seconds in which units change sides after the arrival; 0: none do.
        mirrored: Bytes of a mini-batch that goes on to a shadow, where it was sent ahead; 0: no
            shadow. The last one is taken to be on its way when the device leaves.
    """
    reconnect, more = 2 * TRIPS * latency_s, {"recut": recut_s} if recut_s else {}
    if anew:
        parts = {"restore": RESTORE_BYTE_S * weights, "reconnect": reconnect}
        return Price(0, 0, parts | more)
    whole = weights + state
    moved = WEIGHTS_CHANGED * weights + (STATE_CHANGED if ahead else 1.0) * state
    before = WEIGHTS_CHANGED * weights + state if ahead else 0.0
    encode_s, restore_s = ENCODE_BYTE_S, RESTORE_BYTE_S
    if ahead and 0 < mirrored < moved:
        moved, encode_s, restore_s = mirrored, DIGEST_BYTE_S, DIGEST_BYTE_S
    parts = {
        "freeze": 0.0,
        "encode": encode_s * whole,
        "transfer": link.seconds(moved) + link.latency_s,  # and its acknowledgement
        "restore": restore_s * whole,
        "reconnect": reconnect,
        **more,
    }
    return Price(round(moved), round(before), parts, link.seconds(before) if ahead else 0.0)


def price_of(
    load: Workload, device: Device, choice: Assignment, move: Move, *, anew: bool = False
) -> Price:
    """Return what a move of a device costs.

    Args:
        load: What is trained, with the links between its edge servers.
        device: Who moves.
        choice: How it trains until then.
        move: The move.
        anew: Whether its round begins anew where it arrives.
    """
    weights = float(sum(load.state_bytes[choice.cut :]))
    steps = load.iterations(device)
    ahead = move.how == "foreseen" and move.notice_step(steps) < move.step(steps)
    return price(
        weights, load.moments * weights, load.between, device.network.latency_s,
        ahead=ahead, anew=anew, recut_s=_recut_s(load, device, choice.cut, move.cut),
        mirrored=mirrored_bytes(load, choice) if load.mirror else 0.0,
    )  # fmt: skip


def mirrored_bytes(load: Workload, choice: Assignment) -> float:
    """Return the bytes of a mini-batch that goes on to a shadow; 0 with nothing on the device."""
    if not choice.cut:
        return 0.0
    enters = load.crossings[choice.cut - 1]
    return float(frame_bytes(enters, load.batch_size, choice.codec_up, labels=True))


def _recut_s(load: Workload, device: Device, cut: int, after: int | None) -> float:
    """Return the seconds in which the units between two cuts go to the device, or to its edge."""
    if after is None or after == cut:
        return 0.0
    nbytes = (1 + load.moments) * sum(load.state_bytes[min(cut, after) : max(cut, after)])
    network = device.network
    rate = network.up_bits_s if after < cut else network.down_bits_s
    return 8 * nbytes / rate + 2 * network.latency_s


def moving_job(
    load: Workload, device: Device, choice: Assignment, moves: Sequence[Move], job: Job, *,
    anew: bool = False,
) -> Job:  # fmt: skip
    """Return what a device does in a round in which it moves.

    Moves are played between two mini-batches.

    Args:
        load: What is trained.
        device: Who moves.
        choice: How it trains at first.
        moves: Its moves and gaps, in their order; a gap is a move to where it is.
        job: What it would do without them.
        anew: Whether its round begins anew at each edge server that it comes to.
    """
    if choice.cut == load.units:
        return job
    made, steps = [], job.iterations
    for move in moves:
        to = dataclasses.replace(
            choice,
            edge=move.edge % len(load.edges),
            cut=choice.cut if move.cut is None else move.cut,
        )
        paid = price_of(load, device, choice, move, anew=anew)
        stays = to.edge == choice.edge
        noticed = move.notice_step(steps) if paid.ahead_s and not stays else -1
        made.append(
            LegChange(
                move.step(steps),
                move.away_s + (0.0 if stays else paid.pause_s),
                dataclasses.replace(
                    job_of(load, device, to, name=job.name), start_s=job.start_s, moves=()
                ),
                anew and not stays,
                noticed,
                paid.ahead_s,
                0 if stays else paid.bytes,
            )
        )
        choice = to
    return dataclasses.replace(job, moves=tuple(made))
