"""The house: which rooms `fedsys/` has, what stands on what, and what each name means."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedsys", "strategies", "clients")

FLOORS = (
    ("errors", "identity"),
    ("randomness", "files", "faults"),
    ("transport",),
    ("models", "data"),
    ("config",),
    ("training",),
    ("privacy", "planning"),
    ("offload", "partition"),
    ("runs",),
    ("pruning",),
    ("serving", "runtime"),
    ("commands",),
    ("main",),
    ("strategies", "clients"),
)
"""From ground to roof: a room, or a loose file, imports itself and what stands on lower floors."""

LEVELS = {room: level for level, floor in enumerate(FLOORS) for room in floor}

MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.py"))
}


def room(module: str) -> str:
    """Return the room of a module: ``models`` for ``fedsys.models.graph``."""
    package, *inner = module.split(".")
    return inner[0] if package == "fedsys" and inner else package


def imported(source: str, modules: "dict[str, Path]" = MODULES) -> set[str]:
    """Return the modules of ours that a source imports: in functions and for types, too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else str(node.module) for name in names}
    return found & modules.keys()


IMPORTS = {module: imported(file.read_text()) for module, file in MODULES.items()}


def upwards(imports: dict[str, set[str]]) -> list[str]:
    """Return the imports that do not go to the same room or to a lower floor."""
    return [
        f"{module} imports {other}"
        for module, others in sorted(imports.items())
        for other in sorted(others)
        if room(other) != room(module) and LEVELS[room(other)] >= LEVELS[room(module)]
    ]


# --------------------------------------------------------------------------------------------------
# The order


def test_every_room_and_loose_file_has_a_floor():
    assert {room(module) for module in MODULES} - {"fedsys"} <= LEVELS.keys()
    assert len(LEVELS) == sum(map(len, FLOORS))


def test_there_are_a_dozen_rooms_and_five_loose_files_at_most():
    inside = [p for p in (ROOT / "fedsys").iterdir() if p.name != "__pycache__"]
    rooms = [path.name for path in inside if path.is_dir()]
    loose = {path.stem for path in inside if path.suffix == ".py"} - {"__init__", "main"}
    assert len(rooms) <= 12 and len(loose) <= 5


def test_a_room_imports_only_what_stands_before_it():
    assert upwards(IMPORTS) == []
    assert IMPORTS["fedsys"] == set()


def test_what_is_imported_in_functions_or_for_types_counts():
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from fedsys.config import values\n"
        "def late():\n    import fedsys.runs.folder\n"
    )
    found = imported(source)
    assert found == {"fedsys.config.values", "fedsys.runs.folder"}
    assert upwards({"fedsys.models.graph": found}) == [
        "fedsys.models.graph imports fedsys.config.values",
        "fedsys.models.graph imports fedsys.runs.folder",
    ]
    assert upwards({"strategies.app": {"clients.app"}}) == ["strategies.app imports clients.app"]


def test_no_modules_import_each_other_in_a_circle():
    """``config/values.py`` and ``config/pruning.py`` did, by an annotation."""
    order = list(graphlib.TopologicalSorter(IMPORTS).static_order())
    assert set(order) == MODULES.keys()
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


# --------------------------------------------------------------------------------------------------
# What an import brings along


def loaded_by(*modules: str) -> set[str]:
    """Return the modules that are loaded in a new process that imports some of ours."""
    code = "import sys\n" + "".join(f"import {m}\n" for m in modules) + "print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_model_of_time_brings_no_connection():
    """The rates of a network stood with links, threads and TLS, which planning then brought."""
    planning = [module for module in MODULES if room(module) == "planning"]
    loaded = loaded_by(*planning)
    connecting = {f"fedsys.transport.{name}" for name in ("link", "mailbox", "security", "wire")}
    assert loaded & (connecting | {"grpc", "cryptography", "flwr"}) == set()
    assert set(planning) <= loaded
