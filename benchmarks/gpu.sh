#!/usr/bin/env bash
# Everything to be done with a GPU, in one command of at most nine minutes: build, tests, checkers, figures.
#
#   benchmarks/gpu.sh            results in out/, or in $OUT
#
# A step that fails is reported and does not stop the next; the exit status says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0

step() { # name, seconds, command...
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    local begin=$SECONDS
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1
    local status=$?
    echo "$name: $([ $status = 0 ] && echo passed || echo "FAILED ($status)"), $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
    [ $status = 0 ] || { failed=1; tail -n 20 "$out/$name.log"; }
}

: >"$out/summary.txt"
git rev-parse HEAD >"$out/commit.txt" 2>/dev/null || true
nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.draw,temperature.gpu --format=csv >"$out/device.csv" || exit 1
nvidia-smi --query-gpu=clocks.sm,power.draw,temperature.gpu --format=csv,noheader -lms 500 >"$out/clocks.csv" &
watcher=$!
trap 'kill "$watcher" 2>/dev/null' EXIT

# The first call builds the library for this card.
step build 120 "$python" -c '
import sys; sys.path.insert(0, "tools")
import pack; pack.alias()
from svdquant_nodes.svdquant.kernels import ops
found = ops.device("cuda")
print(found)
sys.exit(bool(found.missing))'
step tests 120 "$python" -m pytest -q -m gpu tests/kernels
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest -q -m gpu tests/kernels -k "tail and bf16"
    done
else
    echo "checkers: compute-sanitizer is not here" | tee -a "$out/summary.txt"
fi
step figures 180 "$python" benchmarks/gpu.py --json "$out/gpu.json" --markdown "$out/gpu.md"
cat "$out/summary.txt"
exit $failed
