"""A host that stands for a slower machine waits, and computes the same."""

import pytest
import torch
from torch import nn

from fedsys.errors import ConfigError
from fedsys.models import layered
from fedsys.partition import slowed
from fedsys.partition.host import HostServer
from fedsys.partition.remote_host import RemoteHost
from fedsys.partition.slowed import SlowedBuilder
from fedsys.serving.chain import Chain, ChainEngine
from fedsys.serving.chain_parts import StageBuilder, UnitParts
from tests.serving.chains import CARD, SHAPE, cut, images, model


class Doubling:
    """Makes one module, whatever is sent, and remembers what it frees."""

    def __init__(self):
        self.made, self.freed = nn.Hardtanh(-2.0, 2.0), []

    def build(self, body, tensors):
        return self.made

    def free(self, module):
        self.freed.append(module)


def test_a_slowed_module_waits_in_proportion_and_gives_the_same(monkeypatch):
    waits, clock = [], iter([10.0, 10.5])
    monkeypatch.setattr(slowed.time, "sleep", waits.append)
    monkeypatch.setattr(slowed.time, "perf_counter", lambda: next(clock))
    inner = Doubling()
    builder = SlowedBuilder(inner, 4.0)
    module = builder.build(b"", {}).eval()
    x = torch.tensor([-5.0, 1.0])
    assert torch.equal(module(x), inner.made(x))
    assert waits == [pytest.approx(1.5)]  # three times what it took
    builder.free(module)
    assert inner.freed == [inner.made]


def test_a_chain_with_a_slowed_host_gives_the_bits_of_the_whole_model():
    net, x = model(), images(2)
    slow = SlowedBuilder(StageBuilder(), 1.5)
    servers = [
        HostServer("device", "memory://slowed-device", slow, control_token="t"),
        HostServer("edge", "memory://slowed-edge", StageBuilder(), control_token="t"),
    ]
    remotes = [RemoteHost("x", one.name, one.address, token="t") for one in servers]
    parts = UnitParts(layered(net, SHAPE), SHAPE)
    engine = ChainEngine(Chain(remotes, parts, token="t"), CARD, cut(2))
    try:
        with torch.inference_mode():
            assert torch.equal(torch.from_numpy(engine.answer(x.numpy()).scores), net(x))
    finally:
        engine.close()
        for server in servers:
            server.stop()


@pytest.mark.parametrize("factor", [0.5, 5000])
def test_a_factor_out_of_range_is_refused(configure, factor):
    with pytest.raises(ConfigError, match=r"host.slower=.* must be from 1 to 1000"):
        configure(f"host.slower={factor}")
