"""Every test runs on eight virtual CPU devices, without a network, and with warnings as errors (pyproject.toml).

On a machine with a GPU, PUNA_TEST_PLATFORM=cuda runs on it what needs one device, as `pytest tests/test_attention.py`.
"""

import gc
import os
import socket
from pathlib import Path

import jax
import pytest

# Compiling is most of what the tests take: what one test or one run compiled, the next finds here. The commands that
# tests start have a cache of their own, since some are killed while they write to it; so has each of several pytests.
CACHE = Path(__file__).parent.parent / ".pytest_cache" / os.environ.get("PYTEST_XDIST_WORKER", "alone")
for name, value in (
    ("jax_compilation_cache_dir", str(CACHE / "jax")),
    ("jax_persistent_cache_min_compile_time_secs", 0),
    ("jax_persistent_cache_min_entry_size_bytes", -1),
):
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value).replace("/jax", "/jax-commands")

# PyTorch and NumPy read it when they are imported: at these sizes threads wait for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported, and by the commands tests start
jax.config.update("jax_platforms", os.environ.get("PUNA_TEST_PLATFORM", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)

# LLVM's optimizations take most of the time of compiling, and gain nothing at the sizes of tests. XLA's own passes run
# as ever, and so does everything in the modules below and in the commands that tests start.
OPTIMIZED_MODULES = {"truths", "gpu_programs"}

DATA = os.environ.get("PUNA_TEST_DATA")

MODEL_MODULES = {path.stem for path in (Path(__file__).parent.parent / "model").glob("*.py")} | {"model"}


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models, tokenizers and texts that the environment variable PUNA_TEST_DATA names."""
    if not DATA:
        pytest.skip("needs the shared test data: PUNA_TEST_DATA is not set")
    return Path(DATA)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return failed_if_skipped((yield), call)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    return failed_if_skipped(report, report.call)


def failed_if_skipped(report, call):
    """Make a skip, or an expected failure, a failure where all data is there and no hardware is what it lacks."""
    reason = getattr(call.excinfo.value, "msg", str(call.excinfo.value)) if call.excinfo else ""
    if DATA and report.skipped and not reason.startswith("needs hardware"):
        report.outcome = "failed"
        report.longrepr = f"skipped though PUNA_TEST_DATA is set, and not for hardware: {reason}"
    return report


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuse every connection but those to this machine."""
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address[0]}: tests use no network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


def subject(request) -> str:
    """What the module of a test is about: its name without `test_`."""
    return request.module.__name__.removeprefix("test_")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Compile without LLVM's optimizations, but for what is compared with published text.

    Each program that is compiled takes three memory mappings or more. Linux allows a process 65,530, and XLA crashes
    where it gets none: so programs go before there are half as many. What was compiled in one of the two ways is never
    used by a module of the other.
    """
    quick = subject(request) not in OPTIMIZED_MODULES
    maps = Path("/proc/self/maps")
    mappings = maps.read_bytes().count(b"\n") if maps.exists() else 0
    if quick != jax.config.read("jax_disable_most_optimizations") or mappings > 25_000:
        jax.clear_caches()
        gc.collect()
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """`model/` never mixes dtypes by accident: its tests run under JAX's strict promotion rules."""
    if subject(request) in MODEL_MODULES:
        with jax.numpy_dtype_promotion("strict"):
            yield
    else:
        yield
