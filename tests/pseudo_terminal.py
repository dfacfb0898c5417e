"""A program in a terminal of its own, as a person would use it: a pseudo-terminal that is its controlling one."""

import codecs
import os
import re
import select
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).parent.parent
READY, SENT = "<input line>", "<sent>"  # how it is shown that an input line begins, and ends
MARKS = {"\x1b[?2004h": READY, "\x1b[?2004l": SENT}  # bracketed paste is on while a line is read
PATIENCE = 60  # seconds without output after which a test has failed
START = """
import os, sys
output, *arguments = sys.argv[1:]
os.login_tty(0)
if output:
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
os.execv(sys.executable, [sys.executable, *arguments])
"""
CONTROLS = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")


class PseudoTerminal:
    """Runs `python ARGUMENTS...`, with stdout in the file `output` if given; leave it as a context manager."""

    def __init__(self, *arguments, environment=(), output=""):
        self._ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (40, 120))
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = ""  # and not expected yet
        variables = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"} | dict(environment)
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(output), *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | variables,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)

    def type(self, text):
        os.write(self._ours, text.encode())

    def enter(self, text):
        """Types `text` into the next input line."""
        self.expect(READY)
        self.type(text)

    def expect(self, text):
        """Waits until `text` is shown after all that was expected before; returns what came before it."""
        while text not in self._shown:
            assert self._read(), f"{text!r} never came: {self._shown!r}"
        before, self._shown = self._shown.split(text, 1)
        return before

    def expect_any(self):
        """Waits until anything but white space is shown."""
        while not self._shown.strip():
            assert self._read(), "nothing came"

    def end(self):
        """Waits until the program has left; returns what else it showed, and its exit code."""
        while self._read():
            pass
        return self._shown, self.process.wait()

    def _read(self):
        if not select.select([self._ours], [], [], PATIENCE)[0]:
            raise AssertionError(f"nothing came for {PATIENCE} seconds: {self._shown!r}")
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # Linux: nobody has the other side open
            return False
        text = self._shown + self._decoder.decode(data)
        for control, mark in MARKS.items():
            text = text.replace(control, mark)
        self._shown = CONTROLS.sub("", text)
        return bool(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
