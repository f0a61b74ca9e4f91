"""Traces of networks: what a file says is what planner, clock and links get."""

import itertools
import math
from collections import Counter
from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.config import compose_text, parse
from fedsys.errors import ConfigError
from fedsys.planning.hardware import network_for
from fedsys.planning.traces import PACKET_BYTES, network_of, packets, random_walk, steps, throttle
from fedsys.randomness import Address
from fedsys.transport.network import finish_time

SECONDS = "seconds,up,down\n0,10,20\n5,1,2\n"


@pytest.fixture
def network(configure, tmp_path):
    """Return the network of a device whose trace is in a file with this text."""
    count = itertools.count()

    def read(text, *overrides, device=0, machine=""):
        file = tmp_path / f"{next(count)}.txt"
        file.write_text(text)
        config = configure(f"network.trace={file}", *overrides)
        return network_of(config.network, device, machine, config.seed)

    return read


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (SECONDS, ()),
        ("0,10,20\n5,1,2\n", ()),
        ("100;10;20\n105;1;2\n", ()),  # measurements begin whenever their clock did
        ("# measured by bus\n\n0,10,20\n5,1,2", ()),
        ("Down,t,UL\n20,0,10\n2,5,1\n", ("network.columns={seconds: t, up: ul, down: down}",)),
    ],
)
def test_tables_of_throughput_are_read_with_and_without_names(network, text, overrides):
    read = network(text, *overrides)
    assert (read.up.starts_s, read.up.bits_s) == ((0.0, 5.0), (1e7, 1e6))
    assert (read.down.starts_s, read.down.bits_s) == ((0.0, 5.0), (2e7, 2e6))
    assert finish_time(0.0, 1e6, read.up) == pytest.approx(0.8)
    assert finish_time(4.2, 1e6 + 125_000, read.up) == pytest.approx(6.0)  # 8 Mbit, then 1


def test_a_period_lets_measurements_begin_anew(network):
    assert network(SECONDS, "network.period_s=10").up.period_s == 10.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0,1,2\n1,,2\n", "line 2=.*it has a hole"),
        ("0,1,2\n1,2\n", "line 2=.*it has a hole"),
        ("0,1,2\n1,nan,2\n", "line 2=.*it has a hole"),
        ("0,1,2\n1,-1,2\n", "line 2=-1.0: must not be a negative rate"),
        ("0,1,2\n3,1,2\n2,1,2\n", "line 3=2.0: must be later than 3 s"),
        ("0,1,2\n0,1,2\n", "line 2=0.0: must be later than 0 s"),
        ("time,up,down\n1,2,3\n", "network.columns=seconds: must be a column of"),
        ("seconds,up,down\n", "has a line of names only"),
        ("", "is empty"),
        ("0,1,2\n1,0,2\n", "must not stay at 0 for ever"),
        ("5\n3\n", "line 2=3: must not go back: 5 ms stands before it; sort"),
        ("1\n-4\n7\n", "line 2=-4: must be a whole millisecond"),  # once a hole of line 1
        ("1\nx\n7\n", "line 2=x: must be a whole millisecond"),
        ("0\n0\n", "its last line is the period"),
    ],
)
def test_a_trace_that_cannot_be_is_refused_by_its_line(network, text, said):
    with pytest.raises(ConfigError, match=said):
        network(text)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("network.trace=[[0,1,1],[3,null,2]]",), r"\[3, None, 2\]: must be \[second, up, down\]"),
        (("network.trace=[[0,1,1],[3,2]]",), r"\[3, 2\]: must be \[second, up, down\]"),
        (("network.trace=[[0,1,1],[3,-1,2]]",), r"\[3, -1, 2\]: must have no negative rate"),
        (("network.trace=[[0,1,1],[3,1,2],[2,1,2]]",), r"\[2, 1, 2\]: must be later than 3 s"),
        (("network.trace=[[[0,1,1]],[[0,2,2],[0,1,1]]]",), r"\[0, 1, 1\]: must be later than 0 s"),
        (("network.trace={machines: {pi4: a.csv}}",), "=pi4: must be a machine.*fleet=pi_lab"),
        (
            ("fleet=pi_lab", "network.trace={machines: {jetsom: a.csv}}"),
            "did you mean 'jetson'",
        ),
        (("network=wifi", "network.trace={generate: throttle}"), None),
        (("fleet=pi_lab", "network.trace={machines: {pi4: [[0,1,1]]}}"), None),
    ],
)
def test_rows_and_machines_that_cannot_be_are_refused_as_they_were_written(
    overrides, said, configure
):
    """Rows were refused in bits per second; a machine that no fleet has was left without trace."""
    with nullcontext() if said is None else pytest.raises(ConfigError, match=said):
        configure(*overrides)


