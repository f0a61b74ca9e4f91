"""Values as the YAML text of a run: as OmegaConf writes it, by the emitter in C where there is one.

Each run that is composed is written once, and a sweep, a benchmark or the tests compose hundreds:
PyYAML's emitter in Python took a third of that time.

What is private in OmegaConf and used here: its rule for which texts are quoted.
"""

from __future__ import annotations

import functools
from typing import Any


def written(values: Any) -> str:
    """Return the YAML of plain dicts, lists and scalars; what they say is read again from it."""
    import yaml

    text: str = yaml.dump(
        values, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=_dumper()
    )
    return text


@functools.lru_cache(maxsize=1)
def _dumper() -> Any:
    from omegaconf._utils import get_omega_conf_dumper

    by_python: Any = get_omega_conf_dumper()
    try:
        from yaml.cyaml import CDumper  # type: ignore[attr-defined, unused-ignore]
    except ImportError:  # PyYAML was built without libyaml
        return by_python

    class Dumper(CDumper):
        """Writes in C, and quotes what OmegaConf quotes."""

    Dumper.add_representer(str, by_python.str_representer)
    return Dumper
