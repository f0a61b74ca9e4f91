"""Figures of a run for people: what each is, with its unit, in three digits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedsys.runs.cuts import percent
from fedsys.runs.progress import seconds_text

NAMES = {
    "virtual_s": "time on the fleet (virtual)",
    "prediction_error": "error of the planned time, as a share",
    "regret": "longer than with the best choices, as a share",
    "decide_ms": "milliseconds to decide for a round",
    "probe_bytes": "sent to learn about links",
    "edge_steps": "optimizer steps on edge servers",
    "bytes_up": "sent from devices to edge servers",
    "bytes_down": "sent from edge servers to devices",
    "seconds_to_first_round": "from the command to the first round",
    "seconds_after_last_round": "from the last round to the end",
}
"""Figures by their names in ``run.json``; others are called by theirs."""

SHARES = ("sparsity", "idle", "accuracy", "share")


def name_of(key: str) -> str:
    """Return what a figure is.

    >>> name_of("virtual_s"), name_of("kept_channels")
    ('time on the fleet (virtual)', 'kept channels')
    """
    return NAMES.get(key, key.removesuffix("_s").replace("_", " "))


def figure(key: str, value: Any) -> str:
    """Return a value with its unit, which its key tells.

    >>> figure("seconds_train", 2.037874), figure("bytes_up", 33155254), figure("steps", 12345)
    ('2.04 s', '33.2 MB', '12,345')
    >>> figure("parts", {"freeze": 0.2508, "encode": 0.0041})
    'freeze 0.25 s, encode 4.1 ms'
    >>> figure("idle", 0.27108), figure("ratio", 0.27108), figure("on", True), figure("x", None)
    ('27.1%', '0.271', 'true', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):  # the parts of a pause are seconds
        kind = "_s" if key == "parts" else ""
        return ", ".join(f"{name} {figure(f'{name}{kind}', part)}" for name, part in value.items())
    if not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    words = key.split("_")
    if key.endswith("_s") or "seconds" in words:
        return seconds_text(float(value))
    if "bytes" in words:
        return bytes_text(float(value))
    if any(word in SHARES for word in words) and 0 <= value <= 1:
        return percent(float(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def bytes_text(value: float) -> str:
    """Return a number of bytes with three digits and its unit.

    >>> bytes_text(9000), bytes_text(33155254)
    ('9 kB', '33.2 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000.0
    return f"{value:.3g} TB"
