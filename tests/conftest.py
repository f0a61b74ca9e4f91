"""Fixtures that several modules share."""

import os
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from fedsys.config import Config

# Bits depend on the number of threads; Flower and Ray must not call home. Flower's processes
# inherit what is set before they are imported.
torch.set_num_threads(1)
os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

_composed: dict[tuple[str, ...], str] = {}


@pytest.fixture
def configure() -> "Callable[..., Config]":
    """Compose the configuration of a run from overrides, as the command line does."""
    from fedsys.config import compose_text, parse

    def compose(*overrides: str) -> "Config":
        if overrides not in _composed:
            _composed[overrides] = compose_text(shlex.join(overrides))
        return parse(_composed[overrides])

    return compose


@pytest.fixture
def identity() -> None:
    """Give this process the identity without which Flower builds no message."""
    from fedsys.runtime import quiet_flower
    from fedsys.runtime.local import identify_process

    quiet_flower()
    identify_process()
