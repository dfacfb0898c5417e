"""DPO and ORPO are TRL's, losses and gradients; pairs are read as TRL reads them; rows and meshes change nothing."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import config_of as model_config
from reference import hf_config, hf_model, params_of
from transformers import AutoTokenizer

from convert import save_model
from model import init_params, lora
from model.config import LlamaConfig
from model.errors import PunaError
from model.sharding import make_mesh
from model.tokenizer import load_tokenizer
from train import distributed, loop, reference
from train.config import read_config
from train.data import IGNORE_INDEX, encode, load_dataset
from train.data.preference import as_pair
from train.data.toy import write_tokenizer
from train.metrics import read_metrics
from train.objective import make_log_probs, make_objective
from train.optim import make_schedule
from train.sections import Config
from train.state import abstract_batch, abstract_state, init_state, shardings_of
from train.step import make_step

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

ASKED, SAID = {"role": "user", "content": "Which animal?"}, {"role": "assistant", "content": "A llama."}
OTHER = {"role": "assistant", "content": "A goat."}
FORMS = {
    "text": {"prompt": "Which? ", "chosen": "A llama.", "rejected": "A goat."},
    "text without a prompt": {"chosen": "Which? A llama.", "rejected": "Which? A goat."},
    "a prompt that ends within a word": {"chosen": "It is lame", "rejected": "It is late"},
    "messages": {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]},
    "messages without a prompt": {"chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]},
    "messages beside the prompt as text": {
        "prompt": "Which animal?", "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER],
    },
    "answers of several turns": {"chosen": [ASKED, SAID, ASKED, SAID], "rejected": [ASKED, OTHER]},
}  # fmt: skip
TRANSCRIPT = {
    "chosen": "\n\nHuman: Which animal?\n\nAssistant: Where?\n\nHuman: Here.\n\nAssistant: A llama.",
    "rejected": "\n\nHuman: Which animal?\n\nAssistant: Where?\n\nHuman: Here.\n\nAssistant: A goat.",
}


# --- what is read


@pytest.mark.parametrize("form", FORMS)
def test_a_record_is_read_as_trl_reads_it(form):
    from trl.data_utils import maybe_extract_prompt

    theirs = {**FORMS[form], **maybe_extract_prompt(FORMS[form])}
    chosen, rejected = as_pair(FORMS[form])
    assert chosen == {"prompt": theirs["prompt"], "completion": theirs["chosen"]}
    assert rejected == {"prompt": theirs["prompt"], "completion": theirs["rejected"]}


def test_a_transcript_is_messages_or_the_text_that_it_is():
    turns = [("user", "Which animal?"), ("assistant", "Where?"), ("user", "Here.")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    assert as_pair(TRANSCRIPT) == ({"prompt": prompt, "completion": [SAID]}, {"prompt": prompt, "completion": [OTHER]})
    for key, record in zip(("chosen", "rejected"), as_pair(TRANSCRIPT, as_text=True), strict=True):
        assert record["prompt"] + record["completion"] == TRANSCRIPT[key] and record["prompt"].endswith(
            "\n\nAssistant:"
        )
    twice = {key: text.replace("Human: Here.", "Human: Here.\n\nHuman: And now?") for key, text in TRANSCRIPT.items()}
    assert as_pair(twice)[0]["prompt"][2]["content"] == "Here.\n\nAnd now?"
    same = {"chosen": TRANSCRIPT["chosen"], "rejected": TRANSCRIPT["chosen"]}
    assert [record["completion"] for record in as_pair(same)] == [[SAID], [SAID]]


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"chosen": "a", "rejected": None}, "key 'rejected' is missing; the record has 'chosen', 'rejected'"),
        ({"chosen": "a", "rejected": [SAID]}, "expected two texts or two lists, got text and a list"),
        ({"chosen": 1, "rejected": 2}, "expected two texts or two lists, got the number 1 and the number 2"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "key 'prompt': expected text or a list with messages, got the"),
        ({"prompt": [ASKED], "chosen": "a", "rejected": "b"}, "key 'prompt' is a list, and .* are text"),
        ({"chosen": [ASKED, SAID], "rejected": [SAID, OTHER]}, "begin with no message in common"),
        ({"chosen": [], "rejected": []}, "begin with no message in common"),
    ],
    ids=str,
)
def test_what_is_no_preference_is_refused(record, named):
    with pytest.raises(PunaError, match=named):
        as_pair(record)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A byte tokenizer, and pairs of which the chosen answer is in small letters."""
    folder = tmp_path_factory.mktemp("pairs")
    write_tokenizer(folder)
    random = np.random.default_rng(0)
    records = []
    for number in range(88):
        word = "".join(random.choice(list("abcdefgh"), random.integers(2, 9)))
        records.append({"prompt": f"say {number}: ", "chosen": word, "rejected": word[::-1].upper()[:6]})
    for name, part in (("train", records[:72]), ("held_out", records[72:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    return folder


def config_of(folder: Path, **changes) -> Config:
    sections: dict = {
        "model": {"path": str(folder / "base"), "tokenizer": str(folder)},
        "data": {"path": str(folder / "train.jsonl"), "max_length": 64, "cache_dir": str(folder / "cache")},
        "optim": {"learning_rate": 3e-3, "lr_scheduler_type": "constant"},
        "preference": {},
        "run": {"batch_size": 8},
    }
    for name, values in changes.items():
        sections[name] = sections.get(name, {}) | values
    return read_config(sections)


def test_a_row_holds_both_answers_each_as_its_prompt_and_completion(folder):
    tokenizer, config = load_tokenizer(folder), config_of(folder)
    dataset = load_dataset(config.data, tokenizer).train[0]
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    batch = dataset.batch(np.arange(len(records)))
    for number, record in enumerate(records):
        for segment, key in ((1, "chosen"), (2, "rejected")):
            as_completion = {"prompt": record["prompt"], "completion": record[key]}
            ids, labels = encode(as_completion, tokenizer, "plain", None)
            where = batch["segments"][number] == segment
            assert batch["tokens"][number][where].tolist() == ids
            assert batch["labels"][number][where].tolist() == [*labels[1:], IGNORE_INDEX]
    assert dataset.where(3) == [f"{folder / 'train.jsonl'}:4"]
    with pytest.raises(PunaError, match="a preference is two texts"):
        encode(records[0], tokenizer, "plain", None, format="preference")


def test_packing_and_holding_out_keep_pairs_whole(folder):
    tokenizer = load_tokenizer(folder)
    pairs = {}
    for packing in (False, True):
        config = config_of(folder, data={"packing": packing, "max_length": 128, "validation_split": 0.25})
        datasets = load_dataset(config.data, tokenizer)
        found = []
        for dataset in (datasets.train[0], datasets.evaluation):
            batch = dataset.batch(np.arange(len(dataset)))
            found.append(set())
            for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
                answers = [tuple(tokens[segments == segment].tolist()) for segment in range(1, segments.max() + 1)]
                found[-1] |= set(zip(answers[::2], answers[1::2], strict=True))
        pairs[packing] = found
    assert pairs[True] == pairs[False] and [len(part) for part in pairs[True]] == [54, 18]


def test_too_long_pairs_are_dropped_or_lose_the_end_of_both(folder):
    tokenizer, kept = load_tokenizer(folder), {}
    for choice in ("drop", "truncate"):
        config = config_of(folder, data={"max_length": 30, "on_overlong": choice})
        dataset = load_dataset(config.data, tokenizer).train[0]
        kept[choice] = dataset.counts
        assert np.diff(dataset.offsets).max() <= 30
    assert 0 < kept["truncate"].cut <= kept["drop"].overlong and kept["truncate"].rows > kept["drop"].rows


# --- settings


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"preference": {"beta": 0.0}}, "preference.beta is 0.0; it must be above 0"),
        (
            {"preference": {"label_smoothing": 0.5}},
            "preference.label_smoothing is 0.5; it must be at least 0 and below",
        ),
        ({"data": {"format": "messages"}}, 'data.format is "messages" under .preference., which reads "preference"'),
        ({"data": {"packing": True, "packing_strategy": "wrapped"}}, '"wrapped" would cut preferences apart'),
        ({"model": {"path": None}}, "compares with the model that a run starts from: give model.path, or choose"),
        ({"preference": {"precompute_ref_log_probs": False}}, "the reference is not there beside what trains"),
        ({"model": {"loss": "a:b"}}, "model.loss is 'a:b', which nothing reads with preference.loss = 'dpo'"),
        ({"optim": {"z_loss": 1e-4}}, "optim.z_loss is 0.0001, which nothing reads with preference.loss = 'dpo'"),
        ({"preference": {"loss": "orpo", "label_smoothing": 0.1}}, "which nothing reads with preference.loss = 'orpo'"),
    ],
    ids=str,
)
def test_what_no_run_could_use_is_refused(folder, changes, named):
    if changes.get("model", {}).get("path", "") is None:
        changes, path = {}, folder
        with pytest.raises(PunaError, match=named):
            read_config({"model": {"tokenizer": str(path)}, "data": {"path": "x"}, "preference": {}})
        return
    with pytest.raises(PunaError, match=named):
        config_of(folder, **changes)


