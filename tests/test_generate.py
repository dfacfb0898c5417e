"""Generated tokens equal transformers' one by one, in any company, and text ends where it should."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from typer.testing import CliRunner

import infer.generate
from convert import load_model, save_model, vocab
from convert.formats import open_model
from convert.merge import merge_adapters
from convert.peft import save_adapter
from convert.save import write_model
from infer.__main__ import app
from infer.generate import TextStream, check_room, decode_steps, generate
from infer.load import load_engine, sampling, speculation, start_mesh
from infer.sample import Sampling, stack_sampling
from model import forward, make_mesh
from model.errors import PunaError
from model.layout import per_layer
from model.lora import add
from model.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

NEW = 24


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def prompts():
    """Of one token, of a few, and of more than one prefill pass takes (see `short_passes`)."""
    rng = np.random.default_rng(0)
    return [rng.integers(1, 128, size).tolist() for size in (1, 17, 90)]


@pytest.fixture(autouse=True)
def short_passes(monkeypatch):
    monkeypatch.setattr("infer.generate.PREFILL", 64)


def run(ours, prompts, new=NEW, **keywords):
    config, params = ours
    rows = [[] for _ in prompts]
    for tokens in generate(params, config, prompts, new, **keywords):
        for row, more in zip(rows, tokens, strict=True):
            row += more
    return rows


def run_theirs(theirs, prompt, **keywords):
    with torch.no_grad():
        ids = torch.tensor([prompt])
        out = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **keywords
        )
    return out[0, len(prompt) :].tolist()


def test_greedy_tokens_equal_transformers(ours, theirs, prompts):
    assert run(ours, prompts) == [run_theirs(theirs, prompt) for prompt in prompts]


def test_repetition_penalty_equals_transformers(ours, theirs, prompts):
    expected = [run_theirs(theirs, prompt, repetition_penalty=1.5) for prompt in prompts]
    assert run(ours, prompts, samplings=[Sampling(repetition_penalty=1.5)] * 3) == expected


def test_any_of_several_eos_tokens_ends_a_row(ours, theirs, prompts):
    free = run(ours, prompts)
    eos = [free[0][3], free[1][5]]
    rows = run(ours, prompts, eos_ids=eos)
    assert rows == [run_theirs(theirs, prompt, eos_token_id=eos) for prompt in prompts]
    assert rows[0][-1] in eos and len(rows[0]) <= 4


def test_cached_equals_uncached(ours, prompts):
    config, params = ours
    score = jax.jit(lambda tokens, at: forward(params, tokens, config)[0][0, at])
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(NEW):
            padded = np.zeros((1, 128), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(score(padded, len(tokens) - 1).argmax()))
        expected.append(tokens[len(prompt) :])
    assert run(ours, prompts) == expected


@pytest.mark.slow
def test_a_batch_equals_each_alone(ours, prompts):
    samplings = [Sampling(), *(Sampling(1.0, top_k=20, top_p=0.9, seed=seed) for seed in range(2))]
    together = run(ours, prompts, samplings=samplings)
    assert together == [run(ours, [p], samplings=[s])[0] for p, s in zip(prompts, samplings, strict=True)]


def test_the_seed_decides(ours, prompts):
    first, again, other = (run(ours, prompts[:1], samplings=[Sampling(1.0, seed=seed)]) for seed in (7, 7, 8))
    assert first == again != other


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_sharded_equals_unsharded(ours, folder, prompts, axes):
    count = int(np.prod(list(axes.values())))
    mesh = make_mesh(**axes, devices=jax.devices()[:count])
    samplings = [Sampling(), *(Sampling(1.0, top_p=0.9, seed=seed) for seed in range(2))]
    expected = run(ours, prompts, samplings=samplings)
    assert run(load_model(folder, mesh=mesh), prompts, samplings=samplings, mesh=mesh) == expected


def test_one_program_serves_all_settings_and_chunks(ours, prompts):
    run(ours, prompts)
    compiled = decode_steps._cache_size()
    samplings = [Sampling(0.3, top_k=5, seed=1), Sampling(2.0, min_p=0.1), Sampling(repetition_penalty=2.0)]
    run(ours, prompts[::-1], samplings=samplings)
    assert decode_steps._cache_size() == compiled


def test_decoding_moves_nothing_between_host_and_devices_by_itself(ours, prompts):
    config, params = ours[0], per_layer(ours[1])
    expected = run((config, params), prompts)
    chunks = generate(params, config, prompts, NEW)
    rows = [list(row) for row in next(chunks)]  # the prompts are read, and put on the device
    with jax.transfer_guard("disallow"):
        for more in chunks:
            rows = [row + list(new) for row, new in zip(rows, more, strict=True)]
    assert rows == expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_is_updated_in_place(ours, prompts, batch, dtype):
    """The compiled step copies or converts no layer's keys: XLA did, three times a token, where one row wrote one
    slice, and to float32 and back where a 16-bit model had a 16-bit cache."""
    params, config = per_layer(jax.tree.map(lambda x: x.astype(dtype), ours[1])), ours[0]
    state = infer.generate.prefill_prompts(params, config, prompts[:batch], 128, None)
    eos, number = jnp.zeros(0, jnp.int32), np.int32(4)
    step = decode_steps.lower(params, state, stack_sampling([Sampling()] * batch), eos, number, number, config, 128)
    compiled = step.compile().as_text()
    shape = ",".join(map(str, state.cache.k[0].shape))
    assert f"f32[{shape}]" in compiled
    assert not [line for line in compiled.splitlines() if f"f32[{shape}]" in line and " copy(" in line]
    assert f"bf16[{shape}]" not in compiled


def test_rows_that_pad_a_vocabulary_are_never_chosen(ours, prompts):
    """However likely: here each twice as likely, in logits, as a token that the tokenizer has."""
    config, params = ours
    embed, head = params["embed"], params["lm_head"]
    wide = params | {"embed": jnp.concatenate([embed, embed]), "lm_head": jnp.concatenate([head, 2 * head], axis=1)}
    padded = (replace(config, vocab_size=256), wide)
    assert max(token for row in run(padded, prompts) for token in row) >= 128
    assert run(padded, prompts, vocab_limit=128) == run(ours, prompts)
    warm = [Sampling(1.5, top_k=9, seed=3)] * len(prompts)
    assert max(token for row in run(padded, prompts, samplings=warm, vocab_limit=128) for token in row) < 128


def test_a_row_that_is_stopped_ends_alone(ours, prompts):
    free = run(ours, prompts)
    rows = run(ours, prompts, stopped=lambda row: row == 0)
    assert rows[0] == free[0][:1] and rows[1:] == free[1:]


def test_requests_that_do_not_fit_are_refused(ours):
    config, _ = ours
    with pytest.raises(PunaError, match=r"prompt 1 has 1000 tokens and max_new_tokens is 25, .* context of 1024"):
        check_room("prompt 1", [1] * 1000, 25, config)
    check_room("prompt 1", [1] * 1000, 24, config)
    with pytest.raises(PunaError, match="prompt 1 is empty"):
        check_room("prompt 1", [], 1, config)
    with pytest.raises(PunaError, match="holds token 128 and the model has 128"):
        check_room("prompt 1", [128], 1, config)
    with pytest.raises(PunaError, match="max_new_tokens is 0"):
        check_room("prompt 1", [1], 0, config)


class Letters:
    """A tokenizer whose ids are code points; its stream gives each letter as it comes."""

    def stream(self):
        return self

    def push(self, id):
        return chr(id)

    def flush(self):
        return ""


@settings(deadline=None)
@given(st.text("abc"), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_text_ends_before_the_first_stop_and_shows_no_part_of_it(letters, stops, size):
    ends = [(letters.find(stop) + len(stop), letters.find(stop)) for stop in stops if stop in letters]
    expected = letters[: min(ends)[1]] if ends else letters
    text = TextStream(Letters(), [], stops)
    shown = ""
    for start in range(0, len(letters), size):
        shown += text.push([ord(letter) for letter in letters[start : start + size]])
        assert expected.startswith(shown)
    assert text.stopped == bool(ends)
    assert shown + text.flush() == expected


def test_settings_come_from_the_flags_then_the_file_then_greedy():
    file = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None}
    assert sampling({}) == Sampling()
    assert sampling(file) == Sampling(0.6, top_p=0.9)
    assert sampling(file, temperature=0.0, seed=3) == Sampling(0.0, top_p=0.9, seed=3)
    assert sampling(file | {"do_sample": False}) == Sampling()
    assert sampling({"repetition_penalty": 1.2}) == Sampling(repetition_penalty=1.2)
    assert sampling({}, top_k=5) == Sampling(1.0, top_k=5)


@pytest.mark.parametrize("text", ["tensor", "tensor=0", "tensor=two", "rows=2", "tensor=2,"])
def test_a_mesh_that_is_none_is_named(text):
    with pytest.raises(PunaError, match=f"--mesh {text}: "):
        start_mesh(text)


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(PunaError, match="--mesh tensor=16 needs 16 devices and there are 8"):
        start_mesh("tensor=16")


@pytest.fixture(scope="module")
def command():
    """Run `python -m infer generate` in this process; returns what it printed to stdout."""

    def command(*arguments):
        result = CliRunner().invoke(app, ["generate", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return command


@pytest.fixture
def story(data_dir):
    """The published greedy text of stories260K, 201 tokens with its beginning-of-text."""
    from sentencepiece import SentencePieceProcessor

    ids = json.loads((data_dir / "stories260k" / "golden_stories260K.json").read_text())["greedy_ids"]
    tokenizer = SentencePieceProcessor(model_file=str(data_dir / "stories260k" / "tokenizer.model"))
    return tokenizer.decode(ids) + "\n"


def test_the_command_prints_the_published_story_and_nothing_else(data_dir, story):
    folder = data_dir / "stories260k-derived" / "hf_sharded"
    arguments = ["generate", folder, "--prompt", "", "--temperature", "0", "--max-new-tokens", "200"]
    root = Path(__file__).parent.parent
    output = subprocess.run(
        [sys.executable, "-m", "infer", *map(str, arguments)], cwd=root, capture_output=True, text=True, check=True
    )
    assert (output.stdout, output.stderr) == (story, "")


@pytest.mark.slow
def test_the_story_from_meta_from_orbax_and_sharded(data_dir, story, command, tmp_path, monkeypatch):
    derived = data_dir / "stories260k-derived"
    greedy = ["--prompt", "Once upon a time", "--temperature", "0", "--max-new-tokens", "196"]
    tokenizer = ["--tokenizer", derived / "hf_sharded"]
    assert command(derived / "meta_mp1", *greedy, *tokenizer) == story
    assert command(derived / "hf_sharded", *greedy, "--mesh", "tensor=2") == story
    save_model(tmp_path / "orbax", *load_model(derived / "hf_sharded"), format="orbax")
    monkeypatch.chdir(tmp_path)
    assert command("orbax", *greedy, *tokenizer) == story


@pytest.mark.slow
def test_proposals_print_the_same_story_in_fewer_steps(data_dir, story, command, monkeypatch):
    folder = data_dir / "stories260k-derived" / "hf_sharded"
    engines = []

    def kept(*arguments, **settings):
        engines.append(load_engine(*arguments, **settings))
        return engines[-1]

    monkeypatch.setattr("infer.commands.generate.load_engine", kept)
    for flags in ([], ["--speculate", "lookup"], ["--draft", folder]):
        assert command(folder, "--prompt", "", "--temperature", "0", "--max-new-tokens", "200", *flags) == story
    plain, lookup, draft = (engine.counts.steps for engine in engines)
    assert lookup < plain - 10 and draft < plain / 3


def test_proposals_come_from_one_place():
    with pytest.raises(PunaError, match="--speculate lookup and --draft each say where proposals come from"):
        speculation("lookup", "small")


@pytest.mark.slow
def test_several_prompts_are_divided_and_each_as_alone(data_dir, command):
    folder = data_dir / "stories260k-derived" / "hf_sharded"
    flags = ["--temperature", "0.8", "--top-p", "0.9", "--seed", "4", "--max-new-tokens", "24", "--stop", "."]
    texts = ["Once upon a time", "The big red dog was"]
    alone = [command(folder, "--prompt", text, *flags).removesuffix("\n") for text in texts]
    together = command(folder, *(part for text in texts for part in ("--prompt", text)), *flags)
    assert together.removesuffix("\n").split("\n\f\n") == alone
    assert all(text.startswith(prompt) and "." not in text for text, prompt in zip(alone, texts, strict=True))


@pytest.mark.slow
def test_an_adapter_speaks_as_in_peft(data_dir, command):
    derived = data_dir / "stories260k-derived"
    base = transformers.LlamaForCausalLM.from_pretrained(derived / "hf_sharded")
    adapted = peft.PeftModel.from_pretrained(base, derived / "peft_qv_r8a16").eval()
    source = load_tokenizer(derived / "hf_sharded")
    prompt = source.encode("Once upon a time", add_bos=True)
    expected = source.decode(prompt + run_theirs(adapted, prompt)) + "\n"
    flags = ["--prompt", "Once upon a time", "--max-new-tokens", NEW]
    assert command(derived / "hf_sharded", "--adapter", derived / "peft_qv_r8a16", *flags) == expected


@pytest.mark.slow
def test_an_adapter_with_tokens_of_its_own_speaks_as_merged(data_dir, command, tmp_path):
    base = data_dir / "stories260k-derived" / "hf_sharded"
    with (tmp_path / "chinese.model").open("wb") as stream:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["羊驼在高原上走"] * 5),
            model_writer=stream,
            model_type="bpe",
            vocab_size=12,
            minloglevel=2,
        )
    vocab.merge_vocabularies(base / "tokenizer.model", tmp_path / "chinese.model", tmp_path / "grown.model")
    vocab.resize(base, tmp_path / "wide", tmp_path / "grown.model")
    config, params = load_model(tmp_path / "wide")
    modules = ("embed_tokens", "lm_head")
    config, params = add(params, config, jax.random.key(0), modules_to_save=modules)
    save_adapter(tmp_path / "a", params, modules, tokenizer=load_tokenizer(tmp_path / "wide"))
    merge_adapters(base, [tmp_path / "a"], tmp_path / "merged")
    assert max(load_tokenizer(tmp_path / "merged").encode("羊驼")) >= 512
    flags = ["--prompt", "Once upon a time 羊驼", "--max-new-tokens", NEW]
    assert command(base, "--adapter", tmp_path / "a", *flags) == command(tmp_path / "merged", *flags)


@pytest.mark.slow
def test_the_gguf_file_that_is_named_is_the_one_that_speaks(data_dir, command, story, tmp_path):
    """With other models beside it."""
    source = data_dir / "stories260k-derived" / "hf_sharded"
    config, params = load_model(source)
    mute = tmp_path / "mute"
    save_model(mute, config, jax.tree.map(jnp.zeros_like, params), tokenizer=load_tokenizer(source))
    write_model(mute / "a.gguf", replace(open_model(source), format="gguf"))
    shutil.copy(mute / "a.gguf", mute / "b.gguf")
    flags = ["--prompt", "Once upon a time", "--temperature", "0", "--max-new-tokens", "196"]
    assert command(mute / "a.gguf", *flags) == story


@pytest.mark.parametrize(
    "flags", [("int4", "--block", "32"), ("nf4", "--double-quant"), ("int8", "--activations", "int8")], ids=str
)
def test_quantized_weights_have_their_settings(data_dir, command, flags):
    folder = data_dir / "stories260k-derived" / "hf_sharded"
    text = command(folder, "--prompt", "Once upon a time", "--max-new-tokens", "4", "--quantize", *flags)
    assert text.startswith("Once upon a time")
    with pytest.raises(PunaError, match="the codes of nf4 are no integers; give --quantize int8 or int4"):
        command(folder, "--prompt", "a", "--quantize", "nf4", "--activations", "int8")
    with pytest.raises(PunaError, match="no weight of the model is quantized; quantize it"):
        command(folder, "--prompt", "a", "--activations", "int8")


def test_float_types_are_named_as_the_flag_has_them(data_dir, command):
    folder = data_dir / "stories260k-derived" / "hf_sharded"
    text = command(folder, "--prompt", "Once upon a time", "--dtype", "bfloat16", "--max-new-tokens", "8")
    assert text.startswith("Once upon a time, there")


def test_a_prompt_s_logits_choose_its_first_token(ours, prompts):
    config, params = ours
    logits, _ = forward(params, jnp.asarray([prompts[1]]), config)
    assert run(ours, [prompts[1]], new=1) == [[int(logits[0, -1].argmax())]]
