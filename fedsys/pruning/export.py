"""Dense models for other runtimes: ONNX, checked by ONNX Runtime before it is trusted."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from fedsys.config.targets import import_extra
from fedsys.errors import ModelError
from fedsys.pruning.dense.removal import probes

TOLERANCE = 1e-5
"""Largest difference to ONNX Runtime's outputs that passes, times max(1, largest output)."""


def export_onnx(
    model: nn.Module, example: Tensor | Sequence[int], path: str | os.PathLike[str]
) -> float:
    """Write `model` as an ONNX file with weights, for any batch size, and compare its outputs.

    Args:
        model: A model in evaluation mode, with one float32 tensor in and one out.
        example: A batch of inputs, or the shape of one input without the batch.
        path: The file to write.

    Returns:
        The largest difference between the outputs of `model` and those of ONNX Runtime.

    Raises:
        ModelError: The extra `export` is not installed, an operation has no counterpart in ONNX,
            or outputs differ by more than `TOLERANCE`; then no file is left.
    """
    runtime = import_extra("onnxruntime")
    import_extra("onnxscript")
    path = Path(path)
    inputs = probes(example)
    program = _translate(model, inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path), external_data=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(inputs)
    answers = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    difference = (expected - torch.from_numpy(answers[0])).abs().flatten(1).amax(1)
    allowed = TOLERANCE * expected.abs().flatten(1).amax(1).clamp(min=1.0)
    if not bool((difference <= allowed).all()):
        path.unlink()
        raise ModelError(
            f"ONNX Runtime differs from the model by {difference.max():.3g}, more than "
            f"{TOLERANCE:g} x max(1, max|output|)"
        )
    return float(difference.max())


def onnx_bytes(model: nn.Module, example: Tensor | Sequence[int]) -> bytes:
    """Return what `export_onnx` writes; arguments and errors are its own."""
    with TemporaryDirectory(prefix="fedsys-onnx-") as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, example, path)
        return path.read_bytes()


def _translate(model: nn.Module, inputs: Tensor) -> Any:
    # the exporter reports its progress on standard output and warns about its own parts
    try:
        with quiet("torch.onnx", "onnxscript"), contextlib.redirect_stdout(io.StringIO()):
            batch = {0: torch.export.Dim.DYNAMIC}
            return torch.onnx.export(
                model, (inputs,), dynamo=True, dynamic_shapes=(batch,), verbose=False
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelError(f"the model cannot be written as ONNX: {error}") from error


@contextlib.contextmanager
def quiet(*names: str | None) -> Iterator[None]:
    """Let the loggers of these names, None for the root, report errors only, and hide warnings."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
