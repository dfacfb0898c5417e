"""The training loop, which is a table of contents: what a run is made of, in the order in which it happens."""

import importlib.metadata
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax import Array
from jax.sharding import Sharding

from cli.files import atomic_path
from model.errors import PunaError
from model.sharding import described
from train import distributed, resume
from train.attention import describe_attention
from train.checkpoint import Checkpoints, read_checkpoint
from train.config import LORA_LEARNING_RATE
from train.data import Datasets, Sampler, in_order, load_dataset
from train.export import Exporter, export_step
from train.integrity import CheckpointError
from train.loader import prefetch, to_devices
from train.metrics import MFU_FORMULA, MetricsFile, flops_per_token, peak_flops
from train.metrics_logger import MetricsLogger, NonFinite, ProgressDisplay
from train.objective import Batch, reads_reference
from train.optim import make_schedule
from train.outputs import Outputs
from train.plot import Painter
from train.profile import Profile
from train.reference import with_reference
from train.reporters import REPORTERS, Reporter
from train.schema import dump, flat
from train.sections import Config
from train.start import base_of, mesh_of, model_of, prepare, tokenizer_of, with_adapter_settings
from train.state import (
    TrainState,
    abstract_batch,
    abstract_state,
    base_params,
    init_state,
    shardings_of,
    state_like,
    teacher_params,
)
from train.stats import make_stats
from train.step import make_evaluation, make_step
from train.watchdog import Watchdog

