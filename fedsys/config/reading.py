"""The YAML text of a run, read as OmegaConf reads it, by the parser in C where there is one.

Every process of a run reads that text, and tests and benchmarks read it many times; PyYAML's parser
in Python takes most of that time.

What is private in OmegaConf and used here: the loader that it makes for PyYAML, with rules of its
own for numbers, dates, and keys that stand twice.
"""

from __future__ import annotations

import functools
from typing import Any

_ODD = ("${", "???")
"""What is more than a value to OmegaConf: interpolations, and values that must be given."""


def read(text: str) -> Any:
    """Return what a text says: dicts, lists and scalars, with interpolations resolved.

    Raises:
        YAMLError: It is no YAML.
        OmegaConfBaseException: An interpolation does not resolve, or a value has a type that no
            configuration has.
        AssertionError: It is neither a mapping nor a list.
    """
    from omegaconf import OmegaConf

    tree = parsed(text)
    if isinstance(tree, dict) and is_literal(text):
        return tree
    return OmegaConf.to_container(OmegaConf.create(tree), resolve=True)


def is_literal(text: str) -> bool:
    """Return whether a text holds nothing but values: no interpolation, nothing to be given."""
    return not any(odd in text for odd in _ODD)


def parsed(text: str) -> dict[Any, Any] | str:
    """Return the tree that a text says, of which OmegaConf makes what it makes of the text.

    The text itself where that is not certain: OmegaConf has words of its own for what is wrong.
    """
    import yaml

    if "\t" in text:  # more may stand before tabs in C
        return text
    try:
        tree = yaml.load(text, Loader=_loader())
    except yaml.YAMLError:
        return text
    return tree if isinstance(tree, dict) and _is_plain(tree) else text


def _is_plain(node: Any) -> bool:
    if isinstance(node, dict):
        return all(type(key) is str for key in node) and all(map(_is_plain, node.values()))
    if isinstance(node, list):
        return all(map(_is_plain, node))
    return node is None or isinstance(node, str | int | float)


@functools.lru_cache(maxsize=1)
def _loader() -> Any:
    from omegaconf._utils import get_yaml_loader
    from yaml.constructor import SafeConstructor
    from yaml.resolver import Resolver

    by_python: Any = get_yaml_loader()
    try:
        from yaml.cyaml import CParser  # type: ignore[attr-defined, unused-ignore]
    except ImportError:  # PyYAML was built without libyaml
        return by_python

    class Loader(CParser, by_python):  # type: ignore[misc]
        """Parses in C, and makes values as OmegaConf's loader does."""

        def __init__(self, stream: Any) -> None:
            CParser.__init__(self, stream)
            SafeConstructor.__init__(self)
            Resolver.__init__(self)

    return Loader
