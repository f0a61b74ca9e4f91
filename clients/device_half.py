"""The device's half of a model: built from a message, and from points to which it can return."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor, nn

from clients.steps import Split, Tally
from fedsys.config import Config
from fedsys.errors import RuntimeFailure
from fedsys.models.layers import LayeredModel
from fedsys.models.rectified import is_rectified
from fedsys.offload.snapshot import Snapshot
from fedsys.planning.assignment import Assignment
from fedsys.privacy.noise import NoiseSource, source_of
from fedsys.privacy.part import Stepping, stepping
from fedsys.privacy.release import Noise, Release, release_from
from fedsys.randomness import Address
from fedsys.training import federation
from fedsys.training import plain as training
from fedsys.training.federation import base_state, layers_of, penalty_of
from fedsys.training.part import Part, filled_stages, names_between
from fedsys.transport import messages, records


@dataclass(frozen=True)
class Point:
    """The device's half between two steps, to which it can return.

    Attributes:
        half: Parameters, buffers, and what is kept beside them.
        sums: What was seen until then.
        cut: First unit of the edge.
    """

    half: Snapshot
    sums: Tally
    cut: int


class DeviceHalf:
    """What a message asks a device to do with the first units, and the last if they are private.

    Args:
        config: The run.
        content: The message: the device's half, settings, and the assignment.
        partition: The device.

    Attributes:
        source: Draws noise, and who is in a mini-batch, where examples have a promise.
        layers: The model, on ``meta``.
        place: Where the session is, and where the last units begin.
        split: How the model is shared with the edge.
        round: The round.
        device: Where to compute.
    """

    def __init__(self, config: Config, content: RecordDict, partition: int) -> None:
        self._config, self._content = config, content
        dataset = federation.federation(config).dataset
        self.layers: LayeredModel = layers_of(config, dataset)
        self._base = base_state(config, dataset.input_shape, dataset.num_classes)
        settings = messages.settings_of(content)
        self._told = told = content.config_records[messages.ASSIGNMENT]
        self._masks: Mapping[str, Tensor] = {}
        pieces = settings.micro_batches or config.schedule.micro_batches
        self.place = messages.read(messages.Place, told)
        self._skips_zeros = _skips_zeros(config, self.place.edges)
        self.split = self._split(
            Split(Assignment.of(told, pieces), self.place.tail, len(self.layers), config.schedule)
        )
        self.round, self._settings = settings.server_round, settings
        address = Address(config.seed, partition, self.round)
        self.source: NoiseSource = source_of(address, config.privacy.secure)
        self.device: torch.device = training.pick_device(config.client.device)

    def start(self) -> Point:
        """Return the point at which the round begins."""
        keys = messages.ARRAYS, messages.OPTIMIZER, messages.MASKS
        state, optimizer, masks = map(self._received, keys)
        half = Snapshot(0, state, optimizer, masks=masks)
        return Point(half, Tally(), Assignment.of(self._told, 1).cut)

    def point(self, part: Stepping, sums: Tally, step: int) -> Point:
        """Return where the device's half stands; copied."""
        own = part.part
        state = {name: tensor.cpu().clone() for name, tensor in own.state().items()}
        half = Snapshot(step, state, own.optimizer_state(), own.anchor(), self._masks)
        return Point(half, sums.copy(), self.split.assignment.cut)

    def between(self, cut: int) -> set[str]:
        """Return the names of parameters and buffers between another cut and that of this half."""
        return names_between(self.layers, sorted((cut, self.split.assignment.cut)))[1]

    def stages(self, state: Mapping[str, Tensor]) -> list[nn.Module]:
        """Return first and last units with the tensors of `state`; the edge's are never built."""
        cuts = [self.split.assignment.cut, self.split.tail]
        client = self._config.client
        return filled_stages(
            self.layers, cuts, [0, 2], state, self.device, client.memory_format, self._base,
            kernels=client.kernels,
        )  # fmt: skip

    def part(self, point: Point) -> Stepping:
        """Return the units in training as at a point of the round; `split` is as it was there."""
        settings, half = self._settings, point.half
        assignment = dataclasses.replace(self.split.assignment, cut=point.cut)
        self.split = self._split(dataclasses.replace(self.split, assignment=assignment))
        self._masks = masks = half.masks
        part = Part(
            self.stages({name: tensor.clone() for name, tensor in half.state.items()}),
            self._config,
            self.round,
            proximal_mu=settings.proximal_mu,
            optimizer_state=half.optimizer,
            anchor=half.anchor or None,
            masks=masks,
            penalty=penalty_of(self._config, self.layers, self.round),
        )
        if self._config.privacy.mechanism == "cut":
            release_from(part.modules[0], self._release())
        return stepping(
            part, self._config, noise=settings.noise, expected=settings.expected,
            source=self.source, masks=masks,
        )  # fmt: skip

    def _split(self, split: Split) -> Split:
        """Return how the model is shared, with which of several inputs each part needs."""
        cut, tail = split.assignment.cut, split.tail
        given, kept = self.layers.inputs(cut, tail), self.layers.inputs(tail, split.units)
        skips = self._skips_zeros and is_rectified(self.layers, cut)
        return dataclasses.replace(split, given=given, kept=kept, skips_zeros=skips)

    def _release(self) -> Release:
        """Return what is done to activations before they leave the device.

        Raises:
            RuntimeFailure: The server app did not say how much noise to add.
        """
        privacy, multiplier = self._config.privacy, self._settings.noise
        if not multiplier > 0:
            raise RuntimeFailure("privacy=cut: the message does not say how much noise to add")
        return Release(Noise(privacy.clip_norm, multiplier, privacy.noise), self.source)

    def _received(self, key: str) -> dict[str, Tensor]:
        return records.from_record(self._content.array_records.get(key, ArrayRecord()))


def _skips_zeros(config: Config, edges: Sequence[str]) -> bool:
    """Return whether gradients come without zeros of activations, at cuts where that is exact.

    Where messages cost nothing it would only cost. Noise leaves no zeros, and is not undone.
    """
    if config.privacy.mechanism == "cut":
        return False
    if config.link.skip_zero_gradients != "auto":
        return config.link.skip_zero_gradients == "always"
    return config.network.emulate or any(not edge.startswith("memory:") for edge in edges)
