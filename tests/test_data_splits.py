"""One split of a folder is read, the one that the datasets library reads; what it left there for itself never is."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from model.errors import PunaError
from train.data.readers import Faults, read_rows

datasets.disable_progress_bars()


def texts(path):
    faults = Faults()
    found = [row.record["text"] for row in read_rows(str(path), faults)]
    faults.check()
    return found


def write(folder, *names):
    """A file of each name whose only record is that name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [name]}), path)
        else:
            path.write_text(json.dumps({"text": name}) + "\n")


def card(folder, text):
    (folder / "README.md").write_text(f"---\n{text}\n---\n# A data set\n")


LAYOUTS = {
    "shards": tuple(f"data/{part}-of-00002.parquet" for part in ("train-00000", "train-00001", "a-00000")),
    "shards of other names": ("data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"),
    "shards win": ("data/train-00000-of-00001.jsonl", "train.jsonl", "test/a.jsonl"),
    "shards elsewhere": ("parquet/train-00000-of-00001.jsonl", "parquet/dev-00000-of-00001.jsonl"),
    "folders": ("train/a.jsonl", "train/deep/b.jsonl", "val/c.jsonl", "other/d.jsonl"),
    "folders win": ("my-training/a.jsonl", "test.jsonl"),
    "no data": ("a.json", "config.json"),
    "files": ("train.jsonl", "valid.jsonl", "test.jsonl", "more.jsonl"),
    "files of one kind": ("alpaca_train.json", "alpaca_eval.json"),
    "words within": ("a-train-b.jsonl", "training2.jsonl", "a test.jsonl", "constraint.jsonl"),
    "no words": ("trained.jsonl", "latest.jsonl", "deep/pretrain.jsonl"),
    "in capitals": ("TRAIN.jsonl", "Test.jsonl"),
    "two at once": ("train-dev.jsonl", "test.jsonl"),
    "hidden": ("train.jsonl", ".train.jsonl", ".cache/train.jsonl", "__pycache__/train.jsonl"),
    "test only": ("test.jsonl",),
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_split_is_the_one_that_the_datasets_library_reads(tmp_path, names):
    folder = tmp_path / "clone"
    write(folder, *names)
    theirs = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    for split in theirs:
        assert sorted(texts(f"{folder}:{split}")) == sorted(theirs[split]["text"])
    if "train" in theirs:
        assert sorted(texts(folder)) == sorted(theirs["train"]["text"])
    else:
        with pytest.raises(PunaError, match=f"{folder} has no split 'train', it has {', '.join(theirs)}: name one"):
            texts(folder)


CARDS = {
    "a list": "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [a.jsonl, b*]\n"
    "  - split: test\n    path: 'deep/**'",
    "one pattern": "configs:\n- config_name: only\n  data_files: 'deep/*.jsonl'",
    "several patterns": "configs:\n- config_name: only\n  data_files: ['a.jsonl', 'deep/test.jsonl']",
    "a folder": "configs:\n- config_name: only\n  data_dir: deep",
    "a default": "configs:\n- config_name: x\n  data_files: a.jsonl\n"
    "- config_name: y\n  default: true\n  data_files: b.jsonl",
    "no files": "configs:\n- config_name: default\nlicense: mit",
    "nothing": "license: mit",
}


@pytest.mark.parametrize("text", CARDS.values(), ids=CARDS.keys())
def test_the_card_of_a_clone_says_where_its_splits_are(tmp_path, text):
    folder = tmp_path / "clone"
    write(folder, "a.jsonl", "b.jsonl", "deep/test.jsonl", "deep/train.jsonl")
    card(folder, text)
    theirs = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    for split in theirs:
        assert sorted(texts(f"{folder}:{split}")) == sorted(theirs[split]["text"])


@pytest.mark.parametrize(
    "text, said",
    [
        ("configs:\n- config_name: main\n- config_name: socratic", r"holds several data sets \(main, socratic\): name"),
        ("configs: [1]", "README.md: its configurations cannot be read"),
        ("configs: {", "README.md: its configurations cannot be read"),
        (
            "configs:\n- config_name: a\n  data_files: [{split: train, path: 3}]",
            "data_files of split 'train' cannot be",
        ),
        (
            "configs:\n- config_name: a\n  data_files: [{split: train, path: /etc/x}]",
            "data_files of split 'train' canno",
        ),
        ("configs:\n- config_name: a\n  data_files: none.jsonl", "holds no data files"),
    ],
)
def test_a_card_that_says_no_split_is_refused(tmp_path, text, said):
    write(tmp_path, "main/train.jsonl", "socratic/train.jsonl")
    card(tmp_path, text)
    with pytest.raises(PunaError, match=said):
        texts(tmp_path)
    assert texts(tmp_path / "main") == ["main/train.jsonl"]


def test_what_the_datasets_library_saved_and_left_is_told_apart(tmp_path):
    parts = {
        split: datasets.Dataset.from_list([{"text": f"{split} {n}"} for n in range(3)]) for split in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    again = datasets.load_from_disk(tmp_path / "saved")
    again.map(lambda row: {"text": f"left {row['text']}"})
    left = [file.name for file in tmp_path.rglob("cache-*.arrow")]
    assert len(left) == 2
    (tmp_path / "saved/train/data.lock").touch()
    for path, split in (
        ("saved", "train"),
        ("saved:test", "test"),
        ("saved/test", "test"),
        ("saved/train:train", "train"),
    ):
        assert texts(tmp_path / path) == again[split]["text"]
    assert texts(f"{tmp_path}/saved:train+test") == [*again["test"]["text"], *again["train"]["text"]]
    (tmp_path / "saved/dataset_dict.json").unlink()  # told by the folders' names, and the cache still no data
    assert texts(tmp_path / "saved") == again["train"]["text"]
    (tmp_path / "saved/train/data-00000-of-00001.arrow").unlink()
    with pytest.raises(PunaError, match="state.json names data-00000-of-00001.arrow, which is not there"):
        texts(tmp_path / "saved/train")
    (tmp_path / "saved/train/state.json").write_text('{"_data_files": 3}')
    with pytest.raises(PunaError, match="state.json: is not as the datasets library writes it"):
        texts(tmp_path / "saved/train")


def test_the_cache_of_a_loaded_data_set_is_read_by_split(tmp_path):
    write(tmp_path / "clone", "train.jsonl", "test.jsonl")
    theirs = datasets.load_dataset(str(tmp_path / "clone"), cache_dir=str(tmp_path / "cache"))
    theirs.map(lambda row: {"text": "left"})
    (folder,) = {file.parent for file in (tmp_path / "cache").rglob("dataset_info.json")}
    assert texts(folder) == ["train.jsonl"] and texts(f"{folder}:test") == ["test.jsonl"]


def test_files_of_no_split_are_said_and_one_file_is_whole(tmp_path, capsys):
    write(tmp_path, "train.jsonl", "more.jsonl", "test.jsonl")
    assert texts(tmp_path) == ["train.jsonl"]
    assert capsys.readouterr().err == (
        f"{tmp_path}: not read, since their names are of no split: {tmp_path}/more.jsonl\n"
    )
    assert texts(tmp_path / "test.jsonl") == ["test.jsonl"]
    with pytest.raises(PunaError, match=r"one file has no splits; leave out ':train'"):
        texts(f"{tmp_path}/test.jsonl:train")
    with pytest.raises(PunaError, match=r"has no split 'train\[:10%\]', it has train"):
        texts(f"{tmp_path}:train[:10%]")
