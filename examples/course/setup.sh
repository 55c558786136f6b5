#!/usr/bin/env bash
# Gradescope runs this once, as root, when it builds the autograder. It installs Python's packages.
set -euo pipefail

root=${AUTOGRADER_ROOT:-/autograder}
project=$root/source
python=$root/venv/bin/python

if ! python3 -c 'import ensurepip' 2>/dev/null; then
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install --yes python3 python3-venv
fi
python3 -m venv "$root/venv"

# On Linux pip's usual index has PyTorch with CUDA: several gigabytes, which no autograder needs. make_zip.py
# --torch-index puts the address of CPU builds into this file.
index=()
if [[ -s $project/torch_index.txt ]]; then
    index=(--index-url "$(<"$project/torch_index.txt")")
else
    echo "setup.sh: no --torch-index was given, so CUDA comes along, and this takes long"
fi
"$python" -m pip install "${index[@]}" "$(grep '^torch' "$project/requirements.txt")"
"$python" -m pip install -r "$project/requirements.txt"
