"""Deltas are FastChat's and Alpaca's bit for bit, give every target back bit for bit, and refuse what is not theirs."""

import json
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from converting import command  # noqa: F401  (a fixture)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import hf_config, hf_model

from convert import delta
from convert.checkpoint import Checkpoint
from convert.lazy import from_array
from convert.names import parameters
from convert.save import write_model
from convert.weight_files import read_weights
from model import LlamaConfig
from model.errors import PunaError

CONFIG = LlamaConfig(
    vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)
GROWN = replace(CONFIG, vocab_size=10)
TOKENIZER = {"tokenizer_config.json": '{"pad_token": "[PAD]"}', "tokenizer.model": "pieces", "added_tokens.json": "{}"}


def write(path, config, dtype=np.float16, seed=0, numbers=(), tokenizer=False, format="hf"):
    """A model folder of random numbers; `numbers` stand at the front of every matrix."""
    random = np.random.default_rng(seed)
    tensors = {}
    for param in parameters(config):
        array = random.normal(0, 0.05, param.shape).astype(dtype)
        if array.size >= len(numbers):
            array.reshape(-1)[: len(numbers)] = numbers
        tensors[param.name] = from_array(array, "memory")
    write_model(path, Checkpoint(config, tensors, path / "nowhere", format))
    for name, text in TOKENIZER.items() if tokenizer else ():
        (path / name).write_text(text)
    return path


def weights(folder):
    return {name: tensor.load() for name, tensor in read_weights(folder).items()}


def published(made, path):
    """The delta as others publish theirs: without what our `make` adds."""
    path.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(made / name, path / name)
    return path


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype and ours[name].tobytes() == array.tobytes(), name


def with_rows(weights, config, row):
    """Torch tensors of `weights`, with embedding rows that `row(old)` gives where `config` has more tokens."""
    grown = {}
    for name, array in weights.items():
        tensor = torch.tensor(array)
        missing = config.vocab_size - len(tensor) if "embed" in name or "lm_head" in name else 0
        grown[name] = torch.cat([tensor, *[row(tensor)] * missing])
    return grown


def halves(largest=None):
    floats = st.floats(width=16) if largest is None else st.floats(-largest, largest, width=16)
    return hnp.arrays(np.float16, (2, 24), elements=floats)


@settings(max_examples=40, deadline=None)
@given(halves(), st.sampled_from([CONFIG, GROWN]))
def test_a_round_trip_is_exact(tmp_path_factory, numbers, config):
    """For all float16 numbers, with negative zeros, differences that overflow, infinities and NaN; with a [PAD] row or
    without."""
    root = tmp_path_factory.mktemp("exact")
    base = write(root / "base", CONFIG, seed=1, numbers=numbers[0])
    target = write(root / "target", config, seed=2, numbers=numbers[1])
    delta.make(base, target, root / "delta")
    delta.apply(base, root / "delta", root / "back")
    assert_same(weights(root / "back"), weights(target))


@settings(max_examples=40, deadline=None)
@given(halves(30000), st.sampled_from([CONFIG, GROWN]))
def test_the_arithmetic_is_fastchats(tmp_path_factory, numbers, config):
    """make_delta.py and apply_delta.py: float16, and zeros for the rows of new tokens (Vicuna v0)."""
    root = tmp_path_factory.mktemp("fastchat")
    base = write(root / "base", CONFIG, seed=1, numbers=numbers[0])
    target = write(root / "target", config, seed=2, numbers=numbers[1])
    delta.make(base, target, root / "delta")
    delta.apply(base, published(root / "delta", root / "published"), root / "back")
    old = with_rows(weights(base), config, lambda tensor: torch.zeros_like(tensor[:1]))
    theirs = {name: torch.tensor(array) - old[name] for name, array in weights(target).items()}
    made = {name: array for name, array in weights(root / "delta").items()}
    assert_same(made, {name: tensor.numpy() for name, tensor in theirs.items()})
    assert_same(weights(root / "back"), {name: (old[name] + tensor).numpy() for name, tensor in theirs.items()})


