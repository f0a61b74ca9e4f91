"""What `fedsys bench coverage` says of models that are built in uncommon ways."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedsys.commands.bench import coverage

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
