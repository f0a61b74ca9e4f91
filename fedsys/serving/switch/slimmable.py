"""One network that runs at several widths: a multi-branch alternative to a portfolio.

Yu et al., "Slimmable Neural Networks", ICLR 2019: at width w each layer uses the first ceil(w C) of
its C channels, weights are shared by all widths, and each width has a BatchNorm of its own. A
switch costs nothing, and the whole network stays in memory whatever answers.

Here a width is a module of its own whose weights are *views* of the shared ones, so requests at
two widths can be in work at one time. Nothing trains the widths jointly, as the paper does: what
this is for is the cost of switching and memory. Its accuracy is not compared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsys.errors import ConfigError, ModelError
from fedsys.models.graph import trace

_SHARED = (nn.Conv2d, nn.Linear)


def slimmable(
    model: nn.Module, example: Tensor, widths: Sequence[float]
) -> dict[float, fx.GraphModule]:
    """Return a module for each width; all share the weights of `model`, which is not copied.

    Args:
        model: Of convolutions, BatchNorms and linear layers; anything in between may have no
            weights. Its last linear layer keeps all of its outputs.
        example: A batch of inputs.
        widths: Shares of the channels, each in (0, 1].

    Raises:
        ConfigError: A width is out of range.
        ModelError: The model does not trace, or has layers that have no narrower form.
    """
    for width in widths:
        if not 0 < width <= 1:
            raise ConfigError.of("width", width, "must be in (0, 1]")
    traced = trace(model.eval())
    for node in traced.graph.nodes:
        if node.op == "call_module":
            _check(node.target, traced.get_submodule(node.target))
    last = [n.target for n in traced.graph.nodes if n.op == "call_module"
            and isinstance(traced.get_submodule(n.target), _SHARED)][-1:]  # fmt: skip
    result = {}
    for width in widths:
        builder = _Builder(traced, width, set(last))
        with torch.no_grad():
            builder.run(example)
        result[width] = fx.GraphModule(builder.layers, copy.deepcopy(traced.graph)).eval()
    return result


def _check(path: str, module: nn.Module) -> None:
    """Refuse layers that have no narrower form; torch.fx would bury the reason."""
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        if module.groups != module.in_channels or module.groups != module.out_channels:
            raise ModelError(f"{path} is grouped and not depthwise: it has no narrower form")
    elif not isinstance(module, (*_SHARED, nn.BatchNorm2d)) and [*module.parameters()]:
        raise ModelError(f"{path} is a {type(module).__name__}, which has no narrower form")


class _Builder(fx.Interpreter):
    """Runs the network at one width and makes each layer by the input that it gets."""

    def __init__(self, traced: fx.GraphModule, width: float, whole: set[Any]) -> None:
        super().__init__(traced)
        self.width, self.whole = width, whole
        self.layers: dict[str, Any] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Read a constant of the network; it has the same form at every width."""
        self.layers[target] = super().get_attr(target, args, kwargs)
        return self.layers[target]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Make the narrow layer, and run it."""
        if target not in self.layers:
            module = self.module.get_submodule(target)
            inputs = args[0].shape[1] if args else 0  # a constant by mode takes no input
            self.layers[target] = self._narrow(target, module, inputs)
        return self.layers[target](*args, **kwargs)

    def _narrow(self, target: str, module: nn.Module, inputs: int) -> nn.Module:
        if isinstance(module, _SHARED):
            full = module.weight.shape[0]
            outputs = full if target in self.whole else math.ceil(self.width * full)
            return _narrow_layer(module, inputs, outputs)
        if isinstance(module, nn.BatchNorm2d):
            own = copy.deepcopy(module)
            own.num_features = inputs
            for name, tensor in [*own.named_parameters(), *own.named_buffers()]:
                if tensor.dim():
                    _set(own, name, tensor.detach()[:inputs].clone())
            return own
        return module


def _narrow_layer(module: nn.Conv2d | nn.Linear, inputs: int, outputs: int) -> nn.Module:
    """Return a layer whose weights are views of those of `module`."""
    groups = 1
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        groups = outputs = inputs
    bias = module.bias is not None
    narrow: nn.Conv2d | nn.Linear
    if isinstance(module, nn.Linear):
        narrow = nn.Linear(inputs, outputs, bias, device="meta")
    else:
        narrow = nn.Conv2d(
            inputs, outputs, module.kernel_size, module.stride, module.padding,  # type: ignore[arg-type]
            module.dilation, groups, bias, module.padding_mode, device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
    _set(narrow, "weight", module.weight.detach()[:outputs, : inputs // groups])
    if module.bias is not None:
        _set(narrow, "bias", module.bias.detach()[:outputs])
    return narrow


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    kind = nn.Parameter(tensor, requires_grad=False) if name in ("weight", "bias") else tensor
    setattr(module, name, kind)
