"""Variants of fewer bits: bfloat16 and float16 as the same graph, int8 as an ONNX file.

A cast to bfloat16 or float16 is an operation of the graph, so such a variant is saved like any
other. int8 is left to ONNX Runtime: weights per channel and activations with scales found on
examples (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018), stored as a plain ONNX file with pairs of
QuantizeLinear and DequantizeLinear. It needs the extra ``export``.

Whether fewer bits are faster depends on the processor; measured latency decides what stays.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from fedsys.config.targets import import_extra
from fedsys.errors import ModelError
from fedsys.pruning.export import export_onnx, quiet

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def halved(model: fx.GraphModule, precision: str) -> fx.GraphModule:
    """Return a copy that computes in a type of `HALVES`, with inputs and outputs as they were.

    Args:
        model: A dense model of one input and one output, in evaluation mode.
        precision: ``bfloat16`` or ``float16``.
    """
    dtype = HALVES[precision]
    outer = next((p.dtype for p in model.parameters()), torch.float32)
    new = copy.deepcopy(model).to(dtype)
    graph = new.graph
    (given,) = (node for node in graph.nodes if node.op == "placeholder")
    (end,) = (node for node in graph.nodes if node.op == "output")
    with graph.inserting_after(given):
        narrow = graph.call_method("to", (given, dtype))
    given.replace_all_uses_with(narrow, lambda user: user is not narrow)
    with graph.inserting_before(end):
        wide = graph.call_method("to", (end.args[0], outer))
    end.args = (wide,)
    new.recompile()
    return new


def int8(model: nn.Module, batches: Sequence[Tensor]) -> bytes:
    """Return `model` in int8 as the bytes of an ONNX file, for any batch size.

    Args:
        model: A dense float32 model in evaluation mode.
        batches: Examples from which the ranges of activations are taken, ``(rows, …)`` each.

    Raises:
        ModelError: The extra ``export`` is not installed, or an operation has no counterpart.
    """
    quantization = import_extra("onnxruntime.quantization")

    with TemporaryDirectory(prefix="fedsys-int8-") as name, quiet(None):
        plain, small = Path(name) / "plain.onnx", Path(name) / "int8.onnx"
        export_onnx(model, batches[0], plain)
        given = _open(plain.read_bytes(), 1).get_inputs()[0].name
        try:
            quantization.quantize_static(
                str(plain),
                str(small),
                _Examples(given, batches),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                # Without VNNI, products of two bytes are summed in 16 bits; 7 bits never exceed it.
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        except Exception as error:  # it has no class of its own for what it cannot quantize
            raise ModelError(f"ONNX Runtime cannot make int8 of the model: {error}") from error
        return small.read_bytes()


class _Examples:
    """What ONNX Runtime calls a calibration data reader: one dictionary of inputs after another."""

    def __init__(self, name: str, batches: Sequence[Tensor]) -> None:
        self._name, self._rest = name, iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._rest, None)
        return None if batch is None else {self._name: batch.numpy()}


@final
class OnnxModule(nn.Module):
    """An ONNX file as a module: one float32 tensor in, one out. Calls may come from any thread.

    It computes with as many threads as torch would.

    Args:
        content: The bytes of the file.

    Raises:
        ModelError: The extra ``export`` is not installed, or ONNX Runtime refuses the file.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self._content = content
        self._sessions: dict[int, Any] = {}
        self._lock = threading.Lock()
        self.eval()
        self._session()

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs ``(batch, …)`` for inputs ``(batch, …)``."""
        session = self._session()
        (output,) = session.run(None, {session.get_inputs()[0].name: x.contiguous().numpy()})
        return torch.from_numpy(output)

    def _session(self) -> Any:
        threads = torch.get_num_threads()
        with self._lock:
            if threads not in self._sessions:
                self._sessions[threads] = _open(self._content, threads)
            return self._sessions[threads]


def _open(content: bytes, threads: int) -> Any:
    runtime = import_extra("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a class of its own for every status
        raise ModelError(f"ONNX Runtime refuses the model: {error}") from error
