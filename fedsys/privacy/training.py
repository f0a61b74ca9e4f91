"""The plain loop with differential privacy: what split training with it must equal, bit for bit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from fedsys.privacy.update import PrivateUpdate, summed_backward
from fedsys.randomness import Address, drawing, rows
from fedsys.training import optimizers
from fedsys.training.plain import Batches, Proximal, Score, device_of, forward
from fedsys.training.schedule import micro_batch_bounds

if TYPE_CHECKING:
    from fedsys.training.penalty import Penalty


def train(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Batches,
    address: Address,
    update: PrivateUpdate,
    *,
    micro_batches: int = 1,
    anchor: Proximal | None = None,
    penalty: Penalty | None = None,
) -> Score:
    """Do one step of DP-SGD for every mini-batch, also for those without an example.

    Args:
        model: Trained in place, on the device of its parameters.
        optimizer: Over the parameters of `model`.
        batches: Pairs of inputs ``(batch, …)`` and labels ``(batch,)``.
        address: Seed, client and round, from which the model's draws follow.
        update: Over `model` alone.
        micro_batches: Pieces per mini-batch whose clipped gradients are added up.
        anchor: FedProx's proximal term; None for none. It depends on no example.
        penalty: On channels, so that they die; None for none. Nor does it.

    Returns:
        The score over all examples, as seen in training. It is not private.
    """
    device = device_of(model)
    model.train()
    named = dict(model.named_parameters())
    loss_sum, hits, examples, steps = 0.0, 0, 0, 0
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        update.begin()
        with drawing(address, steps, len(y)):
            for piece, (start, stop) in enumerate(micro_batch_bounds(len(y), micro_batches)):
                with rows(start, stop), update.recording(piece, stop - start):
                    outputs = forward(model, x[start:stop])
                    loss_sum += float(summed_backward(outputs, y[start:stop]))
                hits += int((outputs.detach().argmax(1) == y[start:stop]).sum())
        update.finish(steps, update.squares())
        with torch.no_grad():
            if anchor is not None:
                anchor.add_to_gradients(named)
            if penalty is not None:
                penalty.add_to_gradients(named)
        optimizers.step(optimizer)
        examples += len(y)
        steps += 1
    if not examples:
        return Score(math.nan, math.nan, 0, steps)
    return Score(loss_sum / examples, hits / examples, examples, steps)
