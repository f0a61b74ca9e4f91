"""What every app of a run derives from its configuration: data, parts, classes, model.

Derived once per process and kept: a run in one process has one copy of the images for the server
and all its clients.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsys import data, models
from fedsys.config import Config, pruning
from fedsys.config.task import TaskConfig
from fedsys.config.values import LoraConfig
from fedsys.data import Dataset
from fedsys.errors import ConfigError, ModelError
from fedsys.models.autocast import under_autocast
from fedsys.models.fits import check_fits
from fedsys.models.fused import Fusion, fuse, fusion_of
from fedsys.models.layers import LayeredModel, layered
from fedsys.models.lora import adapted
from fedsys.models.modes import Modes
from fedsys.models.resilient import resilient
from fedsys.randomness import Address
from fedsys.training import plain as training
from fedsys.training.penalty import Penalty
from fedsys.training.precision import autocast, types_by
from fedsys.transport.several import Inputs, Shape, is_several

OWN = "own"
"""Kind of the partition in which one client has everything that there is."""

CLIENT_IDS = "client_ids"
"""Kind of the partition in which the data say whose each example is."""


@dataclass(frozen=True)
class Federation:
    """A data set and who holds which examples of its training part.

    Attributes:
        dataset: The parts for training, validation and test.
        parts: For each client the indices of its examples.
    """

    dataset: Dataset
    parts: tuple[NDArray[np.int64], ...]


def federation(config: Config) -> Federation:
    """Return the data of a run, divided among its clients."""
    spec = json.dumps({**config.data, **_task(config)}, sort_keys=True)
    return _federation(spec, config.num_clients, config.seed)


def _task(config: Config) -> dict[str, str]:
    """Return what is learned, for sources that ask; nothing where all sources do."""
    kind = config.task.kind
    return {} if kind == "classification" else {"task": kind}


@functools.lru_cache(maxsize=4)
def _dataset(spec: str, seed: int) -> Dataset:
    dataset: Dataset = data.load(json.loads(spec), seed=seed)
    return dataset


@functools.lru_cache(maxsize=4)
def _federation(spec: str, num_clients: int, seed: int) -> Federation:
    dataset = _dataset(spec, seed)
    group = json.loads(spec)["partition"]
    if group["kind"] == OWN:
        nothing = np.empty(0, dtype=np.int64)
        everything = np.arange(len(dataset.train.labels), dtype=np.int64)
        return Federation(dataset, (nothing,) * group["client"] + (everything,))
    if group["kind"] == CLIENT_IDS:
        return Federation(dataset, _owned(dataset, num_clients))
    parts = data.partition(dataset.train.groups, num_clients, group, seed=seed)
    return Federation(dataset, tuple(parts))


def forget() -> None:
    """Forget the data of all runs: files may have changed since they were read."""
    _dataset.cache_clear()
    _federation.cache_clear()


def _owned(dataset: Dataset, num_clients: int) -> tuple[NDArray[np.int64], ...]:
    """Return the parts of clients where the data say whose each example is."""
    owners = dataset.train.owners
    if owners is None:
        raise ConfigError.of(
            "data.partition.kind", CLIENT_IDS,
            "needs data that say whose an example is, and these do not",
            "a data set has client_ids, a table data.client=COLUMN; or data.partition.kind=iid",
        )  # fmt: skip
    parts = tuple(np.flatnonzero(owners.numpy() == k) for k in range(num_clients))
    there = int(owners.max()) + 1
    if there != num_clients or not all(len(part) for part in parts):
        raise ConfigError.of(
            "num_clients", num_clients,
            f"must be {there}, as the data name so many, each with examples left to train on",
        )  # fmt: skip
    return parts


def own_data(config: Config, root: str, client: int) -> Config:
    """Return the configuration of a client whose examples are in a folder of its own.

    Args:
        config: The run; its data must be a folder of images, too.
        root: The client's folder; all examples of its training part are the client's.
        client: Its partition id.

    Raises:
        ConfigError: The run's data are of another source.
    """
    if config.privacy.active:
        raise ConfigError.of(
            "data-root", root, "must be left out where the run promises privacy",
            "the noise depends on how many examples each client has; let the run divide them",
        )  # fmt: skip
    source = config.data.get("source")
    if source != "image_folder":
        raise ConfigError.of(
            "data.source",
            source,
            f"must be image_folder for a node with its own data (data-root={root})",
            "start the run with data=image_folder",
        )
    data = {**config.data, "root": root, "partition": {"kind": OWN, "client": client}}
    text = f"{config.text}\n# data-root: {root}, client: {client}\n"  # names the model's cache
    return dataclasses.replace(config, data=data, text=text)


def build_model(config: Config, dataset: Dataset, *, initial: bool = True) -> nn.Module:
    """Return the model of a run on the CPU, laid out as its clients compute.

    Args:
        config: The run.
        dataset: Gives the shape of the inputs and the number of classes.
        initial: Whether ``model.init`` is read; a client receives its weights anyway, but for
            those beside which adapters are trained.
    """
    spec: dict[str, Any] = dict(config.model)
    lora = config.client.train == "lora"
    if not initial and not lora:
        spec["init"] = None
    model = models.build(
        spec,
        input_shape=dataset.input_shape,
        num_classes=dataset.num_classes,
        seed=config.seed,
    )
    if lora:
        own = config.client.lora
        model = adapted(model, own.rank, own.alpha, own.targets, config.seed)
    return training.lay_out(model, config.client.memory_format)


def trained_model(config: Config, dataset: Dataset, *, initial: bool = True) -> nn.Module:
    """Return what a run trains: `build_model`, with exits and adapters if they are trained, too.

    Arguments as for `build_model`.

    Raises:
        ModelError: The model cannot be seen as a chain of units, or has no exit where one is asked.
    """
    _refuse_several(config, dataset)
    model = build_model(config, dataset, initial=initial)
    if not config.resilience.active:
        return model
    shape, norm = dataset.input_shape, str(config.model.get("norm", "batch"))
    ours = resilient(
        layered(model, shape), shape, dataset.num_classes,
        seed=config.seed, boundaries=config.resilience.exits, norm=norm,
        pool=config.resilience.pool,
    )  # fmt: skip
    return training.lay_out(ours, config.client.memory_format)


def _refuse_several(config: Config, dataset: Dataset) -> None:
    """Refuse what is made for examples of one tensor where they have several."""
    if not is_several(dataset.input_shape):
        return
    scored = config.pruning.active and config.pruning.method not in ("magnitude", "random")
    private = config.privacy.mechanism in ("record", "cut")
    for key, value, broken in (
        ("privacy.mechanism", config.privacy.mechanism, private),
        ("resilience.training", config.resilience.training, config.resilience.active),
        ("pruning.method", config.pruning.method, scored),
    ):
        if broken:
            raise ConfigError.of(
                key, value, "cannot be where an example has several inputs", f"{key}=none"
            )


def layered_model(
    config: Config, input_shape: Shape, num_classes: int, target_bytes: int = 8
) -> LayeredModel:
    """Return the run's model on ``meta`` as a chain of units; kept per process and model.

    Args:
        config: The run.
        input_shape: Of one example.
        num_classes: Classes, or other outputs.
        target_bytes: Of what is to be learned of one example: of one class by default.
    """
    spec = json.dumps({**config.model, "init": None}, sort_keys=True)
    lora = config.client.lora if config.client.train == "lora" else None
    made = _layered(spec, tuple(input_shape), num_classes, lora, target_bytes)
    if config.client.precision == "fp32":
        return made
    return _lowered(made, tuple(input_shape), types_by(config.client))


def layers_of(config: Config, dataset: Dataset) -> LayeredModel:
    """Return the run's model as `layered_model` does, for what `dataset` has."""
    return layered_model(config, dataset.input_shape, dataset.num_classes, dataset.target_bytes)


