#!/usr/bin/env bash
# Greyscale TIFFs whose zero is white (PhotometricInterpretation 0), read with Pillow 13.
#
# An 8-bit one is turned so that black is 0, as the tag asks. A 16-bit and a float one with the same
# tag are handed out as they are stored: the picture is its own negative, without a word. A reader
# who trusts `Image.open` to hide the tag gets 8-bit scans right and 16-bit scans inverted.
# tifffile, which writes the files here, never applies the tag and tells it as `page.photometric`.
#
# Seen on 29 November 2026, with pillow 13.0.0 and tifffile 2026.3.3 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
cd "$folder"
cat > look.py <<'PY'
import numpy as np
import tifffile
from PIL import Image

dark, light = 0.1, 0.9
seen = {}
for name, kind, top in (("8-bit", np.uint8, 255), ("16-bit", np.uint16, 65535), ("float", np.float32, 1.0)):
    stored = (np.array([[1 - dark, 1 - light]]) * top).astype(kind)  # white is zero
    tifffile.imwrite(f"{name}.tif", stored, photometric="miniswhite")
    with tifffile.TiffFile(f"{name}.tif") as file:
        assert file.pages[0].photometric.name == "MINISWHITE"
    values = np.asarray(Image.open(f"{name}.tif"), dtype=np.float64)[0] / top
    seen[name] = "as meant" if values[0] < values[1] else "inverted"
print(seen)
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="{'8-bit': 'as meant', '16-bit': 'inverted', 'float': 'inverted'}"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
