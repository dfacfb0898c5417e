"""`infer serve` under full load for PUNA_SOAK_MINUTES (20 if not given), with clients that leave at random.

Every request's right text is known beforehand, from `generate`. In the end every row is free, nothing was wrong, no
answer was a 5xx, and the server's memory is what it was.
"""

import json
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import Server, chat_model
from test_server import CHAT, TEXTS, Offline, metric, until

from infer.sample import Sampling

pytestmark = pytest.mark.soak
MINUTES = float(os.environ.get("PUNA_SOAK_MINUTES", "20"))
ROWS, QUEUE, CLIENTS = 4, 16, 24  # more clients than there is room for
SEEDS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("served"), 256)


@pytest.fixture(scope="module")
def server(model):
    settings = ("--rows", ROWS, "--queue", QUEUE, "--adapter", f"poet={model.parent / 'poet'}")
    with Server(model, *settings) as server:
        yield server


@pytest.fixture(scope="module")
def known(model):
    """Requests, as (path, body), with their texts."""
    offline, found = Offline(model), []
    for seed in range(SEEDS):
        for name in ("model", "poet"):
            for temperature in (0, 1):
                sampling = Sampling(temperature=float(temperature), seed=seed)
                count = 10 + 12 * seed
                common = {"model": name, "max_tokens": count, "temperature": temperature, "seed": seed}
                for prompt in TEXTS:
                    text = offline.completion(prompt, count, sampling, name)
                    found.append(("/v1/completions", common | {"prompt": prompt}, text))
                text = offline.chat(CHAT, count, sampling, name)
                found.append(("/v1/chat/completions", common | {"messages": CHAT}, text))
    return found


class Client:
    """One client after another asks, in a thread, until `over`; what became of the requests is counted."""

    def __init__(self, url, known, seed):
        self.url, self.known, self.chance = url, known, random.Random(seed)
        self.outcomes, self.wrong = Counter(), []

    def run(self, over):
        with httpx.Client(base_url=self.url, timeout=300) as http:
            while not over.is_set():
                self.ask(http, *self.chance.choice(self.known))

    def ask(self, http, path, body, expected):
        stream, leaves = self.chance.random() < 0.5, self.chance.random() < 0.25
        try:
            if stream:
                status, text = self.streamed(http, path, body, leaves)
            else:
                patience = self.chance.uniform(0.001, 0.3) if leaves else 300
                reply = http.post(path, json=body, timeout=httpx.Timeout(patience, connect=300, pool=300))
                choice = reply.json().get("choices", [{}])[0]
                status, text = reply.status_code, choice.get("text", choice.get("message", {}).get("content"))
        except httpx.ReadTimeout:
            assert leaves, "no answer came in 300 seconds"
            self.outcomes["left"] += 1
            return
        if status == 429:
            self.outcomes["full"] += 1
            time.sleep(self.chance.uniform(0, 0.2))
        elif status != 200:
            self.wrong.append((status, path, body, text))
        elif text is None:
            self.outcomes["left"] += 1
        elif text != expected:
            self.wrong.append((status, path, body, text))
        else:
            self.outcomes["streamed" if stream else "whole"] += 1

    def streamed(self, http, path, body, leaves):
        """The status and the text; no text where it left before the end."""
        after, text, lines = self.chance.randrange(0, 30), "", 0
        with http.stream("POST", path, json=body | {"stream": True}) as reply:
            if reply.status_code != 200:
                return reply.status_code, reply.read().decode()
            for line in filter(None, reply.iter_lines()):
                if leaves and lines >= after:
                    return 200, None
                if line == "data: [DONE]":
                    return 200, text
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                text += choice.get("text", choice.get("delta", {}).get("content", ""))
                lines += 1
        return reply.status_code, f"{text} without [DONE]"


def memory(pid):
    """Resident bytes of a process."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_soak(server, known):
    """Memory is flat where the median of its last quarter is within 3 % of that of the second quarter: in the first
    one buffers and pools grow to the size of the load."""
    clients, over = [Client(server.url, known, seed) for seed in range(CLIENTS)], threading.Event()
    sizes, end = [], time.monotonic() + 60 * MINUTES
    with httpx.Client(base_url=server.url, timeout=120) as http, ThreadPoolExecutor(CLIENTS) as pool:
        compiled = metric(http, "puna_compiled_programs")
        running = [pool.submit(client.run, over) for client in clients]
        try:
            while time.monotonic() < end and not any(one.done() for one in running):
                sizes.append(memory(server.process.pid))
                time.sleep(0.5)
        finally:
            over.set()
        for one in running:
            one.result()
        until(lambda: metric(http, "puna_requests_running") == metric(http, "puna_requests_waiting") == 0)
        assert http.get("/health").status_code == 200
        steps, tokens = (metric(http, f"puna_{name}_total") for name in ("steps", "tokens"))
        assert metric(http, "puna_compiled_programs") == compiled
        assert 'finish="error"' not in http.get("/metrics").text
    outcomes = sum((client.outcomes for client in clients), Counter())
    quarters = [sorted(sizes[len(sizes) * i // 4 : len(sizes) * (i + 1) // 4]) for i in range(4)]
    medians = [quarter[len(quarter) // 2] / 2**20 for quarter in quarters]
    print(f"\n{MINUTES:g} min: {dict(outcomes)}; {tokens:.0f} tokens in {steps:.0f} steps; MiB {medians}")
    wrong = [one for client in clients for one in client.wrong]
    assert not wrong, (len(wrong), wrong[:3])
    assert {"whole", "streamed", "left", "full"} <= outcomes.keys()  # the load was what it should be
    assert abs(medians[3] / medians[1] - 1) < 0.03, medians
    assert "Traceback" not in "".join(server.log)
