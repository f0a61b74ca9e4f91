"""Rivals that a benchmark installs: pinned, by pip, each into a folder of its own, once.

PyTorch and what else is not pinned is that of this installation, so that all sides compute with the
same libraries.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsys.errors import RuntimeFailure

INSTALL_S = 900.0
"""Longest time for one rival, in seconds."""


def installed(
    name: str, pinned: Sequence[str], environments: Path, longest_s: float = INSTALL_S
) -> Path:
    """Return the folder in which a rival is installed; install it if it is not there.

    Args:
        name: Of the rival; with the version of the first pin, that of its folder.
        pinned: What pip installs, as ``name==version``.
        environments: Where such folders stand.
        longest_s: Seconds that pip has.

    Raises:
        RuntimeFailure: That cannot be done, for instance without a network; the end of what pip
            said is in it.
    """
    place = environments / "-".join((name, pinned[0].partition("==")[2]))
    done = place / "installed"
    if done.exists():
        return place
    print(f"installing {', '.join(pinned)} into {place}", file=sys.stderr, flush=True)
    call = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(place), *pinned]
    try:
        place.mkdir(parents=True, exist_ok=True)
        subprocess.run(call, check=True, capture_output=True, text=True, timeout=longest_s)
    except (subprocess.SubprocessError, OSError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise RuntimeFailure(f"{name} cannot be installed: {str(said).strip()[-300:]}") from error
    done.touch()
    return place
