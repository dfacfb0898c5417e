"""One Tokenizer over the three kinds of tokenizer file that LLaMA checkpoints carry.

A Vocabulary (vocabulary.py) is read from the file; special tokens, streaming decode and the companion files of a
checkpoint folder are the same for all three, and are here.
"""

import codecs
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from model.errors import PunaError
from model.json_file import read_json
from model.tokenizer_sources import begins_with_bos, chat_template, main_file, older_tokens, prefix_of
from model.vocabulary import ROLES, AddedToken, Prefix, Vocabulary, added_token, read_vocabulary, readable

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

# A byte that is not UTF-8 becomes a lone surrogate under "surrogateescape", one for each byte as SentencePiece has it.
INVALID_BYTES = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")


class Tokenizer:
    """Text to token ids and back; `load_tokenizer` makes one.

    Special tokens written in text are text: their ids come from `special_id`, `add_bos` and `add_eos` alone. Every call
    of `encode` stands for itself, so SentencePiece prefixes each piece of a template with its dummy space (as
    transformers' legacy LlamaTokenizer does, on which the published templates rely). Where `legacy` is false, or the
    Metaspace of a tokenizer.json has the scheme "first", it stands before the first text alone.

    Args:
        added: tokens beside the trained vocabulary, each with its id.
        roles: the special token's text by role, one of vocabulary.ROLES.
        files: what `save` copies, by the name it has in checkpoints.
        add_bos: see `adds_bos`.

    Attributes:
        vocab_size: one more than the largest id.
        bos_id: the token that begins a text; None where there is none, as for the other roles.
        eos_id: the token that ends it.
        unk_id: the token of what no other spells.
        pad_id: the token that fills rows up.
        chat_template: the checkpoint's own jinja template, if any.
        adds_bos: whether a plain text to go on with begins with bos_id, as in transformers: where the post-processor of
            tokenizer.json puts it there; without that file, unless add_bos_token of tokenizer_config.json is false.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        added: Collection[AddedToken],
        roles: Mapping[str, str],
        chat_template: str | None,
        files: Mapping[str, Path],
        add_bos: bool = True,
    ):
        ids = {token.content: token.id for token in added if token.id is not None}
        self._special_ids = {token.content: ids[token.content] for token in added if token.special}
        self._special_text = {id: content.encode() for content, id in self._special_ids.items()}
        self._strips = {token.content: (token.lstrip, token.rstrip) for token in added if token.lstrip or token.rstrip}
        ordinary = [token for token in added if not token.special]
        self._ordinary_ids = {token.content: ids[token.content] for token in ordinary}
        longest_first = sorted(ordinary, key=lambda token: len(token.content), reverse=True)
        self._ordinary = re.compile("|".join(token.pattern for token in longest_first) or "(?!)")

        self.vocab_size = max(len(vocabulary.pieces), *(id + 1 for id in ids.values()), 0)
        self._pieces = vocabulary.pieces + [b""] * (self.vocab_size - len(vocabulary.pieces))
        for content, id in ids.items():
            self._pieces[id] = b"" if content in self._special_ids else content.encode()
        self._encode = vocabulary.encoder(self._special_ids.keys())
        later = vocabulary.later_encoder
        self._encode_later = self._encode if later is None else later(self._special_ids.keys())
        self._dummy_prefix, self._errors = vocabulary.dummy_prefix, vocabulary.errors

        self.bos_id, self.eos_id, self.unk_id, self.pad_id = (self._special_ids.get(roles.get(r, "")) for r in ROLES)
        self.adds_bos = add_bos and self.bos_id is not None
        self.chat_template = chat_template
        self._files = files

    def encode(
        self,
        text: str,
        add_bos: bool = False,
        add_eos: bool = False,
        *,
        follows: bool = False,
        literal: Collection[str] = (),
    ) -> list[int]:
        """The ids of `text`, which never hold a special one but those asked for.

        Args:
            add_bos: put the beginning-of-text token before them.
            add_eos: put the end-of-text token after them.
            follows: the text comes after a token, and begins no conversation or document.
            literal: added tokens that are read as text here, though they are not special.

        Raises:
            PunaError: for a lone surrogate, and where the tokenizer has no such token to add.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            surrogate = f"the lone surrogate {ascii(text[error.start])} at character {error.start}"
            raise PunaError(f"text with {surrogate} is not Unicode text: replace it before encoding") from None
        ids = [self._required("bos", self.bos_id)] if add_bos else []
        start = 0
        for match in self._ordinary.finditer(text):
            found = next(content for content in match.groups() if content is not None)
            if found in literal:
                continue
            ids += (self._encode_later if follows or start else self._encode)(text[start : match.start()])
            ids.append(self._ordinary_ids[found])
            start = match.end()
        ids += (self._encode_later if follows or start else self._encode)(text[start:])
        return [*ids, self._required("eos", self.eos_id)] if add_eos else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Args:
            skip_special: leave special tokens out; else they show by their names.

        Raises:
            PunaError: for an id outside the vocabulary.
        """
        stream = Stream(self, skip_special)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self) -> "Stream":
        """Decode ids one at a time."""
        return Stream(self)

    def special_id(self, text: str) -> int | None:
        """The id of the special token written `text`, as in `special_id("<|eot_id|>")`; None if there is no such."""
        return self._special_ids.get(text)

    def added_id(self, text: str) -> int | None:
        """The id of the added token written `text`, special or not; None if there is no such."""
        return self._special_ids.get(text, self._ordinary_ids.get(text))

    def strips(self, text: str) -> tuple[bool, bool]:
        """Whether the added token written `text` takes the blanks to its left, and those to its right."""
        return self._strips.get(text, (False, False))

    @property
    def ordinary_tokens(self) -> Mapping[str, int]:
        """The id of every added token that is not special, by its text."""
        return self._ordinary_ids

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The id of every special token, by its text."""
        return self._special_ids

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token spells; none for a special one.

        Raises:
            PunaError: for an id outside the vocabulary.
        """
        if not 0 <= id < self.vocab_size:
            raise PunaError(f"token id {id} is outside the tokenizer's vocab_size of {self.vocab_size}")
        return self._pieces[id]

    @cached_property
    def longest(self) -> int:
        """The most bytes that one token spells: a text of n bytes has at least n / longest tokens."""
        return max(map(len, self._pieces), default=0) or 1

    def save(self, folder: str | Path) -> None:
        """Copy the files this tokenizer was read from to `folder`, under the names they have in checkpoints."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, source in self._files.items():
            shutil.copyfile(source, Path(folder) / name)

    def _required(self, name: str, id: int | None) -> int:
        if id is None:
            raise PunaError(f"the tokenizer has no {name} token: name one as {name}_token in tokenizer_config.json")
        return id


