"""The house: which rooms `fedsys/` has, what stands on what, and what each name means."""

import ast
import graphlib
import importlib
import io
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedsys", "strategies", "clients")

FLOORS = (
    ("fedsys",),  # the package itself: how rooms show their names
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

ALL_ROOMS = {
    *("transport", "models", "data", "config", "training", "privacy", "planning"),
    *("offload", "partition", "runs", "pruning", "serving", "runtime", "commands"),
}
"""The rooms that `fedsys/` has or is going to have: it has no others."""

LOOSE = {"errors", "identity", "randomness", "files", "faults"}
"""The ground: modules that stand in no room."""

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


@pytest.fixture(scope="module")
def imports() -> "dict[str, set[str]]":
    """Return the modules of ours that each imports.

    Read when a test asks: every worker collects this file, and read 500 more for nothing.
    """
    return {module: imported(file.read_text()) for module, file in MODULES.items()}


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


def test_no_room_and_no_loose_file_is_outside_of_the_list():
    """A closed list, not a number: a dozen rooms stood, and privacy and partition were planned.

    What needs a room of its own is a system, not a helper that has no home: so a name is added
    here, in FLOORS and in the drawing, with the reason why no room that is there can hold it.
    """
    inside = [p for p in (ROOT / "fedsys").iterdir() if p.name != "__pycache__"]
    assert {path.name for path in inside if path.is_dir()} <= ALL_ROOMS
    loose = {path.stem for path in inside if path.suffix == ".py"} - {"__init__"}
    assert loose == {*LOOSE, "main"}
    assert LEVELS.keys() == {*ALL_ROOMS, *loose, *PACKAGES}


def test_a_room_imports_only_what_stands_before_it(imports):
    assert upwards(imports) == []
    assert imports["fedsys"] == set()


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


def test_no_modules_import_each_other_in_a_circle(imports):
    """``config/values.py`` and ``config/pruning.py`` did, by an annotation."""
    order = list(graphlib.TopologicalSorter(imports).static_order())
    assert set(order) == MODULES.keys()
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


# --------------------------------------------------------------------------------------------------
# Names


def test_no_two_classes_share_a_name():
    """``Link``, ``Plan`` and eight more meant two things each, by where one stood.

    Functions are called by the name of their module where it says more (``records.encode``,
    ``training.train``), and commands have a ``job`` each.
    """
    homes = defaultdict(list)
    for module, file in MODULES.items():
        text = file.read_text()
        for name in re.findall(r"^class ([A-Za-z]\w*)", text, re.MULTILINE):
            homes[name].append(module)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


# --------------------------------------------------------------------------------------------------
# Lengths

LONGEST = 40
CODE = sorted(
    file
    for folder in (*PACKAGES, "benchmarks", "examples", "tests")
    for file in (ROOT / folder).rglob("*.py")
)


def lines_of_code(source: str, above: int = 0) -> dict[str, int]:
    """Return how many lines of code the functions of a source have, of those that have more.

    Counted are the lines of its body on which a token of code stands, or through which one runs, as
    a text of several lines does. Not counted are its name and parameters, its docstring and those
    of functions inside it, comments, and blank lines. A function inside another counts in both.
    """
    tree = ast.parse(source)
    spans = [
        (f"{node.name}:{node.lineno}", node.body[0].lineno, node.end_lineno or 0)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    if all(end - start < above for _, start, end in spans):
        return {}  # without a look at every token
    quiet = {
        *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
        *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
    }
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in quiet:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        with_text = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if with_text and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            code -= set(range(first.lineno, (first.end_lineno or 0) + 1))
    counted = {name: len(code & set(range(start, end + 1))) for name, start, end in spans}
    return {name: lines for name, lines in counted.items() if lines > above}


def test_no_function_has_more_than_forty_lines_of_code():
    """Some had, up to 68: what they did one after another had no names."""
    long = {
        f"{file.relative_to(ROOT)}:{name}": lines
        for file in CODE
        for name, lines in lines_of_code(file.read_text(), LONGEST).items()
    }
    assert long == {}


def test_lines_of_code_are_those_of_the_body_without_what_explains_them():
    source = (
        "def outer(\n    a,\n    b,\n):\n"
        '    """Say what.\n\n    And more.\n    """\n'
        "    # why\n\n"
        '    text = """one\n\n    two"""  # three lines\n'
        "    def inner():\n"
        '        """Not counted."""\n'
        "        return (\n            text  # this, and both brackets\n        )\n"
        "    return inner\n"
    )
    assert lines_of_code(source) == {"outer:1": 3 + 1 + 3 + 1, "inner:14": 3}


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


def test_the_command_and_a_plain_run_load_what_they_need():
    """Archives, digests and OmegaConf came with a list of commands and with a run's folder.

    And all policies, the agents of those that learn, and the conversion of pruned models came with
    every run.
    """
    assert loaded_by("fedsys.main") & {"secrets", "hashlib", "shutil", "zlib", "yaml"} == set()
    assert loaded_by("fedsys.runs.folder") & {"omegaconf", "fedsys.config", "torch"} == set()
    apps = loaded_by("strategies.app", "clients.app")
    others = (
        "fedsys.planning.learning",
        "fedsys.planning.bandit",
        "fedsys.pruning",
        "strategies.policies.",
    )
    assert sorted(name for name in apps if name.startswith(others)) == [
        "strategies.policies.policy"
    ]


ROOMS = sorted(
    path.parent.name for path in (ROOT / "fedsys").glob("*/__init__.py") if path.parent.is_dir()
)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_is_as_light_as_what_is_taken_from_it(name):
    loaded = loaded_by(f"fedsys.{name}")
    assert loaded & {"grpc", "matplotlib", "ray"} == set()
    if name not in ("config", "runtime"):  # they have code of their own, and no face alone
        assert loaded & {"torch", "numpy", "flwr", "omegaconf"} == set()
    assert "torch" not in loaded


# --------------------------------------------------------------------------------------------------
# The faces


def sorted_as_ruff_does(names: list[str]) -> list[str]:
    """Sort constants before classes before functions."""
    return sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))


