"""python -m configs.recipes.materials RECIPE FOLDER: what a recipe starts from, written into FOLDER.

Where PUNA_TEST_DATA names the shared test data these are the published files, cut to a size that two cores train in a
minute; elsewhere they are made here by rules, in the same forms. What each file came from is printed.
"""

import argparse
import csv
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from configs.recipes import teacher

SHARED = Path(os.environ["PUNA_TEST_DATA"]) if os.environ.get("PUNA_TEST_DATA") else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=MAKERS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    MAKERS[arguments.recipe](arguments.folder)


def shared(*parts: str) -> Path | None:
    """A file of the shared data, or None where there is none."""
    return SHARED.joinpath(*parts) if SHARED else None


def write(path: Path, records: Iterable[Any], source: str) -> None:
    """Records as JSONL, or as one JSON list where the name asks for it."""
    kept = list(records)
    if path.suffix == ".json":
        path.write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in kept), encoding="utf-8")
    print(f"{path}: {len(kept)} records, {source}")


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def tasks(count: int, seed: str) -> list[dict[str, str]]:
    """Different instructions with their answers."""
    random_ = random.Random(seed)
    made = dict(teacher.task(random_) for _ in range(2 * count))
    return [{"instruction": asked, "input": "", "output": said} for asked, said in list(made.items())[:count]]


# ---- from nothing


def from_nothing(folder: Path) -> None:
    """Text: the reference of the Python language, which every Python has. Conversations: ours."""
    import pydoc_data.topics

    texts = [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 400]
    write(folder / "held_out.jsonl", ({"text": text} for text in texts[::20]), "the reference of Python")
    kept = [text for number, text in enumerate(texts) if number % 20]
    write(folder / "train.jsonl", ({"text": text} for text in kept), "the reference of Python")
    (folder / "text.txt").write_text("\n".join(kept), encoding="utf-8")
    conversations = [
        {"conversations": [
            {"from": "human", "value": one["instruction"]}, {"from": "gpt", "value": one["output"]},
            {"from": "human", "value": "Thank you."}, {"from": "gpt", "value": "You are welcome."},
        ]}
        for one in tasks(600, "chat")
    ]  # fmt: skip
    write(folder / "chat_held_out.jsonl", conversations[:40], "made here")
    write(folder / "chat.jsonl", conversations[40:], "made here")


# ---- alpaca


def alpaca(folder: Path) -> None:
    """Seed tasks in the form of Self-Instruct."""
    if path := shared("alpaca", "seed_tasks.jsonl"):
        return write(folder / "seed_tasks.jsonl", lines(path), "the 175 published seeds")
    seeds = [
        {"instruction": one["instruction"], "instances": [{"input": "", "output": one["output"]}]}
        for one in tasks(40, "seeds")
    ]
    write(folder / "seed_tasks.jsonl", seeds, "made here")


# ---- vicuna

CATEGORIES = "generic knowledge roleplay common-sense fermi counterfactual coding math writing".split()


def vicuna(folder: Path) -> None:
    """Shared conversations as a browser saved them, in HTML, and questions to answer."""
    if path := shared("vicuna", "dummy_conversation.json"):
        found, source = json.loads(path.read_text(encoding="utf-8")), "FastChat's dummy conversations, as HTML"
    else:
        found, source = [_conversation(number) for number in range(160)], "made here, as HTML"
    for number, one in enumerate(found):
        for turn in one["conversations"]:
            if turn["from"] == "gpt":
                turn["value"] = f"<div><p>{turn['value']}</p></div>"
        if number % 25 == 3:
            one["conversations"].insert(0, {"from": "gpt", "value": "<p>Before anyone has asked.</p>"})
        if number % 40 == 5:
            one["conversations"][1]["value"] += "<p>I am ChatGPT.</p>"
        if number % 30 == 7:
            one["id"] = found[number - 1]["id"]
    write(folder / "raw.json", found, source)
    if path := shared("vicuna", "vicuna_question.jsonl"):
        return write(folder / "questions.jsonl", lines(path), "the 80 published questions")
    asked = tasks(18, "questions")
    questions = [
        {"question_id": number, "category": CATEGORIES[number % 9], "turns": [one["instruction"]]}
        for number, one in enumerate(asked)
    ]
    write(folder / "questions.jsonl", questions, "made here")