Evaluate = Callable[[TrainState, Batch], tuple[Mapping[str, Array], Array]]
ROWS_NAMED = 20
MANY_DROPPED = 0.05  # of the records, above which it is said how to keep them


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
    prepare(config)
    base = base_of(config)
    config = with_adapter_settings(config, base)
    tokenizer = tokenizer_of(config)
    datasets = load_dataset(config.data, tokenizer, alive=partial(distributed.heartbeat, run_dir))
    sampler = Sampler(datasets, config.run.batch_size, config.run.seed)
    total = total_steps(config, sampler)
    check_profile(config, total)

    # --- model and mesh
    model, mesh = model_of(config, tokenizer, base), mesh_of(config)
    batch = abstract_batch(config, mesh)
    sharding, shape = batch["tokens"].sharding, batch["tokens"].shape
    inputs = resume.inputs_of(config, model, tokenizer, datasets, sampler)
    devices = distributed.preflight(run_dir, sharding, shape, inputs["key"])

    with ExitStack() as stack:
        run = config.run
        display = stack.enter_context(ProgressDisplay(total, shown=first))
        outputs = Outputs(display.say)
        # --- the state: restored, or born in place
        checkpoints = Checkpoints(
            run_dir / "checkpoints",
            run.save_steps or None,
            run.save_minutes or None,
            run.keep_last,
            run.keep_every or None,
        )
        stack.enter_context(checkpoints)
        before = None if checkpoints.latest() is None else resume.check_settings(config)
        abstract = start = None
        shape_of = model if base is None else base.config
        begins = before is None and run.from_checkpoint is None  # with fresh weights, or those of model.path
        if begins or resume.reads_base_again(config, before):
            start = base_params(config, model, mesh, base)
        weights = None if start is None or base is None else resume.weights_of(start)
        if reads_reference(config):
            assert start is not None
            alive = partial(distributed.heartbeat, run_dir)
            datasets = with_reference(datasets, config, model, mesh, start, alive, display.say)
            sampler = Sampler(datasets, run.batch_size, run.seed)
        if not begins and config.lora is None:
            start = None  # what was read of it is compared, and gone before the state comes
        if start is None:
            abstract, state = abstract_state(config, model, mesh, base), None
        else:
            abstract = state_like(config, shape_of, start, mesh)
            state = init_state(config, shape_of, start, abstract)
            del start
        frozen = None if state is None else state.frozen
        if begins:
            assert state is not None
            done, best, inputs = 0, None, inputs | {"base": weights}
        elif before is None:
            assert run.from_checkpoint is not None
            del state
            state, done = read_checkpoint(Path(run.from_checkpoint), replace(abstract, frozen=None))
            state, best, inputs = replace(state, frozen=frozen), None, inputs | {"base": weights}
        else:
            del state
            state, saved, done = checkpoints.restore(replace(abstract, frozen=None))
            resume.check_inputs(config, before, saved, inputs)
            resume.check_weights(config, saved.get("base"), weights, "model.path")
            inputs = inputs | {name: saved.get(name) for name in ("base", "teacher")}
            state = replace(state, frozen=frozen)
            best = saved.get("best")
        resume.check_steps(config, done, total)
        if (teacher := teacher_params(config, mesh)) is not None:
            own = resume.weights_of(teacher)
            resume.check_weights(config, inputs.get("teacher"), own, "distill.teacher")
            inputs = inputs | {"teacher": own}
            abstract, state = replace(abstract, teacher=teacher), replace(state, teacher=teacher)
            del teacher
        exporter = Exporter(config, model, base, tokenizer, datasets, display.say)
        if first:
            _write_config(run_dir, config)
        exporter.describe(run_dir, state)

        # --- what is seen of it
        for dataset in datasets.train:
            display.say(f"data: {dataset.counts}")
            if dataset.counts.overlong > MANY_DROPPED * dataset.counts.records:
                display.say(
                    f"{dataset.counts.overlong / dataset.counts.records:.0%} of the records are longer than "
                    f"data.max_length {config.data.max_length} and left out: raise it, or choose what becomes of them "
                    "with data.on_overlong"
                )
        if (held_out := datasets.evaluation) is not None:
            display.say(f"held out: {held_out.counts}")
        display.say(f"{devices}; mesh {described(mesh.shape)}")
        if config.lora is not None and config.optim.learning_rate == LORA_LEARNING_RATE:
            display.say(f"optim.learning_rate is {LORA_LEARNING_RATE:g}, as under [lora] where it is not given")
        if base is not None and base.adapters:
            display.say(f"model.path is an adapter: training goes on with it, over the model {base.base}")
        if before is not None and (change := resume.schedule_change(config, done, total_steps(before, sampler), total)):
            display.say(change)
        display.say(f"step {done} of {total}; {MFU_FORMULA}")
        display.begin(done)
        record = MetricsLogger(
            _metrics_writer(stack, config, run_dir, done, outputs) if first else lambda line: None,
            display,
            run.logging_steps,
            run.max_skipped_steps,
            flops_per_token(model, config.data.max_length, _size(state.params) if config.lora else None),
            peak_flops(),
            sampler.epoch,
            partial(_name_rows, sampler),
        )
        painter = stack.enter_context(closing(Painter(run_dir, outputs)))

        # --- the functions
        schedule, places = make_schedule(config.optim, total), shardings_of(abstract)
        segments = datasets.row_segments
        if said := describe_attention(config, model, mesh, segments):
            display.say(said)
        step = make_step(config, model, mesh, schedule, places, segments)
        stats = make_stats(config, model, mesh, schedule, places) if run.stats_steps else None
        evaluate = make_evaluation(config, model, mesh, segments)
        batches = (to_devices(partial(sampler.batch, number), sharding, shape) for number in range(done, total))
        ready = stack.enter_context(prefetch(batches))
        profile = stack.enter_context(Profile(run.profile_steps, run_dir / "profile"))
        watch = stack.enter_context(Watchdog(run_dir, run.step_timeout, done))

        def save(number: int, state: TrainState) -> None:
            checkpoints.kept = {best["step"]} if best else set()
            data = inputs | {"step": number, "best": best}
            checkpoints.save(number, replace(state, frozen=None, teacher=None), data, asdict(config))

        if done == 0 and datasets.evaluation:
            record.begin(**held_out_means(evaluate, state, datasets, config, sharding))

        # --- the loop
        try:
            for number, rows in enumerate(ready, done + 1):
                watch.begins(number)
                seen: Mapping[str, Array] = {}
                if stats is not None and number % run.stats_steps == 0:
                    with watch.paused():  # it may be compiled
                        seen = stats(state, rows)
                with profile.step(number):
                    state, metrics = step(state, rows)
                record.push(number, {**metrics, **seen}, due=bool(seen))
                watch.finished(number - 1)
                is_best = False
                if datasets.evaluation and (number == total or run.eval_steps and number % run.eval_steps == 0):
                    with record.paused(), watch.paused(number):
                        means = held_out_means(evaluate, state, datasets, config, sharding)
                    record.add(**means)
                    loss = means["eval_loss"]
                    if is_best := run.keep_best and loss < (best["eval_loss"] if best else math.inf):
                        best = {"step": number, "eval_loss": loss}
                stopping = distributed.reached_preemption(number)
                if checkpoints.due(number) or is_best or stopping or number == total:
                    record.flush()
                    with record.paused(), watch.paused(number):
                        save(number, state)
                        if first:
                            painter.paint(last=stopping or number == total)
                if profile.is_open:
                    with watch.paused():  # writing a trace takes a while
                        profile.after(number, state)
                if stopping:
                    watch.close()
                    checkpoints.wait()
                    raise distributed.Preempted
            watch.close()
            record.check(total, int(jax.device_get(state.skipped)))
        except NonFinite:  # the state is that of the last update that was finite
            watch.close()
            save(int(jax.device_get(state.step)), state)
            checkpoints.wait()
            raise

        # --- what stays
        failure = None
        try:
            checkpoints.wait()
        except CheckpointError as error:  # the weights are here: final/ may yet be written
            failure = error
        if best is None or not run.keep_best or best["step"] == total or failure is not None:
            exporter.export(state, run_dir / "final")
        else:
            display.say(
                f"step {best['step']} has the lowest held-out loss, {best['eval_loss']:.4f}: final/ is that one"
            )
            if first:
                export_step(run_dir, run_dir / "final", best["step"], overwrite=True)
        if state.ema is not None:
            exporter.export_average(state, run_dir / "final-ema")
        display.say(f"done: {run_dir / 'final'}")
        if failure is not None:
            raise failure
        painter.close()
        outputs.check()


