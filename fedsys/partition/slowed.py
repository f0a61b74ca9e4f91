"""A host that stands for a slower machine: it waits behind each of its units, in real time.

What it tells of its computing has the waiting in it, so planner, conditions and requests see the
slower machine; outputs are the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn

from fedsys.partition.stage_rack import Builder


@final
class SlowedBuilder:
    """Has another builder make modules, and lets each of them take longer.

    Args:
        builder: Makes modules of what was sent.
        factor: How many times as long they take; from 1 on.
    """

    def __init__(self, builder: Builder, factor: float) -> None:
        self._builder, self._factor = builder, factor

    def build(self, body: bytes, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return the module that a body describes, with these tensors.

        Raises:
            ModelError: As of the other builder.
        """
        return _Slowed(self._builder.build(body, tensors), self._factor)

    def free(self, module: nn.Module) -> None:
        """Take a module apart that nobody runs any more."""
        self._builder.free(module.inner if isinstance(module, _Slowed) else module)


@final
class _Slowed(nn.Module):
    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self._factor = inner, factor

    def forward(self, *given: Any) -> Any:
        began = time.perf_counter()
        made = self.inner(*given)
        time.sleep((self._factor - 1.0) * (time.perf_counter() - began))
        return made
