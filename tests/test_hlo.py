"""Compiled programs are read as XLA writes them: on texts of its CPU and GPU compilers, cut to what matters."""

import math
import os

import jax
import jax.numpy as jnp
import pytest

from cli import gpu
from cli.hlo import Program, Traffic, collectives, size
from cli.roofline import ATTENTION, LINK, MEMORY, PRODUCTS, estimate
from model.errors import PunaError

H100 = gpu.GPUS["h100"]

CPU = """HloModule m
%body (p: (f32[4])) -> (f32[4]) {
  %x = f32[1,4]{1,0} parameter(0)
  %g = f32[8,4]{1,0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %n = f32[1,4]{1,0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %t = (f32[4]) parameter(0)
  %x = bf16[8,4]{1,0} parameter(1)
  %a = f32[] parameter(2)
  %b = s32[3]{0} parameter(3)
  %w = (f32[4]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %s = bf16[2,4]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %r = (f32[], s32[3]{0}) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}, to_apply=%add
  %q = bf16[2,4]{1,0} reduce-scatter(%x), replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=1] {'data','fsdp'}
  %o = f32[8,4]{1,0} all-gather(%b), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}
}
"""

# A layer's loop: a product that reads one layer of a stack, cuDNN attention, and a gather beside them.
GPU = """HloModule jit_step, is_scheduled=true
%gemm (p0: bf16[16,64,32], p1: s32[], p2: bf16[8,64]) -> bf16[8,32] {
  %p0 = bf16[16,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,32]{2,1,0} dynamic-slice(%p0, %p1, %zero, /*index=3*/%zero), dynamic_slice_sizes={1,64,32}
  %w = bf16[64,32]{1,0} bitcast(%slice)
  %p2 = bf16[8,64]{1,0} parameter(2)
  ROOT %dot.1 = bf16[8,32]{1,0} dot(%p2, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%update (p0: bf16[16,8,32], p1: bf16[8,32], p2: s32[]) -> bf16[16,8,32] {
  %p0.1 = bf16[16,8,32]{2,1,0} parameter(0)
  %p1.1 = bf16[8,32]{1,0} parameter(1)
  %part = bf16[1,8,32]{2,1,0} bitcast(%p1.1)
  %p2.1 = s32[] parameter(2)
  ROOT %dus = bf16[16,8,32]{2,1,0} dynamic-update-slice(%p0.1, %part, %p2.1, %p2.1, %p2.1)
}
%layer (arg: (s32[], bf16[16,64,32])) -> (s32[], bf16[16,64,32]) {
  %arg = (s32[], bf16[16,64,32]{2,1,0}, bf16[8,64]{1,0}, bf16[16,8,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %ws = bf16[16,64,32]{2,1,0} get-tuple-element(%arg), index=1
  %x = bf16[8,64]{1,0} get-tuple-element(%arg), index=2
  %kept = bf16[16,8,32]{2,1,0} get-tuple-element(%arg), index=3
  %start = (bf16[1,64]{1,0}, bf16[8,64]{1,0}) all-gather-start(%piece), replica_groups=[1,8]<=[8], dimensions={0}
  %piece = bf16[1,64]{1,0} copy(%x)
  %gathered = bf16[8,64]{1,0} all-gather-done(%start)
  %y = bf16[8,32]{1,0} fusion(%ws, %i, %gathered), kind=kCustom, calls=%gemm, backend_config={"kind":"__triton_gemm"}
  %q = bf16[2,64,4,16]{3,2,1,0} bitcast(%x)
  %k = bf16[2,64,2,16]{3,2,1,0} bitcast(%x)
  %fmha = (bf16[2,4,64,16]{3,1,2,0}, f32[2,4,64]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"mask_type":"CAUSAL"}
  %back = (bf16[2,4,64,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"mask_type":"PADDING_CAUSAL"}
  %keep = ((bf16[16,8,32]{2,1,0}, bf16[8,32]{1,0}, s32[]), bf16[16,8,32]{2,1,0}, u32[]) fusion-start(%kept, %y, %i), kind=kLoop, calls=%update
  ROOT %out = (s32[], bf16[16,64,32]{2,1,0}) tuple(%i, %ws)
}
ENTRY %main (p: bf16[16,64,32]) -> bf16[16,64,32] {
  %p = (s32[], bf16[16,64,32]{2,1,0}) parameter(0)
  %loop = (s32[], bf16[16,64,32]{2,1,0}) while(%p), condition=%test, body=%layer, backend_config={"known_trip_count":{"n":"16"}}
  %waited = bf16[8,64]{1,0} all-reduce-start(%p.2), replica_groups={{0,1}}, to_apply=%add, backend_config={"collective_backend_config":{"is_sync":true}}
  %p.2 = bf16[8,64]{1,0} parameter(1)
}
"""  # noqa: E501


