"""Several processes as one run: who they are, whether they can work together, and how they leave.

Every run is initialised as distributed, even one of a single process: JAX's notifier for SIGTERM comes with it. After
`initialize` nothing may set a Python handler for SIGTERM, which would silently replace that notifier.
"""

import fcntl
import os
import re
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from cli.files import remove
from convert.run import COMPANIONS
from model.errors import JobFailed, PunaError
from train import rendezvous

EXIT_FAILED, EXIT_WRONG, EXIT_PREEMPTED, EXIT_PEER_LOST = 1, 2, 85, 86
_HEARTBEAT_SECONDS, _CONNECT_SECONDS, _SHARED_SECONDS = 30, 300, 60
_HOST_BYTES = 256
HEARTBEAT_FILE = ".alive"
RANKS = "ranks"  # of the run directory: what each process was last seen doing, and its stacks where a step was stuck
_BEFORE_A_STEP = {".lock", HEARTBEAT_FILE, RANKS, "checkpoints", "config.toml", "metrics.jsonl", COMPANIONS}
_SLURM_REMEDY = (
    "start with srun, which sets them all; or unset SLURM_PROCID, and give COORDINATOR_ADDRESS, NUM_PROCESSES and "
    "PROCESS_ID where there are several processes"
)


class Preempted(SystemExit):
    """Raised by the loop once a step is saved after SIGTERM; the process ends with exit code 85."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


def initialize() -> None:
    """Join this process to its run. Call it before any JAX computation.

    The run is described by COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID, or by Slurm, Open MPI or Kubernetes;
    without any of them it has one process. HEARTBEAT_SECONDS (30) is how long a silent process counts as alive and
    CONNECT_SECONDS (300) how long the processes wait for each other at the start.

    When some do not come in time they are named, with their hosts under Slurm, and this process ends with code 86:
    who restarts it may find them there.

    Raises:
        PunaError: some of these are missing or no numbers, or two processes have one PROCESS_ID.
    """
    address, count, index = _from_environment(os.environ)
    timeout = _seconds("CONNECT_SECONDS", _CONNECT_SECONDS)
    if address and count and count > 1:
        try:
            rendezvous.meet(address, count, index or 0, timeout, process_hosts(os.environ))
        except rendezvous.MissingProcesses as error:
            print(f"error: {error}", file=sys.stderr)
            leave(EXIT_PEER_LOST)
    if count == 1:  # the devices of one CPU process need no TCP between them
        jax.config.update("jax_cpu_collectives_implementation", None)
    jax.distributed.initialize(
        address,
        count,
        index,
        local_device_ids=_local_device_ids(os.environ),
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=_seconds("HEARTBEAT_SECONDS", _HEARTBEAT_SECONDS),
    )
    # `launch` starts its children with SIGTERM held back, so that one that comes early reaches the notifier.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@contextmanager
def leaving() -> Iterator[None]:
    """Wrap the whole work of a process: several processes leave at once, without waiting for one another.

    A process that fails among several must not run Python's exit handlers: they wait for peers which, in turn, wait
    inside a collective. Alone, errors pass through unchanged; `Preempted` leaves in either case. The first Ctrl-C is
    a SIGTERM to this process; the second does what it did before.
    """

    def save_and_stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, previous)
        print("SIGINT: a step is saved, then the run stops; once more to stop at once", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    previous = signal.signal(signal.SIGINT, save_and_stop)
    try:
        yield
    except Preempted:
        leave(EXIT_PREEMPTED)
    except PunaError as error:
        if jax.process_count() == 1:
            raise
        print(f"error: {error}", file=sys.stderr)
        leave(EXIT_FAILED if isinstance(error, JobFailed) else EXIT_WRONG)
    except jax.errors.JaxRuntimeError:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        leave(EXIT_PEER_LOST)
    except BaseException:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        leave(EXIT_FAILED)
    finally:
        signal.signal(signal.SIGINT, previous)


def heartbeat(run_dir: str | Path) -> None:
    """Tell who watches this run that it is at work, though no step was made."""
    file = Path(run_dir) / HEARTBEAT_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


def reached_preemption(step: int) -> bool:
    """Whether `step` is the one to save and stop at, after SIGTERM came to any process. Ask at every step."""
    return multihost_utils.reached_preemption_sync_point(step)


@contextmanager
def lock(run_dir: str | Path) -> Iterator[None]:
    """Hold the run directory, which is made if need be, so that a second run in it is refused by name.

    Process 0 holds the lock for all. The kernel releases it however the process ends.

    Raises:
        PunaError: another run holds it.
    """
    if jax.process_index() != 0:
        yield
        return
    run_dir = Path(run_dir).absolute()
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise PunaError(
                f"{run_dir} is in use by {file.read().strip() or 'another run'}: wait for it, stop it, or give another "
                "run.output_dir"
            ) from None
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}", file=file, flush=True)
        try:
            yield
        finally:
            _remove_empty(made)


def _remove_empty(made: list[Path]) -> None:
    """Takes away the folders that a run made, the innermost first, where it has done no step and saved nothing."""
    try:
        for number, folder in enumerate(made):
            inside = {path.name for path in folder.iterdir()}
            if inside - (_BEFORE_A_STEP if number == 0 else set()):
                return
            if (folder / "checkpoints").is_dir():
                (folder / "checkpoints").rmdir()
            if (metrics := folder / "metrics.jsonl").is_file() and metrics.stat().st_size:
                return
            for name in inside - {"checkpoints"}:
                remove(folder / name)
            folder.rmdir()
    except OSError:  # a checkpoint is in it, or another process is at work there
        return


def preflight(run_dir: str | Path, batch_sharding: Sharding, batch_shape: tuple[int, ...], data_key: str) -> str:
    """Check that the processes can train together, before any of them starts.

    Every row of the batch is fed by some process and no two processes overlap in part of their rows; all read the
    same data; a file that process 0 writes in `run_dir` is read by all.

    Args:
        run_dir: the folder of the run.
        batch_sharding: of the global batch.
        batch_shape: of the global batch, of which the first axis is rows.
        data_key: names the data: a cache key, a seed.

    Returns:
        A line about the devices.

    Raises:
        PunaError: naming the hosts that differ.
    """
    hosts = _gather_text(socket.gethostname())
    _check_data_key(hosts, _gather_text(data_key))
    rows = multihost_utils.process_allgather(_rows(batch_sharding, batch_shape))
    _check_rows(hosts, np.atleast_2d(rows))
    _check_shared(Path(run_dir), hosts)
    counts = multihost_utils.process_allgather(np.asarray(jax.local_device_count())).reshape(-1)
    devices: dict[str, int] = {}
    for host, count in zip(hosts, counts, strict=True):
        devices[host] = devices.get(host, 0) + int(count)
    kind = jax.devices()[0].device_kind
    return f"{jax.device_count()} devices ({kind}): " + ", ".join(f"{host} {n}" for host, n in devices.items())


def _from_environment(env: Mapping[str, str]) -> tuple[str | None, int | None, int | None]:
    """Coordinator, number of processes and index; None where JAX detects them from the cluster it runs in."""
    names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
    given = [name for name in names if env.get(name)]
    if len(given) == len(names):
        return env["COORDINATOR_ADDRESS"], _whole(env, "NUM_PROCESSES"), _whole(env, "PROCESS_ID")
    if given:
        missing = ", ".join(name for name in names if name not in given)
        raise PunaError(f"{', '.join(given)} is set and {missing} is not: set all three, or none")
    if hosts := process_hosts(env):
        if not env.get("SLURM_JOB_ID") and not env.get("JAX_COORDINATOR_PORT"):
            raise PunaError(f"SLURM_PROCID is set and SLURM_JOB_ID is not: {_SLURM_REMEDY}")
        port = env.get("JAX_COORDINATOR_PORT") or 61440 + _whole(env, "SLURM_JOB_ID") % 4096  # as JAX chooses it
        if (index := _whole(env, "SLURM_PROCID")) >= len(hosts):
            raise PunaError(f"SLURM_PROCID is {index}, and the step has {len(hosts)} processes: {_SLURM_REMEDY}")
        return f"{hosts[0]}:{port}", len(hosts), index
    if "OMPI_MCA_orte_hnp_uri" in env or "JOB_COMPLETION_INDEX" in env:
        return None, None, None
    return f"127.0.0.1:{free_port()}", 1, 0


def _local_device_ids(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """() for all devices of the host where it has one process; None for JAX's choice, which is one a process."""
    return None if "JAX_LOCAL_DEVICE_IDS" in env or _tasks_on_this_host(env) > 1 else ()


