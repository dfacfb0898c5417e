"""Commands fail in one line with the exit code of what went wrong, and never leave half-written output."""

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.command import as_flags
from cli.files import atomic_path, check_free_space
from cli.progress import progress
from model.errors import PunaError

PROGRAM = """
import errno, os, sys, time, typer
from pathlib import Path
from cli.command import main
from cli.files import atomic_path
from model.errors import PunaError

app = typer.Typer(rich_markup_mode=None, add_completion=False)

@app.command()
def write(destination: Path, size: int = 3):
    with atomic_path(destination) as path:
        path.mkdir()
        (path / "half").write_text("x" * size)
        print("ready", flush=True)
        sys.stdin.read()

@app.command()
def fail(kind: str, overwrite: bool = False, to: str = typer.Option("", "--to")):
    match kind:
        case "puna":
            raise PunaError("top_p is 2.0: give a number in (0, 1]")
        case "file":
            open("missing/file.txt")
        case "full":
            with atomic_path("out") as path, open("/dev/full", "w") as file:
                path.mkdir()
                file.write("x" * 10)
        case "check":
            raise typer.Exit(1)
        case "exists":
            with atomic_path("."):
                pass
        case "ours":
            None.nothing
        case _:
            raise OSError(getattr(errno, kind), "what the system says", "out")

@app.command()
def talk():
    for line in range(100_000):
        print("line", line)

"""

