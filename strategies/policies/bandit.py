"""``policy=bandit`` in a run: a contextual bandit for each device, which needs no profile."""

from __future__ import annotations

from collections.abc import Sequence

from fedsys.config import Config
from fedsys.models.layers import LayeredModel
from fedsys.planning.bandit import Bandit, BanditOptions
from fedsys.planning.costs import MachineClass
from fedsys.planning.hardware import Hardware, hardware, network_for
from fedsys.planning.options import PlanOptions, run_workload
from fedsys.planning.workload import Workload
from strategies.policies.planned import refuse_private


def bandit(config: Config, examples: Sequence[int]) -> Bandit:
    """Return the policy of ``policy=bandit``.

    Args:
        config: The run; ``policy`` holds the options. The machines of its fleet file say who is of
            one kind, not what they take.
        examples: Examples of each client.

    Raises:
        ConfigError: An option is not usable, or labels stay on devices.
    """
    refuse_private(config)
    options = BanditOptions.of(config.policy)
    spec = {name: getattr(options, name) for name in ("codec", "micro_batches", "objective")}
    choices = PlanOptions.of(spec)
    own = list(examples) or [config.client.batch_size]

    def believed(layers: LayeredModel, clients: Sequence[int]) -> Workload:
        machines = hardware(config, layers) or _unknown(config, layers)
        return run_workload(config, layers, machines, own, choices, clients)

    return Bandit(believed, options, most_bytes=config.client.max_model_bytes)


def _unknown(config: Config, layers: LayeredModel) -> Hardware:
    """Return machines of which nothing is known, all of one kind."""
    costs = MachineClass("machine", macs_per_s=1e9).costs(layers)
    edges = len(config.fleet.edges) or config.num_edges
    networks = tuple(network_for(config, k) for k in range(config.num_clients))
    return Hardware((costs,) * config.num_clients, networks, (costs,) * edges)
