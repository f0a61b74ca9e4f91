"""The pages about the commands: what each is for, its own options with their comments, its choices.

A choice that stands on the line, as in ``fedsys train policy=auto --help``, is shown whole.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedsys.commands import options
from fedsys.commands.catalog import COMMANDS, Command

FLAGS = """\
--multirun key=a,b    run every combination
--cfg job             print the composed configuration and do nothing
--config-dir DIR      add a folder with groups of your own
--help-all            all options there are"""

EXPERIMENT = "experiment"
"""The group of which nothing is chosen by default: its files choose from the others."""

EXAMPLES = {
    "train": "fedsys train model=vgg5 data=synthetic_32x32 rounds=20 client.lr=0.05",
    "edge": "fedsys edge edge.address=tcp://127.0.0.1:9443",
    "provision": "fedsys provision fleet.yaml; folder=DIR is where the bundles go",
    "server": "fedsys server /etc/fedsys/server state=/var/lib/fedsys; unit=true prints a unit for "
    "systemd",
    "device": "fedsys device /etc/fedsys/device-0 state=/var/lib/fedsys; data=DIR names its own "
    "images, unit=true prints a unit for systemd",
    "serve": "fedsys serve portfolio=outputs/2026-11-23/09-38-22-prune",
    "query": "fedsys query input=image.png",
    "plan": "fedsys plan fleet=pi3_lab model=vgg8 network=wifi data=synthetic_32x32",
    "profile": "fedsys profile model=vgg5 data=synthetic_32x32",
    "bench": "fedsys bench link",
    "prune": "fedsys prune run=outputs/latest",
    "report": "fedsys report outputs/latest",
    "runs": "fedsys runs",
    "doctor": "fedsys doctor model=vgg5 data=cifar10",
}


def overview() -> str:
    """Return the list of commands."""
    lines = ["usage: fedsys COMMAND [key=value …]", "", "commands:"]
    lines += [f"  {verb:<10} {command.help}" for verb, command in COMMANDS.items()]
    lines += [
        "",
        "fedsys COMMAND --help shows the options of a command, --help-all all there are.",
        "fedsys completion bash (or zsh) prints what completes them in a shell.",
        "FEDSYS_TRACEBACK=1 adds the traceback to an error.",
    ]
    return "\n".join(lines)


def page(
    verb: str,
    command: Command,
    *,
    name: str = "",
    chosen: Mapping[str, str] | None = None,
    extra: Sequence[Path] = (),
    everything: bool = False,
) -> str:
    """Return the page about a command.

    Args:
        verb: The command as typed.
        command: What it does.
        name: What stands behind it, one of its names.
        chosen: Choices of the command line by group.
        extra: Folders with further groups.
        everything: Whether all options are shown, also those of other commands.
    """
    chosen = chosen or {}
    parts = [_head(verb, command, name)]
    if name or command.group:
        parts.append(_own(verb, command, name))
    keys = _top_keys() if everything else command.options
    sections = [options.section(key) for key in _merged(keys)]
    parts.append("\n".join(["json: false           # print JSON only", *_joined(sections)]))
    groups = command.groups
    if everything:
        groups = tuple(group for group in options.groups() if group != EXPERIMENT)
    if groups:
        parts.append("Choose with group=name:\n" + "\n".join(_choices(groups, chosen, extra)))
    if "policy" in groups:
        names = ", ".join(options.choices(EXPERIMENT, extra))
        parts.append(f"Choose many at once with +{EXPERIMENT}=name, as papers do: {names}")
    shown = groups if everything else [g for g in groups if g in command.whole or g in chosen]
    for group in shown:
        choice = chosen.get(group, options.default_choice(group))
        choice = _implied(command, group) or choice if group not in chosen else choice
        given = options.choice_text(group, choice, extra)
        if (text := _body(given)) and "@package _global_" in given:  # of several groups
            parts.append(f"# {group}={choice}\n{text}")
        elif text:
            parts.append(f"{group}: # {group}={choice}\n{textwrap.indent(text, '  ')}")
    if groups and not everything:
        group = "policy" if "policy" in groups else groups[0]
        name_ = "auto" if group == "policy" else options.default_choice(group)
        call = " ".join(filter(None, ["fedsys", verb, name or "NAME" * bool(command.names)]))
        parts.append(f"{call} {group}={name_} --help shows the options of that choice, too.")
    parts.append(FLAGS)
    return "\n\n".join(part for part in parts if part)


def _head(verb: str, command: Command, name: str) -> str:
    behind = f" {name or 'NAME'}" if command.names else f" {command.paths}…" * bool(command.paths)
    text = f"usage: fedsys {verb}{behind} [key=value …]\n\n{command.help}"
    if name:
        return f"{text}: {command.names[name]}"
    names = "".join(f"\n  {each}: {what}" for each, what in command.names.items())
    example = f"\n\nfor instance: {EXAMPLES[verb]}" if verb in EXAMPLES else ""
    short = "".join(f"\n{key}=… is short for {full}=…" for key, full in command.aliases.items())
    return text + names + example + (f"\n{short}" if short else "")


def _own(verb: str, command: Command, name: str) -> str:
    """Return the file with the options that are this command's alone."""
    group, _, choice = command.group.partition("=")
    group, choice = (group, choice) if command.group else (verb, name)
    return _body(options.choice_text(group, choice))


def _body(text: str) -> str:
    """Return a file without what Hydra alone reads."""
    text = re.sub(r"^# @package.*\n", "", text)
    text = re.sub(r"^defaults:\n(?:  .*\n)*\n?", "", text, flags=re.MULTILINE)
    return text.strip()


def _implied(command: Command, group: str) -> str:
    """Return what a command's own options choose in a group; empty if nothing."""
    if not command.group:
        return ""
    own, _, choice = command.group.partition("=")
    text = options.choice_text(own, choice)
    match = re.search(rf"^  - override /{group}: *(\w+)", text, re.MULTILINE)
    return match[1] if match else ""


def _choices(
    groups: Iterable[str], chosen: Mapping[str, str], extra: Sequence[Path]
) -> Iterable[str]:
    width = max(min(shutil.get_terminal_size((100, 24)).columns, 100), 40)
    for group in groups:
        default = options.default_choice(group)
        names = options.choices(group, extra)
        marked = [f"{name} (default)" if name == default else name for name in names]
        more = ", or any classifier of torchvision" if group == "model" else ""
        more = ", or a file that fedsys profile wrote" if group == "fleet" else more
        yield textwrap.fill(
            f"{group}: {', '.join(marked)}{more}",
            width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False,
        )  # fmt: skip


def _merged(keys: Sequence[str]) -> list[str]:
    """Return keys without those that are part of another one."""
    return [key for key in keys if key != "json" and key.partition(".")[0] not in
            {other for other in keys if other != key}]  # fmt: skip


def _joined(sections: Iterable[str]) -> list[str]:
    """Return sections one below the other; those of one group share its line."""
    lines: list[str] = []
    last = ""
    for section in sections:
        head, _, rest = section.partition("\n")
        block = head.endswith(":") and bool(rest)
        lines.append(rest if block and head == last else section)
        last = head if block else ""
    return lines


def _top_keys() -> list[str]:
    text = (options.CONF / "config.yaml").read_text(encoding="utf-8")
    found = [option.key for option in options.options_in(text) if "." not in option.key]
    return list(dict.fromkeys(found))
