"""``policy=fedadapt``: an agent that has learned how much of a model devices should keep.

Wu et al., "FedAdapt: Adaptive Offloading for IoT Devices in Federated Learning", IEEE IoT-J 9(21),
2022. What decides is in `fedsys.planning.learning`; here it meets a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel
from fedsys.planning.learning.client_rounds import Clients
from fedsys.planning.learning.cut_agent import CutAgent
from fedsys.planning.learning.cut_deciding import CutFedAdapt
from fedsys.planning.learning.deciding import FedAdapt, State
from fedsys.planning.learning.extra import check_rl
from fedsys.planning.learning.making import agent_file, agent_for, known_agent, scenario_of
from fedsys.planning.learning.options import FedAdaptOptions
from fedsys.planning.learning.practice import AnyAgent, trained_on, trained_on_clients
from fedsys.planning.learning.run_fleet import RunFleet
from fedsys.planning.learning.scenarios import Scenario
from fedsys.planning.planner import Plan, evaluate
from strategies.policies.policy import Assignment, Observation

if TYPE_CHECKING:
    from fedsys.planning.learning.environment import Rounds


class FedAdaptPolicy:
    """The policy of a trained agent.

    Args:
        config: The run; ``policy`` holds the options.
        examples: Examples of each client.
        folder: Where an agent that is trained is kept; None: nowhere.
        say: Told how far its training is.

    Raises:
        ConfigError: An option is not usable.
        ModelError: An agent is to be trained, and the extra ``rl`` is not installed.
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
        self._check_extra()
        self._base: Scenario | None = None
        self._decider: FedAdapt | CutFedAdapt | None = None

    def init(self, layers: LayeredModel, nodes: Sequence[int]) -> State:
        """Return the state before the first round.

        There is an agent then, unless it is to be trained on the clients (`practise`).

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
        self._base, options = base, self._options
        agent = known_agent(options, self._folder)
        if agent is None and options.training.where == "timeline":
            agent = agent_for(
                base, options, self._config.seed,
                folder=self._folder, say=self._say, model=self._model,
            )  # fmt: skip
        if agent is not None:
            self._decider = self._deciding(base, agent)
        return CutFedAdapt.init() if options.action == "cuts" else FedAdapt.init()

    def _check_extra(self) -> None:
        """Refuse to train an agent, or to let one go on learning, without what does that."""
        options, kept = self._options, agent_file(self._options, self._folder)
        is_trained = bool(options.agent) or (kept is not None and kept.is_file())
        if options.learn or (options.ppo.updates and not is_trained):
            check_rl()

    @property
    def ready(self) -> bool:
        """Whether there is an agent."""
        return self._decider is not None

    @property
    def agent_file(self) -> Path | None:
        """The file of the agent; None if it is kept nowhere, or there is none yet."""
        return agent_file(self._options, self._folder) if self.ready else None

    @property
    def iterations(self) -> int:
        """Mini-batches of a truncated round."""
        return self._options.training.iterations

    def practise(
        self, clients: Clients, rounds_of: Callable[[Scenario, Clients, bool], Rounds]
    ) -> None:
        """Train an agent, and keep it in the folder of the run.

        Args:
            clients: Carry truncated rounds out.
            rounds_of: Given the fleet and model of the run, the clients, and whether a device may
                not hold the whole model, returns the steps of an agent that says shares.

        Raises:
            RuntimeFailure: No client answered.
            ModelError: The extra ``rl`` is not installed.
        """
        base = self._base
        if base is None:
            raise ConfigError.of("policy.kind", "fedadapt", "must be initialised first")
        options, seed, forced = self._options, self._config.seed, self._forced(base)
        agent: AnyAgent
        if options.action == "cuts":
            fleet = RunFleet(base, forced=forced, told=False, full=True)
            agent = trained_on_clients(
                fleet, clients, self._config.num_clients, options, seed,
                say=self._say, model=self._model,
            )  # fmt: skip
        else:
            rounds = rounds_of(base, clients, forced)
            agent = trained_on(rounds, options, seed, say=self._say, model=self._model)
        self._decider = self._deciding(base, agent)
        if (kept := self.agent_file) is not None:
            agent.save(kept)

    def plan(
        self, state: State, seen: Mapping[int, Observation]
    ) -> tuple[State, Mapping[int, Assignment]]:
        """Take in what was seen, and ask the agent."""
        return self._ready.plan(state, seen)

    def reasons(self, state: State, clients: Sequence[int]) -> Mapping[int, str]:
        """Return one sentence about the decision for each client."""
        return self._ready.reasons(state, clients)

    def predicted(self, state: State, clients: Sequence[int]) -> Plan:
        """Return what is expected of some clients; by the fleet file if an agent says shares."""
        decider, base = self._ready, self._base
        if isinstance(decider, CutFedAdapt) or base is None:
            return cast(CutFedAdapt, decider).predicted(state, clients)
        devices = base.load.devices
        who = tuple(devices[client % len(devices)] for client in clients)
        choices = [base.assignment(c, state["known"][c]["cut"]) for c in clients]
        return evaluate(dataclasses.replace(base.load, devices=who), choices)

    def to_measure(self, state: State, clients: Sequence[int]) -> Mapping[int, int]:
        """Return the bytes each way, by client that is to measure its link although it is alone."""
        decider, nbytes = self._ready, self.probe_size
        return dict.fromkeys(decider.unmeasured(state, clients), nbytes) if nbytes else {}

    @property
    def probe_size(self) -> int:
        """Bytes each way with which a device measures its link; 0: none does."""
        return self._options.probe_bytes if self._options.probe_every else 0

    @property
    def _ready(self) -> FedAdapt | CutFedAdapt:
        if self._decider is None:
            raise ConfigError.of(
                "policy.training.where", self._options.training.where,
                "must be timeline where there are no clients to train an agent on",
                "or give one that is trained: policy.agent=FILE",
            )  # fmt: skip
        return self._decider

    @property
    def _model(self) -> str:
        return str(self._config.model.get("name") or self._config.model["_target_"])

    def _forced(self, base: Scenario) -> bool:
        limit = self._config.client.max_model_bytes
        return limit is not None and sum(base.load.state_bytes) > limit

    def _deciding(self, base: Scenario, agent: AnyAgent) -> FedAdapt | CutFedAdapt:
        forced, seed, options = self._forced(base), self._config.seed, self._options
        if isinstance(agent, CutAgent):
            told = bool(self._config.fleet.devices)
            return CutFedAdapt(base, options, agent, forced=forced, told=told, seed=seed)
        return FedAdapt(base, options, agent, forced=forced, seed=seed)
