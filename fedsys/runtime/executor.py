"""``python -m fedsys.runtime.executor``: Flower's ``flower-superexec``, whose apps are forks.

Takes the same arguments. What `fedsys.runtime.forks` says about time is for these processes first
of all: one starts for each message to a client; from the second of a bundle on, as a fork of what
stays for it (`fedsys.runtime.zygote`).

An executor asks for work again and again. With ten questions a second, those of three devices and
their SuperLink took a ninth of two cores while nothing was to be done: the longer there was none,
the longer it waits until it asks again.

What is private in Flower and used here: `get_executor` of SuperExec, the executor that it returns
for subprocesses, the clock of SuperExec, and what unpacks a bundle for an app.
`tests/runtime/test_deployment.py` and `tests/runtime/test_launch.py` fail when one of them changes.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedsys.runtime import forks
from fedsys.runtime.zygote import Zygote

APPS = ("flwr.supernode.runtime.run_clientapp", "flwr.superlink.runtime.run_serverapp")
"""The programs of apps, which unpack the bundle."""

CLIENTS_ONLY = "FEDSYS_EXECUTOR_CLIENTS_ONLY"
"""Variable that is set where the executor runs client apps alone, and so needs less memory."""

ON_DEVICE = (APPS[0], "clients.app")

WHOLE = ".whole"
"""Ends the name of an empty file beside a folder of which all files are there."""


SHARE, MOST_S = 0.05, 1.0
"""Longest wait between two questions: of the time since the last task, and in seconds."""


class Patient:
    """The module `time`, in which a sleep lasts longer the longer ago the last task was.

    A task waits for at most a twentieth of the time for which there was none, and for a second, the
    wait between two questions that Flower has.

    Args:
        clock: Stands for the module; replaced in tests.
    """

    def __init__(self, clock: Any = time) -> None:
        self._clock = clock
        self._since = clock.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clock, name)

    def begin(self) -> None:
        """Take note of a task."""
        self._since = self._clock.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleep, for longer than asked where nothing has come for long."""
        idle = self._clock.monotonic() - self._since
        self._clock.sleep(max(seconds, min(SHARE * idle, MOST_S)))


class ForkExecutor:
    """Runs tasks as forks of this process; in all else the executor that it wraps.

    Args:
        inner: SuperExec's own executor for subprocesses.
        clock: Is told of each task.
    """

    def __init__(self, inner: Any, clock: Patient) -> None:
        self._inner, self._clock = inner, clock
        self._zygote: Zygote | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def launch(self, spec: Any) -> Any:
        """Start the process of a task."""
        from flwr.supercore import constant
        from flwr.supercore.superexec.executor import LaunchResult

        self._clock.begin()
        command = [
            constant.TASK_TYPE_TO_COMMAND[spec.task_type],
            constant.TASK_TYPE_TO_APPIO_API_ADDRESS_ARG[spec.task_type],
            spec.runtime_api_address,
            "--token",
            spec.token,
            "--parent-pid",
            str(os.getpid()),
        ]
        if spec.insecure:
            command.append("--insecure")
        elif spec.root_certificates_path is not None:
            command += ["--root-certificates", spec.root_certificates_path]
        log = Path(os.devnull) if spec.suppress_output else None
        is_client = spec.task_type == constant.TaskType.CLIENT_APP
        if not (is_client and self._started(spec.fab_hash, command, log)):
            forks.fork(command, log)
        return LaunchResult.accepted()

    def _started(self, digest: str | None, command: Sequence[str], log: Path | None) -> bool:
        """Start a client app by what stays for its bundle; return whether there is any."""
        if not digest or (there := whole(digest)) is None:  # it has not been unpacked yet
            return False
        if self._zygote is not None and self._zygote.bundle != there:
            self._zygote.end()
            self._zygote = None
        if self._zygote is None:
            try:
                self._zygote = Zygote(there)
            except OSError:  # a system without such sockets, or no room for a process that stays
                return False
        if not self._zygote.start(command, log):
            self._zygote = None
        return self._zygote is not None

    def reconcile(self) -> None:
        """Take note of the processes that have ended."""
        forks.reap()


def whole(digest: str) -> Path | None:
    """Return the folder of a bundle of which all files are there, by its hash; None: not yet."""
    from flwr.common.constant import APP_DIR, FAB_HASH_TRUNCATION
    from flwr.supercore.utils import get_flwr_home

    for said in (get_flwr_home() / APP_DIR).glob(f"*.{digest[:FAB_HASH_TRUNCATION]}{WHOLE}"):
        if (there := said.with_suffix("")).is_dir():
            return there
    return None


def once(install: Callable[..., Path]) -> Callable[..., Path]:
    """Return what unpacks a bundle where it is not there yet.

    For each message, Flower's unpacks and hashes hundreds of files, and then takes what is there.
    It fills its folder while others may look at it: one counts when it is said to be whole.

    Args:
        install: Flower's.
    """

    def installed(fab_file: bytes, *args: Any, **kwargs: Any) -> Path:
        if (there := whole(hashlib.sha256(fab_file).hexdigest())) is not None:
            return there
        made = install(fab_file, *args, **kwargs)
        made.with_name(made.name + WHOLE).touch()
        return made

    return installed


def main() -> None:
    """Run SuperExec with another executor."""
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.superexec import run_superexec

    names, clock = vars(run_superexec), Patient()
    make, names["time"] = names["get_executor"], clock  # imported there, from where it is called
    names["get_executor"] = lambda *args, **kwargs: ForkExecutor(make(*args, **kwargs), clock)
    clients_only, has_libraries = CLIENTS_ONLY in os.environ, "torch" in sys.modules
    for app in APPS[: 1 if clients_only else None]:
        unpacking = vars(importlib.import_module(app))
        unpacking["install_from_fab"] = once(unpacking["install_from_fab"])
    if not has_libraries:  # else of what forked this; our own packages, each app forgets anyway
        forks.preload(ON_DEVICE if clients_only else forks.LIBRARIES)
    flower_superexec()


if __name__ == "__main__":
    main()
