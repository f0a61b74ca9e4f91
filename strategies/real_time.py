"""Whether seconds that devices measure are those of the fleet that a run is about."""

from __future__ import annotations

from fedsys.config import Config


def is_real(config: Config) -> bool:
    """Return whether what devices measure is what the fleet of the run takes."""
    emulated = config.network.emulate and config.fleet.emulate
    return config.runtime.kind == "deployment" or emulated
