#!/usr/bin/env bash
# Measures the engine on this machine's GPU, NVIDIA or AMD, in less than 8 minutes, or --minutes N: kernels
# against their references, whole models, ceilings of the card, and beside them kernels, products with quantized
# weights, serving with plain weights and quantized ones. Installs nothing; needs torch, triton, transformers and
# numpy (plots need matplotlib). Results are written to OUTDIR as they come; a short table is printed last. Exit
# status 1 if anything failed. PYTHON names the interpreter (python3).
#   scripts/gpu_check.sh OUTDIR [--cpu-rehearsal] [--only STAGE,...] [--minutes N]
set -euo pipefail
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: scripts/gpu_check.sh OUTDIR [--cpu-rehearsal] [--only STAGE,...] [--minutes N]" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=src:tests:tests/kernels:benchmarks/gpu:benchmarks
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
exec "${PYTHON:-python3}" benchmarks/gpu/run_stages.py "$out" "${@:2}"
