"""A command line, sorted: flags of Hydra, options and groups, and words that are neither.

Hydra's own parser wants all its flags before the first override, or all behind the last. Here they
may stand anywhere, and an option may be written as other programs want it: ``--rounds 5``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedsys.commands.options import Option
from fedsys.errors import ConfigError, better_name, did_you_mean

WITH_VALUE = {
    **dict.fromkeys(("--cfg", "-c"), "job, hydra or all"),
    **dict.fromkeys(("--package", "-p"), "a part of the configuration"),
    **dict.fromkeys(("--config-path", "-cp"), "a folder"),
    **dict.fromkeys(("--config-name", "-cn"), "the name of a file"),
    **dict.fromkeys(("--config-dir", "-cd"), "a folder with groups of your own"),
    "--experimental-rerun": "a file of a former job",
}
"""Flags of Hydra that take a value, with what that is."""

BARE = ("--multirun", "-m", "--resolve", "--run", "-r", "--hydra-help", "--help-all")
HELP = ("-h", "--help")
INFO = ("--info", "-i")
TOPICS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


@dataclass(frozen=True)
class Given:
    """What stands behind a verb.

    Attributes:
        flags: Flags of Hydra, those with a value as ``--name=value``.
        overrides: Options and groups as Hydra reads them.
        words: What is neither: names of benchmarks, folders.
    """

    flags: tuple[str, ...]
    overrides: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def asks_for_help(self) -> bool:
        """Whether the page about the command is asked for, in short or whole."""
        return bool({*HELP, "--help-all"} & set(self.flags))

    @property
    def multirun(self) -> bool:
        """Whether every combination of values is to be run."""
        return bool({"--multirun", "-m"} & set(self.flags))

    def values(self, flag: str) -> list[str]:
        """Return the values that a flag of Hydra was given, by its long name."""
        begin = f"{flag}="
        return [given.removeprefix(begin) for given in self.flags if given.startswith(begin)]


Known = Callable[[], Mapping[str, Option]]
"""Returns all options by name; asked only where one is written as a flag."""


def read(
    arguments: Sequence[str], known: Known, aliases: Iterable[str] = (), verb: str = "train"
) -> Given:
    """Sort the arguments behind a verb.

    Args:
        arguments: As typed.
        known: All options.
        aliases: Short names of options that the command has.
        verb: The command, whose page an error names.

    Raises:
        ConfigError: A flag is unknown, or lacks its value.
    """
    flags: list[str] = []
    overrides: list[str] = []
    words: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        alias = name.lstrip("-") in aliases
        if name in WITH_VALUE:
            if not equals and not rest:
                raise ConfigError(f"{name}: must be followed by {WITH_VALUE[name]}")
            flags.append(f"{_long(name)}={value if equals else rest.pop(0)}")
        elif name in INFO:
            topic = value if equals else rest.pop(0) if rest and rest[0] in TOPICS else "all"
            flags.append(f"--info={topic}")
        elif (argument in BARE or argument in HELP) and not alias:
            flags.append(argument)
        elif re.match(r"--?[A-Za-z]", argument):
            overrides.append(_as_override(argument, rest, known(), aliases, verb))
        elif equals or argument.startswith("~"):
            overrides.append(argument)
        else:
            words.append(argument)
    _check(flags)
    return Given(tuple(flags), tuple(overrides), tuple(words))


def _check(flags: Sequence[str]) -> None:
    """Refuse flags of Hydra that exclude each other, which it answers by a traceback."""
    names = {flag.partition("=")[0] for flag in flags}
    one_of = names & {"--cfg", "--info", "--run", "-r", "--hydra-help"}
    if len(one_of) > 1:
        raise ConfigError(f"{' '.join(sorted(one_of))}: must not stand together; give one of them")
    if "--resolve" in names and not names & {"--cfg", *HELP}:
        raise ConfigError("--resolve: must stand with --cfg job")


def _long(flag: str) -> str:
    short = {"-c": "--cfg", "-p": "--package", "-cp": "--config-path", "-cn": "--config-name"}
    return {**short, "-cd": "--config-dir"}.get(flag, flag)


def _as_override(
    argument: str,
    rest: list[str],
    known: Mapping[str, Option],
    aliases: Iterable[str],
    verb: str,
) -> str:
    """Return the option that ``--key value``, ``--key=value`` or ``--key`` means.

    Takes its value off `rest`.
    """
    name, equals, value = argument.partition("=")
    key = name.lstrip("-").replace("-", "_")
    groups = {option.partition(".")[0] for option in known}
    if key not in known and key not in groups and key not in aliases:
        flags = [*WITH_VALUE, *BARE, *HELP, *(f"--{option}" for option in known)]
        hint = did_you_mean(name, [flag for flag in flags if flag.startswith("--")])
        hint = (hint or better_name(key, known)).strip() or "options are given as key=value"
        raise ConfigError(f"{verb}: see fedsys {verb} --help; there is no flag {name}; {hint}")
    if equals:
        return f"{key}={value}"
    default = known[key].value if key in known else ""
    boolean = default in ("true", "false")
    if rest and (rest[0] in ("true", "false") if boolean else _is_value(rest[0])):
        return f"{key}={rest.pop(0)}"
    if boolean:
        return f"{key}=true"
    raise ConfigError(f"{name}: must be followed by a value, as in {key}={default or 'VALUE'}")


def _is_value(argument: str) -> bool:
    return not re.match(r"--?[A-Za-z]|[+~]?[\w./@]+=", argument)
