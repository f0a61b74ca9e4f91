"""Iterative pruning with rewinding: train, prune the lowest weights, start again with the rest.

Frankle & Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, rewind to initialisation; Frankle et
al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020, to the weights after
the first k steps, which larger networks need. A `Ticket` is all that the rest of the sequence
depends on, so a sequence that is resumed from a saved ticket goes on with the same bits::

    train_first_steps(model)
    for trained in levels(Ticket.start(model), model, train, last=25):
        if trained.following is not None:
            trained.following.save(folder / "ticket.safetensors")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import final

from torch import Tensor, nn

from fedsys.errors import ConfigError, ModelError
from fedsys.pruning.scores import Scores, magnitude
from fedsys.pruning.sparsify import _check, _lowest
from fedsys.training.masks import Masks, read_tensors, write_tensors

FORMAT = "fedsys-ticket-1"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """A level of iterative pruning, before it is trained.

    Attributes:
        level: Number of times that weights were pruned.
        masks: What is pruned.
        rewind: Parameters and buffers that every level starts from, by name, not masked.
    """

    level: int
    masks: Masks
    rewind: Mapping[str, Tensor]

    @classmethod
    def start(cls, model: nn.Module, leave: Sequence[str] = ()) -> Ticket:
        """Return level 0, which prunes nothing and rewinds to the present state of `model`.

        Args:
            model: At initialisation, or after the first k steps of training.
            leave: Layers to leave alone, as for `Masks.dense`.

        Raises:
            ConfigError: As `Masks.dense`.
        """
        return cls(0, Masks.dense(model, leave), _state(model))

    def rewound(self, model: nn.Module) -> None:
        """Give `model` the weights to start from, zero where pruned.

        Raises:
            ModelError: The state is not of such a model.
        """
        wanted = model.state_dict()
        if misfits := [n for n in {**wanted, **self.rewind} if not _alike(n, wanted, self.rewind)]:
            raise ModelError(f"the ticket is of another model: it differs in {', '.join(misfits)}")
        model.load_state_dict(self.rewind)
        self.masks.apply(model)

    def save(self, path: Path) -> None:
        """Write the ticket to a file, which is whole or absent.

        Raises:
            RunError: The file cannot be written.
        """
        tensors = {f"mask|{name}": mask for name, mask in self.masks.items()}
        tensors |= {f"rewind|{name}": tensor for name, tensor in self.rewind.items()}
        write_tensors(path, tensors, {"format": FORMAT, "level": self.level})

    @classmethod
    def load(cls, path: Path) -> Ticket:
        """Read what `save` wrote.

        Raises:
            ModelError: The file cannot be read, is damaged, or is of another kind.
        """
        tensors, about = read_tensors(path, FORMAT)

        def those(kind: str) -> dict[str, Tensor]:
            return {n.partition("|")[2]: t for n, t in tensors.items() if n.startswith(kind)}

        return cls(int(about["level"]), Masks(those("mask|")), those("rewind|"))


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A level of iterative pruning, after it was trained.

    Attributes:
        ticket: What was trained.
        weights: Parameters and buffers after training, exactly zero where pruned.
        following: The ticket of the next level, to save and resume from; None after the last.
    """

    ticket: Ticket
    weights: Mapping[str, Tensor]
    following: Ticket | None


def prune_share(
    masks: Masks,
    scores: Mapping[str, Tensor],
    share: float,
    *,
    scope: str = "global",
    keep_channels: int = 0,
) -> Masks:
    """Prune the lowest of the survivors: of s, exactly ``ceil(share × s)``.

    Args:
        masks: As for `prune`.
        scores: As for `prune`.
        share: Share of the survivors to prune, in [0, 1).
        scope: ``global`` takes it of all survivors; ``layer`` of those of each layer.
        keep_channels: As for `prune`.

    Raises:
        ConfigError: As `prune`.
        ModelError: As `prune`.
    """
    if not 0.0 <= share < 1.0:
        raise ConfigError.of("sparsity_per_level", share, "must be in [0, 1)")
    _check(masks, scores, scope, keep_channels)
    parts = [masks] if scope == "global" else [masks.part([name]) for name in masks]
    result: dict[str, Tensor] = {}
    for part in parts:
        figures = part.figures()
        more = math.ceil(Fraction(str(share)) * figures.kept)
        count = figures.weights - figures.kept + more
        result |= _lowest(part, scores, count, keep_channels)
    return Masks(result)


def prune_level(
    ticket: Ticket,
    model: nn.Module,
    *,
    sparsity_per_level: float = 0.2,
    score: Callable[[nn.Module], Scores] = magnitude,
    scope: str = "global",
    keep_channels: int = 0,
) -> Ticket:
    """Return the next ticket: without the lowest of the survivors, by the weights after training.

    Of s survivors, ``ceil(sparsity_per_level × s)`` go.

    Args:
        ticket: What was trained.
        model: It, after training; left as it was.
        sparsity_per_level: Share of the survivors, in [0, 1); 0.2 in the paper.
        score: What is compared.
        scope: ``global`` or ``layer``, as for `prune`.
        keep_channels: As for `prune`.

    Raises:
        ConfigError: For an argument out of range.
        ModelError: As `prune`.
    """
    masks = prune_share(
        ticket.masks, score(model), sparsity_per_level, scope=scope, keep_channels=keep_channels
    )
    return Ticket(ticket.level + 1, masks, ticket.rewind)


def levels(
    ticket: Ticket,
    model: nn.Module,
    train: Callable[[nn.Module, Ticket], None],
    *,
    last: int,
    sparsity_per_level: float = 0.2,
    score: Callable[[nn.Module], Scores] = magnitude,
    scope: str = "global",
    keep_channels: int = 0,
) -> Iterator[Trained]:
    """Train and prune, level by level: ``last + 1`` trainings if `ticket` is of level 0.

    Args:
        ticket: Where to begin, or to go on.
        model: Trained in place; its weights are those of the ticket at each start.
        train: Trains a rewound model, from the step that the ticket rewinds to until the end.
            Everything that it draws should follow from the ticket's level, so that resuming repeats
            it. It keeps pruned weights at zero with `fedsys.training.masks.held`.
        last: The level of the last training.
        sparsity_per_level: As for `prune_level`.
        score: As for `prune_level`.
        scope: As for `prune_level`.
        keep_channels: As for `prune_level`.

    Raises:
        ConfigError: The ticket is beyond the last level, or as `prune_level`.
        ModelError: As `prune_level`, or the ticket is of another model.
    """
    if ticket.level > last:
        raise ConfigError.of("pruning.levels", last, f"must be at least {ticket.level}, the ticket")
    now: Ticket | None = ticket
    while now is not None:
        now.rewound(model)
        train(model, now)
        now.masks.apply(model)
        following = None
        if now.level < last:
            following = prune_level(
                now,
                model,
                sparsity_per_level=sparsity_per_level,
                score=score,
                scope=scope,
                keep_channels=keep_channels,
            )
        yield Trained(now, _state(model), following)
        now = following


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _alike(name: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return name in one and name in other and one[name].shape == other[name].shape
