"""What a model freezes stays frozen in its dense variants, and when statistics are taken anew.

A dense model is made from the graph of evaluation: trained further, it trained every BatchNorm.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fedsys.data import Images
from fedsys.models.layers import layered, stages
from fedsys.pruning.dense.architecture import describe, load, save
from fedsys.pruning.dense.shrink import shrink
from fedsys.pruning.levels import _recalibrate
from fedsys.pruning.variant import variant
from fedsys.randomness import Address, drawing, key_modules, seeded_default_generator
from tests.models.partly import KINDS, Partly

SHAPE = (2, 6, 6)


def made(frozen: str) -> nn.Module:
    """Return a model whose statistics are not those of the start, and half of a layer's zeros."""
    with seeded_default_generator(1):
        model = key_modules(Partly(input_shape=SHAPE, num_classes=3, frozen=frozen))
        with torch.no_grad():
            for norm in (model.norm, model.late):
                norm.running_mean.uniform_(-0.5, 0.5)
                norm.running_var.uniform_(0.5, 2.0)
            model.conv.weight[::2] = 0.0
            model.late.bias[::2] = -1.0
    return model


def images(count: int = 6) -> Tensor:
    return torch.randn(count, *SHAPE, generator=Address(2).torch("images"))


def trained(parts: list[nn.Module]) -> None:
    parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(2):
        for part in parts:
            part.train()
        with drawing(Address(3), step, 6):
            out = images()
            for part in parts:
                out = part(out)
            F.cross_entropy(out, torch.tensor([0, 1, 2, 1, 0, 2])).backward()
        optimizer.step()
        optimizer.zero_grad()


def changed(after: dict[str, Tensor], before: dict[str, Tensor]) -> set[str]:
    """Return what was trained; what a norm takes away again moves by rounding alone, or not."""
    return {n for n, v in after.items() if (v.double() - before[n].double()).abs().max() > 1e-6}


@pytest.mark.parametrize("frozen", KINDS)
def test_a_variant_keeps_frozen_what_its_original_froze(frozen: str, tmp_path) -> None:
    original = made(frozen)
    small = shrink(original, SHAPE).model
    assert small.get_submodule("conv").out_channels == 4
    read = variant(SHAPE, 3, path=str(save(small, tmp_path / "v")))
    before = {name: value.clone() for name, value in read.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(read.eval()(images()), small(images()))

    trained([original])
    start = made(frozen).state_dict()
    moved = changed(original.state_dict(), start)
    trained([read])
    after = read.state_dict()
    assert changed(after, before) == moved & after.keys()
    wanted = {"momentum": (0.02, None)}.get(frozen, (0.1, 0.1))
    assert (read.norm.momentum, read.late.momentum) == wanted


@pytest.mark.parametrize("frozen", ["root", "stem", "parameters"])
def test_a_variant_trains_in_halves_as_in_one_piece(frozen: str, tmp_path) -> None:
    folder = save(shrink(made(frozen), SHAPE).model, tmp_path / "v")
    whole, split = load(folder), load(folder)
    trained([whole])
    trained(list(stages(layered(split, SHAPE), [1])))
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in split.state_dict().items())


def test_files_of_models_that_freeze_nothing_are_as_they_were() -> None:
    body = describe(shrink(made("none"), SHAPE).model)
    assert set(body) == {"format", "layers", "constants", "nodes"}
    body = describe(shrink(made("stem"), SHAPE).model)
    assert body["in_evaluation"] == ["stem.drop", "stem.norm"]
    assert describe(shrink(made("parameters"), SHAPE).model)["frozen"] == [
        "late.bias", "late.weight", "stem.bias", "stem.weight",
    ]  # fmt: skip


def test_a_variant_of_a_variant_freezes_the_same(tmp_path) -> None:
    small = shrink(made("root"), SHAPE).model
    again = shrink(load(save(small, tmp_path / "v")), SHAPE).model
    assert isinstance(again, fx.GraphModule)
    again.train()
    assert [name for name, m in again.named_modules() if not m.training] == ["norm", "late"]


@pytest.mark.parametrize("frozen", ["root", "class", "forward", "none"])
def test_frozen_statistics_are_not_taken_anew(frozen: str) -> None:
    """They were reset; where forward puts the layer into evaluation they stayed 0 and 1."""
    model = made(frozen)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    dataset = SimpleNamespace(
        train=Images(torch.randint(0, 255, (8, *SHAPE), dtype=torch.uint8), torch.zeros(8).long()),
        mean=(0.0, 0.0), std=(1.0, 1.0), pictures=True,
    )  # fmt: skip
    _recalibrate(model, 8, dataset)
    same = {n for n, buffer in model.named_buffers() if torch.equal(buffer, before[n])}
    kept = {"root": {"norm", "late"}, "forward": {"norm", "late"}, "class": {"norm"}}
    wanted = kept.get(frozen, set())
    assert {n.partition(".")[0] for n in same if "running_mean" in n} == wanted
