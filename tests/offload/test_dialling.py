import math

import pytest

from fedsys.config import NetworkConfig, options_of
from fedsys.errors import ConfigError, LinkClosed, SecurityError
from fedsys.faults import AT_EDGE, KINDS, Fault, check
from fedsys.offload.dialling import Dialler, dialler_of, link_fault
from fedsys.planning.hardware import hardware, link_of
from fedsys.planning.traces import network_of
from fedsys.training.federation import federation, layered_model
from fedsys.transport.addresses import dial, serve
from fedsys.transport.link_around import LinkAround
from fedsys.transport.security import Authority
from fedsys.transport.shaping import Shaped
from fedsys.transport.wire import Frame


@pytest.fixture
def echo():
    """An address whose server answers every frame with the same frame."""

    def answer(link):
        while True:
            link.send(link.recv())

    server = serve("memory://echo-for-dialling", answer)
    yield server.address
    server.stop()


def bare(address, credentials):
    return dial(address, credentials=credentials)


def activation(step, piece=0):
    return Frame("activation", {"step": step, "piece": piece})


def cut(position, seconds=0.0):
    return Fault("link_cut", 1, 0, 2, position, seconds)


def test_a_device_without_faults_gets_the_bare_link(echo):
    connected = Dialler(connect=bare)(echo)
    assert type(connected) is type(dial(echo))


def test_a_wrapper_of_the_users_is_around_what_shapes_and_within_what_strikes(echo, configure):
    shaped = network_of(configure("network=4g").network)
    connected = Dialler(
        faults=[cut("before_send")], network=shaped, around=LinkAround, connect=bare
    )(echo)
    assert type(connected.inner) is LinkAround and type(connected.inner.inner) is Shaped


def test_a_wrapper_without_a_path_is_refused(configure):
    with pytest.raises(ConfigError, match=r"link\.around={'x': 1}: must have a _target_"):
        configure("+link.around={x: 1}")


def test_a_fault_strikes_the_first_piece_of_its_step_and_no_other_frame(echo):
    dialler = Dialler(faults=[cut("before_send")], connect=bare)
    link = dialler(echo)
    for frame in (activation(1), activation(2, piece=1), Frame("norms", {"step": 2})):
        link.send(frame)
        assert link.recv().kind == frame.kind
    assert dialler.struck == []
    with pytest.raises(LinkClosed):
        link.send(activation(2))
    assert dialler.struck == [cut("before_send")]
    again = dialler(echo)
    again.send(activation(2))
    assert again.recv().meta["step"] == 2


def test_a_fault_whose_link_is_lost_first_strikes_on_the_next_one(echo):
    dialler = Dialler(faults=[cut("before_receive")], connect=bare)
    link = dialler(echo)
    link.send(activation(2))
    link.close()
    assert dialler.struck == []
    again = dialler(echo)
    again.send(activation(2))
    with pytest.raises(LinkClosed):
        again.recv()
    assert dialler.struck == [cut("before_receive")]


def test_a_cut_link_stays_cut_for_the_seconds_of_its_fault(echo):
    now = 100.0
    dialler = Dialler(faults=[cut("after_send", 3.0)], connect=bare, clock=lambda: now)
    dialler(echo).send(activation(2))
    now = 102.9
    with pytest.raises(LinkClosed, match="no connection"):
        dialler(echo)
    now = 103.0
    assert dialler(echo) is not None


def test_faults_at_the_edge_are_none_of_the_devices_business(echo):
    dialler = Dialler(faults=[cut(position) for position in AT_EDGE], connect=bare)
    link = dialler(echo)
    link.send(activation(2))
    assert link.recv().kind == "activation"


def test_every_position_on_the_device_has_its_link_fault():
    for kind, about in KINDS.items():
        for position in set(about.positions) - set(AT_EDGE) if about.target == "link" else ():
            (fault,) = check(
                [Fault(kind, 1, 0, position=position)], rounds=1, num_clients=1, edges=["a"]
            )
            assert link_fault(fault).direction == ("recv" if "receive" in position else "send")


