#!/usr/bin/env bash
# GPU tests and benchmarks with the python3 (or PYTHON) of this machine, without network:
#     bash scripts/gpu_check.sh [FOLDER]
# Needs torch with CUDA, transformers, accelerate, numpy, pytest. Writes DEVICE-DATE.* into FOLDER
# (default docs/benchmarks); under 8 minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
folder="${1:-docs/benchmarks}"
mkdir -p "$folder"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || {
    echo "torch of $python sees no CUDA device: run this on a machine with one" >&2
    exit 2
}
name="$device-$(date +%F)"
status=0
timeout 180 "$python" -m pytest -m gpu tests/gpu -p no:cacheprovider 2>&1 |
    tee "$folder/$name-tests.txt" || status=1
timeout 180 "$python" scripts/benchmark_optimizer_step.py --device cuda --suites shapes memory tensors sizes \
    --output_dir "$folder" --name "$name" || status=1
timeout 120 "$python" scripts/benchmark_train_step.py --device cuda --batch_size 32 --steps 20 --rounds 3 --bf16 \
    --output_dir "$folder" --name "train-step-$name" || status=1
exit $status
