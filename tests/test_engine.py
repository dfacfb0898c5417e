"""The engine makes what the uncached model makes, and compiles nothing on the way."""

import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from uncached import CONFIG, OPENINGS, adapted, recomputed

from infer.engine import Engine, run_all
from infer.generate import generate
from infer.request import Full, Request
from infer.sample import Sampling
from infer.slots import decode
from model import forward, init_params
from model.errors import PunaError
from model.layout import per_layer, place
from model.linear import product
from model.llama import hidden
from model.params import LINEARS
from model.quantize import quantize
from model.selected import side_by_side
from model.sharding import make_mesh

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture
def engine(params):
    return Engine(per_layer(params), CONFIG, rows=4, chunk=16, least_window=64)


def test_a_common_prefix_is_read_once(params, engine):
    first, *others = list(run_all(engine, [Request([*OPENINGS[0], token], 5) for token in (8, 9, 10)]))[-1]
    again = list(run_all(engine, [Request([*OPENINGS[0], 11], 5)]))[-1][0]
    assert first.reused == 0 and [progress.reused for progress in others] == [40, 40] and again.reused == 40
    for progress in (first, *others, again):
        assert progress.tokens == recomputed(params, progress.request, progress.tokens)


def test_a_step_computes_no_more_rows_than_its_requests_need(params, monkeypatch):
    """One request after another uses each row in its turn, as prefixes may come again, and is computed alone."""
    engine, computed = Engine(per_layer(params), CONFIG, rows=6, chunk=16, least_window=64), []

    def counted(params, slots, kept, allowed, first, config, rows, *rest):
        computed.append((int(first), rows))
        return decode(params, slots, kept, allowed, first, config, rows, *rest)

    monkeypatch.setattr("infer.device.decode", counted)

    def run(*requests):
        computed.clear()
        for progress in list(run_all(engine, requests))[-1]:
            assert progress.tokens == recomputed(params, progress.request, progress.tokens)
        return sorted(set(computed))

    asked = [Request([40 + i, 50 + i, 60 + i], 4, Sampling(temperature=1.0, seed=i)) for i in range(9)]
    assert [run(request) for request in asked[:7]] == [[(i % 6, 1)] for i in range(7)]
    assert run(*asked[7:9]) == [(0, 2)] and engine._rows[0].cached[:3] == asked[8].prompt
    assert max(rows for _, rows in run(*(replace(one, max_new_tokens=3 + i) for i, one in enumerate(asked[:5])))) == 6


def test_a_request_is_the_same_alone_in_company_and_offline(params, engine):
    asked = [Request(OPENINGS[0][:n], 20, Sampling(temperature=1.0, seed=n)) for n in (1, 9, 40)]
    company = list(run_all(engine, asked))[-1]
    for request, progress in zip(asked, company, strict=True):
        alone = list(run_all(engine, [request]))[-1][0]
        offline = [rows[0] for rows in generate(params, CONFIG, [request.prompt], 20, [request.sampling])]
        assert progress.tokens == alone.tokens == sum(offline, [])
    assert [progress.finish for progress in company] == ["length"] * 3


def test_scores_are_the_models_own(params, engine):
    request = Request(OPENINGS[1], 12, Sampling(temperature=0.9, seed=3), logprobs=4, score_prompt=True)
    (progress,) = list(run_all(engine, [request]))[-1]
    text = [*request.prompt, *progress.tokens]
    exact = np.asarray(jax.nn.log_softmax(forward(params, jnp.array([text]), CONFIG)[0][0]))
    scores = [*progress.prompt_logprobs, *progress.logprobs]
    assert [score.token for score in scores] == text[1:]
    for i, score in enumerate(scores):
        assert abs(score.logprob - exact[i, score.token]) < 1e-4
        np.testing.assert_allclose([value for _, value in score.top], np.sort(exact[i])[::-1][:4], atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 17, 40, CONFIG.max_position_embeddings + 1])
