"""python -m configs.recipes.tokenizer TEXT MODEL PIECES: a SentencePiece BPE with byte fallback, as LLaMA's."""

import argparse
from pathlib import Path

from configs.recipes.materials import train_tokenizer

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("pieces", type=int)
    arguments = parser.parse_args()
    train_tokenizer(arguments.text, arguments.model, arguments.pieces)
