#!/usr/bin/env bash
# Train two small tasks on the base model, where crma trains:
# scripts/gpu_train.sh PYTHON WORK RECORD EXAMPLES
set -euo pipefail

python=$1 work=$2 record=$3 examples=$4
for task in first second; do
    mkdir -p "$work/data/$task"
    for split in train validation holdout; do
        for number in $(seq "$examples"); do
            answer=$((number % 2))
            printf '{"prompt": "%s question %d?", "completion": "%s %d"}\n' \
                "$split" "$number" "$task" "$answer"
        done > "$work/data/$task/$split.jsonl"
    done
done
cat > "$work/train.toml" << TOML
tasks = ["$work/data/first", "$work/data/second"]
epochs = 2
TOML
"$python" -m crma train "$work/train.toml" --out "$work/run"
cp "$work/run/record.json" "$record"
