"""Every word of a saved architecture, in a small model that is pruned, saved and read again."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from fedsys.errors import ModelError
from fedsys.pruning.candidates import parent_candidate
from fedsys.pruning.dense import vocabulary
from fedsys.pruning.dense.architecture import load, save
from fedsys.pruning.dense.shrink import shrink

SHAPE = (3, 4, 4)
Word = Callable[..., Any]
OPTIONS: Any = SimpleNamespace(fold_batchnorm=True)


class Net(nn.Module):
    """A convolution that loses channels, a word behind it, and a head that reads both."""

    def __init__(
        self, compute: Callable[[Net, Tensor], Any], part: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.head, self.part = nn.Linear(4, 5), part
        self.vector = nn.Parameter(torch.linspace(0.2, 0.9, 4))
        self.register_buffer("index", torch.tensor([2, 0]))
        self._compute = compute

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).sigmoid() * 0.8 + 0.1  # where all functions are defined
        y = self._compute(self, x)
        result: Tensor = self.head(x.mean((2, 3))) + y.float().mean()
        return result


def pruned_exactly(net: nn.Module, folder: Path) -> tuple[float, Tensor]:
    """Prune, save and load `net`, and its parent; return the share of parameters that is left."""
    net.eval()
    masks = {"a.weight": torch.ones_like(net.get_parameter("a.weight"))}
    masks["a.weight"][::2] = 0
    images = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    small = shrink(net, SHAPE, masks=masks)
    read = load(save(small.model, folder))
    with torch.no_grad():
        parent = parent_candidate(net, OPTIONS, SHAPE).module(images)
        torch.testing.assert_close(parent, net(images), rtol=1e-5, atol=1e-5)
        net.get_parameter("a.weight").mul_(masks["a.weight"])
        answer = read(images)
        assert torch.equal(answer, small.model(images))
        torch.testing.assert_close(answer, net(images), rtol=1e-5, atol=1e-5)
    assert small.model.get_submodule("a").out_channels == 4, "what is dead goes, whatever follows"
    return small.report.parameters / small.report.parameters_before, answer


def seeded(compute: Callable[[Net, Tensor], Any], part: nn.Module | None = None) -> Net:
    torch.manual_seed(0)
    return Net(compute, part)


# --------------------------------------------------------------------------------------------------
# Functions of torch, and the methods of the same name

ONE = (
    "square", "sqrt", "rsqrt", "reciprocal", "neg", "abs", "sign", "exp", "exp2", "expm1", "log",
    "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "erf",
    "erfc", "floor", "ceil", "round", "trunc", "frac", "relu", "sigmoid", "tanh", "logit",
    "nan_to_num", "isnan", "isinf", "isfinite", "logical_not", "argmax", "argmin", "any", "all",
    "sum", "prod", "mean", "std", "var", "norm", "median", "flatten", "squeeze", "fliplr",
    "flipud", "rot90", "tril", "triu", "diagonal", "diag_embed",
)  # fmt: skip
TWO = (
    "add", "sub", "mul", "div", "subtract", "multiply", "divide", "true_divide", "floor_divide",
    "remainder", "fmod", "pow", "atan2", "eq", "ne", "lt", "le", "gt", "ge", "logical_and",
    "logical_or", "logical_xor", "maximum", "minimum", "fmax", "fmin", "matmul",
)  # fmt: skip
WITH: dict[str, Word] = {
    "clamp": lambda t, x: t(x, 0.3, 0.6),
    "clip": lambda t, x: t(x, 0.3, 0.6),
    "clamp_min": lambda t, x: t(x, 0.5),
    "clamp_max": lambda t, x: t(x, 0.5),
    "softmax": lambda t, x: t(x, 1)[:, 0],
    "log_softmax": lambda t, x: t(x, 1),
    "logsumexp": lambda t, x: t(x, 1),
    "lerp": lambda t, x: t(x, 1 - x, 0.3),
    "addcmul": lambda t, x: t(x, x, 1 - x),
    "addcdiv": lambda t, x: t(x, x, 1 + x),
    "bitwise_and": lambda t, x: t(x > 0.4, x < 0.6),
    "bitwise_or": lambda t, x: t(x < 0.4, x > 0.6),
    "bitwise_xor": lambda t, x: t(x > 0.4, x < 0.6),
    "bitwise_not": lambda t, x: t(x > 0.4),
    "max": lambda t, x: t(x, 1)[0],
    "min": lambda t, x: t(x, 1).values,
    "amax": lambda t, x: t(x, (2, 3)),
    "amin": lambda t, x: t(x, 1),
    "aminmax": lambda t, x: t(x)[1],
    "cumsum": lambda t, x: t(x, 1),
    "cumprod": lambda t, x: t(x, 1),
    "cummax": lambda t, x: t(x, 1)[0],
    "cummin": lambda t, x: t(x, 1)[0],
    "diff": lambda t, x: t(x)[..., 0],
    "topk": lambda t, x: t(x, 2, 1)[0],
    "sort": lambda t, x: t(x, 1)[0][:, 1],
    "argsort": lambda t, x: t(x, 1)[:, 0],
    "kthvalue": lambda t, x: t(x, 2, 1)[0],
    "gather": lambda t, x: t(x, 1, x.argsort(1)[:, :2]),
    "scatter": lambda t, x: t(x, 1, x.argsort(1)[:, :2], 0.5),
    "scatter_add": lambda t, x: t(x, 1, x.argsort(1)[:, :2], x[:, :2]),
    "masked_fill": lambda t, x: t(x, x > 0.5, 0.0),
    "take": lambda t, x: t(x, x.argmax(1)),
    "take_along_dim": lambda t, x: t(x, x.argsort(1)[:, :2], 1),
    "select": lambda t, x: t(x, 1, 2),
    "narrow": lambda t, x: t(x, 1, 1, 2),
    "unbind": lambda t, x: t(x, 1)[3],
    "chunk": lambda t, x: torch.cat(t(x, 2, 1)[::-1], 1)[:, 0],
    "split": lambda t, x: torch.stack(t(x, 2, 1)).amax(0)[:, 1],
    "tensor_split": lambda t, x: t(x, 3, 1)[2],
    "roll": lambda t, x: t(x, 1, 1)[:, 0],
    "flip": lambda t, x: t(x, [1])[:, 0],
    "unflatten": lambda t, x: t(x, 1, (2, 2))[:, 1],
    "reshape": lambda t, x: t(x, (-1, 2, 32))[:, 0],
    "permute": lambda t, x: t(x, (0, 2, 3, 1))[..., 0],
    "transpose": lambda t, x: t(x, 1, 2)[:, 0],
    "swapaxes": lambda t, x: t(x, 1, 2)[:, 0],
    "swapdims": lambda t, x: t(x, 1, 2)[:, 0],
    "movedim": lambda t, x: t(x, 1, 3)[..., 0],
    "moveaxis": lambda t, x: t(x, 1, 3)[..., 0],
    "unsqueeze": lambda t, x: t(x, 1)[:, :, 2],
    "broadcast_to": lambda t, x: t(x[:1], (2, 4, 4, 4)),
    "tile": lambda t, x: t(x, (1, 2, 1, 1))[:, 5],
    "repeat_interleave": lambda t, x: t(x, 2, 1)[:, 1],
    "mm": lambda t, x: t(x.flatten(1), x.flatten(1).T),
    "bmm": lambda t, x: t(x.flatten(2), x.flatten(2).mT),
    "mv": lambda t, x: t(x.flatten(1), x[0].flatten()),
    "dot": lambda t, x: t(x[0].flatten(), x[-1].flatten()),
    "outer": lambda t, x: t(x[0, 0, 0], x[-1, 0, 1]),
    "addmm": lambda t, x: t(x[0, 0], x[0, 1], x[0, 2]),
    "addbmm": lambda t, x: t(x[0, 0], x[0], x[-1]),
    "baddbmm": lambda t, x: t(x[0], x[0], x[-1], beta=0.5),
    "numel": lambda t, x: x[:, 0] / t(x[:, 1]),
}
WITH_NET: dict[str, Callable[[Word, Net, Tensor], Any]] = {
    "index_select": lambda t, m, x: t(x, 1, m.index),
    "index_add": lambda t, m, x: t(x, 1, m.index, x[:, 1:3])[:, 2],
}


def compute(name: str, word: Word) -> Callable[[Net, Tensor], Any]:
    """Return what a model computes with a word that may be a function or a method."""
    if name in ONE:
        return lambda m, x: word(x)
    if name in TWO:
        return lambda m, x: word(x, 1.05 - x)
    if name in WITH:
        return lambda m, x: WITH[name](word, x)
    return lambda m, x: WITH_NET[name](word, m, x)


SHARED = [*ONE, *TWO, *WITH, *WITH_NET]


@pytest.mark.parametrize("name", SHARED)
def test_functions_of_torch_and_methods_of_that_name(name: str, tmp_path: Path) -> None:
    def method(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, name)(*args, **kwargs)

    both = compute(name, getattr(torch, name)), compute(name, method)
    net = seeded(lambda m, x: both[0](m, x).float().mean() + 2 * both[1](m, x).float().mean())
    pruned_exactly(net, tmp_path)


# --------------------------------------------------------------------------------------------------
# Everything else that a model may call

OTHERS: dict[str, Callable[[Net, Tensor], Any]] = {
    "torch.where": lambda m, x: torch.where(x > 0.5, x, 0.2),
    ".where": lambda m, x: x.where(x > 0.5, 1 - x),
    "torch.cat": lambda m, x: torch.cat([x, x * 2], 1)[:, 5],
    "torch.concat": lambda m, x: torch.concat([x, x * 2], 1)[:, 5],
    "torch.concatenate": lambda m, x: torch.concatenate([x, x * 2], 1)[:, 5],
    "torch.stack": lambda m, x: torch.stack([x, x**2]).sum(0),
    "torch.hstack": lambda m, x: torch.hstack([x, x * 2])[:, 5],
    "torch.vstack": lambda m, x: torch.vstack([x, x * 2])[-1],
    "torch.dstack": lambda m, x: torch.dstack([x, x * 2])[:, :, 5],
    "torch.einsum": lambda m, x: torch.einsum("bchw,c->bhw", x, m.vector),
    "torch.tensordot": lambda m, x: torch.tensordot(x, m.vector, ([1], [0])),
    "torch.cdist": lambda m, x: torch.cdist(x[:, 0], x[:, 1]),
    "torch.var_mean": lambda m, x: torch.var_mean(x, 1)[0],
    "torch.std_mean": lambda m, x: torch.std_mean(x, 1)[1],
    "torch.meshgrid": lambda m, x: torch.meshgrid(x[0, 0, 0], x[0, 1, 0], indexing="ij")[0],
    "torch.arange": lambda m, x: torch.arange(x.size(2), device=x.device, dtype=x.dtype) * x,
    "torch.linspace": lambda m, x: torch.linspace(0.0, 1.0, x.size(3)) * x,
    "torch.zeros": lambda m, x: torch.cat([torch.zeros((x.size(0), 1, 4, 4)), x], 1)[:, 1],
    "torch.ones": lambda m, x: torch.ones((x.size(0), 1, 4, 4)) - x,
    "torch.full": lambda m, x: torch.full((x.size(0), 1, 4, 4), 0.3) * x,
    "torch.eye": lambda m, x: torch.eye(x.size(3)) * x,
    "torch.zeros_like": lambda m, x: torch.zeros_like(x) + x,
    "torch.ones_like": lambda m, x: torch.ones_like(x) - x,
    "torch.full_like": lambda m, x: torch.full_like(x, 0.4) * x,
    "torch.cosine_similarity": lambda m, x: torch.cosine_similarity(x, 1 - x, 1),
    "torch.pixel_shuffle": lambda m, x: torch.pixel_shuffle(x, 2)[..., :2],
    "torch.pixel_unshuffle": lambda m, x: torch.pixel_unshuffle(x, 2)[:, 3],
    "torch.channel_shuffle": lambda m, x: torch.channel_shuffle(x, 2)[:, 1],
    "torch.vector_norm": lambda m, x: torch.linalg.vector_norm(x, 2, (2, 3)),
    ".contiguous": lambda m, x: x.contiguous(),
    ".view": lambda m, x: x.view(x.size(0), 2, 2, 4, 4)[:, 1],
    ".view_as": lambda m, x: x.view_as(1 - x),
    ".reshape_as": lambda m, x: x.reshape_as(1 - x),
    ".expand": lambda m, x: x[:, :1].expand(-1, 3, -1, -1),
    ".expand_as": lambda m, x: x[:, :1].expand_as(x) * x,
    ".repeat": lambda m, x: x.repeat(1, 2, 1, 1)[:, 5],
    ".size": lambda m, x: x * x.size(1),
    ".dim": lambda m, x: x * x.dim(),
    ".to": lambda m, x: x.to(torch.float32),
    ".type_as": lambda m, x: (x > 0.4).type_as(x),
    ".float": lambda m, x: (x > 0.4).float(),
    ".double": lambda m, x: (x > 0.4).double(),
    ".half": lambda m, x: (x > 0.4).half(),
    ".bfloat16": lambda m, x: (x > 0.4).bfloat16(),
    ".int": lambda m, x: (4 * x).int(),
    ".long": lambda m, x: (4 * x).long(),
    ".bool": lambda m, x: (2 * x).int().bool(),
    ".clone": lambda m, x: x.clone(),
    ".detach": lambda m, x: x.detach(),
    ".t": lambda m, x: x.flatten(1).t(),
    ".new_zeros": lambda m, x: x.new_zeros(x.shape) + x,
    ".new_ones": lambda m, x: x.new_ones((x.shape[0], 1, 4, 4)) + x,
    ".new_full": lambda m, x: x.new_full((1, 4, 4, 4), 0.3) + x,
    "operator.add": lambda m, x: x + x.flip(1),
    "operator.sub": lambda m, x: 0.3 - x,
    "operator.mul": lambda m, x: x * x.mean((2, 3), keepdim=True),
    "operator.truediv": lambda m, x: 0.5 / x,
    "operator.floordiv": lambda m, x: (10 * x) // 2,
    "operator.mod": lambda m, x: (10 * x) % 3,
    "operator.pow": lambda m, x: x**2 + 2**x + x ** (1 - x),
    "operator.matmul": lambda m, x: x @ x,
    "operator.neg": lambda m, x: -x,
    "operator.pos": lambda m, x: +x,
    "operator.invert": lambda m, x: ~(x > 0.5),
    "operator.and_": lambda m, x: (x > 0.3) & (x < 0.6),
    "operator.or_": lambda m, x: (x < 0.3) | (x > 0.6),
    "operator.xor": lambda m, x: (x > 0.3) ^ (x < 0.6),
    "operator.eq": lambda m, x: x == x.amax(1, keepdim=True),
    "operator.ne": lambda m, x: x != x.amax(1, keepdim=True),
    "operator.lt": lambda m, x: x < 0.5,
    "operator.le": lambda m, x: x <= 0.5,
    "operator.gt": lambda m, x: x > 0.5,
    "operator.ge": lambda m, x: x >= 0.5,
    "operator.getitem": lambda m, x: x[..., ::2, 1::2][:, None, -1],
    "operator.iadd": lambda m, x: operator.iadd(x * 1, 0.5),
    "operator.isub": lambda m, x: operator.isub(x * 1, 0.5),
    "operator.imul": lambda m, x: operator.imul(x * 1, x),
    "operator.itruediv": lambda m, x: operator.itruediv(x * 1, 2.0),
    "getattr": lambda m, x: x * x.shape[1] + x.ndim + x.flatten(1).T.sum() + x.mT,
}
FUNCTIONAL: dict[str, Callable[[Net, Tensor], Any]] = {
    "leaky_relu": lambda m, x: F.leaky_relu(x - 0.5, 0.2),
    "prelu": lambda m, x: F.prelu(x - 0.5, m.vector),
    "rrelu": lambda m, x: F.rrelu(x - 0.5),
    "glu": lambda m, x: F.glu(x, 1),
    "threshold": lambda m, x: F.threshold(x, 0.5, 0.1),
    "softmax": lambda m, x: F.softmax(x, 1)[:, 0],
    "softmin": lambda m, x: F.softmin(x, 1)[:, 0],
    "log_softmax": lambda m, x: F.log_softmax(x, 1)[:, 0],
    **{
        f"{kind}_pool{d}d": lambda m, x, kind=kind, d=d: getattr(F, f"{kind}_pool{d}d")(
            (x.flatten(2), x, x.unsqueeze(2))[d - 1],
            *{"lp": (2.0, (2, 2, (1, 2, 2))[d - 1])}.get(
                kind, (1,) if "adaptive" in kind else ((2, 2, (1, 2, 2))[d - 1],)
            ),
        )
        for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max")
        for d in (1, 2, 3)
    },
    "interpolate": lambda m, x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "pad": lambda m, x: F.pad(x, (1, 0), value=0.5),
    "normalize": lambda m, x: F.normalize(x, dim=1),
    "layer_norm": lambda m, x: F.layer_norm(x, (4,), m.vector)[..., 0],
    "rms_norm": lambda m, x: F.rms_norm(x, (4,), m.vector)[..., 0],
    "batch_norm": lambda m, x: F.batch_norm(x, m.vector, m.vector + 1, m.vector, -m.vector),
    "instance_norm": lambda m, x: F.instance_norm(x)[..., 0],
    "group_norm": lambda m, x: F.group_norm(x, 2, m.vector, m.vector)[..., 0],
    "local_response_norm": lambda m, x: F.local_response_norm(x, 2, 0.5),
    "linear": lambda m, x: F.linear(x, m.b.weight[:, :4, 0, 0]),
    "bilinear": lambda m, x: F.bilinear(x, 1 - x, m.b.weight.view(2, 4, 4)),
    **{
        f"conv{d}d": lambda m, x, d=d: getattr(F, f"conv{d}d")(
            (x.flatten(2), x, x.unsqueeze(2))[d - 1],
            m.b.weight[:, :4].reshape(4, 4, *[1] * d), m.vector, padding=1,
        )
        for d in (1, 2, 3)
    },
    **{
        f"conv_transpose{d}d": lambda m, x, d=d: getattr(F, f"conv_transpose{d}d")(
            (x.flatten(2), x, x.unsqueeze(2))[d - 1], m.b.weight[:, :4].reshape(4, 4, *[1] * d)
        )
        for d in (1, 2, 3)
    },
    "fold": lambda m, x: F.fold(x.flatten(2), (5, 5), (2, 2)),
    "unfold": lambda m, x: F.unfold(x, 2)[:, 3],
    "pixel_shuffle": lambda m, x: F.pixel_shuffle(x, 2)[..., :2],
    "pixel_unshuffle": lambda m, x: F.pixel_unshuffle(x, 2)[:, 3],
    "channel_shuffle": lambda m, x: F.channel_shuffle(x, 2)[:, 1],
    "cosine_similarity": lambda m, x: F.cosine_similarity(x, 1 - x, 1),
    "one_hot": lambda m, x: F.one_hot(x.argmax(1), 4)[..., 0],
    "scaled_dot_product_attention": lambda m, x: F.scaled_dot_product_attention(x, 1 - x, x),
    "grid_sample": lambda m, x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=True),
    "affine_grid": lambda m, x: F.affine_grid(x[:, 0, :2, :3], [x.size(0), 1, 4, 4], False),
}  # fmt: skip
PLAIN = (
    "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "sigmoid", "tanh", "gelu",
    "elu", "selu", "celu", "softplus", "softsign", "mish", "logsigmoid", "hardshrink",
    "softshrink", "tanhshrink",
)  # fmt: skip
FUNCTIONAL |= {name: lambda m, x, n=name: getattr(F, n)(x - 0.5) for name in PLAIN}  # type: ignore[misc]
DROPOUT = (
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
)  # fmt: skip
FUNCTIONAL |= {  # type: ignore[misc]
    name: lambda m, x, n=name: getattr(F, n)(x.flatten(2) if "1d" in n else x, 0.5, m.training)
    for name in DROPOUT
}
OTHERS |= {f"F.{name}": case for name, case in FUNCTIONAL.items()}


@pytest.mark.parametrize("name", OTHERS)
def test_other_words(name: str, tmp_path: Path) -> None:
    pruned_exactly(seeded(OTHERS[name]), tmp_path)


def test_every_word_has_a_model() -> None:
    covered = {f"torch.{name}" for name in SHARED} | set(OTHERS)
    assert set(vocabulary.FUNCTIONS) - covered == set()
    methods = set(SHARED) | {name[1:] for name in OTHERS if name.startswith(".")}
    assert vocabulary.METHODS - methods == set()
    assert set(LAYERS) == set(vocabulary.LAYERS)


# --------------------------------------------------------------------------------------------------
# Layers

BY_SIZE: dict[str, tuple[Any, ...]] = {
    "Conv": (4, 4, 1), "ConvTranspose": (4, 4, 1), "BatchNorm": (4,), "InstanceNorm": (4,),
    "Dropout": (), "MaxPool": (1,), "AvgPool": (1,), "AdaptiveAvgPool": (1,),
    "AdaptiveMaxPool": (1,), "LPPool": (2.0, 1), "ZeroPad": (1,), "ReflectionPad": (0,),
    "ReplicationPad": (1,), "CircularPad": (1,), "ConstantPad": (1, 0.5),
}  # fmt: skip
ANY_SIZE: dict[str, tuple[Any, ...]] = {
    "Linear": (4, 2), "GroupNorm": (2, 4), "LayerNorm": ((4, 4),), "RMSNorm": ((4, 4),),
    "LocalResponseNorm": (2,), "LeakyReLU": (0.2,), "PReLU": (4,), "Softmax": (1,),
    "Softmin": (1,), "LogSoftmax": (1,), "GLU": (1,), "Threshold": (0.5, 0.1),
    "Upsample": ((8, 8),), "UpsamplingNearest2d": (8,), "UpsamplingBilinear2d": (8,),
    "Flatten": (2,),
    "Unflatten": (1, (2, 2)), "Unfold": (2,), "PixelShuffle": (2,), "PixelUnshuffle": (2,),
    "ChannelShuffle": (2,), "KeyedDropout": ("part", 0.5),
    "DeferredBatchNorm": (4, 1e-5, 0.1, True), "Dropout": (), "AlphaDropout": (),
    "FeatureAlphaDropout": (),
    **dict.fromkeys((
        "ReLU", "ReLU6", "Hardtanh", "Hardswish", "Hardsigmoid", "SiLU", "Sigmoid", "Tanh", "GELU",
        "RReLU", "ELU", "SELU", "CELU", "Softplus", "Softsign", "Softmax2d", "Mish", "LogSigmoid",
        "Hardshrink", "Softshrink", "Tanhshrink", "Identity",
    ), ()),
}  # fmt: skip
LAYERS: dict[str, Callable[[], tuple[nn.Module, Callable[[Net, Tensor], Any]]]] = {
    "Bilinear": lambda: (nn.Bilinear(4, 4, 2), lambda m, x: m.part(x, 1 - x)),
    "Fold": lambda: (nn.Fold((5, 5), (2, 2)), lambda m, x: m.part(x.flatten(2))),
    "MultiheadAttention": lambda: (
        nn.MultiheadAttention(4, 2, bias=False, add_bias_kv=True, batch_first=True),
        lambda m, x: m.part(x[:, 0], x[:, 1], x[:, 2])[0],
    ),
    **{
        name: lambda name=name, given=given: (
            vocabulary.LAYERS[name](*given), lambda m, x: m.part(x),
        )
        for name, given in ANY_SIZE.items()
    },
    **{
        f"{stem}{d}d": lambda stem=stem, d=d, given=given: (
            vocabulary.LAYERS[f"{stem}{d}d"](*given),
            lambda m, x: m.part((x.flatten(2), x, x.unsqueeze(2))[d - 1]),
        )
        for stem, given in BY_SIZE.items()
        for d in (1, 2, 3)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    part, compute = LAYERS[name]()
    assert type(part) is vocabulary.LAYERS[name]
    pruned_exactly(seeded(compute, part), tmp_path)


# --------------------------------------------------------------------------------------------------
# Simplification


class Standardised(nn.Conv2d):
    """A convolution of its own class whose weights are standardised in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Functional(nn.Module):
    """What shrinks only if functions are understood as the layers that they are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = Standardised(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "four dimensions")
        n = self.norm
        x = F.batch_norm(self.a(x), n.running_mean, n.running_var, n.weight, n.bias)
        return F.linear(self.b(x.relu()).mean((2, 3)), self.c.weight, self.c.bias)


def test_functions_with_weights_are_pruned_like_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    share, _ = pruned_exactly(Functional(), tmp_path)
    assert share < 0.6
    kinds = {name: type(part) for name, part in load(tmp_path).named_modules()}
    assert kinds["a"] is nn.Conv2d, "standardised weights are computed once"
    assert kinds["c"] is nn.Linear


@pytest.mark.parametrize(
    "parametrise",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
)
def test_parametrised_weights_are_baked_in(
    parametrise: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    net = seeded(lambda m, x: x)
    parametrise(net.b)
    before = {name: t.clone() for name, t in net.state_dict().items() if not name.startswith("a.")}
    pruned_exactly(net, tmp_path)
    assert type(load(tmp_path).get_submodule("b")) is nn.Conv2d
    after = net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


IN_PLACE: list[Callable[[Net, Tensor], Any]] = [
    lambda m, x: x.mul(1).add_(0.5).mul_(x),
    lambda m, x: F.relu(x - 0.5, inplace=True),
    lambda m, x: torch.relu_(x - 0.5),
]


def reads_what_was_changed(m: Net, x: Tensor) -> Tensor:
    y = x - 0.5
    z = F.relu(y, inplace=True)
    y += 1.0
    return torch.stack([y, z, x * y.clamp_(max=1.2)]).sum(0) + y


@pytest.mark.parametrize("compute", [*IN_PLACE, reads_what_was_changed])
def test_operations_in_place(compute: Callable[[Net, Tensor], Any], tmp_path: Path) -> None:
    pruned_exactly(seeded(compute), tmp_path)


def test_a_change_through_a_view_is_refused_and_not_forgotten() -> None:
    def through_a_view(m: Net, x: Tensor) -> Tensor:
        y = x * 1
        y.view(-1).add_(5.0)
        return y

    with pytest.raises(ModelError, match="in place on a part or a view"):
        parent_candidate(seeded(through_a_view).eval(), OPTIONS, SHAPE)


def test_weights_that_are_called_and_read(tmp_path: Path) -> None:
    """The layer loses channels, the tensor that is read beside it keeps them."""
    pruned_exactly(seeded(lambda m, x: (x.mean() * m.b.weight).sum(1)), tmp_path)


class Kept(nn.Module):
    """Makes a table when the first images come, and repeats it for each of the next."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 5)
        self.register_buffer("table", torch.zeros(1, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        batch, _, _, width = x.shape
        if self.table.shape[3] != width:
            self.table = torch.linspace(-1, 1, int(width)).view(1, 1, 1, -1)
        result: Tensor = self.head((x * (self.table * 2).expand(batch, 4, -1, -1)).mean((2, 3)))
        return result


@pytest.mark.parametrize("called", [True, False])
def test_a_buffer_that_forward_makes_and_gives_the_number_of_examples(
    called: bool, tmp_path: Path
) -> None:
    # Tensors take no symbol for a number: "expand() takes 1 positional argument but 4 were given".
    torch.manual_seed(0)
    net = Kept().eval()
    if called:
        net(torch.zeros(1, *SHAPE))
    left, answer = pruned_exactly(net, tmp_path)
    assert left < 0.7
    assert net.table.shape[3] == 4 and answer.shape == (3, 5)


class Placed(nn.Module):
    """Adds what it makes of positions, by the device and in the type of its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.project = nn.Conv2d(1, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        weight = self.project.weight
        batch, _, height, width = x.shape
        rows = torch.ones((batch, 1, height, width)).to(device=weight.device).cumsum(2)
        columns = torch.arange(SHAPE[2], device=weight.device).type_as(weight)
        places = self.project((rows / 7 + columns).to(weight.dtype))
        result: Tensor = self.head((x + places).mean((2, 3)))
        return result


def test_types_and_devices_of_weights_follow_the_model(tmp_path: Path) -> None:
    # They were written down when the model was traced: the work could not be counted on meta, and
    # in float64, where folding is checked, layers were given float32.
    torch.manual_seed(0)
    net = Placed()
    left, _ = pruned_exactly(net, tmp_path)  # type: ignore[arg-type]
    assert left < 0.7, "reading the type of a weight holds nothing"
    content = parent_candidate(net, OPTIONS, SHAPE).content
    assert isinstance(content, fx.GraphModule)
    read = load(save(content, tmp_path / "parent"))
    images = torch.randn(3, *SHAPE)
    with torch.no_grad():
        for kind in (torch.float32, torch.float64):
            expected = net.to(kind)(images.to(kind))
            assert torch.equal(read.to(kind)(images.to(kind)), expected)
        assert read.to("meta")(images.to("meta", torch.float64)).shape == (3, 5)


def test_names_with_a_dash(tmp_path: Path) -> None:
    """Every RegNet of torchvision was saved and could not be read."""
    net = seeded(lambda m, x: m.get_submodule("block1-0")(x), None)
    net.add_module("block1-0", nn.Conv2d(4, 4, 1))
    pruned_exactly(net, tmp_path)
    assert isinstance(load(tmp_path).get_submodule("block1-0"), nn.Conv2d)


def test_what_cannot_be_saved_is_named_by_its_line(tmp_path: Path) -> None:
    net = seeded(lambda m, x: torch.fft.fft(x).real)
    with pytest.raises(
        ModelError, match=r"fft_fft\(\), .*test_words\.py:\d+: `net = seeded\(lambda"
    ):
        save(shrink(net, SHAPE).model, tmp_path)
    net = seeded(lambda m, x: torch.fft.rfft(x).abs())
    with pytest.raises(
        ModelError, match=r"calls .*rfft\(\), .*test_words\.py:\d+.*torch\.nn\.func"
    ):
        save(shrink(net, SHAPE).model, tmp_path)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([*ONE, *WITH]), min_size=2, max_size=4), st.integers(0, 99))
def test_words_one_after_another(tmp_path_factory: Any, names: list[str], seed: int) -> None:
    """Sums of what several words give, each on what the convolution and the others gave."""

    def chained(m: Net, x: Tensor) -> Tensor:
        for name in names:
            y = compute(name, getattr(torch, name))(m, x)
            x = 0.9 * x + 0.05 * y.float().mean().sigmoid()  # still within (0, 1)
        return x

    torch.manual_seed(seed)
    pruned_exactly(Net(chained), tmp_path_factory.mktemp("words"))
