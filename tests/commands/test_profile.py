"""``fedsys profile``: what it measures, and that a fleet file of it is used or refused."""

from __future__ import annotations

import json
import time

import pytest
import yaml

from fedsys.commands import profile as profile_command
from fedsys.commands import profile_link
from fedsys.commands.profile_link import answer, measure_link
from fedsys.config import compose_text, parse
from fedsys.errors import SecurityError
from fedsys.main import main
from fedsys.offload.processors import usable_cores
from fedsys.planning.costs import Crossing
from fedsys.transport.addresses import dial, serve
from fedsys.transport.link_rate import measure
from fedsys.transport.network import Network
from fedsys.transport.security import Authority
from fedsys.transport.shaping import Shaped


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile")
    arguments = ["model=cnn", f"run.dir={path}", "profile.repeats=3", "profile.name=bench"]
    assert main(["profile", *arguments]) == 0
    return path / "profile.yaml"


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_profile_has_seconds_of_each_unit_and_costs_of_messages(profiled):
    machine = yaml.safe_load(profiled.read_text())["machines"]["bench"]
    assert machine["rows"] == [2, 8, 32] and machine["batch_size"] == 32
    for table in (machine["forward_s"], machine["backward_s"]):
        assert len(table) == 3 and {len(row) for row in table} == {4}
        assert all(value >= 0 for row in table for value in row) and sum(table[-1]) > 0
    assert len(machine["update_s"]) == 4
    assert machine["load_s"] > 0 and machine["message_s"] > 0
    assert set(machine["byte_s"]) == {"fp32", "fp16", "bf16", "int8"}


def test_a_model_of_another_task_is_profiled_by_its_loss(tmp_path):
    """It ended in a traceback for models of language: their loss was that of classes."""
    given = ["data=text", "task=next_token", "model=gpt", "data.max_examples=20", "data.length=8",
             "client.batch_size=4", "num_clients=1", "profile.repeats=3"]  # fmt: skip
    assert main(["profile", *given, f"run.dir={tmp_path}", "profile.name=bench"]) == 0
    machine = yaml.safe_load((tmp_path / "profile.yaml").read_text())["machines"]["bench"]
    assert machine["rows"] == [2, 4] and sum(machine["backward_s"][-1]) > 0


def test_a_profile_says_how_sure_it_is_of_each_unit_and_how_it_was_made(profiled):
    """It had one spread for all, no bytes at cuts, no versions, and one worker on any machine."""
    text = profiled.read_text()
    machine = yaml.safe_load(text)["machines"]["bench"]
    for spread in (machine["forward_spread"], machine["backward_spread"]):
        assert len(spread) == 3 and {len(row) for row in spread} == {4}
        assert all(value >= 0 for row in spread for value in row)
    first = machine["bytes_at_cuts"][1]
    assert first["fp32"] == 2 * first["fp16"] and first["fp32"] > 3 * first["int8"] > 0
    assert machine["workers"] == usable_cores()  # one thread for each session
    assert machine["fedsys"] and machine["torch"] and len(machine["names"]) == 4
    assert (machine["threads"], machine["memory_format"]) == (1, "contiguous")
    assert "update_s: [" in text and len(text.splitlines()) < 50  # for people to read


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("client.threads=2", "fleet.machines.bench.threads=1: must be 2, client.threads of this"),
        ("client.memory_format=channels_last", "memory_format=contiguous: must be channels_last"),
        ("client.kernels=fused", "kernels=plain: must be fused"),
        ("client.precision=bf16", "precision=fp32: must be bf16"),
        ("fleet.machines.bench.fedsys=0.0.1", "bench.fedsys=0.0.1: must be "),
        ("model.norm=group", "a profile of another model"),
        ("model.norm=deferred", "a profile of another model"),
    ],
)
def test_a_profile_made_in_another_way_is_refused(profiled, capsys, argument, names):
    """One made with BatchNorm passed for GroupNorm, with one thread for two."""
    assert main(["plan", f"fleet={profiled}", argument]) == 2
    assert names in capsys.readouterr().err


def test_a_profile_is_a_fleet(profiled, capsys):
    assert main(["plan", f"fleet={profiled}", "network=wifi", "num_clients=2", "json=true"]) == 0
    found = last_line(capsys)
    assert [row["machine"] for row in found["devices"]] == ["bench", "bench"]
    assert found["predicted_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["model=cnn", "model.width=24"], "profile of another model or of another version"),
        (["model=vgg5"], "profile this one"),
    ],
)
def test_a_profile_of_another_model_or_version_is_refused(profiled, capsys, arguments, names):
    assert main(["plan", f"fleet={profiled}", *arguments]) == 2
    err = capsys.readouterr().err
    assert names in err and "fleet.machines.bench.units=" in err


def test_files_that_are_no_fleet_are_refused(tmp_path, capsys):
    assert main(["plan", f"fleet={tmp_path / 'none.yaml'}"]) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("[1]")
    assert main(["plan", f"fleet={tmp_path / 'list.yaml'}"]) == 2
    assert "must hold a mapping" in capsys.readouterr().err
    (tmp_path / "short.yaml").write_text("machines: {a: {rows: [1]}}\ndevices: [a]\nservers: [a]")
    assert main(["plan", f"fleet={tmp_path / 'short.yaml'}"]) == 2
    assert "fleet.machines.a.forward_s=None: must be given" in capsys.readouterr().err


