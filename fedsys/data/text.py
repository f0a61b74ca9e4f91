"""Text as bytes: what comes next, for models of language.

Nothing is to be downloaded: where no file is named, the text is the reference of the language that
Python brings for ``help()`` (``pydoc_data.topics``), about 470,000 bytes, which differ from one
version of Python to the next.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedsys.data.dataset import Images
from fedsys.data.options import Spec, fraction, whole
from fedsys.data.own import Read
from fedsys.errors import ConfigError, DataError

BYTES = 256


def read(spec: Spec) -> Read:
    """Cut a text into windows of bytes, each with the bytes one further on as targets.

    Args:
        spec: ``file``: a text, or null; ``length``: bytes of a window; ``test``: share of the text,
            at its end, that is the test part, so that no window of it was seen.

    Raises:
        ConfigError: The text is too short for its windows, or the task is another.
        DataError: The file cannot be read.
    """
    if spec.get("task") != "next_token":
        raise ConfigError.of(
            "task.kind", spec.get("task", "classification"), "must be next_token with data=text",
            "task=next_token model=gpt",
        )  # fmt: skip
    length = whole(spec, "length", 64, least=2)
    share = fraction(spec, "test", 0.1, open_below=True)
    text = _text(spec.get("file"))
    windows = (len(text) - 1) // length
    test = max(1, round(share * windows))
    if windows - test < 2:
        raise ConfigError.of(
            "data.length", length, f"must be shorter, for a text of {len(text)} bytes"
        )
    tokens = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))
    cut = windows - test
    parts = [_windows(tokens, length, *span) for span in ((0, cut), (cut, windows))]
    return Read(parts[0], parts[1], (), BYTES)


def _windows(tokens: torch.Tensor, length: int, first: int, last: int) -> Images:
    part = tokens[first * length : last * length + 1]
    inputs = part[:-1].reshape(-1, length)
    targets = part[1:].reshape(-1, length)
    strata = torch.zeros(len(inputs), dtype=torch.int64)
    return Images(inputs.contiguous(), targets.contiguous(), strata)


def _text(file: object) -> bytes:
    if file:
        try:
            return Path(str(file)).expanduser().read_bytes()
        except OSError as error:
            raise DataError(f"data.file={file}: cannot be read: {error.strerror}") from error
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()
