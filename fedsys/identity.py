"""What a result is known by: the hash of a state, and the environment that its bits depend on."""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state as 64 hexadecimal digits.

    The digest is taken over the entries in the order of their names (by code point). An entry is
    the concatenation of, with every integer an unsigned 64-bit little-endian number:

    1. the length in bytes of the name in UTF-8, and these bytes;
    2. the length of the name of the dtype, and the name in ASCII, such as ``float32``;
    3. the number of dimensions, and the size of each;
    4. the number of bytes of the data, and the data: row-major, each element little-endian.

    Two states have one digest only if they agree in all of that to the bit. Order of insertion,
    strides, memory format, device and ``requires_grad`` do not enter.

    Args:
        state: Dense tensors of any shape and dtype by name.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        data = _little_endian(tensor, sys.byteorder)
        label, kind = name.encode(), str(tensor.dtype).removeprefix("torch.").encode()
        digest.update(struct.pack("<Q", len(label)) + label)
        digest.update(struct.pack("<Q", len(kind)) + kind)
        digest.update(struct.pack(f"<Q{tensor.ndim}Q", tensor.ndim, *tensor.shape))
        digest.update(struct.pack("<Q", data.numel()))
        digest.update(data.numpy().data)
    return digest.hexdigest()


def _little_endian(tensor: Tensor, byteorder: str) -> Tensor:
    """Return the elements of `tensor` in row-major order as bytes, uint8 of shape ``(bytes,)``."""
    import torch

    flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if not flat.numel():  # torch views no memory that is not there
        return torch.empty(0, dtype=torch.uint8)
    data = flat.view(torch.uint8)
    if byteorder == "little":
        return data
    width = flat.element_size() // (2 if flat.is_complex() else 1)
    return data.reshape(-1, width).flip(1).reshape(-1)


def environment() -> dict[str, Any]:
    """Return what the bits of a result depend on besides the configuration.

    Keys: ``versions`` (of Python and the packages in use; null if not installed), ``platform``,
    ``cpu`` (its name), ``instruction_set`` (that torch's kernels were chosen for), ``libraries``
    (which math libraries torch was built with) and ``threads`` (numbers of cores and threads).
    """
    import platform

    import torch

    packages = ("fedsys", "torch", "torchvision", "flwr", "numpy", "safetensors", "hydra-core")
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: package_version(package) for package in packages},
        },
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "libraries": {**_math_libraries(), "cuda": torch.version.cuda},
        "threads": {
            "cores": os.cpu_count(),
            "intra_op": torch.get_num_threads(),
            "inter_op": torch.get_num_interop_threads(),
        },
    }


def arithmetic() -> dict[str, str]:
    """Return what the bits of a computation depend on that two machines may not share.

    Threads are a setting of the run, and memory formats travel with the tensors.
    """
    import platform

    import torch

    libraries = [name for name, there in _math_libraries().items() if there]
    return {
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "math libraries": " ".join(libraries) or "none",
    }


def differences(theirs: object) -> str:
    """Say in what the arithmetic of another machine is not that of this one; empty if in nothing.

    Args:
        theirs: What `arithmetic` gave there; anything else counts as unknown.
    """
    told = theirs if isinstance(theirs, Mapping) else {}
    mine = arithmetic()
    return ", ".join(
        f"{name} {str(told.get(name, 'unknown'))[:80]} instead of {value}"
        for name, value in mine.items()
        if told.get(name) != value
    )


def _math_libraries() -> dict[str, bool]:
    import torch

    return {
        # torch gives these two no types
        "mkl": torch.backends.mkl.is_available(),  # type: ignore[no-untyped-call]
        "onednn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    }


def package_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def has_bfloat16() -> bool | None:
    """Return whether the processor has instructions for bfloat16; None where that is not said."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return any(flag.endswith("bf16") for flag in value.split())
    return None


def _cpu_model() -> str:
    import platform

    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
