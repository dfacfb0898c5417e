#!/usr/bin/env bash
# WizardLM (uncensored): instructions evolved by a model, refusals filtered, a run killed and resumed, two evaluations.
#   bash configs/recipes/wizardlm/run.sh [OUT]       ENDPOINT=URL asks a real model; else our own server and base are asked
OUT=${1:-runs/recipes/wizardlm}
source "$(dirname "$0")/../steps.sh"
HERE=configs/recipes/wizardlm

base
step "Instructions to evolve"
run -m configs.recipes.materials wizardlm "$OUT"
step "Evol-Instruct, two rounds, asked of ${ENDPOINT:-our own server}"
[ -n "${ENDPOINT:-}" ] || background "$OUT/evolve.log" -m infer serve "$OUT/base" --rows 4 --name base --template wizardlm --port 0
run -m infer synthesize evol-instruct "$OUT/evolved.jsonl" --seeds "$OUT/seeds.jsonl" --rounds 2 \
    --max-new-tokens "${TOKENS:-48}" --endpoint "${ENDPOINT:-$URL/v1}"
[ -n "${ENDPOINT:-}" ] || stop
step "Answers that refuse are filtered out by phrases"
run -m train prepare "$OUT/seeds.jsonl" "$OUT/evolved.jsonl" "$OUT/refusals.jsonl" "$OUT/instructions.jsonl" \
    --phrases $HERE/phrases.txt --overwrite
step "The fine-tune, killed on the way"
FINETUNE=($HERE/finetune.toml model.path="$OUT/base" data.path="$OUT/instructions.jsonl" data.cache_dir="$OUT/cache")
rm -rf "$OUT/tuned"
"$PY" -m train run "${FINETUNE[@]}" run.output_dir="$OUT/tuned" 2> "$OUT/killed.log" &
killed=$!
until [ "$(grep -c '"loss"' "$OUT/tuned/metrics.jsonl" 2> /dev/null || true)" -ge 20 ] 2> /dev/null; do
    kill -0 $killed 2> /dev/null || { cat "$OUT/killed.log" >&2; exit 1; }
    sleep 0.05
done
kill -KILL $killed
wait $killed || echo "killed after step $(tail -n 1 "$OUT/tuned/metrics.jsonl" | "$PY" -c 'import json; print(json.loads(input())["step"])')"
step "Resumed, with another interval between saves"
run -m train run "${FINETUNE[@]}" run.output_dir="$OUT/tuned" run.save_steps=5
step "The same without a kill: the same bytes"
run -m train run "${FINETUNE[@]}" run.output_dir="$OUT/uninterrupted"
sha256sum "$OUT/tuned/final/model.safetensors" "$OUT/uninterrupted/final/model.safetensors"
cmp "$OUT/tuned/final/model.safetensors" "$OUT/uninterrupted/final/model.safetensors"
step "Batch inference over the test set"
run -m infer batch "$OUT/tuned" "$OUT/testset.jsonl" "$OUT/answers.jsonl" --max-new-tokens 64 --overwrite
step "Log-likelihood of choices, by lm-eval"
sed "s#DATA#$OUT/choices.jsonl#" $HERE/choices.yaml > "$OUT/choices.yaml"
run -m infer eval "base=$OUT/base" "tuned=$OUT/tuned" --task puna_choices --include "$OUT" --output "$OUT/choices" --overwrite
step "The same, asked of our server"
background "$OUT/serve.log" -m infer serve "$OUT/tuned" --rows 2 --name tuned --port 0
run -m infer eval "served=$URL/v1" --task puna_choices --include "$OUT" --tokenizer "$OUT/tuned/final" \
    --output "$OUT/choices"
stop
step "Done: $OUT/tuned, $OUT/answers.jsonl and $OUT/choices"
