"""The part of the page about a run that is split or planned: who is cut where, and who waited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedsys.runs import cuts
from fedsys.runs.report import charts
from fedsys.runs.report.loading import Run

PICTURES = {
    "timeline.png": "Timeline of one mini-batch",
    "idle.png": "How long each waits",
}

RESOURCES = {"device": "devices", "up": "uplinks", "edge": "edge servers", "down": "downlinks"}


def section(run: Run) -> str:
    """Return what is known of devices, edge servers, links and the fleet, as HTML without a head.

    Empty for a run that is neither split nor modelled.
    """
    told = run.result.get("cuts")
    parts = [_surroundings(run.settings)]
    if isinstance(told, Mapping) and told:
        parts.append(_cut_table(told))
    pictures = [
        charts.figure(title, drawn)
        for name, title in PICTURES.items()
        if (drawn := picture(run, name, title))
    ]
    idle = run.result.get("idle")
    if isinstance(idle, Mapping) and not (run.path / "plots" / "idle.png").is_file():
        pictures.append(_idle(idle))
    parts.append(f'<div class="wide">{"".join(pictures)}</div>' if pictures else "")
    return "".join(parts)


def _surroundings(settings: Mapping[str, Any]) -> str:
    """Return lines about policy, edge servers, fleet and network."""
    rows = []
    policy = settings.get("policy.kind", "none")
    if policy != "none":
        edges = settings.get("fleet.edges")
        names = [str(edge["name"]) for edge in edges] if edges else []
        count = settings.get("num_edges", 1)
        rows.append(("policy", f"{policy}, schedule {settings.get('schedule.kind')}"))
        rows.append(("edge servers", ", ".join(names) or str(count)))
        rows.append(("link", str(settings.get("link.kind"))))
    devices = settings.get("fleet.devices")
    if isinstance(devices, Sequence) and devices:
        clients = int(settings.get("num_clients") or len(devices))
        machines = [str(devices[k % len(devices)]) for k in range(clients)]
        rows.append(("fleet", cuts.joined(machines)))
        if policy != "none":
            rows.append(("edge machines", ", ".join(map(str, settings.get("fleet.servers") or ()))))
    if rows or settings.get("network.emulate"):
        rows.append(("network", _network(settings)))
    cells = "".join(f"<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows if b)
    return f'<div class="table"><table><tbody>{cells}</tbody></table></div>' if cells else ""


def _network(settings: Mapping[str, Any]) -> str:
    name = str(settings.get("network.name", "none"))
    links = settings.get("fleet.links")
    if name == "none" and links:
        return ", ".join(str(link.get("name", "own link")) for link in links)
    up, down = settings.get("network.up_mbit_s"), settings.get("network.down_mbit_s")
    if up is None and down is None:
        return "" if name == "none" else name
    emulated = ", emulated in real time" if settings.get("network.emulate") else ""
    latency = float(settings.get("network.latency_ms") or 0.0)
    return f"{name}: {up:g} Mbit/s up, {down:g} Mbit/s down, {latency:g} ms{emulated}"


def _cut_table(told: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(line.machine or 'device')}</th>"
        f"<td>{escape(cuts.ranges(line.clients))}</td><td>{escape(line.where)}</td>"
        f"<td>{escape(line.how or '–')}</td><td>{escape(', '.join(line.edges) or '–')}</td></tr>"
        for line in cuts.alike(told)
    )
    head = "".join(
        f"<th>{name}</th>" for name in ("kind", "clients", "where it is cut", "sent in", "edge")
    )
    return (
        '<h3>Where each device is cut</h3><div class="table"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def picture(run: Run, name: str, title: str) -> str:
    """Return a picture of the run's folder within the page; empty if there is none."""
    return charts.embedded(run.path / "plots" / name, title)


def _idle(idle: Mapping[str, Any]) -> str:
    """Return bars of the share of time in which each resource waits."""
    rows = [
        (RESOURCES.get(name, name), [1.0 - float(share), float(share)])
        for name, share in idle.items()
        if isinstance(share, int | float) and 0 <= share <= 1
    ]
    return charts.portions("How long each waits", ["works", "waits"], rows)
