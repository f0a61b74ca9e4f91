"""Hosts of a chain as forks of a process that has torch, where how they start is not the question.

Each host imported it anew: a test of the benchmark of partitions starts fourteen, which took 40
seconds of processor time. `test_own_chain` and `test_chain_processes` start them as users do, and
hosts that move in the way ``process`` start the next one so here, too.
"""

import itertools
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from fedsys.config import secret
from fedsys.runtime.processes import Processes
from tests.waiting import until

NURSERY = """
from fedsys.config import compose_text
from fedsys.runtime import forks, nursery

forks._OWN = frozenset()  # no app of another version runs in them
nursery.MODULES = ("fedsys.main", "fedsys.commands.host", "fedsys.commands.options", "hydra")
compose_text("")
nursery.main()
"""


class HostProcesses(Processes):
    """Starts commands as forks of a process that has imported what a host does."""

    def __init__(self, logs):
        self._logs, self._pids, self._vital, self._busy = logs, {}, set(), False
        with (logs / "nursery.log").open("ab") as log:
            self._nursery = subprocess.Popen(
                [sys.executable, "-P", "-c", NURSERY],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )


class HostForks:
    """What `fedsys.commands.host` needs of ``subprocess``, with forks."""

    def __init__(self, folder):
        self._folder, self._numbers, self._lock = folder, itertools.count(), threading.RLock()
        self._processes = HostProcesses(folder)
        self.PIPE, self.TimeoutExpired = subprocess.PIPE, subprocess.TimeoutExpired

    def __enter__(self):
        self._processes.__enter__()
        return self

    def __exit__(self, *_):
        self._processes.__exit__()

    def Popen(self, command, env, **_):
        assert command[1:4] == ["-m", "fedsys.main", "host"]
        name = f"host-{next(self._numbers)}"
        # it ends with the process that forked it, which is not this one
        given = [word for word in command[4:] if not word.startswith("host.parent=")]
        token = {secret.VARIABLE: env[secret.VARIABLE]}
        with self._lock:
            self._processes.start(name, ["fedsys.main", "host", *given], token)
            return ForkedHost(self, name, self._processes.pid(name), self._folder / f"{name}.log")

    def ended(self, name):
        with self._lock, suppress(KeyError):
            return self._processes.status(name)
        return -9  # it was stopped

    def stop(self, name, at_once):
        with self._lock:
            self._processes.stop([name], at_once=at_once)


class ForkedHost:
    """One of them, as `subprocess.Popen` has it."""

    returncode = None

    def __init__(self, forks, name, pid, log):
        self._forks, self._name, self.pid, self._log = forks, name, pid, log
        self.stdout = SimpleNamespace(readline=self._line, close=lambda: None)

    def _line(self):
        until(lambda: "\n" in self._said() or self._forks.ended(self._name) is not None, 300)
        return next((line for line in self._said().splitlines() if line.startswith("{")), "")

    def _said(self):
        return self._log.read_text() if self._log.exists() else ""

    def terminate(self):
        self._forks.stop(self._name, at_once=False)

    def kill(self):
        self._forks.stop(self._name, at_once=True)

    def wait(self, timeout=None):
        self.returncode = self._forks.ended(self._name)
        return self.returncode
