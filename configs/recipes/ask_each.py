"""python -m configs.recipes.ask_each URL TEST.jsonl OUT.json: a dialogue, summarized by each model of a server."""

import json
import sys
from pathlib import Path

import openai

from infer.evaluate.dialogsum import END, prompt


def main(url: str, test: str, out: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    dialogue = json.loads(Path(test).read_text(encoding="utf-8").splitlines()[0])["dialogue"]
    said = {}
    for model in sorted(one.id for one in client.models.list()):
        answer = client.completions.create(
            model=model, prompt=prompt(dialogue), max_tokens=40, temperature=0, stop=[END]
        )
        said[model] = answer.choices[0].text.strip()
        print(f"{model}: {said[model]}")
    Path(out).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
