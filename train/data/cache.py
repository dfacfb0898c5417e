"""Tokenized data sets, written once under a name made of everything that they depend on.

Whichever process comes first writes; the others watch the file system (no collective is held up by it). A folder is
complete when it has its name.
"""

import fcntl
import hashlib
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cli.files import atomic_path, sha256_of
from model.errors import PunaError
from model.tokenizer import Tokenizer
from train.data.config import DataConfig, DataSource
from train.data.encode import Encoder, encoder
from train.data.packing import PackedRows, best_fit_decreasing, in_pairs, padded, split_spans, wrapped
from train.data.readers import Faults, SourceRecord, load_hub, read_rows, source_files
from train.data.tokenize import Chunk, Limit, tokenize

POLL_SECONDS = 0.2
NAMED_OVERLONG = 5
# The code that makes tokens and rows of records: what another version of it wrote is not taken for this one's.
CODE = (
    *("model.chat", "model.chat_jinja", "model.chat_sources", "model.json_file", "model.tokenizer"),
    *("model.tokenizer_sources", "model.vocabulary"),
    *("train.data.cache", "train.data.encode", "train.data.formats", "train.data.messages", "train.data.packing"),
    *("train.data.preference", "train.data.readers", "train.data.splits", "train.data.tokenize"),
)


@dataclass(frozen=True)
class Counts:
    """What became of the records of one source.

    Attributes:
        records: how many were read.
        empty: blank texts, left out.
        overlong: examples left out because they do not fit a row.
        overlong_at: `path:line` of the first ones.
        cut: examples that were longer than a row and lost their end.
        cut_tokens: tokens lost by it.
        held_out: documents set apart for evaluation.
        split: examples that are longer than a row and were not cut.
        tokens: kept, in rows or not.
        trained_tokens: those of them on which loss is taken.
        left_over_tokens: those of them in no row: the last incomplete one of "wrapped".
        rows: how many there are.
        max_length: tokens in a row.
    """

    records: int = 0
    empty: int = 0
    overlong: int = 0
    overlong_at: tuple[str, ...] = ()
    cut: int = 0
    cut_tokens: int = 0
    held_out: int = 0
    split: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    left_over_tokens: int = 0
    rows: int = 0
    max_length: int = 0

    @property
    def masked_tokens(self) -> int:
        """Tokens kept on which no loss is taken."""
        return self.tokens - self.trained_tokens

    def __str__(self) -> str:
        fill = self.tokens / (self.rows * self.max_length) if self.rows else 0.0
        more = ", ..." if self.overlong > len(self.overlong_at) else ""
        places = f" ({', '.join(self.overlong_at)}{more})" if self.overlong else ""
        said = [
            f"{self.records:,} records read",
            f"{self.empty:,} empty ones dropped",
            f"{self.overlong:,} longer than max_length dropped{places}",
            *([f"{self.held_out:,} held out"] if self.held_out else []),
            f"{self.cut:,} cut ({self.cut_tokens:,} tokens lost)",
            f"{self.split:,} split",
            f"{self.tokens:,} tokens, {self.trained_tokens:,} trained and {self.masked_tokens:,} masked",
            f"{self.rows:,} rows of {self.max_length}, {fill:.1%} full",
            f"{self.left_over_tokens:,} tokens left over",
        ]
        return "; ".join(said)


# --- names


def cache_name(config: DataConfig, source: DataSource, tokenizer: Tokenizer) -> str:
    """The name of a source as tokenized: a hash of everything that its rows depend on.

    That is its content, the tokenizer's, every setting that matters, and the code that makes tokens of records (so that
    no old mask outlives a change to it).

    Args:
        config: the settings of rows.
        source: as `train.data.config.complete` makes it.
        tokenizer: whose tokens the rows hold.

    Raises:
        PunaError: there is no such source.
    """
    files = source_files(source.path)
    content = [(str(file), sha256_of(file)) for file in files] or [(source.path, load_hub(source.path)._fingerprint)]
    settings = [source.format, source.template, source.response_template, sorted((source.columns or {}).items())]
    rows = [config.max_length, config.on_overlong, config.packing, config.packing_strategy]
    jinja = tokenizer.chat_template if source.template in ("auto", "chat_template") else None
    if source.template and source.template.endswith(".jinja"):
        jinja = Path(source.template).read_text(encoding="utf-8")
    code = [sha256_of(Path(str(sys.modules[name].__file__))) for name in CODE]
    described = [code, content, tokenizer_hash(tokenizer), settings, rows, jinja]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 over the names and contents of the tokenizer's files."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        hashes = {file.name: sha256_of(file) for file in sorted(Path(folder).iterdir())}
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


