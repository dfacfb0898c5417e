"""`infer serve` with an engine that breaks when a test asks for it: python -m tests.faulty_server FOLDER serve ...

What a test asks for are files in FOLDER: `slow` makes every step take 20 ms longer, `fail` ends one step with an error
(and is removed), and while `broken` is there the engine cannot start again.
"""

import sys
import time
from pathlib import Path

from cli.command import main
from infer.__main__ import app
from infer.device import Device
from infer.engine import Engine


class Panic(BaseException):
    """As libraries in Rust raise when they fail; it is no Exception."""


def arm(folder: Path) -> None:
    """Puts the faults into the methods of the engine and of its device."""
    start_tokens, reset = Engine._start_tokens, Device.reset

    def faulty_start(self):
        if (folder / "slow").exists():
            time.sleep(0.02)
        if (folder / "fail").exists():
            (folder / "fail").unlink()
            raise Panic("the device is lost")
        return start_tokens(self)

    def faulty_reset(self):
        if (folder / "broken").exists():
            raise RuntimeError("there is no device")
        return reset(self)

    Engine._start_tokens, Device.reset = faulty_start, faulty_reset


if __name__ == "__main__":
    arm(Path(sys.argv.pop(1)))
    main(app)
