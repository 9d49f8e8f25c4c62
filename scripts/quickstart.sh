#!/usr/bin/env bash
# Two short trainings on the CPU, and what came out of them: bash scripts/quickstart.sh
# 1. fine-tunes a pretrained BERT with AdamS, and asks `hf-swd advise` whether weight decay mattered there;
# 2. trains a small language model where it does matter (little text, many times over) with AdamW and AdamS.
# Needs what scripts/venv.sh needs, and nothing from the Hub. Writes into a virtual environment of its own (HF_SWD_VENV
# names another folder for it) and into outputs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/venv.sh
. scripts/venv.sh
venv="${HF_SWD_VENV:-.venv-quickstart}"
output=outputs/quickstart

echo "hf-swd quickstart: two short trainings on the CPU. They take about four minutes on two idle cores (here:"
echo "$(getconf _NPROCESSORS_ONLN)), and the installation a few more the first time. It is $(date +%H:%M)."
use_venv "$venv" "examples,plot"
echo "What transformers prints goes to log.txt in the folder of each run, $output/TASK/RUN."
export HF_HUB_OFFLINE=1
rm -rf "$output"

echo
echo "AdamS is AdamW whose weight decay becomes weaker, step by step, as gradients become larger: the paper wants them"
echo "smaller at the end of a training. Up to step reference_steps (100, or a third of a short run) it is AdamW."
echo
echo "1 of 2: a pretrained BERT (23 million parameters) is fine-tuned with AdamS on 3,700 sentences of the documentation of"
echo "six libraries, to tell which library each is from (guessing is right for 0.16), at a usual weight decay of 0.01."
echo "What does this one run tell of its weight decay?"
# `hf-swd advise` tells from the evaluations whether a run overfits: there are two, the second at the end, on half of the
# validation sentences to take no longer than one on all of them.
python examples/comparisons/compare_optimizers.py --task text --seeds 42 --optimizer adams:reference_steps=39 0.01 \
    --output_dir "$output/bert" -- --max_steps 118 --eval_strategy steps --eval_steps 59 \
    --max_eval_samples 500
hf-swd advise "$output"/bert/*/

echo
echo "2 of 2: a small language model reads 50 kB of text 24 times over, from random weights: with AdamW at its usual"
echo "weight decay (0.1) and at a strong one (2), and with AdamS at the strong one."
python examples/comparisons/compare_optimizers.py --task lm --seeds 42 --jobs 2 --optimizer adamw 0.1 2 \
    --optimizer adams:reference_steps=100 2 --output_dir "$output/lm"

cat <<NEXT

Next, the same with your own text in place of YOUR_TEXT.txt. How strong the decay should be there is not known, so: the
usual 0.1 and two strong ones, and three seeds, since one may mislead (15 runs, about 7 minutes):

source $venv/bin/activate
python examples/comparisons/compare_optimizers.py --task lm --seeds 0 1 2 --jobs 2 --optimizer adamw 0.1 1 3 \\
    --optimizer adams:reference_steps=100 1 3 --output_dir outputs/mine -- --train_file YOUR_TEXT.txt

And for runs of a Trainer of your own, AdamW's too, hf-swd advise ITS_OUTPUT_FOLDER says what to try next.
NEXT
