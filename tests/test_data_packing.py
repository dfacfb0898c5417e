"""Rows hold every example once and apart, and a batch is a pure function of seed and step."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizer import small_tokenizer

from model.cudnn import segment_lengths
from model.errors import PunaError
from model.tokenizer import load_tokenizer
from train.data import IGNORE_INDEX, DataConfig, Datasets, DataSource, Sampler, encode, in_order, load_dataset
from train.data.packing import best_fit_decreasing, select, split_spans, wrapped
from train.data.permute import mix_key, permute
from train.data.sampler import PERIOD

lengths = st.lists(st.integers(2, 60), min_size=1, max_size=40)


def offsets_of(sizes):
    return np.concatenate([[0], np.cumsum(sizes)])


# --- rows


@given(lengths, st.integers(2, 20))
def test_splitting_makes_every_token_but_the_first_a_target_once(sizes, max_length):
    start, length = split_spans(offsets_of(sizes)[:-1], np.array(sizes), max_length)
    assert length.max() <= max_length and length.min() >= 2
    targets = np.concatenate([np.arange(s + 1, s + n) for s, n in zip(start, length, strict=True)])
    first = set(offsets_of(sizes)[:-1].tolist())
    assert targets.tolist() == [token for token in range(sum(sizes)) if token not in first]


@given(lengths, st.integers(2, 70))
def test_best_fit_places_every_span_once_and_overfills_nothing(sizes, max_length):
    start, length = split_spans(offsets_of(sizes)[:-1], np.array(sizes), max_length)
    rows = best_fit_decreasing(start, length, max_length)
    assert sorted(zip(rows.start, rows.length, strict=True)) == sorted(zip(start, length, strict=True))
    filled = np.add.reduceat(rows.length, rows.offsets[:-1])
    assert filled.max() <= max_length
    # no row could have taken in the whole of another
    assert len(filled) < 2 or np.sort(filled)[:2].sum() > max_length


@given(lengths, st.integers(2, 30))
def test_best_fit_equals_its_definition(sizes, max_length):
    sizes = [min(size, max_length) for size in sizes]
    rows = best_fit_decreasing(offsets_of(sizes)[:-1], np.array(sizes), max_length)
    room: list[int] = []  # the definition: longest first, each into the row that it leaves least room in
    for size in sorted(sizes, reverse=True):
        fitting = [number for number in range(len(room)) if room[number] >= size]
        if fitting:
            room[min(fitting, key=lambda number: room[number])] -= size
        else:
            room.append(max_length - size)
    assert sorted(max_length - np.add.reduceat(rows.length, rows.offsets[:-1])) == sorted(room)


def test_wrapping_cuts_the_stream_and_leaves_out_the_rest():
    rows = wrapped(np.array([0, 9]), np.array([9, 14]), 5)
    assert rows.start.tolist() == [0, 5, 10, 15] and set(rows.length.tolist()) == {5} and rows.joined


@given(lengths, st.integers(2, 70), st.data())
def test_wrapping_some_examples_is_wrapping_a_stream_of_them_alone(sizes, max_length, data):
    chosen = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1))))
    offsets = offsets_of(sizes)
    rows = wrapped(offsets[chosen].astype(np.int64), np.diff(offsets)[chosen], max_length)
    stream = [token for example in chosen for token in range(offsets[example], offsets[example + 1])]
    found = [t for s, n in zip(rows.start, rows.length, strict=True) for t in range(s, s + n)]
    assert found == stream[: len(stream) // max_length * max_length]
    assert len(rows) == len(stream) // max_length
    assert all(rows.length[rows.offsets[r] : rows.offsets[r + 1]].sum() == max_length for r in range(len(rows)))


@given(lengths, st.data())
def test_selecting_rows_keeps_their_spans(sizes, data):
    rows = best_fit_decreasing(offsets_of(sizes)[:-1], np.array(sizes), 60)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=5))

    def spans(of, row):
        part = slice(of.offsets[row], of.offsets[row + 1])
        return of.start[part].tolist(), of.length[part].tolist()

    taken = select(rows, np.array(chosen, np.int64))
    assert [spans(taken, number) for number in range(len(taken))] == [spans(rows, row) for row in chosen]


# --- the shuffle


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_the_shuffle_is_a_permutation(size, seed):
    assert sorted(permute(np.arange(size), size, mix_key(seed))) == list(range(size))


def test_the_shuffle_depends_on_its_key_and_on_nothing_else():
    size = 10**9
    some = np.arange(0, size, size // 100)
    found = permute(some, size, mix_key(1, 2))
    assert found.tolist() == [int(permute(index, size, mix_key(1, 2))[0]) for index in some]
    assert len(set(found.tolist()) & set(permute(some, size, mix_key(1, 3)).tolist())) == 0
    assert 0.4 < np.mean(found / size) < 0.6


# --- data sets


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(small_tokenizer(tmp_path_factory.mktemp("tokenizer")))


RECORDS = [
    {"instruction": f"Name {n} llamas." * (1 + n % 3), "output": ", ".join(["llama"] * (1 + n % 7))} for n in range(50)
]
TEXTS = [{"text": "The puna is high and cold. " * (1 + 5 * (n % 4))} for n in range(20)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def config(tmp_path):
    def config(records=RECORDS, name="a.jsonl", **settings):
        path = settings.pop("path", None) or write(tmp_path / name, records)
        return DataConfig(path=path, cache_dir=str(tmp_path / "cache"), **{"max_length": 128, **settings})

    return config


def segments_of(batch):
    """(tokens, labels) of each segment of a batch, padding left out."""
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            inside = batch["segments"][row] == segment
            yield tuple(batch[name][row][inside].tolist() for name in ("tokens", "labels"))


@pytest.mark.parametrize("packing", [False, True])
def test_batches_hold_what_encode_gives(tokenizer, config, packing):
    dataset = load_dataset(config(packing=packing), tokenizer).train[0]
    found = [segment for batch in in_order(dataset, 4) for segment in segments_of(batch)]
    expected = []
    for record in RECORDS:
        ids, labels = encode(record, tokenizer, max_length=128)
        expected.append((ids, [*labels[1:], IGNORE_INDEX]))
    assert sorted(found) == sorted(expected)
    assert (len(dataset) < len(RECORDS)) == packing
    assert dataset.counts.records == len(RECORDS) and dataset.counts.rows == len(dataset)
    assert dataset.counts.tokens == sum(len(ids) for ids, _ in found)


@pytest.mark.parametrize("packing", [False, True])
def test_segment_lengths_are_those_that_rows_were_packed_with(tokenizer, config, packing):
    datasets = load_dataset(config(packing=packing), tokenizer)
    rows, most = datasets.train[0].rows, datasets.row_segments
    assert (most == 1) != packing
    lengths, begins = segment_lengths(datasets.train[0].batch(range(len(rows)))["segments"], most + 1)
    for row in range(len(rows)):
        packed = rows.length[rows.offsets[row] : rows.offsets[row + 1]].tolist()
        rest = [128 - sum(packed)] if sum(packed) < 128 else []
        filled = [*packed, *rest] + [-1] * (most + 1 - len(packed) - len(rest))
        assert lengths[row].tolist() == filled
        assert begins[row].tolist() == [sum(filled[:i]) if n >= 0 else -1 for i, n in enumerate(filled)] + [-1]


def test_padding_is_segment_0_with_no_target(tokenizer, config):
    dataset = load_dataset(config(), tokenizer).train[0]
    *_, last = in_order(dataset, 7)
    padding = last["segments"] == 0
    assert (last["labels"][padding] == IGNORE_INDEX).all()
    assert (last["rows"] == -1).sum() == 7 - len(dataset) % 7 and padding[last["rows"] == -1].all()
    assert all(values.dtype == np.int32 for values in last.values())


def test_long_texts_are_split_and_all_of_them_trained_on(tokenizer, config):
    dataset = load_dataset(config(TEXTS, max_length=32, packing=True), tokenizer).train[0]
    lengths = [len(encode(record, tokenizer, max_length=None)[0]) for record in TEXTS]
    targets = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in in_order(dataset, 4))
    assert targets == sum(lengths) - len(TEXTS)
    assert dataset.counts.split == sum(length > 32 for length in lengths) > 0
    assert dataset.counts.cut == 0


@pytest.mark.parametrize("on_overlong", ["truncate", "drop"])
def test_conversations_longer_than_a_row_are_cut_or_dropped_and_counted(tokenizer, config, tmp_path, on_overlong):
    dataset = load_dataset(config(max_length=45, on_overlong=on_overlong), tokenizer).train[0]
    counts, whole = dataset.counts, [encode(record, tokenizer, max_length=None) for record in RECORDS]
    longer = [number for number, (ids, _) in enumerate(whole) if len(ids) > 45]
    is_cut = {
        number for number in longer if on_overlong == "truncate" and set(whole[number][1][1:45]) != {IGNORE_INDEX}
    }
    dropped = [f"{tmp_path}/a.jsonl:{number + 1}" for number in longer if number not in is_cut]
    assert 5 < len(dropped) < len(RECORDS) and (counts.overlong, counts.overlong_at) == (len(dropped), (*dropped[:5],))
    assert (counts.cut, counts.cut_tokens) == (len(is_cut), sum(len(whole[number][0]) - 45 for number in is_cut))
    assert f"{len(dropped)} longer than max_length dropped ({', '.join(dropped[:5])}, ...)" in str(counts)
    assert f"{counts.cut} cut ({counts.cut_tokens} tokens lost)" in str(counts)
    kept = [ids[:45] for number, (ids, _) in enumerate(whole) if number not in longer or number in is_cut]
    assert [dataset.example(number)[0].tolist() for number in range(len(dataset))] == kept


@pytest.mark.parametrize("on_overlong", ["truncate", "drop"])
def test_one_prompt_that_fills_a_row_costs_that_record_only(tokenizer, config, tmp_path, on_overlong):
    records = [RECORDS[0], {"instruction": "llama " * 500, "output": "x"}, RECORDS[1]]
    dataset = load_dataset(config(records, on_overlong=on_overlong), tokenizer).train[0]
    assert len(dataset) == 2 and dataset.counts.overlong_at == (f"{tmp_path}/a.jsonl:2",)
    with pytest.raises(PunaError, match=r"gives no row: 0 tokens for data.max_length 128, and 1 records are longer"):
        load_dataset(config(records[1:2], on_overlong=on_overlong), tokenizer)


def test_longer_records_are_refused_by_line_where_that_is_asked(tokenizer, config, tmp_path):
    lengths = [len(encode(record, tokenizer, max_length=None)[0]) for record in RECORDS]
    with pytest.raises(PunaError) as raised:
        load_dataset(config(max_length=60, on_overlong="error"), tokenizer)
    first = next(number for number, length in enumerate(lengths) if length > 60)
    assert str(raised.value).startswith(
        f"{tmp_path}/a.jsonl:{first + 1}: has {lengths[first]} tokens, above data.max_length 60: raise that, or set "
        'data.on_overlong = "drop" or "truncate"\n'
    )
    assert load_dataset(config(on_overlong="error"), tokenizer).train[0].counts.records == len(RECORDS)
    assert load_dataset(config(TEXTS, max_length=32, on_overlong="error"), tokenizer).train[0].counts.split
    wrapped_rows = {"packing": True, "packing_strategy": "wrapped"}
    assert (
        not load_dataset(config(max_length=32, on_overlong="error", **wrapped_rows), tokenizer).train[0].counts.overlong
    )


def test_wrapped_rows_are_concatenate_and_chunk(tokenizer, config):
    """C3: transformers' group_texts, written out."""
    dataset = load_dataset(config(TEXTS, max_length=32, packing=True, packing_strategy="wrapped"), tokenizer).train[0]
    stream = [id for record in TEXTS for id in encode(record, tokenizer, max_length=None)[0]]
    chunks = [stream[start : start + 32] for start in range(0, len(stream) // 32 * 32, 32)]
    batch = dataset.batch(range(len(dataset)))
    assert batch["tokens"].tolist() == chunks
    assert batch["labels"].tolist() == [[*chunk[1:], IGNORE_INDEX] for chunk in chunks]
    assert (batch["segments"] == 1).all()
    assert dataset.counts.left_over_tokens == len(stream) % 32


def test_rows_name_the_lines_they_came_from(tokenizer, config, tmp_path):
    sampler = Sampler(load_dataset(config(packing=True), tokenizer), 4)
    batch = sampler.batch(3)
    for number in range(4):
        tokens = [segment[0] for segment in segments_of({name: batch[name][number : number + 1] for name in batch})]
        lines = [int(place.removeprefix(f"{tmp_path}/a.jsonl:")) for place in sampler.where(batch["rows"][number])]
        assert sorted(tokens) == sorted(encode(RECORDS[line - 1], tokenizer, max_length=128)[0] for line in lines)


PACKINGS = [{}, {"packing": True}, {"packing": True, "packing_strategy": "wrapped"}]


@pytest.mark.parametrize("packing", PACKINGS, ids=["padded", "bfd", "wrapped"])
@pytest.mark.parametrize("records", [RECORDS, TEXTS], ids=["records", "texts"])
def test_a_validation_split_is_of_whole_documents_each_part_packed_by_itself(tokenizer, config, packing, records):
    """Each part is, row by row, what a file of its documents alone would give."""
    settings = {"max_length": 32 if records is TEXTS else 128, **packing}
    found = load_dataset(config(records, validation_split=0.12, **settings), tokenizer)
    unpacked = load_dataset(config(records, validation_split=0.12), tokenizer)  # of which no document is left over
    lines = []
    for dataset, every in zip(
        (found.train[0], found.evaluation), (unpacked.train[0], unpacked.evaluation), strict=True
    ):
        assert dataset is not None and every is not None
        places = {place for row in range(len(every)) for place in every.where(row)}
        assert {place for row in range(len(dataset)) for place in dataset.where(row)} <= places
        lines.append(sorted(int(place.rpartition(":")[2]) for place in places))
        own = [records[line - 1] for line in lines[-1]]
        alone = load_dataset(config(own, "b.jsonl", **settings), tokenizer).train[0]
        for name, values in alone.batch(range(len(alone))).items():
            assert np.array_equal(dataset.batch(range(len(dataset)))[name], values), name
        for name in ("tokens", "trained_tokens", "left_over_tokens", "split", "rows", "max_length"):
            assert getattr(dataset.counts, name) == getattr(alone.counts, name), name
    assert not set(lines[0]) & set(lines[1]) and len(lines[1]) == found.train[0].counts.held_out
    assert found.train[0].counts.held_out == -(-len(records) * 12 // 100)
    assert f"{found.train[0].counts.held_out} held out" in str(found.train[0].counts)


def test_a_validation_split_that_leaves_a_part_without_rows_is_refused(tokenizer, config):
    with pytest.raises(PunaError, match="split 0.99 leaves 0 of 50 documents to train on, which make no row"):
        load_dataset(config(validation_split=0.99), tokenizer)
    one = {"packing": True, "packing_strategy": "wrapped", "max_length": 512}
    with pytest.raises(PunaError, match="split 0.01 leaves 1 of 20 documents to evaluate, which make no row"):
        load_dataset(config(TEXTS, validation_split=0.01, **one), tokenizer)


def test_an_eval_path_is_read_with_the_same_settings(tokenizer, config, tmp_path):
    held_out = write(tmp_path / "eval.jsonl", RECORDS[:5])
    found = load_dataset(config(eval_path=held_out), tokenizer)
    assert found.evaluation is not None and len(found.evaluation) == 5 and len(found.train[0]) == 50


def test_an_eval_path_that_is_not_there_is_named(tokenizer, config, tmp_path):
    with pytest.raises(PunaError, match="data.eval_path '/nowhere' does not exist"):
        load_dataset(config(eval_path="/nowhere"), tokenizer)


def test_an_eval_path_that_is_trained_on_is_refused(tokenizer, config, tmp_path):
    for name in ("train", "test"):
        (tmp_path / "clone").mkdir(exist_ok=True)
        write(tmp_path / f"clone/{name}.jsonl", RECORDS[:5])
    clone = str(tmp_path / "clone")
    for path in (clone, f"{clone}:train+test", f"{clone}/train.jsonl", f"{clone}/../clone"):
        with pytest.raises(PunaError, match=r"is trained on too .*train.jsonl.: name other data or another split, as"):
            load_dataset(config(path=clone, eval_path=path), tokenizer)
    found = load_dataset(config(path=clone, eval_path=f"{clone}:test"), tokenizer)
    assert found.evaluation is not None and found.evaluation.where(0) == [f"{clone}/test.jsonl:1"]


# --- the sampler


@pytest.fixture
def datasets(tokenizer, config):
    return load_dataset(config(packing=True), tokenizer)


def test_the_global_batch_is_the_same_however_it_is_divided(datasets):
    whole = Sampler(datasets, 8, seed=3)
    for step in (0, 1, 17, 10**6, whole.steps(1) - 1):
        batch = whole.batch(step)
        for processes in (1, 2, 4, 8):
            share = 8 // processes
            parts = [Sampler(datasets, 8, seed=3).batch(step, p * share, (p + 1) * share) for p in range(processes)]
            for name, values in batch.items():
                assert np.array_equal(np.concatenate([part[name] for part in parts]), values)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7, 8, 1000])
def test_each_epoch_holds_every_row_once_in_its_own_order(datasets, batch_size):
    sampler = Sampler(datasets, batch_size)
    size, steps = sampler.num_rows, sampler.steps(1)
    assert steps == -(-size // batch_size) and sampler.steps(0.5) == -(-steps // 2) and sampler.steps(3) == 3 * steps
    epochs = [np.concatenate([sampler.rows(epoch * steps + step) for step in range(steps)]) for epoch in range(5)]
    assert all(sorted(epoch.tolist()) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5
    assert [sampler.epoch(number) for number in (0, steps, 5 * steps)] == [0.0, 1.0, 5.0]
    assert steps == 1 or sampler.epoch(steps + 1) == 1 + batch_size / size
    other = np.concatenate([Sampler(datasets, batch_size, seed=1).rows(step) for step in range(steps)])
    assert not np.array_equal(epochs[0], other)
    rows = np.concatenate([sampler.batch(step)["rows"] for step in range(steps)])
    assert np.array_equal(rows[:size], epochs[0]) and (rows[size:] == -1).all() and len(rows) == steps * batch_size


def test_the_last_batch_of_an_epoch_is_filled_up_with_rows_that_do_not_count(datasets):
    sampler = Sampler(datasets, 7)
    assert 0 < (left := sampler.num_rows % 7) < 7
    batch, rows = sampler.batch(sampler.steps(1) - 1), sampler.rows(sampler.steps(1) - 1)
    assert len(rows) == left and set(batch["rows"][left:].tolist()) == {-1}
    assert set(batch["labels"][left:].flat) == {IGNORE_INDEX} and set(batch["segments"][left:].flat) == {0}
    for name, values in datasets.train[0].batch(rows).items():
        assert np.array_equal(batch[name][:left], values)


@pytest.fixture
def mixture(tokenizer, config, tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", RECORDS[:n]) for name, n in (("a", 40), ("b", 7))]
    return load_dataset(config(path=(DataSource(paths[0], weight=3), DataSource(paths[1], weight=1))), tokenizer)


def test_a_mixture_keeps_its_weights_and_goes_through_each_source(mixture):
    sampler = Sampler(mixture, 64)
    rows = np.concatenate([sampler.rows(step) for step in range(4 * PERIOD // 64)])
    second = rows >= 40
    for block in second.reshape(4, PERIOD):
        assert block.sum() == PERIOD // 4
    for drawn, size in ((rows[~second], 40), (rows[second] - 40, 7)):
        whole = drawn[: len(drawn) // size * size].reshape(-1, size)
        assert all(sorted(epoch) == list(range(size)) for epoch in whole.tolist())
    assert sampler.where(int(rows[second][0]))[0].split(":")[0].endswith("b.jsonl")


def test_a_batch_of_a_mixture_is_its_rows(mixture):
    sampler = Sampler(mixture, 16, seed=5)
    for step in (0, 100):
        batch = sampler.batch(step)
        for number, row in enumerate(batch["rows"].tolist()):
            own = mixture.train[row >= 40].batch([row - 40 * (row >= 40)])
            assert all(np.array_equal(values[0], batch[name][number]) for name, values in own.items())


def test_sources_without_weights_are_one_data_set(tokenizer, config, tmp_path):
    paths = tuple(write(tmp_path / f"{name}.jsonl", RECORDS[:n]) for name, n in (("a", 40), ("b", 7)))
    sampler = Sampler(load_dataset(config(path=paths), tokenizer), 47)
    assert sorted(sampler.rows(0)) == sorted(sampler.rows(1)) == list(range(47))


def test_a_weight_too_small_to_be_drawn_is_refused(mixture):
    with pytest.raises(PunaError, match="raise it"):
        Sampler(Datasets(mixture.train, (1.0, 1e-9)), 4)
