#!/usr/bin/env bash
# absl-py, which dp-accounting brings, and whoever configures logging after it (as Hydra does).
#
# At its import absl keeps the object that is standard error at that moment. `logging.config` closes
# all handlers that there were, and absl's then closes this object, unless it is standard error now.
# So where standard error was redirected during the import (a test runner, a notebook, a
# `redirect_stderr`), the redirected stream is closed for everyone who still writes to it; nobody
# has to have logged anything. Captured streams of a test runner live on: each later test fails.
#
# Seen on 29 November 2026, with dp-accounting 0.6.0 and absl-py 2.5.1 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q dp-accounting==0.6.0 absl-py==2.5.1
cd "$folder"
cat > look.py <<'PY'
import io
import logging.config
from contextlib import redirect_stderr

kept = io.StringIO()
with redirect_stderr(kept):
    import dp_accounting
before = kept.closed
logging.config.dictConfig({"version": 1})
print({"module": dp_accounting.__name__, "closed before": before, "closed after": kept.closed})
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="{'module': 'dp_accounting', 'closed before': False, 'closed after': True}"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
