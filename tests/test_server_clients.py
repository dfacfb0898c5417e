"""The clients that people have, against `infer serve`; lm-eval's numbers over HTTP, in process and by transformers."""

import asyncio
import json
import shutil
import subprocess
import sys
from typing import Literal

import httpx
import pytest
import schemathesis
import yaml
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from serving import WEATHER, Server, chat_model
from test_server import Offline
from typer.testing import CliRunner

from infer.__main__ import app
from infer.engine import Engine
from infer.evaluation import Evaluated, for_lm_eval
from infer.load import find_model, load
from infer.openapi import document
from infer.sample import Sampling
from model.chat import get_template
from model.errors import PunaError

pytestmark = pytest.mark.slow
KEY = "correct horse"
LENGTH = 100  # tokens that lm-eval may use: fewer than the server's, so that it has to cut


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A chat model whose tokenizer.json begins every text with the beginning-of-text token, as Llama 3's does."""
    return chat_model(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def server(model):
    with pytest.MonkeyPatch.context() as patch:  # compiling without LLVM's optimizations, as in this process
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        with Server(model, "--rows", 2, "--api-key", KEY) as server:
            yield server


@pytest.fixture(scope="module")
def offline(model):
    return Offline(model)


ASKED = "Hi there, what is 2+2?"
TURN = [{"role": "user", "content": ASKED}]
LONGER = {"max_tokens": 150, "temperature": 1}  # a random model writes much space into JSON


@pytest.fixture
def http():
    with httpx.Client(timeout=60) as http:
        yield http


# --- langchain


def langchain_chat(server, **settings):
    asked = {"model": "model", "temperature": 0, "max_tokens": 12} | settings
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key=KEY, **asked)


@pytest.fixture
def langchain(server, http):
    return langchain_chat(server, http_client=http)


def test_langchain_talks_streams_and_counts(server, langchain, offline):
    expected = offline.chat(TURN, 12, Sampling())
    whole = langchain.invoke(ASKED)
    assert whole.content == expected and whole.response_metadata["finish_reason"] == "length"
    pieces = list(langchain.stream(ASKED, stream_usage=True))
    joined = sum(pieces[1:], pieces[0])
    assert joined.content == expected and len(pieces) > 3
    assert joined.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]
    assert joined.usage_metadata["output_tokens"] == 12

    async def several():
        async with httpx.AsyncClient() as http:
            chat = langchain_chat(server, http_async_client=http)
            return await asyncio.gather(*(chat.ainvoke(ASKED) for _ in range(5)))

    assert [reply.content for reply in asyncio.run(several())] == [expected] * 5


def test_langchain_calls_a_tool_and_reads_its_answer(langchain):
    asking = langchain.bind_tools([WEATHER], tool_choice="weather", parallel_tool_calls=False, strict=True)
    asking = asking.bind(**LONGER, seed=1)
    reply = asking.invoke(ASKED)
    (call,) = reply.tool_calls
    assert call["name"] == "weather" and call["args"]["place"] in ("puna", "yunga")
    pieces = list(asking.stream(ASKED))
    assert sum(pieces[1:], pieces[0]).tool_calls[0]["args"] == call["args"]
    turns = [HumanMessage(ASKED), reply, ToolMessage("cold", tool_call_id=call["id"])]
    assert len(langchain.bind_tools([WEATHER]).invoke(turns).content) > 0


def test_langchain_gets_the_form_it_asks_for(langchain):
    schema = {"title": "Weather", "description": "Of a place."} | WEATHER["function"]["parameters"]
    for method in ("json_schema", "function_calling"):
        found = langchain.with_structured_output(schema, method=method, strict=True).invoke(ASKED, **LONGER, seed=1)
        assert found.keys() == {"place", "days"} and 1 <= found["days"] <= 9


