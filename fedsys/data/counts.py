"""How many examples of each class every client holds, as numbers and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedsys.data.dataset import Indices
from fedsys.files import write_atomic

_NUMBERED = 12  # up to this many clients and classes a cell has room for its number
_NAMED = 30  # up to this many clients or classes every one is named at its axis


def class_counts(labels: Indices, parts: Sequence[Indices], num_classes: int) -> Indices:
    """Count examples.

    Args:
        labels: Labels of the training part, shape ``(N,)``.
        parts: The indices of each of K clients.
        num_classes: Number of classes.

    Returns:
        int64 of shape ``(K, num_classes)``.
    """
    labels = np.asarray(labels)
    rows = [np.bincount(labels[part], minlength=num_classes) for part in parts]
    return np.array(rows, dtype=np.int64).reshape(len(parts), num_classes)


def write_class_counts(counts: Indices, classes: Sequence[str], path: Path) -> None:
    """Write class counts as CSV: a line for each client, a column for each class.

    Args:
        counts: Shape ``(clients, classes)``, as `class_counts` returns.
        classes: Names of the classes.
        path: CSV file to write.

    Raises:
        RunError: The file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    # A name on several lines would make lines that are no rows.
    writer.writerow(["client", *(" ".join(name.split()) for name in classes)])
    writer.writerows([client, *row] for client, row in enumerate(counts.tolist()))
    write_atomic(path, text.getvalue().encode())


def plot_class_counts(counts: Indices, classes: Sequence[str], path: Path) -> None:
    """Draw class counts: a map of (class, client) below the number of examples per client.

    Args:
        counts: Shape ``(clients, classes)``, as `class_counts` returns.
        classes: Names of the classes.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    clients, kinds = counts.shape
    width = float(np.clip(3.5 + 0.45 * clients, 6.0, 14.0))
    height = float(np.clip(2.5 + 0.3 * kinds, 4.5, 10.0))
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    totals, cells = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3])
    edges = np.arange(clients + 1) - 0.5
    totals.stairs(counts.sum(axis=1), edges, fill=True, color="tab:blue")
    totals.set_ylabel("examples")
    totals.set_ylim(bottom=0)
    totals.set_title("Training examples per client and class")
    totals.spines[["top", "right"]].set_visible(False)
    picture = cells.imshow(counts.T, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    figure.colorbar(picture, ax=cells, label="examples")
    cells.set_xlabel("client")
    cells.set_ylabel("class")
    if clients <= _NAMED:
        cells.set_xticks(np.arange(clients))
    else:
        cells.xaxis.set_major_locator(MaxNLocator(integer=True))
    if kinds <= _NAMED:
        # A folder may be called "$x$"; a class is named, never typeset.
        cells.set_yticks(np.arange(kinds), labels=list(classes), parse_math=False)
    else:
        cells.yaxis.set_major_locator(MaxNLocator(integer=True))
    if clients <= _NUMBERED and kinds <= _NUMBERED:
        dark = counts.max() / 2
        for (client, kind), count in np.ndenumerate(counts):
            color = "white" if count > dark else "black"
            cells.text(client, kind, str(count), ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, dpi=120)
