"""Processes find each other or say who is missing; the supervisor restarts, stops, gives up, leaves no one behind."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from model.errors import PunaError
from train import distributed, launch, rendezvous

ROOT = Path(__file__).parent.parent


def python(script: str, *arguments: object, **env: str) -> subprocess.Popen:
    """A process of its own, in the state that a user's would be in."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "SLURM_"))}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**clean, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def together(script: str, count: int, *arguments: object, **env: str) -> list[tuple[int, str, str]]:
    """Run `script` in `count` processes of one run; returns (exit code, stdout, stderr) of each."""
    env = {"COORDINATOR_ADDRESS": f"127.0.0.1:{distributed.free_port()}", "NUM_PROCESSES": str(count)} | env
    processes = [python(script, *arguments, PROCESS_ID=str(i), **env) for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        outputs = list(pool.map(lambda process: process.communicate(timeout=120), processes))
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


# Who takes part.


@pytest.mark.parametrize(
    "text, hosts",
    [
        ("gpu1", ["gpu1"]),
        ("gpu1,login", ["gpu1", "login"]),
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("a[9-11]-ib,b[2]", ["a9-ib", "a10-ib", "a11-ib", "b2"]),
    ],
)
def test_slurm_host_lists(text, hosts):
    assert distributed.expand_hosts(text) == hosts


SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[01-02]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_slurm_describes_the_run():
    assert distributed.process_hosts(SLURM) == ["gpu01", "gpu01", "gpu02", "gpu02"]
    assert distributed._from_environment(SLURM) == ("gpu01:61497", 4, 2)
    assert distributed._local_device_ids(SLURM) is None
    one_a_node = {**SLURM, "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert distributed._from_environment(one_a_node)[1:] == (2, 1)
    assert distributed._local_device_ids(one_a_node) == ()
    assert distributed.expand_counts("2(x3),1") == [2, 2, 2, 1]


def test_slurm_is_read_as_jax_reads_it(monkeypatch):
    from jax._src.clusters.slurm_cluster import SlurmCluster

    for name, value in {**SLURM, "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    theirs = SlurmCluster.get_coordinator_address(None, None), SlurmCluster.get_process_count()
    assert distributed._from_environment(os.environ)[:2] == theirs


def test_the_environment_is_complete_or_refused():
    with pytest.raises(PunaError, match="NUM_PROCESSES is set and COORDINATOR_ADDRESS, PROCESS_ID is not"):
        distributed._from_environment({"NUM_PROCESSES": "2"})
    with pytest.raises(PunaError, match="PROCESS_ID='x' is not a whole number"):
        distributed._from_environment({"COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "x"})
    assert distributed._from_environment({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}) == (None, None, None)
    assert distributed._from_environment({})[1:] == (1, 0)


def call(count, indices, timeout, hosts=()):
    address = f"127.0.0.1:{distributed.free_port()}"

    def one(index):
        try:
            return rendezvous.meet(address, count, index, timeout, hosts)
        except PunaError as error:
            return str(error)

    with ThreadPoolExecutor(len(indices)) as pool:
        return list(pool.map(one, indices))


def test_all_come():
    assert call(4, [3, 1, 0, 2], timeout=30) == [None] * 4


def test_the_missing_are_named_to_everyone_with_their_hosts():
    said = call(4, [0, 2], timeout=1, hosts=["gpu1", "gpu1", "gpu2", "gpu2"])
    assert len(said) == 2
    for line in said:
        assert line.startswith("process 1 on gpu1, process 3 on gpu2 of 4 did not come to 127.0.0.1:")
        assert "within 1 s (CONNECT_SECONDS); those that came: 0 on " in line


def test_a_missing_coordinator_is_named():
    (line,) = call(2, [1], timeout=0.5, hosts=["gpu1", "gpu2"])
    assert line.startswith("process 0 on gpu1 was not reached at 127.0.0.1:")


def test_one_process_id_twice_is_named():
    said = call(3, [0, 1, 1], timeout=30)
    assert all(line.startswith("process 1 runs on ") and "its own PROCESS_ID" in line for line in said)


# Whether they can work together.

PREFLIGHT = """
import sys, jax
from train import distributed
from model.errors import PunaError
distributed.initialize()
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
me = jax.process_index()
run_dir, data = (argument.replace("ID", str(me)) for argument in sys.argv[1:])
with distributed.leaving():
    print(distributed.preflight(run_dir, NamedSharding(mesh, PartitionSpec("fsdp")), (8, 4), data))
"""


@pytest.mark.slow
def test_preflight_passes_and_counts_devices(tmp_path):
    done = together(PREFLIGHT, 2, tmp_path / "run", "same")
    assert [code for code, _, _ in done] == [0, 0], done
    assert all("4 devices (cpu): " in out for _, out, _ in done), done
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_preflight_finds_unshared_storage_and_other_data(tmp_path):
    done = together(PREFLIGHT, 2, tmp_path / "runID", "same", SHARED_SECONDS="1")
    assert [code for code, _, _ in done] == [2, 2], done
    assert all("run1 is not shared" in err or "run0 is not shared" in err for _, _, err in done)
    done = together(PREFLIGHT, 2, tmp_path / "run", "dataID")
    assert [code for code, _, _ in done] == [2, 2], done
    assert all("process 1 (" in err and "other data than process 0" in err for _, _, err in done)


def test_preflight_finds_rows_that_nobody_feeds_or_two_share_in_part():
    hosts = ["a", "b"]
    distributed._check_rows(hosts, np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool))
    distributed._check_rows(hosts, np.array([[1, 1], [1, 1]], bool))
    with pytest.raises(PunaError, match=r"rows \[3\] of the batch"):
        distributed._check_rows(hosts, np.array([[1, 1, 0, 0], [0, 0, 1, 0]], bool))
    with pytest.raises(PunaError, match=r"processes 0 \(a\) and 1 \(b\)"):
        distributed._check_rows(hosts, np.array([[1, 1, 1, 0], [0, 0, 1, 1]], bool))


HOLD = """
import sys, jax
from train import distributed
with distributed.lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_a_directory_is_refused_by_name(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(PunaError, match=rf"{tmp_path} is in use by process {holder.pid} on "):
            with distributed.lock(tmp_path):
                pass
        holder.kill()
    with distributed.lock(tmp_path):
        pass


LEAVE = """
import sys
import jax
from jax.experimental import multihost_utils
from train import distributed
distributed.initialize()
with distributed.leaving():
    multihost_utils.sync_global_devices("start")
    if jax.process_index() == 1:
        raise (distributed.JobFailed if len(sys.argv) > 1 else distributed.PunaError)("rows 3 and 4")
    multihost_utils.sync_global_devices("never")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [((), 2), (("a disk failed",), 1)])
def test_a_failing_process_leaves_at_once_and_its_peers_follow(how, code):
    """With 2 where asking again would not help, with 1 where a restart may."""
    started = time.monotonic()
    (_, peer), (_, failed) = [(out, (code, err)) for code, out, err in together(LEAVE, 2, *how)]
    assert failed[0] == code and "error: rows 3 and 4" in failed[1]
    assert peer[0] != 0
    assert time.monotonic() - started < 60


# Supervision, with small programs in place of training.


def supervise(script: str, count: int, directory: Path, hang_minutes: float) -> int:
    """Supervise `count` processes of `script`, whose arguments are the directory, their index and the attempt.
    Every file called step-N in the directory counts as the checkpoint of step N."""
    attempts = iter(range(100))

    def start():
        attempt = next(attempts)
        command = [sys.executable, "-c", script, str(directory)]
        return [launch.start_process([*command, str(i), str(attempt)], dict(os.environ)) for i in range(count)]

    def newest():
        return max((int(path.name.split("-")[1]) for path in directory.glob("step-*")), default=-1)

    return launch.Supervisor(start, newest, lambda: 0.0, max_restarts=2, hang_minutes=hang_minutes).run()


DIE = (
    "import os, sys, pathlib; folder, index, attempt = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])\n"
)


SUPERVISE = """
import sys, pathlib
from test_launch import supervise
folder, script, count, hang_minutes = sys.argv[1:]
sys.exit(supervise(script, int(count), pathlib.Path(folder), float(hang_minutes)))
"""


def supervisor_of(script: str, count: int, directory: Path, hang_minutes: float = 1.0) -> subprocess.Popen:
    """`supervise` in a process of its own, which has started no backend: there it may fork."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    return python(SUPERVISE, directory, script, count, hang_minutes, PYTHONPATH=path)


@pytest.mark.slow
def test_restarts_after_a_death_while_there_is_progress(tmp_path):
    script = DIE + "if index == 1 and attempt < 5: (folder / f'step-{attempt}').touch(); os.kill(os.getpid(), 9)"
    supervisor = supervisor_of(script, 2, tmp_path)
    _, said = supervisor.communicate()
    assert supervisor.returncode == 0
    assert said.count("process 1 was ended by SIGKILL; restarting from step") == 5


@pytest.mark.slow
def test_gives_up_without_progress(tmp_path):
    supervisor = supervisor_of(DIE + "(folder / f'ran-{attempt}').touch(); sys.exit(1)", 1, tmp_path)
    _, said = supervisor.communicate()
    assert supervisor.returncode == 1
    assert len(list(tmp_path.glob("ran-*"))) == 3
    assert "exit code 1; 2 restarts brought no new checkpoint: giving up" in said


@pytest.mark.slow
def test_a_wrong_request_is_not_repeated(tmp_path):
    supervisor = supervisor_of(
        DIE + "(folder / f'ran-{attempt}').touch(); sys.exit(2 if index == 0 else 86)", 2, tmp_path
    )
    supervisor.communicate()
    assert supervisor.returncode == 2
    assert len(list(tmp_path.glob("ran-*"))) == 1


@pytest.mark.slow
def test_a_freeze_is_a_death(tmp_path):
    supervisor = supervisor_of(DIE + "if attempt == 0: os.kill(os.getpid(), 19)", 1, tmp_path, hang_minutes=0.02)
    _, said = supervisor.communicate()
    assert supervisor.returncode == 0
    assert "no sign of life for 0.02 minutes; restarting from the beginning" in said


OBEY = """
import os, pathlib, signal, sys, time
folder, index = pathlib.Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGTERM, lambda *_: ((folder / f"saved-{index}").touch(), os._exit(85)))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
grandchild = os.fork()
(folder / f"{'grandchild' if grandchild == 0 else 'child'}-{os.getpid()}").touch()
while True:
    time.sleep(0.1)
"""


def supervisor_with_children(tmp_path: Path) -> tuple[subprocess.Popen, dict[str, list[int]]]:
    supervisor = supervisor_of(OBEY, 2, tmp_path)
    while len(list(tmp_path.iterdir())) < 4:
        assert supervisor.poll() is None, supervisor.communicate()
        time.sleep(0.05)
    pids = {kind: [int(p.name.split("-")[1]) for p in tmp_path.glob(f"{kind}-*")] for kind in ("child", "grandchild")}
    return supervisor, pids


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"{[pid for pid in pids if is_alive(pid)]} live on"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_everyone_saves(tmp_path, number):
    supervisor, pids = supervisor_with_children(tmp_path)
    supervisor.send_signal(number)
    _, err = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 85, err
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert f"{number.name}: every process saves its step and stops" in err
    wait_until_gone(pids["child"] + pids["grandchild"])


@pytest.mark.slow
def test_no_orphan_is_left_when_the_supervisor_is_killed(tmp_path):
    supervisor, pids = supervisor_with_children(tmp_path)
    supervisor.kill()
    try:
        wait_until_gone(pids["child"])
    finally:
        for pid in filter(is_alive, pids["grandchild"]):  # the children's own, which no kernel signal reaches
            os.kill(pid, signal.SIGKILL)
    supervisor.communicate()


def test_what_the_user_set_in_the_environment_stays(tmp_path, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    given = launch._environment(tmp_path, "a:1", 2, 1)
    assert given["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1" and given["PROCESS_ID"] == "1"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    monkeypatch.setenv("HEARTBEAT_SECONDS", "77")
    given = launch._environment(tmp_path, "a:1", 2, 1)
    assert (given["GLIBC_TUNABLES"], given["HEARTBEAT_SECONDS"]) == ("glibc.malloc.arena_max=1", "77")


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    shares = launch._device_shares(2, None)
    assert shares == [{"JAX_LOCAL_DEVICE_IDS": "0,1"}, {"JAX_LOCAL_DEVICE_IDS": "2,3"}]
    with pytest.raises(PunaError, match="-n 3 does not divide the 4 GPUs"):
        launch._device_shares(3, None)
    assert launch._device_shares(2, 4) == [{"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}] * 2
    assert jax.process_count() == 1
