"""Whether a run may go on: its settings, its data and everything frozen that its numbers come from are as they were."""

import hashlib
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from model import lora
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import Params
from model.pieces import code_fingerprint
from model.tokenizer import Tokenizer
from train import integrity
from train.config import read_config, refuse_changes
from train.data import Datasets, Sampler
from train.data.cache import tokenizer_hash
from train.data.config import sources
from train.objective import reads_reference
from train.optim import make_schedule, owns_learning_rate
from train.schema import flat
from train.sections import Config

Inputs = dict[str, Any]  # as JSON: what each input was, by its name


def inputs_of(config: Config, model: LlamaConfig, tokenizer: Tokenizer, datasets: Datasets, sampler: Sampler) -> Inputs:
    """What a run reads but for weights, by fingerprints that do not depend on where it lies.

    Args:
        config: the run's.
        model: what is trained.
        tokenizer: whose tokens the data is.
        datasets: the data.
        sampler: how much of each set is trained on.
    """
    every = [*datasets.train, *([datasets.evaluation] if datasets.evaluation else [])]
    content = [dataset.digest for dataset in every], list(sampler.sizes)
    templates = [source.template for source in sources(config.data) if (source.template or "").endswith(".jinja")]
    return {
        "seed": config.run.seed,
        "key": _digest(content),
        "code": _code(config, model),
        "tokenizer": tokenizer_hash(tokenizer),
        "template": _digest([Path(path).read_text(encoding="utf-8") for path in templates if path]),
    }


def weights_of(params: Params) -> dict[str, int]:
    """A fingerprint of each array of a base, without adapters, the same on every mesh."""
    found = integrity.fingerprints(lora.bases(params))
    return {name: int(value) for name, value in jax.device_get(found).items()}


def check_settings(config: Config) -> Config:
    """The config that the run in output_dir was started with. Raises PunaError naming what may not have changed."""
    text = (Path(config.run.output_dir) / "config.toml").read_text(encoding="utf-8")
    before = read_config(tomllib.loads(text))
    refuse_changes(before, config)
    return before


def check_inputs(config: Config, started: Config, saved: Inputs, now: Inputs) -> None:
    """Raises PunaError naming what of a run's inputs is not what it was. What an older checkpoint does not tell is not
    compared.

    Args:
        config: the run's, now.
        started: the one that it was started with.
        saved: the inputs of its checkpoint.
        now: the inputs as they are.
    """
    where, remedy = config.run.output_dir, "take it back, or give another run.output_dir"
    if saved["key"] != now["key"]:
        raise PunaError(
            f"{where} holds a run on other data: {_change('data.path', started.data.path, config.data.path)}; {remedy}"
        )
    own = config.model.tokenizer
    model = (
        ("model.tokenizer", started.model.tokenizer, own)
        if own
        else ("model.path", started.model.path, config.model.path)
    )
    for name, changed in (
        ("tokenizer", model),
        ("template", ("data.template", started.data.template, config.data.template)),
    ):
        if saved.get(name, now[name]) != now[name]:
            raise PunaError(f"{where} holds a run with another {name}: {_change(*changed)}; {remedy}")
    before, code = saved.get("code", {}), now["code"]
    once = {"run.prepare"}  # what it made is the data, which was compared: it need not be there any more
    if changed := [name for name in before if before[name] != code.get(name) and name not in once - code.keys()]:
        raise PunaError(
            f"{where} holds a run on other code: what {', '.join(changed)} names has changed since; {remedy}"
        )


def _change(setting: str, before: Any, now: Any) -> str:
    if before == now:
        return f"what {setting} names has changed since"
    return f"{setting} was {before!r} and is {now!r}"


def check_weights(config: Config, before: dict[str, int] | None, now: dict[str, int] | None, setting: str) -> None:
    """Raises PunaError where the weights that a setting names are not those that the run started with."""
    if before is None or now is None or before == now:
        return
    changed = [name for name in now if now[name] != before.get(name)]
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    path = dict(flat(config))[setting]
    what = "base" if setting == "model.path" else "teacher"
    raise PunaError(
        f"{config.run.output_dir} holds a run on another {what}: the weights that {setting} {path} names are not those "
        f"that it started from ({changed[0] if changed else 'fewer'}{more} changed); give that {what} back, or give "
        "another run.output_dir"
    )


def check_steps(config: Config, done: int, total: int) -> None:
    """Raises PunaError where a run has done more steps than it is to do."""
    if done <= total:
        return
    run = config.run
    setting = "run.max_steps" if run.max_steps else f"the end of run.num_train_epochs {run.num_train_epochs:g}"
    raise PunaError(
        f"{run.output_dir} holds a run that has done {done} steps, and {setting} is {total}: give more, or write an "
        f"earlier step out with `python -m train export {run.output_dir} --step N DST`"
    )


def schedule_change(config: Config, done: int, before: int, total: int) -> str | None:
    """What is to be said where a run of `before` steps goes on as one of `total`: its rate is a function of both."""
    if before == total or owns_learning_rate(config.optim):
        return None
    old, new = (float(make_schedule(config.optim, steps)(jnp.int32(done))) for steps in (before, total))
    if math.isclose(old, new, rel_tol=1e-6):
        return None
    return (
        f"The run has {total} steps now, and had {before}: step {done + 1} has the learning rate {new:.3g}, "
        f"where it would have been {old:.3g}"
    )


def reads_base_again(config: Config, before: Config | None) -> bool:
    """Whether a run that resumes, or goes on from a checkpoint of another (`before` is None), reads the weights that it
    started from: the frozen base of adapters, the reference of preferences, or to see that what another model.path
    names are those of the start."""
    if config.lora is not None or reads_reference(config):
        return True
    return before is not None and config.model.path is not None and before.model.path != config.model.path


def _code(config: Config, model: LlamaConfig) -> dict[str, str]:
    """The SHA-256 of the code behind every function that the numbers of a run come from, by its setting."""
    named = {f"model.{part}": name for part, name in model.pieces.names().items()}
    if config.model.loss:
        named["model.loss"] = config.model.loss
    if owns_learning_rate(config.optim):
        named["optim.optimizer"] = config.optim.optimizer
    if config.run.prepare:
        named["run.prepare"] = config.run.prepare
    return {setting: code_fingerprint(name, setting) for setting, name in named.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
