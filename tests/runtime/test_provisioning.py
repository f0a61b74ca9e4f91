"""A fleet is one file; each machine gets what it needs, and no more."""

import stat

import pytest
import yaml

from fedsys.errors import ConfigError
from fedsys.main import main
from fedsys.runtime.fleet_files import DeviceBundle, EdgeBundle, read_bundle, read_fleet
from fedsys.runtime.machines import device_programs
from fedsys.runtime.provisioning import provision
from fedsys.transport.security import Credentials, check

FARM = {
    "name": "farm",
    "server": {"hosts": ["superlink.example", "10.0.0.1"], "folder": "/srv/fedsys"},
    "edges": [
        {"name": "edge-a", "hosts": ["edge-a.example"]},
        {"name": "edge-b", "hosts": ["::1"]},
    ],
    "devices": [{"data": "/srv/images"}, {}, {}, {}],
}


@pytest.fixture
def written(tmp_path):
    """Return what writes a fleet file and its bundles."""

    def write(**changed):
        file = tmp_path / "farm.yaml"
        file.write_text(yaml.safe_dump({**FARM, **changed}))
        return provision(read_fleet(file), tmp_path / "farm")

    return write


def test_four_devices_and_two_edge_servers_are_six_copies_of_a_few_files(written, tmp_path):
    made = written()
    assert list(made) == ["server", "edge-a", "edge-b", *(f"device-{i}" for i in range(4))]
    about, folder = read_bundle(made["device-0"], DeviceBundle)
    assert about == DeviceBundle("device-0", 0, "superlink.example:8000", "/srv/images", 0.5)
    assert {file.name for file in folder.iterdir()} == {
        "device.yaml", "ca.pem", "cert.pem", "key.pem", "node-key", "node-key.pub",
    }  # fmt: skip
    assert read_bundle(made["edge-b"], EdgeBundle)[0].address == "tcp://0.0.0.0:9443"
    for name, role in {"server": "server", "edge-a": "both", "device-3": "client"}.items():
        check(Credentials.load(made[name], role=role), role=role)
    assert Credentials.load(made["device-3"]).name == "device-3"
    assert Credentials.load(made["server"] / "link").name == "server"
    run = yaml.safe_load((made["server"] / "conf/experiment/farm.yaml").read_text())
    assert run["fleet"]["edges"][1]["address"] == "tcp://[::1]:9443"
    assert run["runtime"]["root_certificates"] == "/srv/fedsys/ca.pem" and run["num_clients"] == 4


def test_private_keys_are_for_their_owner_and_stay_on_one_machine(written, tmp_path):
    written()
    seen = {}
    for file in (tmp_path / "farm").rglob("*"):
        mode = stat.S_IMODE(file.stat().st_mode)
        if file.is_dir():
            assert mode == 0o700, file
        elif b"PRIVATE KEY" in (content := file.read_bytes()) or file.suffix == ".secret":
            assert mode == 0o600, file
            assert content not in seen, (file, seen[content])
            seen[content] = file
    assert len(seen) == 1 + 3 + 2 + 4 * 2  # authority; server; edge servers; devices


def test_once_more_adds_machines_renews_certificates_and_keeps_what_nodes_are_known_by(written):
    before = written()
    node, cert = (before["device-1"] / name for name in ("node-key", "cert.pem"))
    key, certificate = node.read_bytes(), cert.read_bytes()
    ca = (before["server"] / "ca.pem").read_bytes()
    after = written(devices=5)
    assert "device-4" in after and node.read_bytes() == key
    assert cert.read_bytes() != certificate and (after["device-4"] / "ca.pem").read_bytes() == ca
    assert len(list((after["server"] / "nodes").glob("*.pub"))) == 5


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"devices": 0}, "devices=0: must be at least one"),
        ({"server": {"hosts": []}}, r"server\.hosts=\[\]: must name at least one"),
        ({"server": {"hosts": ["a"], "port": 70000}}, "must be a port"),
        ({"edges": [{"name": "server", "hosts": ["a"]}]}, "not the name of another part"),
        ({"edges": [{"name": "../x", "hosts": ["a"]}]}, "must be of small letters"),
        ({"edges": [{"name": "e", "hosts": ["a"]}] * 2}, "must differ"),
        ({"devises": 4}, "devises: no such option; did you mean 'devices'"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused_in_a_sentence(written, tmp_path, changed, rule):
    with pytest.raises(ConfigError, match=rf"farm\.yaml: .*{rule}"):
        written(**changed)
    assert not (tmp_path / "farm").exists()


def test_the_command_says_what_to_copy_where_and_a_unit_starts_it(written, tmp_path, capsys):
    made = written()
    assert main(["provision", str(tmp_path / "farm.yaml")]) == 0
    out = capsys.readouterr().out
    assert f"{made['edge-a']}: copy it to edge-a, and there: fedsys edge edge.bundle=edge-a" in out
    assert main(["device", str(made["device-1"]), "unit=true"]) == 0
    unit = capsys.readouterr().out
    assert f"device {made['device-1']} state=/var/lib/fedsys" in unit and "Restart=always" in unit
    assert main(["device", str(made["server"])]) == 2
    assert "with device.yaml; there is server.yaml" in capsys.readouterr().err
    assert main(["device", str(made["device-1"]), "stat=/x"]) == 2
    assert "did you mean 'state'" in capsys.readouterr().err
    assert main(["device", str(made["device-0"])]) == 2
    assert "data=/srv/images: must be a folder of images" in capsys.readouterr().err
    assert main(["provision"]) == 2 and "fleet.yaml" in capsys.readouterr().err


def test_a_device_tells_its_node_who_it_is(written, tmp_path):
    about, folder = read_bundle(written()["device-0"], DeviceBundle)
    node, executor = device_programs(about, folder, tmp_path / "state")
    asked = dict(zip(node.command, node.command[1:], strict=False))
    assert asked["--superlink"] == "superlink.example:8000"
    assert asked["--node-config"] == (
        f'partition-id=0 credentials="{folder}" data-root="/srv/images"'
    )
    assert stat.S_IMODE((tmp_path / "state/executors.secret").stat().st_mode) == 0o600
    assert "--insecure" in executor.command  # on loopback, by a secret
