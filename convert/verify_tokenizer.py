"""Whether two tokenizers are one and the same: every token, the special ones, hard texts, and conversations."""

from collections.abc import Iterator
from pathlib import Path

from convert.tokenizer_files import has_tokenizer
from model.chat import encode_prompt, get_template
from model.errors import PunaError
from model.tokenizer import Tokenizer, load_tokenizer

HARD_TEXTS = (
    "",
    " ",
    "Hello, world!",
    " a leading space",
    "a trailing space ",
    "two  three   many        spaces",
    "\n",
    "lines\nand\r\nlines\n\n\nwith gaps",
    "\ttabs\t\tand \t mixed",
    "don't you'LL we've I'd",
    "0 1 12 123 1234 12345 1,234.56 3.14e-10 ½ ٣٤",
    'def f(x: int) -> str:\n    return f"{x!r}"  # ok\n',
    "https://example.com/a_b?c=d&e=%20#f",
    "CamelCase snake_case SHOUTING",
    "naïve café Straße Ærø",
    "e\u0301 vs \u00e9, a\u0328\u0301",  # combining marks beside the composed letter
    "中文和日本語、한국어 mixed with English",
    "Русский Ελληνικά हिन्दी ไทย",
    "שלום עולם and مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇵🇪",
    "𓀀𓂀 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010fffd",  # rarely in a vocabulary: bytes
    "zero\u200bwidth no\u00a0break soft\u00adhyphen \ufeffmark",
    "▁ ▁▁ Ġ Ċ <0x0A> <0x41>",  # what tokenizers write for spaces and bytes
    "<s> </s> <unk> <pad> [PAD] [INST] hi [/INST] <<SYS>>",
    "<|begin_of_text|><|eot_id|><|start_header_id|>user<|end_header_id|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...---===***###@@@",
    "\x00\x01\x7f",
)
CONVERSATION = (
    {"role": "user", "content": "What is 2 + 2?\n"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "  Are you sure? </s><|eot_id|>"},
)


def compare_tokenizers(first: Path, second: Path) -> bool:
    """Print how the tokenizers in two model folders differ; False where they do.

    A tokenizer in one folder alone is said, and is no difference.
    """
    there = [has_tokenizer(folder) for folder in (first, second)]
    if not all(there):
        if any(there):
            print(f"tokenizer: only in {first if there[0] else second}, not compared")
        return True
    differences = list(_differences(load_tokenizer(first), load_tokenizer(second)))
    for line in differences:
        print(line)
    print(f"tokenizers compared: {len(differences)} differences")
    return not differences


def _differences(a: Tokenizer, b: Tokenizer) -> Iterator[str]:
    if a.vocab_size != b.vocab_size:
        yield f"tokenizer vocab_size: {a.vocab_size} and {b.vocab_size}"
    for name in ("bos_id", "eos_id", "unk_id", "pad_id", "adds_bos"):
        if (one := getattr(a, name)) != (other := getattr(b, name)):
            yield f"tokenizer {name}: {one} and {other}"
    specials = dict(a.special_tokens), dict(b.special_tokens)
    if names := sorted(name for name in specials[0] | specials[1] if specials[0].get(name) != specials[1].get(name)):
        said = ", ".join(f"{name} {specials[0].get(name)} and {specials[1].get(name)}" for name in names[:4])
        yield f"tokenizer special tokens: {len(names)} differ ({said})"
    ids = [id for id in range(min(a.vocab_size, b.vocab_size)) if a.token_bytes(id) != b.token_bytes(id)]
    if ids:
        yield f"tokenizer tokens: {len(ids)} differ (id {ids[0]}: {a.token_bytes(ids[0])} and {b.token_bytes(ids[0])})"
    for text in dict.fromkeys((*HARD_TEXTS, *specials[0], *specials[1])):
        if (one := a.encode(text)) != (other := b.encode(text)):
            yield f"tokenizer ids of {text!r}: {_short(one)} and {_short(other)}"
    yield from _single_tokens(a, b)
    if a.chat_template != b.chat_template:
        said = ("none" if text is None else f"{len(text)} characters" for text in (a.chat_template, b.chat_template))
        yield f"chat template: {' and '.join(said)}, not the same"
    if None not in (a.chat_template, b.chat_template) and (one := _rendered(a)) != (other := _rendered(b)):
        yield f"ids of a conversation by the chat template: {_short(one)} and {_short(other)}"


def _single_tokens(a: Tokenizer, b: Tokenizer) -> Iterator[str]:
    """Texts of one token: a merge that is missing shows in what its token's text becomes, and perhaps nowhere else."""
    different = []
    for id in range(min(a.vocab_size, b.vocab_size)):
        try:
            text = a.token_bytes(id).decode()
        except UnicodeDecodeError:  # a part of a character
            continue
        if (one := a.encode(text)) != (other := b.encode(text)):
            different.append(f"id {id}, {text!r}: {_short(one)} and {_short(other)}")
    if different:
        yield f"tokenizer ids of the texts of single tokens: {len(different)} differ ({different[0]})"


def _rendered(tokenizer: Tokenizer) -> list[int] | str:
    """The ids of a conversation, or why the template refuses it."""
    try:
        return encode_prompt(CONVERSATION, get_template("chat_template", tokenizer), tokenizer)
    except PunaError as error:
        return str(error)


def _short(ids: list[int] | str, most: int = 12) -> str:
    return str(ids) if len(ids) <= most or isinstance(ids, str) else f"{ids[:most]}..."
