"""The runtime ``simulation``: Flower's simulation engine, whose clients are processes under Ray.

The engine is started as Flower starts it, but by its parts: the server app stays in the main
thread, where Ctrl-C is heard and the data are loaded while Ray starts; a thread runs the engine;
the nodes' contexts hold the run config, which `flwr.simulation.run_simulation` cannot give them.

What is private in Flower and used here: `run_api` and `_register_nodes` of the engine, the stores
of the nodes' contexts, the pool of its backend, the in-memory link state and its grid.
`tests/runtime/test_simulation.py` fails when one of them changes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import psutil
from flwr.app import Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.task_pb2 import Task
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsys.config import Config, secret
from fedsys.errors import RuntimeFailure, need
from fedsys.runs import startup as stages
from fedsys.runtime.apps import load_apps, load_client
from fedsys.runtime.grid_around import GridAround
from fedsys.runtime.local import identify_process
from fedsys.training.pulse import pulse

if TYPE_CHECKING:
    from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend

POLL_S = 0.02
"""Seconds between two looks for replies; Flower's own in-memory grid takes 0.1."""


def run_simulation(config: Config) -> None:
    """Run the server app in this thread, and its clients in Flower's engine.

    Raises:
        ModelError: Ray is not installed.
        RuntimeFailure: The engine could not start, or broke down.
        FedsysError: Whatever made the run fail.
    """
    need("ray", "runtime=simulation")
    server_app, _ = load_apps(config)  # a wrong name is said before Ray starts
    stages.current().reached("imports")
    run_config: UserConfig = {"hydra-config": config.text}
    with SimulationEngine(config, run_config) as grid:
        stages.current().reached("engine")
        context = Context(
            run_id=grid.run.run_id,
            node_id=SUPERLINK_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config=run_config,
        )
        with secret.handed_on(config.fleet.control_token):  # Ray's processes began without it
            server_app(grid, context)


