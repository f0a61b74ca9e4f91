import ast
import functools
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

import fedsys
from fedsys.errors import EXTRA_OF
from fedsys.runtime import bundle

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedsys", "strategies", "clients", "conf")
BESIDE = ("tests", "docs", "examples", "benchmarks", "deploy", "findings", ".ci")
LOOSE = ("README.md", "CONTRIBUTING.md", "LICENSE", "constraints.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGES = list((ROOT / "docs").glob("*.md"))
PRIVATE = {"supercore", "superlink", "supernode", "simulation", "server", "proto", "cli", "compat"}
"""Parts of Flower that its documentation does not show, or shows as legacy."""

GIT_PATTERNS = pytest.mark.filterwarnings(
    "ignore:GitWildMatchPattern:DeprecationWarning"  # Flower asks pathspec by the old name
)
EXTRAS = {"ray": "flwr"}
"""What comes with an extra of another distribution: `flwr[simulation]` brings Ray."""


def sources(*packages):
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def wanted(*suffixes):
    """Return the files of the four packages as they are in the checkout."""
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is packed, and of what is not: other tests write into the real one."""
    copy = tmp_path_factory.mktemp("checkout") / "fedsys"
    for name in (*PACKAGES, *BESIDE):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", ".gitignore", *LOOSE):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True, timeout=120)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def command(home, *arguments):
    """Run the command from `home` alone, with nothing of the checkout in sight."""
    code = (
        f"import sys; sys.path.insert(0, {str(home)!r}); sys.argv[0] = 'fedsys'\n"
        "import fedsys.main; assert fedsys.main.__file__.startswith(sys.path[0])\n"
        "raise SystemExit(fedsys.main.main())"
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --------------------------------------------------------------------------------------------------
# The wheel and the bundle


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        assert len({n.split("/")[0] for n in archive.namelist()} - set(PACKAGES)) == 1
    assert names == wanted(".py", ".yaml", ".typed")
    assert {f"conf/{p.name}" for p in (ROOT / "conf").glob("*.yaml")} <= names


def test_the_source_distribution_holds_what_its_pages_and_tests_name(checkout, tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True, timeout=120)
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted(".py", ".yaml", ".typed") <= names
    for folder in BESIDE:
        files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"]
        assert {p.relative_to(ROOT).as_posix() for p in files} <= names
    assert {"pyproject.toml", *LOOSE} <= names


def test_the_wheel_names_version_licence_and_command(unpacked):
    (info,) = unpacked.glob("*.dist-info")
    about = metadata.PathDistribution(info)
    assert about.metadata["Name"] == "fedsys"
    assert about.version == PROJECT["project"]["version"]
    assert about.metadata["License-Expression"] == "Apache-2.0"
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    (script,) = about.entry_points
    assert (script.name, script.value) == ("fedsys", "fedsys.main:entry")


def test_an_unpacked_wheel_finds_its_own_configuration(unpacked):
    shown = command(unpacked, "--help")
    assert shown.returncode == 0
    assert "usage: fedsys COMMAND" in shown.stdout
    composed = command(unpacked, "train", "model=vgg5", "rounds=3", "--cfg", "job")
    assert composed.returncode == 0, composed.stderr
    assert "_target_: fedsys.models.vgg.vgg5" in composed.stdout
    assert "rounds: 3" in composed.stdout


def test_another_package_of_the_same_name_is_refused(unpacked, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(unpacked, home)
    shutil.rmtree(home / "strategies")
    result = command(home, "train")
    assert result.returncode == 2
    assert "package strategies: comes from" in result.stderr


@GIT_PATTERNS
def test_the_bundle_that_flower_builds_holds_the_four_packages_and_nothing_else(checkout):
    from flwr.cli.build import build_fab_from_disk

    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(checkout))) as archive:
        names = set(archive.namelist())
        project = tomllib.loads(archive.read("pyproject.toml").decode())
    own = {n for n in names if "/" in n and not n.startswith(".info")}
    assert own == wanted(".py", ".yaml")
    assert {n.split("/")[0] for n in names} - set(PACKAGES) <= {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        ".info",
    }
    assert project["tool"]["flwr"]["app"]["components"] == {
        "serverapp": "strategies.app:app",
        "clientapp": "clients.app:app",
    }


@GIT_PATTERNS
def test_the_bundle_that_fedsys_sends_has_the_same_files():
    content, digest = bundle.build()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = {n for n in archive.namelist() if "/" in n and not n.startswith(".info")}
    assert names == wanted(".py", ".yaml")
    assert bundle.build()[1] == digest


# --------------------------------------------------------------------------------------------------
# Who may import whom


@functools.cache
def imports(path, *, for_types=True):
    """Return the dotted names of everything that a file imports, inside functions too.

    Kept: six tests ask, and each read 600 files again.
    """
    tree, names, skipped = ast.parse(path.read_text()), [], set()
    if not for_types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(names)


def any_of(imported, names):
    """Return whether one of `names` is imported, or something inside of it."""
    return any(name == n or name.startswith(f"{n}.") for name in imported for n in names)


def importing(packages, names):
    """Return the files of `packages` that import one of `names` or something inside of it."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in sources(*packages)
        if any_of(imports(path), names)
    }


