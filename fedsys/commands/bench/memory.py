"""Resident memory after each round, with many virtual clients of which some train.

What a round leaves behind would show as growth from round to round: states of clients, messages,
replies, models of threads. The run is an ordinary one in a folder of its own; memory is read,
after a garbage collection, when the first client of the next round gets its message.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from flwr.app import Context, Message

from fedsys import config as configuration
from fedsys.commands.bench import Chart
from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.transport.messages import settings_of


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Carry the run out and watch its memory.

    Args:
        config: The run.
        options: The rounds ``from_round`` and ``to_round`` whose memory is compared.

    Returns:
        Resident sizes in MB (10^6 bytes) after both rounds, ``growth`` as a share of the first,
        and ``sizes``: the size after each round.

    Raises:
        ConfigError: The run is too short.
    """
    first, last = int(options["from_round"]), int(options["to_round"])
    if not 0 < first < last < config.rounds:
        rule = f"must be above bench.to_round={last}, and that above bench.from_round={first}"
        raise ConfigError.of("rounds", config.rounds, rule)
    from fedsys.runtime import quiet_flower
    from fedsys.runtime.apps import load_apps
    from fedsys.runtime.local import play_local

    quiet_flower()
    inner = _inside(config)
    server_app, client_app = load_apps(inner)
    watch = _Watch()

    def watched(message: Message, context: Context) -> Message:
        if message.metadata.message_type.startswith("train"):
            watch.see(settings_of(message.content).server_round - 1)
        return client_app(message, context)

    began = time.perf_counter()
    play_local(inner, server_app, watched)
    before, after = watch.sizes[first], watch.sizes[last]
    return {
        "num_clients": config.num_clients,
        "from_mb": before / 1e6,
        "to_mb": after / 1e6,
        "growth": after / before - 1,
        "seconds": time.perf_counter() - began,
        "sizes": [
            {"round": number, "resident_mb": size / 1e6} for number, size in watch.sizes.items()
        ],
    }


def _inside(config: Config) -> Config:
    """Return the same run with its folder inside the folder of the benchmark."""
    tree = yaml.safe_load(config.text)
    tree["run"]["dir"] = str(Path(str(config.run.dir)) / "run")
    tree["json"] = True  # so that nothing but figures goes to standard output
    return configuration.parse(yaml.safe_dump(tree))


class _Watch:
    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self._process = psutil.Process()

    def see(self, finished: int) -> None:
        """Read the memory once after each round."""
        if finished not in self.sizes:
            gc.collect()
            self.sizes[finished] = self._process.memory_info().rss


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the resident size by round."""
    return Chart(
        f"Memory with {figures['num_clients']:,} virtual clients: {figures['growth']:+.1%}",
        "finished rounds",
        "resident MB",
        [str(row["round"]) for row in figures["sizes"]],
        {"resident": [row["resident_mb"] for row in figures["sizes"]]},
        lines=True,
    )
