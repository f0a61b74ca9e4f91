#!/usr/bin/env bash
# numpy's mean of the small types of ml_dtypes 0.6 (bfloat16, float8, int4).
#
# numpy adds float16 in float32 and in pairs, so one would guess that the mean of a thousand ones
# is one. Of bfloat16 it is 0.256 and of float8 0.016: such types add one after the other in their
# own precision, where 256 + 1 (16 + 1) is 256 (16), and int4 wraps. The deviation of a constant is
# then not zero, while the product of a vector with itself is right, as that is made in float32.
# Hurt: whoever averages weights or metrics that were sent as bfloat16. `mean(dtype=np.float32)`.
#
# Seen on 30 November 2026, with ml_dtypes 0.6.0 and numpy 2.4.6 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q ml_dtypes==0.6.0 numpy==2.4.6
cd "$folder"
cat > look.py <<'PY'
import ml_dtypes
import numpy as np

for kind in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
    ones = np.ones(1000, kind)
    print(
        np.dtype(kind).name,
        {"sum": float(ones.sum()), "mean": round(float(ones.mean()), 3)},
        {"std": round(float(ones.std()), 3), "product": float(ones @ ones)},
        {"mean in float32": float(ones.mean(dtype=np.float32))},
    )
print("int4", {"sum": int(np.ones(1000, ml_dtypes.int4).sum())})
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="float16 {'sum': 1000.0, 'mean': 1.0} {'std': 0.0, 'product': 1000.0} {'mean in float32': 1.0}
bfloat16 {'sum': 256.0, 'mean': 0.256} {'std': 0.504, 'product': 1000.0} {'mean in float32': 1.0}
float8_e4m3fn {'sum': 16.0, 'mean': 0.016} {'std': 0.125, 'product': 1000.0} {'mean in float32': 1.0}
int4 {'sum': -8}"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