def test_the_machine_knows_no_strategy_no_client_and_no_choice():
    assert importing(["fedsys"], ["strategies", "clients", "conf"]) == set()


def test_strategies_and_clients_do_not_know_each_other():
    assert importing(["strategies"], ["clients", "conf"]) == set()
    assert importing(["clients"], ["strategies", "conf"]) == set()


def test_choices_hold_no_logic():
    assert [path.name for path in sources("conf")] == ["__init__.py"]
    body = ast.parse((ROOT / "conf" / "__init__.py").read_text()).body
    assert all(isinstance(node, ast.Expr) for node in body)  # a docstring at most


def test_one_package_knows_hydra_and_the_command_starts_it():
    known = importing(PACKAGES, ["hydra", "omegaconf"])
    assert {f for f in known if not f.startswith("fedsys/config/")} <= {"fedsys/main.py"}


def test_only_the_runtime_knows_private_parts_of_flower():
    private = [f"flwr.{part}" for part in PRIVATE]
    files = [ROOT / file for file in importing(PACKAGES, private)]
    running = [f for f in files if any_of(imports(f, for_types=False), private)]
    assert {f for f in running if f.parent != ROOT / "fedsys" / "runtime"} == set()


def test_nothing_unpickles_or_evaluates():
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
    assert importing(PACKAGES, forbidden) == set()
    calls = Counter(
        ast.unparse(node.func)
        for path in sources(*PACKAGES)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    )
    assert not calls.keys() & {"eval", "exec", "torch.load", "torch.save"}


# --------------------------------------------------------------------------------------------------
# What the project says of itself


def test_the_version_is_the_same_everywhere(capsys):
    from fedsys.main import main

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedsys {PROJECT['project']['version']}\n"
    assert metadata.version("fedsys") == PROJECT["project"]["version"]
    assert Path(fedsys.__file__).parent == ROOT / "fedsys"


def readme_commands():
    """Return the shell blocks of the README that set something up: install, then one command."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [block.strip() for block in blocks]


def test_the_readme_begins_with_one_sentence_and_two_commands():
    text = (ROOT / "README.md").read_text()
    assert re.match(r"# fedsys\n\n\*\*[^*\n]+\.\*\*\n\n", text)
    run, check = readme_commands()[:2]
    assert run.endswith("pip install -e '.[full]' && fedsys train")
    assert check.endswith("pip install -e '.[dev]' && pytest")


def test_continuous_integration_runs_the_second_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.count(readme_commands()[1]) == 1


def test_every_command_of_the_readme_is_one_that_fedsys_has():
    from fedsys.main import COMMANDS

    text = "\n".join(readme_commands())
    verbs = set(re.findall(r"^(?:.*&& )?fedsys ([a-z]+)", text, re.MULTILINE))
    assert "train" in verbs
    assert verbs <= set(COMMANDS)


def test_the_page_of_commands_names_every_choice_of_the_groups_it_lists():
    text = (ROOT / "docs" / "commands.md").read_text()
    assert "`strategy=`" in text
    for group, listed in re.findall(r"^\| `(\w+)=` \| (.*) \|$", text, re.MULTILINE):
        names = {p.stem for p in (ROOT / "conf" / group).glob("*.yaml")} - {"torchvision"}
        assert set(re.findall(r"`(\w+)`", listed)) == names, group


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in PAGES)]
)
def test_what_a_page_links_to_or_names_exists(page):
    file = ROOT / page
    text = file.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (file.parent / target).exists(), target
    for path in re.findall(r"`((?:fedsys|strategies|clients|conf|tests|examples)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def texts():
    """Yield every file of ours in which a module may be named, with its text."""
    for folder in (*PACKAGES, "tests", "docs", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".md", ".yaml") and "golden" not in path.parts:
                yield path, path.read_text()


def names_in(module):
    """Return what a module defines or imports at its top."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Import() | ast.ImportFrom():
                found |= {alias.asname or alias.name for alias in node.names}
            case ast.Name(ctx=ast.Store()):
                found.add(node.id)
    return found


