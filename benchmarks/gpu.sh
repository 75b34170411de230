#!/usr/bin/env bash
# Everything to be done with a GPU, in one command of at most nine minutes: build, tests, checkers, figures.
#
#   benchmarks/gpu.sh [STEP...]  results in out/, or in $OUT: summary.txt, log.txt, gpu.md, gpu.json, clocks.csv
#   benchmarks/gpu.sh --dry      the same steps without a GPU, on tiny shapes: tries the scripts
#
# All steps if none is named; those that there was no time for can be named in a second command.
# A step that fails is reported and does not stop the next; the exit status says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out}
python=${PYTHON:-python3}
dry=
[ "${1:-}" != --dry ] || { dry=$1; shift; }
steps="tests figures nvrtc memcheck racecheck quantizing"
only="$*"
for name in $only; do
    [[ " $steps " == *" $name "* ]] || { echo "no step is called $name: $steps"; exit 2; }
done
limit=530 # seconds in all
calls="chosen or table or (any_number_of_tokens and bf16) or cuda_graph or another_stream or a_thread or compiles"
sizes="any_number_of_tokens and (17 or 129) and bf16" # the kernels for few tokens and for many
mkdir -p "$out"
failed=0

say() { echo "$*" | tee -a "$out/summary.txt"; }

step() { # name, most seconds, command...: also ends when the time of all is over
    local name=$1 seconds=$2
    shift 2
    [ -z "$only" ] || [ "$name" = build ] || [[ " $only " == *" $name "* ]] || return
    local left=$((limit - SECONDS)) begin=$SECONDS
    [ "$left" -ge 10 ] || { say "$name: left out, no time"; return; }
    echo "== $name"
    echo "== $name" >>"$out/log.txt"
    # interrupted, pytest still says what failed so far
    timeout --signal=INT --kill-after=10 "$((seconds < left ? seconds : left))" "$@" >>"$out/log.txt" 2>&1
    local status=$?
    say "$name: $([ $status = 0 ] && echo passed || echo "FAILED ($status)"), $((SECONDS - begin)) s"
    [ $status = 0 ] || { failed=1; tail -n 20 "$out/log.txt"; }
}

: >"$out/summary.txt"
: >"$out/log.txt"
export PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-8}
export TORCHINDUCTOR_COMPILE_THREADS=1 # or each worker of the tests starts as many as there are cores
say "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
if [ -z "$dry" ]; then
    nvidia-smi --query-gpu=name,driver_version,compute_mode,clocks.sm,power.draw,temperature.gpu --format=csv | tee -a "$out/summary.txt" ||
        { echo "no NVIDIA GPU here: benchmarks/gpu.sh --dry tries the scripts without one"; exit 1; }
    nvidia-smi --query-gpu=clocks.sm,power.draw,temperature.gpu --format=csv,noheader -lms 500 >"$out/clocks.csv" &
    watcher=$!
    trap 'kill "$watcher" 2>/dev/null' EXIT
fi

# The first call builds the library for this card and runs the self-test, whose faults are logged.
step build 240 "$python" -c '
import logging, sys, time
sys.path.insert(0, "tools")
import pack; pack.alias()
from svdquant_nodes.svdquant.kernels import ops
logging.basicConfig(level=logging.INFO)
kind, start = sys.argv[1], time.perf_counter()
print(ops.device(kind), ops.describe(kind), f"{time.perf_counter() - start:.1f} s")
sys.exit(bool(ops.device(kind).missing or ops.device(kind).distrusted))' "$([ -n "$dry" ] && echo cpu || echo cuda)"
grep "SVDQuant: " "$out/log.txt" | tee -a "$out/summary.txt"
# A worker that loses its card ends, and the others go on.
workers=$("$python" -c 'import xdist; print("-n 8 --max-worker-restart 50")' 2>/dev/null)
# shellcheck disable=SC2086  # several words, or none
[ -n "$dry" ] || step tests 150 "$python" -m pytest -q --tb=short --continue-on-collection-errors $workers -m gpu tests/kernels
left=$((limit - SECONDS))
step figures 250 "$python" benchmarks/gpu.py ${dry:+--dry} --seconds $((left < 240 ? left - 50 : 190)) --json "$out/gpu.json" --markdown "$out/gpu.md"
if [ -z "$dry" ]; then
    SVDQUANT_BUILD=nvrtc step nvrtc 100 "$python" -m pytest -q --tb=short -m gpu \
        tests/kernels/test_gpu.py -k "$calls"
    if command -v compute-sanitizer >/dev/null; then
        # without torch's allocator, which hands out pieces of blocks that are larger than what is asked for
        for tool in memcheck racecheck; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 75 compute-sanitizer --tool "$tool" --error-exitcode 1 \
                "$python" -m pytest -q --tb=short -m gpu tests/kernels/test_gpu.py -k "$sizes"
        done
    else
        say "checkers: compute-sanitizer is not here"
    fi
    step quantizing 120 "$python" benchmarks/layer_speed.py --device cuda --recipes instant,fast
fi
[ ! -f "$out/gpu.md" ] || sed -n '/^## /,/^## All/p' "$out/gpu.md"
cat "$out/summary.txt"
exit $failed
