import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest

from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.faults import (
    KINDS,
    DeviceKilled,
    Doom,
    Fault,
    Faults,
    check,
    encode,
    from_json,
    out_of_reach,
    struck_before,
    to_json,
)

SERVER = Fault("server_killed", round=3, position="after_train")
DEVICE = Fault("device_killed", round=2, who=1, step=4, position="after")


def test_a_fault_without_position_strikes_at_the_first_of_its_kind():
    (server, device) = check(
        [Fault("server_killed", 1), Fault("device_killed", 1, who=0)], rounds=1, num_clients=1
    )
    assert server.position == "after_train"
    assert device.position == "before"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("server_kiled", 1), "faults.list[0].kind=server_kiled: must be one of"),
        (Fault("server_kiled", 1), "did you mean 'server_killed'?"),
        (Fault("server_killed", 0), "faults.list[0].round=0: must be at least 1"),
        (Fault("server_killed", 5), "faults.list[0].round=5: must not exceed rounds=4"),
        (Fault("server_killed", 1, step=2), "step=2: must be null"),
        (Fault("server_killed", 1, position="x"), "position=x: must be one of after_train"),
        (Fault("device_killed", 1, who=0, step=-1), "step=-1: must not be negative"),
        (Fault("device_killed", 1), "who=None: must be the partition id of a client, 0 to 2"),
        (Fault("device_killed", 1, who=3), "who=3: must be the partition id of a client, 0 to 2"),
    ],
)
def test_a_fault_that_can_never_strike_is_refused_by_name(fault, words):
    with pytest.raises(ConfigError) as raised:
        check([fault], rounds=4, num_clients=3)
    assert words in str(raised.value)


def test_the_same_fault_twice_is_refused():
    with pytest.raises(ConfigError, match="must not be listed twice"):
        check([SERVER, dataclasses.replace(SERVER, position="")], rounds=4, num_clients=3)


def test_a_fault_is_due_only_where_and_when_it_says():
    faults = Faults([DEVICE])
    assert faults.due("device_killed", who=1, round=2, step=4, position="after") == DEVICE
    assert faults.due("device_killed", who=1, round=2, step=4) == DEVICE
    for other in (
        {"who": 0, "round": 2, "step": 4},
        {"who": 1, "round": 1, "step": 4},
        {"who": 1, "round": 2, "step": 3},
        {"who": 1, "round": 2},
        {"who": 1, "round": 2, "step": 4, "position": "before"},
    ):
        assert faults.due("device_killed", **other) is None
    assert faults.due("server_killed", who=1, round=2, step=4) is None


def test_a_fault_strikes_once_and_is_recorded_before_it_does():
    recorded = []
    faults = Faults([SERVER, DEVICE], record=recorded.append)
    faults.fire(DEVICE)
    faults.fire(DEVICE)
    assert recorded == [DEVICE]
    assert faults.due("device_killed", who=1, round=2, step=4) is None
    assert faults.of_round("device", 2) == []
    assert [f["fired"] for f in faults.report()] == [False, True]


def test_a_report_holds_kind_who_round_step_and_fired():
    (entry,) = Faults([DEVICE], fired=[DEVICE]).report()
    keys = {"kind": "device_killed", "who": 1, "round": 2, "step": 4, "fired": True}
    assert entry == keys | {"position": "after", "seconds": None}


def test_a_run_fails_when_a_fault_did_not_strike():
    faults = Faults([SERVER, DEVICE], fired=[SERVER])
    with pytest.raises(RuntimeFailure, match=r"device_killed \(who 1, round 2, step 4, after\)"):
        faults.check_all_fired()
    faults.fire(DEVICE)
    faults.check_all_fired()


def test_faults_of_former_lists_do_not_count_as_fired():
    assert Faults([DEVICE], fired=[SERVER]).report()[0]["fired"] is False


def test_a_continued_run_meets_again_what_struck_a_device_in_a_round_that_is_played_again():
    events = [
        {"kind": "fault", "fault": dataclasses.asdict(DEVICE)},
        {"kind": "client_lost", "client": 1},
        {"kind": "fault", "fault": dataclasses.asdict(SERVER)},
    ]
    assert struck_before(events, after_round=1) == (SERVER,)
    assert struck_before(events, after_round=2) == (DEVICE, SERVER)


def test_faults_survive_as_text():
    assert from_json(to_json([SERVER, DEVICE])) == (SERVER, DEVICE)


def test_a_device_in_the_servers_process_dies_by_an_error():
    doom = Doom.of(encode([DEVICE]))
    doom.reach("before", 4)
    doom.reach("after", 3)
    doom.reach("after")
    with pytest.raises(DeviceKilled, match="device_killed"):
        doom.reach("after", 4)


def test_a_message_without_faults_dooms_nobody():
    Doom.of(None).reach("before")


def test_a_device_in_a_process_of_its_own_dies_by_sigkill():
    fields = json.dumps({"list": to_json([DEVICE]), "server": "another:1"})
    code = (
        "import json, sys; from fedsys.faults import Doom;"
        "Doom.of(json.loads(sys.argv[1])).reach('after', 4)"
    )
    ended = subprocess.run([sys.executable, "-c", code, fields], check=False, env=os.environ)
    assert ended.returncode == -signal.SIGKILL


def test_the_server_is_killed_only_where_its_fault_says():
    code = (
        "from fedsys.faults import Fault, Faults;"
        "f = Faults([Fault('server_killed', 2, position='after_train')],"
        " record=lambda fault: print('recorded', flush=True));"
        "f.kill_server(1, 'after_train'); f.kill_server(2, 'before_train');"
        "print('alive', flush=True); f.kill_server(2, 'after_train')"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.PIPE)
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout.split() == [b"alive", b"recorded"]


def test_every_kind_has_a_position():
    assert all(kind.positions for kind in KINDS.values())


def test_a_fault_behind_the_last_step_of_whom_it_strikes_is_told():
    edge = Fault("edge_killed", 1, who="edge-0", step=9, position="after_step")
    faults = [DEVICE, edge, SERVER]
    assert out_of_reach(faults, [10, 5]) == []
    (device,) = out_of_reach(faults, [10, 4])
    assert device == (
        "device_killed (who 1, round 2, step 4, after) is without effect: "
        "client 1 has 4 steps in a round"
    )
    assert len(out_of_reach(faults, [9, 5])) == 1 and len(out_of_reach(faults, [9, 4])) == 2
