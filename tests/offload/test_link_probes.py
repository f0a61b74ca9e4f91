"""Devices without a session that measure their link: who may, what it costs, what is told."""

import pytest

from fedsys.errors import FedsysError, SecurityError
from fedsys.offload.edge import EdgeServer
from fedsys.offload.fleet import EdgeAddress, Fleet
from fedsys.offload.link_probes import QUESTIONS, LinkProbes, link_rate
from fedsys.transport.addresses import dial
from fedsys.transport.network import Network
from fedsys.transport.shaping import RealClock, Shaped
from fedsys.transport.wire import Frame
from strategies.policies.fixed import FixedPolicy

NBYTES = 8192


@pytest.fixture(params=["memory://edge-of-probes", "tcp://127.0.0.1:0", "grpc://127.0.0.1:0"])
def edge(request):
    server = EdgeServer("edge", request.param, control_token="t")
    yield server
    server.kill()


@pytest.fixture
def fleet(edge):
    with Fleet([EdgeAddress("edge", edge.address)], control_token="t") as fleet:
        yield fleet


def test_a_device_that_is_expected_measures_its_link_once(edge, fleet):
    fleet.expect("edge", "token")
    rate = link_rate([edge.address], "token", NBYTES, dial)
    assert rate is not None and rate.up_bits_s > 0 and rate.down_bits_s > 0
    assert rate.nbytes == 2 * NBYTES + 8
    assert link_rate([edge.address], "token", NBYTES, dial) is None
    assert edge.counters["refused_SecurityError"] == 1 and edge.sessions == []


def test_it_measures_the_rates_of_both_ways(edge, fleet):
    """A link that is shaped is never faster than that; how much slower is up to the machine."""
    fleet.expect("edge", "token")
    network = Network(2e6, 1e6, 0.001)
    rate = link_rate(
        [edge.address], "token", 1 << 16, lambda a: Shaped(dial(a), network, clock=RealClock())
    )
    assert rate is not None
    assert rate.up_bits_s < 1.5 * 2e6 and rate.down_bits_s < 1.5 * 1e6


@pytest.mark.parametrize("token", ["", "another"])
def test_nobody_else_is_answered(edge, fleet, token):
    fleet.expect("edge", "token")
    fleet.expect("edge", "")
    assert link_rate([edge.address], token, NBYTES, dial) is None
    assert edge.counters["refused_SecurityError"] == 1
    assert link_rate([edge.address, "memory://nowhere"], "token", NBYTES, dial) is not None


def test_where_no_edge_answers_nothing_is_known():
    assert link_rate(["memory://nowhere-of-probes", "tcp://127.0.0.1:1"], "t", NBYTES, dial) is None


class Questioner:
    """A link of somebody who asks for ever."""

    peer = ""

    def __init__(self, first):
        self.first, self.answers = first, 0

    def admit(self):
        pass

    def recv(self, timeout_s=None):
        return Frame("ask", {"reply": 10**12})

    def send(self, frame):
        self.answers += 1
        assert all(len(tensor) <= 1 << 20 for tensor in frame.tensors.values())


def test_a_token_ends_in_time_and_answers_are_few_and_small():
    now = [0.0]
    probes = LinkProbes(lambda: now[0])
    link = Questioner(Frame("measure", {"token": "a"}))
    probes.expect("a")
    probes.serve(link, link.first)
    assert link.answers == QUESTIONS + 1
    probes.expect("a")
    now[0] = 1e6
    with pytest.raises(SecurityError, match="no device with this token is expected"):
        probes.serve(link, link.first)


@pytest.mark.parametrize("link", ["memory", "tcp"])
def test_what_was_measured_is_told_in_the_observation(configure, carry_out, monkeypatch, link):
    def to_measure(self, state, clients):
        return {0: NBYTES}

    small = ("data=synthetic", "data.max_examples=120", "num_clients=2", "model.width=4",
             "model.hidden=16", "client.epochs=1", "rounds=1", "json=true")  # fmt: skip
    config = configure(*small, "policy=fixed", "policy.cut=4", f"link={link}")
    plain = carry_out(config)
    monkeypatch.setattr(FixedPolicy, "to_measure", to_measure, raising=False)
    probed = carry_out(config)
    seen = {k: probed.strategy.inner.seen_of(k) for k in (0, 1)}
    assert seen[0].up_bit_s > 0 and seen[0].down_bit_s > 0
    assert (seen[0].probe_bytes, seen[1].probe_bytes) == (2 * NBYTES + 8, 0)
    assert seen[1].up_bit_s == 0.0
    assert probed.sha256 == plain.sha256


def test_an_edge_that_does_not_know_probes_leaves_the_run_as_it_is(
    configure, carry_out, monkeypatch
):
    def refused(self, edge, token):
        raise FedsysError("not a request of a controller")

    small = ("data=synthetic", "data.max_examples=120", "num_clients=2", "model.width=4",
             "model.hidden=16", "client.epochs=1", "rounds=1", "json=true")  # fmt: skip
    config = configure(*small, "policy=fixed", "policy.cut=4")
    monkeypatch.setattr(
        FixedPolicy, "to_measure", lambda self, state, clients: {0: NBYTES}, raising=False
    )
    monkeypatch.setattr(Fleet, "expect", refused)
    assert carry_out(config).strategy.inner.seen_of(0).probe_bytes == 0
