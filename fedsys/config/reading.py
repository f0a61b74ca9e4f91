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


def copied(tree: Any) -> dict[str, Any] | None:
    """Return a copy of a tree of which OmegaConf would make the same; None where it might not.

    It is one of plain dicts, lists and scalars, in which nothing is an interpolation or missing.
    """
    try:
        return _copied(tree) if type(tree) is dict else None
    except _NotPlain:
        return None


class _NotPlain(Exception):
    """A tree holds more than plain values."""


def _copied(node: Any) -> Any:
    if type(node) is dict and all(type(key) is str for key in node):
        return {key: _copied(value) for key, value in node.items()}
    if type(node) in (list, tuple):
        return [_copied(value) for value in node]
    if node is None or type(node) in (bool, int, float):
        return node
    if type(node) is str and not any(odd in node for odd in _ODD):
        return node
    raise _NotPlain


def merged(tree: Any, news: Any) -> dict[str, Any] | None:
    """Return a plain tree with the values of another over it, as OmegaConf merges them.

    None where OmegaConf might make another of them, or refuse it.
    """
    one, other = copied(tree), copied(news)
    if one is None or other is None:
        return None
    try:
        return _merged(one, other)
    except _NotPlain:
        return None


def _merged(tree: dict[str, Any], news: dict[str, Any]) -> dict[str, Any]:
    for key, value in news.items():
        before: Any = tree.get(key)
        if {type(before), type(value)} == {dict, list}:
            raise _NotPlain
        both = type(before) is type(value) is dict
        tree[key] = _merged(before, value) if both else value
    return tree


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
