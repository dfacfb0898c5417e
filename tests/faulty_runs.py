"""Small training runs in processes of their own, the faults that befall them, and what is compared afterwards."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from convert import manifest
from train.data.toy import make_examples, write_tokenizer

ROOT = Path(__file__).parent.parent
CONFIG = """
[model]
tokenizer = "{folder}/tokenizer"
vocab_size = 264
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
max_position_embeddings = 64

[data]
path = "{folder}/data.jsonl"
cache_dir = "{folder}/cache"
template = "plain"
max_length = 64
packing = true

[optim]
learning_rate = 1e-3

[run]
batch_size = 8
max_steps = 40
save_steps = 8
keep_last = 100
"""


def write_config(folder: Path) -> Path:
    """A run of 40 steps on 400 toy examples, packed; returns the path of its TOML."""
    (folder / "tokenizer").mkdir(parents=True)
    write_tokenizer(folder / "tokenizer")
    lines = (json.dumps(example) + "\n" for example in make_examples(400))
    (folder / "data.jsonl").write_text("".join(lines))
    path = folder / "run.toml"
    path.write_text(CONFIG.format(folder=folder))
    return path


def start(
    command: str, *arguments: object, devices: int = 2, cache: Path | None = None, optimize: bool = True
) -> subprocess.Popen:
    """`python -m train COMMAND ARGUMENTS` on `devices` virtual CPU devices; compiled programs are shared in `cache`.

    Processes but the first find none of theirs there (JAX lets only the first write), and compiling is half of their
    start: without `optimize` LLVM takes less care.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "SLURM_", "XLA_"))}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if cache:
        env |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if not optimize:
        env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    return subprocess.Popen(
        [sys.executable, "-m", "train", command, *map(str, arguments)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(
    config: Path, run_dir: Path, *more: object, processes: int = 2, devices: int = 1, optimize: bool = False
) -> subprocess.Popen:
    """`train launch` of `processes` with `devices` each, with patience: the tests bring many deaths in a row."""
    options = ("-n", processes, "--cpu-devices", devices, "--max-restarts", 10)
    settings, cache = (config, f"run.output_dir={run_dir}", *more), config.parent / "compiled"
    return start("launch", *options, *settings, cache=cache, optimize=optimize)


def run(config: Path, run_dir: Path, *more: object, devices: int = 1, optimize: bool = False) -> subprocess.Popen:
    """`train run`: one process, nobody watching."""
    settings, cache = (config, f"run.output_dir={run_dir}", *more), config.parent / "compiled"
    return start("run", *settings, devices=devices, cache=cache, optimize=optimize)


def finish(process: subprocess.Popen, code: int = 0, timeout: float = 600) -> str:
    """Wait for the process; returns its stderr. Anything but `code` is a failure."""
    _, err = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit code {process.returncode}\n{err[-4000:]}"
    return err


def outcome(run_dir: Path) -> dict:
    """What two equal runs have in common: the losses, step by step, and the fingerprints of the last state."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = max(manifest.steps(run_dir / "checkpoints"))
    arrays = manifest.read(run_dir / "checkpoints" / str(last))["arrays"]
    return {
        "steps": [line["step"] for line in lines],
        "loss": [line["loss"] for line in lines],
        "grad_norm": [line["grad_norm"] for line in lines],
        "state": {name: array["fingerprint"] for name, array in arrays.items()},
    }


def processor() -> str:
    """The kind of processor, which decides what instructions XLA compiles to."""
    pairs = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    about = {name.strip(): value.strip() for name, value in pairs}
    return f"{about.get('model name')} family {about.get('cpu family')} model {about.get('model')}"


def workers(run_dir: Path) -> dict[int, int]:
    """The living `train run` processes of a run by process id: index -> pid, found by their environment."""
    found = {}
    for proc in Path("/proc").iterdir():
        try:
            command = (proc / "cmdline").read_bytes().split(b"\0") if proc.name.isdecimal() else []
            if b"run" not in command or f"run.output_dir={run_dir}".encode() not in command:
                continue
            env = dict(pair.split(b"=", 1) for pair in (proc / "environ").read_bytes().split(b"\0") if b"=" in pair)
            found[int(env.get(b"PROCESS_ID", b"0"))] = int(proc.name)
        except (OSError, ProcessLookupError):
            continue
    return found


def last_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl, 0 where there is none yet."""
    path = run_dir / "metrics.jsonl"
    lines = (
        [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    )
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    """Return when the run has logged `step`, or has ended."""
    while process.poll() is None and last_step(run_dir) < step:
        time.sleep(0.02)


def hit(run_dir: Path, index: int, number: signal.Signals, process: subprocess.Popen) -> bool:
    """Send a signal to process `index` of a run; False where there is none any more."""
    while index not in (pids := workers(run_dir)):
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    try:
        os.kill(pids[index], number)
    except ProcessLookupError:
        return False
    return True


def wait_for_line(words: str, process: subprocess.Popen) -> str:
    """Return what the run said up to the line with these words."""
    assert process.stderr
    said = ""
    while words not in said:
        line = process.stderr.readline()
        assert line, f"the run has ended, without {words!r}:\n{said[-4000:]}"
        said += line
    return said


def wait_for_save(run_dir: Path, process: subprocess.Popen) -> None:
    """Return in the middle of a save, or when the process has ended."""
    while process.poll() is None and not any((run_dir / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
        time.sleep(0.001)


def storm(run_dir: Path, process: subprocess.Popen, faults: int, processes: int, chance: random.Random) -> list[str]:
    """Befall a run up to `faults` times at random moments: any process is killed, in a save too, frozen or asked to
    stop. Returns what was done. It leaves the last steps alone, and lets a checkpoint be made after every third fault
    or so, as the supervisor gives up without any; after a SIGTERM it ends, as the supervisor does."""
    done: list[str] = []
    for _ in range(faults):
        saved = newest_step(run_dir)
        patient = chance.random() < 0.4
        while patient and process.poll() is None and newest_step(run_dir) == saved:
            time.sleep(0.05)
        kind = chance.choice(["kill", "kill", "kill while saving", "freeze", "stop"])
        wait_for_step(run_dir, newest_step(run_dir) + chance.randrange(1, 8), process)
        if kind == "kill while saving":
            wait_for_save(run_dir, process)
        if newest_step(run_dir) >= 30 or process.poll() is not None:
            break
        index = chance.randrange(processes)
        number = {"freeze": signal.SIGSTOP, "stop": signal.SIGTERM}.get(kind, signal.SIGKILL)
        if hit(run_dir, index, number, process):
            done.append(f"{kind} {index}")
        if kind == "stop":
            break
        time.sleep(2)  # the supervisor must have seen this one before the next
    return done


def newest_step(run_dir: Path) -> int:
    return max(manifest.steps(run_dir / "checkpoints"), default=0)