def test_langchain_embeds(server, http):
    embed = OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key=KEY, model="model", check_embedding_ctx_length=False, http_client=http
    )  # fmt: skip
    first, second = embed.embed_documents([ASKED, "puna"])
    assert embed.embed_query("puna") == pytest.approx(second, abs=1e-5)
    assert sum(x * x for x in first) == pytest.approx(1, abs=1e-5)


# --- llama-index


def llama_index(server, http, **settings):
    """Its client for servers that speak OpenAI's API."""
    asked = {"model": "model", "temperature": 0, "max_tokens": 12} | settings
    return OpenAILike(
        api_base=f"{server.url}/v1", api_key=KEY, context_window=512, max_retries=0, http_client=http, **asked
    )  # fmt: skip


def test_llama_index_talks_streams_and_completes(server, http, offline):
    chat, turns = llama_index(server, http, is_chat_model=True), [ChatMessage(role="user", content=ASKED)]
    expected = offline.chat(TURN, 12, Sampling())
    assert chat.chat(turns).message.content == expected
    assert [piece.message.content for piece in chat.stream_chat(turns)][-1] == expected
    plain, expected = llama_index(server, http), offline.completion(ASKED, 12, Sampling())
    assert plain.complete(ASKED).text == expected
    assert [piece.text for piece in plain.stream_complete(ASKED)][-1] == expected


def test_llama_index_calls_a_tool(server, http):
    def stay(days: Literal[1, 2, 3]) -> str:
        return f"{days} days on the puna"

    llm = llama_index(server, http, is_chat_model=True, is_function_calling_model=True, **LONGER)
    tool = FunctionTool.from_defaults(stay, description="Go.")
    reply = llm.chat_with_tools([tool], user_msg=ASKED, tool_required=True, seed=1)
    (call,) = llm.get_tool_calls_from_response(reply)
    assert call.tool_name == "stay" and tool(**call.tool_kwargs).content in [f"{n} days on the puna" for n in (1, 2, 3)]


# --- curl


def curl(server, path, *options, key=KEY):
    """Its output and the status of the answer."""
    command = ["curl", "-sS", "--max-time", "60", "-w", "\n%{http_code}", f"{server.url}{path}", *options]
    command += ["-H", f"Authorization: Bearer {key}"]
    made = subprocess.run(command, capture_output=True, check=True, text=True)
    text, _, status = made.stdout.rpartition("\n")
    return text, int(status)


def test_curl(server, offline, tmp_path):
    body = {"messages": TURN, "max_tokens": 12, "temperature": 0}
    expected = offline.chat(TURN, 12, Sampling())
    json_body = ("-H", "Content-Type: application/json", "-d")
    text, status = curl(server, "/v1/chat/completions", *json_body, json.dumps(body))
    assert status == 200 and json.loads(text)["choices"][0]["message"]["content"] == expected
    text, status = curl(server, "/v1/chat/completions", "-N", *json_body, json.dumps(body | {"stream": True}))
    *events, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert status == 200 and done == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events) == expected
    text, status = curl(server, "/v1/chat/completions", *json_body, json.dumps(body), key="wrong")
    assert status == 401 and json.loads(text)["error"]["code"] == "invalid_api_key"
    # What curl does by itself with more than a megabyte: it asks first whether it may send.
    (tmp_path / "body").write_text(json.dumps({"prompt": "puna " * 500_000}))
    text, status = curl(server, "/v1/completions", "--data-binary", f"@{tmp_path / 'body'}")
    assert status == 400 and json.loads(text)["error"]["code"] == "context_length_exceeded"
    (tmp_path / "body").write_bytes(b" " * 17 * 2**20)
    text, status = curl(server, "/v1/completions", "--data-binary", f"@{tmp_path / 'body'}")
    assert status == 413 and json.loads(text)["error"]["code"] == "body_too_large"
    (tmp_path / "body").write_text(json.dumps(body))
    chunked = ("-H", "Transfer-Encoding: chunked", "--data-binary", f"@{tmp_path / 'body'}")
    text, status = curl(server, "/v1/chat/completions", *chunked)
    assert status == 200 and json.loads(text)["choices"][0]["message"]["content"] == expected
    assert curl(server, "/v1/completions")[1] == 405 and curl(server, "/v2")[1] == 404


