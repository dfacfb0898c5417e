"""`batch` answers each line as `generate` would, in order, and a job that was killed at any moment ends with the same
bytes as one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizer import CHATML, small_tokenizer
from typer.testing import CliRunner

import infer.batch
import infer.batch_output
from cli.command import Interrupted
from convert import load_model, save_model
from infer.__main__ import app
from infer.batch import Answers, Files, Line, decode, fingerprint, parse_shard, read_lines, survey
from infer.batch_kinds import KINDS, Settings, check_record, kind_of, line_seed
from infer.batch_openai import BadBody, read_body
from infer.batch_output import Output
from infer.engine import Engine
from infer.generate import TextStream, generate
from infer.sample import Sampling
from model import LlamaConfig, init_params
from model.chat import TEMPLATES, encode_prompt, get_template, stop_ids
from model.errors import PunaError
from model.layout import per_layer
from model.tokenizer import load_tokenizer

GREEDY = Sampling()
ROOT = Path(__file__).parent.parent
WORDS = ["llama", "puna", "high", "grass", "why", "two", "羊驼", "naïve", "is", "the"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer, whose texts end now and then."""
    place = small_tokenizer(tmp_path_factory.mktemp("tokenizer"), CHATML)
    tokenizer = load_tokenizer(place)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.4,
        bos_token_id=tokenizer.bos_id, eos_token_id=(tokenizer.eos_id,),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(folder, config, init_params(config, jax.random.key(1)), tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    config, params = load_model(folder)
    return config, per_layer(params), load_tokenizer(folder)


@pytest.fixture
def run(folder, tmp_path):
    """Run `python -m infer batch` in this process, on lines that are objects, text or bytes; the answers' objects."""

    def run(lines, *flags, out="out.jsonl", code=0):
        (tmp_path / "in.jsonl").write_bytes(as_bytes(lines))
        arguments = ["batch", folder, tmp_path / "in.jsonl", tmp_path / out, *flags]
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == code, result.output
        run.said = result
        return read(tmp_path / out)

    return run


def as_bytes(lines):
    """One line each: bytes and text stand as they are, and all else as JSON."""
    made = [line if isinstance(line, bytes | str) else json.dumps(line, ensure_ascii=False) for line in lines]
    return b"".join(line if isinstance(line, bytes) else f"{line}\n".encode() for line in made)


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else None


def offline(loaded, prompt, new, sampling=GREEDY, eos=(), stop=()):
    """The text after `prompt` (ids), and what ended it, by `generate`."""
    config, params, tokenizer = loaded
    text, shown, count, last = TextStream(tokenizer, prompt, stop), "", 0, None
    for (tokens,) in generate(params, config, [prompt], new, [sampling], eos, vocab_limit=tokenizer.vocab_size):
        shown, count = shown + text.push([token for token in tokens if token not in eos]), count + len(tokens)
        last = tokens[-1] if tokens else last
    return shown + text.flush(), "stop" if text.stopped or last in eos else "length"


def chat(loaded, template, *texts):
    """Ids of a conversation whose turns are `texts`, the user's first, and what ends an answer: tokens and texts."""
    tokenizer = loaded[2]
    template = get_template(template, tokenizer)
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return (
        encode_prompt(messages, template, tokenizer),
        {"eos": (*stop_ids(template, tokenizer), *loaded[0].eos_token_id), "stop": template.stop},
    )


def prompts(count, seed=0):
    rng = random.Random(seed)
    return [{"prompt": " ".join(rng.choices(WORDS, k=rng.randrange(1, 12))), "row": i} for i in range(count)]


# --- texts and forms


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--temperature", "0.9", "--top-p", "0.95", "--seed", "3")], ids=str)
def test_texts_are_those_of_generate(run, loaded, flags):
    lines = prompts(20)
    answers = run(lines, "--max-new-tokens", "16", "--rows", "4", *flags)
    expected = []
    for number, line in enumerate(lines, 1):
        sampling = Sampling(0.9, top_p=0.95, seed=line_seed(3, number)) if flags else Sampling()
        ids = loaded[2].encode(line["prompt"], add_bos=True)
        text, finish = offline(loaded, ids, 16, sampling, loaded[0].eos_token_id)
        expected.append({**line, "completion": text, "finish_reason": finish})
    assert answers == expected
    assert len({answer["completion"] for answer in answers}) > 10


@pytest.mark.slow
def test_prompts_with_a_template_are_messages(run, loaded):
    (answer,) = run([{"prompt": "why"}], "--max-new-tokens", "12", "--template", "alpaca")
    ids, ends = chat(loaded, "alpaca", "why")
    assert answer["completion"] == offline(loaded, ids, 12, **ends)[0]


@pytest.mark.slow
def test_wizardlm(run, loaded):
    """Their sampling; and where the user gives no length, the answer may go on to the end of the context."""
    (answer,) = run([{"idx": 7, "Skill": "Math", "Instruction": "Name the grassland."}], "--seed", "5")
    ids, ends = chat(loaded, "wizardlm", "Name the grassland.")
    sampling = Sampling(1.0, top_k=40, top_p=0.9, seed=line_seed(5, 1))
    text, _ = offline(loaded, ids, 256 - len(ids), sampling, ends["eos"], ["### Response:"])
    assert answer == {"id": 7, "instruction": "Name the grassland.", "wizardlm": text.strip()}
    assert text


@pytest.mark.slow
def test_vicuna(run, loaded):
    """With the model's own template, since it brings one."""
    lines = [{"question_id": i, "text": f"why {i}?", "category": "generic"} for i in (3, 4)]
    answers = run(lines, "--max-new-tokens", "12")
    for number, (line, answer) in enumerate(zip(lines, answers, strict=True), 1):
        ids, ends = chat(loaded, "chat_template", line["text"])
        text, _ = offline(loaded, ids, 12, Sampling(0.7, seed=line_seed(0, number)), **ends)
        assert answer.pop("answer_id")
        assert answer == {
            "question_id": line["question_id"], "text": text.strip(), "model_id": "tiny", "metadata": {},
        }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("flags, temperature", [((), {"writing": 0.7, "math": 0.0}), (("--temperature", "0.2"), {})])
def test_mt_bench_s_second_turn_sees_the_first_answer(run, loaded, flags, temperature):
    lines = [{"question_id": i, "category": c, "turns": ["why?", "sure?"]} for i, c in ((81, "writing"), (82, "math"))]
    answers = run(lines, "--max-new-tokens", "12", "--template", "vicuna_v1.1", *flags)
    for number, (line, answer) in enumerate(zip(lines, answers, strict=True), 1):
        sampling = Sampling(temperature.get(line["category"], 0.2), seed=line_seed(0, number))
        turns = []
        for texts in (["why?"], ["why?", None, "sure?"]):
            ids, ends = chat(loaded, "vicuna_v1.1", *(text or turns[0] for text in texts))
            turns.append(offline(loaded, ids, 12, sampling, **ends)[0].strip())
        assert answer.pop("answer_id") and turns[0]
        choices = [{"index": 0, "turns": turns}]
        assert answer == {"question_id": line["question_id"], "model_id": "tiny", "choices": choices}


def openai(custom_id, url, **body):
    return {"custom_id": custom_id, "method": "POST", "url": f"/v1/{url}", "body": body}


@pytest.mark.slow
def test_openai(run, loaded):
    messages = [{"role": "user", "content": "why"}]
    answers = run(
        [
            openai("a", "chat/completions", model="gpt", messages=messages, seed=4, top_k=9, max_tokens=10),
            openai("b", "completions", prompt="the llama", temperature=0),
            openai("c", "completions", prompt="the llama", tools=[]),
            openai("d", "completions", prompt="the llama", max_tokens=300),
            openai("e", "completions", prompt="the llama", temperature=0, logit_bias={"5": 100}, max_tokens=3),
        ]
    )
    ids, ends = chat(loaded, "chat_template", "why")
    said, finish = offline(loaded, ids, 10, Sampling(1.0, top_k=9, seed=4), **ends)
    plain = loaded[2].encode("the llama", add_bos=True)
    text, plain_finish = offline(loaded, plain, 16, eos=loaded[0].eos_token_id)
    assert [answer["custom_id"] for answer in answers] == list("abcde")
    assert len({answer["id"] for answer in answers}) == 5 and all(answer["error"] is None for answer in answers)
    one, two, three, four, five = (answer["response"] for answer in answers)
    assert [one["status_code"], two["status_code"], three["status_code"], four["status_code"]] == [200, 200, 400, 400]
    assert one["body"]["object"] == "chat.completion"
    assert one["body"]["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": said}, "logprobs": None, "finish_reason": finish}
    ]
    usage = one["body"]["usage"]
    assert usage["prompt_tokens"] == len(ids) and 1 <= usage["completion_tokens"] <= 10
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert two["body"]["object"] == "text_completion"
    assert two["body"]["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": plain_finish}]
    assert three["body"]["error"] == {
        "message": "tools: not supported here",
        "type": "invalid_request_error",
        "param": "tools",
        "code": None,
    }
    assert "the answer up to 300, together more than the context of 256" in four["body"]["error"]["message"]
    assert five["body"]["choices"][0]["text"] == loaded[2].decode([5, 5, 5])


