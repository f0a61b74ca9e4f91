"""Where the devices of a run are cut, in words: one line for all that do the same.

What is put into words are the entries of ``cuts`` in a run's result, by partition id: ``index`` of
the cut, ``unit`` before it, ``device_share`` of the work, and where they are known ``machine``,
``edge``, ``micro_batches`` and ``codec``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Cut = Mapping[str, Any]


@dataclass(frozen=True)
class Alike:
    """Devices of one kind that do the same.

    Attributes:
        machine: Kind of device; empty where none is modelled.
        clients: Their partition ids, ascending.
        where: Where they are cut.
        how: Pieces of a mini-batch and codec; empty where nothing is sent.
        edges: Names of their edge servers.
    """

    machine: str
    clients: tuple[int, ...]
    where: str
    how: str
    edges: tuple[str, ...]

    def __str__(self) -> str:
        count = "client" if len(self.clients) == 1 else "clients"
        who = f"{count} {ranges(self.clients)}"
        parts = [self.where, self.how, ", ".join(self.edges)]
        told = "; ".join(part for part in parts if part)
        return f"{self.machine} ({who}): {told}" if self.machine else f"{who}: {told}"


def alike(cuts: Mapping[str, Cut]) -> list[Alike]:
    """Return what is done, by kind of device, in the order of the first client of each.

    Args:
        cuts: Entries by partition id.
    """
    groups: dict[tuple[str, str, str], list[str]] = {}
    for client in sorted(cuts, key=int):
        cut = cuts[client]
        groups.setdefault((str(cut.get("machine") or ""), where(cut), how(cut)), []).append(client)
    return [
        Alike(
            machine,
            tuple(int(client) for client in clients),
            place,
            manner,
            tuple(dict.fromkeys(str(e) for c in clients if (e := cuts[c].get("edge")))),
        )
        for (machine, place, manner), clients in groups.items()
    ]


def where(cut: Cut) -> str:
    """Return where a device is cut.

    >>> where({"index": 2, "unit": "conv2", "device_share": 0.1234})
    'cut 2 after conv2, 12.3% of the work on the device'
    >>> where({"index": 5, "unit": "fc", "device_share": 1.0})
    'the whole model on the device'
    """
    share = cut.get("device_share")
    if share is not None and share >= 1.0:
        return "the whole model on the device"
    after = f" after {cut['unit']}" if cut.get("unit") else ""
    work = "" if share is None else f", {percent(float(share))} of the work on the device"
    return f"cut {cut.get('index')}{after}{work}"


def how(cut: Cut) -> str:
    """Return how a mini-batch is sent; empty for a device that trains alone.

    >>> how({"device_share": 0.1, "micro_batches": 4, "codec": "fp32"})
    '4 pieces, fp32'
    """
    if float(cut.get("device_share", 0.0)) >= 1.0:
        return ""
    number, codec = cut.get("micro_batches"), cut.get("codec")
    pieces = "" if number is None else "one piece" if number == 1 else f"{number} pieces"
    return ", ".join(str(part) for part in (pieces, codec) if part)


def percent(share: float) -> str:
    """Return a share with three digits.

    >>> percent(0.1234), percent(0.00123), percent(1.0), percent(0.0)
    ('12.3%', '0.123%', '100%', '0%')
    """
    return f"{100 * share:.3g}%"


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers, runs of three and more by their ends.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0 to 2, 5, 7, 8'
    """
    return ", ".join(_runs(numbers))


def _runs(numbers: Sequence[int]) -> Iterable[str]:
    begin = 0
    for end in range(1, len(numbers) + 1):
        if end < len(numbers) and numbers[end] == numbers[end - 1] + 1:
            continue
        if end - begin >= 3:
            yield f"{numbers[begin]} to {numbers[end - 1]}"
        else:
            yield from map(str, numbers[begin:end])
        begin = end


def joined(names: Sequence[str]) -> str:
    """Return names with their number, in the order of first appearance.

    >>> joined(["pi4", "pi3", "pi4"])
    '2 pi4, 1 pi3'
    """
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
