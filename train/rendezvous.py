"""Who is here: a meeting of the processes before JAX's own, which ends a process by an abort when someone is missing.

Process 0 listens where JAX's coordinator will listen next; the others say who and where they are. When the time is up
every process that came learns the names of those that did not.
"""

import json
import socket
import time
from collections.abc import Sequence
from typing import Any

from model.errors import PunaError

_RETRY_SECONDS = 0.2


class MissingProcesses(PunaError):
    """Not every process came."""


def meet(address: str, count: int, index: int, timeout: float, hosts: Sequence[str] = ()) -> None:
    """Return when all processes have come.

    Args:
        address: host:port of process 0.
        count: of all processes.
        index: of this one.
        timeout: in seconds.
        hosts: of all processes, where the scheduler tells them.

    Raises:
        MissingProcesses: naming the processes that did not come in time and, where known, their hosts.
        PunaError: two processes have one index, the address is not host:port, or process 0 cannot listen there.
    """
    deadline = time.monotonic() + timeout
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise PunaError(f"the coordinator's address is {address!r}; write host:port")
    if index == 0:
        verdict = _receive(int(port), count, deadline)
    else:
        verdict = _report((host.strip("[]"), int(port)), index, deadline)
    if verdict is None:
        where = f"process 0 on {hosts[0]}" if hosts else "process 0"
        raise MissingProcesses(
            f"{where} was not reached at {address} within {timeout:g} s (CONNECT_SECONDS): is it running?"
        )
    if verdict["twice"]:
        raise PunaError(f"{', '.join(verdict['twice'])}: give every process its own PROCESS_ID")
    if verdict["missing"]:
        names = [f"process {i}" + (f" on {hosts[i]}" if hosts else "") for i in verdict["missing"]]
        came = ", ".join(f"{i} on {name}" for i, name in sorted(verdict["came"].items(), key=lambda item: int(item[0])))
        raise MissingProcesses(
            f"{', '.join(names)} of {count} did not come to {address} within {timeout:g} s (CONNECT_SECONDS); "
            f"those that came: {came}"
        )


def _receive(port: int, count: int, deadline: float) -> dict[str, Any]:
    """Process 0: collect the others, tell every one of them the outcome, and return it."""
    came, twice = {"0": socket.gethostname()}, []
    callers = []
    try:
        with socket.create_server(("", port), backlog=count) as server:
            while len(came) < count and not twice and (left := deadline - time.monotonic()) > 0:
                server.settimeout(left)
                try:
                    caller, _ = server.accept()
                    caller.settimeout(max(1.0, left))
                    callers.append(caller)
                    said = json.loads(_line(caller))
                except (TimeoutError, ValueError):  # silence, or something that is not one of us
                    continue
                if said["index"] in came:
                    twice.append(f"process {said['index']} runs on {came[said['index']]} and on {said['host']}")
                came[said["index"]] = said["host"]
            verdict = {"missing": [i for i in range(count) if str(i) not in came], "came": came, "twice": twice}
            for caller in callers:
                caller.sendall(json.dumps(verdict).encode() + b"\n")
            return verdict
    except OSError as error:
        raise PunaError(f"process 0 cannot listen on port {port} ({error.strerror}): choose another port") from error
    finally:
        for caller in callers:
            caller.close()


def _report(address: tuple[str, int], index: int, deadline: float) -> dict[str, Any] | None:
    """Another process: say who this is; returns the outcome, or None where process 0 was not reached in time."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=left) as connection:
                connection.sendall(json.dumps({"index": str(index), "host": socket.gethostname()}).encode() + b"\n")
                connection.settimeout(left + 10)  # process 0 may have started later, and waits its own time
                return json.loads(_line(connection))
        except (OSError, ValueError):
            time.sleep(_RETRY_SECONDS)
    return None


def _line(connection: socket.socket) -> bytes:
    with connection.makefile("rb") as file:
        return file.readline()