@pytest.mark.parametrize(
    "body, param",
    [
        ({"prompt": "a", "temperature": "1"}, "temperature"),
        ({"prompt": "a", "temperature": True}, "temperature"),
        ({"prompt": "a", "temperature": 10**400}, "temperature"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "n": 2}, "n"),
        ({"prompt": "a", "stream": True}, "stream"),
        ({"prompt": "a", "stop": ["x", 1]}, "stop"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logprobs": 1}, "logprobs"),
        ({"prompt": "a", "max_completion_tokens": 1}, "max_completion_tokens"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, "messages"),
        ([], None),
    ],
    ids=str,
)
def test_what_a_body_may_not_say_is_named(body, param):
    with pytest.raises(BadBody) as error:
        read_body("/v1/completions" if "prompt" in body else "/v1/chat/completions", body)
    assert error.value.param == param


@pytest.mark.parametrize(
    "line, key",
    [
        ({"prompt": "a", "max_tokens": 3}, "max_tokens"),
        ({"prompt": "a", "temperature": 5, "row": 1}, "temperature"),
        ({"prompt": "a", "stop": ["b"]}, "stop"),
        ({"prompt": "a", "completion": "the reference"}, "completion"),
        ({"idx": 1, "Instruction": "a", "top_p": 0.5}, "top_p"),
    ],
)
def test_a_line_whose_keys_would_act_or_be_lost_is_rejected(line, key):
    kind = kind_of(line)
    assert kind is not None and kind.name == ("prompt" if "prompt" in line else "wizardlm")
    with pytest.raises(PunaError, match=f"'{key}' is a (setting|key)"):
        check_record(line, kind)