def workers(config: Config) -> int:
    """Return how many clients train at the same time."""
    wanted = config.runtime.workers or max(1, (os.cpu_count() or 1) // config.client.threads)
    return min(wanted, config.num_clients)


END_S = 3.0
"""Seconds that the processes of Ray have to end by themselves."""


class SimulationEngine:
    """Flower's simulation engine with its nodes, started and stopped as a context manager.

    Args:
        config: The run.
        run_config: What each node's context holds.
    """

    def __init__(self, config: Config, run_config: UserConfig) -> None:
        # Ray reads these when it is imported. Without the first, a worker in a project with uv
        # builds an environment of its own; with the second, it sees the GPUs that we see.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        from flwr.server.superlink.fleet.vce import vce_api
        from flwr.server.superlink.linkstate import InMemoryLinkState, LinkStateFactory
        from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
        from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
        from flwr.supercore.object_store import ObjectStoreFactory
        from flwr.superlink.federation import NoOpFederationManager
        from flwr.superlink.grid import InMemoryGrid

        self._config = config
        self._states = LinkStateFactory(
            FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()
        )
        run = Run.create_empty(run_id=secrets.randbits(62))
        run.federation_id, run.primary_task_id = NOOP_FEDERATION_ID, 1
        identify_process(run.run_id)
        state = cast(InMemoryLinkState, self._states.state())
        state.run_ids[run.run_id] = RunRecord(run=run)
        state.task_store[1] = Task(task_id=1, run_id=run.run_id)
        self._nodes = vce_api._register_nodes(config.num_clients, self._states)
        self._stores = vce_api._register_node_info_stores(self._nodes, run)
        for store in self._stores.values():
            info = store.run_infos[run.run_id]
            info.initial_run_config = dict(run_config)
            info.context.run_config = dict(run_config)
        inner = InMemoryGrid(self._states)
        inner.set_run(run)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._backend: RayBackend | None = None
        # Ray keeps its sockets and logs there; the path of a socket must be short.
        self._folder = tempfile.mkdtemp(prefix="fedsys-ray-")
        self._thread = threading.Thread(target=self._run, name="simulation-engine", daemon=True)
        self._grid = EngineGrid(inner, self._nodes, self._check)

    def __enter__(self) -> EngineGrid:
        self._others = _children()
        try:
            self._started_ray = _start_ray(workers(self._config), self._folder)
        except Exception as error:  # Ray raises errors of many kinds
            shutil.rmtree(self._folder, ignore_errors=True)
            raise RuntimeFailure(f"Ray does not start: {error}; try runtime=local") from error
        self._thread.start()
        return self._grid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stop.set()
        if error is not None:
            self._kill_busy()
        started = _children() - self._others
        self._thread.join()
        if self._started_ray:
            alive = psutil.wait_procs(started, END_S)[1]
            for process in alive:  # on a busy machine, Ray's processes outlive it by many seconds
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, END_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _kill_busy(self) -> None:
        """End the processes that are at a message; the engine would let them finish it."""
        import ray

        pool = None if self._backend is None else self._backend.pool
        for actor in [] if pool is None else list(pool._future_to_actor.values()):
            ray.kill(cast(Any, actor))

    def _run(self) -> None:
        from flwr.server.superlink.fleet.vce import vce_api
        from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
        from flwr.server.superlink.fleet.vce.metrics import VceMetrics

        def start() -> RayBackend:  # takes the Ray that runs
            self._backend = RayBackend({"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
            return self._backend

        # The engine logs each error with its traceback, also those that reach the server app as
        # an error reply or this class as an exception.
        flower = logging.getLogger("flwr")
        level = flower.level
        flower.setLevel(logging.CRITICAL + 1)
        try:
            vce_api.run_api(
                # Ray's processes get this function by its name instead of the pickled app.
                functools.partial(load_client, self._config.apps.client),
                start,
                self._nodes,
                self._states,
                self._stores,
                self._stop,
                VceMetrics(),
            )
        except BaseException as failure:  # told by the main thread, which waits for replies
            self._failure = failure
        finally:
            flower.setLevel(level)

    def _check(self) -> None:
        """Raise what ended the engine, if it has ended."""
        if self._failure is not None:
            cause = self._failure.__cause__ or self._failure
            raise RuntimeFailure(
                f"Flower's simulation engine failed: {cause}; "
                f"try runtime.workers=1, or runtime=local"
            ) from self._failure


def _children() -> set[psutil.Process]:
    """Return the processes that this one and its children have started."""
    return set(psutil.Process().children(recursive=True))


def _start_ray(num_cpus: int, folder: str) -> bool:
    """Start Ray without letting it take over signals; return whether it did not run already.

    Its own handlers print a stack for SIGTERM and end the process, past every clean-up here.
    """
    import ray

    if ray.is_initialized():
        return False
    home = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([home, *sys.path])  # for Ray's processes
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    ray.init(
        num_cpus=num_cpus,
        include_dashboard=False,
        logging_level=logging.CRITICAL,
        log_to_driver=False,
        _temp_dir=folder,
    )
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return True


class EngineGrid(GridAround):
    """The grid of the engine: Flower's in-memory grid, which also hears when the engine ends.

    Args:
        inner: Flower's grid.
        nodes: The partition id of each node.
        check: Raises if nobody will answer any more.
    """

    def __init__(self, inner: Grid, nodes: Mapping[int, int], check: Any) -> None:
        super().__init__(inner)
        self._nodes, self._check = nodes, check

    def partition_ids(self) -> Mapping[int, int]:
        """Return the partition id of each node, so that nobody has to be asked for it."""
        return self._nodes

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes in the order of their partition ids."""
        return list(self._nodes)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on what is there.

        Raises:
            RuntimeFailure: The engine has broken down.
        """
        self._check()
        return self.inner.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies that arrive within `timeout` seconds.

        Raises:
            RuntimeFailure: The engine has broken down.
        """
        waiting = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting:
            arrived = list(self.pull_messages(waiting))
            replies += arrived
            pulse().client_done(len(arrived))
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            if deadline is not None and time.monotonic() > deadline:
                break
            if waiting and not arrived:
                time.sleep(POLL_S)
        return replies
