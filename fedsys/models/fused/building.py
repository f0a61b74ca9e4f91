"""The kernels as a shared library: built on first use, and kept in the user's cache.

The name of the library is a hash of the source, the compiler, its flags and the processor, so a
change of any of these builds anew. It is written beside its place and moved there, so that builds
at the same time do not disturb each other. What others could have written is not loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsys.files import user_cache
from fedsys.models.fused.source import SOURCE

FLAGS = (
    *("-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno"),
    *("-shared", "-fPIC", "-pthread"),
)
NATIVE = ("-march=native", "-mcpu=native", "")
"""How compilers call the processor at hand; the first one that works is taken."""
BUILD_S = 120.0
NO_COMPILER = "there is no C compiler: install gcc or clang, or name one in CC"

_lock = threading.Lock()
_log = logging.getLogger("fedsys.kernels")


@dataclass(frozen=True)
class Built:
    """The kernels, or why there are none.

    Attributes:
        library: What holds them; None for none.
        detail: By what they were built, or the reason.
    """

    library: ctypes.CDLL | None
    detail: str


def compiler() -> list[str]:
    """Return the command of the C compiler: ``CC``, or the first usual one; empty for none."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named if shutil.which(named[0]) else []
    found = (shutil.which(name) for name in ("cc", "gcc", "clang"))
    return next(([path] for path in found if path), [])


def built() -> Built:
    """Return the kernels, built if they are not yet; kept per process."""
    with _lock:
        return _built()


@functools.cache
def _built() -> Built:
    command = compiler()
    if not command:
        return Built(None, NO_COMPILER)
    try:
        version = _version(command)
        found = _in_cache(command, version) or _in_passing(command)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        return Built(None, f"{shlex.join(command)} does not build them: {_reason(error)}")
    return Built(found, version.splitlines()[0] if version else shlex.join(command))


def _version(command: Sequence[str]) -> str:
    asked = [*command, "--version"]
    return subprocess.run(
        asked, capture_output=True, text=True, timeout=BUILD_S, check=True
    ).stdout.strip()


def _reason(error: Exception) -> str:
    told = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = str(told or error).strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else str(error))


def _in_cache(command: Sequence[str], version: str) -> ctypes.CDLL | None:
    """Return the kernels from the user's cache; None if nothing can be kept there."""
    parts = (SOURCE, *command, version, *FLAGS, *NATIVE, _processor())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    try:
        folder = user_cache() / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"unit-{digest[:32]}.so"
        if not _ours(folder):
            _log.warning("%s can be written by others, so no kernels are kept there", folder)
            return None
        if not (path.exists() and _ours(path)):
            _build(command, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:  # a home that is not there, or is full or read-only
        _log.info("kernels cannot be kept in the cache (%s)", error)
        return None


def _in_passing(command: Sequence[str]) -> ctypes.CDLL:
    """Return the kernels from a folder of this process that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fedsys-kernels-") as folder:
        path = Path(folder) / "unit.so"
        _build(command, path)
        return ctypes.CDLL(str(path))


def _ours(path: Path) -> bool:
    """Return whether nobody but this user, and root, can have written a file or folder."""
    about = path.stat()
    return about.st_uid in (os.geteuid(), 0) and not about.st_mode & 0o022


def _build(command: Sequence[str], path: Path) -> None:
    """Build the library; it is at `path` as a whole or not at all."""
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        for native in NATIVE:
            flags = [*FLAGS, native] if native else FLAGS
            done = subprocess.run(
                [*command, *flags, "-x", "c", "-", "-o", str(part), "-lm"],
                input=SOURCE, capture_output=True, text=True, timeout=BUILD_S, check=not native,
            )  # fmt: skip
            if done.returncode == 0:
                break
        part.chmod(0o700)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _processor() -> str:
    """Return what tells processors apart that one home is shared by."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = (line for line in lines if line.startswith(("flags", "Features", "model name")))
    return "\n".join([platform.machine(), *sorted(set(told))])
