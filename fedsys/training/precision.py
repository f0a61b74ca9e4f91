"""The precision in which steps compute: ``client.precision``.

With ``bf16`` the forward of a model, or of a part of it, runs under ``torch.autocast``:
convolutions and matrix products take and make bfloat16, what follows them computes in the type that
it is given or in float32, as PyTorch's lists say, and backwards follow their forwards. Parameters,
their gradients, optimizers, norms, masks and averages stay as they are, in the types of the model,
and the last outputs are made float32 before the loss. Evaluation computes in the types of the
model, which is what is saved and served.

What crosses a cut has the type that the unit before it leaves in the whole model, and so has its
gradient: nothing is cast for the wire, so that split and whole training have the same bits. Each
forward casts weights anew: PyTorch's cache of casts is shared by all threads of a process, and a
session that cleared it would change how gradients of a weight that is used twice are added up.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fedsys.config import ClientConfig
from fedsys.transport.several import Inputs


def autocast(precision: str, x: Inputs) -> AbstractContextManager[object]:
    """Return what surrounds the forward of a step.

    Args:
        precision: As ``client.precision``.
        x: What enters, on the device that computes.
    """
    if precision == "fp32":
        return nullcontext()
    device = (x if isinstance(x, Tensor) else x.tensors[0]).device
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def for_loss(outputs: Tensor, precision: str) -> Tensor:
    """Return the last outputs as losses take them: of bfloat16 ones made under it, float32.

    Args:
        outputs: Of the last unit, ``(rows, …)``.
        precision: As ``client.precision``.
    """
    lowered = precision != "fp32" and outputs.dtype == torch.bfloat16
    return outputs.float() if lowered else outputs


def types_by(client: ClientConfig) -> str:
    """Return on which kind of device types of activations are as those of a client.

    PyTorch's lists of what computes in which type are one for CPUs and one for GPUs.
    """
    on_gpu = client.device != "cpu" and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"
