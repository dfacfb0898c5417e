"""Speculative decoding makes what plain decoding makes, token for token, in fewer passes of the model."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from small_tokenizer import small_tokenizer
from test_engine import CONFIG, OPENINGS, random_request, recomputed

import infer.engine
import infer.speculative
from infer import slots
from infer.engine import Engine, Request, run_all
from infer.sample import Sampling, keep, stack_sampling
from infer.slots import empty_slots
from infer.speculative import Draft, PromptLookup, Room, Text, proposer
from model import LlamaConfig, forward, init_params
from model.cache import init_cache
from model.errors import PunaError
from model.layout import per_layer
from model.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

WORDS = [[20, 21, 22, 23, 24], [30, 31, 30, 32], [40]]
KINDS = ["lookup", "other", "itself"]


@pytest.fixture(scope="module")
def params():
    return per_layer(init_params(CONFIG, jax.random.key(0)))


def speculation(kind, params):
    if kind == "lookup":
        return PromptLookup(5)
    if kind == "itself":
        return Draft(params, CONFIG, 3)
    small = replace(CONFIG, hidden_size=16, num_hidden_layers=1, max_position_embeddings=100)
    return Draft(per_layer(init_params(small, jax.random.key(5))), small, 2)


def engine_of(params, speculate, rows=4, **keywords):
    return Engine(params, CONFIG, rows=rows, chunk=16, least_window=64, speculate=speculate, **keywords)


def repetitive(rng, sampling=None, **keywords):
    """A prompt that repeats itself, and a bias for its tokens, so that the text goes on repeating them now and then."""
    request = random_request(rng)
    prompt = (rng.choice(WORDS) * 12)[: rng.randrange(1, 40)]
    return Request(prompt, request.max_new_tokens, sampling or request.sampling, request.stop_ids, **keywords)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_storm_of_requests_gets_what_the_uncached_model_makes(params, kind, rng):
    """Six rows: at times more are live than speculation is for. Some requests are cancelled, rows are used again."""
    engine = engine_of(params, speculation(kind, params), rows=6)
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
