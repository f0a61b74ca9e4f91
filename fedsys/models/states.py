"""States of halves: tensors by global name, put into a half and put together again.

Everything goes by name, never by position: two halves of one model may be cut anywhere, and a
name that is missing, doubled or foreign is an error and not a shift.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fedsys.errors import ModelError


def fill(half: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give `half` the tensors of `state`, without copying; it owns them from then on.

    Parameters that were one tensor under several names are one again. They are new parameters:
    make optimizers afterwards.

    Args:
        half: A stage, usually on ``meta``.
        state: By global name, all of them and no others, in the shapes and dtypes of the half.

    Raises:
        ModelError: Names what is missing, unexpected or of another shape or dtype.
    """
    wanted = half.state_dict(keep_vars=True)
    problems = [f"{name}: missing" for name in wanted if name not in state]
    problems += [f"{name}: unexpected" for name in state if name not in wanted]
    problems += [
        f"{name}: {_kind(state[name])} instead of {_kind(tensor)}"
        for name, tensor in wanted.items()
        if name in state and _kind(state[name]) != _kind(tensor)
    ]
    if problems:
        raise ModelError(f"the state does not fit the half: {'; '.join(problems)}")
    first: dict[int, str] = {}
    once = {name: state[first.setdefault(id(tensor), name)] for name, tensor in wanted.items()}
    for name, tensor in once.items():
        if tensor is not state[name] and not torch.equal(tensor, state[name]):
            raise ModelError(f"{name} and {first[id(wanted[name])]} are one tensor with two values")
    half.load_state_dict(once, assign=True)
    for name, tensor in wanted.items():
        if first[id(tensor)] != name and isinstance(tensor, nn.Parameter):
            path, _, attribute = name.rpartition(".")
            owner = half.get_submodule(path)
            owner.register_parameter(attribute, half.get_parameter(first[id(tensor)]))


def join(*states: Mapping[str, Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Put disjoint states together by name.

    Args:
        *states: States of halves, by global name.
        names: The names that the result must have, in this order; any if None.

    Raises:
        ModelError: Lists the names that are in two states, missing or not expected.
    """
    joined: dict[str, Tensor] = {}
    for state in states:
        if twice := [name for name in state if name in joined]:
            raise ModelError(f"in more than one half: {', '.join(twice)}")
        joined.update(state)
    if names is None:
        return joined
    expected = list(names)
    if missing := [name for name in expected if name not in joined]:
        raise ModelError(f"in no half: {', '.join(missing)}")
    if foreign := joined.keys() - set(expected):
        raise ModelError(f"not part of the model: {', '.join(sorted(foreign))}")
    return {name: joined[name] for name in expected}


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
