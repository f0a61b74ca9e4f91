"""``fedsys device BUNDLE``: be a device of a provisioned fleet, until SIGTERM or Ctrl-C.

The bundle says where the server is, who this device is, and where its data are. Whatever ends of
it is started again, and a server that is away is dialled again, for ever.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsys.commands.arguments import Given
from fedsys.commands.machine_options import options_of, path_of, say
from fedsys.errors import ConfigError
from fedsys.runtime.fleet_files import DeviceBundle, read_bundle
from fedsys.runtime.machines import DEVICE, KeptPrograms, connected, device_programs, for_ever, keep

OPTIONS = ("state", "data", "unit")


def job(given: Given) -> Mapping[str, Any]:
    """Keep the programs of a device running.

    Once its server has let it in, it says so; with ``json=true`` as an object ``{"ready": …}`` on a
    line of its own.

    Args:
        given: What stands behind the verb: the bundle; ``state=`` for another folder than one in
            it, ``data=`` for another folder of images than the bundle names, and ``unit=true``,
            which prints a unit of systemd instead.

    Returns:
        ``device``: its name.

    Raises:
        ConfigError: The bundle or an option is not usable, or there are no such data.
        RunError: The folder of its state cannot be written to.
    """
    began = time.monotonic()
    options = options_of(given, OPTIONS, "device")
    folder = path_of(
        given, "device", "the bundle of a device", "fedsys device /etc/fedsys/device-0"
    )
    about, bundle = read_bundle(folder, DeviceBundle)
    data = options.get("data", about.data)
    if options.get("unit") == "true":
        more = [f"data={data}"] if "data" in options else []
        print(unit("device", f"Device {about.name} of fedsys", bundle, more), end="")
        return {"device": about.name}
    if data and not Path(data).is_dir():
        rule = "must be a folder of images on this device"
        raise ConfigError.of("data", data, rule, "data= names another, and data='' none")
    about = DeviceBundle(**{**vars(about), "data": data})
    state = Path(options.get("state") or bundle / "state").absolute()

    def attempt() -> None:
        programs = device_programs(about, bundle, state)
        (state / "node.log").write_bytes(b"")
        with KeptPrograms(programs, state, say, [DEVICE]) as kept:
            keep(kept, lambda: connected(kept.log("node")), told)

    def told() -> None:
        took = time.monotonic() - began
        if options.get("json") == "true":
            ready = {"device": about.name, "server": about.server, "pid": os.getpid()}
            print(json.dumps({"ready": {**ready, "seconds": round(took, 2)}}), flush=True)
        else:
            print(f"{about.name} is ready for {about.server} after {took:.1f} s", flush=True)

    try:
        for_ever(attempt, say, time.sleep)
    except KeyboardInterrupt:
        say(f"{about.name} leaves")
    return {"device": about.name}


def unit(verb: str, what: str, bundle: Path, more: list[str]) -> str:
    """Return a unit of systemd that does the same at every start of the machine.

    Args:
        verb: The command.
        what: Its description.
        bundle: Its folder.
        more: Further options.
    """
    program = [sys.executable, "-P", "-m", "fedsys.main", verb, str(bundle)]
    command = shlex.join([*program, "state=/var/lib/fedsys", *more]).replace("%", "%%")
    return f"""\
# fedsys {verb} {bundle} unit=true > /etc/systemd/system/fedsys-{verb}.service
# systemctl enable --now fedsys-{verb}
[Unit]
Description={what}
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={command}
StateDirectory=fedsys
StateDirectoryMode=0700
WorkingDirectory=/var/lib/fedsys
Environment=HOME=/var/lib/fedsys
Restart=always
RestartSec=5
TimeoutStopSec=30
LimitNOFILE=65536

[Install]
WantedBy=multi-user.target
"""
