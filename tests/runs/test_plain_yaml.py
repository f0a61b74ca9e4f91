"""What is read in C is what PyYAML reads in Python, also where it is damaged."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedsys.runs import plain_yaml

TEXTS = st.lists(
    st.sampled_from(["a: 1\n", "b:\n", "  c: [1, 2.5]\n", "\t", "- x\n", "'", '"', "{", "]", "é",
                     "\x00", "2026-12-01", ": ", "&x ", "*x", "!!set", "null", "1e5", "\n"]),
    max_size=8,
).map("".join)  # fmt: skip


@given(TEXTS)
def test_a_text_has_the_same_values_or_the_same_error_in_c(text):
    try:
        expected = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        with pytest.raises(type(error)) as caught:
            plain_yaml.load(text)
        assert str(caught.value) == str(error)
    else:
        assert repr(plain_yaml.load(text)) == repr(expected)