def test_collectives_are_read_from_hlo():
    assert collectives(Program(CPU)) == {
        "all-gather": Traffic(4, 3 * 8 * 4 * 4 + 4 * 3 * 4),
        "reduce-scatter": Traffic(2, 8 * 4 * 2 * 2),
        "all-reduce": Traffic(1, 4 + 12),
    }


def test_collectives_of_gpus_say_whether_they_are_waited_for():
    assert collectives(Program(GPU)) == {
        "all-gather": Traffic(16, 16 * 8 * 64 * 2, asynchronous=16),
        "all-reduce": Traffic(1, 8 * 64 * 2),
    }


def test_of_a_stack_the_slice_is_read_and_written():
    program = Program(GPU)
    by_name = {run.instruction.name: run for run in program.runs}
    assert {run.times for run in program.runs if run.instruction.name != "waited"} == {16}
    weights, rows, results = 64 * 32 * 2, 8 * 64 * 2, 8 * 32 * 2
    assert program.moved(by_name["y"]) == weights + 4 + rows + results
    assert program.moved(by_name["keep"]) == results + 4 + results
    assert program.flops(by_name["y"]) == 2 * 8 * 64 * 32


def test_the_roofline_is_the_longer_of_arithmetic_and_memory():
    made = estimate(Program(GPU), H100)
    assert made.shares["products"].count == 16
    memory = 16 * (64 * 32 * 2 + 4 + 8 * 64 * 2 + 8 * 32 * 2) / (MEMORY * H100.bandwidth)
    assert made.shares["products"].seconds == pytest.approx(memory)  # few rows: the weight is what takes long
    assert made.shares["products"].flops / (PRODUCTS * H100.bf16) < memory
    assert made.shares["attention"].count == 32
    forward = 4 * 2 * 64 * 4 * 16 * 64 / 2
    assert made.shares["attention"].flops == pytest.approx(16 * 3.5 * forward)
    assert made.shares["attention"].seconds >= 16 * forward / (ATTENTION["forward"] * H100.bf16)
    assert made.hidden == pytest.approx(16 * 8 * 64 * 2 * 7 / 8 / (LINK * H100.link))
    assert made.waited == pytest.approx(2 * 8 * 64 * 2 / 2 / (LINK * H100.link))


def test_every_line_of_a_real_program_is_read():
    """A program compiled here: its products, loops and sizes are those it was written with."""

    @jax.jit
    def loop(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    x, ws = jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((5, 128, 128), jnp.float32)
    program = Program(loop.lower(x, ws).compile().as_text())
    assert sum(run.times * program.flops(run) for run in program.runs) == 5 * 2 * 64 * 128 * 128
    parameters = [one for one in program.computations[program.entry].values() if one.opcode == "parameter"]
    assert sorted(one.bytes for one in parameters) == [4 * 64 * 128, 4 * 5 * 128 * 128]


def test_sizes():
    assert size("(f32[8,128]{1,0}, s4[3,2]{1,0}, token[])") == 8 * 128 * 4 + 3 and math.isclose(size("f32[]"), 4)


def test_a_gpu_that_is_not_known_and_a_compiler_that_is_not_here_are_refused(monkeypatch):
    with pytest.raises(PunaError, match="--gpu a100 is not known; choose h100, h200"):
        gpu.gpu_named("a100")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    said = (
        r"--gpu h200: the compiler for it is not here; install it on Python 3.12 with `pip install 'puna\[gpu-plan\]'`"
    )
    with pytest.raises(PunaError, match=said), gpu.devices_of("h200"):
        pass


def test_what_is_set_for_gpus_is_what_nobody_has_set():
    assert gpu.unset({}) == gpu.ENVIRONMENT
    assert gpu.unset({"XLA_CLIENT_MEM_FRACTION": "0.5"}).keys() == {"JAX_OPTIMIZATION_LEVEL"}
    assert gpu.unset(dict.fromkeys(gpu.ENVIRONMENT, "")) == {}
    assert gpu.gpu_count({"CUDA_VISIBLE_DEVICES": "2,3"}) == 2 and gpu.gpu_count({"JAX_PLATFORMS": "cpu"}) == 0


def test_a_process_with_a_gpu_sets_what_nobody_has_set_and_says_so_once(monkeypatch, capsys):
    level = jax.config.jax_optimization_level
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_OPTIMIZATION_LEVEL"):
        monkeypatch.setenv(name, "")  # so that what is set here goes again
        monkeypatch.delenv(name)
    try:
        for _ in range(2):
            gpu.set_defaults()
        assert jax.config.jax_optimization_level == "O1"
        assert {name: os.environ[name] for name in gpu.ENVIRONMENT} == gpu.ENVIRONMENT
    finally:
        jax.config.update("jax_optimization_level", level)
    own = "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 JAX_OPTIMIZATION_LEVEL=O1"
    assert capsys.readouterr().err == f"for GPUs, and where the environment says nothing: {own}\n"