def test_the_other_end_is_measured_over_the_link():
    server = serve("memory://profiled", answer)
    try:
        found = measure_link("memory://profiled", Crossing(256, 8), 16, 3)
    finally:
        server.stop()
    assert found.message_s > 0 and found.latency_s > 0
    assert found.up_bits_s > 0 and found.down_bits_s > 0


def test_a_rate_is_that_of_the_bytes_that_came(monkeypatch):
    """Answers are bounded: beyond, the downlink seemed faster than it is, 1.6 times for 105 MB."""
    monkeypatch.setattr(profile_link, "MOST", 1 << 16)
    server = serve("memory://bounded", answer)
    link = Shaped(dial("memory://bounded"), Network(down_bits_s=4e6))
    try:
        down = measure(link, 1 << 18, 3, 60.0).down_bits_s
    finally:
        link.close()
        server.stop()
    assert down < 8e6  # four times as fast, if it were divided by what was asked for


def test_whoever_answers_presents_the_certificate_of_a_server(tmp_path):
    """It read that of a client, so links with TLS could not be measured at all."""
    authority = Authority.create()
    authority.issue("edge-0", ["127.0.0.1"], role="server").save(tmp_path / "edge")
    authority.issue("device-0").save(tmp_path / "device")

    def credentials(folder, *more):
        words = [f"link.credentials={tmp_path / folder}", *more]
        return profile_command._credentials(parse(compose_text(" ".join(words))))

    own = credentials("edge", "profile.serve=grpc://127.0.0.1:0")
    server = serve("grpc://127.0.0.1:0", answer, credentials=own)
    try:
        found = measure_link(server.address, Crossing(64, 8), 2, 3, credentials("device"))
    finally:
        server.stop()
    assert found.message_s > 0
    with pytest.raises(SecurityError, match="not issued for the role 'server'"):
        credentials("device", "profile.serve=grpc://127.0.0.1:0")


def test_options_of_a_profile_are_checked(capsys, tmp_path):
    assert main(["profile", "profile.repeats=1", f"run.dir={tmp_path / 'x'}"]) == 2
    assert "profile.repeats=1: must be a whole number of at least 3" in capsys.readouterr().err
    assert main(["profile", "profile.quota=0", f"run.dir={tmp_path / 'x'}"]) == 2
    assert "profile.quota=0: must be cores" in capsys.readouterr().err


def test_within_a_quota_all_takes_as_much_longer(monkeypatch):
    """Processor time counts, over the quota: short operations were over before it was used up."""
    moments = iter([1.0, 1.25])
    monkeypatch.setattr(time, "process_time", lambda: next(moments))
    clock = profile_command.clock_of(1, "cpu", 0.1)
    assert -clock() + clock() == pytest.approx(2.5)
    assert profile_command.clock_of(1, "cpu", 4.0) is time.process_time
    assert profile_command.clock_of(1, "cpu", None) is time.process_time
    assert profile_command.clock_of(2, "cpu", None) is time.perf_counter
    assert profile_command.clock_of(1, "cuda", 0.1) is time.perf_counter


def test_one_thread_of_several_is_not_faster_for_a_quota_of_more_than_a_core(monkeypatch):
    """With two threads within 1.5 cores, loading, which one does, took two thirds of its time."""
    moments = iter([(0.0, 0.0), (5.0, 5.0), (8.0, 8.0), (11.0, 14.0)])  # waits, one, two threads
    current = [0.0, 0.0]

    def wall():
        current[:] = next(moments)
        return current[0]

    monkeypatch.setattr(time, "perf_counter", wall)
    monkeypatch.setattr(time, "process_time", lambda: current[1])
    clock = profile_command.clock_of(2, "cpu", 1.5)
    began, alone, both = clock(), clock(), clock()
    assert alone - began == pytest.approx(3.0)
    assert both - alone == pytest.approx(4.0)


def test_messages_within_a_quota_take_as_much_longer():
    costs = profile_link.LinkCosts(1e-4, {"fp32": 1e-9}, 1e6, 2e6, 0.01)
    assert costs.slower(10.0) == profile_link.LinkCosts(1e-3, {"fp32": 1e-8}, 1e6, 2e6, 0.01)


def test_a_piece_costs_what_its_units_and_messages_do_not(profiled):
    """Plans with many pieces were too good: a piece is computed with caches that others filled."""
    machine = yaml.safe_load(profiled.read_text())["machines"]["bench"]
    assert machine["operation_s"] >= 0 and "quota" not in machine


def test_messages_of_two_sizes_say_what_each_and_what_each_byte_costs():
    assert profile_link._line(1000, 3.0, 3000, 5.0) == (2.0, pytest.approx(0.001))
    assert profile_link._line(1000, 3.0, 3000, 2.0) == (3.0, 0.0)  # noise is no gain
    assert profile_link._line(1000, 1.0, 2000, 4.0) == (0.0, pytest.approx(0.003))
