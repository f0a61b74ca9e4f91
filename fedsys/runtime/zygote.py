"""A zygote: a process that stays for a bundle, with the app and the data of the run in memory.

An app's process starts for each message, imports the bundle, reads the configuration, and loads the
data: most of what a short round takes on a device with a quarter of a core. One process does it
once; it is forked for each message, and whatever a message leaves behind ends with its fork.

The forks of a bundle know it by two variables of their environment, because a bundle may hold
another version of this module than the machine has installed: the first names a socket, on which
they ask for data, and the second says for which run these are there. What stays computes nothing,
so that no thread of PyTorch is missing in a fork.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fedsys.runtime import forks

SOCKET, RUN = "FEDSYS_ZYGOTE_SOCKET", "FEDSYS_ZYGOTE_RUN"
"""Variables with the file descriptor on which forks ask, and with the run whose data are there.

The latter is empty where data could not be loaded, and some may be left.
"""

MOST_BYTES = 2**20
"""Longest request."""


class Zygote:
    """The process that stays for a bundle, as seen by the executor that starts it.

    Args:
        bundle: Folder in which all of its files are.
    """

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self._asks, answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if not self._pid:
            self._asks.close()
            _stay(bundle, answers)
        answers.close()

    def start(self, command: Sequence[str], log: Path | None) -> bool:
        """Start a program in a fork of it; return whether it still was there for that."""
        request = {"command": list(command), "log": None if log is None else str(log)}
        try:
            self._asks.send(json.dumps(request).encode())
        except OSError:
            self.end()
            return False
        return True

    def end(self) -> None:
        """End it, once the forks that it has at work have ended."""
        self._asks.close()


def ask_for(run_id: int, function: str, values: Mapping[str, Any]) -> bool:
    """Have the process that stays, if there is one, call a function that loads data of a run.

    Args:
        run_id: The run; for each it is called once.
        function: ``module:name``, of the bundle.
        values: Its keywords, which must have a form in JSON.

    Returns:
        Whether this fork may have begun with data of another run, which its caches must forget.
    """
    number, run = os.environ.get(SOCKET), os.environ.get(RUN)
    if number is None or run == str(run_id):
        return False
    request = {"run": run_id, "function": function, "values": dict(values)}
    os.environ[RUN] = str(run_id)  # in this fork: it asks once
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(number))) as asks:
        asks.send(json.dumps(request).encode(), socket.MSG_DONTWAIT)
    return run is not None


def _stay(bundle: Path, answers: socket.socket) -> NoReturn:
    """Be what stays; never returns."""
    status = 1
    try:
        from fedsys.runtime.processes import end_with_parent

        end_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the process that started this one
        forks.forget_own()
        loaded = _load(bundle)
        asked, asks = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if loaded:
            os.environ[SOCKET] = str(asks.fileno())
        _serve(answers, asked, knows_app=loaded)
        status = 0
    except BaseException as error:
        print(f"what stays for {bundle.name} ends: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _load(bundle: Path) -> bool:
    """Import the client app as Flower does; return whether that worked: else each fork says why."""
    from flwr.common.config import get_project_config
    from flwr.supercore.object_ref import load_app

    try:
        app = get_project_config(bundle)["tool"]["flwr"]["app"]["components"]["clientapp"]
        load_app(app, RuntimeError, bundle)
    except (Exception, SystemExit):
        forks.forget_own()
        return False
    forks.settle()
    return True


def _serve(answers: socket.socket, asked: socket.socket, *, knows_app: bool) -> None:
    """Fork for messages and load data, until the executor closes its end."""
    while True:
        ready, _, _ = select.select([answers, asked], [], [])
        forks.reap()
        if answers in ready:  # messages come before data
            if not (request := answers.recv(MOST_BYTES)):
                break
            told = json.loads(request)
            log = None if told["log"] is None else Path(told["log"])
            forks.fork(told["command"], log, keep=knows_app)
        elif asked in ready:
            _load_data(json.loads(asked.recv(MOST_BYTES)))
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _load_data(told: Mapping[str, Any]) -> None:
    """Load what a fork asks for; where that fails, the forks load it themselves, and say why."""
    if os.environ.get(RUN) == str(told["run"]):
        return
    module, _, name = told["function"].partition(":")
    try:
        function: Callable[..., object] = getattr(importlib.import_module(module), name)
        function(**told["values"])
    except (Exception, SystemExit):
        os.environ[RUN] = ""
        return
    os.environ[RUN] = str(told["run"])
    forks.settle()
