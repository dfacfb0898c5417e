#!/usr/bin/env bash
# Stanford Alpaca: instructions that a large model makes up, a fine-tune, a weight diff, a chat page, llama.cpp.
#   bash configs/recipes/alpaca/run.sh [OUT]         ENDPOINT=URL asks a real model; else a server of rules stands in
OUT=${1:-runs/recipes/alpaca}
source "$(dirname "$0")/../steps.sh"
HERE=configs/recipes/alpaca

base
step "Seed tasks"
run -m configs.recipes.materials alpaca "$OUT"
step "Instructions made up by the model behind ${ENDPOINT:-a server of rules}"
[ -n "${ENDPOINT:-}" ] || background "$OUT/teacher.log" -m configs.recipes.teacher
run -m infer synthesize self-instruct "$OUT/tasks.jsonl" --seeds "$OUT/seed_tasks.jsonl" --count "${COUNT:-120}" \
    --endpoint "${ENDPOINT:-$URL/v1}" --price 0.5,1.5
[ -n "${ENDPOINT:-}" ] || stop
step "The fine-tune"
run -m train run $HERE/finetune.toml model.path="$OUT/base" data.path="$OUT/tasks.jsonl" data.cache_dir="$OUT/cache" \
    run.output_dir="$OUT/tuned"
step "The weight diff, as Alpaca published it, and back"
run -m convert delta make "$OUT/base" "$OUT/tuned" "$OUT/diff" --overwrite
run -m convert delta apply "$OUT/base" "$OUT/diff" "$OUT/recovered" --overwrite
run -m convert verify "$OUT/tuned" "$OUT/recovered"
step "An answer"
run -m infer generate "$OUT/recovered" --chat --prompt "Compare old bridges with maps" --max-new-tokens 40
step "The chat page, and a request to its server"
background "$OUT/serve.log" -m infer serve "$OUT/recovered" --rows 2 --name alpaca --port 0
"$PY" -c 'import sys, urllib.request as u; print(len(u.urlopen(sys.argv[1]).read()), "bytes of chat page")' "$URL/"
printf 'Compare old bridges with maps\n!!exit\n' | run -m infer chat --endpoint "$URL/v1" --temperature 0
stop
step "GGUF in 4 bits, for llama.cpp"
run -m convert model "$OUT/recovered" "$OUT/alpaca-q4.gguf" --to gguf --quantize int4 --overwrite
if "$PY" -c 'import xllamacpp' 2> /dev/null; then
    run -m configs.recipes.ask_llama_cpp "$OUT/alpaca-q4.gguf" "Compare old bridges with maps"
else
    step "llama.cpp is not installed: the file was not read by it (pip install xllamacpp)"
fi
step "Done: $OUT/tuned, $OUT/diff and $OUT/alpaca-q4.gguf"