def test_a_body_is_read_as_openai_means_it():
    body = read_body(
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "developer", "content": "be brief", "name": None},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            ],
            "stop": "x", "seed": -1, "top_k": -1, "temperature": None, "user": "me", "max_tokens": 3,
            "max_completion_tokens": 4, "n": 1, "logit_bias": {"5": 2},
        },
    )  # fmt: skip
    assert body.messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]
    assert (body.stop, body.max_new_tokens) == (("x",), 4)
    assert body.sampling == {"seed": 2**63 - 1, "top_k": 0, "logit_bias": ((5, 2.0),)}


def test_the_published_questions_are_of_their_kinds(data_dir):
    for name, kind, lines in (
        ("wizardlm/WizardLM_testset.jsonl", "wizardlm", 218),
        ("vicuna/mt_bench_question.jsonl", "mt_bench", 80),
        ("vicuna/vicuna_question.jsonl", "mt_bench", 80),  # FastChat's newer form: one turn
    ):
        found = survey(data_dir / name)
        assert (found.kind.name, found.told_by, found.lines, found.doubled) == (kind, 1, lines, {})


# --- bad lines


ODD = [
    b"\xef\xbb\xbf" + '{"prompt": "羊驼 naïve", "é": "ü"}\r\n'.encode(),
    b"\n",
    b"nothing\n",
    b'{"prompt": "\xff"}\n',
    b'{"prompt": "\\ud800"}\n',
    b'{"prompt": NaN}\n',
    b'["prompt"]\r\n',
    b'{"text": "a"}\n',
    b'{"prompt": 5}\n',
    b'{"prompt": "' + b"long " * 300 + b'"}\n',
    b"   \r\n",
    b'{"prompt": "last, without a newline"}',
]
REASONS = {
    3: "is not valid JSON: Expecting value at column 1",
    4: "is not UTF-8: byte 0xff at byte 12",
    5: "holds the lone surrogate '\\ud800', which is no text",
    6: "is not valid JSON: NaN is no number of JSON",
    7: 'expected an object, got ["prompt"]',
    8: "key 'prompt' is missing: a line of kind prompt has prompt",
    9: "'prompt' is 5: give text",
    10: "the prompt has N tokens and the answer up to 8, together more than the context of 256: shorten the prompt, or "
    "give a smaller --max-new-tokens or a larger --context",
}


