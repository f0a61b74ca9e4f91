"""Which layers keep more channels than they need: the decision, and what is measured for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from fedsys.commands.bench.prune_models import as_trained
from fedsys.config import VariantsConfig
from fedsys.config.pruning import PruningConfig
from fedsys.errors import ConfigError
from fedsys.models import build
from fedsys.pruning import rounding
from fedsys.pruning.candidates import convert
from fedsys.pruning.dense.shrink import shrink
from fedsys.pruning.levels import Level
from fedsys.pruning.rounding import (
    ONNX,
    TORCH,
    Choice,
    Group,
    Rounding,
    Times,
    decided,
    groups_of,
    search,
)
from fedsys.pruning.sparsify import one_shot
from fedsys.pruning.structure import structure
from fedsys.training.masks import Masks, last_layer

SHAPE = (3, 32, 32)
WIDE = tuple(
    Group((f"wide{i}",), "depthwise", channels, 96) for i, channels in enumerate((21, 37, 53, 9))
)
SUMS = tuple(Group((f"sum{i}", f"also{i}"), "pointwise", 13, 24) for i in range(3))
GROUPS = (*WIDE, *SUMS)


def table(saved: Callable[[int, int], float]) -> tuple[Times, list[Choice]]:
    """Return times that add up from a table: 10 ms, less what each group saves by its multiple."""
    asked: list[Choice] = []

    def times(choices: Sequence[Choice]) -> list[float]:
        asked.extend(choices)
        return [10.0 - sum(saved(i, m) for i, m in enumerate(choice)) for choice in choices]

    return times, asked


# --------------------------------------------------------------------------------------------------
# The decision


def test_a_group_that_does_not_pay_stays_as_it_is() -> None:
    """One multiple for all made a MobileNetV2 2.5 times as fast and a DenseNet-121 half as fast."""
    times, _ = table(lambda i, m: 0.0 if m == 1 else 0.9 if i < 4 else -0.4)
    found = search(GROUPS, times)
    assert found.choice == (8, 8, 8, 8, 1, 1, 1)
    assert found.round_to == dict.fromkeys(("wide0", "wide1", "wide2", "wide3"), 8)
    assert [width for _, width in found.rounded] == [24, 40, 56, 16]
    assert found.measured_ms == pytest.approx(
        {"exact": 10.0, "round8": 7.6, "round16": 7.6, "chosen": 6.4}
    )
    assert found.predicted_ms == pytest.approx(6.4)


def test_nothing_is_rounded_where_that_is_slower() -> None:
    times, _ = table(lambda i, m: 0.0 if m == 1 else -1.0)
    found = search(GROUPS, times)
    assert set(found.choice) == {1} and not found.round_to
    assert found.measured_ms is not None
    assert found.measured_ms["chosen"] == found.measured_ms["exact"] == found.predicted_ms == 10.0


def test_groups_of_one_kind_are_told_apart() -> None:
    times, _ = table(lambda i, m: 0.0 if m == 1 else {0: 1.5, 1: 1.5}.get(i, -1.0))
    assert search(GROUPS, times).choice == (8, 8, 1, 1, 1, 1, 1)


def test_each_group_gets_the_multiple_that_is_best_for_it() -> None:
    best = {0: 16, 1: 16, 2: 8, 3: 8}
    times, _ = table(lambda i, m: 0.0 if m == 1 else 1.0 if best.get(i, 8) == m else 0.3)
    # 9 and 13 channels are 16 by either multiple, which counts as 8
    assert search(GROUPS, times).choice == (16, 16, 8, 8, 8, 8, 8)


def test_what_is_faster_by_less_than_the_margin_is_chance() -> None:
    times, _ = table(lambda i, m: 0.0 if m == 1 else 0.02)
    assert set(search(GROUPS, times, margin=0.02).choice) == {1}
    assert set(search(GROUPS, times, margin=0.01).choice) == {8}


def test_what_rounding_does_not_help_is_narrowed_again() -> None:
    """Where one kind of layers gains much by rounding all, others were rounded for nothing."""
    times, _ = table(lambda i, m: 0.0 if m == 1 else 1.0 if i < 4 else -0.01)
    assert search(GROUPS, times).choice == (8, 8, 8, 8, 1, 1, 1)
    times, _ = table(lambda i, m: 0.0 if m == 1 else 1.0 if i < 4 else 0.01)
    assert search(GROUPS, times).choice == (8,) * 7


def test_a_choice_that_is_slow_when_it_is_measured_again_is_not_taken() -> None:
    """A comparison that another process disturbed must not decide alone."""
    calls: list[int] = []

    def times(choices: Sequence[Choice]) -> list[float]:
        calls.append(len(choices))
        rounded = [any(m > 1 for m in choice) for choice in choices]
        return [5.0 if wide and len(calls) == 1 else 10.0 for wide in rounded]

    found = search(GROUPS, times)
    assert set(found.choice) == {1} and calls[0] == 3 and calls[-1] == 4
    assert found.measured_ms is not None and found.measured_ms["chosen"] == 10.0


def test_the_search_ends_after_so_many_tries() -> None:
    groups = tuple(Group((f"l{i}",), f"kind{i % 7}", 5 + i, 512) for i in range(121))
    times, asked = table(lambda i, m: 0.0)
    found = search(groups, times, tries=10)
    assert found.tries == 10
    assert len(asked) == 3 + 2 * 10 + 4  # uniform choices, pairs, and the last measurement


def test_where_nothing_can_be_wider_nothing_is_measured() -> None:
    def never(choices: Sequence[Choice]) -> list[float]:
        raise AssertionError(choices)

    for groups in ((), (Group(("a",), "k", 16, 20), Group(("b",), "k", 32, 32))):
        found = search(groups, never)
        assert not found.round_to and not found.measured_ms
        assert str(found) == "no number of channels can be rounded up"
        json.dumps(found.figures(), allow_nan=False)


def test_a_decision_explains_itself() -> None:
    times, _ = table(lambda i, m: 0.0 if m == 1 else 0.9 if i < 4 else -0.4)
    found = search(GROUPS, times, engine=ONNX)
    text = str(found)
    assert "4 of 7 groups of channels rounded up for onnx; ms: exact 10, round8 7.6" in text
    assert "chosen 6.4 (predicted 6.4, " in text and "wide1: 37 -> 40" in text
    figures = json.loads(json.dumps(found.figures()))
    assert figures["rounded"][1] == {"layers": ["wide1"], "channels": 37, "rounded": 40}


# --------------------------------------------------------------------------------------------------
# Models


def network(name: str = "mobilenet.mobilenet_v2", **arguments: object) -> nn.Module:
    spec = {"_target_": f"fedsys.models.{name}", "norm": "batch", "init": None, **arguments}
    return as_trained(build(spec, input_shape=SHAPE, num_classes=10, seed=1), 1)


def masks_of(model: nn.Module, sparsity: float) -> Masks:
    known = structure(PruningConfig("group_norm"), model, SHAPE)
    leave = last_layer(model)
    return one_shot("group_norm", model, sparsity, leave=leave, keep_channels=1, **known)


@pytest.fixture(scope="module")
def narrow() -> tuple[nn.Module, Masks]:
    model = network(width=0.25)
    return model, masks_of(model, 0.6)


def test_layers_are_rounded_by_their_names(narrow: tuple[nn.Module, Masks]) -> None:
    model, masks = narrow
    exact = shrink(model, SHAPE, masks=masks)
    groups = groups_of(exact.plan)
    assert any("in groups" in group.kind for group in groups)
    first = groups[3]
    small = shrink(model, SHAPE, masks=masks, round_to=dict.fromkeys(first.layers, 8))
    before = {edit.name: edit.after for edit in exact.plan.edits}
    after = {edit.name: edit.after for edit in small.plan.edits}
    wider = {name for name in before if before[name] != after[name]}
    assert wider >= set(first.layers) or first.width(8) == first.channels
    assert all(after[name] == first.width(8) for name in first.layers)
    coupled = {e.name for g in exact.plan.groups for e in g if g[0].name in {*first.layers}}
    assert wider <= coupled | set(first.layers)
    assert small.report.max_abs_diff_float64 <= 1e-9
    again = exact.plan.rounded(rounding.Coupling.GROUP, dict.fromkeys(first.layers, 8))
    assert {edit.name: edit.after for edit in again.edits} == after


@pytest.mark.slow  # a model is exported
def test_every_choice_is_the_same_function(
    narrow: tuple[nn.Module, Masks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is timed, on both engines, and what is made of the decision in the end."""
    pytest.importorskip("onnxruntime")
    model, masks = narrow
    plan = shrink(model, SHAPE, masks=masks).plan
    options = VariantsConfig(batch_sizes=(2,), threads=(1,))
    images = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    exports: list[object] = []
    exported = rounding.onnx_bytes
    monkeypatch.setattr(rounding, "onnx_bytes", lambda *a: exports.append(a) or exported(*a))
    groups = groups_of(plan)
    choices = [tuple(m for _ in groups) for m in (1, 8, 16)]
    choices.append(tuple((1, 8, 16)[i % 3] for i in range(len(groups))))
    expected = None
    for engine in (TORCH, ONNX):
        timed = rounding._Timed(plan, groups, options, SHAPE, engine)
        for choice in choices:
            with torch.inference_mode():
                got = timed._module(choice)(images)
            expected = got if expected is None else expected
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert len(exports) == 1  # other widths are put into the file of the first
    level = Level("some", model, masks, "by hand")
    round_to = Rounding(groups, choices[-1]).round_to
    candidate, small = convert(level, options, SHAPE, lambda plan: None, images, round_to)
    assert candidate.variant.other_answers == 0 and small.report.max_abs_diff_float64 <= 1e-9
    widths = {name: after for name, _, after in candidate.variant.channels}
    for group, multiple in zip(groups, choices[-1], strict=True):
        assert widths[group.layers[0]] == group.width(multiple)