class Stream:
    """Decodes ids as they come: the pushed texts and the flushed rest join to what `decode` gives for all of them.

    A character whose last byte is still to come is held back.

    Args:
        skip_special: as for `decode`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._token_bytes = tokenizer.token_bytes
        self._special_text = {} if skip_special else tokenizer._special_text
        self._decoder = codecs.getincrementaldecoder("utf-8")(tokenizer._errors)
        self._drop_space = tokenizer._dummy_prefix

    def push(self, id: int) -> str:
        """The text that this id completes, which may be none.

        Raises:
            PunaError: for an id outside the vocabulary.
        """
        return self._text(self._special_text.get(id) or self._token_bytes(id), final=False)

    def flush(self) -> str:
        """The text of the bytes still held back."""
        return self._text(b"", final=True)

    def _text(self, data: bytes, final: bool) -> str:
        text = self._decoder.decode(data, final)
        if self._drop_space and text:
            self._drop_space = False
            text = text.removeprefix(" ")
        return text.translate(INVALID_BYTES)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, with what its companion files add, or of a single file standing alone.

    The kind of file is found from its content.

    Raises:
        PunaError: there is none, or of no kind we know, or a file is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise PunaError(f"{path}: no such tokenizer file or folder")
    if path.is_file():
        name = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
        files = {name: path}
        return _assembled(path, _companions(files, path, path) if name == "tokenizer.json" else Companions(), files)
    files = {name: path / name for name in TOKENIZER_FILES if (path / name).is_file()}
    with readable(path):
        main = main_file(files)
    if main is None:
        raise PunaError(f"{path} has no tokenizer: looked for tokenizer.model and tokenizer.json")
    return _assembled(main, _companions(files, path, main), files)


def _assembled(main: Path, companions: "Companions", files: Mapping[str, Path]) -> Tokenizer:
    vocabulary = read_vocabulary(main, companions.prefix)
    with readable(main):
        return _assemble(vocabulary, companions, files)


@dataclass(frozen=True)
class Companions:
    """What the JSON files beside a vocabulary add to it.

    Attributes:
        added: tokens beside the trained vocabulary.
        roles: the special token's text by role, one of vocabulary.ROLES.
        specials: texts of special tokens that have no such role.
        chat_template: a jinja template, if any.
        prefix: which texts get a space in front, where the companions say so.
        add_bos: whether they leave plain texts their beginning-of-text token.
    """

    added: list[AddedToken] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)
    specials: list[str] = field(default_factory=list)
    chat_template: str | None = None
    prefix: Prefix | None = None
    add_bos: bool = True


def _assemble(vocabulary: Vocabulary, companions: Companions, files: Mapping[str, Path]) -> Tokenizer:
    tokens = {token.content: token for token in vocabulary.added}
    for token in companions.added:
        known = tokens.get(token.content, token)
        tokens[token.content] = replace(token, special=token.special or known.special)
    roles = vocabulary.roles | companions.roles
    if "[PAD]" in tokens or "[PAD]" in vocabulary.ids:
        roles.setdefault("pad_token", "[PAD]")  # appended under this name by the Alpaca family, not always declared
    for content in (*roles.values(), *companions.specials):
        token = tokens.get(content, AddedToken(content, vocabulary.ids.get(content)))
        tokens[content] = replace(token, special=True)
    next_id = max(len(vocabulary.pieces), *(token.id + 1 for token in tokens.values() if token.id is not None), 0)
    for content, token in tokens.items():
        if token.id is None:  # declared, but in no table: it takes the next id, as in transformers
            tokens[content] = replace(token, id=next_id)
            next_id += 1
    return Tokenizer(vocabulary, tokens.values(), roles, companions.chat_template, files, companions.add_bos)


def _companions(files: Mapping[str, Path], folder: Path, main: Path) -> Companions:
    said: dict[str, dict[str, Any]] = {}
    for name, path in files.items():
        if path.suffix == ".json":
            with readable(path):
                said[name] = read_json(path)
    config = said.get("tokenizer_config.json", {})
    names = {key: value for key, value in said.get("special_tokens_map.json", {}).items() if value}
    add_bos = config.get("add_bos_token") is not False
    added: list[AddedToken] = []
    if path := files.get("added_tokens.json"):
        with readable(path):
            added += older_tokens(path, said[path.name], config)
    if path := files.get("tokenizer.json"):
        with readable(path):
            added += map(added_token, said[path.name].get("added_tokens", []))
            add_bos = begins_with_bos(said[path.name], config, path)
    # transformers: the map overrides the configuration of old checkpoints; a table of added tokens marks a new one.
    declared = names | config if "added_tokens_decoder" in config else config | names
    with readable(folder):
        template = chat_template(files, config, folder)
    # Both may say a token: the one that is read last names the file of an error.
    with readable(files.get("tokenizer_config.json") or files.get("special_tokens_map.json") or Path("tokenizer")):
        added += [added_token(t | {"id": int(id)}) for id, t in config.get("added_tokens_decoder", {}).items()]
        others = [declared.get(key) for key in ("sep_token", "cls_token", "mask_token")]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            listed = declared.get(key) or []
            if not isinstance(listed, list | dict):
                raise PunaError(f"{key} is {listed!r:.80}: expected a list of tokens")
            others += listed.values() if isinstance(listed, dict) else listed
        return Companions(
            added=added,
            roles={role: _content(declared[role]) for role in ROLES if declared.get(role)},
            specials=[_content(token) for token in others if token],
            chat_template=template,
            prefix=prefix_of(main, config),
            add_bos=add_bos,
        )


def _content(token: object) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise PunaError(f"a special token is {token!r:.80}: expected its text, or an object with its content")
    return content
