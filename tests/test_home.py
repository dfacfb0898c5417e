"""`~` is the home folder wherever a path is given, also where no shell sees it."""

import inspect
import typing
from pathlib import Path

import pytest
import typer
from converting import command, save_hf, tensors_of  # noqa: F401

import convert.__main__
import infer.__main__
import train.__main__
from cli.files import at_home
from model.errors import PunaError
from train.config import load_config


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_settings(home, tmp_path):
    (home / "run.toml").write_text(
        '[model]\npath = "~/base"\ntokenizer = "~"\n[data]\npath = ["~/a.jsonl", '
        '{path = "~/b", template = "~/t.jinja"}]\n'
        'eval_path = "~/held.jsonl"\ntemplate = "~/u.jinja"\ncache_dir = "~/cache"\n'
    )
    config = load_config(home / "run.toml", ["run.output_dir=~/out"])
    one, other = config.data.path
    found = [config.model.path, config.model.tokenizer, one, other.path, other.template]
    found += [config.data.eval_path, config.data.template, config.data.cache_dir, config.run.output_dir]
    places = ["base", "", "a.jsonl", "b", "t.jinja", "held.jsonl", "u.jinja", "cache", "out"]
    assert found == [str(home / place) for place in places]
    assert load_config(home / "run.toml", ["data.path=x/~y"]).data.path == "x/~y"


def test_a_user_who_is_not_there_is_named():
    with pytest.raises(PunaError, match=r"^~nobody-here/x: no user of that name; write ./~nobody-here/x"):
        at_home("~nobody-here/x")


def test_models_adapters_and_destinations(home, command):  # noqa: F811
    save_hf(home / "base", num_hidden_layers=1, vocab_size=32)
    assert command("model", "~/base", "~/copy", "--to", "orbax")[0] == 0
    assert tensors_of("~/copy") == tensors_of(home / "base")
    assert not Path("~").exists()


def commands(app):
    yield from (found.callback for found in app.registered_commands)
    for group in app.registered_groups:
        yield from commands(group.typer_instance)


@pytest.mark.parametrize("app", [convert.__main__.app, infer.__main__.app, train.__main__.app])
def test_every_option_that_is_a_path(app):
    paths = 0
    for callback in commands(app):
        hints = typing.get_type_hints(callback, include_extras=True)
        for name, parameter in inspect.signature(callback).parameters.items():
            kind, *more = typing.get_args(hints[name]) if hasattr(hints[name], "__metadata__") else (hints[name],)
            if Path in (kind, *typing.get_args(kind)):
                option = more[0] if more else parameter.default
                assert isinstance(option, typer.models.ParameterInfo) and option.parser is at_home, (callback, name)
                paths += 1
    assert paths > 2
