"""Models of other examples than images: the small GPT, and the perceptron for tables."""

import pytest
import torch

from fedsys.errors import ConfigError
from fedsys.models.dense import mlp
from fedsys.models.layers import layered, split
from fedsys.models.text import Gpt
from fedsys.randomness import seeded_default_generator


@pytest.fixture(scope="module")
def gpt():
    with seeded_default_generator(0):
        return Gpt((8,), 11, width=16, depth=2, heads=2).eval()


def test_a_score_depends_on_what_came_before_alone(gpt):
    tokens = torch.arange(8)[None] % 11
    other = tokens.clone()
    other[0, 5] = 10
    with torch.no_grad():
        one, two = gpt(tokens), gpt(other)
    assert torch.equal(one[0, :5], two[0, :5])
    assert not torch.equal(one[0, 5:], two[0, 5:])


def test_it_is_cut_at_its_blocks_and_the_halves_are_the_whole(gpt):
    layers = layered(gpt, (8,))
    names = [unit.name for unit in layers.units]
    assert names[0] == "embedding" and names[-1] == "head" and len(layers.cuts) == len(names) - 1
    tokens = torch.arange(16).reshape(2, 8) % 11
    for cut in layers.cuts:
        front, back = split(layers, cut)
        with torch.no_grad():
            assert torch.equal(back.eval()(front.eval()(tokens)), gpt(tokens))
    assert {unit.out_shape for unit in layers.units[:-1]} == {(8, 16)}


def test_the_work_is_that_of_its_matrix_products(gpt):
    length, width, depth, heads = 8, 16, 2, 2
    products = 3 * width * width + width * width + 8 * width * width
    attention = 2 * heads * length * (width // heads)
    expected = length * (depth * (products + attention) + width * 11)
    assert sum(unit.macs for unit in layered(gpt, (length,)).units) == expected


def test_the_chosen_one_has_about_a_million_parameters():
    assert 8e5 < sum(p.numel() for p in Gpt((64,), 256).parameters()) < 1.1e6


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ConfigError, match="multiple of heads=4"):
        Gpt((8,), 11, width=18)
    with pytest.raises(ConfigError, match="data=text task=next_token"):
        Gpt((3, 8, 8), 11)
    with pytest.raises(ConfigError, match=r"^model\.dropout=1\.5: must be a number from 0 to 1"):
        Gpt((8,), 11, dropout=1.5)


def test_a_perceptron_has_the_layers_that_are_asked_for():
    model = mlp((10,), 3, hidden=7, depth=2, dropout=0.1)
    assert sum(p.numel() for p in model.parameters()) == 11 * 7 + 8 * 7 + 8 * 3
    assert model(torch.zeros(4, 10)).shape == (4, 3)
    assert len(layered(model, (10,)).cuts) == 2
    assert mlp((2, 5), 1)(torch.zeros(4, 2, 5)).shape == (4, 1)
    with pytest.raises(ConfigError, match=r"hidden"):
        mlp((10,), 3, hidden=0)
    with pytest.raises(ConfigError, match=r"^model\.dropout=1\.5: must be a number from 0 to 1"):
        mlp((10,), 3, dropout=1.5)
