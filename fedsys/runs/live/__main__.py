"""``python -m fedsys.runs.live WHAT HOST:PORT ABOUT``: the process that serves a live page.

WHAT is the folder of a run, or the address of an endpoint, of which ABOUT is what does not change,
as JSON (`fedsys.runs.live.served.AboutServed`).

The token stands in ``FEDSYS_CONTROL_TOKEN``. One line of JSON on standard output says where the
page is, or why there is none. The process ends when standard input does: with the run, whatever
ends that. If somebody is looking, it stays until they have seen how a run ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

from fedsys.config.secret import VARIABLE
from fedsys.errors import FedsysError
from fedsys.runs.live.server import OF_ENDPOINT, LivePage
from fedsys.runs.live.snapshot import Snapshots

LOOKING_S: Final = 5.0
"""Who asked within so many seconds is looking, and gets as many to see the end."""


def main() -> int:
    """Serve until the run ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run
    os.nice(10)
    what, address, about = sys.argv[1:]
    try:
        page = _page(what, address, about)
    except FedsysError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return error.exit_status
    print(json.dumps({"address": page.address}), flush=True)
    while sys.stdin.buffer.read(1 << 10):
        pass
    deadline = time.monotonic() + LOOKING_S
    while page.told in ("", "running") and time.monotonic() < deadline:
        if not page.asked or time.monotonic() - page.asked > LOOKING_S:
            break  # nobody is looking
        time.sleep(0.1)
    page.close()
    return 0


def _page(what: str, address: str, about: str) -> LivePage:
    token = os.environ.get(VARIABLE, "").strip()
    if not what.startswith("http://"):
        return LivePage(Snapshots(Path(what)), address, token)
    from fedsys.runs.live.served import AboutServed, ServedSnapshots  # asks over HTTP

    known = AboutServed(**json.loads(about))
    return LivePage(ServedSnapshots(what, known), address, token, OF_ENDPOINT)


if __name__ == "__main__":
    sys.exit(main())