# --- schemathesis

SCHEMA = schemathesis.openapi.from_dict(
    document(),
    config=schemathesis.Config.from_dict({"seed": 1, "generation": {"max-examples": 10, "deterministic": True}}),
)


@SCHEMA.parametrize()
def test_the_server_is_as_its_document_says(server, case):
    body = case.body
    if "chat" in case.path and isinstance(body, dict):
        if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
            body["max_tokens"] = 4  # the answer would fill the context
    # That a request suits the document does not say that this model has its tokens, or room for it.
    unsaid = [schemathesis.checks.positive_data_acceptance]
    case.call_and_validate(
        base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=unsaid
    )  # fmt: skip


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
def tasks_folder(tmp_path_factory):
    """The three kinds of task that lm-eval has, over files."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    data = {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache")}
    for task in (CHOICE, ROLLING, UNTIL):
        about = {
            "dataset_path": "json",
            "dataset_kwargs": data,
            "test_split": "test",
            "fewshot_split": "test",
            "metadata": {"version": 1},
        }
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task | about))
    return folder


@pytest.fixture(scope="module")
def tasks(tasks_folder):
    return TaskManager(include_path=str(tasks_folder), include_defaults=False)


def evaluated(lm, tasks, *names, **settings):
    """What lm-eval found: the metrics of each task, and every answer of the model."""
    found = simple_evaluate(lm, tasks=list(names), task_manager=tasks, bootstrap_iters=0, log_samples=True, **settings)
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


def transformers_own(model, **settings):
    return HFLM(pretrained=str(model), device="cpu", batch_size=4, max_length=LENGTH, dtype="float32", **settings)


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
    theirs = evaluated(transformers_own(model, add_bos_token=bos), tasks, *names)
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


def test_the_command_finds_the_same_of_a_model_and_of_its_server(server, model, tasks, tasks_folder, tmp_path):
    asked = [f"Which word?\nA. {doc['question']}\nB. {WORDS[i]}\nC. 2\nD. 4\nAnswer:" for i, doc in enumerate(DOCS)]
    records = [{"subject": "puna", "input": text, "output": "A"} for text in asked]
    (tmp_path / "mmlu.json").write_text(json.dumps(records))
    ours, theirs = f"ours={model}", f"theirs={server.url}"

    def results(task, *settings):
        command = ["eval", ours, theirs, "--api-key", KEY, "--output", str(tmp_path / task), "--task", task, *settings]
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0, (found.output, found.exception)
        return json.loads((tmp_path / task / "results.json").read_text())["models"]

    results("mmlu", "--shots", "0", "--data", str(tmp_path / "mmlu.json"))
    first, second = ((tmp_path / "mmlu" / f"{name}.jsonl").read_text() for name in ("ours", "theirs"))
    assert first == second and len(set(first.splitlines())) > 1
    found = results(CHOICE["task"], "--include", str(tasks_folder), "--context", str(LENGTH))
    expected = evaluated(transformers_own(model), tasks, CHOICE["task"])[0][CHOICE["task"]]
    assert found["ours"]["scores"]["acc"] == expected["acc,none"] and found["ours"]["questions"] == len(DOCS)
    assert found["theirs"]["scores"] == pytest.approx(found["ours"]["scores"], abs=1e-9)
    theirs = f"named={server.url}"
    given = results(CHOICE["task"], "--include", str(tasks_folder), "--context", str(LENGTH), "--tokenizer", str(model))
    assert given["named"]["scores"] == pytest.approx(found["ours"]["scores"], abs=1e-9)


def test_conversations_and_special_tokens_are_those_of_transformers(model, engine, tasks):
    engine, source = engine
    template = get_template("chat_template", source.tokenizer)
    ours, theirs = for_lm_eval(Evaluated(engine, source.tokenizer, template)), transformers_own(model)
    turns = [*TURN, {"role": "assistant", "content": "It is 4. "}]
    texts = [theirs.apply_chat_template(turns[:1]), theirs.apply_chat_template(turns, add_generation_prompt=False)]
    assert [ours.apply_chat_template(turns[:1]), ours.apply_chat_template(turns, False)] == texts
    for text in (*texts, "", "a<|im_end|>", "<|begin_of_text|><|begin_of_text|>a", "<|im_start", " \n"):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special)
    asked = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 1}
    found, expected = (evaluated(lm, tasks, CHOICE["task"], UNTIL["task"], **asked) for lm in (ours, theirs))
    assert_close(found, expected)


def test_a_trained_model_over_sentencepiece_is_scored_as_transformers_scores_it(data_dir, tmp_path):
    shutil.copytree(data_dir / "stories260k-derived" / "hf_sharded", tmp_path / "model")
    shutil.copy(data_dir / "stories260k" / "tokenizer.model", tmp_path / "model")
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(named | {"add_bos_token": True}))
    source = find_model(str(tmp_path / "model"))
    config, params = load(source)
    engine = Engine(params, config, source.tokenizer, rows=2, length=LENGTH)
    ours, theirs = for_lm_eval(Evaluated(engine, source.tokenizer)), transformers_own(tmp_path / "model")

    def asked(*arguments):
        return [Instance(request_type="", doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]

    pairs = asked(
        ("Once upon a time", ", there was a little"), ("", "Lily and Tom"), ("He said ", "that Lily was sad.")
    )
    assert_close(ours.loglikelihood(pairs), theirs.loglikelihood(pairs))
    story = asked(("Once upon a time, there was a little girl. She was sad.\n" * 20,))
    assert_close(ours.loglikelihood_rolling(story), theirs.loglikelihood_rolling(story))
    texts = asked(
        ("Once upon a time", {"until": ["\n", "."], "max_gen_toks": 30}), ("Lily", {"until": [], "max_gen_toks": 40})
    )
    made = ours.generate_until(texts)
    assert made == theirs.generate_until(texts) and all(len(text) > 10 for text in made)


def test_a_special_token_ends_a_text_where_a_task_says_so(engine):
    engine, source = engine
    evaluated = Evaluated(engine, source.tokenizer, seed=3)
    name = {id: text for text, id in source.tokenizer.special_tokens.items()}
    bias = tuple((id, 5.0) for id in name if id != source.tokenizer.eos_id)
    given = {"max_gen_toks": 60, "temperature": 1.0, "logit_bias": bias}
    (whole,) = evaluated.texts([("Hello", given)])
    (short,) = evaluated.texts([("Hello", given | {"until": ["<|im_end|>", "<|eot_id|>", "<s>", "</s>"]})])
    again, other = evaluated.texts([("Hello", given), ("Hello", given)])
    assert whole == again != other and len(short) < len(whole) and whole.startswith(short)


def test_what_cannot_be_evaluated_is_named(engine, monkeypatch):
    engine, source = engine
    evaluated = Evaluated(engine, source.tokenizer)
    for wrong, word in (
        (lambda: evaluated.texts([("a", {"max_gen_toks": 4, "num_beams": 4})]), "num_beams"),
        (lambda: evaluated.texts([("a", {"max_gen_toks": LENGTH})]), f"max_gen_toks is {LENGTH}"),
        (lambda: evaluated.scores([([], [1])]), "a context has 0 tokens"),
        (lambda: evaluated.scores([([1], [1] * (LENGTH + 1))]), f"a continuation may have {LENGTH}"),
        (lambda: evaluated.render(TURN), "--template"),
    ):
        with pytest.raises(PunaError, match=word):
            wrong()
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(PunaError, match=r"pip install 'puna\[eval\]'"):
        for_lm_eval(evaluated)
