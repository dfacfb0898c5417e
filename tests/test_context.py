"""Where a mesh splits the tokens of rows, loss and gradients are those of one device, and a plan says what it costs."""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_plan import ROOT, small
from test_train_step import SMALL, config_of, make_rows

from model import init_params, make_mesh
from model.errors import PunaError
from train.attention import choose_attention
from train.objective import make_objective
from train.plan import make_plan, report
from train.state import abstract_batch, abstract_state, join, make_state, shardings_of
from train.step import accumulate

pytestmark = pytest.mark.slow

LENGTH = 48  # in blocks of 3 tokens on eight devices: segments cross several
ROWS = make_rows(0, length=LENGTH)


def settings(**sections):
    return config_of(**sections | {"data": {"max_length": LENGTH} | sections.get("data", {})})


def gradients(config, sizes: dict[str, int]):
    """The loss of a batch over what is trained, and its gradients."""
    mesh = make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    objective, abstract = make_objective(config, SMALL, mesh), abstract_state(config, SMALL, mesh)
    state = jax.jit(lambda p: make_state(config, SMALL, p), out_shardings=shardings_of(abstract))(
        init_params(SMALL, jax.random.key(0))
    )
    trained = jax.tree.map(lambda x: x + 0.01, state.params)  # with zeros for b, a of an adapter would have no gradient
    rows = {name: jax.device_put(ROWS[name], x.sharding) for name, x in abstract_batch(config, mesh).items()}

    @jax.jit
    def run(trained, rows):
        def each(trained, part, key):
            return objective.loss(join(trained, state.frozen), part, rows)

        with jax.default_matmul_precision("highest"):
            (total, _), grads = accumulate(
                each, trained, rows, jax.random.key(0), config.run.gradient_accumulation_steps
            )
        return jax.tree.map(lambda x: x / objective.units(rows), (total, grads))

    return jax.device_get(run(trained, rows))


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    for (path, own), other in zip(
        jax.tree_util.tree_leaves_with_path(ours[1]), jax.tree.leaves(theirs[1]), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-5 * np.abs(other).max(), err_msg=name)


@pytest.fixture(scope="module")
def alone():
    return gradients(settings(), {"fsdp": 1})


@pytest.mark.parametrize(
    ("sizes", "sections"),
    [
        ({"context": 4, "fsdp": 2}, {"model": {"remat": "dots"}}),
        ({"context": 8}, {"run": {"gradient_accumulation_steps": 2}}),
        (
            {"context": 2, "fsdp": 2, "tensor": 2},
            {"model": {"remat": "full", "loss_chunk": 16}, "mesh": {"sequence_parallel": True, "tensor": 2}},
        ),
        ({"context": 2, "data": 2}, {"model": {"attention": "xla"}}),  # the compiler gathers keys and values
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_one_device(alone, sizes, sections):
    assert_same(gradients(settings(**sections), sizes), alone)


def test_adapters_train_as_on_one_device():
    config = settings(lora={"rank": 4})
    assert_same(gradients(config, {"context": 2}), gradients(config, {"fsdp": 1}))


@pytest.mark.parametrize(
    ("sizes", "remat"), [({"context": 4, "data": 2}, "none"), ({"context": 2, "fsdp": 2, "tensor": 2}, "full")], ids=str
)
def test_a_plan_is_within_two_per_cent_of_theory(sizes, remat):
    parallel = "tensor" in sizes
    plan = make_plan(small(sizes, remat=remat, sequence_parallel=parallel, num_key_value_heads=4))
    for moved, theory in (plan.gathered, plan.reduced, plan.passed):
        assert moved == pytest.approx(theory, rel=0.02)
    assert plan.passed[0] > 0
    assert f"context={sizes['context']}" in report(plan, {}).splitlines()[0]


@pytest.mark.soak
def test_seventy_billion_at_131072_tokens_fit_64_gpus_of_80_gb():
    command = [sys.executable, "-m", "train", "plan", "configs/llama3-70b-128k.toml", "--devices", "64"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=True).stdout
    assert said.startswith("70,553,706,496 parameters on 64 devices (data=1 fsdp=1 context=8 tensor=8)")
    assert re.search(r"^ +80 GB +fits$", said, re.MULTILINE)
    for moved, theory in re.findall(r"(?:gathered|reduced|ring) ([\d.]+) GB, in theory ([\d.]+)", said):
        assert float(moved) == pytest.approx(float(theory), rel=0.02)


def test_what_does_not_fit_the_axis_is_refused():
    mesh = make_mesh(context=4, devices=jax.devices()[:4])
    with pytest.raises(PunaError, match="data.max_length 44 does not divide into two blocks for each part of mesh.con"):
        abstract_batch(settings(data={"max_length": 44}), mesh)
    with pytest.raises(PunaError, match="model.attention 'cudnn' needs whole rows, and mesh.context 4 splits them"):
        choose_attention(settings(model={"attention": "cudnn"}), SMALL, mesh)
    with pytest.raises(PunaError, match="model.attention 'ring' is for rows that mesh.context splits, and it is 1"):
        choose_attention(settings(model={"attention": "ring"}), SMALL, make_mesh(devices=jax.devices()[:1]))
