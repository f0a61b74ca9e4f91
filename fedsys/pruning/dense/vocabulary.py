"""The words of a saved architecture: the layers, functions and methods that a file may name.

All of them compute on tensors and nothing else: none reads files, runs code or reaches attributes,
but for `ATTRIBUTES`. What a word does to channels stands in `fedsys.pruning.dense.ops`: one that is
not understood there leaves all channels that it reads alone.
"""

from __future__ import annotations

import importlib
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
    "Linear", "Bilinear", "MultiheadAttention",
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm", "LayerNorm", "RMSNorm",
    "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LocalResponseNorm",
    "ReLU", "ReLU6", "Hardtanh", "Hardswish", "Hardsigmoid", "SiLU", "Sigmoid", "Tanh", "GELU",
    "LeakyReLU", "PReLU", "RReLU", "ELU", "SELU", "CELU", "GLU", "Softplus", "Softsign", "Softmax",
    "Softmax2d", "Softmin", "LogSoftmax", "Mish", "LogSigmoid", "Hardshrink", "Softshrink",
    "Tanhshrink", "Threshold",
    "Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout",
    "FeatureAlphaDropout", "MaxPool1d", "MaxPool2d", "MaxPool3d", "AvgPool1d", "AvgPool2d",
    "AvgPool3d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d", "LPPool1d", "LPPool2d",
    "LPPool3d", "Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d",
    "ZeroPad1d", "ZeroPad2d", "ZeroPad3d", "ReflectionPad1d", "ReflectionPad2d", "ReflectionPad3d",
    "ReplicationPad1d", "ReplicationPad2d", "ReplicationPad3d", "CircularPad1d", "CircularPad2d",
    "CircularPad3d", "ConstantPad1d", "ConstantPad2d", "ConstantPad3d",
    "Flatten", "Unflatten", "Fold", "Unfold", "PixelShuffle", "PixelUnshuffle", "ChannelShuffle",
)  # fmt: skip
_OPERATOR_NAMES = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "pos", "invert",
    "and_", "or_", "xor", "eq", "ne", "lt", "le", "gt", "ge", "getitem", "iadd", "isub", "imul",
    "itruediv",
)  # fmt: skip
_SHARED_NAMES = (
    "add", "sub", "mul", "div", "subtract", "multiply", "divide", "true_divide", "floor_divide",
    "remainder", "fmod", "pow", "square", "sqrt", "rsqrt", "reciprocal", "neg", "abs", "sign",
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos",
    "atan", "atan2", "sinh", "cosh", "erf", "erfc", "floor", "ceil", "round", "trunc", "frac",
    "clamp", "clamp_min", "clamp_max", "clip", "relu", "sigmoid", "tanh", "softmax", "log_softmax",
    "logsumexp", "logit", "lerp", "addcmul", "addcdiv", "nan_to_num",
    "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "logical_xor",
    "bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor", "isnan", "isinf", "isfinite",
    "maximum", "minimum", "fmax", "fmin", "where", "max", "min", "amax", "amin", "aminmax",
    "argmax", "argmin", "any", "all", "sum", "prod", "mean", "std", "var", "norm", "median",
    "cumsum", "cumprod", "cummax", "cummin", "diff", "topk", "sort", "argsort", "kthvalue",
    "gather", "scatter", "scatter_add", "index_select", "index_add", "masked_fill", "take",
    "take_along_dim", "select", "narrow", "unbind", "chunk", "split", "tensor_split", "roll",
    "flip", "fliplr", "flipud", "rot90", "tril", "triu", "diagonal", "diag_embed",
    "flatten", "unflatten", "reshape", "permute", "transpose", "swapaxes", "swapdims", "movedim",
    "moveaxis", "unsqueeze", "squeeze", "broadcast_to", "tile", "repeat_interleave",
    "matmul", "mm", "bmm", "mv", "dot", "addmm", "addbmm", "baddbmm", "outer", "numel",
)  # fmt: skip
"""Functions of torch that tensors have as methods, too."""

_TORCH_NAMES = (
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "einsum", "tensordot",
    "cdist", "var_mean", "std_mean", "meshgrid", "arange", "linspace", "zeros", "ones", "full",
    "eye", "zeros_like", "ones_like", "full_like", "cosine_similarity", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle",
)  # fmt: skip
_METHOD_NAMES = (
    "contiguous", "view", "view_as", "reshape_as", "expand", "expand_as", "repeat", "size", "dim",
    "to", "type_as", "float", "double", "half", "bfloat16", "int", "long", "bool", "clone",
    "detach", "t", "new_zeros", "new_ones", "new_full",
)  # fmt: skip
_FUNCTIONAL_NAMES = (
    "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "sigmoid", "tanh", "gelu",
    "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "glu", "softplus", "softsign", "mish",
    "logsigmoid", "hardshrink", "softshrink", "tanhshrink", "threshold", "softmax", "softmin",
    "log_softmax", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_alpha_dropout", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "lp_pool1d", "lp_pool2d", "lp_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "interpolate", "pad", "normalize", "layer_norm", "rms_norm",
    "batch_norm", "instance_norm", "group_norm", "local_response_norm", "linear", "bilinear",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "fold", "unfold", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "cosine_similarity",
    "one_hot", "scaled_dot_product_attention", "grid_sample", "affine_grid",
)  # fmt: skip
_FOREIGN = {
    "torchvision.models.swin_transformer": (
        "shifted_window_attention", "_get_relative_position_bias", "_patch_merging_pad",
    ),
}  # fmt: skip
"""Functions that a model's package keeps whole in a traced graph (``torch.fx.wrap``)."""

LAYERS: dict[str, type[nn.Module]] = {name: getattr(nn, name) for name in _LAYER_NAMES}
LAYERS |= {"KeyedDropout": KeyedDropout, "DeferredBatchNorm": DeferredBatchNorm}

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATOR_NAMES},
    **{f"F.{name}": getattr(F, name) for name in _FUNCTIONAL_NAMES},
    **{f"torch.{name}": getattr(torch, name) for name in (*_SHARED_NAMES, *_TORCH_NAMES)},
    "torch.vector_norm": torch.linalg.vector_norm,
    "getattr": getattr,  # of nothing but `ATTRIBUTES`: the reader checks that
}
_NAMES = {function: name for name, function in FUNCTIONS.items()}

METHODS = frozenset((*_SHARED_NAMES, *_METHOD_NAMES))
ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "T", "mT", "values", "indices"})

_TYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
DTYPES = {str(t).removeprefix("torch."): t for t in _TYPES}


def name_of(function: Any) -> str | None:
    """Return the word for a function, or None if there is none."""
    module, name = getattr(function, "__module__", None), getattr(function, "__name__", None)
    if name in _FOREIGN.get(str(module), ()):
        return f"{module}.{name}"
    try:
        return _NAMES.get(function)
    except TypeError:  # what cannot be hashed
        return None


def function_of(name: object) -> Callable[..., Any] | None:
    """Return the function for a word, or None if there is no such word.

    The package of the model that it comes from is imported if need be.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[str(name)]
    module, _, function = str(name).rpartition(".")
    if function not in _FOREIGN.get(module, ()):
        return None
    try:
        return getattr(importlib.import_module(module), function, None)
    except ImportError:
        return None
