"""What one tokenizer file says: the bytes of every token, and a function from text to ids.

Three readers, one for each kind of file: SentencePiece models, tiktoken ranks and tokenizer.json.
"""

import base64
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import sentencepiece
import tokenizers
from google.protobuf import message, message_factory
from sentencepiece import sentencepiece_model_pb2

from model.errors import PunaError
from model.json_file import read_json

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
USUAL_ROLES = {
    "<s>": "bos_token",
    "</s>": "eos_token",
    "<unk>": "unk_token",
    "<|begin_of_text|>": "bos_token",
    "<|end_of_text|>": "eos_token",
}
MAX_VOCABULARY = 1 << 24  # far above any model's; each id below the largest takes memory
SPACE = "▁"  # SentencePiece's mark for a space
BLANK = r"[^\S\x1c-\x1f]"  # what is white space for the tokenizers library: Unicode's, less than Python's own

# Meta's Llama 3 tokenizer: how text is cut before merging, the special tokens after the ranks, and the longest text
# and the longest run of blanks or of non-blanks that tiktoken is given at once.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)
LLAMA3_ROLES = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "pad_token": "<|finetune_right_pad_id|>",
}
MAX_CHARACTERS = 400_000
MAX_RUN = 25_000


class Prefix(NamedTuple):
    """Which texts of a conversation get a space in front.

    Attributes:
        scheme: all of them, the first, or none: Metaspace's words.
        forced: whether that is so even where a SentencePiece model says that it puts none.
    """

    scheme: Literal["always", "first", "never"]
    forced: bool = False


@dataclass(frozen=True)
class AddedToken:
    """A token beside the trained vocabulary. A special one has meaning to templates and is never read from text.

    Attributes:
        content: its text.
        id: None where no file gives one: it takes the next id that is free.
        lstrip: blanks to its left in a text belong to it.
        rstrip: blanks to its right in a text belong to it.
        single_word: it is not found inside a word.
    """

    content: str
    id: int | None = None
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def __post_init__(self):
        check_token(self.content, self.id)

    @property
    def pattern(self) -> str:
        """A regular expression that finds the token in text, with its content as the one group."""
        word = (f"(?<!{_letters()})", f"(?!{_letters()})") if self.single_word else ("", "")
        blanks = (f"{BLANK}*" if self.lstrip else "", f"{BLANK}*" if self.rstrip else "")
        return f"{blanks[0]}{word[0]}({re.escape(self.content)}){word[1]}{blanks[1]}"


@cache
def _letters() -> str:
    """The class of characters that make words for the tokenizers library, which counts marks and not fractions as such
    (Unicode UTS 18, \\w), other than Python's own."""
    kinds = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"}
    found = [code for code in range(0x110000) if unicodedata.category(chr(code)) in kinds]
    starts = [code for code, before in zip(found, [-2, *found], strict=False) if code != before + 1]
    ends = [code for code, after in zip(found, [*found[1:], -2], strict=True) if code != after - 1]
    pairs = zip(starts, ends, strict=True)
    return "[" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in pairs) + "\u200c\u200d]"


@dataclass(frozen=True)
class Vocabulary:
    """What one tokenizer file says.

    Attributes:
        pieces: the bytes of each id.
        ids: the id of each piece's text, as the file writes it; empty for tiktoken ranks.
        added: tokens beside the trained vocabulary.
        roles: the special token's text by role, one of ROLES.
        encoder: makes, from the special tokens' texts, a function from text to ids that cannot yield them.
        later_encoder: the same for text that follows a token, where that differs: the scheme "first" puts a space
            before the first text alone.
        dummy_prefix: whether encoding puts a space before a text, which decoding takes away.
        errors: the codec error handler for invalid UTF-8.
    """

    pieces: list[bytes]
    ids: Mapping[str, int]
    added: list[AddedToken]
    roles: dict[str, str]
    encoder: Callable[[Set[str]], Callable[[str], list[int]]]
    dummy_prefix: bool
    errors: str
    later_encoder: Callable[[Set[str]], Callable[[str], list[int]]] | None = None