def test_the_vocabularies_of_vicuna_v0(tmp_path):
    """32,000 rows against 32,001, as published; the tokenizer is the delta's."""
    base = write(tmp_path / "base", replace(CONFIG, vocab_size=32000), seed=1, tokenizer=False)
    target = write(tmp_path / "target", replace(CONFIG, vocab_size=32001), seed=2, tokenizer=True)
    delta.make(base, target, tmp_path / "delta")
    pad = weights(target)["model.embed_tokens.weight"][-1]
    assert np.array_equal(weights(tmp_path / "delta")["model.embed_tokens.weight"][-1], pad)  # the whole row
    delta.apply(base, tmp_path / "delta", tmp_path / "back")
    assert_same(weights(tmp_path / "back"), weights(target))
    assert {name: (tmp_path / "back" / name).read_text() for name in TOKENIZER} == TOKENIZER
    assert json.loads((tmp_path / "back/config.json").read_text())["vocab_size"] == 32001


def test_alpacas_arithmetic_and_checksum(tmp_path):
    """weight_diff.py: float32, new rows the mean of the old, and the sum of the state dict of the recovered model,
    which in the transformers of its day counted every layer's rotary frequencies."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    tuned = hf_model(hf_config(vocab_size=10, num_hidden_layers=3, **shape))
    tuned.save_pretrained(tmp_path / "tuned")
    base = write(tmp_path / "base", replace(CONFIG, num_hidden_layers=3), np.float32)
    delta.make(base, tmp_path / "tuned", tmp_path / "delta")
    delta.apply(base, tmp_path / "delta", tmp_path / "back")
    assert_same(weights(tmp_path / "back"), weights(tmp_path / "tuned"))

    raw = with_rows(weights(base), GROWN, lambda tensor: tensor.mean(0, keepdim=True))
    theirs = {name: tensor - raw[name] for name, tensor in tuned.state_dict().items()}
    total = float(sum((raw[name] + tensor).sum() for name, tensor in theirs.items()))
    buffers = 3 * float(tuned.model.rotary_emb.inv_freq.sum())
    made = published(tmp_path / "delta", tmp_path / "published")
    for name, array in weights(made).items():
        torch.testing.assert_close(torch.tensor(array), theirs[name], atol=1e-7, rtol=0)  # the mean's last place
    for number, expected in enumerate((total, total + buffers, total + 0.009, total + buffers - 0.009)):
        delta.apply(base, made, tmp_path / f"back{number}", total=expected)
    for expected in (total + 0.011, total + buffers + 0.011, 50637.1836):
        with pytest.raises(PunaError, match=f"not {expected:.4f}"):
            delta.apply(base, made, tmp_path / "wrong", total=expected)
    assert not (tmp_path / "wrong").exists()


def test_sums_of_all_files(tmp_path):
    """A SHA256SUMS that sha256sum itself checks, read before use, and compared with a list that is given."""
    base, target = write(tmp_path / "base", CONFIG, seed=1), write(tmp_path / "target", CONFIG, seed=2)
    delta.make(base, target, tmp_path / "delta")
    delta.apply(base, tmp_path / "delta", tmp_path / "back")
    for folder in (tmp_path / "delta", tmp_path / "back"):
        listed = {line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
        assert listed == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    given = tmp_path / "list"
    given.write_text((tmp_path / "back/SHA256SUMS").read_text())
    delta.apply(base, tmp_path / "delta", tmp_path / "again", sums=given)
    for text, complaint in (
        (f"{'0' * 64}  model.safetensors", "model.safetensors has SHA-256"),
        (f"{'0' * 64}  model-00001-of-00002.safetensors", "the result has no model-00001"),
        ("0123 model.safetensors", "line 1 is no SHA-256"),
    ):
        given.write_text(text)
        with pytest.raises(PunaError, match=complaint):
            delta.apply(base, tmp_path / "delta", tmp_path / "wrong", sums=given)
    (tmp_path / "delta/config.json").write_text((tmp_path / "delta/config.json").read_text() + " ")
    with pytest.raises(PunaError, match="delta: config.json has SHA-256"):
        delta.apply(base, tmp_path / "delta", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_bases_and_targets_of_other_formats_and_dtypes(tmp_path):
    """Meta's pickled float32 base, a bfloat16 pair, and a float16 delta of float32 models, as FastChat casts them."""
    base = write(tmp_path / "meta", CONFIG, np.float32, seed=1, format="meta")
    target = write(tmp_path / "target", CONFIG, np.float32, seed=2)
    delta.make(base, target, tmp_path / "delta", dtype="float16")
    delta.apply(base, tmp_path / "delta", tmp_path / "back")
    halved = {name: array.astype(np.float16) for name, array in weights(target).items()}
    assert_same(weights(tmp_path / "back"), halved)

    b16 = np.dtype("bfloat16")
    base, target = (write(tmp_path / f"b{seed}", GROWN, b16, seed=seed) for seed in (3, 4))
    delta.make(base, target, tmp_path / "b-delta")
    delta.apply(base, tmp_path / "b-delta", tmp_path / "b-back")
    assert_same(weights(tmp_path / "b-back"), weights(target))


