"""``fedsys completion bash`` or ``zsh``: what completes commands, options and choices in a shell.

The shell hands the line up to the cursor to ``fedsys completion --candidates LINE`` and gets one
candidate a line; where there is none, it completes names of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsys.commands import options
from fedsys.commands.arguments import BARE, WITH_VALUE, Given
from fedsys.commands.catalog import COMMANDS, Command
from fedsys.errors import ConfigError, did_you_mean

BASH = r"""_fedsys() {
  local line="${COMP_LINE:0:COMP_POINT}" word before=
  word="${line##* }"
  mapfile -t COMPREPLY < <(fedsys completion --candidates "$line" 2>/dev/null)
  # Where = and : end a word, readline replaces what stands behind the last of them only.
  while [[ "$word" =~ ^([^=:]*[=:])(.*)$ && "$COMP_WORDBREAKS" == *"${BASH_REMATCH[1]: -1}"* ]]; do
    before+="${BASH_REMATCH[1]}" word="${BASH_REMATCH[2]}"
  done
  COMPREPLY=("${COMPREPLY[@]#"$before"}")
  if [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *= ]]; then compopt -o nospace; fi
}
complete -o default -F _fedsys fedsys
"""

ZSH = r"""#compdef fedsys
_fedsys() {
  local -a found open closed
  local line="${(j: :)words[1,CURRENT-1]} $PREFIX"
  found=("${(@f)$(fedsys completion --candidates "$line" 2>/dev/null)}")
  open=(${(M)found:#*=}) closed=(${found:#*=})
  (( $#open )) && compadd -Q -S '' -- $open
  (( $#closed )) && compadd -Q -- $closed
  if (( ! $#open && ! $#closed )); then
    compset -P '*='
    _files
  fi
}
compdef _fedsys fedsys
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH}

RUNS = ("run", "resume", "portfolio", "variants.run", "bench.run", "bench.pruned")
"""Options whose value is the folder of a run."""

OF_RUNS = ("RUN", "FOLDER")
"""What stands behind verbs that take folders of runs."""


def job(given: Given) -> Mapping[str, Any]:
    """Print the script of a shell.

    Raises:
        ConfigError: No shell is named, or one for which there is no script.
    """
    if len(given.words) != 1 or given.words[0] not in SCRIPTS:
        name = " ".join(given.words)
        raise ConfigError(
            f"completion {name}: must be followed by one of {', '.join(SCRIPTS)}; "
            f'{did_you_mean(name, SCRIPTS)}for instance eval "$(fedsys completion bash)"'
        )
    print(SCRIPTS[given.words[0]], end="")
    return {}


def candidates(line: str) -> list[str]:
    """Return what the last word of a line can become, in full.

    Args:
        line: A command line up to the cursor, with the command's own name.
    """
    _, *before, word = line.split(" ") if " " in line else ("", line)
    before = [each for each in before if each]
    if not before:
        return _beginning(word, COMMANDS)
    command = COMMANDS.get(before[0])
    if command is None:
        return []
    if before[-1] in WITH_VALUE:
        return _beginning(word, ("job", "hydra", "all")) if before[-1] in ("--cfg", "-c") else []
    if word.startswith("-"):
        flags = [flag for flag in (*WITH_VALUE, *BARE, "--help") if flag.startswith("--")]
        return _beginning(word, sorted(flags))
    key, equals, value = word.partition("=")
    if equals:
        done = f"{key}={value[: value.rfind(',') + 1]}"
        return _beginning(word, [f"{done}{each}" for each in _values(key.lstrip("+"))])
    if command.names and not set(before) & command.names.keys():
        return _beginning(word, command.names)
    found = [] if command.plain else _keys(command, before)
    return _beginning(word, [*found, *(_runs() if command.paths in OF_RUNS else ())])


def _beginning(word: str, known: Iterable[str]) -> list[str]:
    return [each for each in known if each.startswith(word)]


def _keys(command: Command, before: Sequence[str]) -> list[str]:
    """Return a command's groups and options, those of the choices on the line too."""
    chosen = dict(each.split("=", 1) for each in before if "=" in each)
    own = [f"{key}=" for key in command.aliases]
    text = "\n".join(options.section(key) for key in command.options)
    found = list(options.options_in(text))
    files = [(group, chosen.get(group, options.default_choice(group))) for group in command.groups]
    name = next((each for each in before if each in command.names), "")
    files += [(before[0], name)] if name else []
    group, _, choice = command.group.partition("=")
    files += [(group, choice)] if group else []
    for group, choice in files:
        found += options.options_of(group, choice)
    leaves = [option.key for option in found if option.value]
    return list(dict.fromkeys([
        *own, *(f"{group}=" for group in command.groups), "json=", *(f"{key}=" for key in leaves),
    ]))  # fmt: skip


def _values(key: str) -> list[str]:
    """Return the values of a group or an option, where they are known."""
    if key in options.groups():
        return options.choices(key)
    if key in RUNS:
        return _runs()
    option = options.every_option().get(key)
    if option is None:
        return []
    if option.value in ("true", "false"):
        return ["true", "false"]
    listed = re.match(r"(?:.*: )?([\w.-]+(?: \| [\w.-]+)+)", option.comment)
    return listed[1].split(" | ") if listed else []


def _runs() -> list[str]:
    outputs = Path("outputs")
    latest = [str(outputs / "latest")] if (outputs / "latest").exists() else []
    runs = [str(file.parent) for file in outputs.glob("*/*/run.json")]
    return [*latest, *sorted(runs, reverse=True)]
