import itertools

import pytest
import torch
from torch import nn

from fedsys.config import compose_text, parse
from fedsys.errors import ModelError
from fedsys.models import build, layered
from fedsys.models.layers import section, stages
from fedsys.models.several import finer

SHAPE = (3, 32, 32)


def torchvisions(name):
    config = parse(compose_text(f"model=torchvision model.name={name}"))
    return build(config.model, input_shape=SHAPE, num_classes=10, seed=0).eval()


def through(chain, cuts, x):
    """Return what the parts between cuts make of a batch, one after the other."""
    values = (x,)
    for first, last in itertools.pairwise((0, *cuts, len(chain))):
        out = section(chain, first, last).eval()(*(value.clone() for value in values))
        values = out if isinstance(out, tuple) else (out,)
    return values[0]


class Dense(nn.Module):
    """Every layer reads all before it, so ever more tensors are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(4))
        self.end = nn.Linear(19, 10)

    def forward(self, x):
        made = [x]
        for layer in self.layers:
            made.append(layer(torch.cat(made, 1)).relu())
        return self.end(torch.cat(made, 1).mean((2, 3)))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "googlenet"])
def test_every_cut_that_several_tensors_cross_gives_the_bits_of_the_whole_model(name):
    net = torchvisions(name)
    whole = layered(net, SHAPE)
    chain = finer(whole, SHAPE, 3)
    assert len(chain) > len(whole)
    inside = [c for c in chain.cuts if len(chain.units[c - 1].outputs) > 1]
    assert inside
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = net(x)
        for cut in inside[:: max(1, len(inside) // 6)]:
            assert torch.equal(through(chain, [cut], x), expected), cut
        assert torch.equal(through(chain, inside[:: max(1, len(inside) // 4)], x), expected)


def test_as_many_tensors_cross_as_are_allowed():
    net = Dense().eval()
    whole = layered(net, SHAPE)
    assert len(whole) == 2
    for most in (1, 2, 3, 5):
        chain = finer(whole, SHAPE, most)
        assert max(len(unit.outputs) for unit in chain.units) == min(most, 4), most
        x = torch.randn(2, *SHAPE)
        with torch.inference_mode():
            for cuts in itertools.combinations_with_replacement(chain.cuts, 2):
                assert torch.equal(through(chain, cuts, x), net(x))


def test_what_crosses_is_counted_in_bytes():
    chain = finer(layered(Dense(), SHAPE), SHAPE, 9)
    after_two = next(u for u in chain.units if len(u.outputs) == 3)
    assert set(after_two.out_shapes) == {(3, 32, 32), (4, 32, 32)}
    assert after_two.bytes_out == 4 * 32 * 32 * (3 + 4 + 4)


class Overwriting(nn.Module):
    """A branch is kept, and the same memory is overwritten later."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu, self.view, self.end = nn.ReLU(inplace=True), view, nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.one(x)
        kept = x.flatten(2) if self.view else x
        y = self.two(x)
        z = self.end(self.relu(x))
        return (y + z).flatten(2) + kept


@pytest.mark.parametrize("view", [False, True])
def test_no_cut_separates_a_value_from_memory_that_a_later_step_overwrites(view):
    """Two hosts have two tensors: the one that keeps the value would not see it overwritten."""
    net = Overwriting(True).eval() if view else OverwritingItself().eval()
    chain, x = finer(layered(net, SHAPE), SHAPE, 9), torch.randn(2, *SHAPE)
    with torch.inference_mode():
        for cut in chain.cuts:
            assert torch.equal(through(chain, [cut], x.clone()), net(x.clone())), cut


class OverwritingItself(nn.Module):
    """A tensor is read before and after it is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.end = (nn.Conv2d(c, 4, 1) for c in (3, 4, 4))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.one(x)
        y = self.two(x)
        z = self.end(self.relu(x))
        return y + z + x


def test_steps_that_come_first_are_cut_behind_and_compute_the_same():
    net = torchvisions("googlenet")
    whole = layered(net, SHAPE)
    unit = next(u for u in whole.units if "inception" in u.name)
    before = [n for u in whole.units[: whole.units.index(unit)] for n in u.nodes]
    graph = {n.name: n for n in whole.graph.graph.nodes}
    branch = [n for n in unit.nodes if "branch1" in n]
    branch += [user.name for user in graph[branch[-1]].users]  # it works in place on what that made
    first = [*before, *branch]
    assert all(i.name in first for n in branch for i in graph[n].all_input_nodes)
    chain = finer(whole, SHAPE, 1, first=first)
    cut = next(c for c, u in enumerate(chain.units, 1) if len(u.outputs) > 1)
    assert [n for u in chain.units[:cut] for n in u.nodes] == first
    x = torch.randn(2, *SHAPE)
    with torch.inference_mode():
        assert torch.equal(through(chain, [cut], x), net(x))


def test_an_order_in_which_a_step_reads_what_comes_later_or_is_overwritten_is_refused():
    whole = layered(OverwritingItself(), SHAPE)
    names = [n for unit in whole.units for n in unit.nodes]
    with pytest.raises(ModelError, match="reads what comes later"):
        finer(whole, SHAPE, 2, first=["two"])
    with pytest.raises(ModelError, match=r"relu works in place on what .* reads.*inplace=False"):
        finer(whole, SHAPE, 2, first=[n for n in names if n in ("one", "relu", "end")])


def test_stages_of_training_take_one_tensor():
    chain = finer(layered(Dense(), SHAPE), SHAPE, 9)
    with pytest.raises(ModelError, match="several tensors cross"):
        stages(chain, [chain.cuts[1]])
