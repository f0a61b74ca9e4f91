"""The model of a run as one safetensors file: equal states with equal metadata give equal files."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedsys.errors import RunError
from fedsys.files import ELSEWHERE, replacing

if TYPE_CHECKING:
    from torch import Tensor


def save_model(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state as a whole or not at all.

    Args:
        path: The file.
        state: Dense tensors of any shape and dtype by name.
        metadata: What stands in the file's header.

    Raises:
        RunError: The file cannot be written; a former one stays as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as part:
        try:
            save_file(_independent(state), part, dict(metadata))
            _order_metadata(part)
        except SafetensorError as error:
            raise RunError(
                f"cannot write {path}: {error}; free some space, or {ELSEWHERE}"
            ) from error


def _independent(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the CPU of which no two share memory, as safetensors demands."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return out


def _order_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file, which are written in an order of chance.

    With it, equal states with equal metadata give equal files. The header keeps its length.
    """
    with file.open("r+b") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(text) == size:
            stream.seek(8)
            stream.write(text)
