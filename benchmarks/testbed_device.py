"""One device of a testbed, by whichever checkout ``PYTHONPATH`` names: ``testbed_device.py FILE``.

It waits before it trains, and tells as JSON when each of its mini-batches ended, in seconds of the
machine's clock. It asks nothing of a checkout but what every version has had.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from fedsys import config as configuration
from fedsys.runtime.apps import load_apps
from fedsys.runtime.local import play_local

RECORDERS = ("fedsys.runs.tracing", "fedsys.tracing")
"""Where the class Recorder is and was, whose `finished` is called after each mini-batch."""


def main(file: Path) -> None:
    """Train as a file says."""
    config = configuration.parse(file.read_text())
    ends: list[float] = []
    recorder: Any = _recorder()
    finished = recorder.finished

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        ends.append(time.monotonic())
        finished(self, *args, **kwargs)

    recorder.finished = noted
    server, client = load_apps(config)

    def waiting(message: Any, context: Any) -> Any:
        if message.metadata.message_type != "train":
            return client(message, context)
        print("ready", flush=True)
        sys.stdin.readline()
        reply = client(message, context)
        print(json.dumps({"ends": ends}), flush=True)
        return reply

    play_local(config, server, waiting)


def _recorder() -> Any:
    for name in RECORDERS:
        try:
            return importlib.import_module(name).Recorder
        except ModuleNotFoundError:
            continue
    raise SystemExit("this version has no Recorder of mini-batches")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
