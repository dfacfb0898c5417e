"""Runs the server of `infer serve`: loads in the background, answers from the first moment, drains at the end."""

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import uvicorn

from cli.progress import Advance, progress
from infer.engine import Engine
from infer.host import Ended, Host
from infer.served import Served
from infer.server import make_app
from model.errors import JobFailed, PunaError


def serve(served: Served, host: str, port: int, api_keys: Sequence[str] = ()) -> None:
    """Serves until SIGTERM or SIGINT: then takes no more requests, and ends when those it took have been answered. A
    SIGINT after that (Ctrl-C again) ends it at once.

    Raises:
        PunaError: the address is in use, or is none of this machine's.
        whatever loading the model raises.
    """
    config = uvicorn.Config(
        make_app(served, api_keys), host=host, port=port, log_level="warning", timeout_keep_alive=30, ws="none"
    )
    server = _Server(config, served.host)
    listener = open_port(config)
    where = f"http://{host}:{listener.getsockname()[1]}"
    print(f"Loading {served.name}; {where}/health says when it is ready", file=sys.stderr, flush=True)
    if served.template is None:
        print("No chat template: only completions are served; --template names one", file=sys.stderr, flush=True)
    asyncio.run(server.run_on(listener, lambda: print(f"Ready: {where}", file=sys.stderr, flush=True)))
    if served.host.error is not None:
        raise served.host.error
    if server.force_exit:
        raise JobFailed("ended by a second Ctrl-C: requests under way were cut off")


def open_port(config: uvicorn.Config) -> socket.socket:
    """The socket to listen on. What is written to its connections is sent at once: asyncio sees to that only where a
    socket was made for TCP by name, which this is not, and small pieces would wait for the client's delayed
    acknowledgements, 40 ms on Linux.

    Raises:
        PunaError: the address is in use, or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=config.backlog)
    except OSError as error:
        raise PunaError(
            f"port {config.port} of {config.host}: {error.strerror}; give another with --port or --host"
        ) from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class _Server(uvicorn.Server):
    """uvicorn's server, with our signals and the engine's thread beside it."""

    def __init__(self, config: uvicorn.Config, host: Host):
        super().__init__(config)
        self._host = host

    async def run_on(self, listener: socket.socket, ready: Callable[[], None]) -> None:
        """Serves on an open socket; calls `ready` when the model is."""
        loop = asyncio.get_running_loop()
        self._host.start(lambda: loop.call_soon_threadsafe(setattr, self, "should_exit", True))
        watch = asyncio.ensure_future(self._tell(ready))
        await self.serve([listener])
        watch.cancel()

    async def _tell(self, ready: Callable[[], None]) -> None:
        while self._host.state == "loading":
            await asyncio.sleep(0.05)
        if self._host.state == "ready":
            ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours in place of uvicorn's, which raises them again at the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end, number)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one changes nothing: this ends, with its own code

    def _end(self, number: int) -> None:
        self.force_exit = self.should_exit and number == signal.SIGINT
        self.should_exit = True


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder, so that a server starts faster the next time. A folder that
    JAX was given stays."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "puna" / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def engine_host(make: Callable[[], Engine]) -> Host:
    """A host whose engine is warmed up before it is ready, with a bar while that lasts and a line about it."""

    def ready(stopping: threading.Event) -> Engine:
        @contextmanager
        def bar(total: int) -> Iterator[Advance]:
            with progress("compiling", total, unit="programs") as advance:

                def go_on(count: int) -> None:
                    advance(count)
                    if stopping.is_set():
                        raise Ended

                yield go_on

        engine = make()
        programs = engine.warm_up(scored=True, bar=bar)
        print(f"{engine.rows} rows of {engine.length} tokens; {programs} programs compiled", file=sys.stderr)
        return engine

    return Host(ready)