@pytest.mark.slow
def test_bad_lines_are_rejected_with_reasons_and_stop_nothing(run, loaded, tmp_path):
    answers = run(ODD, "--max-new-tokens", "8")
    assert [answer["prompt"] for answer in answers] == ["羊驼 naïve", "last, without a newline"]
    assert answers[0]["é"] == "ü"
    rejects = read(tmp_path / "out.rejects.jsonl")
    tokens = len(loaded[2].encode("long " * 300, add_bos=True))
    assert {int(line["where"].split(":")[-1]): line["reason"] for line in rejects} == {
        number: reason.replace("N tokens", f"{tokens} tokens") for number, reason in REASONS.items()
    }
    assert [line["line"] for line in rejects[:2]] == ["nothing", '{"prompt": "�"}']
    assert rejects[0]["where"] == f"{tmp_path / 'in.jsonl'}:3"
    assert "2 answered, 8 rejected" in run.said.stdout
    assert f"{tmp_path / 'in.jsonl'}: 10 lines of kind prompt, as line 1 tells\n" == run.said.stderr.splitlines(True)[0]


def test_an_id_that_comes_twice_is_rejected_where_it_comes_again(tmp_path):
    lines = [{"idx": idx, "Instruction": "a"} for idx in (1, 2, "1", 1, 3, 1, 2)]
    lines[1:1] = [{"idx": 3, "Instruction": 5}]  # a bad line, which takes no id
    (tmp_path / "in").write_bytes(as_bytes(lines))
    assert survey(tmp_path / "in").doubled == {5: 1, 7: 1, 8: 3}


@settings(deadline=None)
@given(st.lists(st.integers(0, 6)))
def test_doubled_ids_are_those_that_a_set_finds(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("ids") / "in"
    path.write_bytes(as_bytes([{"idx": idx, "Instruction": "a"} for idx in ids]))
    first, expected = {}, {}
    for number, idx in enumerate(ids, 1):
        if first.setdefault(idx, number) != number:
            expected[number] = first[idx]
    assert survey(path, "wizardlm").doubled == expected


def test_a_pipe_is_no_input(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PunaError, match="pipe is no file, and is read more than once"):
        Files(tmp_path / "pipe", tmp_path / "out").check()


def test_lines_of_no_kind_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "in").write_bytes(b'{"a": 1}\nx\n')
    with pytest.raises(PunaError, match="holds no line of a kind that we know: give kind='openai'"):
        survey(tmp_path / "in")


@pytest.mark.parametrize("text", ["1", "2/2", "-1/2", "0/0", "a/b", "1/2/3"])
def test_a_shard_that_is_none_is_named(text):
    with pytest.raises(PunaError, match=f"--shard {text}: give I/N"):
        parse_shard(text)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--temperature", "-1"], "temperature is -1.0: give a number"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0: give a number from 1 to 255"),
        (["--max-new-tokens", "99", "--context", "99"], "max_new_tokens is 99: give a number from 1 to 98"),
        (["--context", "257"], "--context is 257 and the model's 256"),
        (["--stop", ""], "stop is an empty string"),
        (["--template", "nothing"], "template 'nothing' is unknown"),
        (["--kind", "wizardlm", "--block", "32"], "are of --quantize"),
        (["--rejects", "{}/in.jsonl"], "is or holds .*in.jsonl, which is read"),
        (["--rejects", "{}/out.jsonl"], "is the output too"),
        (["--shard", "2/2"], "--shard 2/2: give I/N"),
    ],
    ids=str,
)
def test_settings_that_no_line_can_be_answered_with_are_refused(run, tmp_path, flags, said):
    with pytest.raises(PunaError, match=said):
        run([{"prompt": "a"}], *(flag.replace("{}", str(tmp_path)) for flag in flags))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_kinds_templates_exist():
    assert {name for kind in KINDS.values() for name in kind.templates} <= {*TEMPLATES, "chat_template"}


