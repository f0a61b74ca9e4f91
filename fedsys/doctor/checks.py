"""What a check of the doctor says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What it is, in a word or two.
        status: ``fail`` keeps the run from going, ``warn`` does not.
        detail: What was found.
        way_out: What to do about it; empty where there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    way_out: str = ""