def test_preferences_without_their_section_are_refused_by_name(folder):
    with pytest.raises(PunaError, match=r'data.format is "preference" without a \[preference\] section: add one'):
        read_config({"data": {"path": "x", "format": "preference"}})
    plain = read_config({"data": {"path": str(folder / "train.jsonl"), "cache_dir": str(folder / "cache")}})
    with pytest.raises(PunaError, match=r"add a \[preference\] section"):
        load_dataset(plain.data, load_tokenizer(folder))


# --- the losses


@pytest.fixture(scope="module")
def models():
    """What trains, and the reference: LLaMAs of transformers."""
    shape = hf_config(vocab_size=264, num_key_value_heads=4, hidden_size=32, intermediate_size=48)
    return hf_model(shape, 0), hf_model(shape, 1)


def trl_gradients(trainer, model, batches):
    """The mean loss and gradients of TRL over batches, these as our tree."""
    model.zero_grad()
    losses = [trainer.compute_loss(model, batch) for batch in batches]
    loss = sum(losses) / len(losses)
    loss.backward()
    kept = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.grad
    gradients = params_of(model)
    for parameter, data in zip(model.parameters(), kept, strict=True):
        parameter.data = data
    return float(loss.detach()), gradients


def rows_of(examples: list[tuple[list[int], list[int], list[int]]], length: int) -> dict:
    """Prompts with their two answers, as ids, as a batch of ours."""
    shape = (len(examples), length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments")}
    batch["labels"] = np.full(shape, IGNORE_INDEX, np.int32)
    for row, (prompt, *answers) in enumerate(examples):
        start = 0
        for segment, answer in enumerate(answers, start=1):
            ids = prompt + answer
            part = slice(start, start + len(ids))
            batch["tokens"][row, part], batch["segments"][row, part] = ids, segment
            batch["labels"][row, start + len(prompt) - 1 : part.stop - 1] = answer
            start = part.stop
    return {name: jnp.asarray(values) for name, values in batch.items()}


def our_gradients(config, model, params, batch, mesh=None):
    objective = make_objective(config, model, mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1]))

    def mean(params, batch):
        total, known = objective.loss(params, batch, batch)
        units = objective.units(batch)
        return total / units, {name: value / units for name, value in known.items()}

    with jax.default_matmul_precision("highest"):
        (loss, known), gradients = jax.jit(jax.value_and_grad(mean, has_aux=True))(params, batch)
    return float(loss), gradients, jax.device_get(known)


