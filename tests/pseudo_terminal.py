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
PASTE_ON = "\x1b[?2004h"  # what a program writes as it begins to read an input line
READY = "<input line>"  # how such a place is shown
PATIENCE = 20  # seconds without output after which a test has failed
START = "import os, sys; os.login_tty(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
CONTROLS = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")


class PseudoTerminal:
    """Runs `python ARGUMENTS...`; leave it as a context manager."""

    def __init__(self, *arguments, environment=()):
        self._ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (40, 120))
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = ""  # and not expected yet
        variables = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"} | dict(environment)
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | variables,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)

    def type(self, text):
        os.write(self._ours, text.encode())

    def expect(self, text):
        """Waits until `text` is shown after all that was expected before; returns what came before it."""
        while text not in self._shown:
            assert self._read(), f"{text!r} never came: {self._shown!r}"
        before, self._shown = self._shown.split(text, 1)
        return before

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
        self._shown = CONTROLS.sub("", text.replace(PASTE_ON, READY))
        return bool(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
