"""From a configuration to a chain of hosts that answers: `fedsys serve` with ``hosts.list``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, final

from fedsys.config import Config, secret
from fedsys.errors import ConfigError, ModelError
from fedsys.models.layers import LayeredModel, layered
from fedsys.partition.conditions import Observer
from fedsys.partition.configured import hosts_of, traced_networks_of
from fedsys.partition.controller import MoveRules
from fedsys.partition.data_link import CONNECT_S
from fedsys.partition.finer_chain import finer_chain, finer_problem
from fedsys.partition.host import HostServer
from fedsys.partition.likely import likely
from fedsys.partition.pipeline import Lost
from fedsys.partition.planner import plan_partition
from fedsys.partition.problem import RAW, Partition, Problem
from fedsys.partition.remote_host import RemoteHost
from fedsys.pruning.portfolio import ONNX, PARENT, Portfolio
from fedsys.serving.chain import Chain, ChainEngine, ChainOptions
from fedsys.serving.chain_control import ChainControl
from fedsys.serving.chain_parts import StageBuilder
from fedsys.serving.portfolio import card_of
from fedsys.serving.recovery.opening import LookedAfter, OtherWays, model_of
from fedsys.serving.routes import WHOLE
from fedsys.transport.network import Network
from fedsys.transport.security import Credentials, new_token

_CONNECT_S = 2.0  # where another way is taken if a host stands still; a handshake is done by then


@final
class OpenedChain:
    """A chain that answers, and the host in this process, if one computes here.

    Args:
        config: ``hosts``, ``partition``, ``serving`` and ``network`` count.
        portfolio: Its variant ``serving.variant`` answers, or its parent.
        tell: Called with each change of cuts, and with what happens when hosts are lost.

    Attributes:
        engine: For the endpoint, which closes it.
        control: Decides on cuts; None where they stay.
        recovery: Looks after lost hosts; None where requests fail.
        layers: The model.
        began_s: When the traces of emulated links began, in seconds since 1970.

    Raises:
        ConfigError: A host cannot be reached, is of another version or arithmetic, or the cuts do
            not fit.
        ModelError: The variant cannot be cut or described.
        RuntimeFailure: A host refuses, or is lost.
    """

    def __init__(
        self,
        config: Config,
        portfolio: Portfolio,
        tell: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> None:
        name = config.serving.variant or PARENT
        if ONNX in portfolio.variant(name).files:
            raise ModelError(f"variant {name} is an ONNX file: it has no units to be cut between")
        shape = portfolio.about.input_shape
        module = model_of(config, portfolio, name)
        self._whole = layered(module, shape, fc_as_one=config.partition.fc_as_one)
        self.layers: LayeredModel = _divided(config, self._whole, shape)
        with ExitStack() as stack:
            hosts = _connect(config, stack)
            token, credentials = _proofs(config)
            self.recovery: LookedAfter | None = None
            if config.serving.recovery.enabled and len(hosts) > 1:
                self.recovery = LookedAfter(hosts, config, stack)
            ways = OtherWays(config, self.layers, portfolio, name, self._whole)
            self.began_s = time.time()
            chain = Chain(
                hosts,
                ways.parts(WHOLE),
                token=token,
                credentials=credentials,
                options=_options(config, self.recovery and self.recovery.watch.lost),
                ways=ways.parts,
            )
            first = first_partition(config, self._whole, self.layers, shape)
            problem = self._problem(config, shape)
            observer = None if problem is None else Observer(problem)
            seen = {} if observer is None else {"passed": observer.seen}
            card = card_of(portfolio)
            self.engine = ChainEngine(chain, card, first, config.hosts.way, name=name, **seen)
            if self.recovery is not None:
                self.recovery.look_after(self.engine, ways, tell)
            self.control: ChainControl | None = None
            if problem is not None and observer is not None:
                self.control = self._controlled(config, problem, observer, tell)
            self._rest = stack.pop_all()

    def _problem(self, config: Config, shape: tuple[int, ...]) -> Problem | None:
        """Return what is expected of the hosts; None if cuts stay, or no machines are named."""
        named = all(host.machine for host in config.hosts.list)
        if not config.hosts.adapt or not named or len(config.hosts.list) < 2:
            return None
        return finer_problem(config, self._whole, self.layers, shape)

    def _controlled(
        self, config: Config, problem: Problem, observer: Observer,
        tell: Callable[[Mapping[str, Any]], None],
    ) -> ChainControl:  # fmt: skip
        """Let cuts follow the conditions from now on."""
        rules = MoveRules(config.hosts.margin, config.hosts.dwell_s)
        ready = likely(problem, config.hosts.keep) if config.hosts.way == "warm" else ()
        self.engine.prepare(ready)
        control = ChainControl(self.engine, problem, rules, observer, tell, ready)
        self.engine.decided = lambda: control.last
        control.start(config.hosts.interval_s)
        return control

    def close(self) -> None:
        """End the engine, and the host in this process."""
        self.settle()
        self.engine.close()
        self.release()

    def settle(self) -> None:
        """Let cuts stay from now on: before the engine ends."""
        if self.control is not None:
            self.control.close()
        if self.recovery is not None:
            self.recovery.close()

    def release(self) -> None:
        """End the host in this process, after the engine."""
        self._rest.close()


def _proofs(config: Config) -> tuple[str, Credentials | None]:
    token = secret.control_token(config.hosts, "hosts")
    folder = config.hosts.credentials
    return token, None if folder is None else Credentials.load(Path(folder), role="client")


def _connect(config: Config, stack: ExitStack) -> list[RemoteHost]:
    token, credentials = _proofs(config)
    hosts = []
    for index, one in enumerate(config.hosts.list):
        path, address, own = f"hosts.list[{index}]", one.address, token
        if not address:
            own = new_token()
            here = HostServer(one.name, f"memory://{one.name}", StageBuilder(), control_token=own)
            stack.callback(here.stop)
            address = here.address
        remote = RemoteHost(
            path, one.name, address, token=own, credentials=credentials,
            other_arithmetic=config.hosts.other_arithmetic,
        )  # fmt: skip
        stack.callback(remote.close)
        hosts.append(remote)
    return hosts


def _options(config: Config, lost: Lost | None) -> ChainOptions:
    networks: tuple[Network | None, ...] = ()
    if config.hosts.emulate:
        networks = (None, *traced_networks_of(config))
    rows = sorted({1, config.serving.max_batch})
    timeout_s = config.serving.timeout_s
    connect_s = CONNECT_S if lost is None else _CONNECT_S
    return ChainOptions(timeout_s, tuple(rows), networks, time.monotonic(), lost, connect_s)


def _divided(config: Config, whole: LayeredModel, shape: tuple[int, ...]) -> LayeredModel:
    """Return the chain that is divided among the hosts.

    Raises:
        ConfigError: Several tensors may cross a cut, and exits are named.
    """
    several = config.partition.tensors > 1 or config.partition.solver == "min_cut"
    if several and config.serving.exits is not None:
        raise ConfigError.of(
            "partition.tensors", config.partition.tensors, "must be 1 with serving.exits, and the "
            "solver none of min_cut: an exit is where one tensor is alive",
        )  # fmt: skip
    return finer_chain(config, whole, shape)


def first_partition(
    config: Config, whole: LayeredModel, layers: LayeredModel, shape: tuple[int, ...]
) -> Partition:
    """Return the cuts to begin with: those that are given, or the planned ones.

    Args:
        config: ``hosts``, ``network`` and ``partition`` count.
        whole: The model as a chain that one tensor crosses.
        layers: The chain that is divided.
        shape: Of an image.

    Raises:
        ConfigError: None are given, and the hosts have no machines that could be planned for.
    """
    cuts, others = config.partition.cuts, len(config.hosts.list) - 1
    if cuts is not None:
        if len(cuts) != others:
            raise ConfigError.of("partition.cuts", list(cuts), f"must be {others}: one for each "
                                 "host but the first")  # fmt: skip
        inside = [0 < cut < len(layers) for cut in cuts]
        codec = config.partition.codecs[0]
        return Partition(tuple(cuts), tuple(codec if i else RAW for i in inside))
    if all(not host.machine for host in config.hosts.list):
        rule = "must be given where hosts.list names no machines to plan for"
        for_instance = ",".join(str((k + 1) * len(layers) // (others + 1)) for k in range(others))
        way_out = f"for instance partition.cuts=[{for_instance}], or a machine for each host, as "
        way_out += "hosts=device_edge_cloud has them"
        raise ConfigError.of("partition.cuts", None, rule, way_out)
    hosts_of(config, whole)
    problem = finer_problem(config, whole, layers, shape)
    return plan_partition(problem, config.partition.objective).best.partition