def test_a_bad_file_is_refused_before_a_client_is_asked(configure, carry_out, tmp_path):
    """With policy=fixed each client failed with it, and the run with "none of 2 succeeded"."""
    (tmp_path / "bad.csv").write_text("0,1,2\n1,-1,2\n")
    config = configure(
        "data=synthetic", "data.examples=20", "data.test_examples=10", "num_clients=2",
        "policy=fixed", f"network.trace={tmp_path / 'bad.csv'}",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"line 2=-1\.0: must not be a negative rate"):
        carry_out(config)


def test_a_file_that_is_not_there_is_one_clear_error(configure, tmp_path):
    config = configure(f"network.trace={tmp_path / 'none.csv'}")
    with pytest.raises(ConfigError, match="must be a text file"):
        network_of(config.network)


schedules = st.lists(st.integers(0, 30), min_size=1, max_size=60).map(sorted)


@given(schedules.filter(lambda times: times[-1] > 0))
@settings(max_examples=200, deadline=None)
def test_a_schedule_of_packets_lets_each_pass_by_its_millisecond(times):
    """After each millisecond as many bytes have passed as Mahimahi would have let through."""
    rate = packets("trace", enumerate(times, 1))
    period = times[-1]
    counts = Counter(t or period for t in times)
    assert rate.period_s == period / 1e3
    passed = 0
    for t in range(1, 2 * period + 1):
        passed += counts[(t - 1) % period + 1]
        bits = rate.bits_until(t / 1e3)
        assert bits == pytest.approx(passed * PACKET_BYTES * 8, rel=1e-9, abs=1e-3)


def test_long_traces_cost_no_loop_over_their_pieces():
    """What a piece-by-piece sum gives, for a transfer over 20,000 pieces."""
    times = [t for t in range(1, 20_001) if t % 3]
    rate = packets("trace", enumerate(times, 1))
    nbytes = 1500.0 * 13_000
    assert finish_time(0.0, nbytes, rate) == pytest.approx(times[12_999] / 1e3)


def test_each_way_and_each_device_can_have_a_file_of_its_own(configure, tmp_path):
    (tmp_path / "a").write_text("0,1,2\n")
    (tmp_path / "b").write_text("0,3,4\n")
    a, b = tmp_path / "a", tmp_path / "b"
    both = configure(f"network.trace={{up: {a}, down: {b}}}")
    assert network_for(both, 0).up.bits_s + network_for(both, 0).down.bits_s == (1e6, 4e6)
    listed = configure(f"network.trace=[{a}, {b}]")
    assert [network_for(listed, k).up.bits_s for k in range(3)] == [(1e6,), (3e6,), (1e6,)]
    kinds = configure(
        "fleet=pi_lab", "network=wifi", f"network.trace={{machines: {{jetson: {b}}}}}"
    )
    assert [network_for(kinds, k).changes for k in range(5)] == [False, False, True, False, False]
    rows = configure("network.trace=[[[0,1,1]],[[0,2,2]]]")
    assert [network_for(rows, k).up.bits_s for k in range(2)] == [(1e6,), (2e6,)]


def test_where_no_rate_stands_beside_a_trace_its_first_ten_seconds_are_believed(network):
    assert network(SECONDS).up_bits_s == pytest.approx(5.5e6)
    assert network(SECONDS, "network=wifi").up_bits_s == 50e6


