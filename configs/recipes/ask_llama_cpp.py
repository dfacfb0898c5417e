"""python -m configs.recipes.ask_llama_cpp FILE.gguf QUESTION: llama.cpp's greedy answer in Alpaca's prompt."""

import json
import sys
from urllib.request import Request, urlopen

import xllamacpp

from model.chat import TEMPLATES


def main(path: str, question: str) -> None:
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = path, 512, 1, False
    server = xllamacpp.Server(settings)
    pieces = TEMPLATES["alpaca"].render([{"role": "user", "content": question}], True)
    prompt = "".join(piece.text for piece in pieces if not piece.special)
    body = json.dumps({"prompt": prompt, "n_predict": 40, "temperature": 0}).encode()
    with urlopen(Request(f"{server.listening_address}/completion", body)) as answer:
        print(json.load(answer)["content"].strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
