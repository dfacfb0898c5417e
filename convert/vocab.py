"""Vocabularies that grow: pieces added to a SentencePiece model, and rows added to a model's embeddings for them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cli.files import atomic_path, check_apart
from cli.progress import ProgressBar, no_progress
from convert.checkpoint import Checkpoint, WriteOptions
from convert.formats import open_model
from convert.lazy import LazyTensor, concatenate, from_array
from convert.save import write_model
from convert.tokenizer_files import has_tokenizer
from model.errors import PunaError
from model.tokenizer import Tokenizer, load_tokenizer
from model.vocabulary import is_ranks, parse_sentencepiece

INITS = ("mean", "zero")
_ROWS = 4096  # of an embedding summed at once


@dataclass(frozen=True)
class Merged:
    """How many pieces the two models held, how many were new, and the SHA-256 of the file written."""

    base: int
    extra: int
    added: int
    sha256: str

    @property
    def total(self) -> int:
        return self.base + self.added


def merge_vocabularies(
    base: str | Path, extra: str | Path, dst: str | Path, specials: Sequence[str] = (), overwrite: bool = False
) -> Merged:
    """Write the SentencePiece model `base` with those pieces of `extra`, then of `specials`, that it does not hold.

    New pieces are appended in their order with score 0 and the default type, as Chinese-LLaMA-Alpaca did
    (scripts/merge_tokenizer): ids of `base` stay, and merging the same files gives the same bytes.

    Raises:
        PunaError: an input is no SentencePiece model, a special piece is empty, or `dst` exists and `overwrite` is
            false.
    """
    if "" in specials:
        raise PunaError("a special piece is empty, which SentencePiece does not read: name one, as [PAD]")
    proto, other = _read(base), _read(extra)
    before = len(proto.pieces)
    known = {piece.piece for piece in proto.pieces}
    for text in (*(piece.piece for piece in other.pieces), *specials):
        if text not in known:
            known.add(text)
            proto.pieces.add(piece=text, score=0.0)
    data = proto.SerializeToString()
    with atomic_path(dst, overwrite) as temporary:
        temporary.write_bytes(data)
    return Merged(before, len(other.pieces), len(proto.pieces) - before, hashlib.sha256(data).hexdigest())


def resize(
    model: str | Path,
    dst: str | Path,
    tokenizer: str | Path,
    init: str = "mean",
    multiple: int = 1,
    overwrite: bool = False,
    bar: ProgressBar = no_progress,
) -> Checkpoint:
    """Write `model` to `dst`, in its own format, with embeddings for every token of `tokenizer` and with its files.

    Args:
        model: a model folder of any format, or a Hub id.
        dst: the folder to write.
        tokenizer: a file or folder.
        init: of new rows, mean (of the old ones) or zero.
        multiple: the number of rows is padded to a multiple of this.
        overwrite: replace what stands at `dst`.
        bar: shows how many bytes are written.

    Returns:
        What was written.

    Raises:
        PunaError: as `resized` does, and as reading and writing models do; or a token that the model's own tokenizer
            has is another one in `tokenizer`.
    """
    check_apart(dst, tokenizer)
    tok, opened = load_tokenizer(tokenizer), open_model(model)
    checkpoint = resized(opened, tok.vocab_size, init, multiple)
    if has_tokenizer(opened.folder):
        _check_grown(load_tokenizer(opened.folder), tok, tokenizer)
    if checkpoint.config.pad_token_id is None:
        checkpoint = replace(checkpoint, config=replace(checkpoint.config, pad_token_id=tok.pad_id))
    write_model(Path(dst), checkpoint, WriteOptions(tokenizer=tok, bar=bar), overwrite)
    return checkpoint


def resized(checkpoint: Checkpoint, vocab_size: int, init: str = "mean", multiple: int = 1) -> Checkpoint:
    """The checkpoint with input and output rows for `vocab_size` tokens, padded to a multiple; nothing else is read.

    New rows, padding included, are the mean of the old ones (Stanford Alpaca) or zero (Vicuna's first delta).

    Raises:
        PunaError: fewer tokens than rows, which would lose some.
    """
    if init not in INITS:
        raise PunaError(f"init {init!r} is not known; choose {' or '.join(INITS)}")
    if multiple < 1:
        raise PunaError(f"multiple {multiple} is not positive: give 1 to add only the rows needed")
    rows = checkpoint.config.vocab_size
    if vocab_size < rows:
        raise PunaError(
            f"the tokenizer has {vocab_size} tokens and the model {rows} rows: a tokenizer smaller than its model "
            "would lose rows; give the tokenizer that the model was trained with, or one grown from it"
        )
    new = -(-vocab_size // multiple) * multiple - rows
    tensors = dict(checkpoint.tensors)
    for name, axis in (("embed", 0), ("lm_head", 1)):
        if name in tensors and new:
            tensors[name] = concatenate([tensors[name], _new_rows(tensors[name], axis, new, init)], axis)
    return replace(checkpoint, config=replace(checkpoint.config, vocab_size=rows + new), tensors=tensors)


def _check_grown(old: Tokenizer, new: Tokenizer, where: str | Path) -> None:
    """Raises PunaError unless every token of `old` that spells text is the same one in `new`, so that each row keeps
    its meaning. Special tokens may have other names: reserved ones are named when they are used."""
    named = {id: text.encode() for text, id in new.special_tokens.items()}
    for id in range(min(old.vocab_size, new.vocab_size)):
        was, now = old.token_bytes(id), named.get(id) or new.token_bytes(id)
        if was not in (b"", now):
            raise PunaError(
                f"{where}: token {id} is {now!r:.80}, and {was!r:.80} in the model's own tokenizer, so that rows would "
                "stand for other tokens: give a tokenizer grown from the model's"
            )


def _new_rows(tensor: LazyTensor, axis: int, count: int, init: str) -> LazyTensor:
    row = _mean(tensor, axis) if init == "mean" else np.zeros(tensor.shape[1 - axis], tensor.dtype)
    shape = (count, len(row)) if axis == 0 else (len(row), count)
    return from_array(np.broadcast_to(np.expand_dims(row, axis), shape), f"the {init} row")


def _mean(tensor: LazyTensor, axis: int) -> np.ndarray:
    """The mean over the vocabulary, summed in float64 and rounded once to the tensor's own dtype."""
    vocab_size = tensor.shape[axis]
    total = np.zeros(tensor.shape[1 - axis], np.float64)
    for start in range(0, vocab_size, _ROWS):
        part = tensor.narrow(axis, start, min(start + _ROWS, vocab_size)).load()
        total += part.sum(axis, dtype=np.float64)
    return (total / vocab_size).astype(tensor.dtype)


def _read(path: str | Path) -> Any:
    data = Path(path).read_bytes()
    if is_ranks(data):
        raise PunaError(f"{path} holds tiktoken ranks: only SentencePiece models can be merged")
    return parse_sentencepiece(data, path)
