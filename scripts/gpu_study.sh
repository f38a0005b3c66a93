#!/usr/bin/env bash
# Run a study (docs/training.md, "Does sharing pay?") where there is a GPU, from a bare Python 3.12
# with torch and transformers, without a network, and bring its records back:
#
#     scripts/gpu_study.sh [--device cuda|cpu] [--carried FOLDER] [--study FILE] [--results FOLDER]
#                          [--seconds N] [--workers N] [--together N] [--no-graphs] [--tested]
#                          [--fresh-class] [--until PHASE] [--regardless] [OUT]
#
# It goes on from the records in --results (crma/results), ends --seconds (480) after it began, or at
# the end of the phase --until, and leaves in OUT ($OUT, or build/gpu):
#   log.txt        what it said
#   speed.json     joint steps a second, by processes and with and without CUDA graphs
#   STUDY.md       the tables of all phases so far
#   dropped.txt    records that --fresh-class deleted: delete them too before you unpack new ones
#   records.tgz.*  the new records and decisions, in parts of 15 MiB. To go on from them:
#                  cat OUT/records.tgz.* | tar xz -C crma/results
# The exit code is that of the study; 124: its time was up.
#
# --carried: what scripts/gpu_pack.sh FOLDER --data wrote; left out: all is installed and built.
# --workers, --together: so many processes, in each of which so many runs of a kind train at once: one
#   run of a small model does not fill a GPU. Without --workers, the fastest of 1 to 8 processes are
#   taken, and tests/gpu/test_training.py runs first. --together is 24, or 12 below 100 GiB.
# --tested: leave out those tests.
# --no-graphs: do not record passes as CUDA graphs. So it is, too, if they are no gain or those tests
#   fail.
# --fresh-class: on another class of GPU than that of the seeds that are begun, begin them anew.
#   Without it, the study then ends before any work.
# Without --until, the phases of the shipped study after full-size, which take hours, are begun only when
# all others are done.
set -euo pipefail

device=cuda carried= study=crma/experiments/sharing.toml results=crma/results seconds=480
out=${OUT:-build/gpu}
workers= together= until= tested=
options=()
fresh=()
while (($#)); do
    case $1 in
        --device) device=$2 && shift ;;
        --carried) carried=$(realpath "$2") && shift ;;
        --study) study=$(realpath "$2") && shift ;;
        --results) results=$(realpath -m "$2") && shift ;;
        --seconds) seconds=$2 && shift ;;
        --workers) workers=$2 && shift ;;
        --together) together=$2 && shift ;;
        --until) until=$2 && shift ;;
        --regardless) options+=(--regardless) ;;
        --tested) tested=yes ;;
        --no-graphs) options+=(--no-graphs) ;;
        --fresh-class) fresh=(--fresh-class) ;;
        -*) echo "gpu_study.sh: unknown option $1" >&2 && exit 2 ;;
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
rm -f "$out"/records.tgz.* "$out"/dropped.txt "$out"/speed.json

source scripts/gpu_environment.sh

# say WORDS...: to the log and to whoever waits.
say() {
    echo "== $* (at $SECONDS s)" | tee -a "$out/log.txt" >&2
}

# limited SECONDS COMMAND...: run a command, until the time of the script is up at the latest.
limited() {
    local left=$((seconds - SECONDS)) limit=$1
    shift
    ((limit < left)) || limit=$left
    ((limit > 0)) || return 124
    timeout --kill-after=20 --signal=INT "$limit" "$@"
}

# crma_study SECONDS ARGUMENTS...: the command on the copy of the records.
crma_study() {
    local limit=$1
    shift
    limited "$limit" "$python" -m crma study "$study" --results "$work/results" \
        --work "$work/runs" --together "$together" "$@"
}

if [[ -n $carried ]]; then
    say "unpack $carried"
    scripts/gpu_unpack.sh "$python" "$carried" "$work" >> "$out/log.txt" 2>&1
fi
mkdir -p "$work/results"
[[ ! -d $results ]] || cp -r "$results/." "$work/results"
touch "$work/begun"
sleep 0.1 # so that no file has the time of the mark

if [[ -z $together ]]; then
    memory='import torch; c = torch.cuda; g = c.is_available() and c.get_device_properties(0).total_memory
print(24 if g and g >= 100 * 2**30 else 12)'
    together=$("$python" -c "$memory") || together=12
fi

# measure: set the number of processes, and whether there are graphs, by what is found here.
measure() {
    local fastest='import json, sys; best = json.load(open(sys.argv[1]))["fastest"]
print(best["workers"], best["graphs"])'
    say "measure the speed"
    workers=4 graphs=False # if that fails; where the study refuses to begin, it says so again
    if crma_study 120 --workers 8 --speed --json "${fresh[@]}" \
        > "$out/speed.json" 2>> "$out/log.txt"; then
        read -r workers graphs < <("$python" -c "$fastest" "$out/speed.json")
    fi
    [[ $graphs == True ]] || options+=(--no-graphs)
    [[ -z $tested && $graphs == True ]] || return 0
    say "test what is recorded"
    local tests=("$python" -m pytest -q -W default --device "$device" -p no:cacheprovider -m gpu)
    limited 90 "${tests[@]}" tests/gpu/test_training.py -k "not fails" >> "$out/log.txt" 2>&1 || {
        say "the tests failed: no graphs"
        options+=(--no-graphs)
    }
}

[[ -n $workers ]] || measure
rc=0
stops=("$until")
if [[ -z $until ]] && grep -qs '"full-size"' "$study"; then
    stops=(full-size "")
fi
for stop in "${stops[@]}"; do
    ((rc == 0)) || break
    say "the study to ${stop:-its end}: $workers processes, $together runs together ${options[*]}"
    crma_study "$seconds" --workers "$workers" --until "$stop" "${options[@]}" "${fresh[@]}" \
        >> "$out/log.txt" 2>&1 || rc=$?
done

say "pack what is new"
if [[ -d $results ]]; then
    (cd "$results" && find . -type f) | while read -r name; do
        [[ -e $work/results/$name ]] || echo "$name"
    done > "$work/dropped"
    [[ ! -s $work/dropped ]] || cp "$work/dropped" "$out/dropped.txt"
fi
find "$work/results" -maxdepth 1 -name '*.md' -newer "$work/begun" -exec cp {} "$out" \;
(cd "$work/results" && find . -type f -newer "$work/begun" -print0 | sort -z) > "$work/new"
tar -C "$work/results" --null --files-from="$work/new" -czf - |
    split --bytes=15M --numeric-suffixes - "$out/records.tgz."
say "ended with $rc; $(tr -cd '\0' < "$work/new" | wc -c) new files"
exit "$rc"
