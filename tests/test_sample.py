"""Each filter of the sampler equals transformers' logits processor, row by row and all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from infer.sample import Sampling, keep, penalize, sample, stack_sampling
from model.errors import PunaError

VOCAB = 1000


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(scale=3, size=(4, VOCAB)).astype(np.float32)


def by_transformers(logits, processors, seen=None):
    scores = torch.from_numpy(logits)
    for processor in processors:
        scores = processor(seen, scores)
    return scores.numpy()


def filtered(logits, *samplings):
    return np.asarray(keep(jnp.asarray(logits), stack_sampling(list(samplings))))


@pytest.mark.parametrize("k", [1, 2, 50, VOCAB, 5 * VOCAB])
def test_top_k(logits, k):
    expected = by_transformers(logits, [hf.TopKLogitsWarper(k)])
    np.testing.assert_array_equal(filtered(logits, *[Sampling(top_k=k)] * 4), expected)


def test_top_k_keeps_ties():
    logits = np.array([[1.0, 3.0, 2.0, 2.0, 2.0, -1.0]], np.float32)
    expected = by_transformers(logits, [hf.TopKLogitsWarper(2)])
    np.testing.assert_array_equal(filtered(logits, Sampling(top_k=2)), expected)


@pytest.mark.parametrize("p", [0.001, 0.3, 0.9, 0.98, 1.0])
def test_top_p(logits, p):
    processors = [hf.TopPLogitsWarper(p)] if p < 1 else []
    np.testing.assert_array_equal(filtered(logits, *[Sampling(top_p=p)] * 4), by_transformers(logits, processors))


@pytest.mark.parametrize("p", [0.0, 0.001, 0.05, 1.0])
def test_min_p(logits, p):
    np.testing.assert_array_equal(
        filtered(logits, *[Sampling(min_p=p)] * 4), by_transformers(logits, [hf.MinPLogitsWarper(p)])
    )


def test_rows_differ_and_filters_compose(logits):
    settings = [(40, 0.9, 0.0), (0, 0.5, 0.1), (3, 1.0, 0.0), (0, 1.0, 0.0)]
    ours = filtered(logits, *[Sampling(top_k=k, top_p=p, min_p=m) for k, p, m in settings])
    for row, (k, p, m) in enumerate(settings):
        processors = [hf.TopKLogitsWarper(k)] if k else []
        processors += [hf.TopPLogitsWarper(p)] if p < 1 else []
        processors += [hf.MinPLogitsWarper(m)] if m else []
        np.testing.assert_array_equal(ours[row], by_transformers(logits[row : row + 1], processors)[0])


def test_top_p_is_meta_s_rule():
    """A token stays where the likelier ones sum to at most p, the one that crosses p included (FACTS M4)."""
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32))
    kept = np.isfinite(filtered(np.repeat(logits, 3, 0), *[Sampling(top_p=p) for p in (0.4, 0.6, 0.8)]))
    np.testing.assert_array_equal(kept, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])


def test_repetition_penalty(logits):
    ids = np.random.default_rng(1).integers(VOCAB, size=(4, 20))
    seen = np.zeros((4, VOCAB), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    ours = penalize(jnp.asarray(logits), stack_sampling([Sampling(repetition_penalty=1.3)] * 4), jnp.asarray(seen))
    expected = by_transformers(logits, [hf.RepetitionPenaltyLogitsProcessor(1.3)], torch.from_numpy(ids))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def draws(logits, sampling, count):
    """`count` draws from one row of logits, at as many positions."""
    one = jnp.asarray(logits)[None]
    draw = jax.jit(lambda at: sample(one, stack_sampling([sampling]), jnp.zeros(one.shape, bool), at[None])[0])
    return np.asarray(jax.lax.map(draw, jnp.arange(count)))


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.07, 0.03], np.float32))
    count = 20_000
    found = np.bincount(draws(logits, Sampling(temperature=2.0, top_k=4, seed=5), count), minlength=5)
    kept = by_transformers(logits[None], [hf.TemperatureLogitsWarper(2.0), hf.TopKLogitsWarper(4)])
    expected = count * np.exp(kept[0]) / np.exp(kept[0]).sum()
    assert found[4] == 0
    chi2 = ((found[:4] - expected[:4]) ** 2 / expected[:4]).sum()
    assert chi2 < 16.3  # the 99.9th percentile for three degrees of freedom; seeded, so the same each run


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours(logits):
    mixed = [Sampling(), Sampling(1.0, seed=1), Sampling(0.7, top_k=20, seed=2), Sampling(1.3, top_p=0.9, seed=3)]
    seen = jnp.zeros((4, VOCAB), bool)
    together = sample(jnp.asarray(logits), stack_sampling(mixed), seen, jnp.arange(4))
    for row, sampling in enumerate(mixed):
        alone = sample(jnp.asarray(logits[row : row + 1]), stack_sampling([sampling]), seen[:1], jnp.array([row]))
        assert alone[0] == together[row]
    assert together[0] == logits[0].argmax()


def test_new_settings_do_not_recompile(logits):
    compiled = jax.jit(sample)
    seen = jnp.zeros((4, VOCAB), bool)
    for sampling in (Sampling(), Sampling(0.5, seed=9), Sampling(1.5, top_k=3), Sampling(1.0, top_p=0.5, min_p=0.1)):
        compiled(jnp.asarray(logits), stack_sampling([sampling] * 4), seen, jnp.arange(4))
    assert compiled._cache_size() == 1


def test_seeds_use_all_their_bits(logits):
    seeds = [0, 1, 2**32, 2**40 + 1]
    keys = jax.random.key_data(stack_sampling([Sampling(seed=seed) for seed in seeds]).key)
    assert len(np.unique(keys, axis=0)) == len(seeds)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(PunaError, match=f"{name} is {value}"):
        Sampling(**{name: value})
