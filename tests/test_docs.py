"""README and docs/ say what happens: their commands run as printed, their errors stand in the source, links lead on.

What a page shows after ~ may be another number or word, and a line of three dots stands for any lines. Progress bars,
and what the shell says of killed jobs, are not shown. All else is compared, but for how wide tables and rules are.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from serving import Server, chat_model

from train.config import read_config
from train.data.toy import make_examples, write_tokenizer
from train.schema import dump

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ROOMS = ("model", "cli", "convert", "infer", "train")
CLONE = (*ROOMS, "configs", "requirements", "Makefile", "pyproject.toml")
# The interpreter of the tests, which must not install anything into its own environment.
PYTHON = f'''#!/bin/sh
case "$*" in "-m pip "*) echo "a test asks for pip $*" >&2; exit 1 ;; esac
exec "{sys.executable}" "$@"
'''


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(path: Path) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.M | re.S)]


def clone(folder: Path) -> dict[str, str]:
    """Make `folder` like a fresh clone after `make demo` made its environment, which is the one that tests run in.

    Returns:
        The environment of a shell there, 80 columns wide, with what HF_HUB_CACHE names as the Hub.
    """
    for name in CLONE:
        (folder / name).symlink_to(ROOT / name)
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "activate").touch()
    (tools / "python").write_text(PYTHON)
    (tools / "python").chmod(0o755)
    (folder / ".venv" / ".core").touch()
    own = {"PATH": f"{tools}:{os.environ['PATH']}", "COLUMNS": "80", "XDG_CACHE_HOME": str(folder / "cache")}
    return os.environ | own | {"HF_HUB_CACHE": str(folder / "hub"), "JAX_PLATFORMS": "cpu"}


# --- the first hour


def run_blocks(shell: list[str], folder: Path, environment: dict[str, str]) -> list[str]:
    """What each of these blocks printed, run one after the other in one bash that stops at the first failure."""
    for number, text in enumerate(shell):
        (folder / f"block{number}.sh").write_text(text)
    script = "".join(f"echo '<<{n}>>'; . ./block{n}.sh < /dev/null\n" for n in range(len(shell)))
    done = subprocess.run(
        ["bash", "-c", f"set -e\n{script}"], cwd=folder, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return re.split(r"<<\d+>>\n", done.stdout)[1:]


def tidy(text: str) -> str:
    text = re.sub(r"^\S+: line \d+: +\d+ Killed .*\n", "", text, flags=re.M)
    lines = (re.sub(r"(?<=\S) {2,}(?=\S)", " ", line.rstrip()) for line in text.splitlines() if "━" not in line)
    return "".join(f"{re.sub('─{2,}', '──', line)}\n" for line in lines if line)


def matches(shown: str, printed: str) -> bool:
    """Whether a command printed what the page shows."""
    pattern = ""
    for line in tidy(shown).splitlines():
        parts = map(re.escape, re.split(r"~[\w.,]*\w", line))
        pattern += r"(?:.*\n)*?" if line == "..." else r"[\w.,]*\w".join(parts) + r"\n"
    return re.fullmatch(pattern, tidy(printed)) is not None


@pytest.mark.parametrize(
    "shown, printed, same",
    [
        ("loss ~1.5, step 3\n", "loss 0.25,  step 3\n", True),
        ("loss ~1.5, step 3\n", "loss 0.25, step 4\n", False),
        ("~abc, ~1.5%\n", "cab, 12.25%\n", True),
        ("a\n...\nb\n", "a\nx\ny\n\nb\n", True),
        ("a\n...\nb\n", "a\nx\ny\n", False),
        ("a\n", "a\nb\n", False),
        ("a  b\n──\n", "a     b\n────\n", True),
    ],
)
def test_what_counts_as_the_same_output(shown, printed, same):
    assert matches(shown, printed) == same


@pytest.mark.soak
def test_the_first_hour(tmp_path):
    """Every command of docs/quickstart.md, as printed, and what the page shows of its output."""
    page = [block for block in blocks(DOCS / "quickstart.md") if block.language in ("sh", "text")]
    shell = [number for number, block in enumerate(page) if block.language == "sh"]
    printed = run_blocks([page[number].text for number in shell], tmp_path, clone(tmp_path))
    for number, output in zip(shell, printed, strict=True):
        if number + 1 < len(page) and page[number + 1].language == "text":
            shown = page[number + 1].text
            assert matches(shown, output), f"{page[number].text}\nthe page shows\n{shown}\nprinted was\n{output}"
    before, after = re.findall(r"(\d+) of 40 right", "".join(printed))
    assert int(before) < 5 and int(after) > 15


# --- README


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory):
    """A clone in which all that README names is there for its commands to run as printed, and a shell's environment.

    - meta-llama/Llama-3.2-1B in the Hub's cache, BASE and small: a random model with the special tokens of Llama 3.
    - ADAPTER... and adapters/poet: an adapter of it.
    - questions.jsonl and mmlu: three prompts, and a subject of six questions.
    - configs/tiny.toml: its settings, for a model of one narrow layer, on 200 records.
    """
    folder = tmp_path_factory.mktemp("clone")
    environment = clone(folder)
    (folder / "made").mkdir()
    model = chat_model(folder / "made")
    hub = folder / "hub" / "models--meta-llama--Llama-3.2-1B"
    shutil.copytree(model, hub / "snapshots" / ("0" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)
    for name, source in (("BASE", model), ("small", model), ("ADAPTER...", folder / "made" / "poet")):
        (folder / name).symlink_to(source)
    (folder / "adapters").mkdir()
    (folder / "adapters" / "poet").symlink_to(folder / "made" / "poet")
    (folder / "questions.jsonl").write_text("".join(json.dumps({"prompt": f"{n} + 1 ="}) + "\n" for n in range(3)))
    for part in ("dev", "test"):
        (folder / "mmlu" / part).mkdir(parents=True)
        (folder / "mmlu" / part / f"anatomy_{part}.csv").write_text("".join(f"{n}?,1,2,3,4,A\n" for n in range(6)))

    settings = tomllib.loads((ROOT / "configs" / "tiny.toml").read_text())
    settings["model"] |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    del settings["run"]["prepare"]
    tokenizer = folder / settings["model"]["tokenizer"]
    tokenizer.mkdir(parents=True)
    write_tokenizer(tokenizer)
    for key in ("path", "eval_path"):
        path = folder / settings["data"][key]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(example) + "\n" for example in make_examples(200, seed=len(key))))
    (folder / "configs").unlink()
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.toml").write_text(dump(read_config(settings)))
    (folder / "configs" / "llama3-70b.toml").symlink_to(ROOT / "configs" / "llama3-70b.toml")
    return folder, environment


def using_it(language: str) -> str:
    """The block in this language of README's "Using it"."""
    text = (ROOT / "README.md").read_text().split("\n## Using it\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)[0]


# Each line is a command and a file for its output, run in a fork of this process, which has imported everything once.
FORKING = """
import json, os, shlex, sys
import convert.__main__, infer.__main__, train.__main__
import infer.chat, infer.engine, train.export, train.launch, train.loop, train.preview, train.sweep
from cli.command import main
apps = {"convert": convert.__main__.app, "infer": infer.__main__.app, "train": train.__main__.app}
for line in sys.stdin:
    python, flag, room, *arguments = shlex.split(line)
    assert (python, flag) == ("python", "-m"), line
    if (child := os.fork()) == 0:
        os.dup2(os.open("typed", os.O_RDONLY), 0)
        os.dup2(os.open("printed", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
        os.dup2(1, 2)
        sys.argv = [f"{room}/__main__.py", *arguments]
        main(apps[room])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_the_commands_of_readme_run_as_printed(readers_folder):
    """All but `plan`, which test_plan.py and test_gpu_programs.py run; the server gets a port of its own and is asked
    what it has."""
    folder, environment = readers_folder
    (folder / "typed").write_text("What is the puna?\n")
    commands = [line.partition("  #")[0].strip() for line in using_it("sh").splitlines()]
    assert {"infer serve", "infer chat", "train launch"} <= {" ".join(line.split()[2:4]) for line in commands}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", FORKING], cwd=folder, env=environment, text=True, **pipes) as process:
        for command in commands:
            if command.startswith("python -m infer serve"):
                check_served(command, folder, environment)
            elif not command.startswith(("python -m train plan", "python -m infer plan")):
                print(command, file=process.stdin, flush=True)
                assert process.stdout.readline() == "0\n", f"{command}\n{(folder / 'printed').read_text()}"


def check_served(command: str, folder: Path, environment: dict[str, str]) -> None:
    arguments = command.removeprefix("python -m infer serve ").split()
    with Server(*arguments, environment=environment, folder=folder) as server:
        with urllib.request.urlopen(f"{server.url}/v1/models") as answer:
            assert {model["id"] for model in json.load(answer)["data"]} == {"llama", "poet"}


@pytest.mark.slow
def test_the_program_of_readme_runs_as_printed(readers_folder, tmp_path):
    folder, environment = readers_folder
    (tmp_path / "llama").symlink_to(folder / "made" / "model")
    program = f"{using_it('python')}\nprint(logits.shape, logits.dtype, config.vocab_size)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\(1, \d+, (\d+)\) float32 \1\n", done.stdout)


# --- errors


def texts_in_source() -> list[str]:
    """Every text in the source, with … in place of what is filled in."""
    found = []
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
    return found


def test_errors_are_quoted_as_they_are_printed():
    rows = re.findall(r"^\| `(.+?)` \|", (DOCS / "troubleshooting.md").read_text(), re.M)
    source = "\n".join(texts_in_source())
    assert len(rows) > 50
    assert not [row for row in rows if row.strip("… ") not in source]


# --- the site


def test_every_page_is_in_the_site_and_links_lead_somewhere():
    def pages(entry):
        return [entry] if isinstance(entry, str) else [page for one in entry.values() for page in listed(one)]

    def listed(entries):
        return [entries] if isinstance(entries, str) else [page for entry in entries for page in pages(entry)]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    there = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    assert sorted(listed(site["nav"])) == there, "name each page once in the nav of mkdocs.yml"
    for path in (*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!https?://)([^)#\s]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_blocks_of_toml_can_be_read():
    found = [block for path in DOCS.rglob("*.md") for block in blocks(path) if block.language == "toml"]
    assert found and all(tomllib.loads(block.text) for block in found)
