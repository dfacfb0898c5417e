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
from model.vocabulary import LLAMA3_SPLIT, byte_level_alphabet, is_ranks, parse_sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # as in SentencePiece, whose numbers GGUF took
ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0


@dataclass
class Tokens:
    """The model's tokens in the order of their ids; `kinds` are GGUF's token types, `scores` SentencePiece's."""

    model: str
    pre: str
    texts: list[bytes]
    kinds: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer of a model folder, if it has one, to a GGUFWriter.

    Tokens beyond the model's rows are left out, since it cannot embed them; rows beyond the tokens are unused ones.
    Raises PunaError for a tokenizer that llama.cpp could not run as it is.
    """
    main = [folder / name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).is_file()]
    if not main:
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
    writer.add_add_bos_token(tokenizer.bos_id is not None and _says_bos(folder))
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _says_bos(folder: Path) -> bool:
    """Whether texts begin with BOS: so they do unless tokenizer_config.json says that they do not."""
    path = folder / "tokenizer_config.json"
    return not path.is_file() or read_json(path).get("add_bos_token") is not False


def _read(main: list[Path], tokenizer: Tokenizer) -> Tokens:
    """The trained vocabulary, from the file that `load_tokenizer` takes it from."""
    path = main[0]
    data = path.read_bytes()
    if path.name == "tokenizer.model" and not is_ranks(data):
        return _sentencepiece(parse_sentencepiece(data, path))
    if main[-1].name == "tokenizer.json":
        return _merges(main[-1])
    ranks = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    return _ranks(ranks[: ranks.index(b"")] if b"" in ranks else ranks)


def _sentencepiece(proto: Any) -> Tokens:
    pieces = proto.pieces
    texts = [piece.piece.encode() for piece in pieces]
    return Tokens("llama", "default", texts, [piece.type for piece in pieces], [piece.score for piece in pieces])


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
    if not model.get("byte_fallback"):
        return Tokens("gpt2", _split(spec, path), texts, [NORMAL] * len(texts), merges=[" ".join(p) for p in pairs])
    # SentencePiece's rule: the pair that joins to the best piece merges first. So a piece scores as its first merge.
    first: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        first.setdefault("".join(pair), rank)
    tokens = Tokens("llama", "default", texts, [NORMAL] * len(texts), [0.0] * len(texts))
    for text, id in ids.items():
        tokens.scores[id] = -float(first.get(text, 0))
        if text == model.get("unk_token"):
            tokens.kinds[id] = UNKNOWN
        elif len(text) == 6 and text.startswith("<0x"):
            tokens.kinds[id] = BYTE
    return tokens


def _split(spec: Mapping[str, Any], path: Path) -> str:
    """llama.cpp's name for how the text is cut before merging."""
    pre = spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if patterns == [LLAMA3_SPLIT]:
        return "llama-bpe"
    if not patterns and any(step.get("type") == "ByteLevel" and step.get("use_regex", True) for step in steps):
        return "gpt-2"
    raise PunaError(f"{path} cuts text by {patterns}, which llama.cpp is not known to do: it would run other tokens")


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
