"""A task whose answers can be checked, made on the spot: reverse a word, or sort its letters.

`write` is a `run.prepare` function: it fills the folders that a configuration names with a byte tokenizer, training
examples and held-out ones that do not occur among them.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from model.errors import PunaError
from train.data.cache import write_once
from train.sections import Config

Example = dict[str, str]
TRAIN_EXAMPLES, HELD_OUT_EXAMPLES = 30_000, 300
LETTERS = "abcdefghij"
TASKS: dict[str, Callable[[str], str]] = {
    "reverse": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
}
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")  # with the bytes, 260 tokens


def write(config: Config) -> None:
    """Makes what is not there yet: the folder model.tokenizer, and data.path and data.eval_path in one folder.

    Records are of data.format: instruction, conversations, preference, or else prompts with their completions.

    Raises:
        PunaError: the configuration does not name them so.
    """
    if not (isinstance(config.data.path, str) and config.data.eval_path and config.model.tokenizer):
        raise PunaError("train.data.toy:write needs data.path, data.eval_path and model.tokenizer: name files to make")
    train, held_out = Path(config.data.path), Path(config.data.eval_path)
    if train.parent != held_out.parent:
        raise PunaError("train.data.toy:write needs data.path and data.eval_path in one folder")

    def write_data(folder: Path) -> None:
        form = RECORDS.get(config.data.format, dict)
        examples = [form(example) for example in make_examples(TRAIN_EXAMPLES + HELD_OUT_EXAMPLES)]
        _write_jsonl(folder / held_out.name, examples[:HELD_OUT_EXAMPLES])
        _write_jsonl(folder / train.name, examples[HELD_OUT_EXAMPLES:])

    write_once(train.parent, write_data, wait_seconds=60)
    write_once(Path(config.model.tokenizer), write_tokenizer, wait_seconds=60)


def make_examples(count: int, seed: int = 0) -> list[Example]:
    """Different prompts with their answers, always the same ones for a seed.

    Returns:
        `count` examples, with the keys prompt and completion.
    """
    random_ = random.Random(seed)
    examples: dict[str, str] = {}
    while len(examples) < count:
        task = random_.choice(sorted(TASKS))
        word = "".join(random_.choices(LETTERS, k=random_.randint(3, 5)))
        examples[f"{task} {word} = "] = TASKS[task](word)
    return [{"prompt": prompt, "completion": answer} for prompt, answer in examples.items()]


def _as_instruction(example: Example) -> dict[str, Any]:
    task, word, _ = example["prompt"].split()
    return {"instruction": f"{task} the word", "input": word, "output": example["completion"]}


def _as_conversation(example: Example) -> dict[str, Any]:
    turns = (("human", example["prompt"]), ("gpt", example["completion"]))
    return {"conversations": [{"from": role, "value": text.strip()} for role, text in turns]}


def _as_preference(example: Example) -> dict[str, Any]:
    """The answer beside that of the other task; where these are the same, beside one with another letter."""
    (task, word, _), right = example["prompt"].split(), example["completion"]
    wrong = next(answer(word) for name, answer in TASKS.items() if name != task)
    other = LETTERS[(LETTERS.index(right[-1]) + 1) % len(LETTERS)]
    return {"prompt": example["prompt"], "chosen": right, "rejected": wrong if wrong != right else right[:-1] + other}


RECORDS: dict[str, Callable[[Example], dict[str, Any]]] = {
    "instruction": _as_instruction,
    "conversations": _as_conversation,
    "preference": _as_preference,
}


def write_tokenizer(folder: Path) -> None:
    """A byte tokenizer as a Hugging Face folder: a BPE without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: id for id, piece in enumerate((*SPECIALS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    bos = ("<s>", vocab["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIALS, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_jsonl(path: Path, examples: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
