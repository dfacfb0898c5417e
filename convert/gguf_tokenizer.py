"""A tokenizer in GGUF's metadata: each token's text, score and kind, the merges, the roles and the chat template.

llama.cpp has two tokenizers for LLaMA: "llama" merges SentencePiece pieces by score, "gpt2" merges byte-level BPE by
rank. What its own converter (conversion/base.py) writes for each, this writes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.errors import PunaError
from model.json_file import read_json
from model.tokenizer import Tokenizer, load_tokenizer
from model.tokenizer_sources import main_file
from model.vocabulary import LLAMA3_SPLIT, SPACE, byte_level_alphabet, is_ranks, parse_sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # as in SentencePiece, whose numbers GGUF took
ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0


@dataclass
class Tokens:
    """The model's tokens in the order of their ids; `kinds` are GGUF's token types, `scores` SentencePiece's.

    space: whether a space is put before a text.
    """

    model: str
    pre: str
    texts: list[bytes]
    kinds: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    space: bool = True


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer of a model folder, if it has one, to a GGUFWriter.

    Tokens beyond the model's rows are left out, since it cannot embed them; rows beyond the tokens are unused ones.
    Raises PunaError for a tokenizer that llama.cpp could not run as it is: it knows no normalization of text, and we
    know some of its ways to cut text before merging.
    """
    names = ("tokenizer.model", "tokenizer.json")
    main = main_file({name: folder / name for name in names if (folder / name).is_file()})
    if main is None:
        writer.add_tokenizer_model("none")
        return
    tokenizer = load_tokenizer(folder)
    tokens = _read(main, tokenizer)
    _add_specials(tokens, tokenizer)
    _fit(tokens, vocab_size)
    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.texts)
    if tokens.scores:
        writer.add_token_scores(tokens.scores)
    writer.add_token_types(tokens.kinds)
    if tokens.merges:
        writer.add_token_merges(tokens.merges)
    roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "pad": tokenizer.pad_id}
    for role, id in roles.items():
        if id is not None and id < vocab_size:
            getattr(writer, f"add_{role}_token_id")(id)
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(tokenizer.eos_id is not None and config.get("add_eos_token") is True)
    says_space = config.get("add_prefix_space")
    if tokens.model == "llama" and not (tokens.space if says_space is None else says_space):
        writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _read(path: Path, tokenizer: Tokenizer) -> Tokens:
    """The trained vocabulary, from the file that `load_tokenizer` takes it from."""
    if path.name == "tokenizer.json":
        return _merges(path)
    data = path.read_bytes()
    if not is_ranks(data):
        return _sentencepiece(parse_sentencepiece(data, path), path)
    ranks = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    return _ranks(ranks[: ranks.index(b"")] if b"" in ranks else ranks)


def _sentencepiece(proto: Any, path: Path) -> Tokens:
    normalizer, trainer, pieces = proto.normalizer_spec, proto.trainer_spec, proto.pieces
    cannot = {
        f"is a {trainer.ModelType.Name(trainer.model_type).lower()} model": trainer.model_type != trainer.BPE,
        f"normalizes text by {normalizer.name or 'a table'}": bool(normalizer.precompiled_charsmap),
        "makes runs of spaces one (remove_extra_whitespaces)": normalizer.remove_extra_whitespaces,
        "keeps spaces as they are (escape_whitespaces)": not normalizer.escape_whitespaces,
        "puts spaces behind words (treat_whitespace_as_suffix)": trainer.treat_whitespace_as_suffix,
        "has no tokens for single bytes": not any(piece.type == BYTE for piece in pieces),
    }
    _check(path, [words for words, is_so in cannot.items() if is_so])
    texts = [piece.piece.encode() for piece in pieces]
    kinds, scores = [piece.type for piece in pieces], [piece.score for piece in pieces]
    return Tokens("llama", "default", texts, kinds, scores, space=normalizer.add_dummy_prefix)


def _check(path: Path, cannot: list[str]) -> None:
    if cannot:
        raise PunaError(f"{path} {', '.join(cannot)}, which llama.cpp does not do: it would run other tokens")


def _ranks(tokens: list[bytes]) -> Tokens:
    """tiktoken merges any two neighbours that join to a token, the one of lowest rank first: every split of a token
    into two tokens is a merge, as transformers' TikTokenConverter has them."""
    letters = {byte: letter for letter, byte in byte_level_alphabet().items()}
    texts = ["".join(letters[byte] for byte in token) for token in tokens]
    rank = {text: id for id, text in enumerate(texts)}
    merges = []
    for text in texts:
        splits = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in rank and text[i:] in rank]
        merges += [" ".join(split) for split in sorted(splits, key=lambda split: (rank[split[0]], rank[split[1]]))]
    return Tokens("gpt2", "llama-bpe", [text.encode() for text in texts], [NORMAL] * len(texts), merges=merges)


