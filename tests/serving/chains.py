"""Chains of hosts in this process, for tests."""

from contextlib import ExitStack, contextmanager

import torch

from fedsys.config import compose_text, parse
from fedsys.models import build, layered
from fedsys.partition.host import HostServer
from fedsys.partition.problem import RAW, Partition
from fedsys.partition.remote_host import RemoteHost
from fedsys.serving.chain import Chain, ChainEngine
from fedsys.serving.chain_parts import StageBuilder, UnitParts
from fedsys.serving.engine import Card

SHAPE = (3, 16, 16)
CARD = Card(tuple(f"class {i}" for i in range(10)), SHAPE, (0.5,) * 3, (0.25,) * 3, "pytorch")
NAMES = ("device", "edge", "cloud")


def model(name="vgg5", seed=0):
    config = parse(compose_text(f"model={name}"))
    return build(config.model, input_shape=SHAPE, num_classes=10, seed=seed).eval()


def cut(*cuts, codec=RAW):
    return Partition(tuple(cuts), (codec,) * len(cuts))


def images(rows=2, seed=0):
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))


@contextmanager
def three_hosts(address="memory", **more):
    """Yield servers and their controllers' ends."""
    with ExitStack() as stack:
        servers, remotes = [], []
        for index, name in enumerate(NAMES):
            place = f"memory://{name}-{id(stack)}" if address == "memory" else address
            server = HostServer(name, place, StageBuilder(), control_token="secret", **more)
            stack.callback(server.stop)
            remote = RemoteHost(f"hosts.list[{index}]", name, server.address, token="secret")
            stack.callback(remote.close)
            servers.append(server)
            remotes.append(remote)
        yield servers, remotes


@contextmanager
def chain_of_three(net=None, first=None, way="beside", address="memory", spawn=None, **more):
    net = model() if net is None else net
    with three_hosts(address, spawn=spawn) as (servers, remotes):
        chain = Chain(remotes, UnitParts(layered(net, SHAPE), SHAPE), token="secret")
        engine = ChainEngine(chain, CARD, first or cut(1, 2), way, **more)
        try:
            yield engine, servers
        finally:
            engine.close()
