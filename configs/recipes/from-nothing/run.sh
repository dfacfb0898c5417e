#!/usr/bin/env bash
# The whole life of a model: a tokenizer, pre-training, the same beside PyTorch, chat tuning, a server that answers.
#   bash configs/recipes/from-nothing/run.sh [OUT]
OUT=${1:-runs/recipes/from-nothing}
source "$(dirname "$0")/../steps.sh"
HERE=configs/recipes/from-nothing

step "Text and conversations"
run -m configs.recipes.materials from-nothing "$OUT"
step "A tokenizer of 512 pieces"
run -m configs.recipes.tokenizer "$OUT/text.txt" "$OUT/tokenizer.model" 512
step "Pre-training"
PRETRAIN=("$HERE/pretrain.toml" model.tokenizer="$OUT/tokenizer.model" data.path="$OUT/train.jsonl"
    data.eval_path="$OUT/held_out.jsonl" data.cache_dir="$OUT/cache" run.output_dir="$OUT/pretrained")
run -m train run "${PRETRAIN[@]}"
if "$PY" -c 'import torch, transformers' 2> /dev/null; then
    step "The same weights, batches and optimizer in PyTorch and transformers"
    run -m configs.recipes.beside_torch "$OUT/beside_torch" "${PRETRAIN[@]}"
else
    step "PyTorch and transformers are not installed: not compared with them (pip install 'puna[dev]')"
fi
step "A story of it"
run -m infer generate "$OUT/pretrained" --prompt "The statement" --max-new-tokens 60
step "Perplexity of text that it has not seen"
run -m infer eval "$OUT/pretrained" --task perplexity --data "$OUT/held_out.jsonl" --output "$OUT/perplexity"
step "Chat tuning"
run -m train run $HERE/chat.toml model.path="$OUT/pretrained" data.path="$OUT/chat.jsonl" \
    data.eval_path="$OUT/chat_held_out.jsonl" data.cache_dir="$OUT/cache" run.output_dir="$OUT/chat"
step "Serving it"
background "$OUT/serve.log" -m infer serve "$OUT/chat" --rows 2 --name chat --port 0
step "Asking the server"
printf 'Are old bridges more common than maps?\n!!exit\n' | run -m infer chat --endpoint "$URL/v1" --temperature 0
stop
step "Done: $OUT/pretrained and $OUT/chat"