@pytest.mark.slow
def test_messages_without_a_template_stop_the_job(loaded, tmp_path):
    config, params, tokenizer = loaded
    bare = Settings("m", tokenizer, None, (), 256)
    answers = Answers(Engine(params, config, tokenizer, rows=2), KINDS["openai"], bare, tmp_path, {})
    line = Line(1, as_bytes([openai("a", "chat/completions", messages=[{"role": "user", "content": "a"}])]))
    with pytest.raises(PunaError, match="name one by --template"):
        list(answers.run([line], 2))


@pytest.mark.slow
def test_few_lines_are_held_at_once_and_the_order_is_kept(loaded, tmp_path, monkeypatch):
    """However long the first takes."""
    monkeypatch.setattr(infer.batch, "WAITING", 4)
    config, params, tokenizer = loaded
    asked = [{"prompt": "a", "custom": i} for i in range(60)]
    taken = 0

    def lines():
        nonlocal taken
        for number, line in enumerate(asked, 1):
            taken = number
            yield Line(number, as_bytes([line]))

    engine = Engine(params, config, tokenizer, rows=2, queue=4)
    answers = Answers(engine, KINDS["prompt"], Settings("m", tokenizer, None, (), 256, max_new_tokens=3), tmp_path, {})
    done, most = [], 0
    for outcome in answers.run(lines(), 2):
        done.append(outcome.value["custom"])
        most = max(most, taken - len(done))
    assert done == list(range(60)) and 0 < most <= 8


# --- a job that goes on


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def kill_at(monkeypatch):
    """`kill_at(k)`: the k-th change of a file from now on is half done or not at all, and none comes after it."""

    def kill_at(k):
        left = k

        def dying(whole, half=None):
            def change(*arguments, **keywords):
                nonlocal left
                left -= 1
                if left == 0 and half is not None:
                    half(*arguments)
                if left == 0:
                    raise Killed
                return whole(*arguments, **keywords) if left > 0 else None

            return change

        output = infer.batch_output
        append, rename = output._append, Path.replace
        patch = monkeypatch.context()
        context = patch.__enter__()
        context.setattr(
            output, "_append", dying(append, lambda file, value: file.write(json.dumps(value)[:5].encode()))
        )
        context.setattr(output, "write_json", dying(output.write_json))
        context.setattr(Path, "replace", dying(rename))
        context.setattr(Path, "unlink", dying(Path.unlink))
        return lambda: (patch.__exit__(None, None, None), left)[1]

    return kill_at


def write_job(folder, outcomes, stop=None, overwrite=False):
    """What `run_job` does with its files, without a model: `outcomes` are true for an answer, false for a reject."""
    folder.mkdir(exist_ok=True)
    with Output(folder / "out", folder / "bad", {"input": "x"}, overwrite) as output:
        if output.complete:
            return
        last = output.resume(range(1, len(outcomes) + 1))
        for number in range(last + 1, (stop or len(outcomes)) + 1):
            if outcomes[number - 1]:
                output.answer({"n": number, "text": "ü" * (number % 3)})
            else:
                output.reject({"where": f"in:{number}", "reason": "r", "line": ""})
        if stop is None:
            output.finish()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


OUTCOMES = [True, False, True, True, False, False, True]


@pytest.mark.parametrize("over", [False, True], ids=["new", "overwriting"])
@pytest.mark.parametrize("outcomes", [OUTCOMES, [not one for one in OUTCOMES], [True] * 3, [False] * 3, []], ids=str)
def test_killed_at_every_write_and_rename_a_job_ends_the_same(tmp_path, kill_at, outcomes, over):
    write_job(tmp_path / "whole", outcomes)
    expected = files_of(tmp_path / "whole")
    assert expected.keys() == {"out"} | ({"bad"} if False in outcomes else set())
    for k in range(1, 100):
        place = tmp_path / str(k)
        if over:
            place.mkdir()
            for name in ("out", "bad"):
                (place / name).write_text("an earlier job's")
        revive = kill_at(k)
        try:
            write_job(place, outcomes, overwrite=over)
        except Killed:
            pass
        if revive() > 0:  # it was done before
            assert files_of(place) == expected
            break
        write_job(place, outcomes, overwrite=over)
        assert files_of(place) == expected, k
    assert k > len(outcomes)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_power_cut_that_takes_the_end_of_a_file_loses_nothing(tmp_path_factory, data):
    """What the disk kept is a beginning of each file; of the rejects at least those before the last whole answer."""
    folder = tmp_path_factory.mktemp("job")
    outcomes = data.draw(st.lists(st.booleans(), min_size=1, max_size=12))
    write_job(folder / "whole", outcomes)
    write_job(folder / "cut", outcomes, stop=data.draw(st.integers(1, len(outcomes))))
    answers, rejects = folder / "cut" / "out.part", folder / "cut" / "bad.part"
    os.truncate(answers, data.draw(st.integers(0, answers.stat().st_size)))
    numbers = [json.loads(line)["n"] for line in answers.read_bytes().splitlines(True) if line.endswith(b"\n")]
    before = outcomes[: numbers[-1] if numbers else 0].count(False)
    least = len(b"".join(rejects.read_bytes().splitlines(True)[:before]))
    os.truncate(rejects, data.draw(st.integers(least, rejects.stat().st_size)))
    write_job(folder / "cut", outcomes)
    assert files_of(folder / "cut") == files_of(folder / "whole")


