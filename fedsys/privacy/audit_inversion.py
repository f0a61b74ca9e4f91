"""Images from activations: a network that is trained to invert the units before a cut.

He, Zhang and Lee, "Model Inversion Attacks Against Collaborative Inference", ACSAC 2019, section
5: the attacker has images of the same kind as the victims', and what the device's units make of
them. It needs the parameters of these units for that; the server app has them after each round, so
an edge server that works together with it has them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsys.errors import ModelError
from fedsys.privacy.audit_metrics import psnr, ssim
from fedsys.randomness import Address, seeded_default_generator

BATCH = 50
"""Images of one training step."""

LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Inversion:
    """What came of it.

    Attributes:
        images: What the attacker makes of the victims' activations, ``(N, C, H, W)`` in [0, 1].
        ssim: Structural similarity with the victims' images, mean.
        psnr: Peak signal-to-noise ratio in decibels, mean.
    """

    images: Tensor
    ssim: float
    psnr: float


def invert(
    activations_of: Callable[[Tensor, str], Tensor],
    known: Tensor,
    victims: Tensor,
    address: Address,
    *,
    epochs: int,
    width: int = 48,
) -> Inversion:
    """Train an inverse network on known images and look at what it makes of the victims'.

    Args:
        activations_of: What is released of images ``(N, C, H, W)`` in [0, 1]; the text says which
            images, so that what a mechanism draws for them is drawn anew.
        known: Images that the attacker has; none of the victims'.
        victims: Images that it wants.
        address: Of its draws.
        epochs: Passes over the known images; in each, mechanisms draw anew.
        width: Channels of the inverse network.
    """
    shape = tuple(victims.shape[1:])
    enters = tuple(activations_of(known[:2], "shape").shape[1:])
    network = inverse_network(enters, shape, address, width)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    steps = epochs * math.ceil(len(known) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=max(steps, 2)
    )
    network.train()
    for epoch in range(epochs):
        given = activations_of(known, f"known {epoch}")
        order = torch.randperm(len(known), generator=address.torch("invert", epoch))
        for rows in torch.split(order, BATCH):
            optimizer.zero_grad()
            loss = F.mse_loss(network(given[rows]), known[rows])
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        seen = activations_of(victims, "victims")
        images = torch.cat([network(part) for part in torch.split(seen, 10 * BATCH)])
    return Inversion(
        images, float(ssim(images, victims).mean()), float(psnr(images, victims).mean())
    )


def mean_image(known: Tensor, victims: Tensor) -> Inversion:
    """Return what an attacker gets that sees no activation: the mean of the images it knows."""
    images = known.mean(0, keepdim=True).expand_as(victims)
    return Inversion(
        images, float(ssim(images, victims).mean()), float(psnr(images, victims).mean())
    )


def inverse_network(
    enters: Sequence[int], image: Sequence[int], address: Address, width: int = 48
) -> nn.Module:
    """Return a network from activations to images, with GroupNorm, untrained.

    Maps are enlarged to the image in steps of two, with two convolutions at each size; vectors
    become maps of a quarter of the image by a linear layer first.

    Args:
        enters: Shape of an activation: ``(C, H, W)`` or ``(features,)``.
        image: ``(C, H, W)``.
        address: Of its initial weights.
        width: Channels; a multiple of 8.

    Raises:
        ModelError: Activations are of another number of dimensions.
    """
    if len(enters) not in (1, 3):
        raise ModelError(
            f"activations of shape {tuple(enters)}: only vectors and maps are inverted"
        )
    channels, height, width_px = image
    with seeded_default_generator(address.seed_for("inverse")):
        layers: list[nn.Module] = [nn.Flatten()] if len(enters) == 1 else []
        if len(enters) == 1:
            rows, columns = max(1, height // 4), max(1, width_px // 4)
            layers += [nn.Linear(enters[0], width * rows * columns), nn.ReLU()]
            layers += [nn.Unflatten(1, (width, rows, columns))]
            entering = width
        else:
            entering, rows, columns = enters
        layers += _block(entering, width)
        while rows < height or columns < width_px:
            rows, columns = min(2 * rows, height), min(2 * columns, width_px)
            layers += [nn.Upsample((rows, columns), mode="nearest"), *_block(width, width)]
        if (rows, columns) != (height, width_px):  # maps that are larger than the image
            layers.append(nn.AdaptiveAvgPool2d((height, width_px)))
        layers += [*_block(width, width), nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid()]
        return nn.Sequential(*layers)


def _block(entering: int, leaving: int) -> list[nn.Module]:
    return [
        nn.Conv2d(entering, leaving, 3, padding=1),
        nn.GroupNorm(8, leaving),
        nn.ReLU(),
    ]