# One command a line, each in a fork of a process that has imported everything once.
FORKED = """
for line in sys.stdin:
    work, *arguments = line.rstrip("\\n").split("\\t")
    if (child := os.fork()) == 0:
        os.chdir(work)
        sys.argv[1:] = arguments
        for number in (1, 2):
            os.dup2(os.open(f"{work}.{number}", os.O_CREAT | os.O_WRONLY), number)
        main(app)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}


@pytest.fixture
def start(tmp_path):
    """Start the program above in an empty folder, with the given arguments."""
    (tmp_path / "program.py").write_text(PROGRAM + "main(app)\n")
    work = tmp_path / "work"
    work.mkdir()

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py"), *arguments],
            cwd=work,
            env=ENVIRONMENT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


@pytest.fixture(scope="module")
def forking():
    """The process of FORKED."""
    command = [sys.executable, "-c", PROGRAM + FORKED]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes) as process:
        yield process


@pytest.fixture
def run(forking, tmp_path):
    """Run the program above in an empty folder: its exit code, stdout and stderr."""
    work = tmp_path / "work"
    work.mkdir()

    def run(*arguments):
        print(work, *arguments, sep="\t", file=forking.stdin, flush=True)
        code = int(forking.stdout.readline())
        return code, Path(f"{work}.1").read_text(), Path(f"{work}.2").read_text()

    return run


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("puna", 2, "error: top_p is 2.0: give a number in (0, 1]"),
        ("file", 2, "error: No such file or directory: missing/file.txt"),
        ("EACCES", 2, "error: what the system says: out"),
        ("EISDIR", 2, "error: what the system says: out"),
        ("EROFS", 2, "error: what the system says: out"),
        ("full", 1, "error: No space left on device: {work}/out"),
        ("EDQUOT", 1, "error: what the system says: out"),
        ("EIO", 1, "error: what the system says: out"),
        ("exists", 2, "error: {work} exists: give another destination, or --overwrite to replace it"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(run, tmp_path, kind, code, line):
    assert run("fail", kind) == (code, "", line.format(work=tmp_path / "work") + "\n")
    assert list((tmp_path / "work").iterdir()) == []


def test_a_fault_of_our_own_keeps_its_traceback(run):
    code, output, errors = run("fail", "ours")
    assert (code, output) == (1, "") and "Traceback" in errors and "no attribute 'nothing'" in errors


def test_arguments_are_said_as_the_flags_of_the_command():
    flags = {"overwrite": ("--overwrite", None), "format": ("--to", None), "double": ("--double", "--no-double")}
    said = "give overwrite=True, format='hf' or double=False; not shards=2, overwrite=False, tensor=2 or x.format=hf"
    expected = "give --overwrite, --to hf or --no-double; not shards=2, overwrite=False, tensor=2 or x.format=hf"
    assert as_flags(said, flags) == expected


def test_debug_shows_the_traceback(run):
    code, _, errors = run("fail", "--debug", "puna")
    assert code == 1 and "Traceback" in errors


def test_a_failed_check_exits_1_and_says_nothing_more(run):
    assert run("fail", "check") == (1, "", "")


def test_a_wrong_option_exits_2_without_a_traceback(run):
    code, output, errors = run("fail", "--no-such-option")
    assert code == 2 and output == "" and "--no-such-option" in errors and "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_removes_its_output(start, tmp_path, number):
    process = start("write", "out")
    assert process.stdout.readline() == "ready\n"
    assert len(list((tmp_path / "work").iterdir())) == 1
    process.send_signal(number)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (
        128 + number,
        f"interrupted by {number.name}: unfinished output was removed\n",
    )
    assert list((tmp_path / "work").iterdir()) == []


def test_a_reader_that_leaves_is_no_error(start):
    process = start("talk")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.stdin.close()
    process.wait()


def test_output_appears_only_when_complete(tmp_path):
    destination = tmp_path / "new" / "out"
    with atomic_path(destination) as path:
        path.mkdir()
        (path / "file").write_text("1")
        assert not destination.exists()
    assert (destination / "file").read_text() == "1"
    assert list(destination.parent.iterdir()) == [destination]


def test_an_existing_destination_is_refused_by_name(tmp_path):
    with pytest.raises(PunaError, match=rf"{tmp_path} exists.*overwrite=True"), atomic_path(tmp_path):
        pass


def test_overwrite_replaces_only_when_complete(tmp_path):
    destination = tmp_path / "out"
    destination.mkdir()
    (destination / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_path(destination, overwrite=True) as path:
        path.write_text("half")
        raise RuntimeError
    assert (destination / "old").read_text() == "old"
    with atomic_path(destination, overwrite=True) as path:
        path.write_text("new")
    assert destination.read_text() == "new"
    assert list(tmp_path.iterdir()) == [destination]


def gone():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_processes_left_is_removed_and_what_they_moved_is_put_back(tmp_path, caplog):
    destination, here = tmp_path / "out", platform.node()
    (tmp_path / f".out.tmp-{here}-{gone()}").mkdir()
    (tmp_path / f".out.old-{here}-{gone()}").write_text("before")
    others = [f".out.tmp-{here}-{os.getpid()}0", f".out.tmp-elsewhere-{gone()}", f".outer.tmp-{here}-{gone()}"]
    running = tmp_path / f".out.tmp-{here}-{os.getppid()}"
    for name in (*others[1:], running.name):
        (tmp_path / name).write_text("another's")
    with pytest.raises(PunaError, match="exists: give another destination"):
        with atomic_path(destination) as path:
            path.write_text("new")
    assert destination.read_text() == "before" and "is put back" in caplog.text and "is removed" in caplog.text
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*others[1:], running.name, "out"])


@pytest.mark.parametrize("folder", [True, False])
def test_two_writers_to_one_destination_do_not_both_succeed(tmp_path, folder):
    def write(path, text):
        (path.mkdir(), (path / "file").write_text(text)) if folder else path.write_text(text)

    destination = tmp_path / "out"
    with pytest.raises(PunaError, match="another process has written it"):
        with atomic_path(destination) as path:
            write(path, "late")
            write(destination, "early")
    assert (destination / "file" if folder else destination).read_text() == "early"
    assert list(tmp_path.iterdir()) == [destination]


def test_the_current_directory_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(PunaError, match="current directory"), atomic_path(tmp_path, overwrite=True):
        pass


def test_too_little_space_names_path_needed_and_free(tmp_path):
    check_free_space(tmp_path / "not" / "there", 1)
    with pytest.raises(PunaError, match=r"there needs 1,000,000,000,000,000,000 bytes and its disk has [\d,]+ free"):
        check_free_space(tmp_path / "there", 10**18)


def test_progress_goes_to_stderr(capsys):
    with progress("reading", 2_000_000) as advance:
        advance(2_000_000)
    output, errors = capsys.readouterr()
    assert output == "" and "reading" in errors and "2.0/2.0 MB" in errors
