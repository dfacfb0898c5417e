"""A tiny model, requests to an engine of it, and the tokens that it makes of them without a cache."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from infer.request import Request
from infer.sample import Sampling, sample, stack_sampling
from model import LlamaConfig, forward
from model.lora import LoraArray, add

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.4, eos_token_id=(),
)  # fmt: skip
STOP = 7
OPENINGS = np.random.default_rng(0).integers(8, 96, (3, 40)).tolist()  # what prompts have in common


@partial(jax.jit, static_argnames="vocab")
def choices(params, tokens, sampling, seen, counts, vocab):
    """What each position of one text [T] makes of the next token, without a cache."""
    logits = forward(params, tokens[None], CONFIG)[0][0]
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x[0], (len(tokens), *x.shape[1:])), sampling)
    return sample(logits, rows, seen, jnp.arange(len(tokens)) + 1, counts)


def recomputed(params, request, tokens):
    """The tokens that follow the prompt, each computed from all before it at once."""
    text = [*request.prompt, *tokens]
    counts = np.zeros((128, CONFIG.vocab_size), np.int32)
    for i, token in enumerate(tokens, len(request.prompt)):
        counts[i:, token] += 1
    seen = counts > 0
    seen[:, list(request.prompt)] = True
    padded = np.zeros(128, np.int32)
    padded[: len(text)] = text
    new = choices(params, padded, stack_sampling([request.sampling]), seen, counts, CONFIG.vocab_size)
    return np.asarray(new)[len(request.prompt) - 1 : len(text) - 1].tolist()


def random_request(rng, adapters=0):
    """Any length, sampling and stop; with one of so many adapters, or none."""
    sampling = Sampling(
        temperature=rng.choice([0.0, 0.0, 0.7, 1.3]),
        top_k=rng.choice([0, 5]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        presence_penalty=rng.choice([0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, -0.3]),
        logit_bias=rng.choice([(), ((11, 3.0), (12, -100.0))]),
        seed=rng.randrange(2**40),
    )
    rest = [rng.randrange(8, 96) for _ in range(rng.randrange(1, 20))]
    prompt = rng.choice(OPENINGS)[: rng.choice([0, 17, 30, 40])] + rest
    stops, adapter = rng.choice([(), (STOP,)]), rng.randrange(-1, adapters)
    return Request(prompt, rng.randrange(1, 40), sampling, stop_ids=stops, adapter=adapter)


def adapted(params, seed, **settings):
    """The stacked model under a LoRA adapter that does something."""

    def moved(leaf):
        if not isinstance(leaf, LoraArray):
            return leaf
        return replace(leaf, b=jax.random.normal(jax.random.key(seed + 9), leaf.b.shape))

    tree = add(params, CONFIG, jax.random.key(seed), alpha=8, targets=["q_proj", "down_proj"], **settings)[1]
    return jax.tree.map(moved, tree, is_leaf=lambda node: isinstance(node, LoraArray))
