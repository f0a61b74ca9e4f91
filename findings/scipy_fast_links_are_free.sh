#!/usr/bin/env bash
# scipy's linprog and milp (HiGHS), asked how many bytes a link carries in one second.
#
# One would guess the bandwidth. A link of 1 or of 8 Gbit/s takes 8e-9 or 1e-9 seconds for a byte,
# and at 1e-9 the coefficient is taken as zero: the constraint is gone, the solver says optimal with
# status 0, and the plan takes 1,000 seconds of the one that there is. Its log would have a line on
# that; scipy hides it, and no option of scipy's changes the bound.
# Hurt: planners in bytes and seconds as soon as links are fast. Count megabytes or microseconds.
#
# Seen on 30 November 2026, with scipy 1.17.1 and numpy 2.4.6 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q scipy==1.17.1 numpy==2.4.6
cd "$folder"
cat > look.py <<'PY'
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

MOST = 1e12
for gbit_s in (1, 7, 8, 10):
    byte_s = 8 / (gbit_s * 1e9)
    plain = linprog([-1], A_ub=[[byte_s]], b_ub=[1], bounds=[(0, MOST)])
    rule = LinearConstraint([[byte_s]], ub=[1])
    whole = milp([-1], integrality=[1], bounds=Bounds(0, MOST), constraints=rule)
    taken = [round(float(r.x[0] * byte_s), 3) for r in (plain, whole)]
    print({"gbit_s": gbit_s, "status": [plain.status, whole.status], "seconds": taken})
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="{'gbit_s': 1, 'status': [0, 0], 'seconds': [1.0, 1.0]}
{'gbit_s': 7, 'status': [0, 0], 'seconds': [1.0, 1.0]}
{'gbit_s': 8, 'status': [0, 0], 'seconds': [1000.0, 1000.0]}
{'gbit_s': 10, 'status': [0, 0], 'seconds': [800.0, 800.0]}"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
