#!/usr/bin/env bash
# Fine-tunes a pretrained BERT with AdamS on CPU, and asks `hf-swd advise` whether weight decay mattered there; then
# trains a small language model where it does: little text, many times over. Minutes in all:
# bash scripts/quickstart.sh
# Downloads only what pip installs, into a virtual environment of its own; HF_SWD_VENV names another folder for it.
# Results: outputs/quickstart/bert, outputs/quickstart/lm-*, two tables, and outputs/quickstart/plot.png.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/venv.sh
. scripts/venv.sh
echo "Installing (minutes the first time) ..."
use_venv "${HF_SWD_VENV:-.venv-quickstart}" "examples,plot"

export HF_HUB_OFFLINE=1
output=outputs/quickstart
shared=(--embedded --do_train --do_eval --overwrite_output_dir --max_grad_norm 0 --dataloader_pin_memory False
    --save_strategy no --seed 42 --report_to tensorboard)

echo "Fine-tuning a BERT with AdamS and AdamW's usual weight decay ..."
python examples/classification/run_glue.py "${shared[@]}" --output_dir "$output/bert" \
    --optim adams --optim_args reference_steps=18 --weight_decay 0.01 --learning_rate 3e-4 --warmup_steps 0.1 \
    --num_train_epochs 1.5 --per_device_train_batch_size 32 --per_device_eval_batch_size 64 --max_seq_length 48 \
    --train_sampling_strategy group_by_length --logging_steps 5
echo
hf-swd advise "$output/bert"

train_lm() { # NAME, then the arguments that differ
    local name=$1
    shift
    echo
    echo "Training a small language model: $name ..."
    python examples/language_modeling/run_clm.py "${shared[@]}" --output_dir "$output/$name" \
        --vocab_size 257 --max_train_characters 50000 --max_eval_samples 1000 --block_size 64 --config_overrides \
        hidden_size=48,intermediate_size=128,num_hidden_layers=3,num_attention_heads=3 --learning_rate 3e-3 \
        --warmup_steps 100 --lr_scheduler_type cosine --adam_beta2 0.99 --per_device_train_batch_size 16 \
        --per_device_eval_batch_size 64 --max_steps 1200 --logging_steps 20 --eval_strategy steps --eval_steps 100 \
        "$@"
}
train_lm lm-adamw-0.1 --optim adamw_torch_fused --weight_decay 0.1
train_lm lm-adamw-2 --optim adamw_torch_fused --weight_decay 2
train_lm lm-adams-2 --optim adams --optim_args reference_steps=100 --weight_decay 2
echo
hf-swd plot "$output"/lm-* -o "$output/plot.png"
python scripts/quickstart_report.py "$output/bert"
echo
python scripts/quickstart_report.py "$output"/lm-*
echo "plot: $PWD/$output/plot.png"