@functools.lru_cache(maxsize=16)
def _layered(
    spec: str, input_shape: Shape, num_classes: int, lora: LoraConfig | None, target_bytes: int
) -> LayeredModel:
    model = json.loads(spec)
    skeleton = models.skeleton(model, input_shape=input_shape, num_classes=num_classes)
    if lora is not None:
        skeleton = adapted(skeleton, lora.rank, lora.alpha, lora.targets, None)
    made = layered(skeleton, input_shape)
    return dataclasses.replace(made, target_bytes=target_bytes)


@functools.lru_cache(maxsize=16)
def _lowered(model: LayeredModel, input_shape: Shape, device: str) -> LayeredModel:
    return under_autocast(model, input_shape, device)


def base_state(config: Config, input_shape: Shape, num_classes: int) -> Mapping[str, Tensor]:
    """Return the weights that do not learn beside adapters, by name; none where all weights do.

    Kept per process and model: all who train parts of it share these tensors.
    """
    if config.client.train != "lora":
        return {}
    spec = json.dumps(dict(config.model), sort_keys=True)
    return _base_state(spec, tuple(input_shape), num_classes, config.seed)


@functools.lru_cache(maxsize=4)
def _base_state(spec: str, input_shape: Shape, num_classes: int, seed: int) -> Mapping[str, Tensor]:
    model = models.build(
        json.loads(spec), input_shape=input_shape, num_classes=num_classes, seed=seed
    )
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def fusion_in(config: Config, dataset: Dataset) -> Fusion | None:
    """Return what of the run's model is computed by fused kernels; None where none are asked for.

    A model that cannot be traced has no units to fuse.
    """
    if config.client.kernels != "fused":
        return None
    try:
        return fusion_of(layers_of(config, dataset))
    except ModelError as error:
        return Fusion((), {"the model": f"it cannot be traced ({error})"}, Modes())