def _conversation(number: int) -> dict[str, Any]:
    random_ = random.Random(f"conversation {number}")
    turns = []
    for _ in range(random_.randint(1, 12)):
        asked, said = teacher.task(random_)
        turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    return {"id": f"made_{number}", "conversations": turns}


# ---- wizardlm


def wizardlm(folder: Path) -> None:
    """Instructions to evolve, refusals among answers, questions, and a task for lm-eval."""
    if path := shared("alpaca", "alpaca_tiny.json"):
        seeds, source = json.loads(path.read_text(encoding="utf-8"))[:60], "Alpaca's"
    else:
        seeds, source = tasks(60, "seeds of evol"), "made here"
    kept = ({key: one[key] for key in ("instruction", "input", "output")} for one in seeds)
    write(folder / "seeds.jsonl", kept, source)
    refused = [
        {"instruction": one["instruction"], "input": "", "output": "As an AI language model, I cannot fulfill this."}
        for one in seeds[:7]
    ]
    write(folder / "refusals.jsonl", refused, "answers that refuse, made here")
    if path := shared("wizardlm", "WizardLM_testset.jsonl"):
        questions, source = lines(path)[:40], "the first 40 of WizardLM's test set"
    else:
        made = enumerate(tasks(40, "testset"), 1)
        questions, source = [{"idx": number, "Instruction": one["instruction"]} for number, one in made], "made here"
    write(folder / "testset.jsonl", questions, source)
    random_ = random.Random("choices")
    asked, choices = tasks(60, "choices"), []
    for one in asked:
        options = [one["output"], *random_.sample([other["output"] for other in asked if other != one], 3)]
        random_.shuffle(options)
        right = options.index(one["output"])
        choices.append({"question": one["instruction"], "choices": options, "answer": right})
    write(folder / "choices.jsonl", choices, "made here")


# ---- chinese

CHINESE = {
    "时": "今天 昨天 明天 早上 晚上 去年 春天 冬天 周末 现在".split(),
    "人": "学生 老师 医生 农民 孩子 朋友 工人 诗人 母亲 司机".split(),
    "地": "在学校 在山上 在河边 在城市 在家里 在花园 在图书馆 在公园".split(),
    "事": "读书 唱歌 种树 写字 做饭 喝茶 画画 跑步 讲故事 看月亮".split(),
}
SUBJECTS = {
    "poems": ("Poems", "诗歌", "Humanities"), "plants": ("Plants", "植物学", "STEM"),
    "roads": ("Roads", "交通", "Other"), "people": ("People", "社会", "Social Science"),
}  # fmt: skip


def _chinese_sentence(random_: random.Random) -> str:
    words = {name: random_.choice(several) for name, several in CHINESE.items()}
    return f"{words['时']}{words['人']}{words['地']}{words['事']}。"


