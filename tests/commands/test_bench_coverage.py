"""What `fedsys bench coverage` says of models that are built in uncommon ways."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsys.commands.bench import coverage
from fedsys.commands.bench.prune_models import as_trained

SHAPE = (3, 8, 8)


class TwoBranches(nn.Module):
    """Two branches that meet in the output alone: one tensor flows nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 5)
        self.first, self.second = nn.Linear(144, 10), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        wide, narrow = self.wide(x).relu(), self.narrow(x).relu()
        both: Tensor = self.first(wide.flatten(1)) + self.second(narrow.flatten(1))
        return both


def last_layer_of_zeros() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)]
    nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def case_of(model: nn.Module) -> Any:
    config: Any = type("Seeded", (), {"seed": 3})()
    return coverage._Case("own", model.eval(), SHAPE, config)


def test_a_model_without_a_place_to_cut_says_so_in_both_columns() -> None:
    # the middle of no cuts was asked for, and the column said "tuple index out of range"
    case = case_of(TwoBranches())
    for column in ("traced", "cut", "split_exact"):
        coverage._try(case, column)
    assert case.reasons == dict.fromkeys(("cut", "split_exact"), "there is no place to cut")
    assert case.found["traced"] and not case.found.get("split_exact")


def test_a_last_layer_of_zeros_is_drawn_so_that_its_columns_say_something() -> None:
    torch.manual_seed(0)
    zeros = case_of(as_trained(last_layer_of_zeros(), 3))
    coverage._try(zeros, "shrunk_exact")
    assert "does not depend on its input" in zeros.reasons["shrunk_exact"]
    drawn = case_of(as_trained(coverage.without_zeros(last_layer_of_zeros(), 3), 3))
    for column in ("cut", "split_exact", "shrunk_exact"):
        coverage._try(drawn, column)
    assert not drawn.reasons
    masked = copy.deepcopy(drawn.model)
    with torch.no_grad():
        masked[0].weight[::2] = 0
        x = torch.randn(2, *SHAPE)
        answers = coverage._dense(drawn)(x)
        torch.testing.assert_close(answers, masked(x), rtol=0, atol=1e-6)
    assert not torch.allclose(answers[0], answers[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", [0, 7])
def test_only_what_is_all_zeros_is_drawn_and_by_the_seed(seed: int) -> None:
    def made(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(1)
        model = last_layer_of_zeros()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return before, coverage.without_zeros(model, seed).state_dict()

    before, after = made(seed)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["3.weight"]
    assert 0.0 < float(after["3.weight"].abs().max()) < 0.2
    assert torch.equal(after["3.weight"], made(seed)[1]["3.weight"])
    assert not torch.equal(after["3.weight"], made(seed + 1)[1]["3.weight"])
