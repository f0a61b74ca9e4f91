"""Pruning between rounds: the server prunes, clients train what is left (``pruning=``).

Before a round for which a pruning is due, the global model is scored and masks are made; in levels
with rewinding, what is left then starts again from a former round, and so do server optimizer and
state kept for clients. Every message carries the masks, eight weights to a byte: clients and edge
servers train under them and hold nothing between messages.

The aggregate is masked once more, because a server optimizer (FedAdam's momentum) or noise would
move what is pruned. So the weights of a round are exactly zero where its masks say so, wherever
they are sent or saved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from safetensors.torch import save
from torch import nn

from fedsys import data
from fedsys.config import Config
from fedsys.config import pruning as settings
from fedsys.data import Dataset
from fedsys.files import write_atomic
from fedsys.randomness import Address
from fedsys.runs.checkpoint import StrategyState
from fedsys.runs.trees import Tree
from fedsys.training.masks import Masks
from fedsys.transport import records
from fedsys.transport.messages import MASKS
from strategies.around import Around, find

SCORE_BATCH = 128


class Pruned(Around):
    """Prunes the model of the inner strategy between rounds.

    It stands outside of everything that makes the aggregate or keeps a state that rewinding takes
    back, and inside of `Offload`, which divides masks among device and edge server.

    Args:
        inner: Aggregates whole models.
        config: The run.
        model: A model of the run; its state is overwritten.
        dataset: Gives the shape of inputs, and the validation part to score on.

    Attributes:
        masks: The masks of the last round that made a model, packed.
        prunings: How often was pruned until then.
        origin: The model that levels start from; empty before it is known.
        origin_state: The state of the inner strategy at that time.
        news: What was pruned before the last round, in words; empty if nothing was.

    Raises:
        ConfigError: The schedule does not fit the rounds, or a layer to leave alone is not there.
    """

    STATE = ("masks", "prunings", "origin", "origin_state")

    def __init__(self, inner: Strategy, config: Config, model: nn.Module, dataset: Dataset) -> None:
        from fedsys.pruning.sparsify import (
            left_alone,
        )  # needed by runs that prune alone

        settings.check_rounds(config.pruning, config.rounds)
        super().__init__(inner)
        self._config, self._pruning = config, config.pruning
        self._model, self._dataset = model, dataset
        self._like = {name: p.detach() for name, p in model.named_parameters()}
        alone = left_alone(model, config.pruning.leave, dataset.input_shape)
        dense = Masks.dense(model, alone)
        self.masks, self.prunings = records.to_record(dense.packed()), 0
        self.origin = ArrayRecord()
        self.origin_state: dict[str, dict[str, Tree]] = {}
        self._inner_state = StrategyState(inner)
        self._next, self._next_prunings, self.news = dense, 0, ""

    def kept(self) -> Masks:
        """Return the masks of the model that the last round made."""
        return Masks.unpacked(records.from_record(self.masks), self._like)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Prune if that is due, and add the masks to each message.

        Raises:
            ModelError: A layer would lose all its weights, or the model has diverged.
        """
        if self._pruning.rewinds and server_round > self._pruning.rewind and not self.origin:
            self.origin = arrays
            self.origin_state = copy.deepcopy(self._inner_state.take())
        self._next, self._next_prunings = self.kept(), self.prunings
        due = settings.prunings_before(self._pruning, server_round)
        if due > self.prunings:
            self._next, self._next_prunings = self._prune(arrays, due), due
            if self._pruning.rewinds:
                arrays = self.origin
                self._inner_state.put(copy.deepcopy(self.origin_state))
        arrays = masked(arrays, self._next)
        packed = records.to_record(self._next.packed())
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        for message in messages:
            message.content = records.own_copy(message.content)
            message.content[MASKS] = packed
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the masked aggregate; masks count from the first round that made a model."""
        aggregate, metrics = self.inner.aggregate_train(server_round, replies)
        if aggregate is None:
            return None, metrics
        metrics = MetricRecord() if metrics is None else metrics
        figures = self._next.figures()
        self.news = ""
        if self._next_prunings > self.prunings:
            before = f"before round {server_round}"
            again = f", and training began anew from round {self._pruning.rewind}"
            self.news = (
                f"{figures.sparsity:.2%} of the weights are pruned and {figures.dead_channels:.2%} "
                f"of the channels are dead since {before}{again if self._pruning.rewinds else ''}"
            )
        self.masks = records.to_record(self._next.packed())
        self.prunings = self._next_prunings
        metrics["sparsity"] = figures.sparsity
        metrics["dead_channels"] = figures.dead_channels
        return masked(aggregate, self._next), metrics

    def _prune(self, arrays: ArrayRecord, prunings: int) -> Masks:
        """Return the masks after a pruning of the model of `arrays`."""
        from fedsys.pruning.sparsify import one_shot
        from fedsys.pruning.structure import structure

        chosen, model, masks = self._pruning, self._model, self._next
        records.load_into(model, arrays)
        shape = self._dataset.input_shape
        return one_shot(
            chosen.method,
            model,
            self._target(masks, prunings),
            masks=masks,
            scope=chosen.scope,
            keep_channels=chosen.keep_channels,
            address=Address(self._config.seed, round=prunings),
            batches=self._examples() if chosen.method in ("snip", "grasp") else (),
            input_shape=shape,
            mix=chosen.mix,
            iterations=chosen.iterations,
            **structure(chosen, model, shape),
        )

    def _target(self, masks: Masks, prunings: int) -> float:
        """Return the sparsity after a pruning."""
        from fedsys.pruning.sparsify import gradual, sparsity_after

        if not self._pruning.rewinds:
            return gradual(self._pruning.sparsities[0], self._pruning.steps)[prunings - 1]
        figures = masks.figures()
        return sparsity_after(figures.weights, figures.kept, self._pruning.share)

    def _examples(self) -> list[Any]:
        part = self._dataset.validation
        order = Address(self._config.seed).numpy("pruning").permutation(len(part.labels))
        chosen = part.take(np.sort(order[: self._pruning.examples]))
        return list(data.eval_batches(chosen, self._dataset, SCORE_BATCH))


def masked(arrays: ArrayRecord, masks: Masks) -> ArrayRecord:
    """Return the arrays with exact zeros where `masks` prune; the others are not copied."""
    result = ArrayRecord()
    for name, array in arrays.items():
        if name in masks:
            values = records.view(array)
            kept = np.where(masks[name].numpy(), values, values.dtype.type(0))
            array = records.encode(kept)
        result[name] = array
    return result


def news(strategy: Strategy) -> str:
    """Return what was pruned before the last round, in words; empty if nothing was."""
    pruned = find(strategy, Pruned)
    return "" if pruned is None else pruned.news


def figures(strategy: Strategy) -> dict[str, Any]:
    """Return what pruning did in a run, for its result; empty if nothing was pruned."""
    pruned = find(strategy, Pruned)
    if pruned is None:
        return {}
    seen = pruned.kept().figures()
    told = {"sparsity": seen.sparsity, "dead_channels": seen.dead_channels}
    return {"pruning": {**told, "prunings": pruned.prunings}}


def keep_level(strategy: Strategy, config: Config, round_: int, arrays: ArrayRecord,
               folder: Path) -> None:  # fmt: skip
    """Write weights and masks of a level to ``levels/`` of the run folder, if the round ends one.

    Raises:
        RunError: The files cannot be written.
    """
    pruned = find(strategy, Pruned)
    if pruned is None or not settings.ends_level(config.pruning, round_):
        return
    stem = folder / "levels" / f"level-{pruned.prunings:02d}"
    stem.parent.mkdir(exist_ok=True)
    pruned.kept().save(stem.with_suffix(".masks.safetensors"))
    write_atomic(stem.with_suffix(".safetensors"), save(records.from_record(arrays)))


def keep_masks(strategy: Strategy, folder: Path) -> None:
    """Write the masks of the last model to ``masks.safetensors`` of the run folder.

    Raises:
        RunError: The file cannot be written.
    """
    pruned = find(strategy, Pruned)
    if pruned is not None:
        pruned.kept().save(folder / "masks.safetensors")
