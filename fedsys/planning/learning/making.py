"""The fleet of a run as agents see it, and an agent for it: read from a file, or trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel, fractions
from fedsys.planning.costs import MachineClass, Messaging
from fedsys.planning.hardware import Hardware, hardware, network_for
from fedsys.planning.leakage import allowed_cuts
from fedsys.planning.learning.agent import load
from fedsys.planning.learning.options import FedAdaptOptions
from fedsys.planning.learning.practice import AnyAgent, Say, trained
from fedsys.planning.learning.scenarios import Scenario
from fedsys.planning.options import PlanOptions, run_workload
from fedsys.transport.network import Network

FILE: Final = "agent.safetensors"
"""Name of the agent in a run folder."""

_DEVICE = MachineClass("device", 4e9, 2.0, 1e9, 1e-3, 2e-5, Messaging(5e-4, {"fp32": 8e-9}))
_EDGE = MachineClass("edge", 1e11, 2.0, 4e9, 2e-4, 0.0, Messaging(1e-4, {"fp32": 1e-9}), 4)
_LINK = Network(25e6, 25e6, 3e-3)


def scenario_of(
    config: Config, layers: LayeredModel, examples: Sequence[int], options: FedAdaptOptions
) -> Scenario:
    """Return the fleet of a run as its fleet file describes it, or machines as they often are.

    Raises:
        ConfigError: A cut is none of the model's.
    """
    machines = hardware(config, layers, believed=True) or _often(config, layers)
    planning = PlanOptions(codec=options.codecs, micro_batches=_counts(options.micro_batches))
    load = run_workload(config, layers, machines, examples, planning)
    legal = legal_cuts(layers, options.cuts)
    cuts = [*allowed_cuts(config, layers, legal[:-1]), legal[-1]]
    done = fractions(layers)
    return Scenario(load, [done[cut - 1] for cut in cuts], cuts)


def legal_cuts(layers: LayeredModel, wanted: Sequence[int] | None = None) -> list[int]:
    """Return the cuts that an agent may choose, the whole model last.

    Args:
        layers: The model.
        wanted: FedAdapt's offloading points, as cuts; None: all cuts of the model.

    Raises:
        ConfigError: One is none of the model's.
    """
    for cut in wanted or ():
        if cut not in (*layers.cuts, len(layers)):
            known = ", ".join(map(str, (*layers.cuts, len(layers))))
            raise ConfigError.of("policy.cuts", cut, f"must be cuts of the model: {known}")
    return sorted({*(layers.cuts if wanted is None else wanted), len(layers)})


def _often(config: Config, layers: LayeredModel) -> Hardware:
    count = config.num_clients
    links = tuple(network_for(config, k) for k in range(count))
    known = tuple(link if math.isfinite(link.up_bits_s) else _LINK for link in links)
    edges = len(config.fleet.edges) or config.num_edges
    return Hardware((_DEVICE.costs(layers),) * count, known, (_EDGE.costs(layers),) * edges)


def _counts(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(str(value)),)


def agent_for(
    base: Scenario,
    options: FedAdaptOptions,
    seed: int,
    *,
    folder: Path | None = None,
    say: Say = lambda text: None,
    model: str = "",
) -> AnyAgent:
    """Return the agent of a run.

    Args:
        base: Its fleet and model.
        options: Where the agent is from, or how it is trained.
        seed: Of the run.
        folder: Where a trained agent is kept; one that lies there is taken, as the run is resumed.
        say: Told how far the training is.
        model: Name of the model, kept with the agent.

    Raises:
        ConfigError: The file is no agent's or one of another kind, or none is given and the extra
            ``rl`` is not installed.
    """
    if (known := known_agent(options, folder)) is not None:
        return known
    made = trained(base, options, seed, say=say, model=model)
    if (kept := agent_file(options, folder)) is not None:
        made.save(kept)
    return made


def known_agent(options: FedAdaptOptions, folder: Path | None = None) -> AnyAgent | None:
    """Return the agent of a file, or one that lies in a run folder; None if none is there yet.

    Raises:
        ConfigError: The file is no agent's or one of another kind.
    """
    kept = agent_file(options, folder)
    return load(kept, options) if kept is not None and (options.agent or kept.is_file()) else None


def agent_file(options: FedAdaptOptions, folder: Path | None = None) -> Path | None:
    """Return where the agent of a run is: in a file that is given, or its folder; else None."""
    if options.agent:
        return Path(options.agent).expanduser().absolute()
    return None if folder is None else folder / FILE
