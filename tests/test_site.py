"""The documentation: it builds as a site without a warning, and its commands are what they say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedsys.commands import options
from fedsys.main import COMMANDS, Invocation, main

ROOT = Path(__file__).resolve().parents[1]
RUN_WHOLE = "extending.md"
"""The page whose commands `tests/test_packaging.py` runs as they stand."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as continuous integration and a reader build it."""
    pytest.importorskip("myst_nb", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs"]
    trees = folder.with_name("doctrees")
    done = subprocess.run(
        [*command, "-d", str(trees), ".", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_page(site):
    pages = {p.relative_to(ROOT).with_suffix(".html") for p in (ROOT / "docs").rglob("*.md")}
    built = {p.relative_to(site) for p in site.rglob("*.html")}
    assert pages <= built
    assert "url=docs/index.html" in (site / "index.html").read_text()


@pytest.mark.slow
def test_a_page_of_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text())
        sources = [found for tag in tags for found in re.findall(r'(?:src|href)="([^"]*)"', tag)]
        assert [s for s in sources if "//" in s] == [], page


@pytest.mark.slow
def test_every_drawing_of_a_page_is_on_the_site(site):
    """The states of docs/protocol.md were an empty box: only the house of the rooms was drawn."""
    drawings = 0
    for page in (ROOT / "docs").glob("*.md"):
        text = (site / "docs" / page.name).with_suffix(".html").read_text()
        for drawing in re.findall(r"```mermaid\n(.*?)```", page.read_text(), re.DOTALL):
            drawings += 1
            for state in re.findall(r"--> (\w+):", drawing):
                assert f"<b>{state}</b>" in text, page
            for floor in re.findall(r"subgraph \w+ .*?\n(.*?)\n *end", drawing, re.DOTALL):
                assert all(f"<span>{room}</span>" in text for room in floor.split()), page
        assert '<div class="house"></div>' not in text, page
    assert drawings >= 3


@pytest.mark.slow
def test_the_reference_has_every_option_and_every_choice(site):
    text = (site / "docs" / "configuration.html").read_text()
    shown = set(re.findall(r'<span class="pre">([^<]*)</span>', text))
    assert set(options.every_option()) <= shown
    for group in options.groups():
        assert {f"{group}={name}" for name in options.choices(group)} <= shown


@pytest.mark.slow
def test_the_reference_of_the_api_has_what_the_faces_offer(site):
    import fedsys.models
    import fedsys.planning

    for room in (fedsys.models, fedsys.planning):
        text = (site / "docs" / "api" / f"{room.__name__.partition('.')[2]}.html").read_text()
        for name in room.__all__:
            assert re.search(rf'id="fedsys\.[\w.]*{name}"', text), name


def test_every_room_with_a_face_has_a_page_in_the_reference():
    rooms = {path.parent.name for path in (ROOT / "fedsys").glob("*/__init__.py")}
    pages = {path.stem for path in (ROOT / "docs" / "api").glob("*.md")}
    assert pages == rooms


# --------------------------------------------------------------------------------------------------
# What the pages promise


def capabilities():
    """Return the pages that stand under Training and Answering."""
    index = (ROOT / "docs" / "index.md").read_text()
    blocks = re.findall(
        r":caption: (?:Training|Answering)\n:maxdepth: 1\n(.*?)```", index, re.DOTALL
    )
    return [ROOT / "docs" / f"{name}.md" for block in blocks for name in block.split()]


@pytest.mark.parametrize("page", capabilities(), ids=lambda page: page.name)
def test_a_page_on_a_capability_says_when_it_pays_how_it_works_and_how_it_is_set(page):
    sections = dict(re.findall(r"^## (.*)\n((?:(?!^## ).*\n)*)", page.read_text(), re.MULTILINE))
    assert re.search(r"\b(not|where|nothing)\b", sections["When it pays"])
    (drawing, *_) = re.findall(
        r"^```\n(.*?)^```", sections["How it works"], re.DOTALL | re.MULTILINE
    )
    assert re.search("[─▶┌│]", drawing)
    assert re.search("<!-- options: .* -->", sections["Configuration"])


def test_every_group_is_configured_on_the_page_of_a_capability():
    shown = {
        name.rstrip("=")
        for page in capabilities()
        for names in re.findall(r"<!-- options: (.*) -->", page.read_text())
        for name in names.split()
    }
    assert set(options.groups()) - {"bench", "experiment"} <= shown
    known = {*options.groups(), *(key.partition(".")[0] for key in options.every_option())}
    assert {name.partition(".")[0] for name in shown} <= known


@pytest.mark.slow
def test_the_page_of_a_capability_has_its_options_with_what_they_mean(site):
    text = re.sub("<[^>]*>", "", (site / "docs" / "mobility.html").read_text())
    assert "mobility=halfway" in text and "how a device leaves" in text
    for option in options.options_of("mobility", "network"):
        assert option.key in text or option.key == "mobility.kind", option


NUMBER = re.compile(r"(?<![\w.,^-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w^])")


def test_every_figure_of_the_results_stands_in_the_record_beside_it():
    """A table is about a paper; a row without a link is about the record of the row above."""
    lost, links = [], []
    for line in (ROOT / "docs" / "results.md").read_text().splitlines():
        cells = line.strip("|").split(" | ")
        if not line.startswith("|") or len(cells) != 4 or cells[1].strip() in ("here", ""):
            continue
        links = re.findall(r"\.\./(benchmarks/\w+\.md)", line) or links
        text = " ".join((ROOT / link).read_text() for link in links)
        lost += [
            (number, line) for number in set(NUMBER.findall(cells[1])) - set(NUMBER.findall(text))
        ]
    assert lost == [] and links


def commands(page):
    """Return the calls of ``fedsys`` in the shell blocks of a page, each as a list of words."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            reader = shlex.shlex(line, posix=True, punctuation_chars=";|&")
            reader.whitespace_split = True
            words = list(reader)
            while "fedsys" in words:
                words = words[words.index("fedsys") + 1 :]
                ends = [words.index(end) for end in ("&&", ";", "|", "&") if end in words]
                found.append(tuple(words[: min(ends, default=len(words))]))
    return found


def pages_with_commands():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in pages if page.name != RUN_WHOLE and commands(page)]


_checked: set[tuple[str, ...]] = set()


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with_commands(), ids=lambda page: page.name)
def test_the_commands_of_a_page_are_composed_and_checked(page, tmp_path, monkeypatch, capsys):
    """All but the job itself is done: arguments, groups, Hydra's composition, rules of values."""
    from fedsys import config

    def job(tree):
        if not hasattr(tree, "words"):  # what is composed, not what a plain command is given
            known = config.plain(tree)
            known.pop("report", None)  # which `fedsys report` reads as it is
            made = config.parse(config.to_text(known))
            # The tutorial's chain ended with a message that cuts must be given.
            named = [host.machine for host in made.hosts.list if not host.address]
            assert made.partition.cuts or not named or any(named), made.hosts
        return {}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Invocation, "_function", lambda self: job)
    for words in commands(page):
        assert words[0] in COMMANDS or words[0].startswith("-"), words
        if words not in _checked:  # pages repeat each other
            assert main(words) == 0, (words, capsys.readouterr().err)
            _checked.add(words)


def test_what_is_no_command_would_be_seen(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```bash\na=1 fedsys train polcy=auto # x\nls && fedsys runs; fedsys x\n```\n")
    assert commands(page) == [("train", "polcy=auto"), ("runs",), ("x",)]
    assert main(commands(page)[0]) == 2
    assert "policy" in capsys.readouterr().err


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version = "{cited["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert cited["license"] in (ROOT / "pyproject.toml").read_text()
    assert cited["version"] in (ROOT / "CHANGELOG.md").read_text()
