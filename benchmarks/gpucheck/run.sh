#!/usr/bin/env bash
# The GPU check, on the machine with the GPU; it needs no network.
#
#   bash benchmarks/gpucheck/run.sh OUT SECONDS [STAGES]
#
# OUT: folder of the results; a second call adds to it. SECONDS: time limit of the whole.
# STAGES: names with commas between them; all by default.
#
# GPUCHECK_PYTHON  the Python to run, python3 by default
# GPUCHECK_KIT     the prepared folder, .gpucheck in the checkout by default; without one the
#                  package that this Python has installed is tested
# GPUCHECK_DRY=1   rehearses on the CPU in tiny sizes
set -euo pipefail
if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    echo "usage: bash $0 OUT SECONDS [STAGES]" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd) seconds=$2 stages=${3:-}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=$(command -v "${GPUCHECK_PYTHON:-python3}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
export GPUCHECK_KIT=${GPUCHECK_KIT:-$root/.gpucheck}
case $GPUCHECK_KIT in /*) ;; *) GPUCHECK_KIT=$PWD/$GPUCHECK_KIT ;; esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -n "${GPUCHECK_DRY:-}" ] || "$python" "$here/kit.py" read-ahead &
"$python" "$here/kit.py" "$GPUCHECK_KIT" "$work"

# The checkout must not be found before the package under test: neither by way of a script's folder
# nor of the current one.
export PYTHONPATH=$work/site:$root/benchmarks PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR=$work/triton TRITON_STORE_BINARY_ONLY=1
export TORCHINDUCTOR_CACHE_DIR=$work/inductor
# Asking for devices by way of NVML leaves CUDA alone, so that stages may be forked.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cd "$work"
timeout --kill-after=5 "$seconds" "$python" -m gpucheck.run "$out" $((${seconds%.*} - SECONDS)) \
    --work "$work" --stages "$stages" ${GPUCHECK_DRY:+--dry} 2>&1 | tee "$out/summary.txt"
