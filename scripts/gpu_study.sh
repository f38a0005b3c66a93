#!/usr/bin/env bash
# Run a study (docs/training.md, "Does sharing pay?") where there is a GPU, from a bare Python 3.12
# with torch and transformers, without a network, and bring its records back:
#
#     scripts/gpu_study.sh [--device cuda|cpu] [--carried FOLDER] [--study FILE] [--results FOLDER]
#                          [--seconds N] [--workers N] [--together N]
#                          [--until PHASE] [--regardless] [OUT]
#
# It goes on from the records in --results (crma/results), stops after --seconds (480) or at the end
# of the phase --until, and leaves in OUT ($OUT, or build/gpu):
#   log.txt        what it said
#   STUDY.md       the tables of all phases so far
#   records.tgz.*  the new records and decisions, in parts of 15 MiB. To go on from them:
#                  cat OUT/records.tgz.* | tar xz -C crma/results
# The exit code is that of the study; 124: its time was up.
#
# --carried: what scripts/gpu_pack.sh FOLDER --data wrote; left out: all is installed and built.
# --workers, --together: so many processes (8), in each of which so many runs of a kind train at
# once (12): one run of a small model does not fill a GPU.
set -euo pipefail

device=cuda carried= study=crma/experiments/sharing.toml results=crma/results seconds=480
out=${OUT:-build/gpu}
options=()
workers=8
together=12
while (($#)); do
    case $1 in
        --device) device=$2 && shift ;;
        --carried) carried=$(realpath "$2") && shift ;;
        --study) study=$(realpath "$2") && shift ;;
        --results) results=$(realpath -m "$2") && shift ;;
        --seconds) seconds=$2 && shift ;;
        --workers) workers=$2 && shift ;;
        --together) together=$2 && shift ;;
        --until) options+=(--until "$2") && shift ;;
        --regardless) options+=(--regardless) ;;
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

source scripts/gpu_environment.sh
if [[ -n $carried ]]; then
    scripts/gpu_unpack.sh "$python" "$carried" "$work" > "$out/log.txt" 2>&1
fi

mkdir -p "$work/results"
[[ ! -d $results ]] || cp -r "$results/." "$work/results"
touch "$work/begun"
sleep 0.1  # so that no file has the time of the mark

rc=0
timeout --kill-after=20 --signal=INT "$seconds" "$python" -m crma study "$study" \
    --results "$work/results" --work "$work/runs" --workers "$workers" \
    --together "$together" "${options[@]}" \
    >> "$out/log.txt" 2>&1 || rc=$?

find "$work/results" -maxdepth 1 -name '*.md' -newer "$work/begun" -exec cp {} "$out" \;
(cd "$work/results" && find . -type f -newer "$work/begun" -print0 | sort -z) > "$work/new"
rm -f "$out"/records.tgz.*
tar -C "$work/results" --null --files-from="$work/new" -czf - |
    split --bytes=15M --numeric-suffixes - "$out/records.tgz."
echo "ended with $rc; $(tr -cd '\0' < "$work/new" | wc -c) new files" | tee -a "$out/log.txt" >&2
exit "$rc"
