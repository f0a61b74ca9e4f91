"""What stands above the rounds of a run: the model, and with split training who trains with whom.

What was planned is said as soon as it is known, in the round that begins with it, and again when it
changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp.strategy import Strategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsys.config import Config, NetworkConfig, edge_names
from fedsys.data import Dataset
from fedsys.identity import has_bfloat16
from fedsys.models import lora
from fedsys.models.batchnorm import DeferredBatchNorm
from fedsys.models.modes import observed
from fedsys.planning.hardware import links_of
from fedsys.planning.options import PLANNED, PlanOptions
from fedsys.runs import cuts
from fedsys.runs.decisions import write_plan
from fedsys.training import plain as training
from fedsys.training.federation import fusion_in
from fedsys.training.precision import types_by
from fedsys.transport.several import said
from strategies.around import find
from strategies.offload import Offload


def title(config: Config, model: nn.Module, dataset: Dataset) -> str:
    """Return a line about the model, the data, the clients and the strategy."""
    parameters = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    if lora.has_adapters(model):
        learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
        parameters += f", {learns:,} of adapters"
    target = str(config.model.get("name") or config.model["_target_"]).rpartition(".")[2]
    strategy = str(config.strategy["_target_"]).rpartition(".")[2]
    return (
        f"{target} ({parameters}) on {config.data.get('source', 'data')} "
        f"{said(dataset.input_shape)}, "
        f"{config.num_clients} clients, {strategy}, seed {config.seed}"
    )


def surroundings(config: Config) -> list[str]:
    """Return lines about edge servers, links, fleet and network; none where there are none."""
    lines = []
    if (many := config.runtime.batched_clients) > 1:
        lines.append(f"{many} clients are trained at once: other bits than one at a time")
    lines += _about_precision(config)
    if names := edge_names(config):
        count = f"{len(names)} edge server{'' if len(names) == 1 else 's'}"
        link = config.link.kind if config.link.kind != "auto" else _automatic(config)
        kind = config.policy.get("kind")
        lines.append(f"policy {kind}, schedule {config.schedule.kind}, {count}, link {link}")
    if config.fleet.devices:
        devices = [config.fleet.devices[i % len(config.fleet.devices)]
                   for i in range(config.num_clients)]  # fmt: skip
        servers = f", edge {cuts.joined(config.fleet.servers)}" if names else ""
        networks = dict.fromkeys(network_text(link) for link in links_of(config))
        lines.append(f"fleet of {cuts.joined(devices)}{servers}, network {'; '.join(networks)}")
    elif names and config.network.emulate:
        lines.append(f"links emulated as {network_text(config.network)}")
    return lines


def _about_precision(config: Config) -> list[str]:
    client = config.client
    if client.precision == "fp32":
        return []
    slow = types_by(client) == "cpu" and has_bfloat16() is False
    told = "steps compute in bfloat16 where torch.autocast does"
    return [f"{told}; this processor has no instructions for it" if slow else told]


def about_kernels(config: Config, dataset: Dataset) -> list[str]:
    """Return a line about what is computed by fused kernels; none where none are asked for."""
    fusion = fusion_in(config, dataset)
    return [] if fusion is None else [fusion.in_words()]


def kernel_figures(config: Config, dataset: Dataset) -> dict[str, int]:
    """Return how many convolutions are fused, and how many not; nothing where it is not asked."""
    fusion = fusion_in(config, dataset)
    counts = () if fusion is None else (len(fusion.units), len(fusion.plain))
    return dict(zip(("fused_units", "plain_units"), counts, strict=False))


def about_pieces(config: Config, model: nn.Module, dataset: Dataset) -> list[str]:
    """Return lines about layers that see pieces of mini-batches; none where nothing differs.

    Split or not, equal pieces give equal bits; but BatchNorm normalises by the piece that it is
    given, so pieces give another model than whole mini-batches (docs/papers.md).
    """
    pieces = _pieces(config)
    trial = dataset.train.pixels[:2].to(training.device_of(model))
    if isinstance(trial, torch.Tensor) and dataset.pictures:
        trial = torch.zeros_like(trial, dtype=torch.float32)
    kept = observed(model, trial).training if pieces else {}
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and kept.get(name, {}).get("training", True)
    }
    if not pieces or not norms:
        return []
    first, more = next(iter(norms)), f" and {len(norms) - 1} more" if len(norms) > 1 else ""
    exact = "model.norm=group is exact up to rounding, and keeps no statistics: another model"
    if all(isinstance(norm, DeferredBatchNorm) for norm in norms.values()):
        return [
            f"{pieces}: BatchNorm ({first}{more}) keeps the statistics of mini-batches and "
            f"normalises by pieces, so this is not quite the model of plain training; {exact}"
        ]
    return [
        f"{pieces}: BatchNorm ({first}{more}) sees these and no mini-batches, so this is another "
        "model than that of plain training",
        "model.norm=deferred keeps the statistics of mini-batches for one more pass over what it "
        f"sees, and still normalises by pieces; {exact}",
    ]


def _pieces(config: Config) -> str:
    """Say into how many pieces mini-batches are cut; empty where they are whole."""
    kind = str(config.policy.get("kind", "none"))
    if kind in PLANNED:
        chosen = PlanOptions.of(config.policy).micro_batches
        free = not chosen and config.schedule.kind != "sequential" and kind != "splitfed"
        return "pieces as planned" if free or any(count > 1 for count in chosen) else ""
    given = config.policy.get("micro_batches") if kind == "fixed" else None
    counts = given if isinstance(given, list) else [given or config.schedule.micro_batches]
    most = max(int(count or config.schedule.micro_batches) for count in counts)
    return f"{most} pieces of a mini-batch" if most > 1 else ""


def _automatic(config: Config) -> str:
    local = config.runtime.kind == "local" and not config.fleet.edges
    return "memory" if local else config.link.between_processes


def network_text(network: NetworkConfig) -> str:
    """Return a network by its name, its rates and its latency."""
    if network.up_mbit_s is None and network.down_mbit_s is None and not network.latency_ms:
        return network.name
    rates = [f"{r:g}" if r is not None else "unlimited" for r in
             (network.up_mbit_s, network.down_mbit_s)]  # fmt: skip
    name = "" if network.name == "none" else f"{network.name} "
    return f"{name}{'/'.join(rates)} Mbit/s, {network.latency_ms:g} ms"


class Plans:
    """Tells what devices are to do, when it is new.

    Args:
        config: The run.
        strategy: Whose layer that offloads knows it.
        say: Takes each line.
        folder: Of the run, where what devices do is said to who looks at it meanwhile.
    """

    def __init__(
        self, config: Config, strategy: Strategy, say: Callable[[str], None], folder: Path
    ) -> None:
        self._offload, self._config, self._say = find(strategy, Offload), config, say
        self._folder = folder
        self._told: Mapping[str, Any] = {}

    def tell(self, number: int) -> None:
        """Say what is different in a round, which has begun, from what was said."""
        if self._offload is None:
            return
        cuts_ = self._offload.totals.cuts
        asked = self._offload.assigned.keys() - self._offload.lost.keys()
        now = {str(client): cuts_[str(client)] for client in sorted(asked)}
        fresh = {client: cut for client, cut in now.items() if self._told.get(client) != cut}
        word = "planned anew" if self._config.policy.get("kind") in PLANNED else "new"
        begin = f"round {number}, {word}: " if self._told else ""
        for alike in cuts.alike(fresh):
            self._say(f"{begin}{alike}")
        self._told = {**self._told, **now}
        write_plan(self._folder, number, now)
