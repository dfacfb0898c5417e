"""Several processes of one run on this host, supervised: a death or a freeze costs the steps since the last checkpoint.

JAX ends every process of a run when one dies, some by an abort that Python cannot catch, so the one who restarts must
stand outside. Children are killed with their parent, whatever kills it.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from cli.gpu import described, gpu_count, unset
from convert import manifest
from model.errors import PunaError
from train.distributed import EXIT_FAILED, EXIT_PREEMPTED, EXIT_WRONG, HEARTBEAT_FILE, free_port

_POLL_SECONDS, _LAST_WORDS_SECONDS = 0.1, 1.0
_HEARTBEAT_SECONDS, _CONNECT_SECONDS = 10, 60  # short: all are on this host, and a start that hangs is repeated
_PR_SET_PDEATHSIG = 1


def launch(
    arguments: Sequence[str],
    run_dir: str | Path,
    processes: int,
    cpu_devices: int | None = None,
    max_restarts: int = 3,
    hang_minutes: float = 30.0,
) -> int:
    """Run `python -m train run ARGUMENTS` in several processes of this host to its end.

    Died or frozen, they start again from the last checkpoint. SIGTERM and SIGINT are passed on as SIGTERM: a step is
    saved in every process and the code is 85.

    Args:
        arguments: of the command: the config file and overrides.
        run_dir: run.output_dir, whose checkpoints and signs of life are watched.
        processes: how many.
        cpu_devices: virtual CPU devices of each process; None shares out the GPUs of the host.
        max_restarts: starts in a row without a new checkpoint before giving up.
        hang_minutes: so long without a sign of life counts as frozen.

    Returns:
        The exit code: see `Supervisor.run`.

    Raises:
        PunaError: no process is asked for, or a number that does not divide the GPUs.
    """
    if processes < 1:
        raise PunaError(f"-n {processes}: give at least one process")
    run_dir = Path(run_dir).absolute()
    shares = _device_shares(processes, cpu_devices)
    own = unset(os.environ) if cpu_devices is None and gpu_count(os.environ) else {}
    if own:
        _say(described(own))
    command = [sys.executable, "-m", "train", "run", *arguments]

    def start() -> list[subprocess.Popen[bytes]]:
        address = f"127.0.0.1:{free_port()}"
        return [
            start_process(command, own | _environment(run_dir, address, processes, i) | shares[i])
            for i in range(processes)
        ]

    return Supervisor(
        start, lambda: _newest_step(run_dir), lambda: _last_sign(run_dir), max_restarts, hang_minutes
    ).run()


class Supervisor:
    """Starts processes, watches them, and starts them again.

    Args:
        start: makes them.
        newest_step: the progress that counts.
        last_sign: when they last showed life, in seconds since the epoch.
        max_restarts: starts in a row without progress before giving up.
        hang_minutes: so long without a sign of life counts as frozen.
    """

    def __init__(
        self,
        start: Callable[[], list[subprocess.Popen[bytes]]],
        newest_step: Callable[[], int],
        last_sign: Callable[[], float],
        max_restarts: int,
        hang_minutes: float,
    ):
        self.start, self.newest_step, self.last_sign = start, newest_step, last_sign
        self.max_restarts, self.hang_seconds = max_restarts, 60 * hang_minutes
        self.children: list[subprocess.Popen[bytes]] = []
        self.signals = 0

    def run(self) -> int:
        """Supervise to the end.

        Returns:
            0, 85 (stopped with the step saved), 2 (the request is wrong), or 1 (gave up).
        """
        previous = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._run()
        finally:
            self._kill()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        fruitless = 0
        while True:
            before = self.newest_step()
            self.children = self.start()
            if self.signals:  # it came between two starts
                self._pass_on()
            reason = self._watch()
            codes = [child.returncode for child in self.children]
            if not reason:
                return EXIT_PREEMPTED if EXIT_PREEMPTED in codes else 0
            if EXIT_WRONG in codes and not self.signals:
                return EXIT_WRONG
            if self.signals:
                _say(f"{reason} after the signal: not every process saved its step")
                return EXIT_FAILED
            fruitless = 0 if self.newest_step() > before else fruitless + 1
            if fruitless > self.max_restarts:
                _say(f"{reason}; {self.max_restarts} restarts brought no new checkpoint: giving up")
                return EXIT_FAILED
            step = self.newest_step()
            _say(f"{reason}; restarting from {f'step {step}' if step >= 0 else 'the beginning'}")

    def _watch(self) -> str | None:
        """Wait for the processes. Returns why they had to be killed, or None if all ended well."""
        started = time.time()
        while True:
            codes = [child.poll() for child in self.children]
            bad = [i for i, code in enumerate(codes) if code not in (None, 0, EXIT_PREEMPTED)]
            if bad:
                self._await_last_words()
                reason = f"process {bad[0]} {_how_it_ended(codes[bad[0]])}"
            elif None not in codes:
                return None
            elif self.signals > 1:
                reason = "a second signal came"
            elif time.time() - max(started, self.last_sign()) > self.hang_seconds:
                reason = f"no sign of life for {self.hang_seconds / 60:g} minutes"
            else:
                time.sleep(_POLL_SECONDS)
                continue
            self._kill()
            return reason

    def _await_last_words(self) -> None:
        """Peers of a failed process may still say that the request was wrong."""
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while time.monotonic() < deadline and any(child.poll() is None for child in self.children):
            time.sleep(_POLL_SECONDS)

    def _kill(self) -> None:
        """End the processes and whatever they started."""
        for child in self.children:
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()

    def _forward(self, number: int, frame: object) -> None:
        self.signals += 1
        if self.signals == 1:
            _say(f"{signal.Signals(number).name}: every process saves its step and stops")
            self._pass_on()

    def _pass_on(self) -> None:
        for child in self.children:
            child.send_signal(signal.SIGTERM)


def start_process(
    command: Sequence[str], env: Mapping[str, str], output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """A child in its own process group, with SIGTERM held back until JAX's notifier is there to hear it. What it prints
    goes to `output`, where given."""
    parent = os.getpid()

    def in_child() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(EXIT_FAILED)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    return subprocess.Popen(command, env=env, process_group=0, preexec_fn=in_child, stdout=output, stderr=output)


def _environment(run_dir: Path, address: str, processes: int, index: int) -> dict[str, str]:
    """What a child reads to find its peers; what is set already stays, but for the addresses.

    Compiled programs are kept, so that a restart is quick. glibc maps XLA's temporaries on CPU anew at every step,
    which in huge pages costs little.
    """
    defaults = {"HEARTBEAT_SECONDS": str(_HEARTBEAT_SECONDS), "CONNECT_SECONDS": str(_CONNECT_SECONDS)}
    defaults |= {"JAX_COMPILATION_CACHE_DIR": str(run_dir / ".compiled"), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    run = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(processes), "PROCESS_ID": str(index)}
    return {**defaults, **os.environ, **run}


def _device_shares(processes: int, cpu_devices: int | None) -> list[dict[str, str]]:
    """The environment that gives every process its devices: virtual CPU devices, or an equal share of the GPUs."""
    if cpu_devices is not None:
        return [{"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(cpu_devices)}] * processes
    gpus = gpu_count(os.environ)
    if processes == 1 or gpus == 0:
        return [{}] * processes
    if gpus % processes:
        raise PunaError(f"-n {processes} does not divide the {gpus} GPUs of this host")
    each = gpus // processes
    return [{"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(i * each, (i + 1) * each)))} for i in range(processes)]


def _newest_step(run_dir: Path) -> int:
    return max(manifest.steps(run_dir / "checkpoints"), default=-1)


def _last_sign(run_dir: Path) -> float:
    """When data was last tokenized, a metric written, or a checkpoint appeared."""
    signs = [run_dir / HEARTBEAT_FILE, run_dir / "metrics.jsonl", run_dir / "checkpoints"]
    return max((path.stat().st_mtime for path in signs if path.exists()), default=0.0)


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)