def lent(tree: ast.Module) -> dict[str, str]:
    """Return the module of each name that a face imports for type checkers."""
    for node in tree.body:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            found = [inner for inner in node.body if isinstance(inner, ast.ImportFrom)]
            return {alias.name: str(f.module) for f in found for alias in f.names}
    return {}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_says_what_it_is_for_and_lists_names_that_exist(name):
    module = importlib.import_module(f"fedsys.{name}")
    assert module.__doc__ and len(module.__doc__.split()) > 5
    assert module.__all__ == sorted_as_ruff_does(module.__all__)
    for public in module.__all__:
        here: dict[str, object] = {}
        exec(f"from fedsys.{name} import {public}", here)
        assert here[public] is not None


@pytest.mark.parametrize("name", [name for name in ROOMS if name != "commands"])
def test_no_public_name_is_that_of_a_module_of_the_room(name):
    """``from fedsys.models import layered`` gave a module to whoever had imported it before."""
    module = importlib.import_module(f"fedsys.{name}")
    inside = {path.stem for path in (ROOT / "fedsys" / name).iterdir()}
    assert inside & set(module.__all__) == set()


def test_commands_are_the_verbs_and_their_modules():
    from fedsys import commands
    from fedsys.main import COMMANDS

    assert set(commands.__all__) == set(COMMANDS)
    inside = {path.stem for path in Path(commands.__file__).parent.iterdir()}
    assert set(commands.__all__) <= inside


