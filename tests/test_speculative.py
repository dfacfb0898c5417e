"""Speculative decoding makes what plain decoding makes, token for token, in fewer passes of the model."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_tokenizer as small
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from uncached import CONFIG, OPENINGS, adapted, random_request, recomputed

import infer.device
import infer.engine
from infer import proposals, slots, speculative
from infer.engine import Engine, run_all
from infer.proposals import Draft, PromptLookup, draw
from infer.request import Request
from infer.sample import Sampling, stack_sampling
from infer.slots import empty_slots
from infer.speculative import verify
from model import forward, init_params
from model.cache import init_cache
from model.errors import PunaError
from model.layout import per_layer
from model.linear import product as times
from model.selected import side_by_side
from model.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

SMALL = replace(CONFIG, hidden_size=16, num_hidden_layers=1, max_position_embeddings=100)
K = 3
VARIED = Sampling(
    temperature=0.9, top_p=0.9, top_k=40, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3,
    logit_bias=((11, 2.0), (12, -5.0)), seed=2**40 + 1,
)  # fmt: skip
EVEN = [5, 3, 5, 3, 9, 5, 3, 5, 3, 9, 5, 3]


@pytest.fixture(scope="module")
def params():
    return per_layer(init_params(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def kinds(params):
    small = per_layer(init_params(SMALL, jax.random.key(5)))
    return {"lookup": PromptLookup(K), "other": Draft(small, SMALL, K), "itself": Draft(params, CONFIG, K)}


@pytest.fixture
def passes(monkeypatch):
    """The live rows of each pass of the model that makes tokens, by the function's name."""
    seen = {"decode": [], "verify": []}
    for name, rows in seen.items():
        function = getattr(infer.device, name)

        def counted(params, slots, kept, *rest, function=function, rows=rows):
            rows.append(int(kept.sum()))
            return function(params, slots, kept, *rest)

        monkeypatch.setattr(infer.device, name, counted)
    return seen


def engine_of(params, speculate=None, **keywords):
    return Engine(params, CONFIG, **{"rows": 4, "chunk": 16, "least_window": 128, "speculate": speculate} | keywords)


def made(engine, *requests):
    return list(run_all(engine, requests))[-1]


def repetitive(rng):
    """A request whose prompt repeats itself."""
    prompt = rng.choice([[20, 21, 22, 23, 24], [30, 31, 30, 32], [40]]) * 12
    return replace(random_request(rng), prompt=prompt[: rng.randrange(1, 40)])