def chinese(folder: Path) -> None:
    """A base tokenizer and a Chinese one, Chinese text, instructions, and questions in the form of C-Eval."""
    random_ = random.Random("chinese")
    text = ["".join(_chinese_sentence(random_) for _ in range(random_.randint(3, 9))) for _ in range(1200)]
    if path := shared("pretrain-text", "zh_doc.txt"):
        paragraphs = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 20]
        text += paragraphs * 10
        print(f"{folder / 'text.jsonl'}: {len(paragraphs)} published paragraphs, ten times each, among others")
    write(folder / "text.jsonl", ({"text": one} for one in text), "made here and shared")
    if path := shared("alpaca", "alpaca_zh_demo.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [one for one in found if len(one["instruction"] + one["input"] + one["output"]) < 160][:300]
        write(folder / "instructions.jsonl", rows, "Alpaca's in Chinese, the short ones")
    else:
        sentences = [_chinese_sentence(random_) for _ in range(300)]
        rows = [{"instruction": f"写一句话：{one[:4]}", "input": "", "output": one} for one in sentences]
        write(folder / "instructions.jsonl", rows, "made here")
    if SHARED:
        shutil.copyfile(SHARED / "llama2-tokenizer" / "tokenizer.model", folder / "base.model")
        shutil.copyfile(SHARED / "chinese-llama-tokenizer" / "chinese_sp.model", folder / "chinese.model")
        print(f"{folder}: the tokenizers of Llama 2 and of Chinese-LLaMA-Alpaca")
    else:
        english = folder / "english.txt"
        english.write_text("\n".join(one["output"] for one in tasks(2000, "english")), encoding="utf-8")
        plain = folder / "chinese.txt"
        plain.write_text("\n".join(text), encoding="utf-8")
        train_tokenizer(english, folder / "base.model", 400)
        train_tokenizer(plain, folder / "chinese.model", 420)
    _ceval(folder / "ceval")


def train_tokenizer(text: Path, model: Path, pieces: int) -> None:
    """A SentencePiece BPE with byte fallback, as LLaMA's, of so many pieces."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(model.with_suffix("")), vocab_size=pieces, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, character_coverage=0.99, num_threads=1, minloglevel=2,
    )  # fmt: skip
    model.with_suffix(".vocab").unlink()
    print(f"{model}: {pieces} pieces, made here of {text}")


def _ceval(folder: Path) -> None:
    random_ = random.Random("ceval")
    head = ["id", "question", "A", "B", "C", "D", "answer"]
    for subject in SUBJECTS:
        for split, count in (("dev", 5), ("val", 12), ("test", 6)):
            rows = []
            for number in range(count):
                sentence = _chinese_sentence(random_)
                done = next(one for one in CHINESE["事"] if one in sentence)
                options = [done, *random_.sample([one for one in CHINESE["事"] if one != done], 3)]
                random_.shuffle(options)
                rows.append([number, f"{sentence}他在做什么？", *options, "ABCD"[options.index(done)]])
            cut = len(head) - (split == "test")
            (folder / split).mkdir(parents=True, exist_ok=True)
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
                explained = split == "dev"
                csv.writer(file).writerow(head[:cut] + ["explanation"] * explained)
                csv.writer(file).writerows(row[:cut] + [""] * explained for row in rows)
    (folder / "subject_mapping.json").write_text(json.dumps(SUBJECTS, ensure_ascii=False), encoding="utf-8")
    print(f"{folder}: questions of {len(SUBJECTS)} subjects in C-Eval's form, made here; its own may not be passed on")


# ---- qlora


def qlora(folder: Path) -> None:
    """Dialogues and their summaries, three to a dialogue in the test set."""
    if path := shared("dialogsum", "dialogsum.dev.jsonl"):
        short = [one for one in lines(path) if len(one["dialogue"]) < 700]
        write(folder / "train.jsonl", short, "DialogSum's dev set, the short ones")
        test = [one for one in lines(SHARED / "dialogsum" / "dialogsum.test.jsonl") if len(one["dialogue"]) < 450][:24]
        return write(folder / "test.jsonl", test, "DialogSum's test set, 24 short ones with three summaries each")
    random_ = random.Random("dialogues")
    made = [_dialogue(random_, number) for number in range(260)]
    write(folder / "test.jsonl", made[:24], "made here")
    train = ({"fname": one["fname"], "dialogue": one["dialogue"], "summary": one["summary1"]} for one in made[24:])
    write(folder / "train.jsonl", train, "made here")


def _dialogue(random_: random.Random, number: int) -> dict[str, str]:
    thing, other = random_.sample(teacher.THINGS, 2)
    kind = random_.choice(teacher.KINDS)
    dialogue = (
        f"#Person1#: Hello. What did you see?\n#Person2#: I saw {kind} {thing}, and later {other}.\n"
        f"#Person1#: Did you like the {thing}?\n#Person2#: Yes, very much."
    )
    return {
        "fname": f"made_{number}",
        "dialogue": dialogue,
        "summary1": f"#Person2# saw {kind} {thing} and {other}, and liked the {thing}.",
        "summary2": f"#Person2# tells #Person1# about {kind} {thing}.",
        "summary3": f"#Person1# and #Person2# talk about {thing} and {other}.",
    }


def base(folder: Path) -> None:
    """A small LLaMA to fine-tune: stories260K, or what `train run` makes of the text of `from_nothing`."""
    if SHARED:
        shutil.copytree(SHARED / "stories260k-derived" / "hf_sharded", folder / "base", dirs_exist_ok=True)
        print(f"{folder / 'base'}: stories260K, a trained LLaMA of 260 thousand parameters")
        return
    (folder / "text").mkdir(exist_ok=True)
    from_nothing(folder / "text")
    train_tokenizer(folder / "text" / "text.txt", folder / "text" / "tokenizer.model", 512)


MAKERS: dict[str, Callable[[Path], None]] = {
    "base": base, "from-nothing": from_nothing, "alpaca": alpaca, "vicuna": vicuna, "wizardlm": wizardlm,
    "chinese": chinese, "qlora": qlora,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
