"""The first words on a terminal, before anything that could draw a bar is imported.

They stand on a line that whatever comes next writes over: the cursor is at its beginning.
"""

from __future__ import annotations

import os
import sys

_shown = False


def say(text: str, stays: bool = False) -> None:
    """Show what happens until something else is shown; on a terminal only.

    Args:
        text: What happens.
        stays: Elsewhere, where nothing can be taken away, write a line about it.
    """
    global _shown
    if sys.stderr is None:
        return
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        if stays:
            print(text, file=sys.stderr, flush=True)
        return
    _shown = True
    sys.stderr.write(f"\r\x1b[2K{text} …\r")
    sys.stderr.flush()


def clear() -> None:
    """Take the words away, if there are any."""
    global _shown
    if _shown and sys.stderr is not None:
        _shown = False
        sys.stderr.write("\x1b[2K")
        sys.stderr.flush()
