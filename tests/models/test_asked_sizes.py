"""Models whose forward asks for sizes: windows, padding, tokens back to a map, caches by device."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsys.errors import ModelError
from fedsys.models import layered, split, trace
from fedsys.pruning import shrink
from fedsys.pruning.dense.architecture import load, save
from fedsys.randomness import Address, drawing, key_modules, rows

SHAPE = (3, 9, 9)


class Windows(nn.Module):
    """Pads to whole windows, pools tokens, and keeps a table by the device: as ViTs do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        self.table = nn.Parameter(torch.linspace(-1, 1, 8))
        self.kept: dict[str, Tensor] = {}

    def bias(self, device: torch.device) -> Tensor:
        if self.training:
            return self.table.view(1, -1, 1, 1)
        if str(device) not in self.kept:
            self.kept[str(device)] = self.table.view(1, -1, 1, 1)
        return self.kept[str(device)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        height, width = x.shape[2:]
        if height % 4 or width % 4:
            x = F.pad(x, (0, -width % 4, 0, -height % 4))
        x = self.second(x) + self.bias(x.device)
        side = int(math.sqrt(x.flatten(2).shape[2]))
        assert side == x.shape[-1] and len(x.shape) == 4
        for size in range(x.shape[-1] // 4):
            x = x + size
        self.newest = x
        x = F.interpolate(x, (math.ceil(height / 2), math.ceil(width / 2)))
        return self.head(x.mean(dim=[-2 + place for place, _ in enumerate(x.shape[2:])]))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, *SHAPE, generator=Address(1).torch("images"))


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_asks_for_sizes_is_recorded_for_the_shape_it_is_given(images, training):
    model = Windows().train(training)
    graph = trace(model, SHAPE)
    assert not model.kept, "tracing left something in the model"
    assert torch.equal(graph(images), model(images))
    layers = layered(model, SHAPE)
    device, edge = split(layers, layers.cuts[0])
    device.train(training), edge.train(training)
    assert torch.equal(edge(device(images)), model(images))


class Halves(nn.Module):
    """Asks once for a size of an example, and treats a part of the batch otherwise."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.first, self.last = way, nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 6:
            raise ValueError("six numbers for each example")
        x = self.first(x)
        if self.way == "every second":
            half = x[::2][: x.shape[0] // 2]
            count = half.shape[0]
            x = torch.cat([x[:count] * 2, x[count:]])
        elif self.way == "two at most":
            top = x[:2]
            x = x + top.sum(0) / top.shape[0]
        else:
            half = x[: x.shape[0] // 2]
            x = torch.cat([x.narrow(0, 0, half.size(0)) * 2, x[half.shape[0] :]])
        return self.last(x)


@pytest.mark.parametrize("way", ["every second", "two at most", "half"])
def test_sizes_of_a_part_of_the_batch_stay_what_they_are(way):
    """Half of two rows is half of three: it was a number of the graph, for all batches."""
    model = Halves(way).eval()
    layers = layered(model, (6,))
    for count in range(1, 9):
        x = torch.randn(count, 6, generator=Address(count).torch("x"))
        with torch.no_grad():
            assert torch.equal(layers.graph(x), model(x)), count


def test_without_values_the_same_is_recorded():
    steps = [[str(n) for n in trace(Windows().to(where), SHAPE).graph.nodes] for where in
             ("cpu", "meta")]  # fmt: skip
    assert steps[0] == steps[1]


def test_examples_of_another_shape_are_refused_by_the_half_that_gets_them():
    layers = layered(Windows(), SHAPE)
    device, _ = split(layers, layers.cuts[0])
    assert device(torch.zeros(7, *SHAPE)).shape[0] == 7, "the number of examples is free"
    with pytest.raises(AssertionError, match=r"recorded for examples of shape \(3, 9, 9\)"):
        device(torch.zeros(1, 3, 8, 8))


def test_without_a_shape_it_is_refused_as_before():
    with pytest.raises(ModelError, match="control flow"):
        trace(Windows())


def test_a_model_that_asks_for_sizes_shrinks_exactly_and_is_saved(tmp_path):
    """math.ceil of a size could not be saved as data, and symbols that a cache of forward kept
    ended copies of the model: MobileViT and EfficientViT of timm.
    """
    model = Windows().eval()
    masks = {"first.weight": torch.ones(8, 3, 3, 3), "second.weight": torch.ones(8, 8, 3, 3)}
    masks["first.weight"][:4] = 0
    small = shrink(model, SHAPE, masks=masks).model
    save(small, tmp_path)
    images = torch.randn(2, *SHAPE, generator=Address(1).torch("images"))
    assert torch.equal(load(tmp_path)(images), small(images))


class Asks(nn.Module):
    """Branches on what it is asked."""

    def __init__(self, question: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.layer, self.question = nn.Linear(4, 4), question

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x.relu() if self.question(x) else x


@pytest.mark.parametrize(
    "question",
    [
        lambda x: x.shape[0] > 2,
        lambda x: len(x) == 3,
        lambda x: x.numel() > 8,
        lambda x: x.sum() > 0,
        lambda x: x.is_cuda,
        lambda x: x.device.type == "cuda",
    ],
    ids=["examples", "length", "elements", "values", "cuda", "device"],
)
def test_what_a_shape_does_not_tell_is_refused(question):
    with pytest.raises(ModelError, match=r"cannot be traced in its forward, .*control flow"):
        trace(Asks(question), (4,))


@pytest.mark.parametrize(
    "question",
    [
        lambda x: x.shape[-1] == 4,
        lambda x: float(x.size(1)) ** 0.5 == 2.0,
        lambda x: x.ndim == 2 and not x.is_meta,
        lambda x: x.device.type != "meta",
        lambda x: x.dtype == torch.float32,
    ],
    ids=["shape", "size", "dimensions", "meta", "type"],
)
def test_what_a_shape_tells_is_answered(question):
    graph, x = trace(Asks(question), (4,)), torch.full((3, 4), -1.0)
    assert (graph(x) >= 0).all()


class DropPath(nn.Module):
    """As timm's is given: one draw for each example."""

    def __init__(self, drop_prob: float, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full((len(x), 1), 0.5)) if self.training else x


def test_timms_drop_path_draws_by_its_address_whole_and_in_pieces():
    """Four of the 53 models of timm were refused for it: its steps differ in training."""
    model = key_modules(nn.Sequential(nn.Linear(4, 4), DropPath(0.5), nn.Linear(4, 2)))
    graph, x = trace(model, (4,)).train(), torch.randn(8, 4)
    with drawing(Address(3), 0, 8):
        whole = graph(x)
    with drawing(Address(3), 0, 8):
        with rows(0, 5):
            first = graph(x[:5])
        with rows(5, 8):
            rest = graph(x[5:])
    torch.testing.assert_close(torch.cat([first, rest]), whole)
    assert not torch.equal(whole, model.eval()(x)), "nothing was dropped"
