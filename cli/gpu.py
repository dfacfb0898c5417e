"""NVIDIA GPUs that programs are compiled for on machines that have none, by XLA's own compiler for them.

That compiler comes with JAX's CUDA plugin (the extra gpu-plan). What it needs to know of the GPU stands in GPUS, from
the data sheets and the CUDA device properties; only autotuning needs the GPU itself, and is left out.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from cli.said import say_once
from model.errors import PunaError

# What programs on GPUs start with where the user has not said otherwise: JAX would take three quarters of the memory,
# and XLA would let what devices send each other wait for the work before it.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "JAX_OPTIMIZATION_LEVEL": "O1"}
USABLE = 0.92  # of a GPU's memory: the rest is the driver's, the libraries' and fragmentation
GIB = 2**30


def unset(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of ENVIRONMENT that an environment does not say."""
    own = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"
    said = {own[0]} if environment.keys() & {*own} else set()
    return {name: value for name, value in ENVIRONMENT.items() if name not in {*environment, *said}}


def gpu_count(environment: Mapping[str, str]) -> int:
    """GPUs that a process with this environment would see, without starting a backend here."""
    if environment.get("JAX_PLATFORMS") == "cpu":
        return 0
    if "CUDA_VISIBLE_DEVICES" in environment:
        return len([gpu for gpu in environment["CUDA_VISIBLE_DEVICES"].split(",") if gpu])
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def set_defaults() -> None:
    """Gives this process what of ENVIRONMENT nobody has set, where it has a GPU, and says so once.

    Call it before a device is used.
    """
    if gpu_count(os.environ) and (own := unset(os.environ)):
        os.environ.update(own)
        if (level := own.get("JAX_OPTIMIZATION_LEVEL")) is not None:  # which JAX has read when it was imported
            jax.config.update("jax_optimization_level", level)
        say_once(described(own))


def described(own: Mapping[str, str]) -> str:
    """What is said of variables that we set."""
    return f"for GPUs, and where the environment says nothing: {' '.join(f'{k}={v}' for k, v in own.items())}"


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do.

    Attributes:
        name: as the driver says it.
        memory: bytes that programs see.
        bandwidth: of its memory, bytes a second.
        memory_clock: kHz.
        bf16: dense FLOP/s in bfloat16; float32 products (as TF32) take twice as long, 8-bit ones half.
        link: bytes a second that it sends to the other GPUs of its host.
    """

    name: str
    memory: int
    bandwidth: float
    memory_clock: int
    bf16: float = 989.4e12
    link: float = 450e9

    def peak(self, bits: float) -> float:
        """Dense FLOP/s of products whose wider operand has so many bits."""
        return self.bf16 * 16 / max(8.0, min(bits, 32.0))


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84_942_979_072, 3.352e12, 2_619_000),
    "h200": Gpu("NVIDIA H200", 151_397_597_184, 4.8e12, 3_201_000),
}


def gpu_named(name: str) -> Gpu:
    """The GPU that --gpu names.

    Raises:
        PunaError: there is none of that name.
    """
    if name not in GPUS:
        raise PunaError(f"--gpu {name} is not known; choose {', '.join(GPUS)}")
    return GPUS[name]


def has_compiler() -> bool:
    """Whether JAX's CUDA plugin is here, of a version that compiles without a GPU."""
    return sys.version_info >= (3, 12) and any(
        importlib.util.find_spec(name) is not None for name in ("jax_cuda13_plugin", "jax_cuda12_plugin")
    )


REMEDY = "install it on Python 3.12 with `pip install 'puna[gpu-plan]'` (some 3 GB; no GPU and no driver are needed)"


def no_compiler(name: str) -> PunaError:
    """What is said where a program for a GPU is asked for and the compiler is not here."""
    return PunaError(f"--gpu {name}: the compiler for it is not here; {REMEDY}")


def _description(gpu: Gpu) -> str:
    """The GPU in the text form of XLA's GpuTargetConfigProto: a Hopper of 132 multiprocessors."""
    device = {
        "name": f'"{gpu.name}"',
        "device_vendor": '"NVIDIA Corporation"',
        "platform_version": '"Compute Capability 9.0a"',
        "model_str": f'"sm_9.0a with {gpu.memory}B RAM, 132 cores, 1980000KHz clock, {gpu.memory_clock}KHz mem clock, '
        '52428800B L2$"',
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "core_count": 132,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_block_optin": 227 * 1024,
        "shared_memory_per_core": 228 * 1024,
        "l2_cache_size": 50 * 2**20,
        "memory_bandwidth": int(gpu.bandwidth),
        "device_memory_size": gpu.memory,
        "clock_rate_ghz": 1.98,
        "driver_version": '"13.0.0"',
        "runtime_version": '"13.0.0"',
        "compile_time_toolkit_version": '"13.0.0"',
        "dnn_version": '"9.10.0"',
        "cuda_compute_capability": "{ major: 9 feature_extension: ACCELERATED_FEATURES }",
    }
    lines = "\n".join(f"  {name}: {value}" for name, value in device.items())
    return (
        f'gpu_device_info {{\n{lines}\n}}\nplatform_name: "CUDA"\n'
        f'dnn_version_info {{ major: 9 minor: 10 }}\ndevice_description_str: "{gpu.name}"\n'
    )


@contextmanager
def devices_of(name: str, count: int = 1) -> Iterator[list[Any]]:
    """Devices that programs can be compiled for and that cannot run any, while the context lasts.

    Lower with `jax.ShapeDtypeStruct`s whose shardings lie on them. Arrays stay on the CPU. Call it in a process that
    has used no device yet.

    Args:
        name: a key of GPUS.
        count: how many, all in one host.

    Raises:
        PunaError: an unknown GPU, or its compiler is not here.
    """
    gpu = gpu_named(name)
    if not has_compiler():
        raise no_compiler(name)
    jax.config.update("jax_platforms", "cpu")
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    # JAX asks the GPU here what it can; its own test of compiling without one replaces the same two functions.
    asked = cudnn.check_compute_capability, cudnn.is_cuda_compute_capability_equal
    cudnn.check_compute_capability = lambda capability: float(capability) <= 9.0
    cudnn.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"
    try:
        description = {"target_config": _description(gpu), "topology": f"1x1x{count}"}
        yield list(topologies.get_topology_desc(platform="cuda", **description).devices)
    finally:
        cudnn.check_compute_capability, cudnn.is_cuda_compute_capability_equal = asked
