"""Text as bytes, or as the tokens of a tokenizer: what comes next, for models of language.

Nothing is to be downloaded: where no file is named, the text is the reference of the language that
Python brings for ``help()`` (``pydoc_data.topics``), about 470,000 bytes, which differ from one
version of Python to the next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsys.data.dataset import Images
from fedsys.data.options import Spec, fraction, whole
from fedsys.data.own import Read, function_of
from fedsys.errors import ConfigError, DataError

BYTES = 256

FEWEST = 6
"""Tokens that are too few for a training and a test part, however short the windows."""


def read(spec: Spec) -> Read:
    """Cut a text into windows of tokens, each with the tokens one further on as targets.

    Args:
        spec: ``file``: a text, or null; ``length``: tokens of a window; ``test``: share of the
            text, at its end, that is the test part, so that no window of it was seen;
            ``tokenizer``: what makes tokens of the text, null: each byte is one; ``vocabulary``:
            how many tokens there are, null: as the tokenizer says, or as are seen.

    Raises:
        ConfigError: The text is too short for its windows, or the task is another.
        DataError: The file cannot be read, or has too few tokens for any windows.
    """
    if spec.get("task") != "next_token":
        raise ConfigError.of(
            "task.kind", spec.get("task", "classification"), "must be next_token with data=text",
            "task=next_token model=gpt",
        )  # fmt: skip
    length = whole(spec, "length", 64, least=2)
    share = fraction(spec, "test", 0.1, open_below=True)
    tokens, vocabulary = _tokens(_text(spec.get("file")), spec)
    windows = (len(tokens) - 1) // length
    test = max(1, round(share * windows))
    if len(tokens) <= FEWEST:
        raise DataError(
            f"data.file={spec.get('file')}: has {len(tokens)} tokens; must have more than "
            f"{FEWEST}, for three windows of data.length=2"
        )
    if windows - test < 2:
        raise ConfigError.of(
            "data.length", length, f"must be shorter, for a text of {len(tokens)} tokens"
        )
    cut = windows - test
    parts = [_windows(tokens, length, *span) for span in ((0, cut), (cut, windows))]
    return Read(parts[0], parts[1], (), vocabulary)


def _tokens(text: bytes, spec: Spec) -> tuple[torch.Tensor, int]:
    """Return the tokens of a text, int64 ``(N,)``, and how many there are to choose from."""
    told, size = spec.get("tokenizer"), spec.get("vocabulary")
    if not told:
        numbers, known = np.frombuffer(text, dtype=np.uint8).astype(np.int64), BYTES
    else:
        tokenizer = function_of(told, "data.tokenizer")
        numbers, known = _tokenised(text, tokenizer, str(told)), _vocabulary(tokenizer)
    seen = int(numbers.max()) + 1 if len(numbers) else 0
    count = whole(spec, "vocabulary", 0) if size is not None else max(known, seen)
    if count < seen:
        raise ConfigError.of(
            "data.vocabulary", count, f"must be above the largest token, {seen - 1}"
        )
    return torch.from_numpy(numbers), count


def _tokenised(text: bytes, tokenizer: Any, told: str) -> NDArray[np.int64]:
    """Return the tokens that a tokenizer makes; one of ``tokenizers`` returns them as ``.ids``."""
    encode = getattr(tokenizer, "encode", tokenizer)
    try:
        made = encode(text.decode())
        numbers = np.asarray(getattr(made, "ids", made))
    except Exception as error:  # whatever the user's tokenizer raises
        raise DataError(f"data.tokenizer={told}: {type(error).__name__}: {error}") from error
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or (len(numbers) and numbers.min() < 0):
        raise ConfigError.of(
            "data.tokenizer", told, "must make a list of whole numbers of a text, from 0 on, and "
            f"makes {numbers.dtype} of shape {numbers.shape}",
        )  # fmt: skip
    return numbers.astype(np.int64)


def _vocabulary(tokenizer: Any) -> int:
    """Return how many tokens a tokenizer says that it has; 0 if it does not say."""
    for name in ("vocab_size", "n_vocab", "get_vocab_size"):
        value = getattr(tokenizer, name, None)
        value = value() if callable(value) else value
        if isinstance(value, int):
            return value
    return 0


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
