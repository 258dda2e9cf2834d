"""Runs of a function in new processes connected by gloo, or in one that may be killed.

The processes come from a fork server that has imported the training code once: starting one costs a fraction of a
second instead of an import, and none of them inherits the state of the test process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.support.ports import free_ports

TIMEOUT = 600.0
"""Seconds of a job, and of the imports of the fork server before the first one."""


def _enter(place: tuple[int, int, int], pipe: Connection, job: Callable[..., Any], args: Any) -> None:
    gc.freeze()  # what the fork server imported
    # As in a process of a launcher: loaders would otherwise start a fork server, whose import takes a minute.
    multiprocessing.set_start_method("fork", force=True)
    rank, world_size, port = place
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if world_size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    try:
        pipe.send(("result", job(*args)))
    except BaseException as error:
        pipe.send(("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    finally:
        pipe.close()
        if world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def start(world_size: int, job: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[tuple[str, Any]]:
    """Run `job(*args)` on all ranks; return ("result", value), ("error", text) or ("died", code) of each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llava.train.run"])
    [port] = free_ports(1)
    started = []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_enter, args=((rank, world_size, port), theirs, job, args))
        process.start()
        theirs.close()
        started.append((process, ours))
    outcomes: list[tuple[str, Any]] = []
    for process, pipe in started:
        try:
            outcome = pipe.recv() if pipe.poll(timeout) else ("died", "timeout")
        except EOFError:
            process.join(TIMEOUT)
            outcome = ("died", process.exitcode)
        outcomes.append(outcome)
        if outcome[0] != "result":  # the other ranks would wait forever
            for other, _ in started:
                other.join(3)
                other.kill()
    for process, _ in started:
        process.join(TIMEOUT)
    return outcomes


def run_ranks(world_size: int, job: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Return the results of `job(*args)` on each rank; raise the error of a failed rank."""
    outcomes = start(world_size, job, *args, timeout=timeout)
    failed = [f"rank {rank} {kind}: {value}" for rank, (kind, value) in enumerate(outcomes) if kind != "result"]
    assert not failed, "\n".join(failed)
    return [value for _, value in outcomes]


def allow_fsdp_on_cpu() -> None:
    """Let a run without GPUs shard its weights, which torch can and accelerate and this package do not offer."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    from llava.train import legacy_flags

    made = AcceleratorState.__init__

    def make(self: Any, *values: Any, fsdp_plugin: Any = None, **named: Any) -> None:
        made(self, *values, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = make
    legacy_flags._set_fsdp = lambda args: None
