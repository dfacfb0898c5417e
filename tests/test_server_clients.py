"""The clients that people have, against `infer serve`; lm-eval's numbers over HTTP, in process and by transformers."""

import json

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from serving import Server, chat_model

from infer.engine import Engine
from infer.evaluation import Evaluated, for_lm_eval
from infer.load import find_model, load
from model.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
KEY = "correct horse"
LENGTH = 100  # tokens that lm-eval may use: fewer than the server's, so that it has to cut


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A chat model whose tokenizer.json begins every text with the beginning-of-text token, as Llama 3's does."""
    folder = chat_model(tmp_path_factory.mktemp("clients"))
    path, begin = folder / "tokenizer.json", "<|begin_of_text|>"
    bos = load_tokenizer(folder).bos_id
    text = {"Sequence": {"id": "A", "type_id": 0}}
    first = {"SpecialToken": {"id": begin, "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {begin: {"id": begin, "ids": [bos], "tokens": [begin]}},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processor}))
    return folder


@pytest.fixture(scope="module")
def server(model):
    with Server(model, "--rows", 2, "--context", 256, "--api-key", KEY) as server:
        yield server


# --- lm-eval

CHOICE = {
    "task": "puna_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": " ",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = {
    "task": "puna_rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
}
UNTIL = {
    "task": "puna_until",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{text}}",
    "generation_kwargs": {"until": ["e", "\n\n", "zq", "####", "Question:"], "max_gen_toks": 24, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
WORDS = "the high grassland where a curious llama grazes is cold and its name is puna".split()
DOCS = [
    {
        "question": " ".join(WORDS[i % 5 :] * (1 + 7 * (i == 3))) + ("  " if i == 2 else "?"),  # one is cut
        "choices": [WORDS[i], f"{WORDS[i + 1]} {WORDS[i + 2]}", "Yes, I am. É", "4"],
        "label": i % 4,
        "text": " ".join(WORDS[i:] * (1 + i % 3 * 4)) + " \n\u00e9",
    }
    for i in range(8)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The three kinds of task that lm-eval has, over files."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    data = {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache")}
    for task in (CHOICE, ROLLING, UNTIL):
        about = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "metadata": {"version": 1}}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task | about))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(lm, tasks, *names):
    """What lm-eval found: the metrics of each task, and every answer of the model."""
    found = simple_evaluate(lm, tasks=list(names), task_manager=tasks, bootstrap_iters=0, log_samples=True)
    answers = {}
    for name, samples in found["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        answers[name] = [sample["resps"] for sample in samples]
    return found["results"], answers


@pytest.fixture(scope="module")
def engine(model):
    source = find_model(str(model))
    config, params = load(source)
    return Engine(params, config, source.tokenizer, rows=3, length=LENGTH, queue=5), source


def over_http(server, model, bos, room):
    """lm-eval's own client: with the server's tokenizer it begins no text, with transformers' it can."""
    theirs = {"tokenizer": str(model), "tokenizer_backend": "huggingface", "add_bos_token": True} if bos else {}
    return LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="model", auth_token=KEY, max_length=room, batch_size=3,
        header={"Authorization": f"Bearer {KEY}"}, num_concurrent=1 if bos else 4, **theirs,
    )  # fmt: skip


@pytest.mark.parametrize("bos", [True, False])
def test_lm_eval_finds_the_same_over_http_in_process_and_with_transformers(server, model, engine, tasks, bos):
    engine, source = engine
    names = [task["task"] for task in (CHOICE, ROLLING, UNTIL)]
    ours = evaluated(for_lm_eval(Evaluated(engine, source.tokenizer, add_bos=bos)), tasks, *names)
    hf = HFLM(pretrained=str(model), device="cpu", batch_size=4, max_length=LENGTH, add_bos_token=bos, dtype="float32")
    theirs = evaluated(hf, tasks, *names)
    assert_close(ours, theirs)
    # It keeps a token for the text that the API must make; where it scores, another one.
    scored = evaluated(over_http(server, model, bos, LENGTH + 2), tasks, *names[:2])
    made = evaluated(over_http(server, model, bos, LENGTH + 1), tasks, names[2])
    assert_close((scored[0] | made[0], scored[1] | made[1]), theirs)


def assert_close(ours, theirs):
    """Numbers to 1e-4, all else exactly."""
    assert type(ours) is type(theirs) and (not isinstance(ours, dict | list | tuple) or len(ours) == len(theirs))
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_close(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    else:
        assert ours == theirs
