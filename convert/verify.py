"""Whether two models are one and the same: their configs, how they ask to be sampled, every tensor, the logits at the
highest matrix product precision, and their tokenizers."""

import gc
from dataclasses import fields
from pathlib import Path

import jax
import numpy as np

from cli.progress import progress
from convert.checkpoint import Checkpoint
from convert.formats import FORMATS
from convert.generation import IDS, asked, id_list
from convert.lazy import LazyTensor, contiguous
from convert.load import load_params
from convert.merge import open_merged
from convert.names import parameters
from convert.verify_tokenizer import compare_tokenizers
from model.config import LlamaConfig
from model.llama import forward
from model.rope import frequencies

LOGITS_ATOL = 1e-4  # of logits of about 10: equal weights in another layout are summed in another order
_STRIPE_BYTES = 1 << 26


def compare(a: str | Path, b: str | Path, tokens: int = 32, atol: float = 0.0) -> bool:
    """Print how far the models at `a` and `b` are from each other.

    Args:
        a: a model of any format, a Hub id, a training run, or an adapter, which is merged into its base.
        b: the other one.
        tokens: the length of the random text whose logits are compared; 0 compares none.
        atol: the largest difference of a tensor that counts as equal; of logits it is LOGITS_ATOL at least.

    Returns:
        True where no tensor, no logit, no field of the config that says how the model computes, starts or stops, and
        nothing of the tokenizers differs. Tied embeddings count as a head of their own.
    """
    first, second = open_merged(a), open_merged(b)
    same = _compare_configs(first, second)
    same = _compare_generation(first, second) and same
    same = _compare_tensors(first, second, atol) and same
    if tokens and first.config.vocab_size == second.config.vocab_size:
        difference = float(np.abs(_logits(first, tokens) - _logits(second, tokens)).max())
        print(f"logits of {tokens} tokens: largest difference {difference:g}")
        same = same and difference <= max(atol, LOGITS_ATOL)
    same = compare_tokenizers(first.folder, second.folder) and same
    print("same" if same else "different")
    return same


def _compare_configs(first: Checkpoint, second: Checkpoint) -> bool:
    same = True
    for field in fields(first.config):
        one, other = getattr(first.config, field.name), getattr(second.config, field.name)
        if one == other:
            continue
        silent = [x.format for x in (first, second) if field.name in FORMATS[x.format].unsaid]
        why = f"{silent[0]} does not say it" if silent else _harmless(field.name, first.config, second.config)
        print(f"config {field.name}: {one} and {other}{f' ({why})' if why else ''}")
        same = same and why is not None
    return same


def _compare_generation(first: Checkpoint, second: Checkpoint) -> bool:
    """Print where the two ask otherwise to be sampled or to stop; formats of one file say neither."""
    if any(FORMATS[x.format].is_file for x in (first, second)):
        return True
    asks = [asked(x.folder) for x in (first, second)]
    for key in IDS:  # the file that leaves one out means its config's
        for own, x in zip(asks, (first, second), strict=True):
            if key not in own and any(key in other for other in asks) and key not in FORMATS[x.format].unsaid:
                own[key] = id_list(getattr(x.config, key))
    silent = {key for key in IDS if any(key not in own for own in asks)}
    one, other = asks
    different = [key for key in sorted((one.keys() | other.keys()) - silent) if one.get(key) != other.get(key)]
    for key in different:
        print(f"generation_config {key}: {one.get(key)} and {other.get(key)}")
    return not different


def _harmless(field: str, first: LlamaConfig, second: LlamaConfig) -> str | None:
    """Why a difference in this field makes no other model; None where it makes one."""
    is_dynamic = any(x.rope_scaling is not None and x.rope_scaling.rope_type == "dynamic" for x in (first, second))
    match field:
        case "initializer_range":
            return "only new parameters are drawn with it"
        case "tie_word_embeddings":
            return "the tensors tell"
        case "max_position_embeddings" if not is_dynamic:
            return "changes no logit"
        case "rope_scaling" if not is_dynamic and _same_rotations(first, second):
            return "the same rotations"
        case _:
            return None


def _same_rotations(first: LlamaConfig, second: LlamaConfig) -> bool:
    (one, factor), (other, other_factor) = frequencies(first), frequencies(second)
    return factor == other_factor and np.array_equal(one, other)


def _compare_tensors(first: Checkpoint, second: Checkpoint, atol: float) -> bool:
    ours, theirs = _with_head(first), _with_head(second)
    different = sorted(ours.keys() ^ theirs.keys())
    for name in different:
        print(f"tensor {name}: only in {(first if name in ours else second).folder}")
    largest = 0.0
    shared = [name for name in ours if name in theirs]
    with progress("comparing", sum(ours[name].nbytes for name in shared)) as advance:
        for name in shared:
            one, other = ours[name], theirs[name]
            if one.shape != other.shape:
                print(f"tensor {name}: shapes {one.shape} and {other.shape}")
                different.append(name)
                continue
            difference = max_difference(one, other)
            largest = max(largest, difference)
            if not difference <= atol:
                print(f"tensor {name}: largest difference {difference:g} ({one.dtype} and {other.dtype})")
                different.append(name)
            advance(one.nbytes)
    print(f"{len(shared)} tensors compared: largest difference {largest:g}, {len(different)} differ")
    return not different


def _with_head(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Every tensor by name, the head of tied embeddings too."""
    tensors = {param.name: checkpoint.tensors[param.name] for param in parameters(checkpoint.config)}
    return {"lm_head": tensors["embed"].transposed()} | tensors


def max_difference(a: LazyTensor, b: LazyTensor) -> float:
    """The largest absolute difference of two tensors of one shape; infinite where only one of a pair is NaN."""
    x, y = contiguous(a.load()), contiguous(b.load())
    largest = 0.0
    rows = max(_STRIPE_BYTES * len(x) // max(x.nbytes, 1), 1)
    for start in range(0, len(x), rows):
        one, other = x[start : start + rows], y[start : start + rows]
        if one.dtype == other.dtype and np.array_equal(one.view(np.uint8), other.view(np.uint8)):
            continue
        one, other = one.astype(np.float32), other.astype(np.float32)
        with np.errstate(invalid="ignore"):  # infinity less infinity; the two are equal
            gap = np.where((one == other) | (np.isnan(one) & np.isnan(other)), 0.0, np.abs(one - other))
        largest = max(largest, float(np.nan_to_num(gap, nan=np.inf, posinf=np.inf).max()))
    return largest


def _logits(checkpoint: Checkpoint, tokens: int) -> np.ndarray:
    """float32 [1, tokens, V] of the same random text for every model of one vocabulary."""
    config = checkpoint.config
    text = np.random.default_rng(0).integers(0, config.vocab_size, (1, tokens), np.int32)
    with jax.default_matmul_precision("highest"):
        params = load_params(checkpoint, None, None)
        logits = np.asarray(jax.jit(forward, static_argnums=2)(params, text, config)[0])
    del params
    gc.collect()
    return logits