def check_profile(config: Config, total: int) -> None:
    """Raises PunaError where run.profile_steps names a step that the run does not have."""
    if config.run.profile_steps and config.run.profile_steps[1] > total:
        raise PunaError(
            f"run.profile_steps is {list(config.run.profile_steps)} and the run has {total} steps: give steps of these"
        )


def total_steps(config: Config, sampler: Sampler) -> int:
    """run.max_steps, or as many as run.num_train_epochs take."""
    return config.run.max_steps or sampler.steps(config.run.num_train_epochs)


def held_out_means(
    evaluate: Evaluate, state: TrainState, datasets: Datasets, config: Config, sharding: Sharding
) -> dict[str, float]:
    """The mean loss of the held-out rows, as "eval_loss", and of what else is known of them, likewise.

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
    every, counts = zip(*jax.device_get(sums), strict=True)
    return {f"eval_{name}": float(sum(each[name] for each in every) / max(1, sum(counts))) for name in every[0]}


def _size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _metrics_writer(
    stack: ExitStack, config: Config, run_dir: Path, done: int, outputs: Outputs
) -> Callable[[Mapping[str, Any]], None]:
    reporters: dict[str, Reporter] = {}
    for name in config.run.report_to:
        with outputs.spared(name):
            reporters[name] = REPORTERS[name](run_dir, dict(flat(config)), done)
    return stack.enter_context(closing(MetricsFile(run_dir, done, reporters, outputs))).write


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


def _make_deterministic(run_dir: Path) -> None:
    """Asks XLA for repeatable GPU kernels: none that are not, and the autotuner's choices of the first start."""
    choices = run_dir / "autotune.textproto"
    use = "load_autotune_results_from" if choices.exists() else "dump_autotune_results_to"
    flags = f"--xla_gpu_exclude_nondeterministic_ops=true --xla_gpu_{use}={choices.absolute()}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
