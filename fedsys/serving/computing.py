"""How a variant is computed: by PyTorch or by ONNX Runtime, arrays to arrays.

Which of them answers is chosen variant by variant (`is_by_onnx`): ONNX Runtime has the same answers
within `fedsys.pruning.export.TOLERANCE`, which was looked at when the portfolio was made, and is
taken where it was faster then. An endpoint of such variants alone does not import PyTorch.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from typing import Any, final

import numpy as np
import psutil

from fedsys.config.serving import ENGINES
from fedsys.config.targets import import_extra
from fedsys.errors import ConfigError, ModelError
from fedsys.pruning.file_names import ONNX, WEIGHTS
from fedsys.pruning.memory import trim
from fedsys.pruning.portfolio import Portfolio, Variant
from fedsys.serving.engine import Array
from fedsys.serving.switch.switcher import free_memory_of

AUTO, _TORCH, BY_ONNX = ENGINES


@final
class TorchRun:
    """A module of PyTorch.

    Args:
        module: In evaluation mode, float32 images to scores.
    """

    def __init__(self, module: Any) -> None:
        import torch

        self._module, self._torch = module, torch

    def __call__(self, images: Array) -> Array:
        """Return the scores."""
        with self._torch.inference_mode():
            scores: Array = self._module(self._torch.from_numpy(images)).float().numpy()
            return scores

    def close(self) -> None:
        """Give its memory back."""
        free_memory_of(self._module)


@final
class OnnxRun:
    """An ONNX file in ONNX Runtime.

    Args:
        content: Of the file.
        threads: Intra-op threads.
        name: Of the variant, for an error.

    Raises:
        ModelError: The extra ``export`` is not installed, or ONNX Runtime refuses the file.
    """

    def __init__(self, content: bytes, threads: int, name: str) -> None:
        runtime = import_extra("onnxruntime", who="a variant in ONNX")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # One thread computes and others wait for him: to spin would take the cores of all else.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = runtime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime has a class of its own for every status
            raise ModelError(f"ONNX Runtime refuses {name}: {error}") from error
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: Array) -> Array:
        """Return the scores."""
        (scores,) = self._session.run(None, {self._input: np.ascontiguousarray(images)})
        return np.asarray(scores, np.float32)

    def close(self) -> None:
        """Give its memory back."""
        self._session = None
        trim()


def is_by_onnx(variant: Variant, engine: str, threads: int) -> bool:
    """Return whether ONNX Runtime computes a variant.

    Args:
        variant: Of a portfolio.
        engine: One of `fedsys.config.serving.ENGINES`.
        threads: Intra-op threads; where others were measured, the nearest count.

    Raises:
        ConfigError: It shall, and has no file for it.
    """
    if WEIGHTS not in variant.files:
        return True
    if engine == BY_ONNX and ONNX not in variant.files:
        rule = f"needs a file for ONNX Runtime, which variant {variant.name} has not"
        way_out = "make the portfolio by fedsys prune run=RUN variants.onnx=true"
        raise ConfigError.of("serving.engine", engine, rule, way_out)
    if engine != AUTO or not variant.onnx_latencies:
        return engine == BY_ONNX
    return importlib.util.find_spec("onnxruntime") is not None and _is_faster(variant, threads)


def _is_faster(variant: Variant, threads: int) -> bool:
    """Return whether ONNX Runtime took less, in the geometric mean of the batch sizes."""
    ours = {(row.batch, row.threads): row.p50_ms for row in variant.latencies}
    nearest = min({count for _, count in ours}, key=lambda t: (abs(t - threads), t))
    ratios = [
        math.log(row.p50_ms / ours[row.batch, row.threads])
        for row in variant.onnx_latencies
        if row.threads == nearest and (row.batch, row.threads) in ours
    ]
    return bool(ratios) and sum(ratios) < 0.0


def made_run(portfolio: Portfolio, name: str, *, onnx: bool, threads: int) -> TorchRun | OnnxRun:
    """Read a variant so that it can answer.

    Args:
        portfolio: Whose variant it is.
        name: Of the variant.
        onnx: Whether ONNX Runtime computes it.
        threads: Intra-op threads of ONNX Runtime; those of PyTorch are of the process.

    Raises:
        FedsysError: It cannot be read, or does not give the scores of the classes.
    """
    if not onnx:
        return TorchRun(portfolio.module(name))
    run = OnnxRun(portfolio.onnx(name), threads, name)
    about = portfolio.about
    try:
        scores = run(np.zeros((1, *about.input_shape), np.float32))
    except Exception as error:
        raise ModelError(f"{portfolio.folder}: {name} does not compute: {error!r}") from error
    if scores.shape != (1, len(about.classes)):
        classes = len(about.classes)
        raise ModelError(f"{portfolio.folder}: {name} gives no scores of {classes} classes")
    return run


def usual_threads() -> int:
    """Return how many threads PyTorch would take, without importing it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return int(asked) if asked.isdecimal() and int(asked) else cores
