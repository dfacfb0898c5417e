"""The training loop, which is a table of contents: what a run is made of, in the order in which it happens."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax import Array
from jax.sharding import Sharding

from cli.files import atomic_path
from convert.peft import save_adapter
from convert.save import save_model
from model import lora
from model.config import LlamaConfig
from model.errors import PunaError
from model.pieces import code_fingerprint, load_function
from model.tokenizer import Tokenizer
from train import distributed
from train.checkpoint import Checkpoints
from train.config import Config, read_config, refuse_changes
from train.data import Datasets, Sampler, in_order, load_dataset
from train.loader import prefetch, to_devices
from train.metrics import MFU_FORMULA, REPORTERS, MetricsFile, flops_per_token, peak_flops, plot
from train.metrics_logger import MetricsLogger, ProgressDisplay
from train.objective import Batch
from train.optim import make_schedule, owns_learning_rate
from train.profile import Profile
from train.schema import dump, flat
from train.start import base_of, mesh_of, model_of, tokenizer_of
from train.state import TrainState, abstract_batch, abstract_state, base_params, init_state, shardings_of, state_like
from train.step import make_evaluation, make_step

Evaluate = Callable[[TrainState, Batch], tuple[Array, Array]]
ROWS_NAMED = 20


def run(config: Config) -> None:
    """Trains what `config` says in its output_dir, or resumes what that holds.

    Raises:
        PunaError: a wrong request.
        NonFinite: the updates stopped being numbers.
        Preempted: SIGTERM came; the step is saved.
    """
    if config.run.deterministic:
        _make_deterministic(Path(config.run.output_dir))
    distributed.initialize()
    with distributed.leaving(), distributed.lock(config.run.output_dir):
        train(config)


def train(config: Config) -> None:
    """`run` within a process that is set up already."""
    run_dir, first = Path(config.run.output_dir), jax.process_index() == 0

    # --- data
    if config.run.prepare:
        load_function(config.run.prepare, "run.prepare")(config)
    tokenizer = tokenizer_of(config)
    datasets = load_dataset(config.data, tokenizer, alive=partial(distributed.heartbeat, run_dir))
    sampler = Sampler(datasets, config.run.batch_size, config.run.seed)
    total = total_steps(config, sampler)

    # --- model and mesh
    base = base_of(config)
    model, mesh = model_of(config, tokenizer, base), mesh_of(config)
    batch = abstract_batch(config, mesh)
    sharding, shape = batch["tokens"].sharding, batch["tokens"].shape
    data = {"seed": config.run.seed, "key": _data_key(datasets, sampler), "code": _code(config, model)}
    devices = distributed.preflight(run_dir, sharding, shape, data["key"])

    with ExitStack() as stack:
        # --- the state: restored, or born in place
        run = config.run
        checkpoints = Checkpoints(
            run_dir / "checkpoints",
            run.save_steps or None,
            run.save_minutes or None,
            run.keep_last,
            run.keep_every or None,
        )
        stack.enter_context(checkpoints)
        resuming = checkpoints.latest() is not None
        if resuming and config.lora is None:
            abstract = abstract_state(config, model, mesh, base)
            state, done = _restore(config, checkpoints, abstract, data)
        else:
            start, shape_of = base_params(config, model, mesh, base), model if base is None else base.config
            abstract = state_like(config, shape_of, start, mesh)
            state, done = init_state(config, shape_of, start, abstract), 0
            if resuming:
                frozen = state.frozen
                state, done = _restore(config, checkpoints, abstract, data)
                state = replace(state, frozen=frozen)
        if first:
            _write_config(run_dir, config)

        # --- what is seen of it
        display = stack.enter_context(ProgressDisplay(total, done, shown=first))
        for dataset in datasets.train:
            display.say(f"data: {dataset.counts}")
        if (held_out := datasets.evaluation) is not None:
            display.say(f"held out: {held_out.counts}")
        display.say(
            f"{devices}; mesh data={mesh.shape['data']} fsdp={mesh.shape['fsdp']} tensor={mesh.shape['tensor']}"
        )
        display.say(f"step {done} of {total}; {MFU_FORMULA}")
        record = MetricsLogger(
            _metrics_writer(stack, config, run_dir, done) if first else lambda line: None,
            display,
            run.logging_steps,
            run.max_skipped_steps,
            flops_per_token(model, config.data.max_length, _size(state.params) if config.lora else None),
            peak_flops(),
            sampler.epoch,
            partial(_name_rows, sampler),
        )
        painter = stack.enter_context(ThreadPoolExecutor(1))

        # --- the functions
        step = make_step(config, model, mesh, make_schedule(config.optim, total), shardings_of(abstract))
        evaluate = make_evaluation(config, model, mesh)
        batches = (to_devices(partial(sampler.batch, number), sharding, shape) for number in range(done, total))
        ready = stack.enter_context(prefetch(batches))
        profile = stack.enter_context(Profile(run.profile_steps, run_dir / "profile"))

        # --- the loop
        for number, rows in enumerate(ready, done + 1):
            with profile.step(number):
                state, metrics = step(state, rows)
            record.push(number, metrics)
            if datasets.evaluation and (number == total or run.eval_steps and number % run.eval_steps == 0):
                record.add(eval_loss=evaluation_loss(evaluate, state, datasets, config, sharding))
            stopping = distributed.reached_preemption(number)
            if checkpoints.due(number) or stopping or number == total:
                record.flush()
                checkpoints.save(number, replace(state, frozen=None), data | {"step": number}, asdict(config))
                if first:
                    painter.submit(plot, [run_dir], run_dir / "training_loss.png")
            profile.after(number, state)
            if stopping:
                checkpoints.wait()
                raise distributed.Preempted

        # --- what stays
        checkpoints.wait()
        _export(config, model, state, tokenizer, run_dir / "final")
        display.say(f"done: {run_dir / 'final'}")


def total_steps(config: Config, sampler: Sampler) -> int:
    """run.max_steps, or as many as run.num_train_epochs take."""
    return config.run.max_steps or sampler.steps(config.run.num_train_epochs)


def evaluation_loss(
    evaluate: Evaluate, state: TrainState, datasets: Datasets, config: Config, sharding: Sharding
) -> float:
    """The mean loss of the trained tokens of the held-out rows.

    Args:
        evaluate: what `make_evaluation` made.
        state: the run's; it stays.
        datasets: with held-out rows.
        config: the run's; a batch is as large as a microbatch of training.
        sharding: of a batch [B, T].
    """
    assert datasets.evaluation is not None
    size = config.run.batch_size // config.run.gradient_accumulation_steps
    shape = (size, config.data.max_length)

    def batches() -> Iterator[Batch]:
        assert datasets.evaluation is not None
        for rows in in_order(datasets.evaluation, size):
            yield to_devices(
                lambda start, stop, rows=rows: {k: v[start:stop] for k, v in rows.items()}, sharding, shape
            )

    with prefetch(batches()) as ready:
        sums = [evaluate(state, batch) for batch in ready]
    losses, counts = zip(*jax.device_get(sums), strict=True)
    return float(sum(losses) / max(1, sum(counts)))


def _restore(
    config: Config, checkpoints: Checkpoints, abstract: TrainState, data: dict[str, Any]
) -> tuple[TrainState, int]:
    """The newest good state of the run that output_dir holds. Raises PunaError naming what has changed since."""
    text = (Path(config.run.output_dir) / "config.toml").read_text(encoding="utf-8")
    refuse_changes(read_config(tomllib.loads(text)), config)
    state, saved, done = checkpoints.restore(replace(abstract, frozen=None))
    if saved["key"] != data["key"]:
        raise PunaError(
            f"{config.run.output_dir} holds a run on other data: what data.path names has changed since; restore it, "
            "or give another run.output_dir"
        )
    before, now = saved.get("code", {}), data["code"]
    if changed := [setting for setting in before if before[setting] != now.get(setting)]:
        raise PunaError(
            f"{config.run.output_dir} holds a run on other code: what {', '.join(changed)} names has changed since; "
            "take it back, or give another run.output_dir"
        )
    return state, done


def _code(config: Config, model: LlamaConfig) -> dict[str, str]:
    """The SHA-256 of the code behind every function that the numbers of a run come from, by its setting."""
    named = {f"model.{part}": name for part, name in model.pieces.names().items()}
    if config.model.loss:
        named["model.loss"] = config.model.loss
    if owns_learning_rate(config.optim):
        named["optim.optimizer"] = config.optim.optimizer
    return {setting: code_fingerprint(name, setting) for setting, name in named.items()}


def _size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _data_key(datasets: Datasets, sampler: Sampler) -> str:
    """A name for the data: every token of it, and how much of each set is trained on."""
    every = [*datasets.train, *([datasets.evaluation] if datasets.evaluation else [])]
    content = [dataset.digest for dataset in every], list(sampler.sizes)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _metrics_writer(stack: ExitStack, config: Config, run_dir: Path, done: int) -> Callable[[Mapping[str, Any]], None]:
    reporters = [REPORTERS[name](run_dir, dict(flat(config))) for name in config.run.report_to]
    return stack.enter_context(closing(MetricsFile(run_dir, done, reporters))).write


def _name_rows(sampler: Sampler, steps: range) -> str:
    places = dict.fromkeys(p for step in steps for row in sampler.rows(step).tolist() for p in sampler.where(row))
    named = list(places)[:ROWS_NAMED]
    return ", ".join(named) + (f" and {len(places) - ROWS_NAMED} more" if len(places) > ROWS_NAMED else "")


def _write_config(run_dir: Path, config: Config) -> None:
    """config.toml as resolved, headed by the versions that ran it."""
    packages = ("puna", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    header = [f"# {name} {_version(name)}" for name in packages] + [f"# git {_revision()}"]
    with atomic_path(run_dir / "config.toml", overwrite=True) as path:
        path.write_text("\n".join([*header, "", dump(config)]), encoding="utf-8")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _export(config: Config, model: LlamaConfig, state: TrainState, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face folder, or a PEFT adapter's where adapters were trained."""
    if config.lora is None:
        save_model(folder, model, state.params, tokenizer=tokenizer, overwrite=True)
        return
    params = lora.join(state.params, state.frozen)
    saved, rslora = config.lora.modules_to_save, config.lora.rslora
    save_adapter(folder, params, saved, rslora, config.model.path, tokenizer, overwrite=True, pieces=model.pieces)


def _make_deterministic(run_dir: Path) -> None:
    """Asks XLA for repeatable GPU kernels: none that are not, and the autotuner's choices of the first start."""
    choices = run_dir / "autotune.textproto"
    use = "load_autotune_results_from" if choices.exists() else "dump_autotune_results_to"
    flags = f"--xla_gpu_exclude_nondeterministic_ops=true --xla_gpu_{use}={choices.absolute()}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