@pytest.mark.parametrize("kind", ["lookup", "other", "itself"])
@settings(max_examples=5, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_storm_of_requests_gets_what_the_uncached_model_makes(params, kinds, kind, rng):
    """At times more rows are live than are speculated for. Some requests are cancelled, rows are used again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer.engine, "MOST_ROWS", 2)
        engine = engine_of(params, kinds[kind], least_window=64 if kind == "lookup" else 128)
        submitted = []
        for _ in range(30):
            submitted.append(engine.submit(rng.choice([random_request, repetitive])(rng)))
            for _ in range(rng.choice([0, 0, 1, 10])):
                engine.step()
            if rng.random() < 0.1:
                rng.choice(submitted).cancel()
        while engine.busy:
            engine.step()
    for progress in submitted:
        request, tokens = progress.request, progress.tokens
        assert tokens == recomputed(params, request, tokens), request
        ended = bool(tokens) and tokens[-1] in request.stop_ids
        assert progress.finish in ("cancelled", "stop" if ended else "length")
        assert progress.finish == "cancelled" or ended or len(tokens) == request.max_new_tokens


@pytest.mark.parametrize("sampling", [Sampling(), VARIED], ids=["greedy", "sampled"])
def test_a_draft_that_is_the_model_is_always_right(params, kinds, passes, sampling):
    """Every pass then makes K + 1 tokens, whatever the settings, until the text ends, also within proposals."""
    request = Request(OPENINGS[0][:12], 30, sampling)
    (plain,) = made(engine_of(params), request)
    passes["decode"].clear()
    engine = engine_of(params, kinds["itself"], least_window=64)
    (fast,) = made(engine, request)
    assert fast.tokens == plain.tokens == recomputed(params, request, plain.tokens)
    assert passes == {"decode": [], "verify": [1] * -(-30 // (K + 1))}

    stop = next(i for i in range(9, 30) if plain.tokens[i] not in plain.tokens[:i] and i % (K + 1) != K)
    passes["verify"].clear()
    (stopped,) = made(engine, replace(request, stop_ids=[plain.tokens[stop]]))
    assert stopped.tokens == plain.tokens[: stop + 1] and stopped.finish == "stop"
    assert len(passes["verify"]) == -(-(stop + 1) // (K + 1))


@pytest.mark.parametrize("size", [59, 63, 61])
def test_proposals_may_reach_into_the_next_window(params, kinds, passes, size):
    """The model's window and the draft's: nothing is refused."""
    for seed in range(8):
        passes["verify"].clear()
        request = Request([*OPENINGS[1], *OPENINGS[2]][:size], 12, Sampling(temperature=1.5, seed=seed))
        (progress,) = made(engine_of(params, kinds["itself"], least_window=64, chunk=64), request)
        assert progress.tokens == recomputed(params, request, progress.tokens)
        assert passes == {"decode": [], "verify": [1] * 3}


def test_a_row_ends_within_proposals_on_the_device_too(params):
    """After a stop token, and at its last position: nothing more is made, counted or live."""
    for request, stops in ((Request(EVEN, 9), 2), (Request(EVEN, 3), None)):
        (plain,) = made(engine_of(params), replace(request, max_new_tokens=9))
        ids = () if stops is None else (plain.tokens[stops],)
        assert plain.tokens.index(plain.tokens[2]) == 2
        engine = engine_of(params)
        engine.submit(replace(request, stop_ids=ids))
        engine._take_waiting()
        engine._read_prompts()
        proposed = np.tile(np.array(plain.tokens[:6], np.int32), (4, 1))
        kept = np.array([True, False, False, False])
        device = engine._device
        rows, got = verify(params, device.slots, kept, proposed, device._allowed, np.int32(0), CONFIG, 1, 128, False)
        assert got.token.tolist() == [[*plain.tokens[:3], -1, -1, -1, -1]]
        assert not rows.live.any() and int(rows.position[0]) == int(rows.cache.lengths[0]) == len(EVEN) - 1 + 3
        assert rows.counts.sum(axis=1).tolist() == [3, 0, 0, 0] and int(rows.token[0]) == plain.tokens[2]


def test_a_draft_reads_a_long_prompt_in_pieces_while_the_model_goes_on(params, kinds, passes, monkeypatch):
    pieces, follow = [], proposals.follow

    def counted(params, cache, tokens, *rest):
        pieces.append(tokens.shape[1])
        return follow(params, cache, tokens, *rest)

    monkeypatch.setattr(proposals, "follow", counted)
    engine = engine_of(params, kinds["itself"], least_window=64)
    (first,) = made(engine, Request(OPENINGS[0], 40))
    assert passes == {"decode": [1, 1], "verify": [1] * 10}  # 39 tokens in pieces of 16; then 38 tokens, 4 in a pass
    assert first.tokens == recomputed(params, first.request, first.tokens)
    passes["decode"].clear()
    (again,) = made(engine, Request([*OPENINGS[0], *first.tokens[:20], 8], 10))
    assert passes["decode"] == [] and again.reused == 60  # the draft had read as much
    assert pieces == [16, 16, 16]  # no text but the first prompt
    assert again.tokens == recomputed(params, again.request, again.tokens)


def test_a_draft_proposes_what_it_makes_of_the_text_alone(params, monkeypatch):
    """Also after proposals were refused, and after steps without it, in rows that other requests had before."""
    other = init_params(CONFIG, jax.random.key(5))
    draft = per_layer(jax.tree.map(lambda a, b: 0.8 * a + 0.2 * b, init_params(CONFIG, jax.random.key(0)), other))
    engine, seen = engine_of(params, Draft(draft, CONFIG, K)), []
    real = engine._proposer.propose

    def propose(texts, *rest):
        proposed = real(texts, *rest)
        for text in texts if proposed is not None else ():
            owner = engine._rows[text.row].progress.request
            seen.append((owner.sampling, [*text.before, text.token], np.asarray(proposed)[text.row].tolist()))
        return proposed

    monkeypatch.setattr(engine._proposer, "propose", propose)
    monkeypatch.setattr(infer.engine, "MOST_ROWS", 2)
    warm = [Sampling(temperature=0.8, seed=seed) for seed in range(6)]
    prompts = [OPENINGS[0][:5], EVEN, OPENINGS[0][:30], OPENINGS[0][:7], EVEN[:6], [8]]
    asked = [Request(prompt, 10 + 9 * i, warm[i]) for i, prompt in enumerate(prompts)]
    for progress in [*made(engine, *asked), *made(engine, asked[2])]:
        assert progress.tokens == recomputed(params, progress.request, progress.tokens)
    checked = [entry for entry in seen if entry[2] != [-1] * K]
    alone = made(engine_of(draft), *(Request(text, K, sampling) for sampling, text, _ in checked))
    assert [progress.tokens for progress in alone] == [proposed for _, _, proposed in checked]
    lengths = [len(text) for sampling, text, _ in checked if sampling is warm[5]]
    assert {1, 2, K, K + 1} >= set(np.diff(lengths)) >= {1, K + 1}  # some were refused at once, some all accepted
    assert len(seen) - len(checked) < 12 < len(checked)


def scanned(text, longest, count):
    """What prompt lookup proposes, by looking through the whole text."""
    for n in range(longest, 0, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:] and len(text) > n:
                copied = list(text)
                for i in range(count):
                    copied.append(copied[start + n + i])
                return copied[len(text) :]
    return []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 6), st.randoms())
def test_the_index_of_n_grams_finds_what_a_scan_finds(text, longest, count, rng):
    before = text[: rng.randrange(len(text))]
    index = proposals.Index(before, longest)
    while len(before) < len(text):
        index.follow(proposals.Text(0, before, text[len(before)]))
        so_far = text[: len(before) + 1]
        assert index.proposals(count) == scanned(so_far, longest, count)
        before += text[len(before) : len(before) + rng.choice([1, 1, 3])]


@pytest.mark.parametrize("bias", [0.0, 30.0], ids=["model", "repeating"])
def test_lookup_takes_the_passes_that_its_rule_gives(params, kinds, passes, bias):
    """With a bias for one token the model repeats it, and nearly every proposal is right."""
    request = Request(EVEN, 40, Sampling(logit_bias=((5, bias),)))
    (progress,) = made(engine_of(params, kinds["lookup"]), request)
    assert progress.tokens == recomputed(params, request, progress.tokens)
    expected, done, pause, wait = {"decode": [], "verify": []}, 0, 0, 0
    while done < 40:
        proposed = scanned([*EVEN, *progress.tokens[:done]], 3, K) if wait == 0 else []
        expected["verify" if proposed else "decode"].append(1)
        right = [*(a == b for a, b in zip(proposed, progress.tokens[done:], strict=False)), False].index(False)
        done += 1 + right
        if proposed:
            pause = 0 if right else min(max(1, 2 * pause), 16)
            wait = pause
        else:
            wait = max(0, wait - 1)
    assert passes == expected
    assert len(passes["verify"]) <= 12 or bias == 0


def test_more_than_four_live_rows_are_decoded_plainly(params, kinds, passes):
    asked = [Request(EVEN[: 4 + i], 4 + 6 * i, replace(VARIED, seed=i)) for i in range(5)]
    engine = engine_of(params, kinds["lookup"], rows=5)
    for progress in made(engine, *asked):
        assert progress.tokens == recomputed(params, progress.request, progress.tokens)
    assert 5 in passes["decode"] and max(passes["verify"]) == 4


@pytest.mark.parametrize("kind", ["lookup", "itself"])
def test_scores_are_those_of_plain_decoding(params, kinds, kind):
    asked = [Request(EVEN, 20, VARIED, logprobs=4), Request(OPENINGS[1][:9], 15, logprobs=0, score_prompt=True)]
    asked.append(Request(EVEN[3:], 10))
    plain, fast = made(engine_of(params), *asked), made(engine_of(params, kinds[kind]), *asked)
    for one, other in zip(plain, fast, strict=True):
        assert one.tokens == other.tokens
        for field in ("logprobs", "prompt_logprobs"):
            a, b = getattr(one, field), getattr(other, field)
            assert [score.token for score in a] == [score.token for score in b]
            for x, y in zip(a, b, strict=True):
                np.testing.assert_allclose(x.logprob, y.logprob, atol=1e-4)
                np.testing.assert_allclose([v for _, v in x.top], [v for _, v in y.top], atol=1e-4)
    assert len(fast[0].logprobs) == 20 and len(fast[0].logprobs[0].top) == 4 and fast[2].logprobs == []


def test_a_stop_string_ends_the_text_within_proposals(params, kinds, tmp_path):
    tokenizer = load_tokenizer(small.small_tokenizer(tmp_path))
    request = Request(OPENINGS[0][:12], 40, VARIED)
    (plain,) = made(engine_of(params, tokenizer=tokenizer), request)
    for at in (5, 6, 7, 8):
        stop = replace(request, stop=[plain.text[at : at + 2]])
        (slow,) = made(engine_of(params, tokenizer=tokenizer), stop)
        (fast,) = made(engine_of(params, kinds["itself"], tokenizer=tokenizer), stop)
        assert (fast.text, fast.tokens, fast.finish) == (slow.text, slow.tokens, "stop")


@pytest.mark.parametrize("kind", ["lookup", "other"])
def test_after_warming_up_nothing_compiles(params, kinds, kind):
    engine = engine_of(params, kinds[kind], rows=2)
    programs = engine.warm_up(scored=True)
    for seed in range(6):
        sampling = replace(VARIED, seed=seed)
        prompts = [(OPENINGS[seed % 3], EVEN)[i % 2][: 1 + 7 * i] for i in range(4)]
        made(engine, *(Request(p, 30 + seed * 11, sampling, (seed,), logprobs=seed % 2 or None) for p in prompts))
    engine.reset(RuntimeError("device lost"))
    made(engine, Request(EVEN, 20))
    functions: tuple[Any, ...] = (slots.decode, slots.extend, slots.admit, slots.copy_row, speculative.verify)
    functions += () if kind == "lookup" else (proposals.follow, proposals.draw)
    assert sum(function._cache_size() for function in functions) == programs


@pytest.mark.parametrize("kind", ["lookup", "other"])
def test_after_a_failure_rows_begin_anew(params, kinds, kind):
    engine = engine_of(params, kinds[kind])
    lost = engine.submit(Request(EVEN, 30))
    for _ in range(4):
        engine.step()
    engine.reset(RuntimeError("device lost"))
    assert lost.finish == "error"
    (progress,) = made(engine, Request(EVEN, 30, VARIED))
    assert progress.tokens == recomputed(params, progress.request, progress.tokens)


def test_rows_are_checked_with_their_own_adapters(kinds):
    trees, base = [], init_params(CONFIG, jax.random.key(0))
    for seed in range(2):
        trees.append(per_layer(adapted(base, seed, rank=2)))
    both = side_by_side(trees, times)
    asked = [Request(EVEN, 12, VARIED, adapter=i) for i in (-1, 0, 1)]
    plain, fast = made(engine_of(both), *asked), made(engine_of(both, kinds["itself"]), *asked)
    assert [progress.tokens for progress in plain] == [progress.tokens for progress in fast]
    assert len({tuple(progress.tokens) for progress in fast}) == 3


TINY = replace(CONFIG, vocab_size=16, hidden_size=16, initializer_range=0.3)
PENALIZED = Sampling(
    temperature=1.1, top_p=0.95, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4,
    logit_bias=((4, 1.0),),
)  # fmt: skip


def exact(params, texts, new):
    """The distribution after each of `texts`, whose last `new` tokens were made, written anew from the settings."""
    logits = np.asarray(forward(params, jnp.array(texts), TINY)[0][:, -1], np.float64)
    seen = np.array([np.isin(np.arange(16), text) for text in texts])
    logits = np.where(seen, np.where(logits < 0, logits * 1.3, logits / 1.3), logits)
    counts = np.array([np.bincount(text[len(text) - new :], minlength=16) for text in texts])
    logits -= 0.5 * (counts > 0) + 0.4 * counts
    logits[:, 4] += 1.0
    chances = np.exp(logits / 1.1)
    chances /= chances.sum(axis=1, keepdims=True)
    for row in chances:
        order = np.argsort(-row)
        row[order[np.cumsum(row[order]) - row[order] > 0.95]] = 0
    return chances / chances.sum(axis=1, keepdims=True)


def test_the_distribution_is_exactly_the_models():
    """The first three tokens of 8,192 seeds, from the proposals of a draft that is right about half of the time."""
    N, prompt, new = 8192, [3, 5], 3
    params = per_layer(init_params(TINY, jax.random.key(1)))
    draft = per_layer(init_params(TINY, jax.random.key(2)))
    draft = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, params, draft)
    settings = stack_sampling([replace(PENALIZED, seed=seed) for seed in range(N)])
    caches = [init_cache(TINY, N, 16).unstack() for _ in range(2)]
    rows = empty_slots(caches[0], settings, 16)
    rows = rows._replace(
        token=jnp.full(N, prompt[1]), position=jnp.full(N, 1), last=jnp.full(N, 15), live=jnp.ones(N, bool),
        in_prompt=rows.in_prompt.at[:, jnp.array(prompt)].set(True),
    )  # fmt: skip
    first = jnp.full((N, 1), prompt[0])
    _, cache = forward(params, first, TINY, cache=rows.cache)
    _, own = forward(draft, first, TINY, cache=caches[1])
    rows = rows._replace(cache=cache)
    texts, everyone = [list(prompt) for _ in range(N)], np.ones(N, bool)
    anything = np.full((N, 1), (1 << 16) - 1, np.uint32)  # a bit for each of the sixteen tokens
    accepted = asked = 0
    while min(map(len, texts)) < len(prompt) + new:
        before = np.array([text[-2] for text in texts], np.int32)
        own, proposed = draw(draft, own, rows, before, everyone, np.int32(16), np.int32(0), TINY, 2, N, 16)
        rows, tokens = verify(params, rows, everyone, proposed, anything, np.int32(0), TINY, N, 16, False)
        for text, more in zip(texts, np.asarray(tokens.token).tolist(), strict=True):
            text += [token for token in more if token >= 0]
        accepted, asked = accepted + int((tokens.token[:, 1:] >= 0).sum()), asked + 2 * N
    assert 0.3 < accepted / asked < 0.9

    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for i in range(new):
        following = exact(params, [prompt + list(tokens) for tokens in chances], i)
        chances = {
            (*tokens, token): p * q
            for (tokens, p), row in zip(chances.items(), following, strict=True)
            for token, q in enumerate(row)
            if q
        }
    seen = dict.fromkeys(chances, 0)
    for text in texts:
        seen[tuple(text[len(prompt) : len(prompt) + new])] += 1  # a KeyError for what can not be
    often = [tokens for tokens in chances if N * chances[tokens] >= 5]
    observed, expected = [seen[tokens] for tokens in often], [N * chances[tokens] for tokens in often]
    assert len(often) > 50
    observed, expected = [*observed, N - sum(observed)], [*expected, N - sum(expected)]
    assert stats.chisquare(observed, expected).pvalue > 0.01


def test_what_can_not_propose_is_refused(params, tmp_path, monkeypatch):
    other = replace(CONFIG, vocab_size=95)
    with pytest.raises(PunaError, match="the draft's vocab_size is 95 and the model's 96"):
        engine_of(params, Draft(params, other))
    with pytest.raises(PunaError, match="tokens is 0: give a whole number from 1 on"):
        engine_of(params, Draft(params, CONFIG, 0))
    with pytest.raises(PunaError, match="longest is 0"):
        engine_of(params, PromptLookup(longest=0))
    for name, size in (("own", 300), ("fewer", 290), ("other", 300)):
        (tmp_path / name).mkdir()
        if name == "other":
            monkeypatch.setattr(small, "CORPUS", [text[::-1] for text in small.CORPUS])
        small.small_tokenizer(tmp_path / name, vocab_size=size)
    own, fewer, other = (load_tokenizer(tmp_path / name) for name in ("own", "fewer", "other"))
    with pytest.raises(PunaError, match=f"the draft's tokenizer has {fewer.vocab_size} tokens and the model's"):
        engine_of(params, Draft(params, CONFIG, tokenizer=fewer), tokenizer=own)
    with pytest.raises(PunaError, match="to the draft and .* to the model"):
        engine_of(params, Draft(params, CONFIG, tokenizer=other), tokenizer=own)
    engine_of(params, Draft(params, CONFIG, tokenizer=own), tokenizer=load_tokenizer(tmp_path / "own"))
