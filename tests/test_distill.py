"""Distillation is TRL's divergence of two models of transformers, losses and gradients, on any mesh and in any cut."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import config_of as model_config
from reference import hf_config, hf_model, params_of

from convert import save_model
from model import init_params
from model.config import LlamaConfig
from model.errors import PunaError
from model.sharding import make_mesh
from model.tokenizer import load_tokenizer
from train import distributed, loop
from train.config import read_config
from train.data import IGNORE_INDEX
from train.data.toy import make_examples, write_tokenizer
from train.metrics import read_metrics
from train.objective import make_objective
from train.sections import Config
from train.state import abstract_batch, abstract_teacher, shardings_of, teacher_params

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

B, T, V = 4, 24, 264


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student, and a teacher of another shape, also as a folder."""
    shape = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    student = hf_model(hf_config(**shape | {"num_key_value_heads": 2}), 0)
    teacher = hf_model(hf_config(**shape | {"hidden_size": 48, "num_key_value_heads": 4, "num_hidden_layers": 3}), 1)
    folder = tmp_path_factory.mktemp("teacher")
    teacher.save_pretrained(folder)
    return student, teacher, folder


def config_of(folder, **changes) -> Config:
    sections: dict = {
        "data": {"path": "unread", "max_length": T},
        "distill": {"teacher": str(folder)},
        "run": {"batch_size": B},
        "model": {"loss_chunk": 40},  # not a divisor of the rows
    }
    for name, values in changes.items():
        sections[name] = sections.get(name, {}) | values
    return read_config(sections)


def rows() -> dict:
    random = np.random.default_rng(0)
    tokens = random.integers(0, V, (B, T), dtype=np.int32)
    labels = np.roll(tokens, -1, axis=1)
    labels[:, -1] = IGNORE_INDEX
    labels[random.random((B, T)) < 0.4] = IGNORE_INDEX
    return {"tokens": tokens, "labels": labels, "segments": np.ones((B, T), np.int32)}


def theirs(student, teacher, batch, wanted) -> tuple[float, dict]:
    """The loss of torch and TRL, and the student's gradients as our tree."""
    from trl.experimental.gkd import GKDTrainer

    tokens, labels = torch.tensor(batch["tokens"]), torch.tensor(batch["labels"]).long()
    student.zero_grad()
    logits = student(tokens).logits
    with torch.no_grad():
        shown = teacher(tokens).logits
    own, count = logits, (labels != IGNORE_INDEX).sum()
    if wanted.top_k:
        kept = shown.topk(wanted.top_k, dim=-1)
        shown, own = kept.values, logits.gather(-1, kept.indices)
    beta = {"forward": 0, "reverse": 1}[wanted.divergence]
    loss = wanted.alpha * GKDTrainer.generalized_jsd_loss(
        own, shown, labels, beta, wanted.temperature, num_items_in_batch=count
    )
    entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    loss = loss + (1 - wanted.alpha) * entropy
    loss.backward()
    kept = [parameter.data for parameter in student.parameters()]
    for parameter in student.parameters():
        parameter.data = parameter.grad
    gradients = params_of(student)
    for parameter, data in zip(student.parameters(), kept, strict=True):
        parameter.data = data
    return float(loss.detach()), gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, (1, 1, 1)),
        ({"divergence": "reverse", "temperature": 2.0}, (1, 1, 1)),
        ({"top_k": 5, "temperature": 0.5}, (2, 2, 2)),
        ({"divergence": "reverse", "top_k": 7, "alpha": 0.3}, (1, 2, 2, 2)),
    ],
    ids=str,
)
def test_the_loss_is_that_of_trl(models, settings, sizes, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns of names that may change
    student, teacher, folder = models
    config, model, batch = config_of(folder, distill=settings), model_config(student), rows()
    mesh = make_mesh(*sizes[:3], jax.devices()[: np.prod(sizes)], *sizes[3:])
    objective, known = make_objective(config, model, mesh), teacher_params(config, mesh)
    assert jax.tree.map(jnp.shape, known) == jax.tree.map(jnp.shape, abstract_teacher(config, mesh))
    placed = jax.device_put(batch, shardings_of(abstract_batch(config, mesh)))

    def mean(params, batch, known):
        return objective.loss(params, batch, batch, known)[0] / objective.units(batch)

    with jax.default_matmul_precision("highest"):
        loss, gradients = jax.jit(jax.value_and_grad(mean))(params_of(student), placed, known)
    expected, their_gradients = theirs(student, teacher, batch, config.distill)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, their_gradients)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"distill": {"top_k": 1}}, "distill.top_k is 1; give 2 tokens or more, or 0 for all"),
        ({"distill": {"temperature": 0.0}}, "distill.temperature is 0.0; it must be above 0"),
        ({"distill": {"alpha": 0.0}}, "distill.alpha is 0.0; it must be above 0 and at most 1"),
        ({"distill": {"teacher": ""}}, "distill.teacher is empty: name a model"),
        ({"preference": {"loss": "orpo"}}, r"\[distill\] and \[preference\] are both given"),
        ({"model": {"loss": "a:b", "loss_chunk": None}}, "model.loss is 'a:b', which nothing reads with distill"),
        ({"optim": {"z_loss": 1e-4}}, "optim.z_loss is 0.0001, which nothing reads with distill.teacher"),
    ],
    ids=str,
)
def test_what_no_run_could_use_is_refused(models, changes, named):
    with pytest.raises(PunaError, match=named):
        config_of(models[2], **changes)


