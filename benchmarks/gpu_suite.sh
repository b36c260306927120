#!/usr/bin/env bash
# Everything to measure on one GPU, most valuable first, in at most 25 minutes: tests/gpu, benchmarks, the demo, traces.
set -uo pipefail

usage() {
    cat <<'TEXT'
Usage: benchmarks/gpu_suite.sh --out DIR [--device cuda|cpu] [--quick] [--minutes N] [--data DIR] [STEP ...]

Runs the steps below, or only those named, from a checkout: it needs PyTorch, pytest and what dist_cts imports, not FFCV.
Each step has a time limit; a step that fails or runs out of time does not stop the next one. DIR/STEP holds its log and
results, DIR/summary.txt what became of each. Exit code: 0 if all passed, 1 if not, 2 for bad usage.

  --device   cuda (default) or cpu, which shows that the suite works
  --quick    tiny models and few steps
  --minutes  for all steps together (default 25); five times as long on a CPU, as each step
  --data     folder of the demo's prepared tasks; prepared there if missing (default DIR/data)

PYTHON=/path/to/python chooses the interpreter (default python3). Steps:
TEXT
    printf '  %s\n' "${STEPS[@]%% *}"
}

# STEP LIMIT COMMAND: the limit is in seconds, the command a function below.
STEPS=(
    "tests 240 tests"
    "step-time-fp32 150 step_time --precision fp32"
    "step-time-tf32 150 step_time --precision tf32"
    "step-time-bf16 150 step_time --precision bf16 --channels-last"
    "many-tasks-fp32 90 many_tasks --precision fp32"
    "many-tasks-bf16 90 many_tasks --precision bf16 --channels-last"
    "demo 300 demo"
    "resume 120 resume"
    "loader 60 loader"
    "trace-fp32 60 trace --precision fp32"
    "trace-bf16 60 trace --precision bf16 --channels-last"
)

# The commands. Each runs in a shell of its own that ends at the first failure; RESULTS is its step's folder.
tests() {
    # Without pyproject.toml, whose options need pytest's plugins.
    GPU_TESTS_DEVICE=$DEVICE "$PYTHON" -m pytest -c /dev/null --rootdir . --import-mode=importlib -p no:cacheprovider \
        -o "markers=gpu: needs a CUDA device" -o faulthandler_timeout=100 -q -ra -m gpu tests/gpu
}

benchmark() {
    "$PYTHON" "benchmarks/$1.py" --device "$DEVICE" --out "$RESULTS" $QUICK "${@:2}"
}

step_time() { benchmark step_time $GRAPH --world-size 1 --cases resnet20/128/32 resnet18/128/64 resnet18/128/224 --seconds 15 "$@"; }
many_tasks() { benchmark many_tasks $GRAPH --model resnet20 --batch-size 128 --tasks 1 2 4 8 "$@"; }
trace() { benchmark step_trace --model resnet20 --tasks 1 8 "$@"; }

loader() {
    local loaders="resident torchvision"
    if "$PYTHON" -c "import ffcv" 2>/dev/null; then loaders="ffcv streamed $loaders"; fi
    benchmark loader --workers "$(($(nproc) < 4 ? $(nproc) : 4))" --loaders $loaders
}

launch() {
    local TIMEFORMAT="$1: %R s"
    time "$PYTHON" "launch/$1.py" "${@:2}"
}

prepare() {
    if [ -z "$QUICK" ]; then
        launch prepare --suite demo --out "$DATA"
    else
        for task in digits shapes icons; do launch prepare "embedded:$task" --name "$task" --limit 240 --out "$DATA"; done
    fi
}

train() {
    local more=()
    if [ -n "$QUICK" ]; then more=("tasks=[digits,shapes]" model.name=tiny batch_size=8); fi
    launch train --config configs/demo.yaml "device=$DEVICE" "data.root=$DATA" "${more[@]}" "$@"
}

demo() {
    local run=$RESULTS/run more=()
    if [ -n "$QUICK" ]; then more=("targets=[icons]" model.name=tiny batch_size=8 steps=10); fi
    prepare
    train "run_dir=$run"
    launch meta_test --config configs/demo_meta_test.yaml --phi "$run/phi.safetensors" "device=$DEVICE" \
        "data.root=$DATA" "out=$RESULTS/meta_test" "${more[@]}"
    rm -r "$run/checkpoints"
}

