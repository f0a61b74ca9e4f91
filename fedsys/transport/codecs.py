"""Codecs: how the tensor that crosses a cut is written, and what that costs in accuracy.

======  =====================  ========================================================
codec   bytes per element      error of one element x
======  =====================  ========================================================
fp32    that of its type       none: the bits are kept, whatever the type
fp16    2                      2^-11 |x|, and at least 2^-25 where |x| < 2^-14; beyond
                               65504 the value is limited to ±65504
bf16    2                      2^-8 |x|, in the range of float32
int8    1, and 4 per channel   s / 2 with s = max |x| / 127 over the channel, plus one
                               rounding of float32; channels below 2e-36 are zeroed
======  =====================  ========================================================

Rounding is to the nearest, ties to even. A channel is one index of dimension 1: a feature map of a
convolution, a feature of a linear layer; for tokens ``(batch, token, feature)`` give
``channel_dim=2``. Where a channel has fewer than `LEAST_PER_SCALE` elements the whole tensor shares
one scale, so that scales never add more than half of the levels. A channel of zeros stays zero.

NaN and infinities are kept by fp32, fp16 and bf16; only finite values beyond the range of fp16 are
limited, so that one large gradient does not become an infinity. int8 cannot hold them and refuses
the tensor, because one of them would erase its channel unseen.

Integer and boolean tensors are sent as they are by every codec.

What comes out of a ReLU has no negative elements, so they are free to say something else: with
``mark=True`` an element that is not zero and would become zero is written as -1, and decoded to the
zero that it would have been. The zeros that are left are those of the tensor
(`fedsys.transport.nonzeros`).

Several tensors cross some cuts (`encode_activations`): the frame has them as ``x``, ``x1``, ``x2``
and so on, each written by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fedsys.errors import ConfigError, FrameError, ModelError, did_you_mean
from fedsys.transport.tensors import INTEGERS

Codec = Literal["fp32", "fp16", "bf16", "int8"]
CODECS: Final[tuple[str, ...]] = get_args(Codec)

LEAST_PER_SCALE: Final = 8
"""Elements that a channel needs for a scale of its own."""

_LEVELS: Final = 127
_SCALE_BYTES: Final = 4  # a scale is a float32
_SMALLEST: Final = _LEVELS * 2.0**-126  # below, the scale is not a normal float32
_WHOLE: Final = -1  # instead of a dimension: one scale for the tensor
_HALF: Final = {"fp16": torch.float16, "bf16": torch.bfloat16}
_FLOATS: Final = {
    str(t).removeprefix("torch."): t
    for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def encode_activation(
    x: Tensor, codec: str, *, channel_dim: int = 1, mark: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the values that a frame carries for `x`.

    Args:
        x: Activation or activation gradient, of any shape; its memory format is kept.
        codec: One of `CODECS`.
        channel_dim: Dimension along which int8 has a scale of its own.
        mark: Mark what is not zero and would become zero; `x` must have no negative elements.

    Returns:
        Tensors ``{"x": …}``, for int8 also ``{"scale": …}`` of shape ``(channels,)``; and meta
        values that `decode_activation` needs.

    Raises:
        ConfigError: The codec is unknown.
        ModelError: `x` holds NaN or an infinity and the codec is int8.
    """
    check_codec(codec)
    x = x.detach()
    name = str(x.dtype).removeprefix("torch.")
    if codec == "fp32" or name not in _FLOATS:
        return {"x": x}, {"codec": "fp32"}
    meta: dict[str, Any] = {"codec": codec, "dtype": name}
    if codec in _HALF:
        tensors = {"x": _halved(x, _HALF[codec])}
    else:
        dim = channel_dim if x.dim() > channel_dim else _WHOLE
        if dim != _WHOLE and not _own_scales(x.numel(), x.shape[dim]):
            dim = _WHOLE
        levels, scale = _quantised(x.float(), dim)
        tensors, meta["dim"] = {"x": levels, "scale": scale}, dim
    if mark and _mark(tensors["x"], x):
        meta["marked"] = True
    return tensors, meta


def encoded_bytes(elements: int, channels: int, codec: str, itemsize: int = 4) -> int:
    """Return the bytes of the tensors that `encode_activation` makes.

    Args:
        elements: Elements of the activation.
        channels: Size of its dimension of channels.
        codec: One of `CODECS`.
        itemsize: Bytes of an element in the type of the activation, a float.

    Raises:
        ConfigError: The codec is unknown.
    """
    check_codec(codec)
    if codec == "fp32":
        return elements * itemsize
    if codec in _HALF:
        return elements * _HALF[codec].itemsize
    return elements + _SCALE_BYTES * (channels if _own_scales(elements, channels) else 1)


def check_codec(name: object, rule: str = "") -> None:
    """Refuse what is no codec.

    Args:
        name: What was given.
        rule: What else may stand there, for the message.

    Raises:
        ConfigError: There is no such codec.
    """
    if name not in CODECS:
        known = f"must be one of {', '.join(CODECS)}{rule}"
        hint = did_you_mean(str(name), CODECS).strip()
        raise ConfigError.of("policy.codec", name, known, hint)


