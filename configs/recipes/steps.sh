# What the recipes share; each begins with `source`. OUT is where everything goes, PY the Python that runs Puna.
set -euo pipefail
OUT=$(realpath -m "$OUT")
PY=$(command -v "${PY:-python3}")
PY=$(realpath -s "$PY")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
step() { printf '\n== [%ds] %s\n' "$SECONDS" "$1"; }
# Commands are shown as they are run, so that a recipe is read from its output too.
run() { printf '$ %s\n' "python $(printf '%q ' "$@")"; "$PY" "$@"; }
RUNNING=()
finish() { for pid in "${RUNNING[@]:-}"; do [ -z "$pid" ] || kill "$pid" 2> /dev/null || true; done; wait; }
trap finish EXIT
# background LOG COMMAND...: runs it until the recipe ends. It prints its URL; the recipe waits for it, and URL names it.
background() {
    local log=$1 pid
    shift
    printf '$ %s &\n' "python $(printf '%q ' "$@")"
    "$PY" "$@" > "$log" 2>&1 &
    pid=$!
    RUNNING+=("$pid")
    until URL=$(grep -om1 'http://[0-9.]*:[0-9]*' "$log"); do
        kill -0 "$pid" 2> /dev/null || { cat "$log" >&2; exit 1; }
        sleep 0.2
    done
    until "$PY" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1])' "$URL/health" 2> /dev/null; do
        kill -0 "$pid" 2> /dev/null || { cat "$log" >&2; exit 1; }
        sleep 0.2
    done
}
# stop: ends the last one that was started.
stop() { kill "${RUNNING[-1]}"; wait "${RUNNING[-1]}" || true; unset 'RUNNING[-1]'; }
# base: a small LLaMA in OUT/base; stories260K where the shared test data is, else one trained here for half a minute.
base() {
    step "A small LLaMA to begin with"
    run -m configs.recipes.materials base "$OUT"
    if [ ! -e "$OUT/base/config.json" ]; then
        run -m train run configs/recipes/from-nothing/pretrain.toml model.tokenizer="$OUT/text/tokenizer.model" \
            data.path="$OUT/text/train.jsonl" data.eval_path="$OUT/text/held_out.jsonl" data.cache_dir="$OUT/cache" \
            run.output_dir="$OUT/base-run" run.max_steps=300
        cp -r "$OUT/base-run/final" "$OUT/base"
    fi
}
