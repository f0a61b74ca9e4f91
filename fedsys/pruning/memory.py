"""Memory of this process and of the machine: read for decisions, and given back after them."""

from __future__ import annotations

import ctypes
import gc
import linecache
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:  # read by an endpoint that does without PyTorch, too
    from torch import fx, nn

_LIMIT = Path("/sys/fs/cgroup/memory.max")
_USED = Path("/sys/fs/cgroup/memory.current")
_STAT = Path("/sys/fs/cgroup/memory.stat")

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def trim() -> None:
    """Give memory that was freed back to the operating system, where glibc can.

    Its allocator keeps freed memory for later; without this, what a model took counts as used
    after it is gone.
    """
    if _libc is not None and hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def dismantle(module: nn.Module) -> None:
    """Take a module that nobody runs any more apart, so that its memory is free at once.

    Its tensors go, and so do its torch.fx graphs (`discard`).
    """
    from torch import fx

    module.to("meta")
    for part in list(module.modules()):
        if isinstance(part, fx.GraphModule):
            discard(part)


def discard(module: fx.GraphModule) -> None:
    """Take a traced module that nobody runs any more apart; its layers may live on in others.

    Graph and module refer to each other, so 1,400 objects for each load would wait for a garbage
    collection, which is rare. torch.fx and linecache keep the source text of each graph for
    tracebacks as long as the process lives.
    """
    from torch.fx import graph_module

    vars(module.graph).clear()
    module._modules.clear()
    file = module.forward.__code__.co_filename
    linecache.cache.pop(file, None)
    getattr(getattr(graph_module, "_loader", None), "eval_cache", {}).pop(file, None)


def resident_bytes() -> int:
    """Return the memory that would be free if this process ended, after a collection.

    The unique set size where the system tells it: shared libraries do not count.
    """
    gc.collect()
    trim()
    info = psutil.Process().memory_full_info()
    return int(getattr(info, "uss", info.rss))


def free_memory() -> int:
    """Return the bytes that this process could still take: of the machine, or of its control group.

    Pages of files that nobody changed count as free, as the kernel drops them when it must.
    """
    free = int(psutil.virtual_memory().available)
    try:
        limit = _LIMIT.read_text().strip()
        if limit != "max":
            rows = dict(line.split() for line in _STAT.read_text().splitlines())
            used = int(_USED.read_text()) - int(rows.get("inactive_file", 0))
            free = min(free, max(0, int(limit) - used))
    except (OSError, ValueError):  # no control groups of version 2 here: the machine's counts
        pass
    return free


def others_load(process: psutil.Process, cores: int | None = None) -> float:
    """Return the share of the processors that other processes used since the last call, in [0, 1].

    Args:
        process: This process; it keeps what was seen at the last call.
        cores: Processors; None for those of the machine.
    """
    cores = cores or os.cpu_count() or 1
    everybody = psutil.cpu_percent(None) / 100
    own = process.cpu_percent(None) / 100 / cores
    return min(1.0, max(0.0, everybody - own))