def read_vocabulary(path: Path, prefix: Prefix | None = None) -> Vocabulary:
    """The vocabulary in a tokenizer file, whose kind is found from its content.

    Args:
        path: the file.
        prefix: which texts get a space in front, where it is not the file that says so.

    Raises:
        PunaError: the file is of no kind we know, or damaged.
    """
    with readable(path):
        data = path.read_bytes()
        if data.lstrip()[:1] == b"{":
            return _read_merges(path, prefix)
        return _read_ranks(data, path) if is_ranks(data) else _read_sentencepiece(data, path, prefix)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises PunaError, naming `path`, for what breaks while what it holds is interpreted."""
    try:
        yield
    except PunaError as error:
        raise error if str(path) in str(error) else PunaError(f"{path}: {error}") from None
    except OSError:
        raise
    except BaseException as error:  # the libraries raise every kind, and what fails in Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise PunaError(f"{path} is damaged, or says something no tokenizer says ({reason}): fetch it again") from error


def added_token(entry: Any) -> AddedToken:
    """The token of an entry of `added_tokens` in tokenizer.json, or of `added_tokens_decoder` with its id.

    Raises:
        PunaError: a value is of the wrong type.
    """
    if not isinstance(entry, dict):
        raise PunaError(f"an added token is {entry!r:.80}, which is no JSON object")
    token = AddedToken(**{name: entry[name] for name in AddedToken.__dataclass_fields__ if name in entry})
    flags = {name: value for name, value in vars(token).items() if name not in ("content", "id")}
    for name, value in {"normalized": entry.get("normalized", False), **flags}.items():
        if not isinstance(value, bool):
            raise PunaError(
                f"the added token {token.content!r:.80} has {name} {value!r:.80}, which is not true or false"
            )
    return token


def check_token(content: object, id: object) -> None:
    """Raises PunaError for a token that is no text, or an id that is no number below MAX_VOCABULARY."""
    if not isinstance(content, str) or not content or any(0xD800 <= ord(letter) < 0xE000 for letter in content):
        raise PunaError(f"the token {content!r:.80} is no text")
    if id is not None and (not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < MAX_VOCABULARY):
        raise PunaError(
            f"the token {content!r:.80} has the id {id!r:.80}: ids are whole numbers below {MAX_VOCABULARY}"
        )


# SentencePiece: LLaMA 1 and 2, and the vocabularies merged from them.


def parse_sentencepiece(data: bytes, path: str | Path) -> Any:
    """SentencePiece's ModelProto message.

    Args:
        data: the file's bytes.
        path: the file, for the message.

    Raises:
        PunaError: `data` holds none.
    """
    descriptor = sentencepiece_model_pb2.DESCRIPTOR.message_types_by_name["ModelProto"]
    proto: Any = message_factory.GetMessageClass(descriptor)()
    try:
        proto.ParseFromString(data)
    except message.DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise PunaError(f"{path} is no tokenizer: expected a SentencePiece model, a tokenizer.json or tiktoken ranks")
    return proto


def _read_sentencepiece(data: bytes, path: Path, prefix: Prefix | None) -> Vocabulary:
    proto = parse_sentencepiece(data, path)
    kind = proto.SentencePiece.Type
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise PunaError(f"{path} is a damaged SentencePiece model: {error}") from None
    unspoken = (kind.UNKNOWN, kind.CONTROL)

    def spelled(piece: Any) -> bytes:
        if piece.type == kind.BYTE:
            return bytes([int(piece.piece[3:5], 16)])
        return piece.piece.replace(SPACE, " ").encode()

    dummy_prefix = proto.normalizer_spec.add_dummy_prefix
    if prefix is not None:
        dummy_prefix = (dummy_prefix or prefix.forced) and prefix.scheme != "never"
    first_alone = dummy_prefix and prefix is not None and prefix.scheme == "first"

    def encoder(specials: Set[str], dummy_prefix: bool = dummy_prefix) -> Callable[[str], list[int]]:
        own = type(proto)()
        own.CopyFrom(proto)
        own.normalizer_spec.add_dummy_prefix = dummy_prefix
        for piece in own.pieces:
            if piece.piece in specials and piece.type not in unspoken:
                piece.type = kind.CONTROL  # so that no text can spell it
        if own == proto:
            return processor.encode
        return sentencepiece.SentencePieceProcessor(model_proto=own.SerializeToString()).encode

    roles = zip(ROLES, (processor.bos_id(), processor.eos_id(), processor.unk_id(), processor.pad_id()), strict=True)
    return Vocabulary(
        pieces=[spelled(piece) for piece in proto.pieces],
        ids={piece.piece: id for id, piece in enumerate(proto.pieces)},
        added=[AddedToken(p.piece, id, special=True) for id, p in enumerate(proto.pieces) if p.type in unspoken],
        roles={role: proto.pieces[id].piece for role, id in roles if id >= 0},
        encoder=encoder,
        dummy_prefix=dummy_prefix,
        errors="surrogateescape",
        later_encoder=partial(encoder, dummy_prefix=False) if first_alone else None,
    )


# tiktoken ranks: Llama 3 as Meta distributes it.


def is_ranks(data: bytes) -> bool:
    """Whether a file's bytes begin as tiktoken ranks do: a base64 token and its rank on a line."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data) is not None