@pytest.mark.parametrize("name", options_of("network"))
def test_every_network_has_rates_and_says_where_they_come_from(name, configure):
    network = configure(f"network={name}").network
    shaped = network_of(network)
    assert network.name == name
    if name == "none":
        assert (shaped.up_bits_s, shaped.down_bits_s, shaped.latency_s) == (math.inf, math.inf, 0)
    else:
        assert network.source
        assert shaped.up_bits_s <= shaped.down_bits_s


def test_a_trace_is_given_in_mbit_per_second(configure):
    network = network_of(configure("network=4g", "network.trace=[[5,1,2],[6,3,4]]").network)
    assert network.up.starts_s == (0.0, 5.0, 6.0)
    assert network.up.bits_s == (10e6, 1e6, 3e6)
    assert network.down.bits_s == (25e6, 2e6, 4e6)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("network.trace=[[1,2]]", r"network.trace, row=.*must be \[second, up, down\]"),
        ("network.up_mbit_s=0", "network.up_mbit_s=0.0: must be above 0; null for no limit"),
        ("network.latency_ms=-1", "network.latency_ms=-1.0: must not be negative"),
        ("network=6g", "network=6g: no such choice; known are 4g, 4g_plus"),
    ],
)
def test_a_network_that_cannot_be_is_refused(override, words, configure):
    with pytest.raises(ConfigError, match=words):
        configure("network=4g" if "." in override else override, override)


def test_links_are_shaped_only_if_emulation_was_asked_for(echo, configure):
    assert not isinstance(dialler_of(configure("network=wifi"), {})(echo), Shaped)
    emulated = configure("network=wifi", "network.emulate=true")
    assert isinstance(dialler_of(emulated, {})(echo), Shaped)


def test_a_nodes_own_credentials_come_before_those_of_the_run(tmp_path, configure):
    authority = Authority.create()
    for name in ("run", "node"):
        authority.issue(name).save(tmp_path / name)
    config = configure(f"link.credentials={tmp_path / 'run'}")
    seen = []
    for node_config in ({}, {"credentials": str(tmp_path / "node")}):
        dialler = dialler_of(config, node_config)
        dialler._connect = lambda address, credentials: seen.append(credentials.name)
        dialler("grpc://10.0.0.1:1")
    assert seen == ["run", "node"]


def test_missing_credentials_are_said_before_anything_is_dialled(tmp_path, configure):
    with pytest.raises(SecurityError, match="issue credentials first"):
        dialler_of(configure(), {"credentials": str(tmp_path / "nowhere")})


def test_the_default_network_is_none(configure):
    assert configure().network == NetworkConfig()


LINKS = "fleet.links=[{name: near, up_mbit_s: 40, down_mbit_s: 50}, {up_mbit_s: 2, down_mbit_s: 4}]"


def test_planner_clock_and_emulation_know_one_link_of_each_device(configure, echo):
    """Links were emulated by ``network=`` and planned by ``fleet.links``, whatever it was."""
    config = configure("fleet=nominal", LINKS, "num_clients=3", "network.emulate=true")
    fed = federation(config)
    layers = layered_model(config, fed.dataset.input_shape, fed.dataset.num_classes)
    planned = hardware(config, layers)
    assert [network.up_bits_s for network in planned.networks] == [40e6, 2e6, 40e6]
    for partition, network in enumerate(planned.networks):
        assert dialler_of(config, {"partition-id": partition})._network == network


def test_a_network_that_is_chosen_comes_before_the_links_of_a_fleet(configure):
    """A fleet file with links went over ``network=4g``, and `fedsys plan` said "4g"."""
    chosen = configure("fleet=nominal", LINKS, "network=4g")
    assert {link_of(chosen, k).name for k in range(3)} == {"4g"}
    own = configure("fleet=nominal", LINKS)
    assert [link_of(own, k).up_mbit_s for k in range(3)] == [40, 2, 40]
