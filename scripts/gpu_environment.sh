# Sourced by scripts/gpu.sh and scripts/gpu_study.sh, which set $device, $carried and $work: finds
# $python, and sets what it needs to run this tree from $work, without a network.

python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then
    python=.venv/bin/python
fi
export PYTHONPATH=$work/site:$PWD:$PWD/clients/python:$PWD/clients
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [[ $device == cpu ]]; then
    export CUDA_VISIBLE_DEVICES=
fi
if [[ -n $carried ]]; then
    export CRMA_HOME=$work/home PIP_NO_INDEX=1 PIP_FIND_LINKS=$work
fi