def assert_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_is_that_of_trl(folder, models, tmp_path, smoothing):
    """With label smoothing, TRL's loss of one pair at a time, where its optimal transport ("aot") sorts nothing."""
    from datasets import load_dataset as load
    from trl import DPOConfig, DPOTrainer

    trained, reference = models
    records = load("json", data_files=str(folder / "train.jsonl"), split="train[:6]", cache_dir=str(tmp_path / "hf"))
    said = {"loss_type": ["sigmoid"]} if not smoothing else {"loss_type": ["aot"], "label_smoothing": smoothing}
    arguments = DPOConfig(
        str(tmp_path), beta=0.3, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        max_length=None, disable_dropout=True, **said,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = DPOTrainer(trained, reference, arguments, train_dataset=records, processing_class=tokenizer)
    examples = [trainer.train_dataset[number] for number in range(len(records))]
    batches = [trainer.data_collator([example]) for example in examples] if smoothing else [
        trainer.data_collator(examples)
    ]  # fmt: skip
    loss, gradients = trl_gradients(trainer, trained, batches)

    ids = [(each["prompt_ids"], each["chosen_ids"], each["rejected_ids"]) for each in examples]
    batch = rows_of(ids, 64)
    model, config = model_config(trained), config_of(folder, preference={"beta": 0.3, "label_smoothing": smoothing})
    with jax.default_matmul_precision("highest"):
        log_probs = jax.jit(make_log_probs(config, model, make_mesh(1, 1, 1, devices=jax.devices()[:1])))
        batch["reference"] = log_probs(params_of(reference), batch)
    our_loss, our_grads, known = our_gradients(config, model, params_of(trained), batch)
    np.testing.assert_allclose(our_loss, loss, rtol=1e-5)
    assert_same(our_grads, gradients)
    theirs = {
        name: np.mean(values) for name, values in trainer._metrics["train" if trained.training else "eval"].items()
    }
    for ours, name in (("margin", "margins"), ("accuracy", "accuracies")):
        np.testing.assert_allclose(known[f"reward_{ours}"], theirs[f"rewards/{name}"], rtol=1e-5)


@pytest.mark.slow
def test_orpo_is_that_of_trl(folder, models, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns of names that may change
    from datasets import load_dataset as load
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trained, _ = models
    records = load("json", data_files=str(folder / "train.jsonl"), split="train[:6]", cache_dir=str(tmp_path / "hf"))
    arguments = ORPOConfig(
        str(tmp_path), beta=0.3, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        max_length=64, disable_dropout=True,
    )  # fmt: skip
    trainer = ORPOTrainer(
        trained, args=arguments, train_dataset=records, processing_class=AutoTokenizer.from_pretrained(folder)
    )
    examples = [trainer.train_dataset[number] for number in range(len(records))]
    batch = {k: v for k, v in trainer.data_collator(examples).items() if isinstance(v, torch.Tensor)}
    loss, gradients = trl_gradients(trainer, trained, [batch])

    ids = []
    for each in examples:
        answers = [[id for id in each[f"{key}_labels"] if id != IGNORE_INDEX] for key in ("chosen", "rejected")]
        ids.append((each["chosen_input_ids"][: -len(answers[0])], *answers))
    config = config_of(folder, preference={"loss": "orpo", "beta": 0.3})
    our_loss, our_grads, known = our_gradients(config, model_config(trained), params_of(trained), rows_of(ids, 64))
    np.testing.assert_allclose(our_loss, loss, rtol=1e-5)
    assert_same(our_grads, gradients)
    assert 0 < known["nll_loss"] < our_loss


SMALL = LlamaConfig(
    vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip


@pytest.mark.slow
def test_packed_and_sharded_is_the_same(folder):
    tokenizer, found = load_tokenizer(folder), []
    params = jax.tree.map(lambda x: x * 3, init_params(SMALL, jax.random.key(0)))
    for packing, sizes in ((False, (1, 1, 1, 1)), (True, (1, 2, 2, 2))):
        mesh = make_mesh(*sizes[:3], jax.devices()[: np.prod(sizes)], sizes[3])
        settings = {"packing": packing, "max_length": 128}
        config = config_of(folder, data=settings, run={"batch_size": 72})
        dataset = load_dataset(config.data, tokenizer).train[0]
        chosen = np.full(72, -1)
        chosen[: len(dataset)] = np.arange(len(dataset))
        batch: dict = dataset.batch(chosen)
        plain = {name: jnp.asarray(values) for name, values in batch.items()}
        reference = init_params(SMALL, jax.random.key(1))
        batch["reference"] = jax.jit(make_log_probs(config, SMALL, mesh))(reference, plain)
        batch = jax.device_put(batch, shardings_of(abstract_batch(config, mesh)))
        found.append((len(dataset), *our_gradients(config, SMALL, params, batch, mesh)))
    (rows, *alone), (packed_rows, *packed) = found
    assert packed_rows < rows == 72
    np.testing.assert_allclose(packed[0], alone[0], rtol=1e-5)
    assert_same(packed[1:], alone[1:])


@pytest.mark.slow
def test_accumulation_is_the_big_batch(folder):
    """Of orpo, whose means are over tokens and over pairs: microbatches hold different numbers of both."""
    tokenizer, found = load_tokenizer(folder), []
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    for count in (1, 4):
        run = {"batch_size": 8, "gradient_accumulation_steps": count}
        config = config_of(folder, preference={"loss": "orpo"}, run=run)
        abstract = abstract_state(config, SMALL, mesh)
        state = init_state(config, SMALL, init_params(SMALL, jax.random.key(0)), abstract)
        step = make_step(config, SMALL, mesh, make_schedule(config.optim, 10), shardings_of(abstract))
        rows = np.array([0, 1, 2, 3, 4, 5, 6, -1])  # the last microbatch is half empty
        batch = load_dataset(config.data, tokenizer).train[0].batch(rows)
        found.append(jax.device_get(step(state, {name: jnp.asarray(x) for name, x in batch.items()})[1]))
    assert found[0].keys() == found[1].keys() > {"nll_loss", "reward_margin", "reward_accuracy"}
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_the_base_under_adapters_is_the_reference_that_is_computed_before(folder):
    computed = config_of(folder, lora={"rank": 4}, preference={"precompute_ref_log_probs": False})
    before = config_of(folder, lora={"rank": 4})
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    batch = load_dataset(before.data, load_tokenizer(folder)).train[0].batch(np.arange(8))
    batch = {name: jnp.asarray(values) for name, values in batch.items()}
    base = init_params(SMALL, jax.random.key(0))
    _, adapted = lora.add(base, SMALL, jax.random.key(1), rank=4)
    trained, frozen = lora.split(adapted)
    trained = jax.tree.map(lambda x: x + 0.03, trained)
    log_probs = jax.jit(make_log_probs(before, SMALL, mesh))(base, batch)
    assert set(abstract_batch(before, mesh)) - set(abstract_batch(computed, mesh)) == {"reference"}
    found = []
    for config, rows in ((computed, batch), (before, batch | {"reference": log_probs})):
        objective = make_objective(config, SMALL, mesh)
        value = jax.jit(jax.value_and_grad(lambda t, o=objective, r=rows: o.loss(lora.join(t, frozen), r, r)[0]))
        found.append(value(trained))
    assert abs(found[0][0] - 8 * np.log(2)) > 0.01  # which is the loss where nothing has been learned yet
    assert_same(*found)


# --- a run


@pytest.mark.slow
def test_a_run_learns_a_preference_resumes_and_computes_its_reference_once(folder, tmp_path, monkeypatch):
    save_model(folder / "base", SMALL, init_params(SMALL, jax.random.key(0)), tokenizer=load_tokenizer(folder))
    sections = {"data": {"eval_path": str(folder / "held_out.jsonl"), "packing": True}, "mesh": {"fsdp": 2, "data": 4}}

    def run(name: str, stop: int | None = None) -> list[dict]:
        told = {"output_dir": str(tmp_path / name), "max_steps": 12, "save_steps": 4, "eval_steps": 6}
        monkeypatch.setattr(distributed, "reached_preemption", lambda step: step == stop)
        loop.train(config_of(folder, **sections, run=told))
        timing = ("tokens_per_second_per_device", "peak_memory_gib")
        return [{k: v for k, v in line.items() if k not in timing} for line in read_metrics(tmp_path / name)]

    lines = run("whole")
    assert lines[0]["eval_loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert lines[-1]["eval_reward_accuracy"] > 0.9 and lines[-1]["eval_reward_margin"] > 0.1
    assert {"chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy"} < lines[-1].keys()
    assert len(list((folder / "cache").glob("reference-*.npy"))) == 2

    def again(*arguments):
        raise AssertionError("the reference is there")

    monkeypatch.setattr(reference, "_compute", again)
    with pytest.raises(SystemExit):
        run("parts", stop=5)
    assert run("parts") == lines