def spoil(folder, name, change):
    """Change one tensor of a folder's one file."""
    array = weights(folder)[name].copy()
    change(array)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start, stop = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + start : 8 + length + stop] = array.tobytes()
    path.write_bytes(data)


def nudge(array):
    array += 1


Q, EMBED = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"


def test_wrong_input_is_named_and_nothing_is_written(tmp_path):
    base, target = write(tmp_path / "base", CONFIG, seed=1), write(tmp_path / "target", GROWN, seed=2)
    made, theirs = tmp_path / "delta", tmp_path / "theirs"
    delta.make(base, target, made)
    (made / "SHA256SUMS").unlink()  # which would find the damage first
    published(made, theirs)

    def refuses(call, *arguments, match, **keywords):
        with pytest.raises(PunaError, match=match):
            call(*arguments, tmp_path / "dst", **keywords)
        assert not list(tmp_path.glob("*dst*"))

    other = write(tmp_path / "other", CONFIG, seed=5)
    refuses(delta.apply, other, made, match=f"{EMBED} is not that of the base")
    deeper = write(tmp_path / "deeper", replace(CONFIG, num_hidden_layers=2))
    for call, last in ((delta.apply, theirs), (delta.make, target)):
        refuses(call, deeper, last, match="deeper .* has unknown 9 tensors")
        wider = write(tmp_path / f"wider{call.__name__}", replace(CONFIG, intermediate_size=16))
        refuses(call, wider, last, match=r"mlp.gate_proj.weight has shape \(16, 8\); the other has \(8, 8\)")
        larger = write(tmp_path / f"larger{call.__name__}", replace(CONFIG, vocab_size=11))
        refuses(call, larger, last, match="11 rows for 10 tokens")
        brain = write(tmp_path / f"brain{call.__name__}", CONFIG, np.dtype("bfloat16"))
        refuses(call, brain, last, match="bfloat16 and the delta float16")
    refuses(delta.make, base, target, init="median", match="init 'median' is not known")
    refuses(delta.apply, base, made, init="mean", match="was made with init zero")

    spoil(made, Q, nudge)
    refuses(delta.apply, base, made, match=f"{Q} does not give the target")
    file = theirs / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refuses(delta.apply, base, theirs, match="is truncated")
    for said in ({"rule": "vicuna"}, {"dtype": "float16", "init": "zero", "base": ["a"]}):
        (made / "delta.json").write_text(json.dumps(said))
        refuses(delta.apply, base, made, match="delta.json is not as")


def test_numbers_that_are_not_finite_are_said_and_carried(tmp_path, command):  # noqa: F811
    base, target = write(tmp_path / "base", CONFIG, seed=1), write(tmp_path / "target", CONFIG, seed=2)
    spoil(target, Q, lambda array: array.reshape(-1).__setitem__(slice(3), [np.nan, np.inf, -np.inf]))
    made, theirs, back = tmp_path / "delta", tmp_path / "theirs", tmp_path / "back"
    code, _, err = command("delta", "make", base, target, made)
    file, held = target / "model.safetensors", "layers.0.wq holds NaN or infinite numbers, which the delta keeps"
    assert code == 0 and [line for line in err if "NaN" in line] == [f"{file}: {held}"]
    for source in (made, published(made, theirs)):
        code, _, err = command("delta", "apply", base, source, back, "--overwrite")
        held = f"{source / 'model.safetensors'}: {Q} holds NaN or infinite numbers, which are written as they are"
        assert code == 0 and [line for line in err if "NaN" in line] == [held]
        if source == made:
            assert_same(weights(back), weights(target))
        np.testing.assert_array_equal(weights(back)[Q].reshape(-1)[:3], [np.nan, np.inf, -np.inf])
    code, _, err = command("delta", "apply", base, theirs, back, "--overwrite", "--sum", "5")
    assert code == 2 and "add up to nan" in err[-1]


