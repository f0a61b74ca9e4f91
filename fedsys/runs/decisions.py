"""``decisions.csv`` in the run folder: what was decided for each device in each round, and why.

A line has the choice, what was seen of the device before, the reason, what was expected and what
came of it, and beside them what the oracle would have done (`fedsys.planning.oracle`). Cells are
empty where something is not known: rates before the first round, the oracle where time is real.
``plan.json`` beside it has what devices do in the round that goes on, of which nothing is known yet
but that.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsys.files import append, whole_lines, write_atomic
from fedsys.runs.scalars import to_cell
from fedsys.runs.table import csv_text, read_table

FILE = "decisions.csv"
PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class OffloadDecision:
    """What was decided for one device in one round; None for what is not known.

    Attributes:
        round: The round, from 1.
        client: Partition id.
        machine: Its machine in the fleet file; empty for none.
        cut: Units on the device.
        unit: Name of the last of these; empty for none.
        whole: Whether that is all of the model.
        device_share: Their share of the work.
        pieces: Micro-batches of a mini-batch.
        codec: Up, or up and down with a stroke; empty for a whole model.
        edge: Name of the edge server; empty for a whole model.
        iteration_s: Seen before deciding: seconds of an iteration.
        compute_s: Likewise, in which the device computed.
        edge_s: Likewise, in which its edge computed for it.
        seen_up_mbit_s: Likewise, rate to the edge, in Mbit/s.
        seen_down_mbit_s: Likewise, from it.
        up_mbit_s: Mean of the true rate to the edge over the round, in Mbit/s.
        down_mbit_s: Likewise, from it.
        reason: Why, in a sentence.
        predicted_s: Seconds of its round that were expected.
        measured_s: Seconds that it took.
        oracle_cut: Cut that the oracle would have chosen.
        oracle_unit: Name of the unit before it; empty for none.
        oracle_share: Share of the work on the device with it.
        oracle_pieces: Micro-batches.
        oracle_codec: Codec; empty for a whole model.
        oracle_edge: Edge server; empty for a whole model.
        oracle_s: Seconds of its round with what the oracle would have chosen for all.
    """

    round: int
    client: int
    machine: str
    cut: int
    unit: str
    whole: bool
    device_share: float
    pieces: int
    codec: str
    edge: str
    iteration_s: float | None = None
    compute_s: float | None = None
    edge_s: float | None = None
    seen_up_mbit_s: float | None = None
    seen_down_mbit_s: float | None = None
    up_mbit_s: float | None = None
    down_mbit_s: float | None = None
    reason: str = ""
    predicted_s: float | None = None
    measured_s: float | None = None
    oracle_cut: int | None = None
    oracle_unit: str = ""
    oracle_share: float | None = None
    oracle_pieces: int | None = None
    oracle_codec: str = ""
    oracle_edge: str = ""
    oracle_s: float | None = None


COLUMNS = tuple(field.name for field in dataclasses.fields(OffloadDecision))


def write(folder: Path, decisions: Sequence[OffloadDecision]) -> None:
    """Append decisions to the file in the folder of a run.

    Raises:
        RunError: The file cannot be written.
    """
    if not decisions:
        return
    path = folder / FILE
    lines = [] if whole_lines(path) else [list(COLUMNS)]
    lines += [[to_cell(getattr(entry, name)) for name in COLUMNS] for entry in decisions]
    append(path, csv_text(lines))


def read(folder: Path) -> list[OffloadDecision]:
    """Return the decisions of a run; none if it made none.

    Raises:
        RunError: The file cannot be read.
        ValueError: It is damaged.
    """
    table = read_table(folder / FILE)
    rows = table.rows
    if table.problems:
        raise ValueError(f"{folder / FILE} is damaged: {table.problems[0]}")
    if rows and tuple(rows[0]) != COLUMNS:
        raise ValueError(f"{folder / FILE} has other columns than those of this version")
    return [OffloadDecision(**{n: _value(n, cell) for n, cell in row.items()}) for row in rows]


def forget(folder: Path, after_round: int) -> None:
    """Drop the decisions of later rounds, which a run that continues makes again.

    Raises:
        RunError: The file cannot be read or written.
    """
    path = folder / FILE
    table = read_table(path)
    kept = [row for row in table.rows if float(row["round"]) <= after_round]
    if len(kept) < len(table.rows) or table.problems:
        write_atomic(path, csv_text([COLUMNS, *(row.values() for row in kept)]) if kept else b"")


def write_plan(folder: Path, number: int, cuts: Mapping[str, Mapping[str, Any]]) -> None:
    """Say in the folder of a run what devices do in a round that has begun.

    Args:
        folder: Of the run.
        number: The round, from 1.
        cuts: Where each device is cut, by partition id, as `fedsys.runs.cuts` puts it into words.

    Raises:
        RunError: The file cannot be written.
    """
    text = json.dumps({"round": number, "cuts": cuts})
    write_atomic(folder / PLAN_FILE, f"{text}\n".encode())


def read_plan(folder: Path) -> tuple[int, dict[int, dict[str, Any]]]:
    """Return the round that was planned last, and where each device is cut in it.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged.
    """
    try:
        plan = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
        return int(plan["round"]), {int(k): dict(cut) for k, cut in plan["cuts"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / PLAN_FILE} is damaged: {error!r}") from error


def _value(name: str, cell: str) -> Any:
    kind = _KINDS[name]
    if kind is str:
        return cell
    if not cell:
        return None
    return bool(int(cell)) if kind is bool else kind(cell)


def _bare(kind: Any) -> Any:
    """Return the type of a value that may be None."""
    if isinstance(kind, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    return kind


_KINDS = {name: _bare(kind) for name, kind in typing.get_type_hints(OffloadDecision).items()}
