"""Any data: what a map-style data set of the user's holds, as two tensors for each part.

The whole set is read once, example by example, and put together by a collate function, so an
example is the same in every round and on every machine. What a data set draws at random when it is
asked for an example is drawn once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsys.data.dataset import Images, quantiles
from fedsys.data.options import Spec
from fedsys.errors import ConfigError, DataError, FedsysError, did_you_mean, first_line
from fedsys.transport.several import MOST, Inputs, Several

_CHECKED = 1 << 22
"""Numbers that are looked at in one go: a copy of a large set need not fit beside it."""

OURS = frozenset(
    {
        *("source", "_target_", "collate", "classes", "test", "validation", "max_examples"),
        *("augmentation", "partition", "cache", "task"),
    }
)
"""Keys of the group that are not passed on to the constructor."""

OBJECT = "fedsys.config.objects.dataset"
"""The ``_target_`` of an object of a Python session, which is called by its ``key``."""


@dataclass(frozen=True, eq=False)
class Read:
    """What a source gives.

    Attributes:
        train: The training part.
        test: The test part; None: it is to be set aside.
        classes: Names of the classes, where there are classes.
        outputs: How many numbers a model is to make of an example, or of a place of it.
    """

    train: Images
    test: Images | None
    classes: tuple[str, ...]
    outputs: int


def read(spec: Spec) -> Read:
    """Read the data set that ``data._target_`` names.

    Args:
        spec: The `data` group. ``_target_`` is called with all keys that are not in `OURS`, and
            returns a map-style data set of (inputs, targets), or a tuple of two: training and test.
            With ``task=next_token`` an example may be the tokens alone.

    Raises:
        ConfigError: It cannot be imported or called, or does not suit the task.
        DataError: Reading an example failed.
    """
    target = str(spec.get("_target_") or "")
    made = call(target, {str(k): v for k, v in spec.items() if k not in OURS}, "data")
    parts = made if isinstance(made, tuple | list) and len(made) == 2 else (made, None)
    collate = collate_of(spec)
    named = ("data", str(spec["key"])) if target == OBJECT else ("data._target_", target)
    images = [None if part is None else part_of(part, named, collate, spec) for part in parts]
    train, test = images
    assert train is not None
    told = getattr(parts[0], "classes", None)
    names, outputs = outputs_of(told, [part for part in images if part is not None], spec)
    return Read(train, test, names, outputs)


def call(target: str, keywords: Mapping[str, Any], group: str) -> Any:
    """Call what a dotted path names.

    Raises:
        ConfigError: It cannot be imported, has no such argument, or refuses its arguments.
    """
    function = locate(target, group)
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some have no signature; calling them decides
        known = None
    if known is not None and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        for key in keywords:
            if key not in known:
                hint = did_you_mean(key, list(known))
                raise ConfigError.of(
                    f"{group}.{key}", keywords[key], f"must be an argument of {target}", hint
                )
    try:
        return function(**keywords)
    except FedsysError:
        raise
    except Exception as error:  # whatever the user's constructor raises
        raise ConfigError.of(
            f"{group}._target_", target,
            f"cannot be made of its arguments: {type(error).__name__}: {first_line(error)}",
        ) from error  # fmt: skip


def locate(target: str, group: str) -> Callable[..., Any]:
    """Return what a dotted path names.

    Raises:
        ConfigError: It cannot be imported, or cannot be called.
    """
    try:
        found = resolve_name(target)
    except Exception as error:  # a user's module may fail in any way; it is kept as the cause
        raise ConfigError.of(
            f"{group}._target_",
            target or None,
            f"must be importable ({type(error).__name__}: {first_line(error)})",
            "give the dotted path of a class or function whose folder is on PYTHONPATH",
        ) from error
    if not callable(found):
        raise ConfigError.of(f"{group}._target_", target, "must name a class or a function")
    return found  # type: ignore[no-any-return]  # a callable, as was asked


def function_of(told: Any, group: str) -> Any:
    """Return the function that an option names, by a dotted path or as a ``_target_``.

    What is named is made where it is a class, or has further keys that it is made of.

    Raises:
        ConfigError: As for `call` and `locate`.
    """
    given = told if isinstance(told, Mapping) else {"_target_": str(told)}
    found = locate(str(given.get("_target_") or ""), group)
    return made_of(given, group) if inspect.isclass(found) or len(given) > 1 else found


def made_of(told: Mapping[str, Any], group: str) -> Any:
    """Return what the ``_target_`` of an option makes of its other keys.

    Raises:
        ConfigError: As for `call`.
    """
    rest = {str(k): v for k, v in told.items() if k != "_target_"}
    return call(str(told.get("_target_") or ""), rest, group)


def collate_of(spec: Spec) -> Callable[[Sequence[Any]], Any]:
    """Return what puts a list of examples together: ``data.collate``, or torch's own.

    Raises:
        ConfigError: As for `function_of`.
    """
    if own := spec.get("collate"):
        made: Callable[[Sequence[Any]], Any] = function_of(own, "data.collate")
        return made
    from torch.utils.data import default_collate

    return lambda examples: default_collate(list(examples))


def part_of(
    part: Any, named: tuple[str, str], collate: Callable[[Sequence[Any]], Any], spec: Spec
) -> Images:
    """Return a whole part as tensors.

    Args:
        part: A map-style data set.
        named: The option that led to it, and its value.
        collate: Puts a list of examples together.
        spec: The `data` group.

    Raises:
        ConfigError: It does not suit the task.
        DataError: Reading an example failed.
    """
    if not hasattr(part, "__getitem__") or not hasattr(part, "__len__"):
        raise ConfigError.of(
            *named,
            f"must return a map-style data set, with len() and [i], or a tuple of two of them "
            f"(training, test), and it returned a {type(part).__name__}",
        )  # fmt: skip
    try:
        count = len(part)
    except Exception as error:  # whatever the user's data set raises
        raise DataError(
            f"{named[0]}={named[1]}: has no len(): {type(error).__name__}: {first_line(error)}"
        ) from error
    if count < 2:
        raise ConfigError.of(*named, f"must have 2 or more examples, not {count}")
    batch = _whole(part, count, named, collate)
    inputs, targets = _pair(batch, named, str(spec.get("task", "classification")))
    if len(inputs) != count or len(targets) != count:
        raise ConfigError.of(
            *named,
            f"must give {count} rows of inputs and of targets, and gives {len(inputs)} and "
            f"{len(targets)}", "data.collate._target_ puts a list of examples together",
        )  # fmt: skip
    return images_of(inputs, targets, str(spec.get("task", "classification")), _ids(part, count))


def _whole(
    part: Any, count: int, named: tuple[str, str], collate: Callable[[Sequence[Any]], Any]
) -> Any:
    index = 0
    try:
        rows = []
        for index in range(count):
            rows.append(part[index])
    except Exception as error:  # whatever the user's data set raises
        raise DataError(
            f"{named[0]}={named[1]}: example {index} cannot be read: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    try:
        return collate(rows)
    except Exception as error:  # likewise
        raise ConfigError.of(
            "data.collate", None,
            f"cannot put the {count} examples of {named[1]} together: {first_line(error)}",
            "give them one shape, or data.collate._target_=package.function, which takes a list of "
            "examples and returns (inputs, targets), padded",
        ) from error  # fmt: skip


def _pair(batch: Any, named: tuple[str, str], task: str) -> tuple[Inputs, Tensor]:
    alone = isinstance(batch, Tensor)
    if task == "next_token" and (alone or (isinstance(batch, list | tuple) and len(batch) == 1)):
        tokens = _tensor(batch if alone else batch[0], named)
        if tokens.dim() != 2 or tokens.shape[1] < 2:
            raise ConfigError.of(
                *named, "must give sequences of 2 or more tokens, and gives examples of shape "
                f"{tuple(tokens.shape[1:])}",
            )  # fmt: skip
        return tokens[:, :-1], tokens[:, 1:]
    if isinstance(batch, list | tuple) and len(batch) == 2 and _are_tensors(batch[0]):
        return _several(batch[0], named), _tensor(batch[1], named)
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ConfigError.of(
            *named,
            f"must give (inputs, targets) for each example, and not {_kind(batch)}",
            "several inputs are one tuple: ((tokens, mask), targets)",
        )  # fmt: skip
    return _tensor(batch[0], named), _tensor(batch[1], named)


def _are_tensors(value: Any) -> bool:
    several = isinstance(value, list | tuple) and value
    return bool(several) and all(isinstance(each, Tensor | np.ndarray) for each in value)


def _several(parts: Sequence[Any], named: tuple[str, str]) -> Inputs:
    tensors = tuple(_tensor(part, named) for part in parts)
    if not 1 <= len(tensors) <= MOST or len({len(tensor) for tensor in tensors}) != 1:
        raise ConfigError.of(
            *named, f"must give 1 to {MOST} inputs with a row for each example, and gives "
            f"{[tuple(tensor.shape) for tensor in tensors]}",
        )  # fmt: skip
    return Several(tensors) if len(tensors) > 1 else tensors[0]


def _tensor(value: Any, named: tuple[str, str]) -> Tensor:
    try:
        made = torch.as_tensor(value)
        if not made.dim():
            raise ValueError("a number of all examples together")
        if made.is_complex():  # a cast to floats would drop the imaginary parts without an error
            raise ValueError(f"{made.dtype} has no order; give real and imaginary parts as numbers")
        return made
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError.of(
            *named, f"must give tensors or numbers: {first_line(error)}",
            "a collate function of your own may make them: data.collate._target_",
        ) from error  # fmt: skip


def _kind(batch: Any) -> str:
    several = isinstance(batch, list | tuple)
    return f"{len(batch)} values" if several else f"a {type(batch).__name__}"


def images_of(inputs: Inputs, targets: Tensor, task: str, owners: Tensor | None = None) -> Images:
    """Return a part in the types that models and losses take.

    Args:
        inputs: ``(N, …)``: uint8 images ``(N, C, H, W)`` stay as they are, other whole numbers
            become int64, and all others float32. Of several, images are divided by 255, and
            booleans stay.
        targets: ``(N, …)``.
        task: Kind of the task.
        owners: Whose the examples are, int64 ``(N,)``; None: they are to be divided.

    Raises:
        ConfigError: The targets are of another task.
    """
    if isinstance(inputs, Several):
        inputs = Several(tuple(_one_of_several(tensor) for tensor in inputs.tensors))
    elif not _is_picture(inputs):
        inputs = _numbers(inputs)
    if task in ("regression", "multilabel"):
        targets = _targets_of_numbers(targets, task)
    else:
        targets = _targets_of_classes(targets, inputs, task)
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        _refuse_infinite(inputs, "inputs")
    strata = None if task == "classification" else _strata(targets, task)
    return Images(inputs.contiguous(), targets.contiguous(), strata, owners)


def _targets_of_numbers(targets: Tensor, task: str) -> Tensor:
    """Return targets as float32 ``(N, numbers)``.

    Raises:
        ConfigError: One is infinite, or no label.
    """
    targets = targets.to(torch.float32)
    targets = targets[:, None] if targets.dim() == 1 else targets
    _refuse_infinite(targets, "targets")
    if task == "multilabel" and not bool(((targets >= 0) & (targets <= 1)).all()):
        least, most = float(targets.min()), float(targets.max())
        raise ConfigError.of(
            "task.kind", task,
            f"has a number from 0 to 1 for each label as targets, and these go from {least:g} "
            f"to {most:g}",
            "a class as a whole number is task=classification; torch.nn.functional.one_hot makes "
            "labels of it",
        )  # fmt: skip
    return targets


def _targets_of_classes(targets: Tensor, inputs: Inputs, task: str) -> Tensor:
    """Return targets as int64 ``(N, …)``.

    Raises:
        ConfigError: They are no classes, or not those of the places that the task has.
    """
    if targets.is_floating_point():
        raise ConfigError.of(
            "task.kind", task, f"has classes as targets, and these are {targets.dtype}",
            "task=regression learns numbers, task=multilabel zeros and ones",
        )  # fmt: skip
    targets = targets.to(torch.int64)
    if task == "classification" and targets.dim() != 1:
        raise ConfigError.of(
            "task.kind", task,
            f"has one class for each example, and these have targets of shape "
            f"{tuple(targets.shape[1:])}", "task=segmentation, multilabel or next_token",
        )  # fmt: skip
    _check_places(inputs, targets, task)
    if targets.numel() and int(targets.min()) < 0:
        raise ConfigError.of(
            "data", "targets", f"must be classes from 0 on, and {int(targets.min())} is there"
        )
    return targets


def _refuse_infinite(values: Tensor, what: str) -> None:
    """Refuse what no loss and no model makes a number of; one of several inputs may be a mask."""
    rows = max(1, _CHECKED // max(1, values[:1].numel()))
    if not len(values):  # is said elsewhere
        return
    pieces = (values[at : at + rows] for at in range(0, len(values), rows))
    bad = torch.cat([~torch.isfinite(piece.reshape(len(piece), -1)).all(1) for piece in pieces])
    if bool(bad.any()):
        raise ConfigError.of(
            "data", what,
            f"must be finite numbers (of float32), and {int(bad.sum())} of {len(values)} examples "
            f"have others, the first is {int(bad.nonzero()[0])}",
            "fill in what is missing, or leave these examples out",
        )  # fmt: skip


def _check_places(inputs: Inputs, targets: Tensor, task: str) -> None:
    """Refuse targets that have not a class for each place.

    Raises:
        ConfigError: Says which shape they must have.
    """
    places = {"next_token": "(tokens,)", "segmentation": "(H, W)"}.get(task)
    wanted = {2}
    if isinstance(inputs, Tensor) and task == "segmentation":  # grey images may have no channel
        wanted = {inputs.dim() - 1, *([inputs.dim()] if inputs.dim() <= 3 else [])}
    other = isinstance(inputs, Tensor) and targets.dim() not in wanted
    if places and (targets.dim() < 2 or other):
        raise ConfigError.of(
            "task.kind", task,
            f"has a class for each place, {places}, as targets of an example, and these have shape "
            f"{tuple(targets.shape[1:])}",
            "squeeze a channel of 1 away; one class for all is task=classification",
        )  # fmt: skip


def _is_picture(inputs: Tensor) -> bool:
    return inputs.dtype == torch.uint8 and inputs.dim() == 4


def _numbers(inputs: Tensor) -> Tensor:
    return inputs.to(torch.float32 if inputs.is_floating_point() else torch.int64)


def _one_of_several(inputs: Tensor) -> Tensor:
    if inputs.dtype == torch.bool:
        return inputs
    return inputs.float() / 255 if _is_picture(inputs) else _numbers(inputs)


def _strata(targets: Tensor, task: str) -> Tensor:
    if task == "regression":
        return torch.from_numpy(quantiles(targets.flatten(1)[:, 0].numpy()))
    return torch.zeros(len(targets), dtype=torch.int64)


def _ids(part: Any, count: int) -> Tensor | None:
    """Return whose the examples are by ``client_ids``, numbered from 0 in their order."""
    ids = getattr(part, "client_ids", None)
    if ids is None:
        return None
    if len(ids) != count:
        raise ConfigError.of(
            "data.client_ids", len(ids), f"must have one entry for each of the {count} examples"
        )
    return torch.from_numpy(np.unique(np.asarray(ids), return_inverse=True)[1].astype(np.int64))


def _largest(inputs: Inputs) -> int:
    """Return the largest token of inputs: of several, of the first that are whole numbers."""
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs.tensors
    tokens = [each for each in tensors if each.dtype == torch.int64]
    return int(tokens[0].max()) if tokens else 0


def outputs_of(classes: Any, images: Sequence[Images], spec: Spec) -> tuple[tuple[str, ...], int]:
    """Return the names of the classes, if there are any, and how many numbers a model makes.

    Args:
        classes: What the data set says of its classes: names, their number, or None.
        images: Its parts.
        spec: The `data` group, whose ``classes`` come before that.

    Raises:
        ConfigError: There are fewer classes than are seen.
    """
    task = str(spec.get("task", "classification"))
    if task in ("regression", "multilabel"):
        return (), int(np.prod(images[0].labels.shape[1:]))
    seen = max(int(each.labels.max()) for each in images)
    if task == "next_token":
        seen = max(seen, *(_largest(each.pixels) for each in images))
    told = spec.get("classes") or classes
    names = [str(name) for name in told] if isinstance(told, list | tuple) else None
    count = len(names) if names is not None else told if isinstance(told, int) else seen + 1
    if count <= seen:
        raise ConfigError.of("data.classes", count, f"must be above the largest class, {seen}")
    if task != "classification":
        return (), count
    if count < 2:  # the cross-entropy of one output is 0, so all would be learned
        raise ConfigError.of(
            "data", "targets", "must be of 2 or more classes, and all examples are of one",
            "data.classes=2 if others are to come",
        )  # fmt: skip
    return tuple(names or (f"class {k}" for k in range(count))), count
