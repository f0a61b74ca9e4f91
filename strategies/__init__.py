"""Server side of training: Flower strategies, and the wrappers that make them exact.

`build` is the one place that stacks the wrappers, because their order is a correctness rule::

    Sampled(              who takes part, by partition id; replies in that order
      Offload(            halves out, whole models back
        PrivateRecords | PrivateRounds(   how much noise to add, and an end with the budget
          Pruned | FrozenBackbone(   masks whole models: what goes out, and whatever the inner ones
                          return; or keeps a backbone on which exits are trained
            KeptState(    optimizer state of the clients, from round to round
              TypedBuffers( buffers keep their type and are never "stepped"
                PrivateClients( clips whole updates and adds noise to their mean, unless devices do
                  FedAvg | FedProx | FedAdam | …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from fedsys.config import Config, call_target, edge_names
from fedsys.data import Dataset
from fedsys.errors import ConfigError
from fedsys.offload.fleet import Fleet
from fedsys.planning.mobility.sources import source_of
from fedsys.planning.traces import check_files
from fedsys.privacy.check import check_record_model, check_record_run
from fedsys.privacy.check_rounds import check_cut_model, check_cut_run
from fedsys.privacy.promises import round_promise
from fedsys.runtime.apps import check_mods, refuse_private_mods
from fedsys.training import federation, together
from fedsys.training.optimizers import make_optimizer
from strategies.buffers import TypedBuffers
from strategies.frozen_backbone import FrozenBackbone
from strategies.offload import Offload
from strategies.optimizer_state import KeptState
from strategies.policies import build_policy
from strategies.private import PrivateRecords
from strategies.private_clients import PrivateClients, check_client_run, refuse_flowers
from strategies.private_rounds import PrivateRounds
from strategies.pruned import Pruned
from strategies.roster import Roster
from strategies.sampling import Sampled, Sampling

__all__ = [
    "FrozenBackbone",
    "KeptState",
    "Offload",
    "PrivateClients",
    "PrivateRecords",
    "PrivateRounds",
    "Pruned",
    "Roster",
    "Sampled",
    "Sampling",
    "TypedBuffers",
    "build",
]


def build(
    config: Config,
    model: nn.Module,
    roster: Roster,
    *,
    fleet: Fleet | None = None,
    dataset: Dataset | None = None,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Sampled:
    """Return the strategy of a run, with all its wrappers.

    Args:
        config: The run; ``strategy`` names Flower's or the user's own strategy.
        model: The model, which tells parameters from buffers.
        roster: Who is there.
        fleet: The edge servers; None trains on the devices alone.
        dataset: Tells the shape of the inputs and the number of classes; needed with a fleet, or
            to prune.
        folder: Where policies keep what they have learned: that of the run; None: nowhere.
        say: Told how far a policy is that has to learn first.

    Raises:
        ConfigError: The strategy or the clients' optimizer does not exist, an argument is not one
            of its own, or a mod of the client app does not go with split training or promises
            privacy that nobody accounts for.
    """
    spec: dict[str, Any] = dict(config.strategy)
    _refuse_clients(config, model)
    sampling = Sampling.of(spec)
    inner: Strategy = _typed(spec, config, model)
    if config.client.keep_optimizer:
        inner = KeptState(inner, roster)
    if config.resilience.training == "frozen":
        inner = FrozenBackbone(inner, config.resilience)
    if config.pruning.active:
        if dataset is None:
            raise ConfigError.of("dataset", None, "must be given to prune")
        inner = Pruned(inner, config, model, dataset)
    known = fleet is not None or config.privacy.active
    examples = [len(part) for part in federation.federation(config).parts] if known else []
    if config.privacy.active:
        inner = _private(inner, config, model, dataset, examples, roster, folder)
    edges = max(1, len(edge_names(config)))
    policy = build_policy(config.policy, edges, config, examples, folder=folder, say=say)
    if policy is None or fleet is None or dataset is None:
        return Sampled(inner, roster, sampling, seed=config.seed)
    check_mods(config.apps.client)
    if config.runtime.kind != "deployment":  # there, devices have files of their own
        for network in (config.network, *config.fleet.links):
            check_files(network)
    _refuse_raw_tokens(config, dataset)
    mobility = source_of(config, edges)
    for line in () if mobility is None else mobility.notes:
        say(line)
    offload = Offload(
        inner,
        fleet,
        policy,
        config=config,
        roster=roster,
        dataset=dataset,
        mobility=mobility,
    )
    return Sampled(offload, roster, sampling, seed=config.seed)


def _refuse_clients(config: Config, model: nn.Module) -> None:
    """Refuse here, once, what each client would refuse."""
    refuse_private_mods(config.apps.client)
    make_optimizer(model.parameters(), config.client, config.client.lr)
    if config.runtime.batched_clients > 1:
        together.check_model(model, config.runtime.batched_clients)


def _refuse_raw_tokens(config: Config, dataset: Dataset) -> None:
    """Refuse to send whole numbers as if they were activations."""
    asked, inputs = config.policy.get("cut"), dataset.train.pixels
    cuts = asked if isinstance(asked, list | tuple) else [asked]
    raw = any(type(cut) is int and cut == 0 for cut in cuts)
    floats = isinstance(inputs, Tensor) and (dataset.pictures or inputs.is_floating_point())
    if raw and not floats:
        raise ConfigError.of(
            "policy.cut", 0,
            f"sends inputs as they are, and those of {dataset.name} are whole numbers or several, "
            "with which no unit behind the first computes", "1, behind what embeds them",
        )  # fmt: skip


def _private(
    inner: Strategy,
    config: Config,
    model: nn.Module,
    dataset: Dataset | None,
    examples: Sequence[int],
    roster: Roster,
    folder: Path | None,
) -> Strategy:
    """Return the strategy with the budget of the run's mechanism around it."""
    mechanism = config.privacy.mechanism
    if dataset is None:
        raise ConfigError.of("dataset", None, f"must be given for privacy={mechanism}")
    if mechanism == "record":
        check_record_run(config)
        check_record_model(model, dataset.input_shape)
        return PrivateRecords(inner, config, examples, roster, folder)
    if mechanism == "cut":
        check_cut_run(config)
        check_cut_model(model, dataset.input_shape)
    return PrivateRounds(inner, round_promise(config, examples), roster, folder)


def _typed(spec: dict[str, Any], config: Config, model: nn.Module) -> TypedBuffers:
    """Return the strategy that the ``strategy`` group names, with buffers that keep their type."""
    buffers = str(spec.pop("buffers", "aggregate"))
    if buffers not in ("aggregate", "average"):
        raise ConfigError.of("strategy.buffers", buffers, "must be one of aggregate, average")
    # The wrapper has sampled already: the inner strategy takes every node that it is shown.
    everyone: dict[str, Any] = {
        "fraction_train": 1.0,
        "fraction_evaluate": 1.0,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
    }
    refuse_flowers(str(spec.get("_target_", "")))
    inner = call_target(spec, "strategy", **everyone)
    if not isinstance(inner, Strategy):
        raise ConfigError.of(
            "strategy._target_", spec.get("_target_"), "must build a flwr.serverapp Strategy"
        )
    if config.privacy.mechanism == "client":
        check_client_run(config, inner, model)
        if not config.privacy.local:  # else the noise is there when updates arrive
            inner = PrivateClients(inner, config)
    parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    return TypedBuffers(inner, parameters, step_buffers=buffers == "aggregate")
