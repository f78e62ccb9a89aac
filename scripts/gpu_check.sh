#!/usr/bin/env bash
# Checks the Triton kernels on this machine's GPU, then times them. Installs nothing; needs torch, triton and
# transformers. Results are written to OUTDIR as they come; a short table is printed last.
#   scripts/gpu_check.sh OUTDIR        PYTHON names the interpreter (default python3)
set -uo pipefail
if [ $# -ne 1 ]; then
    echo "usage: scripts/gpu_check.sh OUTDIR" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=src:tests:tests/kernels:benchmarks/gpu
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
git rev-parse HEAD >"$out/commit.txt" 2>/dev/null || true

status=0
run() {
    echo "== $1"
    "$python" "benchmarks/gpu/$1.py" --output "$out/$1.json" "${@:2}" 2>&1 | tee "$out/$1.txt"
    [ "${PIPESTATUS[0]}" -eq 0 ] || status=1
}
run parity
backends=triton,torch
"$python" -c 'import xformers.ops' 2>/dev/null && backends=$backends,xformers
run end_to_end --backends "$backends"
run kernel_cache
run kernels

echo "== summary (commit $(cat "$out/commit.txt" 2>/dev/null || echo unknown))"
tail -n 1 "$out/parity.txt"
cat "$out/end_to_end.txt"
tail -n 4 "$out/kernel_cache.txt"
grep -E '^(copy|decode|prefill)' "$out/kernels.txt"
exit $status