# --- one writer, any number of readers


def write_once(folder: Path, write: Callable[[Path], None], wait_seconds: float) -> None:
    """Return when a folder is there: written by this process, or by another that is at it already.

    The lock is the operating system's, so a writer that dies frees it and another takes over.

    Args:
        folder: what is to be there; it appears whole.
        write: fills the empty folder that it is given.
        wait_seconds: how long another writer may add nothing.

    Raises:
        PunaError: another process has held the lock for so long and has written nothing.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    deadline, before = time.monotonic() + wait_seconds, 0
    lock = folder.parent / f"{folder.name}.lock"
    while not folder.exists():
        with lock.open("wb") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if (size := _begun(folder)) != before:
                    deadline, before = time.monotonic() + wait_seconds, size
                if time.monotonic() > deadline:
                    raise PunaError(
                        f"waited {wait_seconds:.0f} s for {folder}, which another process is still writing though it "
                        f"does not grow (it holds {lock}): let it finish and start again, or give another "
                        "data.cache_dir"
                    ) from None
                time.sleep(POLL_SECONDS)
                continue
            if not folder.exists():
                for abandoned in folder.parent.glob(f".{folder.name}.tmp-*"):  # by a writer that was killed
                    shutil.rmtree(abandoned)
                with atomic_path(folder) as temporary:
                    temporary.mkdir()
                    write(temporary)


def _begun(folder: Path) -> int:
    """Bytes in what is to become `folder`."""
    with suppress(FileNotFoundError):  # it was renamed just now
        return sum(
            file.stat().st_size for part in folder.parent.glob(f".{folder.name}.tmp-*") for file in part.iterdir()
        )
    return 0


def tokenize_into(
    folder: Path, config: DataConfig, source: DataSource, tokenizer: Tokenizer, alive: Callable[[], None] = lambda: None
) -> None:
    """Read, tokenize and pack a source.

    tokens.bin (uint16, or uint32 where the vocabulary needs it) and trained.bin (bool) hold the examples end to end;
    index.npz where each begins and came from, and the rows; meta.json the rest, with a digest of these three.

    Args:
        folder: where these files are written.
        config: the settings of rows.
        source: as `train.data.config.complete` makes it.
        tokenizer: whose tokens to make.
        alive: called again and again meanwhile.

    Raises:
        PunaError: naming the faults of the data as `path:line: reason`, or it gives no row.
    """
    faults = Faults()
    encode, rows = _first_read(source, tokenizer, faults)
    fits_any = encode.splits or (config.packing and config.packing_strategy == "wrapped")
    limit = None if fits_any else Limit(config.max_length, config.on_overlong)
    chunks = tokenize(rows, encode, limit, faults)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    with _progress(source.path, alive) as advance:
        paths, origins, offsets, chosen, counts = _write_examples(folder, chunks, dtype, advance)
    faults.check()
    packed = pack(offsets[:-1], np.diff(offsets), config, chosen if encode.pair else None)
    if not len(packed):
        left_out = f", and {counts.overlong:,} records are longer: raise it" if counts.overlong else ""
        raise PunaError(
            f"{source.path} gives no row: {counts.tokens:,} tokens for data.max_length {config.max_length}{left_out}"
        )
    counts = packed_counts(counts, np.diff(offsets), counts.trained_tokens, packed, config)
    np.savez(
        folder / "index.npz",
        offsets=offsets,
        origins=origins,
        chosen=chosen,
        row_offsets=packed.offsets,
        start=packed.start,
        length=packed.length,
        joined=packed.joined,
    )
    meta = {"dtype": dtype.name, "paths": paths, "counts": asdict(counts), "template": encode.template}
    written = (folder / "tokens.bin", folder / "trained.bin", folder / "index.npz")
    meta["digest"] = hashlib.sha256("".join(map(sha256_of, written)).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _first_read(source: DataSource, tokenizer: Tokenizer, faults: Faults) -> tuple[Encoder, Iterator[SourceRecord]]:
    """The encoder that the first record of `source` calls for, and all its records."""
    rows = read_rows(source.path, faults)
    first = next(rows, None)
    if first is None:
        faults.check()
        raise PunaError(f"{source.path} holds no records")
    options = source.template or "auto", source.format or "auto", source.columns, source.response_template or ""
    try:
        return encoder(first.record, tokenizer, *options), itertools.chain([first], rows)
    except PunaError as error:
        raise PunaError(f"{first.path}:{first.line}: {error}") from None


def _write_examples(
    folder: Path, chunks: Iterable[Chunk], dtype: np.dtype, advance: Callable[[int, int], None]
) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], Counts]:
    """Write the tokens of `chunks`. Returns the paths, (path number, line) and offset of each example, how many tokens
    of each preference are its chosen answer, and counts."""
    paths: dict[str, int] = {}
    origins, lengths = [np.empty((0, 2), np.int64)], [np.zeros(1, np.int64)]
    chosen: list[int] = []
    counts = Counts()
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "trained.bin").open("wb") as trained:
        for chunk in chunks:
            tokens.write(chunk.tokens.astype(dtype).tobytes())
            trained.write(chunk.trained.tobytes())
            lengths.append(np.array(chunk.lengths, np.int64))
            chosen += chunk.chosen
            numbers = [paths.setdefault(path, len(paths)) for path in chunk.paths]
            origins.append(np.array([numbers, chunk.lines], np.int64).T)
            counts = replace(
                counts,
                records=counts.records + chunk.records,
                empty=counts.empty + chunk.empty,
                overlong=counts.overlong + len(chunk.overlong),
                overlong_at=(*counts.overlong_at, *chunk.overlong)[:NAMED_OVERLONG],
                cut=counts.cut + chunk.cut,
                cut_tokens=counts.cut_tokens + chunk.cut_tokens,
                tokens=counts.tokens + len(chunk.tokens),
                trained_tokens=counts.trained_tokens + int(chunk.trained.sum()),
            )
            advance(counts.records, counts.tokens)
    offsets = np.cumsum(np.concatenate(lengths))
    return list(paths), np.concatenate(origins), offsets, np.array(chosen, np.int64), counts


def pack(
    start: NDArray[np.int64], length: NDArray[np.int64], config: DataConfig, chosen: NDArray[np.int64] | None = None
) -> PackedRows:
    """The rows that examples make.

    Args:
        start: [E], where each example begins.
        length: [E], its tokens.
        config: max_length, packing and packing_strategy.
        chosen: [E], of preferences, the tokens of the chosen answer; None for other examples.
    """
    if config.packing and config.packing_strategy == "wrapped":
        return wrapped(start, length, config.max_length)
    spans = split_spans(start, length, config.max_length)
    rows = best_fit_decreasing(*spans, config.max_length) if config.packing else padded(*spans)
    return rows if chosen is None else in_pairs(rows, start, chosen)


def packed_counts(
    counts: Counts, length: NDArray[np.int64], trained: int, rows: PackedRows, config: DataConfig
) -> Counts:
    """`counts` with those of some packed examples.

    Args:
        counts: what became of the records before.
        length: [E], the tokens of each example.
        trained: how many of all these tokens are trained on.
        rows: what `pack` made of them.
        config: as of `pack`.
    """
    tokens = int(length.sum())
    return replace(
        counts,
        split=int(np.sum(length > config.max_length)),
        tokens=tokens,
        trained_tokens=trained,
        left_over_tokens=tokens - int(rows.length.sum()) if rows.joined else 0,
        rows=len(rows),
        max_length=config.max_length,
    )


@contextmanager
def _progress(name: str, alive: Callable[[], None]) -> Iterator[Callable[[int, int], None]]:
    shown = TextColumn("tokenizing {task.description}: {task.completed:,} records, {task.fields[tokens]:,} tokens")
    with Progress(SpinnerColumn(), shown, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None, tokens=0)

        def advance(records: int, tokens: int) -> None:
            bar.update(task, completed=records, tokens=tokens)
            alive()

        yield advance
