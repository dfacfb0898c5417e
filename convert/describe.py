"""What a model folder holds, as lines for a person or a script."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields

from cli.files import sha256_of
from cli.progress import progress
from convert.checkpoint import Checkpoint
from model.params import param_count
from model.quantize import QuantizedArray


def describe(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Pairs of a key and its value: format, config, counts, sizes, then one pair per file with its bytes and hash."""
    config = checkpoint.config
    yield "format", checkpoint.format
    for field in fields(config):
        if field.name != "pieces" or config.pieces:
            yield field.name, str(getattr(config, field.name))
    yield "parameters", f"{param_count(config):,}"
    yield "bytes", f"{checkpoint.nbytes:,}"
    quantized = checkpoint.quantized
    counts = Counter(
        _kind(quantized[name].like) if name in quantized else tensor.dtype.name
        for name, tensor in checkpoint.tensors.items()
    )
    yield "dtypes", ", ".join(f"{name} ({count} tensors)" for name, count in counts.most_common())
    whole = checkpoint.parts or ((checkpoint.file,) if checkpoint.file else ())
    files = whole or sorted(x for x in checkpoint.folder.rglob("*") if x.is_file())
    with progress("hashing", sum(path.stat().st_size for path in files)) as advance:
        for path in files:
            digest, size = sha256_of(path), path.stat().st_size
            advance(size)
            yield str(path.relative_to(checkpoint.folder)), f"{size:,} sha256 {digest}"


def _kind(like: QuantizedArray) -> str:
    """As "nf4 in blocks of 64, double"."""
    blocks = "" if like.format == "int8" else f" in blocks of {like.block}"
    return f"{like.format}{blocks}{', double' if like.nested_absmax is not None else ''}"
