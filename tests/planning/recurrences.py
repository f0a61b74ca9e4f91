"""The time of one iteration of one device, in closed form.

The recurrences of a flow shop with the device as its first and its last machine (pieces i = 1 … N;
stages forward f, up u, edge s, down d, backward b; latency l; F, U, S, D, C: the moments of their
ends)::

    F_i = max(F_{i-1}, C_{i-depth}) + f_i           C_i = max(D_i + l, C_{i-1}, F before) + b_i
    U_i = max(F_i, U_{i-1}) + u_i                   S_i = max(U_i + l, S_{i-1}) + s_i
    D_i = max(S_i, D_{i-1}) + d_i                   T   = C_N

where "F before" is the forward that the schedule puts before this backward: for `pipelined` the
last one. They are those of PiPar (Zhang et al., "PiPar: Pipeline Parallelism for Collaborative
Machine Learning", JPDC 2024, section IV) with what its code leaves out: a device computes one thing
at a time, and a message arrives a latency after its last bit. `fedsys.planning.timeline.play`
gives the same times, and those of several devices on one edge.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def iteration_s(
    forward_s: Array,
    up_s: Array,
    edge_s: Array,
    down_s: Array,
    backward_s: Array,
    latency_s: Array | float = 0.0,
    *,
    depth: int | None = None,
) -> Array:
    """Return when the last backward ends, for many settings at once.

    Args:
        forward_s: Seconds per piece, ``(..., N)``; the other stages likewise. Settings with fewer
            pieces than N have zeros in all stages at the end.
        up_s: Time on the uplink.
        edge_s: Time on the edge.
        down_s: Time on the downlink.
        backward_s: Backward on the device.
        latency_s: One way, ``(...)`` or a number.
        depth: Pieces in flight at most; None: all (`fedsys.training.schedule.pipelined`).

    Returns:
        Seconds, ``(...)``.
    """
    count = forward_s.shape[-1]
    limit = count if depth is None else max(1, min(depth, count))
    zero = np.zeros(forward_s.shape[:-1])
    device, up, edge, down = zero, zero, zero, zero
    done = zero
    arrivals: list[Array] = []
    backwards = 0

    def back(piece: int, now: Array) -> tuple[Array, Array]:
        real = (forward_s[..., piece] > 0) | (backward_s[..., piece] > 0) | (up_s[..., piece] > 0)
        ended = np.maximum(now, arrivals[piece]) + backward_s[..., piece]
        return np.where(real, ended, now), np.where(real, ended, done)

    for i in range(count):
        if i - backwards == limit:
            device, done = back(backwards, device)
            backwards += 1
        device = device + forward_s[..., i]
        up = np.maximum(device, up) + up_s[..., i]
        edge = np.maximum(up + latency_s, edge) + edge_s[..., i]
        down = np.maximum(edge, down) + down_s[..., i]
        arrivals.append(down + latency_s)
    for piece in range(backwards, count):
        device, done = back(piece, device)
    return done
