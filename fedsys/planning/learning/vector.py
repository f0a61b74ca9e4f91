"""Steps of many environments at once, as stable-baselines3 asks for them (extra ``rl``)."""

from __future__ import annotations

from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray

from fedsys.planning.learning.extra import of_rl

VecEnv: Any = of_rl("stable_baselines3.common.vec_env.base_vec_env").VecEnv

Seen = NDArray[np.float32]

Stepped = tuple[Seen, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]
"""What is seen after a step, its rewards, which episodes are over, and what else is to be said."""


class Environments(Protocol):
    """What N environments do.

    Attributes:
        count: N.
        spaces: Of what one sees, and of its actions, as gymnasium describes them.
    """

    count: int
    spaces: tuple[Any, Any]

    def begin(self) -> Seen:
        """Begin an episode everywhere; return what is seen."""
        ...

    def step(self, actions: NDArray[Any]) -> Stepped:
        """Take the actions of a step; who has ended an episode begins another."""
        ...


@final
class VectorEnvironment(VecEnv):  # type: ignore[misc]  # of an extra: without types
    """Environments as one vector environment of stable-baselines3.

    Args:
        environments: What is stepped through.
    """

    def __init__(self, environments: Environments) -> None:
        self._inner, self._actions = environments, np.zeros(0)
        super().__init__(environments.count, *environments.spaces)

    def reset(self) -> Seen:
        """Begin an episode everywhere."""
        return self._inner.begin()

    def step_async(self, actions: NDArray[Any]) -> None:
        """Take the actions of a step."""
        self._actions = actions

    def step_wait(self) -> Stepped:
        """Return what comes of them."""
        return self._inner.step(self._actions)

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute, the same for all environments."""
        return [getattr(self, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of all."""
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method, once."""
        return [getattr(self, method_name)(*args, **kwargs)] * self.num_envs

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Nothing is wrapped."""
        return [False] * self.num_envs
