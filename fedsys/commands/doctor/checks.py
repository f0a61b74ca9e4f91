"""What a check of the doctor says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedsys.errors import FedsysError

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

    @classmethod
    def failed(cls, name: str, error: FedsysError, otherwise: str) -> Check:
        """Return what an error means: its message holds the way out behind the semicolon.

        Args:
            name: What was looked at.
            error: What it raised.
            otherwise: The way out if the message has none.
        """
        detail, _, way_out = str(error).partition("; ")
        return cls(name, "fail", detail, way_out or otherwise)
