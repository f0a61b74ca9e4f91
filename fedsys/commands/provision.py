"""``fedsys provision FLEET.yaml``: a bundle for each machine of a fleet, to be copied there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsys.commands.arguments import Given
from fedsys.commands.machine_options import options_of, path_of
from fedsys.errors import ConfigError
from fedsys.runtime.fleet_files import read_fleet
from fedsys.runtime.provisioning import provision

OPTIONS = ("folder",)


def job(given: Given) -> Mapping[str, Any]:
    """Write the bundles, or renew them.

    Args:
        given: What stands behind the verb: the fleet file, and ``folder=`` for another folder than
            one beside that file, of its name.

    Returns:
        ``bundles``: the folder of each machine, by name.

    Raises:
        ConfigError: No file is named, or it is not usable.
        RunError: A file cannot be written.
    """
    options = options_of(given, OPTIONS, "provision")
    file = path_of(given, "provision", "the file of a fleet", "fedsys provision fleet.yaml")
    fleet = read_fleet(file)
    folder = Path(options.get("folder") or file.with_suffix(""))
    if folder.exists() and not folder.is_dir():
        raise ConfigError.of("folder", folder, "must be a folder", "choose another")
    made = provision(fleet, folder)
    if options.get("json") != "true":
        for name, place in made.items():
            print(f"{place}: copy it to {name}, and there: {_start(name, place)}")
        print(f"{folder / 'authority'}: keep it; whoever has it can let machines in")
    return {"bundles": {name: str(place) for name, place in made.items()}}


def _start(name: str, place: Path) -> str:
    if name == "server":
        return f"fedsys server {place.name}"
    if (place / "edge.yaml").exists():
        return f"fedsys edge edge.bundle={place.name}"
    return f"fedsys device {place.name}"
