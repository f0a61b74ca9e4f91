"""What leaves a device of its training: an update that is clipped, with noise of its own.

Local differential privacy (Kasiviswanathan et al., "What Can We Learn Privately?", FOCS 2008) of a
client's whole data: whoever receives the model, the server app included, cannot tell well which
data of a client it came from. Neighbours are any two updates, which lie at most 2 C apart once they
are clipped to a norm of C. Averages, server optimizers and medians of what left spend nothing more.

Flower's `LocalDpMod` is not used: its deviation is for one round and an epsilon up to 1 (Dwork and
Roth, 2014, theorem A.1), with a sensitivity that need not be that of what it clips, and its draws
have no address.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsys.privacy.noise import NoiseSource

PURPOSE = "client-noise"


@torch.no_grad()
def release_update(
    model: nn.Module,
    start: Mapping[str, Tensor],
    *,
    clip_norm: float,
    noise: float,
    source: NoiseSource,
) -> None:
    """Put what may leave the device in place of the parameters.

    An update with a number that is not finite counts as none: no factor bounds it.

    Args:
        model: As it was trained; without buffers, which have no noise.
        start: By global name, the parameters from which it was.
        clip_norm: Largest norm of the update, over all parameters.
        noise: Deviation of the noise over `clip_norm`.
        source: Draws the noise, for each parameter by its name.
    """
    named = dict(model.named_parameters())
    first = {name: start[name].to(p.device, torch.float64) for name, p in named.items()}
    moved = {name: p.double() - first[name] for name, p in named.items()}
    norm = math.sqrt(math.fsum(float(update.square().sum()) for update in moved.values()))
    for name, parameter in named.items():
        drawn = source.normal(PURPOSE, 0, name, parameter.shape).to(parameter.device)
        left = first[name] + noise * clip_norm * drawn.double()
        if math.isfinite(norm):
            left += moved[name] * min(1.0, clip_norm / max(norm, 1e-300))
        parameter.copy_(left)
