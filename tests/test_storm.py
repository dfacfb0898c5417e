"""A storm of requests: each gets what the uncached model makes of it, and nothing compiles on the way."""

import random

import jax
import pytest
from uncached import CONFIG, adapted, random_request, recomputed

from infer.engine import Engine
from model import init_params
from model.layout import per_layer
from model.linear import product
from model.selected import side_by_side

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trees():
    """The model under no adapter, and under each of two."""
    params = init_params(CONFIG, jax.random.key(0))
    return [params, adapted(params, 0, rank=2), adapted(params, 1, rank=2)]


@pytest.mark.parametrize(("storms", "count"), [(1, 50), pytest.param(12, 50, marks=pytest.mark.soak)])
def test_a_storm_of_requests_gets_what_the_uncached_model_makes(trees, storms, count):
    """They come at any time, with either adapter or none; some are cancelled; rows and prefixes are used again."""
    params = side_by_side([per_layer(tree) for tree in trees[1:]], product)
    finished = set()
    for storm in range(storms):
        rng = random.Random(1000 * storms + storm)
        engine = Engine(params, CONFIG, rows=4, chunk=rng.choice([16, 16, 64]), least_window=64)
        programs = engine.warm_up()
        submitted, streamed = [], {}
        for _ in range(count):
            streamed[len(submitted)] = seen = []
            # Each time there is more, what came since the last time: what a streamed answer sends.
            request = random_request(rng, adapters=2)
            submitted.append(engine.submit(request, lambda one, seen=seen: seen.extend(one.tokens[len(seen) :])))
            for _ in range(rng.randrange(4)):
                engine.step()
            if rng.random() < 0.1:
                rng.choice(submitted).cancel()
        while engine.busy:
            engine.step()
        assert engine.programs == programs
        assert sum(progress.reused > 0 for progress in submitted) > count / 10
        finished |= {progress.finish for progress in submitted}
        for number, progress in enumerate(submitted):
            request, tokens = progress.request, progress.tokens
            assert tokens == recomputed(trees[request.adapter + 1], request, tokens), (storm, request)
            assert streamed[number] == tokens
            ended = bool(tokens) and tokens[-1] in request.stop_ids
            assert progress.finish in ("cancelled", "stop" if ended else "length")
            assert progress.finish == "cancelled" or ended or len(tokens) == request.max_new_tokens
    assert finished == {"cancelled", "stop", "length"}
