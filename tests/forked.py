"""Two processes (gloo) for tests, forked from the one that runs them: nothing is imported again."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def together(work: Callable[[], None], folder: Path, count: int = 2, seconds: float = 300) -> None:
    """Run `work` in processes that have the environment of a launcher's; what one raises is raised here."""
    port = free_port()
    running = {_child(work, folder, rank, count, port): rank for rank in range(count)}
    failed: list[str] = []
    end = time.monotonic() + seconds
    while running:
        pid, status = os.waitpid(-1 if len(running) > 1 else next(iter(running)), os.WNOHANG)
        if pid in running:
            rank = running.pop(pid)
            if status:
                told = folder / f"failed.{rank}"
                failed.append(told.read_text() if told.exists() else f"process {rank} ended with status {status}")
        if running and (failed or time.monotonic() > end):
            time.sleep(1 if failed else 0)  # what others have to say
            for other in running:
                os.kill(other, signal.SIGKILL)
            if not failed:
                failed.append(f"not done after {seconds} s")
        time.sleep(0.01)
    assert not failed, "\n".join(failed)


def _child(work: Callable[[], None], folder: Path, rank: int, count: int, port: int) -> int:
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
                       "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count),
                       "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        from accelerate.state import AcceleratorState, PartialState

        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        with (folder / f"printed.{rank}").open("w", buffering=1) as out:
            sys.stdout = sys.stderr = out
            work()
        status = 0
    except BaseException:
        (folder / f"failed.{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(status)
