"""An agent that is trained on the clients of a run, and what that leaves of the run: nothing."""

from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Error, Message

from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.offload.edge import EdgeServer
from fedsys.offload.fleet import EdgeAddress, Fleet
from fedsys.planning.learning.agent import load
from fedsys.planning.learning.client_rounds import ClientRounds
from fedsys.planning.learning.device_rounds import CutEnvironment
from fedsys.planning.learning.environment import OffloadEnvironment
from fedsys.planning.learning.grouping import LowBandwidth
from fedsys.planning.learning.making import scenario_of
from fedsys.planning.learning.observing import log_reward
from fedsys.planning.learning.options import FedAdaptOptions
from fedsys.planning.learning.run_fleet import RunFleet
from fedsys.planning.learning.view import View
from fedsys.runs.folder import RunFolder
from fedsys.runtime import run
from fedsys.runtime.apps import load_client
from fedsys.runtime.local import LocalGrid
from fedsys.training import federation
from fedsys.transport import records
from fedsys.transport.messages import OBSERVATION, TRUNCATED_ROUND
from strategies import Roster
from strategies.model_division import ModelDivision
from strategies.truncated_rounds import ModelledClients, RealClients, TruncatedRounds

SMALL = (
    "policy=fedadapt", "policy.training.where=clients", "policy.training.iterations=2",
    "fleet=pi_lab", "network=wifi_75", "model=cnn", "model.width=2", "model.hidden=8",
    "data=synthetic", "data.max_examples=120", "client.batch_size=16", "num_clients=2",
    "client.epochs=1", "rounds=2", "json=true",
)  # fmt: skip


@pytest.fixture
def truncated(configure, identity):
    """Return a function that sets up truncated rounds of two clients and one edge server."""
    with ExitStack() as stack:

        def made(*overrides, client=None, modelled=True, name="edge-0"):
            config = configure(*SMALL, *overrides)
            fed = federation.federation(config)
            model = federation.build_model(config, fed.dataset)
            edge = EdgeServer(name, f"memory://{name}-of-truncated", control_token="t")
            stack.callback(edge.stop, 0.0)
            fleet = stack.enter_context(Fleet([EdgeAddress(name, edge.address)], control_token="t"))
            app, replies = client or load_client(config.apps.client), []

            def watched(message, context):
                replies.append((message.metadata.message_type, app(message, context)))
                return replies[-1][1]

            run_config = {"hydra-config": config.text}
            grid = stack.enter_context(LocalGrid(watched, 2, run_config=run_config))
            division = ModelDivision(config, fed.dataset)
            options = FedAdaptOptions.of(config.policy)
            base = scenario_of(config, division.layers, [60, 60], options)
            arrays = records.to_record(model.state_dict())
            clients = RealClients(config, grid, Roster(2), fleet, division, arrays, 2)
            if modelled:
                clients = ModelledClients(config, division.layers, 2, clients)
            rounds = TruncatedRounds(base, clients)
            return SimpleNamespace(
                rounds=rounds, base=base, edge=edge, replies=replies, clients=clients
            )

        yield made


def silent_from(step, partition):
    """Return a client app of which one client fails from a step on, counted from 0."""
    asked = [0, 0]

    def client(message, context):
        who = int(context.node_config["partition-id"])
        asked[who] += 1
        if who == partition and asked[who] > step:
            return Message(Error(1, "out of order"), reply_to=message)
        return load_client("clients.app:app")(message, context)

    return client


def test_the_environment_on_clients_passes_the_checkers_of_both_libraries(truncated):
    from gymnasium.utils.env_checker import check_env as of_gymnasium
    from stable_baselines3.common.env_checker import check_env as of_stable_baselines3

    environment = OffloadEnvironment(truncated().rounds, View(2, LowBandwidth(), bandwidth=True))
    of_gymnasium(environment, skip_render_check=True)
    of_stable_baselines3(environment, warn=True)


def test_rounds_in_which_cuts_are_scored_pass_them_too_and_are_what_the_timeline_says(truncated):
    from gymnasium.utils.env_checker import check_env as of_gymnasium
    from stable_baselines3.common.env_checker import check_env as of_stable_baselines3

    made = truncated()
    rounds = ClientRounds(RunFleet(made.base, told=False, full=True), made.clients, 2)
    of_gymnasium(CutEnvironment(rounds), skip_render_check=True)
    of_stable_baselines3(CutEnvironment(rounds), warn=True)
    rounds.begin(np.random.default_rng(0))
    alone = rounds._look.outlook.alone_s[:, -1]
    assert alone == pytest.approx(made.base.baseline_s[:2], rel=0.05)
    earned, _ = rounds.step(np.array([0, 1]))
    assert made.edge.sessions == [] and (earned < 0).all()


