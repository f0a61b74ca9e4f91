#!/usr/bin/env bash
# Two ways of onnx 1.23 to write a float32 number as an 8-bit float.
#
# One would guess the same bytes. `helper.make_tensor` saturates: 1000 becomes 448, the largest
# E4M3. `numpy_helper.from_array` of an array that was cast (as ml_dtypes casts) stores NaN, and
# infinity as E5M2. A scale (E8M0) of 5 is 8 by the first, which rounds up, and 4 by the second.
# Both are valid tensors. Hurt: who writes quantised weights; an outlier is one wrong number, or NaN
# in every answer, by the way taken.
#
# Seen on 30 November 2026, with onnx 1.23.2, ml_dtypes 0.6.0 and numpy 2.4.6 (see below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q onnx==1.23.2 ml_dtypes==0.6.0 numpy==2.4.6
cd "$folder"
cat > look.py <<'PY'
import ml_dtypes
import numpy as np
from onnx import TensorProto, helper, numpy_helper

for name, kind, numbers in (
    ("FLOAT8E4M3FN", ml_dtypes.float8_e4m3fn, [1000.0, -600.0, 0.3]),
    ("FLOAT8E5M2", ml_dtypes.float8_e5m2, [70000.0, -1e9, 0.3]),
    ("FLOAT8E8M0", ml_dtypes.float8_e8m0fnu, [0.3, 1.5, 5.0]),
):
    made = helper.make_tensor("x", getattr(TensorProto, name), [3], numbers)
    cast = numpy_helper.from_array(np.array(numbers, np.float32).astype(kind))
    ways = [numpy_helper.to_array(t).astype(np.float32).tolist() for t in (made, cast)]
    print(name, {"make_tensor": ways[0], "from_array": ways[1]})
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="FLOAT8E4M3FN {'make_tensor': [448.0, -448.0, 0.3125], 'from_array': [nan, nan, 0.3125]}
FLOAT8E5M2 {'make_tensor': [57344.0, -57344.0, 0.3125], 'from_array': [inf, -inf, 0.3125]}
FLOAT8E8M0 {'make_tensor': [0.5, 2.0, 8.0], 'from_array': [0.25, 2.0, 4.0]}"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
