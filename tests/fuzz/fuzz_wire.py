"""Coverage-guided fuzzing of the frame parser; needs `atheris`, which the suite does not.

Run ``python tests/fuzz/fuzz_wire.py -max_total_time=600 CORPUS_DIR``. A frame that parses must
encode to a frame that parses again; anything but FrameError is a finding.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["fedsys.wire"]):
    from fedsys.errors import FrameError
    from fedsys.wire import Limits, decode, encode

LIMITS = Limits(frame_bytes=1 << 20, tensor_bytes=1 << 20, tensors=64, header_bytes=1 << 14)


def one_input(data: bytes) -> None:
    try:
        frame = decode(data, limits=LIMITS)
    except FrameError:
        return
    again = decode(encode(frame), limits=LIMITS)
    assert again.kind == frame.kind
    assert list(again.tensors) == list(frame.tensors)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