def encode_activations(
    values: Sequence[Tensor], codec: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what a frame carries for all tensors at a cut; for a single one as for it alone.

    Args:
        values: At least one.
        codec: One of `CODECS`.

    Raises:
        ConfigError: The codec is unknown.
        ModelError: One holds NaN or an infinity and the codec is int8.
    """
    tensors, meta = encode_activation(values[0], codec)
    more = []
    for number, value in enumerate(values[1:], 1):
        written, about = encode_activation(value, codec)
        tensors |= {f"{name}{number}": tensor for name, tensor in written.items()}
        more.append(about)
    return tensors, meta | ({"more": more} if more else {})


def decode_activations(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> tuple[Tensor, ...]:
    """Return all tensors at a cut, as `encode_activations` took them.

    Raises:
        FrameError: Tensors and values do not belong together.
    """
    first, more = decode_activation(tensors, meta), meta.get("more", [])
    if not isinstance(more, list) or not all(isinstance(about, Mapping) for about in more):
        raise FrameError("more: must be a list of what is known of further tensors")
    further = []
    for number, about in enumerate(more, 1):
        named = {key: tensors[f"{key}{number}"] for key in ("x", "scale")
                 if f"{key}{number}" in tensors}  # fmt: skip
        further.append(decode_activation(named, about))
    return first, *further


def _own_scales(elements: int, channels: int) -> bool:
    """Whether each channel has a scale of its own."""
    return elements >= LEAST_PER_SCALE * channels


def _halved(x: Tensor, dtype: torch.dtype) -> Tensor:
    half = x.to(dtype)
    if dtype == torch.float16 and half.isinf().any():
        largest = torch.finfo(dtype).max
        half = torch.where(x.isinf(), half, half.clamp(-largest, largest))
    return half


def _quantised(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    others = [d for d in range(x.dim()) if d != dim]
    if x.numel() == 0:
        top = x.new_zeros(1 if dim == _WHOLE else x.shape[dim])
    else:
        top = torch.maximum(x.amax(others), -x.amin(others)).reshape(-1)
    if not top.isfinite().all():
        raise ModelError(
            "policy.codec=int8: the tensor at the cut holds NaN or an infinity; lower client.lr, "
            "or choose fp32 to see where it comes from"
        )
    zero = top < _SMALLEST
    scale = top.div(_LEVELS).masked_fill_(zero, 0.0)
    inverse = top.reciprocal().mul_(_LEVELS).masked_fill_(zero, 0.0)
    levels = x.mul(_along(inverse, x, dim)).round_().to(torch.int8)
    return levels, scale


def _mark(written: Tensor, x: Tensor) -> bool:
    """Write -1 for what became zero and was none; return whether there was any."""
    if x.device.type != "cpu":
        lost = written.eq(0) & x.ne(0)
        written.masked_fill_(lost, -1)
        return bool(lost.any())
    # NumPy compares and chooses several times faster than torch
    bits, before = (t.view(INTEGERS[t.element_size()]).numpy() for t in (written, x))
    is_lost = bits == 0
    is_lost &= before != 0
    if not is_lost.any():
        return False
    minus_one = written.new_tensor(-1).view(INTEGERS[written.element_size()]).item()
    bits |= np.multiply(is_lost.view(np.int8), minus_one, dtype=bits.dtype)
    return True


def _along(scale: Tensor, x: Tensor, dim: int) -> Tensor:
    """View `scale` so that it broadcasts over all dimensions of `x` but `dim`."""
    if dim == _WHOLE:
        return scale.reshape(())
    return scale.reshape([-1 if d == dim else 1 for d in range(x.dim())])


def decode_activation(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Tensor:
    """Return the activation, in its shape, type and memory format.

    Args:
        tensors: As `encode_activation` gives them.
        meta: As `encode_activation` gives it; further keys are ignored.

    Raises:
        FrameError: Tensors and values do not belong together.
    """
    codec, x = meta.get("codec"), tensors.get("x")
    if x is None or codec not in CODECS:
        raise FrameError(f"codec={codec!r}: the frame holds no activation of a known codec")
    if codec == "fp32":
        return x
    dtype = _FLOATS.get(str(meta.get("dtype")))
    if dtype is None:
        raise FrameError(f"dtype={meta.get('dtype')!r}: not a type that codec {codec} restores")
    if codec in _HALF:
        if x.dtype != _HALF[codec]:
            raise FrameError(f"codec={codec}: the tensor has the type {x.dtype}")
        whole = x.to(dtype)
        return whole.masked_fill(whole < 0, 0) if meta.get("marked") else whole
    scale, dim = tensors.get("scale"), meta.get("dim")
    if scale is None or type(dim) is not int or x.dtype != torch.int8 or scale.dim() != 1:
        raise FrameError("codec=int8: the frame lacks levels, a scale per channel, or their dim")
    channels = 1 if dim == _WHOLE else x.shape[dim] if 0 <= dim < x.dim() else -1
    if len(scale) != channels or scale.dtype != torch.float32:
        raise FrameError(f"codec=int8: {len(scale)} scales do not fit {tuple(x.shape)}, dim {dim}")
    levels = x.clamp(min=0) if meta.get("marked") else x
    return levels.float().mul_(_along(scale, x, dim)).to(dtype)
