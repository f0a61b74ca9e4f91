"""The command as a terminal starts it, also where the tests themselves run in the background.

There a shell has Ctrl-C ignored, which every process inherits.
"""

import sys

CODE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from fedsys.main import entry; entry()"
)


def fedsys(*arguments):
    """Return the command line of ``fedsys`` with arguments."""
    return [sys.executable, "-c", CODE, *arguments]