def _tasks_on_this_host(env: Mapping[str, str]) -> int:
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in env:
        return _whole(env, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if not process_hosts(env):
        return 1
    counts, node = expand_counts(env["SLURM_STEP_TASKS_PER_NODE"]), 0
    if env.get("SLURM_NODEID"):
        node = _whole(env, "SLURM_NODEID")
    if node >= len(counts):
        raise PunaError(f"SLURM_NODEID is {node}, and the step has {len(counts)} nodes: {_SLURM_REMEDY}")
    return counts[node]


def expand_counts(text: str) -> list[int]:
    """Slurm's tasks per node, one a node: "2(x3),1" is [2, 2, 2, 1]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in parts for _ in range(int(times or 1))]


def expand_hosts(text: str) -> list[str]:
    """Slurm's compressed host list: "gpu[01-03,7],login" is gpu01, gpu02, gpu03, gpu7, login."""
    hosts = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", text):
        if not ranges:
            hosts.append(prefix + suffix)
            continue
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            hosts += [f"{prefix}{number:0{len(first)}d}{suffix}" for number in numbers]
    return hosts


def process_hosts(env: Mapping[str, str]) -> list[str]:
    """The host of every process where the scheduler tells (Slurm), else [].

    Raises:
        PunaError: it tells a part of it.
    """
    names = ("SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    missing = [name for name in names if not env.get(name)]
    if missing:
        others = [name for name in names[1:] if env.get(name)]
        if env.get("SLURM_PROCID") and (others or env["SLURM_PROCID"] != "0"):  # else a batch script without srun
            given = ", ".join(name for name in names if env.get(name))
            raise PunaError(f"{given} is set and {', '.join(missing)} is not: {_SLURM_REMEDY}")
        return []
    hosts, counts = expand_hosts(env["SLURM_STEP_NODELIST"]), expand_counts(env["SLURM_STEP_TASKS_PER_NODE"])
    if len(hosts) != len(counts) or not all(hosts):
        raise PunaError(
            f"SLURM_STEP_NODELIST={env['SLURM_STEP_NODELIST']!r} names {len(hosts)} hosts and SLURM_STEP_TASKS_PER_"
            f"NODE={env['SLURM_STEP_TASKS_PER_NODE']!r} the tasks of {len(counts)}: {_SLURM_REMEDY}"
        )
    return [host for host, count in zip(hosts, counts, strict=True) for _ in range(count)]


def _rows(sharding: Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """Which rows of a batch of `shape` this process feeds: bool [rows]."""
    mine = np.zeros(shape[0], bool)
    for index in sharding.addressable_devices_indices_map(shape).values():
        if index is not None:
            mine[index[0]] = True
    return mine


def _check_rows(hosts: list[str], rows: np.ndarray) -> None:
    """`rows` is bool [processes, rows]: all are fed, and two processes feed either the same rows or different ones."""
    unfed = np.flatnonzero(~rows.any(0))
    if unfed.size:
        raise PunaError(f"rows {unfed.tolist()} of the batch are fed by no process: choose another [mesh]")
    for i, mine in enumerate(rows):
        for j in range(i):
            if (mine & rows[j]).any() and (mine != rows[j]).any():
                raise PunaError(f"processes {j} ({hosts[j]}) and {i} ({hosts[i]}) share part of their rows: [mesh]")


def _check_data_key(hosts: list[str], keys: list[str]) -> None:
    different = [f"process {i} ({hosts[i]})" for i, key in enumerate(keys) if key != keys[0]]
    if different:
        raise PunaError(
            f"{', '.join(different)} would train on other data than process 0: is its copy of [data] the same?"
        )


def _check_shared(run_dir: Path, hosts: list[str]) -> None:
    """A file written by process 0 must be read by all within a minute, which network file systems may need."""
    nonce = _gather_text(secrets.token_hex(8))[0]
    path = run_dir / f".preflight-{nonce}"
    if jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(nonce, encoding="utf-8")
    deadline = time.monotonic() + _seconds("SHARED_SECONDS", _SHARED_SECONDS)
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    saw = multihost_utils.process_allgather(np.asarray(seen)).reshape(-1)
    path.unlink(missing_ok=True)
    blind = sorted({hosts[i] for i in np.flatnonzero(~saw)})
    if blind:
        raise PunaError(
            f"{run_dir} is not shared: {', '.join(blind)} cannot see what {hosts[0]} writes there; give a "
            "run.output_dir on storage that all hosts mount"
        )


def _gather_text(text: str) -> list[str]:
    """`text` of every process, cut to 256 bytes."""
    raw = text.encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b"\0")
    every = multihost_utils.process_allgather(np.frombuffer(raw, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(every).reshape(-1, _HOST_BYTES)]


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _seconds(name: str, default: int) -> int:
    return _whole(os.environ, name) if os.environ.get(name) else default


def _whole(env: Mapping[str, str], name: str) -> int:
    if not env[name].isdecimal():
        raise PunaError(f"{name}={env[name]!r} is not a whole number")
    return int(env[name])


def leave(code: int) -> NoReturn:
    """End this process with a code, without waiting for others and without Python's exit handlers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