@pytest.mark.parametrize("name", [name for name in ROOMS if name not in ("commands", "config")])
def test_a_room_gives_at_run_time_what_it_says_to_type_checkers(name):
    module = importlib.import_module(f"fedsys.{name}")
    names = lent(ast.parse(Path(module.__file__).read_text()))
    assert name == "runtime" or names.keys() == set(module.__all__)
    for public, home in names.items():
        assert getattr(module, public) is getattr(importlib.import_module(home), public), public
        assert public in dir(module)


IN_FORKS = """
import os, sys, torch  # it takes seconds to import, and is none of ours
for program in sys.argv[1:]:
    if not os.fork():
        exec(program)
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


def test_a_name_is_the_same_whatever_was_imported_before():
    programs = []
    for line, before in (
        ("from fedsys.models import layered", "fedsys.models.layers"),
        ("from fedsys.planning import plan", "fedsys.planning.planner"),
        ("from fedsys.transport import dial", "fedsys.transport.addresses"),
    ):
        room_, name = line.split()[1], line.split()[3]
        same = f"{name} is room.{name} is {before}.{name}"
        code = f"{line}; import {before}; import {room_} as room; print({name!r}, {same})"
        programs += [code, f"import {before}; {code}"]
    done = subprocess.run(
        [sys.executable, "-c", IN_FORKS, *programs], cwd=ROOT, capture_output=True, text=True
    )
    expected = [f"{name} True" for name in ("layered", "plan", "dial") for _ in range(2)]
    assert done.stdout.splitlines() == expected, done.stderr


def test_what_a_room_does_not_offer_is_an_error_that_names_it():
    from fedsys import planning

    with pytest.raises(AttributeError, match=r"'fedsys.planning' has no attribute 'plans'"):
        _ = planning.plans
    with pytest.raises(ImportError):
        exec("from fedsys.planning import plans")


# --------------------------------------------------------------------------------------------------
# The drawing

PAGE = (ROOT / "docs" / "architecture.md").read_text()
PAPERS = (
    *("FedAdapt", "PiPar", "FedFly", "DNNShifter", "Adaptive DNNs", "CONTINUER"),
    "differential privacy",
)


def exists(name: str) -> bool:
    """Return whether a room, a loose file or a package is there already."""
    inside = ROOT / "fedsys" / name
    return inside.is_dir() or inside.with_suffix(".py").is_file() or (ROOT / name).is_dir()


def drawn() -> "tuple[dict[str, list[str]], list[str]]":
    """Return the floors of the drawing with what stands on each, and their names from the roof."""
    (drawing,) = re.findall(r"```mermaid\n(.*?)```", PAGE, re.DOTALL)
    floors = re.findall(r"subgraph (\w+) .*?\n(.*?)\n    end", drawing, re.DOTALL)
    (arrows,) = re.findall(r"^    (\w+ --> .*)$", drawing, re.MULTILINE)
    return {name: inside.split() for name, inside in floors}, arrows.split(" --> ")


def test_the_drawing_shows_the_rooms_in_their_order():
    floors, order = drawn()
    assert list(floors) == order
    rooms = [floors[name] for name in order]
    assert rooms[::-1] == [list(floor) for floor in FLOORS if floor != ("fedsys",)]


def rows(heading: str) -> "dict[str, str]":
    """Return a table of the page: its second column by the first."""
    (table,) = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    cells = (line.strip("| ").split(" | ", 1) for line in table.splitlines())
    return dict(cells)  # type: ignore[arg-type]


def test_each_room_has_one_line():
    told = [name for cell in rows("room") for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(told) == sorted(LEVELS.keys() - {"fedsys"})
    for cell, text in rows("room").items():
        missing = [name for name in re.findall(r"`(\w+)`", cell) if not exists(name)]
        assert bool(missing) == text.startswith("to come"), cell


def test_each_paper_has_rooms():
    told = rows("paper")
    assert len(told) == len(PAPERS)
    for paper, (cell, text) in zip(PAPERS, told.items(), strict=True):
        assert cell.startswith(paper)
        named = set(re.findall(r"`(\w+)`", text))
        assert named and named <= LEVELS.keys(), cell
