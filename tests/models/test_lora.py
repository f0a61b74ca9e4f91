"""Low-rank adapters: the closed form, what learns and travels, and what is refused."""

import pytest
import torch
from torch import nn

from fedsys.config import parse, with_values
from fedsys.errors import ConfigError
from fedsys.models.layers import layered, split
from fedsys.models.lora import LoraLinear, adapted, has_adapters, learned, sent
from fedsys.models.text import Gpt
from fedsys.planning.costs import state_bytes
from fedsys.randomness import seeded_default_generator
from fedsys.training.federation import base_state, build_model, federation, layered_model


def gpt():
    with seeded_default_generator(0):
        return Gpt((8,), 11, width=16, depth=2, heads=2)


TOKENS = torch.arange(24).reshape(3, 8) % 11


def test_a_model_begins_as_it_was_and_computes_what_merged_weights_compute():
    plain, model = gpt().eval(), adapted(gpt(), 4, 8.0, ["qkv", "fc1"], 1).eval()
    assert torch.equal(model(TOKENS), plain(TOKENS))
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, LoraLinear):
                module.lora_b.normal_(generator=torch.Generator().manual_seed(3))
                plain.get_submodule(name).weight += 2.0 * module.lora_b @ module.lora_a
    assert torch.allclose(model(TOKENS), plain(TOKENS), atol=1e-5)
    assert sum(isinstance(m, LoraLinear) for m in model.modules()) == 4


def test_adapters_alone_learn_and_are_drawn_by_their_names():
    model = adapted(gpt(), 4, 8.0, [], 1)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == learned(model) == set(sent(model)) and has_adapters(model)
    assert not has_adapters(gpt()) and sent(gpt()).keys() == gpt().state_dict().keys()
    one = adapted(gpt(), 4, 8.0, ["qkv"], 1).blocks[1].attention.qkv.lora_a
    assert torch.equal(one, model.blocks[1].attention.qkv.lora_a)
    assert not torch.equal(one, model.blocks[0].attention.qkv.lora_a)
    assert float(one.detach().abs().max()) <= 16**-0.5


def test_they_are_cut_with_their_layers():
    model = adapted(gpt(), 2, 4.0, [], 1).eval()
    chain = layered(model, TOKENS)
    assert chain.units[0].name == "embedding" and len(chain.cuts) == 5
    for cut in chain.cuts:
        device, edge = (half.eval() for half in split(chain, cut))
        assert torch.equal(edge(device(TOKENS)), model(TOKENS))
    assert sum(state_bytes(chain)) == sum(t.nbytes for t in sent(model).values())


def test_evaluation_does_not_read_weights_past_the_adapters():
    """In evaluation torch's encoder layer has a path of its own, which calls no module in it."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = adapted(nn.Sequential(layer), 2, 4.0, ["linear2"], 0).eval()
    x = torch.rand(2, 5, 16)
    with torch.no_grad():
        before = model(x)
        layer.linear2.lora_b[0] += 1.0  # of one number: LayerNorm takes away what all share
        assert not torch.allclose(model(x), before)


def test_every_machine_makes_what_does_not_learn(configure):
    given = ["data=digits", "model=mlp", "client.train=lora", "client.lora.rank=2"]
    config = configure(*given)
    dataset = federation(config).dataset
    model = build_model(config, dataset, initial=False)
    base = base_state(config, dataset.input_shape, dataset.num_classes)
    state = model.state_dict()
    assert base.keys() | learned(model) == state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())
    chain = layered_model(config, dataset.input_shape, dataset.num_classes)
    assert chain.graph.state_dict().keys() == state.keys()
    plain = parse(with_values(config.text, client={"train": "all"}))
    assert base_state(plain, dataset.input_shape, dataset.num_classes) == {}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["client.train=adapters"], "must be one of all, lora"),
        (["client.train=lora", "client.lora.rank=0"], "must be at least 1"),
        (["client.train=lora", "pruning=magnitude"], "cannot be with client.train=lora"),
        (["client.train=lora", "client.frozen=true"], "cannot be with client.train=lora"),
        (["client.train=lora", "client.max_model_bytes=100"], "cannot be with client.train=lora"),
    ],
)
def test_what_does_not_go_with_adapters_is_refused(given, told, configure):
    with pytest.raises(ConfigError, match=told):
        configure("data=digits", "model=mlp", *given)


def test_layers_that_are_not_there_are_named():
    with pytest.raises(ConfigError, match=r"qkw.*it has blocks\.0\.attention\.qkv"):
        adapted(gpt(), 2, 4.0, ["qkw"], 0)
    with pytest.raises(ConfigError, match="needs a model with linear layers"):
        adapted(nn.Sequential(nn.Conv2d(1, 1, 1)), 2, 4.0, [], 0)