def test_a_teacher_that_does_not_fit_is_refused(models):
    config, model = config_of(models[2]), model_config(models[0])
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with pytest.raises(PunaError, match="distill.teacher .* has 264 tokens and the model 265"):
        make_objective(config, replace(model, vocab_size=265), mesh)
    with pytest.raises(PunaError, match="data.max_length 256 is beyond the max_position_embeddings 128 of distill"):
        make_objective(config_of(models[2], data={"max_length": 256}), model, mesh)


@pytest.mark.slow
def test_a_run_comes_closer_to_its_teacher_and_resumes(tmp_path, monkeypatch):
    write_tokenizer(tmp_path)
    shape = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    sharp = jax.tree.map(lambda x: x * 4, init_params(shape, jax.random.key(1)))
    save_model(tmp_path / "teacher", shape, sharp, tokenizer=load_tokenizer(tmp_path))
    examples = make_examples(260)
    for name, part in (("train.jsonl", examples[:240]), ("held_out.jsonl", examples[240:])):
        (tmp_path / name).write_text("".join(json.dumps(example) + "\n" for example in part))
    small = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")

    def run(name: str, stop: int | None = None) -> list[dict]:
        config = read_config(
            {
                "model": {"tokenizer": str(tmp_path), "vocab_size": V} | {key: getattr(shape, key) for key in small},
                "data": {
                    "path": str(tmp_path / "train.jsonl"),
                    "eval_path": str(tmp_path / "held_out.jsonl"),
                    "template": "plain",
                    "max_length": 64,
                    "packing": True,
                    "cache_dir": str(tmp_path / "cache"),
                },
                "optim": {"learning_rate": 1e-2, "lr_scheduler_type": "constant"},
                "distill": {"teacher": str(tmp_path / "teacher")},
                "mesh": {"fsdp": 2, "data": 4},
                "run": {"output_dir": str(tmp_path / name), "max_steps": 8, "eval_steps": 4, "batch_size": 8},
            }
        )
        monkeypatch.setattr(distributed, "reached_preemption", lambda step: step == stop)
        loop.train(config)
        timing = ("tokens_per_second_per_device", "peak_memory_gib")
        return [{k: v for k, v in line.items() if k not in timing} for line in read_metrics(tmp_path / name)]

    lines = run("whole")
    assert lines[-1]["eval_loss"] < 0.8 * lines[0]["eval_loss"]
    with pytest.raises(SystemExit):
        run("parts", stop=3)
    assert run("parts") == lines
    save_model(tmp_path / "teacher", shape, init_params(shape, jax.random.key(1)), overwrite=True)
    with pytest.raises(PunaError, match="holds a run on another teacher: the weights that distill.teacher"):
        run("parts")
