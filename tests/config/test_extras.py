"""What comes with an extra leaves the process as it was."""

import subprocess
import sys

import pytest


def test_standard_error_that_was_redirected_stays_open_when_logging_is_configured_anew():
    """absl, which dp-accounting brings, closed the captured standard error of a whole test run.

    9,772 tests ended with "I/O operation on closed file" once one of them had asked the accountant
    and another had configured logging, as Hydra does.
    """
    pytest.importorskip("dp_accounting")
    script = (
        "import io, logging.config, sys\n"
        "from contextlib import redirect_stderr\n"
        "from fedsys.config.targets import import_extra\n"
        "kept = io.StringIO()\n"
        "with redirect_stderr(kept):\n"
        "    import_extra('dp_accounting', 'privacy', 'a test')\n"
        "logging.config.dictConfig({'version': 1})\n"
        "print('closed' if kept.closed else 'open')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert ended.stdout.split() == ["open"]
