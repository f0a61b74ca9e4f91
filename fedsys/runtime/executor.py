"""``python -m fedsys.runtime.executor``: Flower's ``flower-superexec``, whose apps are forks.

Takes the same arguments. What `fedsys.runtime.forks` says about time is for these processes first
of all: one starts for each message to a client.

What is private in Flower and used here: `get_executor` of SuperExec, and the executor that it
returns for subprocesses. `tests/runtime/test_deployment.py` fails when one of them changes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedsys.runtime import forks


class ForkExecutor:
    """Runs tasks as forks of this process; in all else the executor that it wraps.

    Args:
        inner: SuperExec's own executor for subprocesses.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def launch(self, spec: Any) -> Any:
        """Start the process of a task."""
        from flwr.supercore import constant
        from flwr.supercore.superexec.executor import LaunchResult

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
        forks.fork(command, Path(os.devnull) if spec.suppress_output else None)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Take note of the processes that have ended."""
        forks.reap()


def main() -> None:
    """Run SuperExec with another executor."""
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.superexec import run_superexec

    make = vars(run_superexec)["get_executor"]  # imported there, from where it is called
    vars(run_superexec)["get_executor"] = lambda *args, **kwargs: ForkExecutor(
        make(*args, **kwargs)
    )
    forks.preload()
    flower_superexec()


if __name__ == "__main__":
    main()
