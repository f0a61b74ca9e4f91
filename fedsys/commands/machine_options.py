"""What stands behind the verbs of machines: a file or folder, and a few options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedsys.commands.arguments import Given
from fedsys.errors import ConfigError, did_you_mean


def options_of(given: Given, known: Sequence[str], verb: str) -> dict[str, str]:
    """Return the options, of those that are known and ``json``.

    Raises:
        ConfigError: There is another one.
    """
    found = {}
    for override in given.overrides:
        key, _, value = override.partition("=")
        if key not in (*known, "json"):
            hint = did_you_mean(key, known)
            takes = ", ".join(f"{name}=" for name in (*known, "json"))
            raise ConfigError(f"{override}: no such option; {hint}fedsys {verb} takes {takes}")
        found[key] = value
    return found


def path_of(given: Given, verb: str, what: str, example: str) -> Path:
    """Return the one path behind a verb.

    Raises:
        ConfigError: There is none, or more than one.
    """
    if len(given.words) != 1:
        words = " ".join([verb, *given.words])
        raise ConfigError(f"{words}: must be followed by {what}; for instance {example}")
    return Path(given.words[0])


def say(text: str) -> None:
    """Tell a person, or a log, what happens."""
    print(text, file=sys.stderr, flush=True)
