"""What can be set, read from the files in ``conf/`` as text, with their comments.

Help and completion need them at once; Hydra, which composes them for a run, takes seconds.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CONF = Path(__file__).resolve().parents[2] / "conf"

_LINE = re.compile(r"^( *)([\w./@-]+):(?: +(.*?))?(?: *(?<!\S)# *(.*))?$")
_SKIPPED = ("defaults", "hydra", "apps", "_target_")


@dataclass(frozen=True)
class Option:
    """One line of a file.

    Attributes:
        key: Whole name, with dots.
        value: As the file has it; empty where options are below.
        comment: What stands behind it.
    """

    key: str
    value: str
    comment: str


def options_in(text: str, prefix: str = "") -> Iterator[Option]:
    r"""Yield the options of a file of ``conf/``, in its order.

    >>> list(options_in("a: 1 # one\nb:\n  c: x"))[-1]
    Option(key='b.c', value='x', comment='')
    """
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        if (match := _LINE.match(line)) is None:
            continue
        depth, name = len(match[1]), match[2]
        above = [(d, n) for d, n in above if d < depth]
        above.append((depth, name))
        if above[0][1] in _SKIPPED or name in _SKIPPED:
            continue
        key = ".".join([*([prefix] if prefix else []), *(n for _, n in above)])
        yield Option(key, (match[3] or "").strip(), (match[4] or "").strip())


def section(name: str) -> str:
    """Return an option of ``conf/config.yaml`` with its comments and all that is below it.

    Args:
        name: With dots: ``rounds``, ``client`` or ``client.lr``; of a group, those of the choice
            that is the default.
    """
    text, group = (CONF / "config.yaml").read_text(encoding="utf-8"), name.partition(".")[0]
    if group in groups() and not re.search(rf"^{group}:", text, re.MULTILINE):
        chosen = choice_text(group, default_choice(group))
        text = f"{group}:\n{textwrap.indent(chosen, '  ')}"
    lines = text.splitlines()
    for part in name.split("."):
        lines = _block(lines, part)
    *outer, _ = name.split(".")
    head = [f"{'  ' * i}{part}:" for i, part in enumerate(outer)]
    return "\n".join([*head, *lines])


def _block(lines: Sequence[str], name: str) -> list[str]:
    """Return the line of an option and those that are deeper, up to an empty one."""
    begin = next(i for i, line in enumerate(lines) if re.match(rf" *{re.escape(name)}:", line))
    depth = _depth(lines[begin])
    end = begin + 1
    while end < len(lines) and lines[end].strip() and _depth(lines[end]) > depth:
        end += 1
    return list(lines[begin:end])


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def folders(extra: Sequence[Path] = ()) -> list[Path]:
    """Return where groups are: those of fedsys, then those of ``--config-dir``."""
    return [CONF, *extra]


def groups() -> list[str]:
    """Return the names of all groups."""
    return sorted(p.name for p in CONF.iterdir() if p.is_dir() and not p.name.startswith("_"))


def choices(group: str, extra: Sequence[Path] = ()) -> list[str]:
    """Return what can be chosen in a group."""
    found = {p.stem for folder in folders(extra) for p in (folder / group).glob("*.yaml")}
    return sorted(found)


def default_choice(group: str) -> str:
    """Return what is chosen in a group where nothing is said; empty if nothing is."""
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    match = re.search(rf"^  - {re.escape(group)}: *(\S+)", text, re.MULTILINE)
    return match[1] if match else ""


def choice_text(group: str, name: str, extra: Sequence[Path] = ()) -> str:
    """Return the file of a choice; empty if there is none."""
    for folder in reversed(folders(extra)):
        if (file := folder / group / f"{name}.yaml").is_file():
            return file.read_text(encoding="utf-8").strip()
    return ""


def options_of(group: str, name: str, extra: Sequence[Path] = ()) -> list[Option]:
    """Return the options of a choice by their whole names, those that it inherits too."""
    text = choice_text(group, name, extra)
    inherited: list[Option] = []
    for match in re.finditer(r"^  - (\w+)$", text, re.MULTILINE):
        if match[1] not in ("_self_", name):
            inherited += options_of(group, match[1], extra)
    own = list(options_in(text, "" if "@package _global_" in text else group))
    known = {option.key for option in own}
    return [*(option for option in inherited if option.key not in known), *own]


def every_option(extra: Sequence[Path] = ()) -> dict[str, Option]:
    """Return all options, of ``conf/config.yaml`` and of all choices, by their whole names."""
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    found = {option.key: option for option in options_in(text)}
    for group in groups():
        for name in choices(group, extra):
            for option in options_of(group, name, extra):
                found.setdefault(option.key, option)
    return found
