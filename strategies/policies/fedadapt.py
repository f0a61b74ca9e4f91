"""``policy=fedadapt``: an agent that has learned how much of a model devices should keep.

Wu et al., "FedAdapt: Adaptive Offloading for IoT Devices in Federated Learning", IEEE IoT-J 9(21),
2022. What decides is in `fedsys.planning.learning`; here it meets a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel
from fedsys.planning.learning.deciding import FedAdapt, State
from fedsys.planning.learning.making import agent_for, scenario_of
from fedsys.planning.learning.options import FedAdaptOptions
from strategies.policies.policy import Assignment, Observation


class FedAdaptPolicy:
    """The policy of a trained agent.

    Args:
        config: The run; ``policy`` holds the options.
        examples: Examples of each client.
        folder: Where an agent that is trained is kept; None: nowhere.
        say: Told how far its training is.
    """

    def __init__(
        self,
        config: Config,
        examples: Sequence[int],
        folder: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._options = FedAdaptOptions.of(config.policy)
        if config.client.label_private:
            raise ConfigError.of(
                "policy.kind", "fedadapt",
                "must be fixed with client.label_private=true: agents know one cut only",
            )  # fmt: skip
        self._config, self._examples = config, list(examples) or [config.client.batch_size]
        self._folder, self._say = folder, say
        self._decider: FedAdapt | None = None

    def init(self, layers: LayeredModel, nodes: Sequence[int]) -> State:
        """Return the state before the first round, once there is an agent.

        Raises:
            ConfigError: As `fedsys.planning.learning.making.agent_for`, or the model has no cut.
        """
        base = scenario_of(self._config, layers, self._examples, self._options)
        if len(base.cuts) < 2:
            raise ConfigError.of(
                "model", self._config.model.get("_target_"),
                "must have a cut: between its units more than one tensor flows",
                "policy=none trains it on the devices",
            )  # fmt: skip
        model = str(self._config.model.get("name") or self._config.model["_target_"])
        agent = agent_for(
            base, self._options, self._config.seed,
            folder=self._folder, say=self._say, model=model,
        )  # fmt: skip
        limit = self._config.client.max_model_bytes
        forced = limit is not None and sum(base.load.state_bytes) > limit
        self._decider = FedAdapt(base, self._options, agent, forced=forced, seed=self._config.seed)
        return self._decider.init()

    def plan(
        self, state: State, seen: Mapping[int, Observation]
    ) -> tuple[State, Mapping[int, Assignment]]:
        """Take in what was seen, and ask the agent."""
        return self._ready.plan(state, seen)

    def reasons(self, state: State, clients: Sequence[int]) -> Mapping[int, str]:
        """Return one sentence about the decision for each client."""
        return self._ready.reasons(state, clients)

    @property
    def _ready(self) -> FedAdapt:
        if self._decider is None:
            raise ConfigError.of("policy.kind", "fedadapt", "must be initialised first")
        return self._decider