def _read_ranks(data: bytes, path: Path) -> Vocabulary:
    import tiktoken

    try:
        lines = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise PunaError(f"{path}: a line is not a base64 token and its rank ({error}): the file is damaged") from None
    if sorted(ranks.values()) != list(range(len(lines))):
        raise PunaError(f"{path}: the {len(lines)} ranks do not count up from 0: the file is damaged")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise PunaError(
            f"{path} has no token for the byte 0x{missing[0]:02x}, which texts may hold: the file is damaged"
        )
    library = tiktoken.Encoding(path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    return Vocabulary(
        pieces=sorted(ranks, key=ranks.__getitem__),
        ids={},
        added=[AddedToken(content, len(ranks) + i, special=True) for i, content in enumerate(LLAMA3_SPECIALS)],
        roles=LLAMA3_ROLES,
        encoder=lambda specials: partial(_encode_in_chunks, library.encode_ordinary),
        dummy_prefix=False,
        errors="replace",
    )


def _encode_in_chunks(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Meta's rule: tiktoken fails on very long texts, and is quadratic in runs without a break."""
    ids = []
    for start in range(0, len(text), MAX_CHARACTERS):
        window = text[start : start + MAX_CHARACTERS]
        long_runs = re.finditer(rf"\s{{{MAX_RUN + 1},}}|\S{{{MAX_RUN + 1},}}", window)
        cuts = [0, *(i for run in long_runs for i in range(run.start() + MAX_RUN, run.end(), MAX_RUN)), len(window)]
        for left, right in zip(cuts, cuts[1:], strict=False):
            ids += encode(window[left:right])
    return ids


# tokenizer.json: the `tokenizers` library.


def _read_merges(path: Path, prefix: Prefix | None) -> Vocabulary:
    spec = read_json(path)
    model, decoder = spec.get("model") or {}, spec.get("decoder") or {}
    if model.get("type") != "BPE":
        raise PunaError(f"{path}: a tokenizer model of type {model.get('type')!r} is not supported: LLaMA's are BPE")
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if step}
    vocab: dict[str, int] = model["vocab"]
    for piece, id in vocab.items():
        check_token(piece, id)
    if model.get("dropout"):
        raise PunaError(f"{path} has dropout {model['dropout']!r}, which merges at random: set it to null")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):  # the library dies of a prefix that pieces lack
        if model.get(key):
            raise PunaError(
                f"{path} has {key} {str(model[key])[:80]!r}, which no LLaMA's tokenizer has: set it to null"
            )
    added = [added_token(entry) for entry in spec.get("added_tokens", [])]
    if "ByteLevel" in steps:
        spell, dummy_prefix, errors = partial(_spell_byte_level, byte_level_alphabet()), False, "replace"
    elif model.get("byte_fallback") or "Metaspace" in steps:
        if prefix is not None:  # so transformers makes these tokenizers, whatever the file says of it
            metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": prefix.scheme, "split": False}
            spec |= {"normalizer": None, "pre_tokenizer": metaspace}
            dummy_prefix = prefix.scheme != "never"
        else:
            metaspace = steps.get("Metaspace", {"prepend_scheme": "never"})
            dummy_prefix = "Strip" in steps or metaspace.get("prepend_scheme") != "never"
        spell, errors = _spell_metaspace, "surrogateescape"
    else:
        raise PunaError(f"{path}: a decoder of {sorted(steps)} is not supported: expected ByteLevel or byte fallback")

    pre_tokenizer = spec.get("pre_tokenizer")

    def encoder(specials: Set[str], cut: Any = pre_tokenizer) -> Callable[[str], list[int]]:
        # A special token leaves the vocabulary and the merges, so that no text can spell it. Added tokens, which this
        # library would look for in text, are Tokenizer's; truncation and post-processing are nobody's here.
        kept = {piece: id for piece, id in vocab.items() if piece not in specials or piece == model.get("unk_token")}
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        merges = [pair for pair in pairs if specials.isdisjoint((*pair, "".join(pair)))]
        plain = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None, "pre_tokenizer": cut}
        stripped = spec | plain | {"model": model | {"vocab": kept, "merges": merges}}
        library = tokenizers.Tokenizer.from_str(json.dumps(stripped))
        # A batch, though of one: it alone lets other threads run, and "fast" leaves out the offsets in the text.
        return lambda text: library.encode_batch_fast([text], add_special_tokens=False)[0].ids

    later = _without_first_space(pre_tokenizer)
    pieces = [b""] * (max(vocab.values(), default=-1) + 1)
    for piece, id in vocab.items():
        pieces[id] = spell(piece)
    named = {token.content for token in added} | vocab.keys()
    return Vocabulary(
        pieces=pieces,
        ids=vocab,
        added=added,
        roles={role: name for name, role in USUAL_ROLES.items() if name in named},
        encoder=encoder,
        dummy_prefix=dummy_prefix,
        errors=errors,
        later_encoder=None if later == pre_tokenizer else partial(encoder, cut=later),
    )


def _without_first_space(cut: Any) -> Any:
    """The pre-tokenizer for text that is not the first."""
    if isinstance(cut, list):
        return [_without_first_space(step) for step in cut]
    if not isinstance(cut, dict):
        return cut
    if cut.get("type") == "Metaspace" and cut.get("prepend_scheme") == "first":
        return cut | {"prepend_scheme": "never"}
    return {key: _without_first_space(value) for key, value in cut.items()}


def byte_level_alphabet() -> dict[str, int]:
    """The byte that each of GPT-2's letters stands for.

    Printable Latin-1 stands for itself; the others follow U+0100 in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _spell_byte_level(alphabet: Mapping[str, int], piece: str) -> bytes:
    if not alphabet.keys() >= set(piece):
        return piece.encode()
    return bytes(alphabet[letter] for letter in piece)


def _spell_metaspace(piece: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()