def test_a_prompt_that_is_only_scored(params, engine, count):
    """As long as the context, and one more that is never read; with texts being made beside it."""
    prompt = (OPENINGS[0] * 4)[:count]
    asked = [Request(prompt, 0, logprobs=1, score_prompt=True), Request(OPENINGS[1], 5), Request(OPENINGS[2], 9)]
    scored, *others = list(run_all(engine, asked * 3))[-1][:3]
    exact = np.asarray(jax.nn.log_softmax(forward(params, jnp.array([prompt[:-1] or [0]]), CONFIG)[0][0]))
    assert scored.finish == "length" and scored.tokens == [] and scored.text == ""
    assert [score.token for score in scored.prompt_logprobs] == prompt[1:]
    for row, score in zip(exact, scored.prompt_logprobs, strict=False):
        assert abs(score.logprob - row[score.token]) < 1e-4 and score.top[0][0] == row.argmax()
    for progress in others:
        assert progress.tokens == recomputed(params, progress.request, progress.tokens)
    with pytest.raises(PunaError, match="max_new_tokens is 0"):
        engine.submit(Request(prompt, 0))
    with pytest.raises(PunaError, match="together more than"):
        engine.submit(Request((OPENINGS[0] * 4)[:130], 0, score_prompt=True))


class Only:
    """A constraint: the text is one of the tokens `first`, then `then` for ever."""

    def __init__(self, first, then):
        self.orders, self.accepted = [first, [then]], []

    def allowed(self):
        bits = np.zeros(CONFIG.vocab_size, bool)
        bits[self.orders[min(len(self.accepted), 1)]] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token):
        if token == 50:
            raise PunaError("no 50")
        self.accepted.append(token)


def test_a_constraint_is_asked_before_each_token_and_binds_its_row_alone(params, engine):
    free = Request(OPENINGS[0], 9, Sampling(temperature=1.0, seed=4))
    bound = [Request(OPENINGS[0], 9, Sampling(), constraint=Only([20, 30, 40], 50 + i)) for i in range(2)]
    beside, broken, progress = list(run_all(engine, [free, *bound]))[-1]
    assert beside.tokens == recomputed(params, free, beside.tokens) and len(beside.tokens) == 9
    logits = np.asarray(forward(params, jnp.array([OPENINGS[0]]), CONFIG)[0][0, -1])
    first = max([20, 30, 40], key=lambda token: logits[token])
    assert progress.tokens == [first] + [51] * 8 and bound[1].constraint.accepted == progress.tokens
    assert broken.finish == "error" and str(broken.error) == "no 50"


def test_an_embedding_is_the_last_hidden_state(params, engine):
    asked = [Request(OPENINGS[i][: 7 + 13 * i], 1, embed=True) for i in range(3)]
    for progress in list(run_all(engine, asked))[-1]:
        exact = hidden(params, jnp.array([progress.request.prompt]), CONFIG)[0][0, -1]
        np.testing.assert_allclose(progress.embedding, exact, atol=1e-5)
        assert progress.finish == "stop" and progress.tokens == []


def test_over_a_mesh_it_is_the_same_and_compiles_as_little(params):
    asked = [Request(OPENINGS[i], 12, Sampling(temperature=0.8, seed=i)) for i in range(3)]
    alone = list(run_all(Engine(per_layer(params), CONFIG, rows=4, chunk=16, least_window=64), asked))[-1]
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    placed = place(params, CONFIG, mesh)
    engine = Engine(per_layer(placed), CONFIG, rows=4, chunk=16, least_window=64, mesh=mesh)
    programs = engine.warm_up()
    together = list(run_all(engine, asked))[-1]
    assert [progress.tokens for progress in together] == [progress.tokens for progress in alone]
    assert engine.programs == programs


def test_after_warming_up_nothing_compiles(params, engine):
    programs = engine.warm_up(scored=True)

    def ask(seed):
        sampling = Sampling(temperature=0.5 + seed / 10, top_p=0.9, seed=seed, logit_bias=((seed + 9, 1.0),))
        prompts = [OPENINGS[seed % 3][: 1 + 7 * i] for i in range(6)]
        texts = [Request(prompt, 30, sampling, stop_ids=(seed,), logprobs=seed % 2 or None) for prompt in prompts]
        return [*texts, Request(prompts[1], 1, embed=True), Request(prompts[2], 9, constraint=Only([20], 21))]

    for seed in range(6):
        list(run_all(engine, ask(seed)))
    assert engine.programs == programs


