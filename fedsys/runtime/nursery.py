"""``python -m fedsys.runtime.nursery [--device] [FOLDER…]``: starts programs as forks.

For `fedsys.runtime.processes.Processes`. Reads one JSON object per line from standard input and
answers each with one line::

    {"start": ["flower-superlink", …], "log": "FILE", "env": {}}     {"pid": 4711}
    {"preload": true}                                                {}
    {"poll": true}                                                   {"ended": {"4711": 0}}

A SuperLink needs no torch, and is started before that is preloaded for the programs that run apps:
on two cores, the two go on at the same time.

Ends, with everything that it started, when standard input ends: also when whoever holds the other
end was killed. Then it removes the folders that it was given, which hold secrets: nobody else is
left to do so.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from fedsys.runtime import forks

MODULES = (
    "flwr.supercore.cli.flower_superexec",
    "flwr.superlink.cli.flower_superlink",
    "flwr.superlink.main",
    "flwr.supernode.cli.flower_supernode",
    "flwr.supernode.main",
)

DEVICE = "--device"
"""First argument where nothing but a device's programs is started: the others cost it memory."""

ON_DEVICE = (
    "flwr.supercore.cli.flower_superexec",
    "flwr.supernode.cli.flower_supernode",
    "flwr.supernode.main",
)


def main() -> None:
    """Serve requests until standard input ends."""
    device = DEVICE in sys.argv[1:2]
    # Ctrl-C is for the process that asks; it decides what ends when.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    forks.preload(ON_DEVICE if device else MODULES)
    children: dict[int, int | None] = {}
    print(json.dumps({"ready": True}), flush=True)
    while line := sys.stdin.readline():
        print(json.dumps(_answer(json.loads(line), children)), flush=True)
    for pid, status in children.items():
        if status is None:
            os.killpg(pid, signal.SIGKILL)
    for folder in sys.argv[2 if device else 1 :]:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # Python would take seconds to tear down what was imported for the forks


def _answer(request: dict[str, Any], children: dict[int, int | None]) -> dict[str, Any]:
    if "start" in request:
        pid = forks.fork(request["start"], Path(request["log"]), request["env"], leader=True)
        children[pid] = None
        return {"pid": pid}
    if "preload" in request:
        forks.preload()
        return {}
    children.update(forks.reap())
    return {"ended": {str(pid): status for pid, status in children.items() if status is not None}}


if __name__ == "__main__":
    main()