def test_a_decision_is_made_of_what_is_measured(
    narrow: tuple[nn.Module, Masks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are made up: which layers pay depends on the machine, that they decide does not.

    Of all choices that were compared the models were kept, nineteen of a VGG-16 or more.
    """
    model, masks = narrow
    plan = shrink(model, SHAPE, masks=masks).plan
    kept: list[int] = []
    timed = rounding._Timed.__call__

    def counted(self: rounding._Timed, choices: Sequence[Choice]) -> list[float]:
        found = timed(self, choices)
        kept.append(len(self._modules))
        return found

    monkeypatch.setattr(rounding._Timed, "__call__", counted)

    def in_turns(
        models: dict[str, nn.Module], images: torch.Tensor, runs: int, **given: object
    ) -> dict[str, list[float]]:
        # a model whose depthwise layers are multiples of 8 is fast, each other channel costs
        found = {}
        for name, module in models.items():
            convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
            deep = sum(m.out_channels % 8 != 0 for m in convs if m.groups > 1)
            rest = sum(m.out_channels for m in convs if m.groups == 1)
            found[name] = [len(images) * (1.0 + deep + 1e-3 * rest)] * runs
        return found

    monkeypatch.setattr(rounding, "in_turns", in_turns)
    found = decided(plan, VariantsConfig(batch_sizes=(1, 16), threads=(1,)), SHAPE)
    assert found.engine == TORCH and found.round_to
    assert all("in groups" in group.kind for group, _ in found.rounded)
    deep = [g for g in found.groups if "in groups" in g.kind and g.width(8) > g.channels]
    assert len(found.rounded) == len(deep)
    assert len(kept) > 8 and max(kept) <= 5  # those of a pair, nothing rounded, all to 8 and to 16


@pytest.mark.parametrize("round_to", [{"0": 0}, {"0": 8, "2": -1}])
def test_multiples_of_nothing_are_refused(round_to: dict[str, int]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 10, 1))
    with pytest.raises(ConfigError, match=r"^variants\.round_to=(0|-1): must be at least 1"):
        shrink(net, (3, 6, 6), round_to=round_to)
