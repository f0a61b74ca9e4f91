"""Transformers, of torch's modules and as Hugging Face writes them: what holds of each of them."""

import re

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedsys.errors import ModelError
from fedsys.models.graph import trace
from fedsys.models.layers import layered, split
from fedsys.models.text import Gpt
from fedsys.randomness import check_keyed, key_modules, seeded_default_generator
from fedsys.transport.several import Several, arguments
from tests import own_work
from tests.models import hf_style

ROWS = 3
WORDS = torch.arange(6 * ROWS).reshape(ROWS, 6) % 20
PADDED = Several((WORDS, WORDS % 6 > 3))
IMAGES = torch.linspace(0, 1, ROWS * 192).reshape(ROWS, 3, 8, 8)
CASES = {
    "gpt": (lambda: Gpt((6,), 20, width=8, depth=3, heads=2), WORDS),
    "bert": (lambda: own_work.Bert(2), PADDED),
    "vit": (lambda: own_work.vit(3), IMAGES),
    "gpt of lists": (lambda: hf_style.Gpt2(20), WORDS),
    "bert of lists": (lambda: hf_style.Bert(2), PADDED),
    # a mask of the sizes of states held all blocks together, and `nn.ReLU()` could not be traced
    "bert of sizes": (lambda: hf_style.Sized(2), PADDED),
    "vit of lists": (lambda: hf_style.Vit(3), IMAGES),
}


@pytest.fixture(params=CASES)
def case(request):
    made, inputs = CASES[request.param]
    with seeded_default_generator(0):
        model = key_modules(made()).eval()
    return model, inputs, layered(model, inputs)


def test_they_are_cut_between_their_blocks_with_the_bits_of_the_whole(case):
    model, inputs, chain = case
    assert {0, 1, 2} <= {int(n) for unit in chain.units for n in re.findall(r"\d+", unit.name)}
    expected = model(*arguments(model, inputs))
    for cut in chain.cuts:
        device, edge = (half.eval() for half in split(chain, cut))
        crossing = device(*arguments(device, inputs))
        more = [inputs.tensors[index] for index in chain.inputs(cut, len(chain))]
        assert torch.equal(edge(crossing, *more), expected)
        assert crossing.nbytes == ROWS * chain.units[cut - 1].bytes_out


def test_the_work_is_what_torch_counts_while_it_is_done(case):
    """Without gradients torch counts nothing in its fused path, so these are on."""
    model, inputs, chain = case
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*arguments(model, inputs))
    assert 2 * ROWS * sum(unit.macs for unit in chain.units) == counter.get_total_flops()


def test_what_they_draw_has_an_address(case):
    model, inputs, _ = case
    check_keyed(model, *arguments(model, inputs))


class Causal(nn.Module):
    """An encoder with a mask, told or not that it is causal."""

    def __init__(self, told, nested=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.mask = nn.Buffer(nn.Transformer.generate_square_subsequent_mask(5))
        self.told, self.nested = told, nested

    def forward(self, x):
        if self.nested:
            return self.encoder(x, src_key_padding_mask=x[:, :, 0] > 9)
        return self.encoder(x, mask=self.mask, is_causal=self.told)


def test_an_encoder_with_a_mask_is_traced_where_it_looks_at_no_values():
    model, x = Causal(told=True).eval(), torch.rand(2, 5, 8)
    assert torch.equal(trace(model)(x), model(x))
    with pytest.raises(ModelError, match="give is_causal=True or False"):
        trace(Causal(told=None))
    with pytest.raises(ModelError, match="enable_nested_tensor=False"):
        trace(Causal(told=True, nested=True))


# --------------------------------------------------------------------------------------------------
# Those of transformers themselves, where it is installed


class Scores(nn.Module):
    """What makes a model of transformers one of tensors: which input is which, and its scores."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, words, padding=None):
        mask = None if padding is None else ~padding
        return self.model(input_ids=words, attention_mask=mask).logits


class CausalScores(Scores):
    """With a mask that is ready: one that is made of sizes would hold the blocks together."""

    def __init__(self, model):
        super().__init__(model)
        mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
        self.mask = nn.Buffer(mask, persistent=False)  # what is kept belongs to one unit

    def forward(self, words):
        return self.model(input_ids=words, attention_mask=self.mask).logits


SIZES = {
    "Bert": {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
             "intermediate_size": 16, "max_position_embeddings": 6},
    "DistilBert": {"dim": 8, "n_layers": 3, "n_heads": 2, "hidden_dim": 16,
                   "max_position_embeddings": 6},
    "GPT2": {"n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 6, "use_cache": False},
}  # fmt: skip


UNTIED = {"tie_word_embeddings": False}


def of_transformers(name, kind, **more):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(vocab_size=20, **SIZES[name], **more)
    with seeded_default_generator(0):
        return getattr(transformers, name + kind)(config)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: Scores(of_transformers("Bert", "ForSequenceClassification")), PADDED),
        (lambda: Scores(of_transformers("Bert", "ForSequenceClassification")), WORDS),
        (lambda: Scores(of_transformers("DistilBert", "ForSequenceClassification")), PADDED),
        (
            lambda: CausalScores(of_transformers("GPT2", "LMHeadModel", tie_word_embeddings=False)),
            WORDS,
        ),
    ],
    ids=["padded bert", "bert", "padded distilbert", "gpt2"],
)
def test_models_of_transformers_are_cut_between_their_blocks(make, inputs):
    model = make().eval()
    chain = layered(model, inputs)
    assert {0, 1, 2} <= {int(n) for unit in chain.units for n in re.findall(r"\d+", unit.name)}
    expected = model(*arguments(model, inputs))
    for cut in chain.cuts:
        device, edge = (half.eval() for half in split(chain, cut))
        more = [inputs.tensors[index] for index in chain.inputs(cut, len(chain))]
        assert torch.equal(edge(device(*arguments(device, inputs)), *more), expected)
