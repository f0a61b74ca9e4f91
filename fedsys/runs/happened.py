"""What happened in a run, in words: the events of its folder, without time, kind and round."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from fedsys.runs.lines import seconds_text

Event = Mapping[str, Any]


def in_words(event: Event) -> str:
    """Return an event of ``events.jsonl`` as a line for people.

    What is of no known kind, or of another version, is shown by its names and values.

    >>> in_words({"kind": "client_lost", "round": 2, "client": 3, "reason": "it was killed"})
    'device 3 was lost: it was killed'
    >>> in_words({"kind": "resumed", "after_round": 4})
    'after round 4'
    """
    say = _KINDS.get(str(event.get("kind")))
    try:
        return _as_it_is(event) if say is None else say(event)
    except (KeyError, TypeError, ValueError):
        return _as_it_is(event)


def _moved(event: Event) -> str:
    told = f"device {event['client']} went from {event['source']} to {event['target']}"
    how = [str(event["how"])] if event.get("how") else []
    if event.get("at") is not None:
        how.append(f"at {100 * float(event['at']):.3g}% of its round")
    parts = [", ".join((told, *how))]
    paused = [f"pause {seconds_text(float(event['pause_s']))}"] if "pause_s" in event else []
    if event.get("bytes"):
        paused.append(f"{float(event['bytes']) / 1e6:.3g} MB")
    return "; ".join(filter(None, (*parts, ", ".join(paused), str(event.get("why") or ""))))


def recovery_in_words(event: Event, who: str) -> str:
    """Return what was done about a loss, or a move that came to nothing, without why.

    Args:
        event: An entry of ``recoveries`` in ``run.json``.
        who: The device, as it is called there.

    Raises:
        KeyError: It has no such entry, or is of a kind that is not known.
    """
    source, steps = event["from"], int(event["repeated_steps"])
    again = f"{steps} step{'' if steps == 1 else 's'} repeated"
    after = f"after {seconds_text(float(event['seconds']))}, {again}"
    match event["what"]:
        case "link":
            return f"{who} lost its link to {source} and went on {after}"
        case "edge":
            return f"{who} lost {source} and went on at {event['to']} {after}"
        case "repeat":
            return f"{who} lost {source} and did its round again on the {event['to']}"
        case "stays":
            return f"{who} stays at {source}, not {event['to']}"
        case "alone":
            return f"{who} trained alone: no edge server was left"
        case other:
            raise KeyError(other)


def _recovered(event: Event) -> str:
    told, why = recovery_in_words(event, f"device {event['client']}"), event.get("why")
    return f"{told}; {why}" if why else told


def _lost(event: Event) -> str:
    return f"device {event['client']} was lost: {event['reason']}"


def _diverged(event: Event) -> str:
    return f"the {event['what']} is {event['value']}: what follows trains nothing more"


def _struck(event: Event) -> str:
    fault = {name: value for name, value in event["fault"].items() if name not in ("kind", "round")}
    return f"{str(event['fault']['kind']).replace('_', ' ')}: {_as_it_is(fault)}"


_KINDS: Final[Mapping[str, Callable[[Event], str]]] = MappingProxyType(
    {
        "move": _moved,
        "recovery": _recovered,
        "client_lost": _lost,
        "diverged": _diverged,
        "fault": _struck,
    }
)


def _as_it_is(event: Event) -> str:
    shown = {
        name: value
        for name, value in event.items()
        if name not in ("time", "kind", "round") and value not in (None, "")
    }
    return ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in shown.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value.replace("_", " ") if isinstance(value, str) else json.dumps(value)
