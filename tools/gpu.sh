#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can tell, in three parts of less than ten minutes each: kernels,
# engine and serving (`make gpu`); the transports between two processes on one GPU, and the profile of a step (`make
# gpu-transfer`); workers lost in mid-transfer, and other configurations of the kernels (`make gpu-faults`).
#   usage: [PYTHON=python3] tools/gpu.sh [FOLDER [transfer|faults]]     results go to FOLDER, build/gpu by default
# Needs the project's packages and pytest with its plugins as pyproject.toml names them; nothing is installed. Each part
# has its own time, and one that fails keeps none of the others from running.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-build/gpu}
mkdir -p "$folder"
failed=()

part() {  # name, seconds, command...
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$folder/$name.txt" | tail -n 40
    [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$name")
}

workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 6)  # compiling takes most of the time, and one core each

transports=tests/integration/test_transports_gpu.py
faults=tests/integration/test_faults_in_mid_transfer.py
if [ "${2:-}" = faults ]; then
    part faults 270 "$python" -m pytest -m gpu $faults
    part sweep 300 "$python" -m benchmarks.kernel_sweep --seconds 280 --json "$folder/sweep.json"
elif [ "${2:-}" = transfer ]; then
    part transports 300 "$python" -m pytest -m gpu $transports "${workers[@]}"
    part transfer 150 "$python" -m benchmarks.transfer --device cuda:0 --layers 32 --transports cuda_ipc nccl shm zmq gloo
    part profile 90 "$python" -m benchmarks.step_profile --json "$folder/profile.json"
else
    part kernels 210 "$python" -m pytest -m gpu tests/kernels "${workers[@]}"
    part engine 210 "$python" -m benchmarks.engine --json "$folder/engine.json"
    part serving 160 "$python" -m pytest -m gpu tests --ignore tests/kernels --ignore $transports --ignore $faults
fi

[ ${#failed[@]} = 0 ] && echo "all parts passed; results are in $folder" && exit
echo "failed, or out of time: ${failed[*]}; see $folder"
exit 1