def test_who_does_not_answer_earns_nothing_where_cuts_are_scored(truncated):
    made = truncated(client=silent_from(1, partition=1))
    rounds = ClientRounds(RunFleet(made.base, told=False, full=True), made.clients, 2)
    rounds.begin(np.random.default_rng(0))
    before = rounds._known.work_s[1].copy()
    earned, _ = rounds.step(np.array([0, 0]))
    assert earned[0] < 0.0 == earned[1] and np.isfinite(rounds.seen).all()
    assert (rounds._known.work_s[1] == before).all()


def test_a_step_is_what_the_timeline_says_where_time_is_not_real(truncated):
    """One interface: the same cuts take the same time on the timeline and on the virtual clock."""
    made = truncated()
    first = made.rounds.begin(np.random.default_rng(0))
    assert first.iteration_s == pytest.approx(made.base.baseline_s[:2], rel=0.02)
    assert first.mbit_s == pytest.approx([75.0, 75.0], rel=0.01)
    for picked in ([0, 0], [1, 2]):
        now = made.rounds.carry_out(picked)
        assert now.iteration_s == pytest.approx(made.base.iteration_s(picked)[:2], rel=0.05)


def test_nothing_comes_back_but_what_was_seen_and_no_session_stays(truncated):
    made = truncated(modelled=False)
    made.rounds.begin(np.random.default_rng(0))
    now = made.rounds.carry_out([0, 1])
    assert (now.iteration_s > 0).all()
    assert [kind for kind, _ in made.replies] == [TRUNCATED_ROUND] * 4
    assert all(list(reply.content) == [OBSERVATION] for _, reply in made.replies)
    assert [reply.content[OBSERVATION]["steps"] for _, reply in made.replies] == [2] * 4
    assert made.edge.sessions == [] and made.edge.counters["steps"] == 4


def test_as_many_mini_batches_as_asked_for_though_a_round_has_fewer(truncated):
    made = truncated("client.batch_size=512", modelled=False)
    made.rounds.begin(np.random.default_rng(0))
    assert [reply.content[OBSERVATION]["steps"] for _, reply in made.replies] == [2, 2]


def test_who_does_not_answer_is_left_out_of_the_step(truncated):
    made = truncated(client=silent_from(1, partition=1))
    environment = OffloadEnvironment(made.rounds, View(2))
    environment.reset(seed=0)
    state, earned, _, _, told = environment.step(np.zeros(2, dtype=np.float32))
    base_s = made.base.baseline_s.tolist()
    assert np.isnan(told["iteration_s"][1]) and np.isfinite(state).all()
    assert earned == pytest.approx(log_reward(told["iteration_s"][:1], base_s[:1]), rel=0.05)
    assert made.edge.sessions == []


def test_who_does_not_answer_at_the_beginning_is_not_in_the_episode(truncated):
    made = truncated(client=silent_from(0, partition=0))
    assert len(made.rounds.begin(np.random.default_rng(0)).iteration_s) == 1
    assert len(made.rounds.carry_out([0]).iteration_s) == 1


def test_where_nobody_answers_the_error_says_the_way_out(truncated):
    made = truncated(client=lambda m, c: Message(Error(1, "gone"), reply_to=m))
    with pytest.raises(RuntimeFailure, match=r"none of 2 clients .*policy\.training\.where"):
        made.rounds.begin(np.random.default_rng(0))


def result_of(configure, folder, *overrides):
    run(configure(*SMALL, f"run.dir={folder}", *overrides))
    return RunFolder.open(folder).info["result"]


def test_training_on_clients_leaves_no_trace_in_the_run(configure, tmp_path):
    """Dropout, momentum that is kept, and draws are those of a run with that agent from a file."""
    more = ("client.keep_optimizer=true", "client.momentum=0.9", "policy.ppo.layers=[8]")
    practice = ("policy.ppo.updates=1", "policy.ppo.every=4", *more)
    one = result_of(configure, tmp_path / "one", *practice, "runtime.workers=1")
    two = result_of(configure, tmp_path / "two", *practice, "runtime.workers=2")
    agent = tmp_path / "one" / "agent.safetensors"
    given = result_of(configure, tmp_path / "given", f"policy.agent={agent}", *more)
    mine, other = load(agent).weights, load(tmp_path / "two" / agent.name).weights
    assert all(np.array_equal(other[name], weight) for name, weight in mine.items())
    assert [told["agent"] for told in (one, given)] == [str(agent)] * 2
    for told in (two, given):
        same = ("model_sha256", "cuts", "edge_steps", "bytes_up", "virtual_s", "recoveries")
        assert {key: told[key] for key in same} == {key: one[key] for key in same}


def test_without_clients_there_is_nobody_to_train_on(configure):
    from strategies.policies import build_policy

    config = configure(*SMALL)
    fed = federation.federation(config)
    policy = build_policy(config.policy, 1, config, [60, 60])
    division = ModelDivision(config, fed.dataset)
    state = policy.init(division.layers, range(2))
    with pytest.raises(ConfigError, match=r"policy\.training\.where=clients: must be timeline"):
        policy.plan(state, {})
