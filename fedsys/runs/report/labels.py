"""What tells runs apart: names of the settings in which they differ, instead of their folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fedsys.runs.report.loading import Run, differences

LONGEST = 60
"""Characters of a name that still fits into a legend."""


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings as a few words, by the last part of their keys.

    A group's own choice is told by its name alone, and what follows from it is left out.

    >>> settings_text({"strategy._target_": "flwr.serverapp.strategy.FedProx", "client.lr": 0.1})
    'FedProx, lr 0.1'
    >>> settings_text({"network.name": "wifi", "network.source": "any", "network.up_mbit_s": 50})
    'network wifi'
    """
    chosen = {key.rpartition(".")[0] for key in settings if _names_choice(key)}
    told = []
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        if name == "_target_":
            told.append(str(value).rpartition(".")[2])
        elif _names_choice(key):
            told.append(f"{group.rpartition('.')[2]} {value}")
        elif value is not None and not any(
            group == other or group.startswith(f"{other}.") for other in chosen
        ):
            told.append(f"{name or key} {_short(value)}")
    return ", ".join(dict.fromkeys(told))


def _names_choice(key: str) -> bool:
    name = key.rpartition(".")[2]
    return name in ("_target_", "kind", "method") or key in ("data.source", "network.name")


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def labelled(runs: Sequence[Run]) -> list[Run]:
    """Return runs that are called by what differs between them, where that tells them apart.

    Args:
        runs: Two or more, with the names that they have otherwise.
    """
    found = differences(runs)
    names = [settings_text({key: values[i] for key, values in found.items()})
             for i in range(len(runs))]  # fmt: skip
    if len(set(names)) < len(runs) or not all(0 < len(name) <= LONGEST for name in names):
        return list(runs)
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]
