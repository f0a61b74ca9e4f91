from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fedsys.errors import ModelError
from fedsys.pruning.channels import Coupling
from fedsys.pruning.constants import Borders
from fedsys.pruning.ops import Kind
from fedsys.pruning.plan import make_plan
from fedsys.pruning.shrink import shrink

CHOICES = list(product(Borders, Coupling))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Weights of the usual size; biases and BatchNorm shifts of both signs; as after training."""
    draw = generator(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=draw) * fan_in**-0.5
            if module.bias is not None:
                module.bias.data = torch.randn(module.bias.shape, generator=draw) * 0.3
        elif isinstance(module, nn.BatchNorm2d):
            shape = module.weight.shape
            module.weight.data = 0.5 + torch.rand(shape, generator=draw)
            module.bias.data = torch.randn(shape, generator=draw) * 0.3
            module.running_mean = torch.randn(shape, generator=draw) * 0.3
            module.running_var = 0.5 + torch.rand(shape, generator=draw)
    return model.eval()


def random_masks(model: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    draw = generator(seed)
    return {
        name: torch.rand(parameter.shape, generator=draw) < density
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter *= masks[name]
    return model


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(inputs)
    return result


# --------------------------------------------------------------------------------------------------
# A brute-force oracle


class RandomNet(nn.Module):
    """A random graph of few channels: chains, sums, products, concatenations, groups."""

    def __init__(self, seed: int, smooth: bool) -> None:
        super().__init__()
        draw = generator(seed)
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, int, int]] = []
        self._smooth = smooth
        widths = [3]
        for _ in range(int(torch.randint(5, 10, (), generator=draw))):
            self._extend(widths, draw)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(widths[-1] * 4, 3)
        )

    def _extend(self, widths: list[int], draw: torch.Generator) -> None:
        def pick(n: int) -> int:
            return int(torch.randint(n, (), generator=draw))

        source, kinds = (
            len(widths) - 1,
            ["conv", "conv", "pointwise", "depthwise", "grouped", "norm"],
        )
        width = widths[source]
        kind = [*kinds, "pool", "average", "add", "cat", "gate", "subtract"][pick(12)]
        other = pick(len(widths))
        if kind in ("add", "subtract") and (widths[other] != width or other == source):
            kind = "conv"
        out = 2 + pick(3)
        made: nn.Module = nn.Identity()
        match kind:
            case "conv":
                made = nn.Conv2d(width, out, 3, padding=1, bias=bool(pick(2)))
            case "pointwise":
                made = nn.Conv2d(width, out, 1)
            case "depthwise":
                out, made = width, nn.Conv2d(width, width, 3, padding=1, groups=width)
            case "grouped" if width % 2 == 0:
                out, made = 4, nn.Conv2d(width, 4, 3, padding=1, groups=2)
            case "pool":
                out, made = width, nn.MaxPool2d(3, 1, 1)
            case "average":
                out, made = width, nn.AvgPool2d(3, 1, 1)
            case "gate":
                out = width
                made = nn.Sequential(
                    nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Sigmoid()
                )
            case "cat":
                out = width + widths[other]
            case "add" | "subtract":
                out = width
            case _:
                kind, out, made = "norm", width, nn.BatchNorm2d(width)
        self.layers.append(made)
        self.steps.append((kind, source, other))
        widths.append(out)
        if kind not in ("pool", "average", "add", "cat"):
            activations = [nn.Tanh(), nn.LeakyReLU(0.1)]
            if not self._smooth:
                activations += [nn.ReLU(), nn.Hardswish(), nn.ReLU6()]
            self.layers.append(activations[pick(len(activations))])
            self.steps.append(("act", len(widths) - 1, 0))
            widths.append(out)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer, (kind, source, other) in zip(self.layers, self.steps, strict=True):
            a, b = values[source], values[other]
            match kind:
                case "add":
                    values.append(a + b)
                case "subtract":
                    values.append(a - b)
                case "cat":
                    values.append(
                        torch.cat([a, b], 1) if source != other else torch.cat([a, 1 * b], 1)
                    )
                case "gate":
                    values.append(a * layer(a))
                case _:
                    values.append(layer(a))
        result: Tensor = self.head(values[-1])
        return result


class Probe(fx.Interpreter):
    """Records every tensor, or disturbs one channel of one tensor."""

    def __init__(self, graph: fx.GraphModule, disturb: tuple[str, int] | None = None) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.values: dict[str, Tensor] = {}
        self._disturb = disturb

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if self._disturb is not None and n.name == self._disturb[0]:
            value = value.clone()
            channel = value[:, self._disturb[1]]
            channel += torch.randn(channel.shape, generator=generator(7), dtype=value.dtype)
        if isinstance(value, Tensor):
            self.values[n.name] = value
        return value


def varies(graph: fx.GraphModule, name: str, any_size: bool) -> Tensor:
    """Channels that are not the same for all inputs, and with `any_size` pixels and sizes."""
    seen = []
    for size in (6, 8) if any_size else (6,):
        inputs = torch.randn(24, 3, size, size, generator=generator(size), dtype=torch.float64) * 2
        probe = Probe(graph)
        probe.run(inputs)
        value = probe.values[name]
        seen.append(value.reshape(*value.shape[:2], -1))  # rows, channels, pixels
    if any_size:
        together = torch.cat([v.transpose(0, 1).flatten(1) for v in seen], 1)
        return (together.amax(1) - together.amin(1)) > 1e-12
    return (seen[0].amax(0) - seen[0].amin(0)).amax(1) > 1e-12


def influences(graph: fx.GraphModule, name: str, channels: int) -> Tensor:
    inputs = torch.randn(24, 3, 6, 6, generator=generator(1), dtype=torch.float64)
    plain = Probe(graph).run(inputs)
    moved = [(Probe(graph, (name, c)).run(inputs) - plain).abs().max() for c in range(channels)]
    return torch.stack(moved) > 1e-13


@pytest.mark.parametrize("borders", Borders)
@pytest.mark.parametrize("seed", range(16))
def test_exactly_the_channels_that_brute_force_finds_are_live(seed: int, borders: Borders) -> None:
    net = randomise(RandomNet(seed, smooth=True), seed)
    masked(net, random_masks(net, 0.4, seed))
    try:
        inputs = torch.randn(2, 3, 6, 6, generator=generator(0))
        made = make_plan(net, inputs, borders=borders, coupling=Coupling.SCATTER)
    except ModelError as error:
        assert "does not depend on its input" in str(error)
        graph = fx.symbolic_trace(net.double())
        assert not varies(graph, list(graph.graph.nodes)[-2].name, borders is Borders.CARRIER).any()
        return
    graph = made.reading.graph
    for name, op in made.reading.ops.items():
        if op.kind is Kind.MIX:
            moving = varies(graph, name, borders is Borders.CARRIER)
            read = influences(graph, name, op.channels)
            assert torch.equal(made.need.live[name], moving & read), name


@pytest.mark.parametrize("borders, coupling", CHOICES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    density=st.sampled_from([0.1, 0.3, 0.6]),
    round_to=st.sampled_from([1, 2]),
)
def test_random_graphs_are_converted_exactly(
    borders: Borders, coupling: Coupling, seed: int, density: float, round_to: int
) -> None:
    net = randomise(RandomNet(seed, smooth=False), seed)
    masks = random_masks(net, density, seed)
    try:
        small = shrink(
            net, (3, 6, 6), masks=masks, borders=borders, coupling=coupling, round_to=round_to
        )
    except ModelError as error:
        assert "does not depend on its input" in str(error)
        return
    masked(net, masks)
    for size in (6, 9) if borders is Borders.CARRIER else (6,):
        inputs = torch.randn(4, 3, size, size, generator=generator(seed))
        torch.testing.assert_close(
            outputs(small.model, inputs), outputs(net, inputs), rtol=1e-5, atol=1e-5
        )
