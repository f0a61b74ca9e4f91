"""The part of a run's page about privacy: the claim, the budget over rounds, and what leaks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fedsys.errors import ConfigError
from fedsys.planning.leakage import FILE
from fedsys.runs.plots import points_of
from fedsys.runs.report import charts
from fedsys.runs.report.charts import Curve
from fedsys.runs.report.loading import Run

PICTURES = {
    "reconstructions.png": "Images from activations, as an inverse network sees them",
    "leakage.png": "How like the images those are",
}
"""Pictures of an audit, in its folder ``plots``."""

UNITS = {"record": "example", "client": "client", "cut": "example at the cut"}


@dataclass(frozen=True)
class AuditFolder:
    """What ``fedsys bench leakage`` left in a folder.

    Attributes:
        path: The folder.
        cuts: What leaks at each cut, by mechanism.
        models: What is told by final models, with lower bounds on epsilon.
        releases: Lower bounds on epsilon by what is released at the cut.
    """

    path: Path
    cuts: Sequence[Mapping[str, Any]] = ()
    models: Sequence[Mapping[str, Any]] = ()
    releases: Sequence[Mapping[str, Any]] = ()


def section(run: Run, audit: Path | None = None) -> str:
    """Return what a run promised and what leaks nevertheless, as HTML without a head.

    Empty where nothing was promised and no audit is given.

    Args:
        run: The run.
        audit: Folder of an audit, or its ``leakage.json``; None: the run's ``policy.leakage``.
    """
    mechanism = str(run.settings.get("privacy.mechanism") or "none")
    told = run.settings.get("policy.leakage")
    folder = audit or (Path(str(told)).expanduser() if told else None)
    promised = "" if mechanism == "none" else _promise(run, mechanism)
    return promised + ("" if folder is None else _audited(folder))


def _promise(run: Run, mechanism: str) -> str:
    claim = run.result.get("privacy")
    sentence = claim.get("claim") if isinstance(claim, Mapping) else None
    budget = float(run.settings.get("privacy.epsilon") or 0.0)
    x, y = points_of(run.rounds, "round", "epsilon")
    if not sentence:
        spent = f"{y[-1]:.3g}" if y else "nothing"
        sentence = (
            f"Not finished: {spent} spent of the epsilon of {budget:g} for each "
            f"{UNITS.get(mechanism, mechanism)}"
        )
    parts = [f"<p><b>{escape(str(sentence))}.</b></p>"]
    if mechanism == "record" and str(run.settings.get("policy.kind", "none")) != "none":
        parts.append(
            '<p class="note running">It says nothing about what edge servers see: activations left '
            "devices as they are, and images can be read from them at any epsilon.</p>"
        )
    if y:
        curves = [
            Curve(f"spent {y[-1]:.3g}", x, y, 0),
            Curve(f"budget {budget:g}", [x[0], x[-1]], [budget, budget], 1, dashed=True),
        ]
        title = "Privacy spent by round"
        drawn = charts.lines(
            title, curves, by="round", note="(epsilon of the unit with least left)"
        )
        parts.append(f'<div class="grid2">{drawn}</div>')
    return "".join(parts)


# --------------------------------------------------------------------------------------------------
# The audit


def _audited(given: Path) -> str:
    try:
        audit = read(given)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return f'<p class="note failed">{escape(f"no audit in {given}: {problem}")}</p>'
    pictures = [
        charts.figure(title, drawn)
        for name, title in PICTURES.items()
        if (drawn := charts.embedded(audit.path / "plots" / name, title))
    ]
    wide = f'<div class="wide">{"".join(pictures)}</div>' if pictures else ""
    return (
        f'<h3>What leaks, by the audit</h3><p class="small muted"><code>{escape(str(audit.path))}'
        f"</code></p>{_cuts(audit)}{_bounds(audit)}{wide}"
    )


def check_audit(given: Path) -> None:
    """Refuse a folder that holds no audit.

    Raises:
        ConfigError: It does not.
    """
    try:
        read(given)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ConfigError.of(
            "report.audit", given, "must be the folder of an audit",
            "fedsys bench leakage makes one",
        ) from problem  # fmt: skip


def read(given: Path) -> AuditFolder:
    """Return an audit.

    Args:
        given: Its folder, or the ``leakage.json`` in it.

    Raises:
        OSError: There is none.
        ValueError: It is damaged; also KeyError and TypeError.
    """
    folder = given if given.is_dir() else given.parent
    file = folder / FILE if given.is_dir() else given
    cuts = json.loads(file.read_text(encoding="utf-8"))["cuts"]
    info = folder / "run.json"
    result = json.loads(info.read_text(encoding="utf-8")).get("result") if info.is_file() else {}
    more = {name: (result or {}).get(name) or [] for name in ("models", "releases")}
    return AuditFolder(folder, [dict(row) for row in cuts], **more)


def _cuts(audit: AuditFolder) -> str:
    head = ["mechanism", "cut behind", "SSIM", "PSNR (dB)", "labels from gradients (AUC)"]
    rows = [
        [_mechanism(row), f"{row.get('after', '')} ({row.get('cut')})", _number(row.get("ssim")),
         _number(row.get("psnr")), _number(row.get("label_auc"))]
        for row in audit.cuts
    ]  # fmt: skip
    return charts.table(head, rows) if rows else ""


def _bounds(audit: AuditFolder) -> str:
    head = ["attack", "mechanism", "membership (AUC)", "epsilon at least", "claimed"]
    rows = [
        [name, _mechanism(row), _number(row.get("loss_auc")), _number(row.get("epsilon_at_least")),
         "nothing" if row.get("claim") is None else _number(row["claim"])]
        for name, found in (("final model", audit.models), ("releases", audit.releases))
        for row in found
    ]  # fmt: skip
    title = "<h3>Lower bounds on epsilon, beside what is claimed</h3>"
    return title + charts.table(head, rows) if rows else ""


def _mechanism(row: Mapping[str, Any]) -> str:
    epsilon = row.get("epsilon", row.get("claim"))
    return str(row.get("mechanism")) + ("" if epsilon is None else f", epsilon {epsilon:g}")


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "–"
