#!/usr/bin/env bash
# kmeans1d 0.5, which promises the optimal grouping of numbers on a line, asked for times of day.
#
# One would guess that adding the same number to all values changes no group. Counted from 0, three
# bursts of requests a minute apart are three groups. Counted from 1970, as every log does, one
# request that came two seconds after the first burst ends is put elsewhere: the sums of squares of
# 1.79e9 have no digits left for a second, and nothing says so. The result is not optimal by far.
# With fewer distinct values than groups a centre 0.0 is made up that no value is near.
# Hurt: who groups devices or requests by their time stamps. Subtract the smallest value first.
#
# Seen on 30 November 2026, with kmeans1d 0.5.0 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q kmeans1d==0.5.0
cd "$folder"
cat > look.py <<'PY'
import kmeans1d

bursts = [0, 1, 2, 60, 61, 62, 120, 121, 122]


def squares(values, groups):
    mean = {g: sum(v for v, h in zip(values, groups) if h == g) / groups.count(g) for g in groups}
    return round(sum((v - mean[g]) ** 2 for v, g in zip(values, groups)))


for begin in (0, 1_790_000_000):
    groups = kmeans1d.cluster([float(begin + second) for second in bursts], 3).clusters
    print({"from": begin, "groups": groups, "squares": squares(bursts, groups)})
print({"centres of 7, 7, 7": kmeans1d.cluster([7, 7, 7], 2).centroids})
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="{'from': 0, 'groups': [0, 0, 0, 1, 1, 1, 2, 2, 2], 'squares': 6}
{'from': 1790000000, 'groups': [0, 0, 0, 0, 1, 1, 2, 2, 2], 'squares': 2615}
{'centres of 7, 7, 7': [0.0, 7.0]}"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
