"""What the tests of conversion share: small models of transformers on disk, and the command run in this process."""

import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import hf_config, hf_model

from cli.command import main
from convert.__main__ import app
from convert.checkpoint import WriteOptions
from convert.formats import open_model
from convert.gguf import QUANTIZATIONS
from convert.save import write_model


def save_hf(folder, pickled=False, dtype=torch.float32, shard_size="5GB", **changes):
    """Random weights as transformers saves them; returns its model."""
    model = hf_model(hf_config(**changes)).to(dtype)
    if not pickled:
        model.save_pretrained(folder, max_shard_size=shard_size)
        return model
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def write_gguf(path, checkpoint, type):
    """Write a GGUF file with matrices of `type`, a key of `convert.gguf.TYPES`."""
    quantize = {theirs: ours for ours, theirs in QUANTIZATIONS.items()}.get(type)
    options = WriteOptions(dtype=None if quantize else type, quantize=quantize)
    write_model(path, replace(checkpoint, format="gguf"), options)


def tensors_of(folder):
    """Every parameter under our names, as bytes with dtype and shape."""
    return {
        name: (tensor.shape, tensor.dtype.name, np.ascontiguousarray(tensor.load()).tobytes())
        for name, tensor in open_model(folder).tensors.items()
    }


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `python -m convert` with these arguments, in this process: exit code, lines of stdout, lines of stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert/__main__.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main(app)
        output = capsys.readouterr()
        return ended.value.code, output.out.splitlines(), output.err.splitlines()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
