"""Flower's programs as forks of a process that has imported their libraries already.

Flower starts a process for each program and for each message to a client. Nearly all of the time
that takes goes into importing torch and Flower: five seconds of a desktop's core, more on a small
device, for a message that trains for one. A fork of a process that has them starts in
milliseconds.

A fork knows the libraries only: fedsys's own packages are forgotten in it, so that the app in it
is the one in the Flower App Bundle. Unix only.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

LIBRARIES = (
    "flwr.supernode.runtime.run_clientapp",
    "flwr.superlink.runtime.run_serverapp",
    "strategies.app",  # the apps stand for all libraries that they import
    "clients.app",
    "sklearn.datasets",
)
"""What is worth having in memory for the programs that run an app."""

_OWN = frozenset({"fedsys", "strategies", "clients", "conf"})


def preload(modules: Sequence[str] = LIBRARIES) -> None:
    """Import modules; those that are not installed are left to whoever needs them."""
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    settle()


def settle() -> None:
    """Have what is in memory now stay as it is, before forks.

    A collection in a fork would write to its pages, and so copy them.
    """
    gc.collect()
    gc.freeze()


def fork(
    command: Sequence[str],
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    *,
    leader: bool = False,
    keep: bool = False,
) -> int:
    """Run a program in a fork of this process and return its process id.

    Args:
        command: Name of a console script, or of a module with a `main`, and its arguments.
        log: File that gets what it prints, behind what is there; by default this process's output.
        env: Variables to set in its environment.
        leader: Whether it gets a process group of its own; it has that when this returns, so that
            a signal to the group reaches it.
        keep: Whether it keeps the packages of ours that are in memory, which are those of its app.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "." not in command[0]:
        _script(command[0])  # found once for all forks
    if leader:
        return _lead(command, log, env or {})
    pid = os.fork()
    if pid:
        return pid
    _become(command, log, env or {}, keep=keep)


def _lead(command: Sequence[str], log: Path | None, env: Mapping[str, str]) -> int:
    led, leads = os.pipe()
    pid = os.fork()
    if pid:
        os.close(leads)
        os.read(led, 1)  # nothing comes: it is closed there
        os.close(led)
        return pid
    os.setsid()
    os.close(led)
    os.close(leads)
    _become(command, log, env)


def reap() -> dict[int, int]:
    """Return the exit status of every child that has ended since the last call."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
    return ended


def forget_own() -> None:
    """Forget our own packages, so that those of an app's bundle are imported."""
    for name in [n for n in sys.modules if n.partition(".")[0] in _OWN]:
        del sys.modules[name]


def _become(
    command: Sequence[str], log: Path | None, env: Mapping[str, str], *, keep: bool = False
) -> NoReturn:
    """Turn this fork into a program; never returns."""
    status = 1
    try:
        from fedsys.runtime.processes import end_with_parent

        end_with_parent()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(env)
        _redirect(log)
        if not keep:
            forget_own()
        sys.argv = list(command)
        status = _status(_program(command[0])())
    except SystemExit as end:
        status = _status(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):  # a full disk must not keep the process alive
            sys.stdout.flush()
            sys.stderr.flush()
        # Not sys.exit: the handlers and threads of the process that was forked are not ours.
        os._exit(status)


def _program(name: str) -> Callable[[], object]:
    if "." in name:
        found: Callable[[], object] = importlib.import_module(name).main
        return found
    loaded: Callable[[], object] = _script(name).load()
    return loaded


@functools.lru_cache
def _script(name: str) -> metadata.EntryPoint:
    """Return where a console script is, for which all distributions are looked through."""
    (script,) = metadata.entry_points(group="console_scripts", name=name)
    return script


def _redirect(log: Path | None) -> None:
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    if log is not None:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)


def _status(code: object) -> int:
    return code if isinstance(code, int) else int(code is not None)
