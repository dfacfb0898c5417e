"""Two workers of `infer serve` behind HAProxy as examples/haproxy.cfg sets it up, one of them killed under load."""

import json
import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest
from serving import Server, chat_model
from test_server import metric, until

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parent.parent / "examples" / "haproxy.cfg"
HAPROXY = Path("/usr/sbin/haproxy")
MAXCONN = 4  # of each worker, which has 2 rows
REQUESTS = 32


@pytest.fixture(scope="module")
def haproxy():
    """The program."""
    assert HAPROXY.exists(), f"{HAPROXY} is missing: the example is tested with it. Install Debian's package `haproxy`."
    return HAPROXY


@pytest.fixture(scope="module")
def workers(haproxy, tmp_path_factory):
    """Two servers of one model, whose steps take 20 ms at least."""
    folder = tmp_path_factory.mktemp("workers")
    (folder / "slow").touch()
    model = chat_model(folder, 128)
    with ExitStack() as stack:
        yield [stack.enter_context(start(model, folder)) for _ in range(2)]


def start(model, folder):
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return Worker(model, "--rows", 2, entry=("-m", "tests.faulty_server", folder), environment=quick)


class Worker(Server):
    """A server that may be killed."""

    def __exit__(self, *error):
        if self.process.poll() is None:
            super().__exit__(*error)
        elif self.process.stderr is not None:
            self._reader.join()
            self.process.stderr.close()


@pytest.fixture(scope="module")
def url(haproxy, workers, tmp_path_factory):
    """The address of HAProxy before the workers. Only addresses and `maxconn` differ from the example."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = EXAMPLE.read_text()
    for pattern, value in (
        (r"(?<=bind )127\.0\.0\.1:8000", f"127.0.0.1:{port}"),
        (r"(?<=server one )127\.0\.0\.1:8001", workers[0].url.removeprefix("http://")),
        (r"(?<=server two )127\.0\.0\.1:8002", workers[1].url.removeprefix("http://")),
        (r"(?<=maxconn )12\b", str(MAXCONN)),
    ):
        text, count = re.subn(pattern, value, text, flags=re.MULTILINE)
        assert count == 1, pattern
    settings = tmp_path_factory.mktemp("haproxy") / "haproxy.cfg"
    settings.write_text(text)
    log = settings.with_suffix(".log")
    with log.open("w") as output, subprocess.Popen([haproxy, "-db", "-f", settings], stderr=output) as process:
        until(lambda: accepts(port) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
        process.kill()


def accepts(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def clients(url, workers):
    """HTTP clients of HAProxy and of each worker."""
    with ExitStack() as stack:
        limits = httpx.Limits(max_connections=None)
        to = [httpx.Client(base_url=base, timeout=120, limits=limits) for base in (url, *(w.url for w in workers))]
        yield [stack.enter_context(client) for client in to]


def completion(seed, tokens=20, **settings):
    asked = {"prompt": "Hello", "max_tokens": tokens, "temperature": 1, "seed": seed, "ignore_eos": True}
    return asked | settings


def test_the_example_is_as_it_stands_without_a_warning(haproxy):
    done = subprocess.run([haproxy, "-c", "-f", EXAMPLE], capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stdout + done.stderr, done.stderr


def test_streams_are_passed_on_as_they_come_and_end_when_the_client_leaves(clients):
    through, *direct = clients

    def running():
        return sum(metric(client, "puna_requests_running") for client in direct)

    body = completion(0, 100, stream=True)
    with through.stream("POST", "/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        assert "choices" in next(lines) and running() == 1  # 100 tokens take two seconds: it has not ended
    until(lambda: running() == 0)
    assert sum(cancelled(client) for client in direct) == 1
    body = json.dumps(completion(1, 120)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((through.base_url.host, through.base_url.port)) as leaving:
        leaving.sendall(head.encode() + body)
        until(lambda: running() == 1)
    until(lambda: running() == 0)
    assert sum(cancelled(client) for client in direct) == 2


def cancelled(client):
    found = re.search(r'^puna_requests_total\{finish="cancelled"\} (\S+)', client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0


def test_requests_go_to_the_worker_that_has_fewest(clients):
    through, *direct = clients
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(through.post, "/v1/completions", json=completion(seed, 100)) for seed in range(4)]
        until(lambda: [metric(client, "puna_requests_running") for client in direct] == [2, 2])
        assert all(answer.result().is_success for answer in answers)


def test_a_killed_worker_takes_only_its_own_requests_with_it(clients, workers, url):
    through, victim, other = clients
    with ThreadPoolExecutor(4) as pool:
        alone = pool.map(lambda seed: other.post("/v1/completions", json=completion(seed)), range(REQUESTS))
        expected = [text_of(reply) for reply in alone]

    def ask(seed):
        """The text, or None where the worker was lost."""
        if seed % 2:
            reply = through.post("/v1/completions", json=completion(seed))
            if reply.status_code == 502:
                assert reply.headers["retry-after"] == "1" and reply.json()["error"]["code"] == "worker_lost"
                return None
            return text_of(reply)
        try:
            reply = through.post("/v1/completions", json=completion(seed, stream=True))
        except httpx.RemoteProtocolError:  # the stream had begun: its end is missing, and the client sees it
            return None
        if reply.status_code == 502:
            return None
        assert reply.status_code == 200 and reply.text.endswith("data: [DONE]\n\n"), reply.text
        pieces = [json.loads(line[len("data: ") :]) for line in reply.text.split("\n\n")[:-2]]
        return "".join(piece["choices"][0]["text"] for piece in pieces)

    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(ask, range(REQUESTS))
        until(lambda: metric(victim, "puna_requests_running") == 2)
        workers[0].process.kill()
        texts = list(answers)
    lost = [seed for seed, text in enumerate(texts) if text is None]
    # What it had, and what the kernel still accepted for it while it died.
    assert 1 <= len(lost) <= 2 * MAXCONN
    assert [text for text in texts if text is not None] == [expected[s] for s in range(REQUESTS) if s not in lost]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120) as client:
        for seed in lost:
            again = client.completions.create(model="model", prompt="Hello", extra_body=completion(seed))
            assert again.choices[0].text == expected[seed]


def text_of(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]
