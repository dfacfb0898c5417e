#!/usr/bin/env bash
# Vicuna: shared conversations cleaned and split, a fine-tune over many turns, a delta, answers judged in pairs.
#   bash configs/recipes/vicuna/run.sh [OUT]         ENDPOINT=URL asks a real judge; else a server of rules stands in
OUT=${1:-runs/recipes/vicuna}
source "$(dirname "$0")/../steps.sh"
HERE=configs/recipes/vicuna

base
step "Conversations as a browser saved them, and questions"
run -m configs.recipes.materials vicuna "$OUT"
step "Cleaned, duplicates dropped, split to 2,048 tokens, some held out"
run -m train prepare "$OUT/raw.json" "$OUT/train.json" --clean --dedupe --without-refusals --max-length 2048 \
    --tokenizer "$OUT/base/tokenizer.model" --test "$OUT/test.json" --overwrite
step "The fine-tune: many turns, four times the base's context by linear RoPE scaling"
run -m train run $HERE/finetune.toml model.path="$OUT/base" data.path="$OUT/train.json" data.eval_path="$OUT/test.json" \
    data.cache_dir="$OUT/cache" run.output_dir="$OUT/tuned"
step "The delta, as Vicuna was published, and back"
run -m convert delta make "$OUT/base" "$OUT/tuned" "$OUT/delta" --overwrite
run -m convert delta apply "$OUT/base" "$OUT/delta" "$OUT/vicuna" --overwrite
run -m convert verify "$OUT/tuned" "$OUT/vicuna"
step "A conversation in the terminal"
printf 'Who are you?\n!!exit\n' | run -m infer chat "$OUT/vicuna" --template vicuna_v1.1 --temperature 0 --max-new-tokens 40
step "Both models answer the questions"
for name in vicuna base; do
    run -m infer batch "$OUT/$name" "$OUT/questions.jsonl" "$OUT/$name.answers.jsonl" --template vicuna_v1.1 \
        --max-new-tokens 64 --temperature 0 --overwrite
done
step "Judged in pairs, in both orders, by the model behind ${ENDPOINT:-a server of rules}"
[ -n "${ENDPOINT:-}" ] || background "$OUT/judge.log" -m configs.recipes.teacher
run -m infer judge "$OUT/vicuna.answers.jsonl" "$OUT/base.answers.jsonl" --questions "$OUT/questions.jsonl" \
    --endpoint "${ENDPOINT:-$URL/v1}" --output "$OUT/judged" --price 2.5,10 --overwrite
[ -n "${ENDPOINT:-}" ] || stop
step "Serving it"
background "$OUT/serve.log" -m infer serve "$OUT/vicuna" --rows 2 --name vicuna --port 0
printf 'Who are you?\n!!exit\n' | run -m infer chat --endpoint "$URL/v1" --temperature 0
stop
step "Done: $OUT/tuned, $OUT/delta and $OUT/judged"
