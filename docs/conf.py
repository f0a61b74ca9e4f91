"""The site: ``sphinx-build -W -c docs . build/site``, with what is generated for it.

Pages are Markdown as they stand in ``docs/``, ``benchmarks/`` and here and there at the root. Two
things are made anew for each build: the reference of the configuration, from the files in ``conf/``
and their comments, and that of the API, from the docstrings behind the faces of the rooms. Nothing
is written into the source tree, and a page that was built asks for nothing from elsewhere.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fedsys import __version__  # noqa: E402
from fedsys.commands import options  # noqa: E402

project, author, release = "fedsys", "The fedsys authors", __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
nb_execution_mode = "off"  # a test runs them; what they keep is the same on every machine
root_doc = "docs/index"
include_patterns = [
    *("docs/**.md", "benchmarks/**.md", "examples/**.ipynb", "CONTRIBUTING.md", "CHANGELOG.md"),
]
exclude_patterns = [".*", "build", "dist", "outputs", "fedsys", "strategies", "clients", "tests"]

suppress_warnings = ["myst.header", "toc.not_included"]  # records of benchmarks begin at any level
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
default_role = "code"  # a name in single backticks
napoleon_use_ivar = True
pygments_style = "friendly"

html_theme = "alabaster"
html_title = f"fedsys {release}"
html_show_sphinx = False
html_copy_source = False
html_show_copyright = False  # no year is known here: it was a sign with nothing behind it
html_static_path = ["static"]
html_favicon = "static/icon.svg"  # a browser asks for one, and said that it was not there
html_theme_options = {
    "description": "One model across devices and edge servers",
    "fixed_sidebar": True,
    "page_width": "1240px",
    "sidebar_width": "230px",
    "body_max_width": "none",  # code and tables take it; static/site.css keeps texts readable
}


# --------------------------------------------------------------------------------------------------
# The configuration, from conf/


def configuration() -> str:
    """Return the reference of the configuration as Markdown: each group, choice and option."""
    groups = [group for group in options.groups() if group not in ("bench", "experiment")]
    general = (options.CONF / "config.yaml").read_text(encoding="utf-8")
    parts = ["## Without a group", _table(list(options.options_in(general)))]
    for group in [*groups, "experiment", "bench"]:
        parts += _group(group)
    return "\n\n".join(parts)


def _group(group: str) -> list[str]:
    chosen = options.default_choice(group)
    parts = [f"## `{group}=`"]
    for name in options.choices(group):
        default = " (if nothing is said)" if name == chosen else ""
        text = options.choice_text(group, name)
        parts += [f"### `{group}={name}`{default}", _head(text)]
        parts.append(_table(options.options_of(group, name)))
    return [part for part in parts if part]


def chosen_options(names: str) -> str:
    """Return a part of the reference, for the page of a capability.

    Args:
        names: Groups (``policy=``), of which choices and options are shown, each once; or options
            (``client``, ``serving.recovery``), with all that is below them.
    """
    parts = []
    for name in names.split():
        group = name.rstrip("=")
        parts += _together(group) if name.endswith("=") else [_table(_below(name))]
    return "\n\n".join(part for part in parts if part)


def _below(name: str) -> list[options.Option]:
    return [o for o in options.every_option().values() if f"{o.key}.".startswith(f"{name}.")]


def _together(group: str) -> list[str]:
    """Return the choices of a group with their heads, and each of their options once."""
    names, default = options.choices(group), options.default_choice(group)
    rows = [
        f"| `{group}={name}`{' (default)' if name == default else ''} | "
        f"{_head(options.choice_text(group, name))} |"
        for name in names
    ]
    values: dict[str, dict[str, options.Option]] = {}
    for name in sorted(names, key=lambda each: each != default):
        for option in options.options_of(group, name):
            if option.key != f"{group}.kind":  # which is the choice itself
                values.setdefault(option.key, {})[name] = option
    merged = [_merged(key, found, len(names)) for key, found in values.items()]
    return ["\n".join(["| choice | what |", "|---|---|", *rows]), _table(merged)]


def _merged(key: str, found: dict[str, options.Option], choices: int) -> options.Option:
    """Return an option of several choices as one: their value if it is one, and who has it."""
    values = dict.fromkeys(option.value for option in found.values())
    comment = next((o.comment for o in found.values() if o.comment), "")
    only = f" ({', '.join(found)} only)" if len(found) <= min(3, choices - 1) else ""
    value = next(iter(values)) if len(values) == 1 else ""
    differs = " (as the choice has it)" if len(values) > 1 else ""
    return options.Option(key, value, f"{comment}{only}{differs}".strip())


def _head(text: str) -> str:
    """Return the comment at the head of a file."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# "))
    return _escaped(" ".join(lines))


def _table(found: list[options.Option]) -> str:
    if not found:
        return ""
    rows = [f"| `{o.key}` | {_code(o.value)} | {_escaped(o.comment)} |" for o in found]
    return "\n".join(["| option | value | |", "|---|---|---|", *rows])


def _code(value: str) -> str:
    return "`" + value.replace("|", "\\|") + "`" if value else ""


def _escaped(text: str) -> str:
    """Return a comment as Markdown that shows it as it is."""
    return re.sub(r"([\\*_{}\[\]<>|#~$])", r"\\\1", text)


# --------------------------------------------------------------------------------------------------
# Drawings


def house(drawing: str) -> str:
    """Return the floors of a Mermaid flowchart as rows of boxes, the roof on top.

    The pages are read where Mermaid is drawn, and on the site, which loads no scripts.
    """
    floors = re.findall(r"subgraph \w+ .*?\n(.*?)\n *end", drawing, re.DOTALL)
    rows = []
    for floor in floors:
        rooms = "".join(f"<span>{html.escape(room)}</span>" for room in floor.split())
        rows.append(f"<div>{rooms}</div>")
    return f'<div class="house">{"".join(rows)}</div>'


def states(drawing: str) -> str:
    """Return the transitions of a Mermaid state diagram as a table, one row for each.

    A label is what happens, a slash, and what is said then; the start and the end are no states.
    """
    rows = []
    for before, after, label in re.findall(r"^ *(\S+) --> (\S+): (.*)$", drawing, re.MULTILINE):
        happens, _, said = label.partition(" / ")
        cells = ["none" if state == "[*]" else f"<b>{state}</b>" for state in (before, after)]
        cells[1:1] = [html.escape(happens), html.escape(said)]
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("state", "when", "says", "then"))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table class="docutils"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def drawn(drawing: str) -> str:
    """Return what stands on the site in place of a Mermaid drawing."""
    return states(drawing) if drawing.startswith("stateDiagram") else house(drawing)


def fill(app: Any, page: str, source: list[str]) -> None:
    """Put what is generated into a page before it is parsed."""
    text = source[0].replace("<!-- the configuration -->", _if(page, "docs/configuration"))
    text = re.sub(r"<!-- options: (.*?) -->", lambda found: chosen_options(found[1]), text)
    source[0] = re.sub(
        r"```mermaid\n(.*?)```", lambda found: drawn(found[1]), text, flags=re.DOTALL
    )


def _if(page: str, name: str) -> str:
    return configuration() if page == name else ""


def redirect(app: Any, error: Exception | None) -> None:
    """Lead from the root of the site to its first page."""
    if error is None and app.builder.name == "html":
        page = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">'
        (Path(app.outdir) / "index.html").write_text(page + "\n", encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Connect what is generated to the build."""
    app.connect("source-read", fill)
    app.connect("build-finished", redirect)
    app.add_css_file("site.css")
    return {"parallel_read_safe": True}