def with_kernels(model: nn.Module, config: Config, dataset: Dataset) -> nn.Module:
    """Let the units of the whole model compute by ``client.kernels``, in place; return it."""
    fusion = fusion_in(config, dataset)
    return model if fusion is None else fuse(model, fusion)


def penalty_of(config: Config, model: LayeredModel, round_: int) -> Penalty | None:
    """Return the penalty on channels with which a round is trained; None for none."""
    weight = pruning.penalty_weight(config.pruning, round_, config.rounds)
    return Penalty.of(model.graph, weight, config.pruning.leave) if weight else None


def check_model(model: nn.Module, dataset: Dataset, config: Config | None = None) -> None:
    """Run the model once on two examples, so that what does not fit is said before training.

    Args:
        model: On its device.
        dataset: What it is to learn.
        config: Says as what; None: as images in classes.

    Raises:
        ConfigError: It does not take the images, or does not return a number for each class.
        ModelError: The model draws from a process-wide generator.
    """
    device = training.device_of(model)
    task = TaskConfig() if config is None else config.task
    x: Inputs
    if config is None or dataset.pictures:
        x = torch.randn((2, *dataset.input_shape), generator=Address(0).torch("check"))
    else:
        x = dataset.train.pixels[:2]
    classes = task.kind == "classification"
    targets = () if classes else tuple(dataset.train.labels.shape[1:])
    precision = "fp32" if config is None else config.client.precision
    x = x.to(device)
    with autocast(precision, x):
        check_fits(model, x, outputs_of(task, targets, dataset.num_classes))


def outputs_of(task: TaskConfig, targets: tuple[int, ...], outputs: int) -> tuple[int, ...] | None:
    """Return the shape that a model makes of an example; None for any that suits its own loss.

    Args:
        task: What is learned.
        targets: Shape of the targets of an example.
        outputs: Classes, or numbers.
    """
    if isinstance(task.loss, Mapping):
        return None
    if task.kind == "segmentation":
        return (outputs, *targets)
    return (*targets, outputs) if task.kind == "next_token" else (outputs,)
