"""A run of fedsys whose rounds begin when they are asked for, for the benchmark ``simulators``.

``python -m fedsys.commands.bench.simulators_fedsys FILE`` carries out the configuration in a file,
in the runtime that stands there. It speaks by lines of JSON: one on standard output when it is
ready and one after each round, which begins when a line comes on standard input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from fedsys import config as configuration
from fedsys import runtime
from fedsys.runs.callbacks import listening


class Gate:
    """A callback that tells that a round is over, and waits until the next one is asked for.

    Args:
        asked: A line for each round.
        out: Gets what is told.
    """

    def __init__(self, asked: TextIO, out: TextIO) -> None:
        self._asked, self._out, self._rounds = asked, out, 0

    def start(self, rounds: int, done: int) -> None:
        """Tell that everything is ready."""
        self._rounds = rounds
        self._say(done=done)
        self._asked.readline()

    def round(self, row: Mapping[str, Any]) -> None:
        """Tell the loss on the validation part, and what was done."""
        self._say(round=row["round"], loss=row["val_loss"], steps=row["steps"])
        if row["round"] < self._rounds:
            self._asked.readline()

    def end(self, figures: Mapping[str, Any] | None) -> None:
        """Do nothing: the folder of the run says how it ended."""

    def _say(self, **told: Any) -> None:
        self._out.write(json.dumps(told) + "\n")
        self._out.flush()


def main(file: Path) -> None:
    """Carry a run out."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is not for who asks for rounds
    with listening([Gate(sys.stdin, out)]):
        runtime.run(configuration.parse(file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
