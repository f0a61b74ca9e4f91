"""Models of several inputs: traced, cut, and each part given what it needs of them."""

import pytest
import torch
from torch import nn

from fedsys.errors import ModelError
from fedsys.models.graph import trace
from fedsys.models.layers import layered, split, stages
from fedsys.planning.costs import crossings, frame_bytes
from fedsys.randomness import seeded_default_generator
from fedsys.transport.several import Several, examples_of, shape_of
from tests import own_work

WORDS = Several((torch.arange(30).reshape(5, 6) % 20, torch.arange(30).reshape(5, 6) % 4 == 3))


@pytest.fixture(scope="module")
def masked():
    with seeded_default_generator(0):
        return own_work.Masked(2).eval()


def test_a_mask_that_all_blocks_need_leaves_a_cut_between_any_two(masked):
    chain = layered(masked, shape_of(WORDS))
    assert [unit.name for unit in chain.units] == ["embedding", "first", "second", "out"]
    assert [unit.inputs for unit in chain.units] == [(0,), (1,), (1,), ()]
    assert chain.cuts == (1, 2, 3) and chain.input_bytes == (48, 6)
    expected = masked(*WORDS.tensors)
    for cut in chain.cuts:
        device, edge = (half.eval() for half in split(chain, cut))
        given = [WORDS.tensors[index] for index in chain.inputs(cut, len(chain))]
        assert torch.equal(edge(device(*WORDS.tensors), *given), expected)
    first, middle, last = (part.eval() for part in stages(chain, [1, 3]))
    padding = WORDS.tensors[1]
    assert torch.equal(last(middle(first(*WORDS.tensors), padding)), expected)


def test_what_is_sent_beside_counts_on_the_way_up_alone(masked):
    sizes = crossings(layered(masked, shape_of(WORDS)))
    assert [each.beside for each in sizes] == [6, 6, 0, 0]
    up, down = (frame_bytes(sizes[0], 5, "fp32", labels=labels) for labels in (True, False))
    assert up - down == 5 * (8 + 6)


def test_a_forward_of_one_tuple_is_traced_as_one_of_arguments():
    model = own_work.Both((("float32", 1, 8, 8), ("float32", 3)), 1).eval()
    inputs = Several((torch.rand(4, 1, 8, 8), torch.rand(4, 3)))
    chain = layered(model, inputs)
    assert [unit.inputs for unit in chain.units] == [(0,), (1,), (), ()]
    for cut in chain.cuts:
        device, edge = (half.eval() for half in split(chain, cut))
        given = [inputs.tensors[index] for index in chain.inputs(cut, len(chain))]
        assert torch.equal(edge(device(*inputs.tensors), *given), model(inputs.tensors))


class Learned(nn.Module):
    """Adds what is learned to an input: that is no preparation, and is done in one place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.shift, self.scale = nn.Parameter(torch.zeros(4)), nn.Buffer(torch.full((4,), 2.0))

    def forward(self, x, y):
        y = y * self.scale
        return self.second(torch.relu(self.first(x) + y)) + (y + self.shift)


def test_what_reads_a_parameter_is_no_preparation_of_an_input():
    model = Learned().eval()
    given = Several((torch.rand(3, 4), torch.rand(3, 4)))
    chain = layered(model, given)
    assert [unit.names for unit in chain.units if "shift" in unit.names]
    assert sum("shift" in unit.names for unit in chain.units) == 1
    for cut in chain.cuts:
        device, edge = (half.eval() for half in split(chain, cut))
        more = [given.tensors[index] for index in chain.inputs(cut, len(chain))]
        assert torch.equal(edge(device(*given.tensors), *more), model(*given.tensors))


class Sized(nn.Module):
    """Asks the sizes of both inputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, y):
        if y.shape[1] == 3 and len(x.shape) == 2:
            x = x[:, :4]
        return self.linear(x) + y.sum(1, keepdim=True)


def test_sizes_of_each_input_may_be_asked_and_others_are_refused():
    traced = trace(Sized(), (("float32", 6), ("float32", 3)))
    assert traced(torch.rand(2, 6), torch.rand(2, 3)).shape == (2, 4)
    with pytest.raises(AssertionError, match="got others"):
        traced(torch.rand(2, 6), torch.rand(2, 5))


def test_a_forward_that_does_not_take_so_many_is_refused(masked):
    with pytest.raises(ModelError, match="exactly one input"):
        layered(masked, (6,))
    with pytest.raises(ModelError, match="must take 3 inputs"):
        layered(masked, (("int64", 6), ("bool", 6), ("bool", 6)))
    assert examples_of((("bool", 2),), 3).tensors[0].all()