def _merges(path: Path) -> Tokens:
    """The BPE of a tokenizer.json, byte-level (Llama 3) or with byte fallback (converted from SentencePiece)."""
    spec = read_json(path)
    model = spec["model"]
    ids: Mapping[str, int] = model["vocab"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    texts = [b""] * (max(ids.values()) + 1)
    for text, id in ids.items():
        texts[id] = text.encode()
    cannot = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    _check(path, [f"has {key}" for key in cannot])
    if not model.get("byte_fallback"):
        pre = _split(spec, path)
        _check(path, ["takes whole words before merging (ignore_merges)"] * (pre != "llama-bpe" and _ignores(model)))
        return Tokens("gpt2", pre, texts, [NORMAL] * len(texts), merges=[" ".join(p) for p in pairs])
    space = _prefix(spec, path)
    # SentencePiece's rule: the pair that joins to the best piece merges first. So a piece scores as its first merge.
    first: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        first.setdefault("".join(pair), rank)
    tokens = Tokens("llama", "default", texts, [NORMAL] * len(texts), [0.0] * len(texts), space=space)
    for text, id in ids.items():
        tokens.scores[id] = -float(first.get(text, 0))
        if text == model.get("unk_token"):
            tokens.kinds[id] = UNKNOWN
        elif len(text) == 6 and text.startswith("<0x"):
            tokens.kinds[id] = BYTE
    return tokens


def _ignores(model: Mapping[str, Any]) -> bool:
    return model.get("ignore_merges") is True


def _steps(said: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a sequence of normalizers or pre-tokenizers, or the one."""
    return [] if not said else said.get(key) or [said]


def _prefix(spec: Mapping[str, Any], path: Path) -> bool:
    """Whether a tokenizer.json converted from SentencePiece puts a space before a text."""
    normalizers = _steps(spec.get("normalizer"), "normalizers")
    cutters = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    plain = {"Prepend", "Replace"}
    cannot = [f"normalizes text ({step['type']})" for step in normalizers if step["type"] not in plain]
    cannot += [f"cuts text ({step['type']})" for step in cutters if step["type"] != "Metaspace"]
    for step in normalizers:
        if step["type"] == "Replace" and (step["pattern"], step["content"]) != ({"String": " "}, SPACE):
            cannot.append(f"replaces {step['pattern']} in text")
    _check(path, cannot)
    metaspace = [step.get("prepend_scheme", "always") != "never" for step in cutters]
    return any(metaspace) or any(step["type"] == "Prepend" for step in normalizers)


_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_LETTERS = _GPT2 | {"use_regex": False}  # the cutting is done already
_CUTS = {  # llama.cpp's name for how the text is cut before merging
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}}, _LETTERS],
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
}


def _split(spec: Mapping[str, Any], path: Path) -> str:
    """The key of `_CUTS` that says what a byte-level tokenizer.json does before merging."""
    _check(path, [f"normalizes text ({step['type']})" for step in _steps(spec.get("normalizer"), "normalizers")])
    steps = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    defaults = {"ByteLevel": {"add_prefix_space": True, "use_regex": True}, "Digits": {"individual_digits": False}}
    keys = ("type", "pattern", "individual_digits", "add_prefix_space", "use_regex")
    full = [{**defaults.get(step["type"], {}), **step} for step in steps]
    said = [{key: value for key, value in step.items() if key in keys} for step in full]
    odd = [step for step in steps if step.get("behavior", "Isolated") != "Isolated" or step.get("invert")]
    for name, cut in _CUTS.items():
        if said == cut and not odd:
            return name
    raise PunaError(f"{path} cuts text by {steps}, which llama.cpp is not known to do: it would run other tokens")


def _add_specials(tokens: Tokens, tokenizer: Tokenizer) -> None:
    """Mark special tokens, and append those that stand beside the trained vocabulary."""
    special = {id: text for text, id in tokenizer.special_tokens.items()}
    for id in range(len(tokens.texts), tokenizer.vocab_size):
        tokens.texts.append(special[id].encode() if id in special else tokenizer.token_bytes(id))
        tokens.kinds.append(USER_DEFINED)
        if tokens.scores:
            tokens.scores.append(ADDED_SCORE)
    for id in special:
        if tokens.kinds[id] != UNKNOWN:
            tokens.kinds[id] = CONTROL


def _fit(tokens: Tokens, vocab_size: int) -> None:
    """As many tokens as the model has rows; ids that no token has are unused, under llama.cpp's name for them."""
    has_scores = bool(tokens.scores)
    for id in range(vocab_size):
        if id >= len(tokens.texts):
            tokens.texts.append(b"")
            tokens.kinds.append(UNUSED)
            tokens.scores += [UNUSED_SCORE] * has_scores
        if not tokens.texts[id]:
            tokens.texts[id], tokens.kinds[id] = f"[PAD{id}]".encode(), UNUSED
    del tokens.texts[vocab_size:], tokens.kinds[vocab_size:], tokens.scores[vocab_size:]
