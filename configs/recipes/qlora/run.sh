#!/usr/bin/env bash
# QLoRA on DialogSum: a base in nf4, adapters, ROUGE before and after, several adapters served over one base.
#   bash configs/recipes/qlora/run.sh [OUT]
OUT=${1:-runs/recipes/qlora}
source "$(dirname "$0")/../steps.sh"
HERE=configs/recipes/qlora

base
step "Dialogues and summaries"
run -m configs.recipes.materials qlora "$OUT"
step "ROUGE of the base, in nf4"
run -m infer eval "base=$OUT/base" --quantize nf4 --task dialogsum --data "$OUT/test.jsonl" --output "$OUT/rouge" \
    --max-new-tokens 60 --overwrite
step "The adapter"
TRAIN=($HERE/finetune.toml model.path="$OUT/base" data.path="$OUT/train.jsonl" data.cache_dir="$OUT/cache")
run -m train run "${TRAIN[@]}" run.output_dir="$OUT/adapter"
step "ROUGE with it"
run -m infer eval "tuned=$OUT/base" --adapter "$OUT/adapter/final" --quantize nf4 --task dialogsum \
    --data "$OUT/test.jsonl" --output "$OUT/rouge" --max-new-tokens 60
step "A second adapter, after half the steps"
run -m train export "$OUT/adapter" --step 40 "$OUT/halfway" --overwrite
step "Both served over one nf4 base"
background "$OUT/serve.log" -m infer serve "$OUT/base" --rows 2 --quantize nf4 --name base --port 0 \
    --adapter tuned="$OUT/adapter/final" --adapter halfway="$OUT/halfway"
run -m configs.recipes.ask_each "$URL" "$OUT/test.jsonl" "$OUT/served.json"
stop
step "Done: $OUT/adapter, $OUT/rouge and $OUT/served.json"