def resolves(name):
    """Return whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if file.is_file():
            return parts[count:] == [] or parts[count] in names_in(file)
    return False


def test_every_module_that_is_named_anywhere_exists():
    """Comments, YAML and recorded benchmarks named modules where they had been before."""
    lost = set()
    for path, text in texts():
        where = path.relative_to(ROOT).as_posix()
        for name in re.findall(r"`((?:fedsys|strategies|clients)(?:\.\w+)+)`", text):
            if not resolves(name):
                lost.add(f"{where}: {name}")
        for name in re.findall(r"\b((?:fedsys|strategies|clients|tests|conf)/[\w/]+\.py)\b", text):
            if not (ROOT / name).is_file():
                lost.add(f"{where}: {name}")
    assert lost == set()
    assert resolves("fedsys.models.layers.split") and not resolves("fedsys.models.layers.cut_up")


@pytest.mark.slow
def test_the_page_on_extending_works_as_written(tmp_path, monkeypatch, capsys):
    from PIL import Image

    from fedsys.main import main

    text = (ROOT / "docs" / "extending.md").read_text()
    for name, content in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for part, count in (("train", 20), ("test", 5)):
        for kind, color in (("cat", "red"), ("dog", "blue")):
            folder = tmp_path / "pictures" / part / kind
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), color).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # what PYTHONPATH=. does for a process
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        arguments = shlex.split(block.removeprefix("PYTHONPATH=. "))
        assert arguments[0] == "fedsys"
        pictures = f"run.plots={block is blocks[0]}"  # they take most of the time
        assert main([*arguments[1:], "json=true", pictures]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert 0.0 <= result["accuracy"] <= 1.0
    assert [line.split()[0] for line in Path("lines.txt").read_text().splitlines()[1:]] == [
        "1", "2", "finished",
    ]  # fmt: skip
    sent = [int(line.split()[1]) for line in Path("bytes.txt").read_text().splitlines()]
    assert len(sent) >= 8 and min(sent) > 1000  # a link of each device


def declared(*requirements):
    """Return the names of distributions in lists of requirements, normalised."""
    names = (re.split(r"[\[<>=~ ;]", entry)[0] for entries in requirements for entry in entries)
    return {normalised(name) for name in names}


def normalised(name):
    return name.lower().replace("_", "-")


_distributions = functools.cache(metadata.packages_distributions)


def distributions_of(module):
    """Return the distributions that bring the package of a module."""
    top = module.partition(".")[0]
    known = _distributions().get(EXTRAS.get(top, top), [top])
    return {normalised(name) for name in known}


WHERE_INSTALLED = {"httptools": "serve"}
"""Packages, by their extra, of modules that are imported where these are installed alone."""


def test_every_package_that_is_imported_is_a_dependency():
    """What an installation without extras imports: ``httpx`` was declared for development alone."""
    dependencies = declared(PROJECT["project"]["dependencies"])
    extras = PROJECT["project"]["optional-dependencies"]
    extra_of = {**EXTRA_OF, **WHERE_INSTALLED}
    imported = {
        name.partition(".")[0]: path.relative_to(ROOT).as_posix()
        for path in sources("fedsys", "strategies", "clients")
        for name in imports(path)
    }
    missing = {
        top: path
        for top, path in imported.items()
        if top not in {*sys.stdlib_module_names, *PACKAGES}
        and not distributions_of(top) & (dependencies | declared(extras.get(extra_of.get(top), ())))
    }
    assert missing == {}


def test_full_brings_all_that_a_device_does_without():
    extras = PROJECT["project"]["optional-dependencies"]
    (full,) = extras["full"]
    assert set(re.findall(r"\w+", full)) == {"fedsys", *EXTRA_OF.values()}
    for package, extra in EXTRA_OF.items():
        assert distributions_of(package) & declared(extras[extra]), package
    assert not declared(PROJECT["project"]["dependencies"]) & declared(
        *(extras[extra] for extra in EXTRA_OF.values() if extra != "simulation")
    )


BARE = """
import importlib, json, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
for package in ("fedsys", "strategies", "clients"):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        # those left out begin with a package of an extra, and say so
        if not {"bench", "learning", "trackers"} & set(found.name.split(".")):
            importlib.import_module(found.name)
