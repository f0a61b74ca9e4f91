#!/usr/bin/env bash
# networkx 3.6: minimum_cut with capacities in tenths.
#
# One would guess that a cut's parts hold source and sink, and that the edges between them add up to
# its value, but for rounding. What is saturated is told by `flow == capacity`, and a flow added up
# from floats misses that by a digit: the default algorithm gives the value 2.0 and parts between
# which 2.4 crosses; Edmonds-Karp gives parts of which one is empty. Nothing is raised. One in some
# hundred random graphs of five nodes is so, with all algorithms but Dinitz's, which raises.
# Hurt: who divides a model between hosts by seconds. Make the capacities whole numbers.
#
# Seen on 30 November 2026, with networkx 3.6.1 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q networkx==3.6.1
cd "$folder"
cat > look.py <<'PY'
import networkx
from networkx.algorithms.flow import edmonds_karp, preflow_push

FIRST = [(0, 1, 0.3), (0, 2, 1.4), (0, 3, 1.0), (1, 3, 0.9), (2, 1, 1.0), (2, 3, 0.1)]
SECOND = [(0, 1, 1.0), (0, 2, 0.3), (1, 2, 0.9), (2, 1, 0.7), (2, 3, 0.9)]
for edges, algorithm in ((FIRST, preflow_push), (SECOND, edmonds_karp)):
    for unit, written in (("as floats", float), ("in whole tenths", lambda c: round(10 * c))):
        graph = networkx.DiGraph()
        for tail, head, capacity in edges:
            graph.add_edge(tail, head, capacity=written(capacity))
        value, (near, far) = networkx.minimum_cut(graph, 0, 3, flow_func=algorithm)
        crossing = sum(c for u, v, c in graph.edges(data="capacity") if u in near and v in far)
        seen = {"value": round(value, 3), "crossing": round(crossing, 3), "near": sorted(near)}
        print(algorithm.__name__, unit, seen)
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="preflow_push as floats {'value': 2.0, 'crossing': 2.4, 'near': [0, 2]}
preflow_push in whole tenths {'value': 20, 'crossing': 20, 'near': [0, 1, 2]}
edmonds_karp as floats {'value': 0.9, 'crossing': 0, 'near': []}
edmonds_karp in whole tenths {'value': 9, 'crossing': 9, 'near': [0, 1, 2]}"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
