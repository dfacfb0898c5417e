"""Each recipe of configs/recipes runs whole, as `make recipe-NAME` does, and made what it says."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert import load_model

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.recipe


def run_recipe(name: str, out: Path, data: str | None) -> tuple[Path, str]:
    """The recipe's folder and what it printed, with the shared data or with what it makes itself."""
    env = {key: value for key, value in os.environ.items() if key not in ("PUNA_TEST_DATA", "XLA_FLAGS")}
    env |= {"PY": sys.executable, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    if data:
        env["PUNA_TEST_DATA"] = data
    command = ["bash", f"configs/recipes/{name}/run.sh", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return out, done.stdout


@pytest.fixture(scope="module", params=["shared", "made"])
def data(request) -> str | None:
    """Where the shared data is, or None for data that the recipe makes."""
    if request.param == "made":
        return None
    if not (folder := os.environ.get("PUNA_TEST_DATA")):
        pytest.skip("PUNA_TEST_DATA is not set")
    return folder


def losses(run: Path, key: str = "eval_loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def scores(folder: Path) -> dict[str, dict[str, float]]:
    models = json.loads((folder / "results.json").read_text())["models"]
    return {name: one["scores"] for name, one in models.items()}


def test_alpaca(data, tmp_path):
    out, said = run_recipe("alpaca", tmp_path / "out", data)
    tasks = records(out / "tasks.jsonl")
    assert len(tasks) == 120 and len({one["instruction"] for one in tasks}) == 120
    assert losses(out / "tuned")[-1] < losses(out / "tuned")[0] * 2 / 3
    assert sha256(out / "tuned/final/model.safetensors") == sha256(out / "recovered/model.safetensors")
    assert "same" in said
    config, params = load_model(out / "alpaca-q4.gguf")
    whole, kept = load_model(out / "recovered")
    assert config.num_hidden_layers == whole.num_hidden_layers
    blocks = np.abs(np.asarray(kept["layers"]["w_up"])).max()  # Q4_0 rounds to an eighth of a block's largest number
    assert np.abs(np.asarray(params["layers"]["w_up"]) - np.asarray(kept["layers"]["w_up"])).max() <= blocks / 8 + 1e-6


def test_vicuna(data, tmp_path):
    out, said = run_recipe("vicuna", tmp_path / "out", data)
    raw, kept = (json.loads((out / f"{name}.json").read_text()) for name in ("raw", "train"))
    assert 0 < len(kept) < len(raw)
    turns = [turn["value"] for one in kept for turn in one["conversations"]]
    assert not any("<p>" in turn or "ChatGPT" in turn for turn in turns)
    assert losses(out / "tuned")[-1] < losses(out / "tuned")[0] * 2 / 3
    assert sha256(out / "tuned/final/model.safetensors") == sha256(out / "vicuna/model.safetensors")
    config = json.loads((out / "vicuna/config.json").read_text())
    assert config["max_position_embeddings"] == 2048
    questions = (out / "questions.jsonl").read_text().splitlines()
    judged = [json.loads(line) for line in (out / "judged/judgments.jsonl").read_text().splitlines()]
    assert len(judged) == len(questions) and all(one["winner"] for one in judged)


def test_wizardlm(data, tmp_path):
    out, _ = run_recipe("wizardlm", tmp_path / "out", data)
    assert records(out / "evolved.jsonl")
    assert "AI language model" not in (out / "instructions.jsonl").read_text(encoding="utf-8")
    assert sha256(out / "tuned/final/model.safetensors") == sha256(out / "uninterrupted/final/model.safetensors")
    assert losses(out / "tuned", "loss")[-1] < losses(out / "tuned", "loss")[0]
    asked, answers = records(out / "testset.jsonl"), records(out / "answers.jsonl")
    rejects = out / "answers.rejects.jsonl"  # questions beyond the context, if any
    refused = {json.loads(one["line"])["idx"] for one in records(rejects)} if rejects.exists() else set()
    assert [one["idx"] for one in asked if one["idx"] not in refused] == [one["id"] for one in answers]
    assert len(refused) < 4
    assert all("wizardlm" in one for one in answers)
    found = scores(out / "choices")
    assert found["served"] == found["tuned"] and found.keys() == {"base", "tuned", "served"}


def test_chinese(data, tmp_path):
    out, said = run_recipe("chinese", tmp_path / "out", data)
    if data:  # the tokenizers that Chinese-LLaMA and Chinese-Alpaca published
        published = Path(data, "chinese-llama-tokenizer")
        assert sha256(out / "merged.model") == sha256(published / "chinese_llama_merged.tokenizer.model")
        assert sha256(out / "alpaca.model") == sha256(published / "chinese_alpaca.tokenizer.model")
    for run in ("stage1", "stage2", "instruct"):
        assert losses(out / run)[-1] < losses(out / run)[0]
    stage1 = json.loads((out / "stage1/final/adapter_config.json").read_text())
    assert stage1["modules_to_save"] == ["embed_tokens", "lm_head"] and "dummy" in stage1["target_modules"]
    assert scores(out / "ceval-constrained").keys() == {"full", "int8", "nf4"}
    assert scores(out / "ceval-free").keys() == {"full"}
    submission = json.loads((out / "ceval-test/full/submission.json").read_text())
    assert {len(letters) for letters in submission.values()} == {6}
    sizes = [line for line in said.splitlines() if "llama-7b" in line and "7.8" in line]
    assert sizes and "6.80" in sizes[0] and "3.87" in sizes[0]


def test_qlora(data, tmp_path):
    out, _ = run_recipe("qlora", tmp_path / "out", data)
    found = scores(out / "rouge")
    assert found["tuned"]["rouge1"] > found["base"]["rouge1"] + 2
    served = json.loads((out / "served.json").read_text())
    assert served.keys() == {"base", "tuned", "halfway"} and len(set(served.values())) == 3
    offline = records(out / "rouge/tuned.jsonl")[0]["text"]
    assert offline.startswith(served["tuned"][:40])


def test_from_nothing(tmp_path):
    out, said = run_recipe("from-nothing", tmp_path / "out", None)
    beside = json.loads((out / "beside_torch.json").read_text())
    assert np.abs(np.subtract(beside["puna"][:100], beside["torch"][:100])).max() <= 1e-4
    assert abs(beside["last"][0] / beside["last"][1] - 1) <= 0.01
    assert losses(out / "pretrained")[-1] < losses(out / "pretrained")[0] * 0.6
    assert losses(out / "chat")[-1] < 0.5
    assert re.search(r"^ ?(Yes|No), \w+ are more \w+ than \w+\.$", said.split("Asking the server")[1], re.M)
