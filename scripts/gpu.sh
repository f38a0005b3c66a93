#!/usr/bin/env bash
# All that needs a GPU, in under 8 minutes, from a bare Python 3.12 with torch and transformers,
# without a network:
#
#     scripts/gpu.sh [--device cuda|cpu] [--quick] [--carried FOLDER] [--only PART]... [OUT]
#
# Parts: tests, exactness-float32, exactness-bfloat16, bench, training. Each has a limit of its own
# and writes a file of JSON into OUT ($OUT, or build/gpu); one that fails does not stop the next.
# OUT/summary.json says how each ended, and OUT/log.txt has their output. The exit code is 1 if one
# failed.
#
# --carried: what scripts/gpu_pack.sh wrote; left out: packages and base model are installed.
# --quick: as little as shows that it works, on a CPU too.
set -euo pipefail

device=cuda
carried=
out=${OUT:-build/gpu}
quick=()
only=()
while (($#)); do
    case $1 in
        --device) device=$2 && shift ;;
        --carried) carried=$(realpath "$2") && shift ;;
        --only) only+=("$2") && shift ;;
        --quick) quick=(--quick) ;;
        -*) echo "gpu.sh: unknown option $1" >&2 && exit 2 ;;
        *) out=$1 ;;
    esac
    shift
done

mkdir -p "$out"
out=$(realpath "$out")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: > "$out/log.txt"

source scripts/gpu_environment.sh

patience=1
[[ $device == cuda ]] || patience=8  # limits are those of a GPU
summary=()
failed=0

# part NAME SECONDS COMMAND...: run a command, and note how it ended.
part() {
    local name=$1 limit=$(($2 * patience)) begin=$SECONDS rc=0
    shift 2
    if ((${#only[@]})) && [[ $name != setup && " ${only[*]} " != *" $name "* ]]; then
        return
    fi
    echo "== $name (at most $limit s)" | tee -a "$out/log.txt" >&2
    timeout --kill-after=10 "$limit" "$@" >> "$out/log.txt" 2>&1 || rc=$?
    ((rc == 0)) || failed=1
    echo "   ended with $rc after $((SECONDS - begin)) s" | tee -a "$out/log.txt" >&2
    local ended="\"rc\": $rc, \"seconds\": $((SECONDS - begin)), \"limit_s\": $limit"
    summary+=("{\"part\": \"$name\", $ended}")
    local IFS=,
    echo "{\"device\": \"$device\", \"parts\": [${summary[*]}]}" > "$out/summary.json"
}

if [[ -n $carried ]]; then
    part setup 90 scripts/gpu_unpack.sh "$python" "$carried" "$work"
fi

schedules=4 examples=48
((${#quick[@]} == 0)) || { schedules=1 && examples=8; }
exactness=(tests/e2e/test_exactness.py -m e2e --schedules "$schedules")
pytest=("$python" -m pytest -q -W default --device "$device")  # other versions of packages may warn

part tests 130 "${pytest[@]}" tests/gpu -m gpu --record "$out/tests.json"
for type in float32 bfloat16; do
    part "exactness-$type" 70 \
        "${pytest[@]}" "${exactness[@]}" -k "$type" --record "$out/exactness-$type.json"
done
part bench 80 "$python" -m bench.gpu --device "$device" "${quick[@]}" --record "$out/bench.jsonl"
part training 35 scripts/gpu_train.sh "$python" "$work" "$out/training.json" "$examples"

exit "$failed"
