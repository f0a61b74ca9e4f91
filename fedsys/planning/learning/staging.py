"""The stages of devices at cuts, by what is known of them: what closed forms are given."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.contention import Indices, alone_s
from fedsys.planning.learning.knowing import CutTable, Knowledge, Rows
from fedsys.planning.workload import Array, StageTimes


@dataclass(frozen=True)
class Setup:
    """R devices at C cuts by Q courses: all that does not depend on what is known of them.

    Attributes:
        rows: The devices.
        share: Share of the work on the device, ``(R, C)``.
        away: Which cuts leave work to an edge, ``(R, C)``.
        held_bits: Bits of the device's part of the model, ``(R, C)``.
        depth: Pieces in flight at most; None: all.
        offloaded: As `away`, ``(R, C, Q)``.
        pieces: Micro-batches.
        part: One over them.
        up_bits: Bits of a piece that a device sends.
        down_bits: And receives.
        sending_s: Seconds of the device for a forward beside its work.
        receiving_s: Seconds for a backward.
        rest: Share of the work that the edge has in a piece.
        serving_s: Seconds of the edge for a piece beside that.
        latency_s: One way.
        zeros: Nothing, of that shape.
    """

    rows: Rows
    share: Array
    away: NDArray[np.bool_]
    held_bits: Array
    depth: int | None
    offloaded: NDArray[np.bool_]
    pieces: Array
    part: Array
    up_bits: Array
    down_bits: Array
    sending_s: Array
    receiving_s: Array
    rest: Array
    serving_s: Array
    latency_s: Array
    zeros: Array

    @classmethod
    def of(cls, table: CutTable, rows: Rows) -> Setup:
        """Return the setup of some devices."""
        count = len(rows.fleet)
        shape = (count, table.share.shape[-1], len(table.pieces))
        share = np.broadcast_to(table.share, shape[:2])
        offloaded = np.broadcast_to(table.up_bits > 0, shape)
        pieces = np.where(offloaded, table.pieces, 1.0)
        part = 1.0 / pieces
        up, down = table.up_bits * part, table.down_bits * part
        bit_s, message_s = rows.bit_s[:, None, :], rows.message_s[:, None, None]
        fixed = rows.piece_s[:, None, None] + np.where(offloaded, message_s, 0.0)
        serving = 2 * rows.edge_piece_s[:, None, None] + rows.edge_bit_s[:, None, :] * (up + down)
        made = cls(
            rows,
            share,
            offloaded[:, :, 0],
            np.broadcast_to(table.held_bits, shape[:2]),
            table.depth,
            offloaded,
            pieces,
            part,
            up,
            down,
            bit_s * up + fixed,
            bit_s * down + fixed,
            (1.0 - share)[:, :, None] * part,
            np.where(offloaded, serving, 0.0),
            np.where(offloaded, rows.latency_s[:, None, None], 0.0),
            np.zeros(shape),
        )
        # In one piece of memory each: `at` counts on that to be quick
        whole: dict[str, Any] = {
            name: np.ascontiguousarray(value)
            for name, value in vars(made).items()
            if isinstance(value, np.ndarray)
        }
        return dataclasses.replace(made, **whole)

    def at(self, cut: Indices, course: Indices) -> Setup:
        """Return the setup in which each device has one cut and one course."""
        count, cuts, courses = self.zeros.shape
        flat = np.arange(count) * cuts + cut
        deep, made = flat * courses + course, {}
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                value = value.reshape(-1).take(deep if value.ndim == 3 else flat)
            made[name] = value
        return Setup(**made)


def stages(setup: Setup, known: Knowledge, works_s: Array) -> StageTimes:
    """Return the stages of each device at each cut by each course, ``(R, C, Q)``.

    Args:
        setup: Devices and cuts; of one cut and course each, shapes are ``(R,)``.
        known: Rates of links, and what edges take.
        works_s: Seconds of work on the device at each cut, ``(R, C)``.
    """
    several = setup.part.ndim == 3
    one = (slice(None), None, None) if several else slice(None)
    third = (works_s[:, :, None] if several else works_s) * setup.part / 3
    zeros = setup.zeros
    return StageTimes(
        forward=third + setup.sending_s,
        up=setup.up_bits * known.up_bit_s[one],
        edge=setup.rest * known.edge_s[one] + setup.serving_s,
        down=setup.down_bits * known.down_bit_s[one],
        backward=2 * third + setup.receiving_s,
        pieces=setup.pieces,
        device_update=zeros,
        edge_update=zeros,
        load=np.broadcast_to(known.load_s[one], zeros.shape),
        latency=setup.latency_s,
        offloaded=setup.offloaded,
    )


@dataclass(frozen=True)
class Forecast:
    """What is expected of each device at each cut by each course, with an edge to itself.

    Attributes:
        stages: The stages, ``(R, C, Q)``.
        alone_s: Seconds of an iteration, ``(R, C, Q)``.
    """

    stages: StageTimes
    alone_s: Array

    @classmethod
    def of(cls, setup: Setup, known: Knowledge) -> Forecast:
        """Return what is expected by what is known."""
        s = stages(setup, known, known.works_s(setup.share))
        return cls(s, alone_s(s, setup.depth))


def stages_at(setup: Setup, known: Knowledge, cut: Indices, course: Indices) -> StageTimes:
    """Return the stages of each device at one cut by one course, ``(R,)``."""
    works = known.works_s(setup.share)[np.arange(len(cut)), cut]
    return stages(setup.at(cut, course), known, works)
