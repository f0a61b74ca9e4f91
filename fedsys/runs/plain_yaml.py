"""The configuration in a run's folder as plain values, read by the parser in C where there is one.

Whoever reads a folder needs no OmegaConf. A page on many runs reads many of these files, and
PyYAML's parser in Python took a third of the time of each.
"""

from __future__ import annotations

from typing import Any


def load(text: str) -> Any:
    """Return the values of a YAML text.

    Raises:
        YAMLError: It is none; in the words of PyYAML's parser in Python.
    """
    import yaml

    by_c = getattr(yaml, "CSafeLoader", None)  # PyYAML may be built without libyaml
    if by_c is not None and "\t" not in text:  # more may stand before tabs in C
        try:
            return yaml.load(text, Loader=by_c)
        except yaml.YAMLError:
            pass
    return yaml.safe_load(text)
