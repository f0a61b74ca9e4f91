"""The ``fedsys`` command: one Hydra application per verb, all over the one ``conf/``.

Exit status: 0 the job was done, 1 it failed, 2 the call or the configuration is not usable, 130 it
was interrupted. With ``json=true`` the last line of standard output is one JSON object.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedsys import __version__
from fedsys.commands.catalog import COMMANDS, Command
from fedsys.errors import ConfigError, FedsysError, did_you_mean, extras_named
from fedsys.runs import opening

if TYPE_CHECKING:
    from fedsys.commands.arguments import Given

__all__ = ["COMMANDS", "check_siblings", "entry", "main", "report"]

INTERRUPTED = 130

Job = Callable[[Any], Mapping[str, Any]]
"""Takes the composed configuration (a DictConfig), does the work, returns its figures.

A figure ``ok`` that is false makes the exit status 1.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # ends like Ctrl-C: the run folder says so
    if not arguments or arguments[0] in ("-h", "--help", "--help-all", "help"):
        from fedsys.commands.help import overview

        print(overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fedsys {__version__}")
        return 0
    if arguments[:2] == ["completion", "--candidates"]:  # a shell asks
        from fedsys.commands.completion import candidates

        for candidate in candidates(" ".join(arguments[2:])):
            print(candidate)
        return 0
    verb, *rest = arguments
    try:
        check_siblings()
        if verb not in COMMANDS:
            hint = did_you_mean(verb, COMMANDS)
            raise ConfigError(f"{verb}: no such command; {hint}see fedsys --help for all of them")
        with extras_named():
            return Invocation(verb, COMMANDS[verb]).run(rest)
    except FedsysError as error:
        return report(error)
    except KeyboardInterrupt as error:
        opening.clear()
        print(f"interrupted{f'; {error}' if str(error) else ''}", file=sys.stderr)
        return INTERRUPTED
    finally:
        opening.clear()
        if (logging := sys.modules.get("logging")) is not None:
            logging.shutdown()


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def entry() -> NoReturn:
    """Run the command line of this process and end it.

    A client that is still at a message, after Ctrl-C for instance, is left behind: Python would
    tear its thread down in the middle of torch's code, which aborts the process.
    """
    try:
        status = main()
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # whoever reads has seen enough: fedsys train --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    if any(t.daemon and t is not threading.current_thread() for t in threading.enumerate()):
        os._exit(status)
    sys.exit(status)


def report(error: FedsysError) -> int:
    """Print an error as one message, with its traceback if FEDSYS_TRACEBACK is set."""
    opening.clear()
    if os.environ.get("FEDSYS_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    print(f"fedsys: {error}", file=sys.stderr)
    return error.exit_status


class Invocation:
    """One call of one command: composes the configuration by Hydra and runs the job.

    Args:
        verb: The command as typed.
        command: What it does.
    """

    def __init__(self, verb: str, command: Command) -> None:
        from fedsys.commands.sweep import Sweep

        self.verb, self.command = verb, command
        self._sweep = Sweep([])
        self._multirun = self._json = False

    def run(self, arguments: Sequence[str]) -> int:
        """Compose, run, print the result; return the exit status.

        In a sweep, a job that fails does not keep the others from running.

        Raises:
            FedsysError: Whatever went wrong, ready to be reported.
        """
        from fedsys.commands.arguments import read
        from fedsys.commands.options import every_option

        given = read(arguments, every_option, self.command.aliases, self.verb)
        if given.asks_for_help:
            print(self._page(given))
            return 0
        if self.command.plain:
            return self._plain(given)
        opening.say(f"fedsys {self.verb}: composing the configuration")
        self._multirun = given.multirun
        if given.multirun and given.values("--cfg"):
            return self._print_each(given)
        try:
            self._hydra(given.flags, self._overrides(given))
        finally:
            if self._multirun and self.command.sweeps and self._sweep.ends:
                self._conclude()
        results = [end for end in self._sweep.ends if isinstance(end, Mapping)]
        errors = [end for end in self._sweep.ends if isinstance(end, FedsysError)]
        if self._json and results:
            result = {"runs": results} if given.multirun else results[-1]
            _print_json(result)
        if errors:
            for error in errors[:-1]:
                report(error)
            raise errors[-1]
        return 1 if any(result.get("ok") is False for result in results) else 0

    def _conclude(self) -> None:
        """Print what became of a sweep, also of one that was interrupted."""
        stream = sys.stderr if self._json else sys.stdout
        for text in (f"\n{self._sweep.table()}", self._sweep.report_line()):
            if text:
                print(text, file=stream, flush=True)

    def _print_each(self, given: Given) -> int:
        """Print the configuration of each run of a sweep, which Hydra does of a single one only."""
        from fedsys.config import sweeping, translated_errors

        flags = [flag for flag in given.flags if flag not in ("-m", "--multirun")]
        overrides = self._overrides(given)
        with translated_errors(), sweeping(overrides) as runs:
            pass
        for number, values in enumerate(runs, 1):
            fixed = [o for o in overrides if o.lstrip("+").partition("=")[0] not in values]
            opening.clear()
            print(f"---\n# run {number}/{len(runs)}", flush=True)
            self._hydra(flags, [*fixed, *(f"{key}={value}" for key, value in values.items())])
        return 0

    def _page(self, given: Given) -> str:
        from fedsys.commands import help as pages

        name = next((word for word in given.words if word in self.command.names), "")
        chosen = dict(o.lstrip("+").split("=", 1) for o in given.overrides if "=" in o)
        return pages.page(
            self.verb,
            self.command,
            name=name,
            chosen=chosen,
            extra=[Path(folder) for folder in given.values("--config-dir")],
            everything="--help-all" in given.flags,
        )

    def _plain(self, given: Given) -> int:
        result = self._function()(given)
        if "json=true" in given.overrides:
            _print_json(result)
        return 0

    def _overrides(self, given: Given) -> list[str]:
        """Return what Hydra composes: what was given, and what stands behind the verb for it."""
        if self.command.paths:
            return self._with_paths(given)
        if self.command.names:
            return self._with_name(given)
        if given.words:
            raise ConfigError(
                f"{given.words[0]}: must be written as key=value or group=name; "
                f"see fedsys {self.verb} --help"
            )
        group = [f"+{self.command.group}"] if self.command.group else []
        return [*group, *map(self._unaliased, given.overrides)]

    def _with_name(self, given: Given) -> list[str]:
        """Turn the name behind a verb (``bench training``) into the choice of a group's file."""
        names, words = self.command.names, given.words
        if len(words) != 1 or words[0] not in names:
            hint = did_you_mean(words[0], names) if words else ""
            raise ConfigError(
                f"{' '.join([self.verb, *words])}: must be followed by one of {', '.join(names)}; "
                f"{hint}for instance fedsys {self.verb} {next(iter(names))}"
            )
        rest = [self._unaliased(override) for override in given.overrides]
        return [*rest, *self._implied(rest), f"+{self.verb}={words[0]}"]

    def _implied(self, arguments: list[str]) -> list[str]:
        given = {argument.partition("=")[0] for argument in arguments}
        choices = [choice for key, choice in self.command.implied.items() if key in given]
        return [choice for choice in choices if choice.partition("=")[0] not in given]

    def _unaliased(self, argument: str) -> str:
        key, equals, value = argument.partition("=")
        full = self.command.aliases.get(key) if equals else None
        return f"{full}='{value}'" if full and "=" in value else f"{full or key}{equals}{value}"

    def _with_paths(self, given: Given) -> list[str]:
        """Turn the folders behind a verb (``report RUN RUN``) into a list of its group."""
        odd = [o for o in given.overrides if Path(o).exists()]  # a folder with = in its name
        folders = [*given.words, *odd]
        quoted = ",".join("'" + folder.replace("'", "\\'") + "'" for folder in folders)
        runs = [f"{self.verb}.runs=[{quoted}]"] if folders else []
        return [f"+{self.command.group}", *runs, *(o for o in given.overrides if o not in odd)]

    def _hydra(self, flags: Sequence[str], overrides: Sequence[str]) -> None:
        import hydra

        from fedsys.config import (
            CONF,
            known_models,
            renamed,
            secret,
            sweeping,
            swiftly,
            translated_errors,
        )

        arguments = [renamed(override) for override in overrides]
        # Hydra prints errors and exits by itself unless it is asked for the exceptions.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        outer = sys.argv
        sys.argv = [f"fedsys {self.verb}", *flags, *arguments]
        application = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
        try:
            several = arguments if self._multirun else ()
            kept = secret.out_of(Path("multirun.yaml"), several)  # Hydra writes what was given
            more = [flag for flag in flags if flag not in ("-m", "--multirun")]
            with (
                translated_errors(),
                known_models(arguments),
                sweeping(several) as runs,
                kept,
                swiftly(arguments, more),
            ):
                self._sweep.runs = runs
                application(self._job)()
        except SystemExit as error:  # argparse refuses an option
            if error.code not in (0, None):
                raise ConfigError(f"{self.verb}: see fedsys {self.verb} --help") from error
        finally:
            sys.argv = outer

    def _function(self) -> Callable[..., Mapping[str, Any]]:
        import importlib

        module = importlib.import_module(self.command.module)
        function: Callable[..., Mapping[str, Any]] = getattr(module, self.command.function)
        return function

    def _job(self, tree: Any) -> None:
        from fedsys.config import given_keys, secret

        self._json = bool(tree.get("json"))
        if self._multirun and self.command.sweeps:
            opening.clear()
            print(self._sweep.heading(), file=sys.stderr, flush=True)
        opening.say(f"fedsys {self.verb}: starting")
        secret.warn_of(given_keys())
        try:
            job: Job = self._function()
            opening.clear()
            with extras_named():
                self._sweep.ends.append(job(tree))
        except FedsysError as error:  # kept from Hydra, which would print more lines about it
            self._sweep.ends.append(error)


def _print_json(result: object) -> None:
    import json

    print(json.dumps(_finite(result)), flush=True)


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
