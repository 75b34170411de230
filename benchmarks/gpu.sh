#!/usr/bin/env bash
# Everything to be done with a GPU, in one command of at most nine minutes: build, tests, checkers, figures.
#
#   benchmarks/gpu.sh            results in out/, or in $OUT: summary.txt, log.txt, gpu.md, gpu.json, clocks.csv
#   benchmarks/gpu.sh --dry      the same steps without a GPU, on tiny shapes: tries the scripts
#
# A step that fails is reported and does not stop the next; the exit status says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out}
python=${PYTHON:-python3}
dry=${1:-}
limit=530 # seconds in all
mkdir -p "$out"
failed=0

say() { echo "$*" | tee -a "$out/summary.txt"; }

step() { # name, most seconds, command...: also ends when the time of all is over
    local name=$1 seconds=$2
    shift 2
    local left=$((limit - SECONDS)) begin=$SECONDS
    [ "$left" -ge 10 ] || { say "$name: left out, no time"; return; }
    echo "== $name"
    echo "== $name" >>"$out/log.txt"
    timeout "$((seconds < left ? seconds : left))" "$@" >>"$out/log.txt" 2>&1
    local status=$?
    say "$name: $([ $status = 0 ] && echo passed || echo "FAILED ($status)"), $((SECONDS - begin)) s"
    [ $status = 0 ] || { failed=1; tail -n 20 "$out/log.txt"; }
}

: >"$out/summary.txt"
: >"$out/log.txt"
export PYTHONUNBUFFERED=1
say "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
if [ -z "$dry" ]; then
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.draw,temperature.gpu --format=csv | tee -a "$out/summary.txt" ||
        { echo "no NVIDIA GPU here: benchmarks/gpu.sh --dry tries the scripts without one"; exit 1; }
    nvidia-smi --query-gpu=clocks.sm,power.draw,temperature.gpu --format=csv,noheader -lms 500 >"$out/clocks.csv" &
    watcher=$!
    trap 'kill "$watcher" 2>/dev/null' EXIT
fi

# The first call builds the library for this card and runs the self-test.
step build 150 "$python" -c '
import logging, sys, time
sys.path.insert(0, "tools")
import pack; pack.alias()
from svdquant_nodes.svdquant.kernels import ops
logging.basicConfig(level=logging.INFO)
kind, start = sys.argv[1], time.perf_counter()
print(ops.device(kind), ops.describe(kind), f"{time.perf_counter() - start:.1f} s")
sys.exit(bool(ops.device(kind).missing))' "$([ -n "$dry" ] && echo cpu || echo cuda)"
[ -n "$dry" ] || step tests 150 "$python" -m pytest -q -m gpu tests/kernels
step figures 270 "$python" benchmarks/gpu.py ${dry:+--dry} --seconds 200 --json "$out/gpu.json" --markdown "$out/gpu.md"
if [ -z "$dry" ]; then
    SVDQUANT_BUILD=nvrtc step "tests, kernels by NVRTC" 100 "$python" -m pytest -q -m gpu tests/kernels/test_gpu.py \
        -k "chosen or table or (any_number_of_tokens and bf16) or cuda_graph or another_stream or compiles"
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            step "$tool" 75 compute-sanitizer --tool "$tool" --error-exitcode 1 \
                "$python" -m pytest -q -m gpu tests/kernels/test_gpu.py -k "any_number_of_tokens and m=17 and bf16"
        done
    else
        say "checkers: compute-sanitizer is not here"
    fi
    step quantizing 120 "$python" benchmarks/layer_speed.py --device cuda --recipes instant,fast
fi
cat "$out/summary.txt"
exit $failed
