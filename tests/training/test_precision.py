"""Steps in bfloat16: `client.precision=bf16`."""

import functools

import pytest
import torch
from torch import nn

from fedsys import identity
from fedsys.commands.doctor import machine
from fedsys.config import with_values
from fedsys.errors import ConfigError, FrameError, ModelError
from fedsys.models.layers import layered, stages
from fedsys.offload.session_tensors import Expected
from fedsys.planning.costs import crossings, tensor_bytes
from fedsys.randomness import Address, drawing
from fedsys.training import federation
from fedsys.training import plain as training
from fedsys.training.precision import autocast, for_loss
from fedsys.transport.codecs import CODECS, encode_activation
from strategies.heading import surroundings

SHAPE = (3, 16, 16)


class Residual(nn.Module):
    """Tokens whose sums stay in float32 while products are of bfloat16."""

    def __init__(self, input_shape=SHAPE, num_classes=10):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(input_shape[1], 1))
        self.first = nn.Linear(input_shape[2], 8)
        self.second = nn.Linear(8, 8)
        self.last = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.first(x.mean(1)) + self.start
        x = x + self.second(x).relu()
        return self.last(x.mean(1))


RESIDUAL = "tests.training.test_precision.Residual"


@pytest.fixture
def lowered(configure):
    return functools.partial(configure, "client.precision=bf16", "data=synthetic_32x32")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["client.kernels=fused"], "client.kernels=fused: cannot be with client.precision=bf16"),
        (["privacy=record", "privacy.epsilon=8", "model.norm=group"], "gradient of each example"),
        (["privacy=cut", "privacy.epsilon=8", "policy=fixed"], "clipped and made noisy"),
        (["resilience=frozen"], "exits have losses of their own"),
        (["runtime.batched_clients=4"], "runtime.batched_clients=4: cannot be"),
    ],
)
def test_what_computes_in_float32_is_refused(values, told, lowered):
    with pytest.raises(ConfigError, match=told):
        lowered(*values)


