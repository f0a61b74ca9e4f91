from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedsys.errors import ModelError
from fedsys.models.graph import trace
from fedsys.models.measure import NodeCost, measure
from fedsys.randomness import Address, key_modules


class Last(nn.Module):
    def forward(self, outputs):
        return outputs[0][:, -1]


def models():
    from torchvision.models.vision_transformer import VisionTransformer

    grouped = nn.Conv2d(4, 8, (3, 2), stride=2, groups=2, dilation=2)
    return {
        "convolutions": nn.Sequential(nn.Conv2d(3, 4, 5, padding=1), nn.BatchNorm2d(4), grouped),
        "transposed": nn.Sequential(
            nn.ConvTranspose2d(3, 4, 3, stride=2), nn.PReLU(), nn.Flatten()
        ),
        "attention": VisionTransformer(16, 4, 2, 2, 8, 16),
        "recurrent": nn.Sequential(nn.Flatten(2), nn.GRU(256, 5, batch_first=True), Last()),
    }


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_work_and_results_are_those_of_the_model_as_torch_counts_them(name, device):
    model = key_modules(models()[name]).eval()
    x = torch.randn(2, 3, 16, 16, generator=Address(1).torch("test"))
    with FlopCounterMode(display=False) as counter:
        out = model(x)
    measured = measure(trace(model), x.to(device))
    assert 2 * sum(node.macs for node in measured.values()) == counter.get_total_flops()
    assert measured["output"] == NodeCost(tuple(out.shape), 4 * out.numel(), 0)


def test_a_linear_layer_costs_inputs_times_outputs_for_each_example():
    measured = measure(trace(nn.Sequential(nn.Linear(7, 5))), torch.zeros(3, 7, device="meta"))
    assert measured["_0"] == NodeCost((3, 5), 3 * 5 * 4, 3 * 5 * 7)


def test_measuring_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    traced = trace(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(traced, torch.ones(3, 4))
    assert traced.training and all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_input_that_does_not_fit_is_refused_with_the_place():
    traced = trace(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    with pytest.raises(ModelError, match=r"fails at 1 on an input of shape \(3, 5\), float32"):
        measure(traced, torch.zeros(3, 5, device="meta"))