def test_numbers_that_overflow_are_refused_unless_that_is_allowed(tmp_path, command):  # noqa: F811
    """In the delta's dtype, and in the sum of a published delta, which has no list of what it misses."""
    base, target = (write(tmp_path / name, CONFIG, np.float32, seed=1) for name in ("base", "target"))
    spoil(target, Q, lambda array: array.reshape(-1).__setitem__(slice(2), [1e5, -2e5]))
    arguments = ("delta", "make", base, target, tmp_path / "delta", "--dtype", "float16")
    code, _, err = command(*arguments)
    assert code == 2 and "layers.0.wq holds 2 numbers beyond float16" in err[-1] and "--allow-overflow" in err[-1]
    assert command(*arguments, "--allow-overflow")[0] == 0
    base, target = (write(tmp_path / f"{name}16", CONFIG, seed=1) for name in ("base", "target"))
    delta.make(base, target, tmp_path / "delta16")
    theirs = published(tmp_path / "delta16", tmp_path / "theirs")
    for folder in (base, theirs):
        spoil(folder, Q, lambda array: array.reshape(-1).__setitem__(slice(1), [4e4]))
    arguments = ("delta", "apply", base, theirs, tmp_path / "back")
    code, _, err = command(*arguments)
    assert code == 2 and f"{Q} holds 1 numbers that added to the base's are beyond float16" in err[-1]
    assert command(*arguments, "--allow-overflow")[0] == 0
    assert np.isinf(weights(tmp_path / "back")[Q]).sum() == 1


def test_the_commands(tmp_path, command):  # noqa: F811
    base, target = write(tmp_path / "base", CONFIG, seed=1), write(tmp_path / "target", GROWN, seed=2)
    made, back = tmp_path / "delta", tmp_path / "back"
    assert command("delta", "make", base, target, made)[0] == 0
    code, out, err = command("delta", "apply", base, made, back)
    assert (code, out) == (0, []) and "writing back" in err[-1]
    assert_same(weights(back), weights(target))
    assert command("delta", "apply", base, made, tmp_path / "again", "--sha256", back / "SHA256SUMS")[0] == 0
    dotted = tmp_path / "dotted"  # as `sha256sum ./*` writes them
    dotted.write_text((back / "SHA256SUMS").read_text().replace("  ", "  ./"))
    assert command("delta", "apply", base, made, tmp_path / "third", "--sha256", dotted)[0] == 0
    lists = {name: tmp_path / name for name in ("empty", "config", "twice")}
    lists["empty"].touch()
    lists["twice"].write_text(f"{'0' * 64}  x\n{'1' * 64}  ./x\n")
    lines = (back / "SHA256SUMS").read_text().splitlines()
    lists["config"].write_text(next(line for line in lines if line.endswith(" config.json")))
    for arguments, complaint in (
        (("apply", target, made), "is not that of the base"),
        (("apply", base, made, "--sum", "50637.1836"), "not 50637.1836"),
        (("apply", base, made, "--sum", "nan"), "sum nan: give the finite number"),
        (("apply", base, made, "--sha256", lists["empty"]), "empty lists no file"),
        (("apply", base, made, "--sha256", lists["twice"]), "twice: line 2 gives x another SHA-256"),
        (("apply", base, made, "--sha256", lists["config"]), "config does not list model.safetensors"),
        (("apply", base, made, "--sha256", base / "model.safetensors"), "model.safetensors is no list of SHA-256"),
        (("apply", base, tmp_path / "none"), "none: no such folder"),
        (("make", base, target, "--dtype", "int8"), "--dtype int8 is not known"),
    ):
        code, out, err = command("delta", *arguments[:3], tmp_path / "dst", *arguments[3:])
        assert (code, out) == (2, []) and complaint in err[-1] and not (tmp_path / "dst").exists()