# A run that is stopped and resumed must be bit-identical to an uninterrupted one.
resume() {
    local settings=("tasks=[digits,shapes]" episodes=20) code=0
    if [ ! -d "$DATA/digits" ] || [ ! -d "$DATA/shapes" ]; then prepare; fi
    train "run_dir=$RESULTS/whole" "${settings[@]}"
    train "run_dir=$RESULTS/resumed" "${settings[@]}" max_minutes=0.03 || code=$?
    if [ "$code" != 75 ]; then
        echo "expected exit code 75 of the run that is stopped after 1.8 s, found $code" >&2
        return 1
    fi
    train "run_dir=$RESULTS/resumed" "${settings[@]}"
    "$PYTHON" - "$RESULTS"/{whole,resumed}/phi.safetensors <<'PYTHON'
import sys
import torch
from safetensors.torch import load_file

whole, resumed = map(load_file, sys.argv[1:])
assert whole.keys() == resumed.keys()
different = [name for name in whole if not torch.equal(whole[name], resumed[name])]
sys.exit(f"resumed: different bits in {', '.join(different)}" if different else 0)
PYTHON
    rm -r "$RESULTS"/*/checkpoints
}

# Runs a step within its limit and the time left, and adds its line to the summary.
run_step() {
    local name=$1 limit=$((SLACK * $2)) left=$((END - SECONDS)) started=$SECONDS code outcome
    export RESULTS=$OUT/$name
    if [ "$left" -lt 10 ]; then
        outcome="not run: no time left"
    else
        rm -rf "$RESULTS"
        mkdir -p "$RESULTS"
        if [ "$limit" -gt "$left" ]; then limit=$left; fi
        timeout --kill-after=10 "$limit" bash -euo pipefail -c '"$@"' "$name" "${@:3}" >"$RESULTS/log" 2>&1 </dev/null
        code=$?
        case $code in
        0) outcome=passed ;;
        124 | 137) outcome="timed out after $limit s" ;;
        *) outcome="failed with exit code $code" ;;
        esac
    fi
    if [ "$outcome" != passed ]; then FAILED=1; fi
    printf '%-16s %5d s  %s\n' "$name" $((SECONDS - started)) "$outcome" | tee -a "$OUT/summary.txt"
}

fail_usage() {
    echo "gpu_suite.sh: $1; see --help" >&2
    exit 2
}

OUT='' DEVICE=cuda QUICK='' MINUTES=25 DATA='' FAILED=0 CHOSEN=()
while [ $# -gt 0 ]; do
    case $1 in
    --help | -h) usage && exit 0 ;;
    --quick) QUICK=--quick ;;
    --out | --device | --minutes | --data)
        [ $# -gt 1 ] || fail_usage "$1 needs a value"
        case $1 in --out) OUT=$2 ;; --device) DEVICE=$2 ;; --minutes) MINUTES=$2 ;; --data) DATA=$2 ;; esac
        shift
        ;;
    *)
        printf '%s\n' "${STEPS[@]%% *}" | grep -qxF -e "$1" || fail_usage "$1 is neither an option nor a step"
        CHOSEN+=("$1")
        ;;
    esac
    shift
done
[ -n "$OUT" ] || fail_usage "--out is missing"
[[ $DEVICE =~ ^(cuda|cpu)$ ]] || fail_usage "--device must be cuda or cpu, found $DEVICE"
[[ $MINUTES =~ ^[1-9][0-9]*$ ]] || fail_usage "--minutes must be a whole number from 1, found $MINUTES"

mkdir -p "$OUT"
OUT=$(realpath "$OUT")
DATA=$(realpath -m "${DATA:-$OUT/data}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
SLACK=$([ "$DEVICE" = cpu ] && echo 5 || echo 1) # the limits are for a GPU
END=$((SECONDS + 60 * SLACK * MINUTES - 10)) # the last step may take 10 s to be killed
GRAPH=$([ "$DEVICE" = cuda ] && echo --graph)
export OUT DEVICE QUICK GRAPH DATA PYTHON=${PYTHON:-python3} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export -f tests benchmark step_time many_tasks trace loader launch prepare train demo resume

: >"$OUT/summary.txt"
for step in "${STEPS[@]}"; do
    name=${step%% *}
    if [ ${#CHOSEN[@]} -gt 0 ] && ! printf '%s\n' "${CHOSEN[@]}" | grep -qxF -e "$name"; then continue; fi
    run_step $step
done

for log in "$OUT"/*/log; do
    tables=$(grep -E '^\||^(prepare|train|meta_test): |passed|failed' "$log") && printf '\n%s\n%s\n' "$log" "$tables"
done
printf '\n%s\n' "$OUT/summary.txt"
cat "$OUT/summary.txt"
exit $FAILED