def test_two_processes_do_not_write_one_output(tmp_path):
    with Output(tmp_path / "out", tmp_path / "bad", {}, False):
        with pytest.raises(PunaError, match="out.part is being written by another process"):
            Output(tmp_path / "out", tmp_path / "bad", {}, False)


def test_a_job_that_failed_before_its_first_line_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), Output(tmp_path / "out", tmp_path / "bad", {"seed": 1}, False):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_job_that_is_stopped_while_it_looks_for_its_place_keeps_all(tmp_path):
    write_job(tmp_path, OUTCOMES, stop=5)
    before = files_of(tmp_path)
    with pytest.raises(Interrupted) as error, Output(tmp_path / "out", tmp_path / "bad", {"input": "x"}, False):
        raise Interrupted("SIGTERM")
    assert files_of(tmp_path) == before
    assert error.value.outcome.endswith("out.part, and the same command goes on from there")


def interrupt(monkeypatch, after):
    """Make the next job end with an error when it has written `after` answers."""
    answer = Output.answer

    def counted(self, value):
        if self.answered == after:
            raise Killed
        answer(self, value)

    context = monkeypatch.context()
    context.__enter__().setattr(Output, "answer", counted)
    return lambda: context.__exit__(None, None, None)


@pytest.mark.slow
def test_a_changed_job_is_refused_by_name_and_a_torn_line_is_cut(run, tmp_path, monkeypatch, folder):
    lines, flags = prompts(12), ["--max-new-tokens", "6", "--temperature", "0.8"]
    expected = run(lines, *flags, out="whole.jsonl")
    going_on = interrupt(monkeypatch, 5)
    with pytest.raises(Killed):
        run(lines, *flags)
    going_on()
    part = tmp_path / "out.jsonl.part"
    assert len(read(part)) == 5
    for changed, named in (
        (["--seed", "1"], "was begun with seed 0, and now it is 1: give the settings it was begun with"),
        (["--temperature", "0.7"], "was begun with temperature 0.8, and now it is 0.7"),
        (["--max-new-tokens", "7"], "was begun with max_new_tokens 6, and now it is 7"),
        (["--template", "alpaca"], 'was begun with template null, and now it is "alpaca"'),
        (["--shard", "0/2"], r"was begun with shard \[0, 1\], and now it is \[0, 2\]"),
        (["--quantize", "int8"], "was begun with quantize"),
        (["--rejects", str(tmp_path / "elsewhere")], "was begun with rejects"),
    ):
        with pytest.raises(PunaError, match=f"{named}.*, or overwrite=True to begin anew"):
            run(lines, *flags, *changed)
    with pytest.raises(PunaError, match="was begun on other lines: the input has changed since"):
        run(lines[:-1], *flags)
    with part.open("ab") as file:
        file.write(part.read_bytes()[:30])
    assert run(lines, *flags, "--rows", "2") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]
    with pytest.raises(PunaError, match="out.jsonl exists: give another destination, or overwrite=True"):
        run(lines, *flags)
    assert run(lines[:3], *flags, "--overwrite") == expected[:3]


@pytest.mark.slow
def test_other_weights_are_refused(tmp_path, folder, loaded):
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    other = tmp_path / "tiny"
    save_model(other, loaded[0], init_params(loaded[0], jax.random.key(2)), tokenizer=loaded[2])
    assert fingerprint(other) != before