from fedsys.main import main
few = ["num_clients=2", "rounds=1", "client.epochs=1"]
plain = [*few, "data=synthetic", "data.examples=64", "data.test_examples=16",
         "run.plots=false"]
told = [main(["train", *plain, "json=true", "run.dir=bare"])]
for asked in (
    ["data=synthetic", *few], [*plain, "runtime=simulation"],
    [*few, "run.plots=false", "data=digits"],
    [*plain, "model=alexnet"], [*plain, "model.name=alexnet", "model=torchvision"],
):
    print("====", file=sys.stderr)
    told.append(main(["train", *asked]))
print(json.dumps(told))
"""


@pytest.mark.slow
def test_a_device_without_extras_imports_all_trains_and_names_the_extra_of_the_rest(tmp_path):
    """Everything was a dependency: 6.8 GB on a device, with Ray, matplotlib and TensorBoard."""
    code = f"BLOCKED = {set(EXTRA_OF)!r}{BARE}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, result, statuses = done.stdout.splitlines()
    assert json.loads(statuses) == [0, 1, 1, 1, 2, 1], done.stderr
    errors = done.stderr.split("====")[1:]
    for extra, error in zip(
        ("plots", "simulation", "learn", "vision", "vision"), errors, strict=True
    ):
        assert f"fedsys[{extra}]" in error and error.count("fedsys: ") == 1, error
    same = fedsys.train(
        "num_clients=2", "rounds=1", "client.epochs=1", "data=synthetic", "data.examples=64",
        "data.test_examples=16", "run.plots=false", f"run.dir={tmp_path / 'full'}",
    )  # fmt: skip
    assert json.loads(result)["model_sha256"] == same.figures["model_sha256"]


def test_what_an_extra_brings_is_imported_late_and_the_error_names_that_extra(monkeypatch):
    from fedsys.config.targets import import_extra
    from fedsys.errors import ModelError

    extra_of = {"import_extra": (), "of_rl": ("rl",)}
    calls = {
        (*(argument.value for argument in node.args[:2]), *extra_of[node.func.id])
        for path in sources("fedsys", "strategies", "clients")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in extra_of
        and isinstance(node.args[0], ast.Constant)
    }
    assert {name for name, *_ in calls} == {
        "dp_accounting", "dp_accounting.pld", "dp_accounting.pld.privacy_loss_distribution",
        "dp_accounting.rdp",
        "gymnasium", "mlflow.entities", "mlflow.tracking",
        "onnx", "onnxruntime", "onnxruntime.quantization", "onnxscript",
        "opacus", "opacus.accountants", "stable_baselines3",
        "stable_baselines3.common.callbacks", "stable_baselines3.common.logger",
        "stable_baselines3.common.policies",
        "stable_baselines3.common.vec_env.base_vec_env", "torch_pruning", "wandb",
    }  # fmt: skip
    for name, *given in calls:
        extra = given[0] if given else "export"
        brought = declared(PROJECT["project"]["optional-dependencies"][extra])
        assert distributions_of(name) & brought, name
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        with pytest.raises(ModelError, match=rf"pip install 'fedsys\[{extra}\]'"):
            import_extra(name, *given)