@pytest.mark.parametrize("form", [None, "nf4"])
def test_rows_of_one_batch_use_their_own_adapters(params, form):
    base = params if form is None else quantized_linears(params)
    trees = [adapted(base, seed, rank=2 + seed, dora=seed == 1) for seed in range(3)]
    apart = [per_layer(tree) for tree in trees]
    engine = Engine(side_by_side(apart, product), CONFIG, rows=4, chunk=16, least_window=64)
    asked = [Request(OPENINGS[0][:20], 15, Sampling(), adapter=i) for i in (-1, 0, 1, 2)]
    together = list(run_all(engine, asked))[-1]
    texts = []
    for progress, tree in zip(together, [per_layer(base), *apart], strict=True):
        alone = sum((rows[0] for rows in generate(tree, CONFIG, [progress.request.prompt], 15)), [])
        assert progress.tokens == alone
        texts.append(tuple(alone))
    assert len(set(texts)) == 4
    again = list(run_all(engine, asked[::-1]))[-1]  # prefixes are used again only under the same adapter
    assert [progress.tokens for progress in again[::-1]] == [progress.tokens for progress in together]


def test_adapters_over_a_mesh_are_those_of_one_device(params):
    trees = [adapted(quantized_linears(params), seed, rank=2 + seed, dora=seed == 1) for seed in range(2)]
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    asked = [Request(OPENINGS[0][:12], 8, Sampling(temperature=0.5, seed=1), adapter=i) for i in (-1, 0, 1)]
    texts = []
    for devices in (None, mesh):
        apart = [per_layer(tree if devices is None else place(tree, CONFIG, devices)) for tree in trees]
        engine = Engine(side_by_side(apart, product), CONFIG, rows=4, chunk=16, least_window=64, mesh=devices)
        texts.append([progress.tokens for progress in list(run_all(engine, asked))[-1]])
    assert texts[0] == texts[1] and len(set(map(tuple, texts[0]))) == 3


def quantized_linears(params):
    layers = {name: quantize(w, "nf4") if name in LINEARS else w for name, w in params["layers"].items()}
    return params | {"layers": layers}


def test_a_request_that_ends_early_frees_its_row(params):
    engine = Engine(per_layer(params), CONFIG, rows=1, chunk=16, least_window=64, queue=1)
    first = engine.submit(Request(OPENINGS[0], 80))
    for _ in range(6):
        engine.step()
    second = engine.submit(Request(OPENINGS[1], 3))
    with pytest.raises(Full, match="1 requests are waiting"):
        engine.submit(Request(OPENINGS[2], 3))
    first.cancel()
    engine.step()
    assert first.finish == "cancelled" and second.finish is None
    late = None
    while engine.busy:
        engine.step()
    assert second.finish == "length" and len(second.tokens) == 3
    late = engine.submit(Request(OPENINGS[2], 3, deadline=0.0))
    engine.step()
    assert late.finish == "deadline" and late.tokens == []


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(params, engine, monkeypatch):
    stopping = threading.Event()
    thread = threading.Thread(target=engine.run, args=[stopping])
    failures = iter([RuntimeError("device lost")])
    real = engine._start_tokens

    def fail_once():
        for error in failures:
            raise error
        return real()

    monkeypatch.setattr(engine, "_start_tokens", fail_once)
    ended = threading.Event()
    thread.start()
    try:
        broken = engine.submit(Request(OPENINGS[0], 5), lambda progress: progress.finish and ended.set())
        assert ended.wait(60) and broken.finish == "error" and "device lost" in str(broken.error)
        ended.clear()
        request = Request(OPENINGS[0], 5)
        good = engine.submit(request, lambda progress: progress.finish and ended.set())
        assert ended.wait(60) and good.tokens == recomputed(params, request, good.tokens)
    finally:
        stopping.set()
        thread.join()


def test_what_can_never_be_met_is_refused_at_once(engine):
    with pytest.raises(PunaError, match="together more than the context of 128"):
        engine.submit(Request(OPENINGS[0], 100))
    with pytest.raises(PunaError, match="9 stop tokens are given; at most 8"):
        engine.submit(Request(OPENINGS[0], 1, stop_ids=range(9)))
    with pytest.raises(PunaError, match="presence_penalty is 3"):
        replace(Sampling(), presence_penalty=3)