@pytest.mark.slow
def test_shards_together_are_the_whole(run, tmp_path):
    lines = [*prompts(11), "bad", {"prompt": 5}, *prompts(4, seed=1)]
    flags = ["--max-new-tokens", "6", "--temperature", "0.9"]
    whole = run(lines, *flags)
    parts = [run(lines, *flags, "--shard", f"{i}/3", out=f"{i}.jsonl") for i in range(3)]
    by_line = sorted(dumped(answer) for part in parts for answer in part)
    assert by_line == sorted(map(dumped, whole))
    assert [answer["row"] for answer in parts[1]] == [1, 4, 7, 10, 0, 3]  # lines 2, 5, ... of those that are good
    rejects = [line for i in range(3) for line in read(tmp_path / f"{i}.rejects.jsonl") or []]
    assert sorted(map(dumped, rejects)) == sorted(map(dumped, read(tmp_path / "out.rejects.jsonl")))


def dumped(value):
    return json.dumps(value, sort_keys=True)


def start(folder, place, out):
    command = [sys.executable, "-m", "infer", "batch", folder, place / "in.jsonl", place / out]
    flags = ["--max-new-tokens", "24", "--temperature", "1.1", "--rows", "4"]
    return subprocess.Popen(
        [*map(str, command), *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(("count", "kills"), [(60, 1), pytest.param(1000, 4, marks=pytest.mark.soak)])
def test_killed_a_job_ends_with_the_same_bytes(folder, tmp_path, count, kills):
    """Processes of the command, killed at random moments, at last asked to stop: each goes on from what it finds."""
    rng = random.Random(count)
    lines = prompts(count)
    for number in rng.sample(range(count), count // 20):
        lines[number] = rng.choice(["torn {", {"prompt": None}, {"prompt": "long " * 300}])
    (tmp_path / "in.jsonl").write_bytes(as_bytes(lines))
    whole = start(folder, tmp_path, "whole.jsonl")
    _, said = whole.communicate()
    assert whole.returncode == 0, said
    size, part = (tmp_path / "whole.jsonl").stat().st_size, tmp_path / "out.jsonl.part"
    ends = sorted(rng.randrange(1, size) for _ in range(kills + 1))
    for number, (kind, end) in enumerate(zip([signal.SIGKILL] * kills + [signal.SIGTERM], ends, strict=True)):
        process = start(folder, tmp_path, "out.jsonl")
        while process.poll() is None and (not part.exists() or part.stat().st_size < end):
            try:
                process.wait(timeout=0.002)
            except subprocess.TimeoutExpired:
                pass
        process.send_signal(kind)
        _, said = process.communicate()
        assert process.returncode == (143 if kind == signal.SIGTERM else -signal.SIGKILL), (number, said)
    assert f"interrupted by SIGTERM: what is done is in {part}, and the same command goes on from there" in said
    process = start(folder, tmp_path, "out.jsonl")
    output, said = process.communicate()
    assert process.returncode == 0, said
    for name in ("{}.jsonl", "{}.rejects.jsonl"):
        assert (tmp_path / name.format("out")).read_bytes() == (tmp_path / name.format("whole")).read_bytes()
    assert f"{count - count // 20} answered, {count // 20} rejected" in output
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.slow
def test_the_tasks_of_a_slurm_array_answer_the_whole(folder, run, tmp_path):
    """Tasks 5 and 6 of an array, as Slurm names them; one that is done ends at once."""
    lines, flags = prompts(10), ["--max-new-tokens", "6"]
    whole = run(lines, *flags)
    command = ["bash", "examples/batch_slurm.sh", folder, tmp_path / "in.jsonl", tmp_path / "answers", *flags]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for task in ("5", "6", "6"):
        array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "2"}
        environment = os.environ | array | {"PATH": path}
        subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=True, capture_output=True)
    parts = [read(path) for path in sorted((tmp_path / "answers").glob("*.answers.jsonl"))]
    assert [parts[i % 2][i // 2] for i in range(10)] == whole


def test_lines_of_a_shard_keep_their_numbers(tmp_path):
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbfa\n\nb\r\nc\nd")
    assert [tuple(line) for line in read_lines(tmp_path / "in")] == [(1, b"a\n"), (3, b"b\r\n"), (4, b"c\n"), (5, b"d")]
    assert [line.number for line in read_lines(tmp_path / "in", (0, 2))] == [1, 3, 5]
    with pytest.raises(PunaError, match="is nested too deeply"):
        decode(b"[" * 100_000)
