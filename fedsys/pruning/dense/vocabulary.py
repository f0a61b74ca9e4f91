"""The words of a saved architecture: the layers, functions and methods that a file may name.

All of them compute on tensors and nothing else: none reads files, runs code or reaches attributes,
but for ``x.shape``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedsys.models.batchnorm import DeferredBatchNorm
from fedsys.randomness import KeyedDropout

_LAYER_NAMES = (
    "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
    "Linear", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm", "LayerNorm",
    "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LocalResponseNorm",
    "ReLU", "ReLU6", "Hardtanh", "Hardswish", "Hardsigmoid", "SiLU", "Sigmoid", "Tanh", "GELU",
    "LeakyReLU", "PReLU", "ELU", "SELU", "CELU", "GLU", "Softplus", "Softsign", "Softmax",
    "LogSoftmax", "Mish", "LogSigmoid", "Hardshrink", "Softshrink", "Tanhshrink", "Threshold",
    "Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout",
    "FeatureAlphaDropout", "MaxPool1d", "MaxPool2d", "MaxPool3d", "AvgPool1d", "AvgPool2d",
    "AvgPool3d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d", "Upsample",
    "UpsamplingNearest2d", "UpsamplingBilinear2d", "ZeroPad1d", "ZeroPad2d", "ZeroPad3d",
    "Flatten", "Unflatten", "PixelShuffle", "PixelUnshuffle", "ChannelShuffle",
)  # fmt: skip
_OPERATOR_NAMES = (
    "add", "sub", "mul", "truediv", "floordiv", "neg", "getitem", "iadd", "isub", "imul",
    "itruediv",
)  # fmt: skip
_TORCH_NAMES = (
    "add", "sub", "mul", "div", "neg", "abs", "exp", "clamp", "relu", "sigmoid", "tanh", "cat",
    "concat", "flatten", "permute", "transpose", "mean", "index_select", "chunk", "split",
    "reshape", "unsqueeze", "squeeze", "softmax", "matmul", "stack",
)  # fmt: skip
_FUNCTIONAL_NAMES = (
    "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "sigmoid", "tanh", "gelu",
    "leaky_relu", "elu", "selu", "celu", "softplus", "softsign", "mish", "logsigmoid", "softmax",
    "log_softmax", "dropout", "dropout1d", "dropout2d", "dropout3d", "max_pool1d", "max_pool2d",
    "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "interpolate", "pad", "normalize", "layer_norm",
)  # fmt: skip

LAYERS: dict[str, type[nn.Module]] = {name: getattr(nn, name) for name in _LAYER_NAMES}
LAYERS |= {"KeyedDropout": KeyedDropout, "DeferredBatchNorm": DeferredBatchNorm}

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATOR_NAMES},
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH_NAMES},
    **{f"F.{name}": getattr(F, name) for name in _FUNCTIONAL_NAMES},
    "getattr": getattr,  # of nothing but .shape: the reader checks that
}
FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}

METHODS = frozenset({
    "add", "sub", "mul", "relu", "sigmoid", "tanh", "neg", "abs", "exp", "clamp", "contiguous",
    "view", "reshape", "flatten", "size", "mean", "permute", "transpose", "chunk", "split",
    "squeeze", "unsqueeze", "expand", "to",
})  # fmt: skip

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = {str(t).removeprefix("torch."): t for t in _FLOATS}
