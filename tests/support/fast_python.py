"""A `python` that starts in a fraction of a second: programs run in forks of the tests' fork server.

    script --$PYTHON, torchrun--> client --arguments, folder, environment, streams--> server --fork--> program

A start of Python that imports torch and transformers takes seconds of CPU time; a script with a launcher has several.
The client takes `-m MODULE`, `-c CODE` and script files; signals to it reach the program, and so does its end.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLIENT = """#!{python} -ISB
import json, os, signal, socket, sys
own = os.path.abspath(sys.argv[0])
server = socket.socket(socket.AF_UNIX)
server.connect(own + ".socket")
request = {{"cwd": os.getcwd(), "env": dict(os.environ), "words": sys.argv[1:], "own": own}}
socket.send_fds(server, [b"fds"], [0, 1, 2])
server.sendall(json.dumps(request).encode() + b"\\n")
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
status = server.recv(1)
status = status[0] if status else 255
if status > 128:
    if status - 128 != signal.SIGKILL:
        signal.signal(status - 128, signal.SIG_DFL)
    os.kill(os.getpid(), status - 128)
os._exit(status)
"""

WITHOUT_BUILD = "TESTS_WITHOUT_DEEPSPEED_BUILD"
"""Environment variable of programs in which DeepSpeed compiles nothing, see `without_build`."""

TORCHRUN = """#!/usr/bin/env bash
exec "{python}" -m torch.distributed.run "$@"
"""


@contextlib.contextmanager
def fast_python(folder: Path) -> Iterator[Path]:
    """Yield the path of a `python` in a new folder, beside which is a `torchrun`.

    Programs that start `sys.executable` start this one; torchrun does so for its ranks.
    """
    folder.mkdir()
    python = folder / "python"
    for file, text in ((python, CLIENT.format(python=sys.executable)), (folder / "torchrun", TORCHRUN)):
        file.write_text(text.replace("{python}", str(python)))
        file.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{python}.socket")
    listener.listen(64)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llava.train.run"])
    server = context.Process(target=_serve, args=(listener,))
    server.start()
    listener.close()
    try:
        yield python
    finally:
        server.kill()
        server.join()


def without_build() -> None:
    """Let DeepSpeed communicate with gloo, as where it cannot compile its own transport on a CPU (for two minutes)."""
    # `from deepspeed.comm import torch` gives torch itself, which the package holds under the same name.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    assert callable(backend.build_shm_op)
    backend.build_shm_op = lambda: None


def _serve(listener: socket.socket) -> None:
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(_attend(connection))
        connection.close()


def _attend(connection: socket.socket) -> int:
    """Run one program in a child; pass its status to the client, and the client's signals and end to it."""
    _, streams, *_ = socket.recv_fds(connection, 3, 3)
    received = b""
    while not received.endswith(b"\n"):
        received += connection.recv(1 << 16)
    request = json.loads(received)
    if (child := os.fork()) == 0:
        connection.close()
        os._exit(_run(request, streams))
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    while True:
        ready, _, _ = select.select([connection, ended], [], [])
        if ended in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with contextlib.suppress(OSError):
                connection.sendall(bytes([status if status >= 0 else 128 - status]))
            return 0
        number = connection.recv(1)
        os.kill(child, number[0] if number else signal.SIGKILL)
        if not number:
            return 0


def _run(request: dict[str, Any], streams: list[int]) -> int:
    """Run a program as `python` would; return its status."""
    os.setsid()
    # As in a new process: loaders would otherwise start a fork server, whose import takes long.
    multiprocessing.set_start_method("fork", force=True)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"], PYTHON_EXEC=request["own"])  # torchrun starts its ranks with it
    sys.executable = request["own"]
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    if os.environ.get(WITHOUT_BUILD):
        without_build()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        _execute([word for word in request["words"] if word != "-u"])
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)  # noqa: T201
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status & 255


def _execute(words: list[str]) -> None:
    kind, *rest = words
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if kind in ("-m", "-c"):
        sys.path[:0] = [os.getcwd(), *paths]
        sys.argv = [kind, *rest[1:]]
        if kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        return
    assert not kind.startswith("-"), f"option {kind} is not supported"
    sys.path[:0] = [str(Path(kind).resolve().parent), *paths]
    sys.argv = words
    runpy.run_path(kind, run_name="__main__")