@given(st.integers(0, 2**32), st.floats(0.5, 5), st.floats(6, 100), st.floats(0.05, 2))
@settings(max_examples=50, deadline=None)
def test_a_random_walk_stays_within_its_bounds_and_repeats_with_its_seed(seed, low, high, change):
    walk = {"low_mbit_s": low, "high_mbit_s": high, "change": change, "length": 400.0}
    rows = random_walk(Address(seed, 3), **walk)
    assert len(rows) == 20
    assert all(low * 0.999 <= rate <= high * 1.001 for row in rows for rate in row[1:])
    assert rows == random_walk(Address(seed, 3), **walk)
    assert rows != random_walk(Address(seed, 4), **walk)


def test_steps_change_each_time():
    rows = steps(Address(1), levels_mbit_s=(75, 25, 5), every=10, length=200)
    assert len(rows) == 20
    assert all(a[1] != b[1] for a, b in itertools.pairwise(rows))


def test_throttles_go_round_as_in_the_experiment_of_fedadapt(configure):
    assert throttle(2, (75, 75), order=[2, 0]) == [(0, 75, 75), (50, 5, 5), (60, 75, 75)]
    config = configure(
        "network=wifi_75", "network.trace_by=rounds", "fleet=pi_lab",
        "network.trace={generate: throttle, order: [2, 0, 1, 3, 4]}",
    )  # fmt: skip
    rates = [[network_for(config, k).at(r).up_bits_s / 1e6 for r in (49, 50, 60)] for k in (0, 2)]
    assert rates == [[75, 75, 5], [75, 5, 75]]


@pytest.mark.parametrize(
    ("trace", "said"),
    [
        ("{generate: walk}", "network.trace.generate=walk: must be one of throttle, random_walk"),
        ("{generate: steps, every: 0}", "is not usable"),
        ("{generate: steps, pace: 3}", "is not usable"),
        ("{left: a, right: b}", "must name generate, machines, or up and down"),
        ("{generate: throttle}", "network.up_mbit_s=None: must be given with a throttle"),
    ],
)
def test_a_trace_that_is_drawn_in_no_known_way_is_refused(trace, said):
    config = parse(compose_text(f"'network.trace={trace}'"))
    with pytest.raises(ConfigError, match=said):
        network_of(config.network)


def test_an_outage_is_a_bit_a_second_where_times_must_stay_finite(network):
    assert network("0,0,1\n10,1,1\n").at(0.0, 5.0).up_bits_s == 1.0
    assert network("0,0,1\n10,1,1\n").at(5.0, 10.0).up_bits_s == pytest.approx(0.5e6)
    assert network("0,1,1\n").at(3.0, math.pi).up_bits_s == pytest.approx(1e6)


@pytest.mark.slow
def test_a_run_is_timed_by_the_trace_of_its_network_in_seconds_or_in_rounds(tmp_path, configure):
    """The first round is slow, the others are fast; the model is the same."""
    from fedsys.runs.folder import RunFolder
    from fedsys.runtime import run

    (tmp_path / "t.csv").write_text("0,0.5,0.5\n1,75,75\n")
    seconds = []
    for how in ("rounds", "seconds"):
        folder = tmp_path / how
        run(
            configure(
                "fleet=pi_lab", "policy=fixed", "policy.cut=0.5", "rounds=3", "num_clients=2",
                f"network.trace={tmp_path / 't.csv'}", f"network.trace_by={how}",
                f"run.dir={folder}",
            )
        )  # fmt: skip
        seconds.append([row["virtual_s"] for row in RunFolder.open(folder).rounds()])
    by_rounds, by_seconds = seconds
    assert by_rounds[0] > 5 * by_rounds[1] == pytest.approx(5 * by_rounds[2])
    assert by_seconds[0] < by_rounds[0]
    assert by_seconds[1:] == pytest.approx(by_rounds[1:])
