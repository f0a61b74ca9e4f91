"""``fedsys server BUNDLE``: be the server of a provisioned fleet, until SIGTERM or Ctrl-C.

It runs a SuperLink, and what runs server apps, lets in the devices of the bundle, and starts again
whatever ends. Runs are started from any machine: ``fedsys train --config-dir BUNDLE/conf …``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsys.commands.arguments import Given
from fedsys.commands.device import unit
from fedsys.commands.machine_options import options_of, path_of, say
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.runtime.fleet_files import ServerBundle, read_bundle
from fedsys.runtime.machines import KeptPrograms, answers, for_ever, keep, server_programs
from fedsys.runtime.processes import is_free

OPTIONS = ("state", "unit")


def job(given: Given) -> Mapping[str, Any]:
    """Keep the programs of a server running.

    Once devices are let in, it says so; with ``json=true`` as an object ``{"ready": …}`` on a line
    of its own.

    Args:
        given: What stands behind the verb: the bundle; ``state=`` for another folder than one in
            it, and ``unit=true``, which prints a unit of systemd instead.

    Returns:
        ``fleet``: its name.

    Raises:
        ConfigError: The bundle or an option is not usable, or the port is taken.
        RunError: The folder of its state cannot be written to.
    """
    options = options_of(given, OPTIONS, "server")
    folder = path_of(given, "server", "the bundle of a server", "fedsys server /etc/fedsys/server")
    about, bundle = read_bundle(folder, ServerBundle)
    if options.get("unit") == "true":
        print(unit("server", f"Server of {about.name} for fedsys", bundle, []), end="")
        return {"fleet": about.name}
    if not is_free("0.0.0.0", about.port):
        raise ConfigError.of(
            "server.port", about.port, "must not be in use", f"server.yaml in {bundle} names it"
        )
    state = Path(options.get("state") or bundle / "state").absolute()

    def attempt() -> None:
        with KeptPrograms(server_programs(about, bundle, state), state, say) as kept:
            keep(kept, lambda: answers(about.port, bundle / "ca.pem"), told)

    def told() -> None:
        count = let_in(about, bundle)
        if options.get("json") == "true":
            ready = {"fleet": about.name, "port": about.port, "devices": count, "pid": os.getpid()}
            print(json.dumps({"ready": ready}), flush=True)
        else:
            print(f"{about.name} listens at port {about.port} for {count} devices", flush=True)
            print(f"fedsys train --config-dir {bundle / 'conf'} +experiment={about.name}")

    try:
        for_ever(attempt, say, time.sleep)
    except KeyboardInterrupt:
        say(f"the server of {about.name} ends; its database is in {state}")
    return {"fleet": about.name}


def let_in(about: ServerBundle, bundle: Path) -> int:
    """Register the devices of a bundle that are not registered yet; return how many there are.

    Raises:
        RuntimeFailure: The SuperLink refuses for another reason.
    """
    from fedsys.runtime.control import SuperLinkAddress, SuperLinkClient  # brings Flower
    from fedsys.runtime.provisioning import public_keys

    address = SuperLinkAddress.of(f"127.0.0.1:{about.port}", str(bundle / "ca.pem"), False)
    keys = public_keys(bundle)
    with SuperLinkClient(address) as control:
        for name, key in keys:
            try:
                control.register(key, name)
            except RuntimeFailure as error:
                if "already in use" not in str(error):  # registered before
                    raise
    return len(keys)
