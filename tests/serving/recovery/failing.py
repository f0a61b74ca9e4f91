"""Chains of hosts in this process that can be killed, paused, cut off and started again."""

import threading
from contextlib import ExitStack, contextmanager

from fedsys.models import layered
from fedsys.partition import host as host_module
from fedsys.partition.data_link import CONNECT_S
from fedsys.partition.host import HostServer
from fedsys.partition.problem import Host, Problem
from fedsys.partition.remote_host import RemoteHost
from fedsys.planning.costs import MachineClass
from fedsys.serving.chain import Chain, ChainEngine, ChainOptions
from fedsys.serving.chain_parts import StageBuilder, UnitParts
from fedsys.serving.recovery.candidates import ModelWays, Planner
from fedsys.serving.recovery.continuer import Continuer, RecoveryOptions
from fedsys.serving.recovery.decision import RecoveryObjective
from fedsys.serving.recovery.detector import DetectorRules
from fedsys.serving.recovery.watch import HostWatch
from fedsys.transport.link_around import LinkAround
from fedsys.transport.network import Network
from tests.serving.chains import CARD, SHAPE, cut

QUICK = DetectorRules(interval_s=0.02, floor_s=0.3, dwell_s=0.1)


class Gates:
    """Which hosts let nothing in or out, by name."""

    def __init__(self):
        self._open = {}

    def of(self, name):
        if name not in self._open:
            self._open[name] = threading.Event()
            self._open[name].set()
        return self._open[name]

    def open(self):
        """Let all in and out: what a host held back in another thread would wait for ever."""
        for event in self._open.values():
            event.set()


class Gated(LinkAround):
    """A link of a host that stands still while its gate is closed, as a stopped process does."""

    def __init__(self, inner, gate):
        super().__init__(inner)
        self._gate = gate

    @property
    def ended(self):
        return self.inner.ended

    def admit(self, *, vital=False):
        self.inner.admit(vital=vital)

    def fail(self, reason):
        self.inner.fail(reason)

    def send_encoded(self, parts):
        self._gate.wait()
        super().send_encoded(parts)

    def recv(self, timeout_s=None):
        frame = super().recv(timeout_s)
        self._gate.wait()
        return frame


class Fleet:
    """Hosts of a chain, and what is done to them."""

    def __init__(self, names, stack):
        self.names, self._stack, self.servers, self.gates = names, stack, {}, Gates()
        self.place = f"{id(stack)}"
        for name in names:
            self.start(name)
        stack.callback(self.stop)

    def address(self, name):
        return f"memory://{name}-{self.place}"

    def start(self, name):
        gate, original = self.gates.of(name), host_module.serve

        def gated(address, handler, **more):
            return original(address, lambda link: handler(Gated(link, gate)), **more)

        host_module.serve = gated
        try:
            self.servers[name] = HostServer(
                name, self.address(name), StageBuilder(), control_token="secret"
            )
        finally:
            host_module.serve = original

    def kill(self, name):
        self.gates.of(name).set()
        server = self.servers.pop(name, None)
        if server is not None:
            server.stop()

    def pause(self, name):
        self.gates.of(name).clear()

    def resume(self, name):
        self.gates.of(name).set()

    def stop(self):
        for name in list(self.servers):
            self.kill(name)


def problem_for(layers, names):
    fast = Network(1e9, 1e9, 1e-4)
    costs = MachineClass("any", 1e10).costs(layers)
    hosts = tuple(Host(name, costs) for name in names)
    return Problem.of(layers, SHAPE, hosts, (fast,) * (len(names) - 1))


@contextmanager
def continuing(net, first, *, names=("device", "edge", "cloud"), ways=None, chains=None, **more):
    """Yield an engine that goes on when hosts of its fleet fail.

    `chains` are the ways beside the whole model, as chains of units by name.
    """
    layers = layered(net, SHAPE)
    every = {"": layers, **(chains or {})}
    parts = {way: UnitParts(chain, SHAPE) for way, chain in every.items()}
    rules = more.pop("rules", QUICK)
    objective = more.pop("objective", RecoveryObjective())
    options = RecoveryOptions(rules, objective, more.pop("warm", RecoveryOptions.warm))
    with ExitStack() as stack:
        fleet = Fleet(names, stack)
        remotes = [
            RemoteHost(f"hosts.list[{i}]", name, fleet.address(name), token="secret")
            for i, name in enumerate(names)
        ]
        box = []
        watch = HostWatch(remotes, rules, lambda *told: box and box[0].heard(*told))
        connect_s = more.pop("connect_s", CONNECT_S)
        told = ChainOptions(more.pop("timeout_s", 20.0), lost=watch.lost, connect_s=connect_s)
        chain = Chain(remotes, parts[""], token="secret", options=told, ways=parts.__getitem__)
        engine = ChainEngine(chain, CARD, cut(*first))
        planner = Planner(lambda way: problem_for(every[way], names))
        continuer = Continuer(engine, planner, ways or ModelWays(), options, **more)
        box.append(continuer)
        continuer.start(watch)
        try:
            yield engine, fleet, continuer
        finally:
            continuer.close()
            fleet.gates.open()
            engine.close()
