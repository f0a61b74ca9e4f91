"""The ``fedsys`` command: one Hydra application per verb, all over the one ``conf/``.

Exit status: 0 the job was done, 1 it failed, 2 the call or the configuration is not usable, 130 it
was interrupted. With ``json=true`` the last line of standard output is one JSON object.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from fedsys.errors import ConfigError, FedsysError, did_you_mean

INTERRUPTED = 130

Job = Callable[[Any], Mapping[str, Any]]
"""Takes the composed configuration (a DictConfig), does the work, returns its figures.

A figure ``ok`` that is false makes the exit status 1.
"""


@dataclass(frozen=True)
class Command:
    """One verb.

    Attributes:
        module: Where its job is, imported when the verb is used.
        function: Name of the job in that module.
        help: One line for the list of commands.
        names: What may stand behind the verb, for instance the benchmarks; empty for nothing.
        paths: Word for the folders that stand behind the verb instead; empty for none.
        group: Choice of a group that holds its options; empty for none.
        aliases: Keys of the command line that are short for others.
        implied: Choices by the key of which they follow, where their group is not chosen.
        section: Part of ``conf/config.yaml`` that alone counts, which ``--help`` then shows.
    """

    module: str
    function: str
    help: str
    names: Mapping[str, str] = field(default_factory=dict)
    paths: str = ""
    group: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    implied: Mapping[str, str] = field(default_factory=dict)
    section: str = ""


COMMANDS: dict[str, Command] = {
    "train": Command("fedsys.commands.train", "job", "train a model by federated learning"),
    "edge": Command(
        "fedsys.commands.edge",
        "job",
        "hold sessions of split training for many devices, until SIGTERM or Ctrl-C",
        section="edge",
    ),
    "serve": Command(
        "fedsys.commands.serve", "job", "answer requests over HTTP by the variants of a portfolio"
    ),
    "query": Command("fedsys.commands.query", "job", "ask an endpoint what is on an image"),
    "plan": Command(
        "fedsys.commands.plan",
        "job",
        "say for each device where to cut, how long it takes, and why",
    ),
    "profile": Command(
        "fedsys.commands.profile",
        "job",
        "measure what this machine takes for a model, as fleet= reads it",
    ),
    "bench": Command(
        "fedsys.commands.bench",
        "job",
        "measure fedsys and its alternatives side by side",
        {
            "training": "a client's training against the barest PyTorch loop",
            "simulation": "the in-process grid against Flower's engine and a bare loop",
            "scale": "rounds per second and memory by the number of virtual clients",
            "start": "from the command to the first round, and from the last to the end",
            "memory": "memory over rounds with many virtual clients",
            "switch": "changing variants under load, against three alternatives",
            "prune": "exact conversion and portfolios, against Torch-Pruning and training",
            "link": "links against bare gRPC, and the share of a shaped rate in use",
            "pipeline": "plans of split training on shaped links and slow devices, or virtually",
            "planning": "how long plans take to make, and how near they are to the optimum",
            "split": "split training at every cut against the unsplit loop, and a device's memory",
            "sessions": "many sessions on an edge server against one with all cores, and memory",
            "codecs": "error, bytes and speed of each codec, and the accuracy of training with it",
        },
        aliases={"virtual": "bench.virtual"},
        implied={"data.root": "data=image_folder"},
    ),
    "prune": Command(
        "fedsys.commands.prune",
        "job",
        "make a portfolio of small dense variants of a model",
        group="variants=portfolio",
        aliases={"run": "variants.run"},
    ),
    "report": Command(
        "fedsys.commands.report",
        "job",
        "write an HTML page about a run, or about several compared",
        paths="RUN",
    ),
    "doctor": Command(
        "fedsys.commands.doctor", "job", "check whether the run can go, and say what to expect"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # ends like Ctrl-C: the run folder says so
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"fedsys {version('fedsys')}")
        return 0
    verb, *rest = arguments
    try:
        check_siblings()
        if verb not in COMMANDS:
            hint = did_you_mean(verb, COMMANDS)
            raise ConfigError(f"{verb}: no such command; {hint}see fedsys --help for all of them")
        return Invocation(verb, COMMANDS[verb]).run(rest)
    except FedsysError as error:
        return report(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        logging.shutdown()


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def entry() -> NoReturn:
    """Run the command line of this process and end it.

    A client that is still at a message, after Ctrl-C for instance, is left behind: Python would
    tear its thread down in the middle of torch's code, which aborts the process.
    """
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if any(t.daemon and t is not threading.current_thread() for t in threading.enumerate()):
        os._exit(status)
    sys.exit(status)


def report(error: FedsysError) -> int:
    """Print an error as one message, with its traceback if FEDSYS_TRACEBACK is set."""
    if os.environ.get("FEDSYS_TRACEBACK"):
        traceback.print_exception(error)
    print(f"fedsys: {error}", file=sys.stderr)
    return error.exit_status


def _overview() -> str:
    lines = ["usage: fedsys COMMAND [key=value …]", "", "commands:"]
    lines += [f"  {verb:<10} {command.help}" for verb, command in COMMANDS.items()]
    lines += [
        "",
        "fedsys COMMAND --help lists the groups and options of a command.",
        "FEDSYS_TRACEBACK=1 adds the traceback to an error.",
    ]
    return "\n".join(lines)


class Invocation:
    """One call of one command: composes the configuration by Hydra and runs the job.

    Args:
        verb: The command as typed.
        command: What it does.
    """

    def __init__(self, verb: str, command: Command) -> None:
        self.verb, self.command = verb, command
        self._results: list[Mapping[str, Any]] = []
        self._errors: list[FedsysError] = []
        self._json = False

    def run(self, arguments: list[str]) -> int:
        """Compose, run, print the result; return the exit status.

        In a sweep, a job that fails does not keep the others from running.

        Raises:
            FedsysError: Whatever went wrong, ready to be reported.
        """
        multirun = bool({"-m", "--multirun"} & set(arguments))
        overrides = self._named(arguments)
        self._hydra(overrides)
        if self._json and self._results:
            result = {"runs": self._results} if multirun else self._results[-1]
            print(json.dumps(_finite(result)), flush=True)
        if self._errors:
            for error in self._errors[:-1]:
                report(error)
            raise self._errors[-1]
        return 1 if any(result.get("ok") is False for result in self._results) else 0

    def _named(self, arguments: list[str]) -> list[str]:
        """Turn the name behind a verb (``bench training``) into the choice of a group's file."""
        if self.command.paths:
            return self._with_paths(arguments)
        if self.command.group:
            return [f"+{self.command.group}", *map(self._unaliased, arguments)]
        names = self.command.names
        given = [a for a in arguments if "=" not in a and not a.startswith(("-", "~"))]
        if not names or (not given and {"-h", "--help"} & set(arguments)):
            return arguments
        if len(given) != 1 or given[0] not in names:
            hint = did_you_mean(given[0], names) if given else ""
            listed = ", ".join(names)
            raise ConfigError(
                f"{' '.join([self.verb, *given])}: must be followed by one of {listed}; {hint}"
                f"for instance fedsys {self.verb} {next(iter(names))}"
            )
        rest = [self._unaliased(a) for a in arguments if a != given[0]]
        return [*rest, *self._implied(rest), f"+{self.verb}={given[0]}"]

    def _implied(self, arguments: list[str]) -> list[str]:
        given = {argument.partition("=")[0] for argument in arguments}
        choices = [choice for key, choice in self.command.implied.items() if key in given]
        return [choice for choice in choices if choice.partition("=")[0] not in given]

    def _unaliased(self, argument: str) -> str:
        key, equals, value = argument.partition("=")
        full = self.command.aliases.get(key) if equals else None
        return f"{full}='{value}'" if full and "=" in value else f"{full or key}{equals}{value}"

    def _with_paths(self, arguments: list[str]) -> list[str]:
        """Turn the folders behind a verb (``report RUN RUN``) into a list of its group."""
        words = [a for a in arguments if not a.startswith(("-", "~"))]
        folders = [w for w in words if "=" not in w or Path(w).exists()]
        others = [a for a in arguments if a not in folders]
        quoted = ",".join("'" + folder.replace("'", "\\'") + "'" for folder in folders)
        given = [f"{self.verb}.runs=[{quoted}]"] if folders else []
        return [f"+{self.verb}=page", *given, *others]

    def _hydra(self, arguments: list[str]) -> None:
        import hydra

        from fedsys.config import CONF, known_models, renamed, translated_errors

        arguments = [renamed(argument) for argument in arguments]
        # Hydra prints errors and exits by itself unless it is asked for the exceptions.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        outer = sys.argv
        # argparse takes overrides in one run only, so the request for help stands behind them.
        asked = [a for a in arguments if a in ("-h", "--help")]
        header = [f"hydra.help.header={self._header()}"] if asked else []
        if asked and self.command.section:
            header.append('hydra.help.template="${hydra.help.header}"')
        others = [a for a in arguments if a not in asked]
        sys.argv = [f"fedsys {self.verb}", *others, *header, *asked]
        application = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
        try:
            with translated_errors(), known_models(arguments):
                application(self._job)()
        except SystemExit as error:  # argparse refuses an option, or --help is done
            if error.code not in (0, None):
                raise ConfigError(f"{self.verb}: see fedsys {self.verb} --help") from error
        finally:
            sys.argv = outer

    def _header(self) -> str:
        names = "".join(f"\\n  {name}: {text}" for name, text in self.command.names.items())
        named = f" {self.command.paths}…" if self.command.paths else ""
        named = " NAME" if self.command.names else named
        text = f"usage: fedsys {self.verb}{named} [key=value …]\\n\\n{self.command.help}{names}"
        if self.command.section:
            text += f"\\n\\njson: false  # print JSON only\\n{_section(self.command.section)}"
        return '"' + text.replace('"', '\\"').replace("\\n", "\n") + '"'

    def _job(self, tree: Any) -> None:
        import importlib

        self._json = bool(tree.get("json"))
        job: Job = getattr(importlib.import_module(self.command.module), self.command.function)
        try:
            self._results.append(job(tree))
        except FedsysError as error:  # kept from Hydra, which would print more lines about it
            self._errors.append(error)


def _section(name: str) -> str:
    """Return a part of ``conf/config.yaml`` with its comments."""
    from fedsys.config import CONF

    _, _, rest = (CONF / "config.yaml").read_text(encoding="utf-8").partition(f"\n{name}:\n")
    lines = rest.partition("\n\n")[0]
    return f"{name}:\n{lines}"


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by null: JSON has neither."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def check_siblings() -> None:
    """Refuse to start if another distribution's `strategies`, `clients` or `conf` would be used.

    The three are top-level packages with ordinary names.

    Raises:
        ConfigError: Names the package and where it comes from.
    """
    from importlib.util import find_spec

    home = Path(__file__).resolve().parents[1]
    for name in ("strategies", "clients", "conf"):
        spec = find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin.parents[1] != home:
            raise ConfigError(
                f"package {name}: comes from {origin or 'nowhere'} instead of {home / name}; "
                "another distribution shadows it: install fedsys in an environment of its own"
            )


if __name__ == "__main__":
    entry()