def test_a_step_computes_in_bfloat16_and_leaves_parameters_and_loss_in_float32():
    x, y = torch.randn(8, 6), torch.arange(8) % 3

    def trained(precision):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        seen = []
        model[1].register_forward_hook(lambda _, given, out: seen.append(out.dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        score = training.train(model, optimizer, [(x, y)], Address(0), precision=precision)
        return model[0].weight.detach(), score.loss, seen[0]

    weight, loss, kind = trained("fp32")
    lowered_weight, lowered_loss, lowered_kind = trained("bf16")
    assert (kind, lowered_kind) == (torch.float32, torch.bfloat16)
    assert lowered_weight.dtype == torch.float32
    assert not torch.equal(weight, lowered_weight)
    assert torch.allclose(weight, lowered_weight, atol=1e-2)
    assert lowered_loss == pytest.approx(loss, rel=1e-2)
    assert lowered_loss != float(torch.tensor(lowered_loss).bfloat16())  # nor is it rounded


def test_gradients_of_a_weight_that_is_used_twice_are_added_up_in_float32():
    """With the cache of casts they are in bfloat16, unless another thread clears it in between."""
    x = torch.randn(64, 32)
    layer = nn.Linear(32, 32, bias=False)
    with autocast("bf16", x):
        first = layer(x)
        second = layer(first)
    second.float().square().sum().backward()
    got = layer.weight.grad.clone()
    given = first.detach().requires_grad_()
    parts = []
    for value in (given, x):
        layer.weight.grad = None
        with autocast("bf16", x):
            out = layer(value)
        if value is given:
            out.float().square().sum().backward()
            gradient = given.grad
        else:
            out.backward(gradient)
        parts.append(layer.weight.grad)
    assert torch.equal(got, parts[0] + parts[1])


def test_outputs_of_a_model_of_bfloat16_are_left_as_they_are():
    outputs = torch.ones(2, dtype=torch.bfloat16)
    assert for_loss(outputs, "fp32") is outputs
    assert for_loss(outputs, "bf16").dtype == torch.float32
    assert for_loss(outputs.double(), "bf16").dtype == torch.float64


@pytest.mark.parametrize("model", ["cnn", "vgg5", "resnet18", "mobilenet_v2", "residual"])
def test_what_is_charged_for_a_cut_is_what_crosses_it(model, lowered):
    chosen = ["model=own", f"model._target_={RESIDUAL}"] if model == "residual" else ["model=cnn"]
    if model not in ("residual", "cnn"):
        chosen = [f"model={model}"]
    config = lowered(*chosen)
    layers = federation.layered_model(config, SHAPE, 10)
    model_ = federation.models.build(config.model, input_shape=SHAPE, num_classes=10, seed=0)
    whole = layered(model_, SHAPE)
    x, found = torch.randn(4, *SHAPE), crossings(layers)
    for cut in whole.cuts:
        front, back = stages(whole, [cut])
        with drawing(Address(0), 0, 4), autocast("bf16", x):
            z = front.train()(x)
            back.train()(z)
        assert found[cut - 1].itemsize == z.itemsize
        for codec in CODECS:
            tensors, _ = encode_activation(z, codec)
            sent = sum(tensor.nbytes for tensor in tensors.values())
            assert sent == tensor_bytes(found[cut - 1], 4, codec)
    kinds = {each.itemsize for each in found[:-1]}
    assert kinds == ({4} if model == "residual" else {2})


def test_half_as_many_bytes_cross(lowered, carry_out):
    config = lowered(
        "model=vgg5", "num_clients=1", "rounds=1", "client.epochs=1", "policy=fixed",
        "policy.cut=1", "data.examples=40", "client.batch_size=10",
    )  # fmt: skip
    got = carry_out(config).figures
    plain = carry_out(with_parsed(config, precision="fp32")).figures
    fed = federation.federation(config)
    each = crossings(federation.layers_of(config, fed.dataset))[0].elements * 2
    for way in ("bytes_up", "bytes_down"):
        saved, headers = plain[way] - got[way], 8 * got["edge_steps"]
        assert saved == pytest.approx(len(fed.parts[0]) * each, abs=headers)


def with_parsed(config, **client):
    from fedsys.config import parse

    return parse(with_values(config.text, client=client))


def test_an_edge_takes_activations_in_the_types_that_units_leave(configure):
    config = configure("client.precision=bf16")
    layers = federation.layered_model(config, (1, 8, 8), 10)
    expected = Expected(layers.units[0].out_shape, (torch.float32, torch.bfloat16), 10, "cpu")
    from fedsys.transport.wire import Frame

    z = torch.zeros(2, *layers.units[0].out_shape)
    for kind in (torch.float32, torch.bfloat16):
        tensors, meta = encode_activation(z.to(kind), "fp32")
        assert expected.activation(Frame("activation", meta, tensors), 2).dtype == kind
    tensors, meta = encode_activation(z.half(), "fp32")
    with pytest.raises(FrameError, match=r"float16 instead of torch\.float32 or torch\.bfloat16"):
        expected.activation(Frame("activation", meta, tensors), 2)


class Refusing(nn.Linear):
    def forward(self, x):
        if torch.is_autocast_enabled("cpu"):
            raise ValueError("float32 only")
        return super().forward(x.flatten(1))


def test_a_model_that_does_not_run_under_autocast_is_refused_before_training(lowered):
    config = lowered()
    dataset = federation.federation(config).dataset
    with pytest.raises(Exception, match="float32 only"):
        federation.check_model(Refusing(3 * 32 * 32, 10), dataset, config)
    from fedsys.models.autocast import under_autocast

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            return self.inner.out_proj(x) @ x.new_ones(4, 4).double()

    layers = layered(Around().double(), (3, 4))
    with pytest.raises(ModelError, match=r"choose client\.precision=fp32"):
        under_autocast(layers, (3, 5))


@pytest.mark.parametrize(
    ("flags", "there"),
    [("avx2 avx512_bf16", True), ("fma amx_bf16", True), ("avx2 avx512f", False)],
)
def test_it_is_said_whether_the_processor_has_instructions(
    flags, there, lowered, configure, monkeypatch, tmp_path
):
    told = tmp_path / "cpuinfo"
    told.write_text(f"model name : x\nflags\t\t: {flags}\n")
    monkeypatch.setattr(identity, "Path", lambda _: told)
    assert identity.has_bfloat16() is there
    config = lowered("client.device=cpu")
    assert machine.precision(config).status == ("ok" if there else "warn")
    assert machine.precision(configure()).status == "ok"
    line = next(line for line in surroundings(config) if "bfloat16" in line)
    assert ("has no instructions" in line) != there
    assert not any("bfloat16" in line for line in surroundings(configure()))
