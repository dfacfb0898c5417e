"""python -m configs.recipes.teacher [--port 0]: a server that stands in for a large model behind OpenAI's API.

The recipes ask a large model to make data up and to judge; the published ones asked GPT-3.5 and GPT-4. Where no such
model can be reached this one answers: not a language model but rules, the same answer to the same request. It continues
Alpaca's lists of tasks, makes instructions harder, answers its own tasks, and prefers of two answers the one that has
more different words of the question, then more different words. To use a real model give the recipes ENDPOINT=URL.
"""

import argparse
import json
import random
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

THINGS = (
    "bridges bread clouds rivers violins maps glaciers lanterns gardens engines coins bicycles whales mirrors "
    "libraries windmills volcanoes kites harbours candles pyramids forests trains satellites shadows markets "
    "umbrellas clocks seeds deserts castles spiders storms telescopes carpets islands"
).split()
KINDS = (
    "old modern simple famous cheap heavy rare small wooden early northern quiet useful strange electric common"
).split()
TASKS = (
    ("Explain why {kind} {thing} matter", "{Kind} {thing} matter because people use {thing} every day."),
    ("Compare {kind} {thing} with {other}", "{Kind} {thing} are easy to see, and {other} are not."),
    ("Name two {kind} {thing}", "Two {kind} {thing} are the first {thing} and the last {thing}."),
    ("Describe {thing} for {kind} {other}", "{Thing} are near {other}, and they are {kind}."),
    ("Who invented {kind} {thing}?", "Nobody knows who made the first {thing}, but they were {kind}."),
    ("Summarize how {thing} became {kind}", "First {thing} were new, and then {thing} became {kind}."),
    ("List dangers of {thing} near {other}", "Near {other} the {thing} can break."),
    ("Suggest uses of {thing} besides {other}", "Use {thing} to learn, to rest, and to forget {other}."),
    ("Are {thing} more {kind} than {other}?", "Yes, {thing} are more {kind} than {other}."),
    ("Write a slogan selling {kind} {thing}", "Buy {kind} {thing} and be glad."),
)
REQUIREMENTS = (
    "Answer in exactly three short sentences.",
    "Give one reason that a child would understand.",
    "Say first what is certain and then what is not.",
    "Add an example from everyday life.",
    "Mention one cost and one gain.",
)


def task(random_: random.Random) -> tuple[str, str]:
    """An instruction and its answer."""
    asked, answer = random_.choice(TASKS)
    thing, other = random_.sample(THINGS, 2)
    kind = random_.choice(KINDS)
    words = {"kind": kind, "thing": thing, "other": other, "Kind": kind.capitalize(), "Thing": thing.capitalize()}
    return asked.format(**words), answer.format(**words)


def answered(instruction: str) -> str:
    """The answer to one of our tasks, whatever was added to it; else a sentence about its first words."""
    for asked, answer in TASKS:
        pattern = re.escape(asked)
        for name in ("kind", "thing", "other"):
            pattern = pattern.replace(re.escape("{" + name + "}"), rf"(?P<{name}>\w+)", 1)
        if found := re.match(pattern, instruction):
            words = {"kind": "", "other": "", **found.groupdict()}
            return answer.format(**words, Kind=words["kind"].capitalize(), Thing=words["thing"].capitalize())
    words = re.findall(r"\w+", instruction)
    return f"It is about {' and '.join(words[-2:]) or 'nothing'}."


def reply(body: dict[str, Any]) -> str:
    """What is said to a request of chat completions."""
    asked = body["messages"][-1]["content"]
    random_ = random.Random(f"{body.get('seed', 0)}/{asked}")
    if begun := re.search(r"###\n(\d+)\. Instruction:$", asked):  # infer synthesize self-instruct
        first = int(begun[1])
        tasks = [task(random_) for _ in range(20 - first + 1)]
        text = "###\n".join(
            f"{number}. Instruction: {instruction}\n{number}. Input:\n<noinput>\n{number}. Output:\n{answer}\n"
            for number, (instruction, answer) in enumerate(tasks, first)
        )
        return text.removeprefix(f"{first}. Instruction:")
    if "# Answer A\n" in asked:  # infer judge
        question, _, answers = asked.partition("# Answer A\n")
        sides = answers.split("\n\n# Answer B\n")
        asked_words = set(re.findall(r"\w+", question.lower()))
        said = [set(re.findall(r"[a-z]+", side.lower())) for side in sides]
        worth = [(len(words & asked_words), len(words)) for words in said]
        letter = "C" if worth[0] == worth[1] else "A" if worth[0] > worth[1] else "B"
        return f"A has {worth[0][0]} words of the question, B {worth[1][0]}. [[{letter}]]"
    if "# Instruction\n" in asked:  # infer synthesize evol-instruct
        instruction = asked.split("# Instruction\n")[1]
        return task(random_)[0] if "same field" in asked else f"{instruction} {random_.choice(REQUIREMENTS)}"
    return answered(asked)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def send(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        model = {"id": "teacher", "object": "model", "created": 0, "owned_by": "puna"}
        self.send({"object": "list", "data": [model]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = reply(body)
        read, written = sum(len(one["content"].split()) for one in body["messages"]), len(text.split())
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "teacher"}
        self.send(answer | {"choices": [choice], "usage": usage})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    server = ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
