#!/usr/bin/env bash
# Chinese-LLaMA-Alpaca: a larger vocabulary, two stages of pre-training, instructions, adapters merged in order, C-Eval.
#   bash configs/recipes/chinese/run.sh [OUT]
OUT=${1:-runs/recipes/chinese}
source "$(dirname "$0")/../steps.sh"
HERE=configs/recipes/chinese

step "Tokenizers, text, instructions, questions"
run -m configs.recipes.materials chinese "$OUT"
step "Tokenizers merged; one more piece, [PAD], for instructions"
run -m convert vocab merge "$OUT/base.model" "$OUT/chinese.model" "$OUT/merged.model" --overwrite
run -m convert vocab merge "$OUT/base.model" "$OUT/chinese.model" "$OUT/alpaca.model" --special "[PAD]" --overwrite
step "A small base with the base tokenizer"
run -m train run $HERE/base.toml model.tokenizer="$OUT/base.model" data.path="$OUT/text.jsonl" \
    data.cache_dir="$OUT/cache" run.output_dir="$OUT/base"
step "Rows for the new pieces"
run -m convert vocab resize "$OUT/base" "$OUT/resized" --tokenizer "$OUT/merged.model" --overwrite
step "Pre-training, stage 1: embeddings alone"
TEXT=(data.path="$OUT/text.jsonl" data.cache_dir="$OUT/cache")
run -m train run $HERE/pretrain.toml model.path="$OUT/resized" "${TEXT[@]}" 'lora.targets=[]' \
    run.output_dir="$OUT/stage1"
step "Stage 2: LoRA and embeddings"
run -m convert merge "$OUT/resized" "$OUT/stage1/final" "$OUT/stage1-merged" --overwrite
run -m train run $HERE/pretrain.toml model.path="$OUT/stage1-merged" "${TEXT[@]}" run.output_dir="$OUT/stage2"
step "Instructions, on the tokenizer with [PAD]"
run -m convert merge "$OUT/stage1-merged" "$OUT/stage2/final" "$OUT/chinese-llama" --overwrite
run -m convert vocab resize "$OUT/chinese-llama" "$OUT/chinese-llama-pad" --tokenizer "$OUT/alpaca.model" --overwrite
run -m train run $HERE/instruct.toml model.path="$OUT/chinese-llama-pad" data.path="$OUT/instructions.jsonl" \
    data.cache_dir="$OUT/cache" run.output_dir="$OUT/instruct"
step "Both adapters merged into the base, in order"
run -m convert merge "$OUT/stage1-merged" "$OUT/stage2/final" "$OUT/instruct/final" "$OUT/chinese-alpaca" --overwrite
step "In 8 and in 4 bits"
run -m convert model "$OUT/chinese-alpaca" "$OUT/int8" --to hf --quantize int8 --overwrite
run -m convert model "$OUT/chinese-alpaca" "$OUT/nf4" --to hf --quantize nf4 --overwrite
du -sh "$OUT/chinese-alpaca" "$OUT/int8" "$OUT/nf4"
step "C-Eval, both ways to read an answer"
run -m infer eval "full=$OUT/chinese-alpaca" "int8=$OUT/int8" "nf4=$OUT/nf4" --task ceval --data "$OUT/ceval" \
    --output "$OUT/ceval-constrained" --overwrite
run -m infer eval "full=$OUT/chinese-alpaca" --task ceval --data "$OUT/ceval" --decode free --limit 8 --rows 8 \
    --output "$OUT/ceval-free" --overwrite
step "Its files for the publishers"
run -m infer eval "full=$OUT/chinese-alpaca" --task ceval --data "$OUT/ceval" --split test --shots 0 \
    --output "$OUT/ceval-test" --overwrite
step "Sizes beside the published ones"
run -m configs.recipes.sizes
step "The chat page and retrieval over a document, through the server"
background "$OUT/serve.log" -m infer serve "$OUT/int8" --rows 2 --name chinese-alpaca --port 0
"$PY" -c 'import sys, urllib.request as u; print(len(u.urlopen(sys.argv[1]).read()), "bytes of chat page")' "$URL/"
if "$PY" -c 'import langchain_openai' 2> /dev/null; then
    run examples/retrieval_langchain.py "$URL/v1" "$OUT/text.jsonl" "今天学生在学校做什么？"
else
    step "langchain-openai is not installed: no retrieval (pip install langchain-openai)"
fi
stop
step "Done: $OUT/chinese-alpaca, $OUT/int8 and $OUT/nf4"
