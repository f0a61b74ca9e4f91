"""Texts are read by a parser in C as OmegaConf reads them, and written by an emitter in C."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsys.config import CONF, composing, reading, to_text, with_values, writing
from fedsys.errors import ConfigError

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
)
LOOKS_LIKE_MORE = st.sampled_from(
    ["1e-3", "1e5", "0x1f", "0o17", "017", "1_000", "12:30:45", "2026-11-29", "yes", "off", "~",
     "null", ".5", "-.inf", ".nan", "+1", "1.", "=", "<<", "a: b", "# no", "- x", "'", '"', "\t"]
)  # fmt: skip
TREES = st.recursive(
    SCALARS | LOOKS_LIKE_MORE,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3)
    ),
    max_leaves=12,
)


def by_omegaconf(text):
    return OmegaConf.to_container(OmegaConf.create(text), resolve=True)


@given(st.dictionaries(st.sampled_from("abcde"), TREES))
def test_what_was_written_is_read_as_omegaconf_reads_it(tree):
    text = yaml.dump(tree, allow_unicode=True)
    try:
        expected = by_omegaconf(text)
    except OmegaConfBaseException:  # text that looks like an interpolation
        with pytest.raises(OmegaConfBaseException):
            reading.read(text)
        return
    got = reading.read(text)
    assert got == expected and repr(got) == repr(expected)


def is_read_as_by_omegaconf(text):
    """Hold a text to the same values, or to an error in the same words."""
    try:
        expected = by_omegaconf(text)
    except (OmegaConfBaseException, yaml.YAMLError, AssertionError) as error:
        with pytest.raises(type(error)) as caught:
            reading.read(text)
        assert str(caught.value) == str(error)
    else:
        assert repr(reading.read(text)) == repr(expected)


@given(LOOKS_LIKE_MORE | st.text("0123456789.e+-_: xob~", min_size=1, max_size=8))
def test_plain_scalars_are_what_they_are_to_omegaconf(scalar):
    for text in (f"a: {scalar}\n", f"a: [{scalar}]\n", f"{scalar}: 1\n"):
        is_read_as_by_omegaconf(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2\n", "a: [1\n", "5", "", "a", "- 1\n- 2\n", "a: ???\n", "a: ${b}\nb: 1\n",
        "a: ${c}\n", "a: {b: 1, b: 2}\n", "a: !!set {x}\n", "a: !!binary aGk=\n", "1: 2\n",
        "null: 2\n", "a: &x [1]\nb: *x\n", "a: &x {c: 1}\nb: {<<: *x, d: 2}\n", "\ta: 1\n",
        "a: !!python/object/apply:os.getcwd []\n",
    ],
)  # fmt: skip
def test_what_is_odd_is_read_and_refused_in_omegaconfs_words(text):
    is_read_as_by_omegaconf(text)


def test_the_parser_is_that_in_c():
    text = to_text(yaml.safe_load((CONF / "config.yaml").read_text()))
    assert reading.parsed(text) == by_omegaconf(text)
    if yaml.__with_libyaml__:
        assert yaml.cyaml.CParser in reading._loader().__mro__


@given(st.dictionaries(st.sampled_from("abcde"), TREES))
def test_what_is_written_says_what_it_said(tree):
    assert repr(reading.parsed(writing.written(tree))) == repr(tree) or "\t" in repr(tree)


@given(st.dictionaries(st.sampled_from("abcde"), st.recursive(
    SCALARS.filter(lambda value: not isinstance(value, str)) | LOOKS_LIKE_MORE,
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("xyz"), inner),
)))  # fmt: skip
def test_a_text_is_written_as_omegaconf_writes_it(tree):
    assert writing.written(tree) == OmegaConf.to_yaml(OmegaConf.create(tree))


def test_the_emitter_is_that_in_c():
    if yaml.__with_libyaml__:
        assert yaml.cyaml.CEmitter in writing._dumper().__mro__


def test_hydra_composes_once_and_reads_its_files_by_the_parser_in_c(monkeypatch):
    """Hydra composed everything twice for each command, and read it by a parser in Python."""
    from hydra._internal.hydra import Hydra
    from hydra.core.plugins import Plugins

    outer, asked = Hydra.get_mode, []
    source = next(x for x in Plugins.instance().discover() if x.__name__ == "FileConfigSource")
    read = source("main", str(CONF)).load_config
    expected = read("config")
    monkeypatch.setattr(yaml, "SafeLoader", None)  # nothing is made from the parser in Python
    monkeypatch.setattr(Hydra, "compose_config", lambda *_, **__: asked.append(True))
    with composing.swiftly(["rounds=2"]):
        found = read("config")
        assert Hydra.get_mode(None, "config", []) is None and not asked
    assert Hydra.get_mode is outer
    assert found.config == expected.config and found.header == expected.header
    with composing.swiftly(["hydra.mode=MULTIRUN"]):
        assert Hydra.get_mode is outer
    with composing.swiftly(["+experiment=swept"]):  # whose file may ask for a sweep
        assert Hydra.get_mode is outer
    with composing.swiftly([], ["--config-dir=own"]):
        assert Hydra.get_mode is outer


def test_other_values_of_a_text_are_what_omegaconf_makes_of_them():
    text = to_text({"rounds": 3, "data": {"source": "digits"}, "resume": None})
    plain, merged = with_values(text, rounds=4), with_values(text, data={"part": 0.5})
    assert plain == to_text({"rounds": 4, "data": {"source": "digits"}, "resume": None})
    assert by_omegaconf(merged)["data"] == {"source": "digits", "part": 0.5}
    assert by_omegaconf(with_values(text, resume="${data.source}"))["resume"] == "digits"


PLAIN = st.recursive(
    SCALARS | LOOKS_LIKE_MORE,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xyz"), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from("ab"), PLAIN), st.dictionaries(st.sampled_from("abc"), PLAIN)
)
def test_values_are_set_as_omegaconf_merges_them(tree, news):
    """OmegaConf made a node of each value for that, which was most of the time of a small plan."""
    try:
        merged = OmegaConf.merge(OmegaConf.create(tree), OmegaConf.create(news))
        expected = to_text(merged)
    except (OmegaConfBaseException, ConfigError):
        with pytest.raises((OmegaConfBaseException, ConfigError)):
            with_values(writing.written(tree), **news)
    else:
        assert with_values(writing.written(tree), **news) == expected


class Missing(str):
    """No plain text."""


@pytest.mark.parametrize("odd", ["${b}", "???", Missing("a"), object(), {1: 2}, b"x"])
def test_what_is_more_than_plain_is_left_to_omegaconf(odd):
    assert reading.copied({"a": [odd]}) is None
    assert reading.copied(OmegaConf.create({"a": 1})) is None
    assert reading.copied({"a": ({"b": None},)}) == {"a": [{"b": None}]}
