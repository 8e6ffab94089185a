"""A run as the work of several processes, as `accelerate launch` and torchrun start them.

    every process   the same model, methods and plans; its part of each batch; DistributedDataParallel
    the first one   prints, writes the run's folder, measures costs

What is equal and why stands in `trimtab/divided.py`; the pages are docs/scale.md.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from trimtab import divided
from trimtab.experiments.folder import RunError
from trimtab.experiments.schema import RecipeError
from trimtab.processes import everywhere, world

NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(hours=6)  # the first process may measure costs for long, while the others wait


def started() -> int:
    """As one of how many processes this one was started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Join the processes that were started together; nothing for one alone.

    Raises:
        RunError: if the launcher told too little or asks for FSDP or DeepSpeed, or the port where they meet is taken.
    """
    told = [os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() for name in ("FSDP", "DEEPSPEED")]
    if "true" in told:
        raise RunError(
            "the launcher was told to divide the model (FSDP or DeepSpeed), which would leave it wrapped where masks, "
            "plans and folders need the plain one: set `training.shard: true` in the recipe, and start it without "
            "--use_fsdp and --use_deepspeed"
        )
    if started() == 1 or dist.is_initialized():
        return
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise RunError(
            f"WORLD_SIZE={started()} in the environment says that this is one of several processes, but "
            f"{', '.join(missing)} is not set: start them with torchrun or `accelerate launch`, or unset WORLD_SIZE"
        )
    from accelerate import PartialState

    try:
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise RunError(
                f"the processes meet at {place}, but that port is in use, by another run perhaps: give another with "
                "`torchrun --master-port N` (`accelerate launch --main_process_port N`), or let torchrun choose one "
                "with `--standalone`"
            ) from error
        raise RunError(f"the {started()} processes did not meet at {place}: {str(error).splitlines()[0]}") from error
    divided.meet()


def leave() -> None:
    """Leave the group, so that the processes end quietly."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return world()[0] == 0 if dist.is_initialized() else int(os.environ.get("RANK", "0")) == 0


def wait() -> None:
    """Go on when all processes are here."""
    if world()[1] > 1:
        everywhere(None)


@contextmanager
def one_by_one() -> Iterator[None]:
    """The first process of each machine goes through this block before the others, so that what it makes and keeps on
    disk is made once."""
    if world()[1] == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().local_main_process_first():
        yield


def first_says(value: Any) -> Any:
    """What the first process has found, in all."""
    return everywhere(value)[0]


def part(rows: int, name: str = "training.batch_size") -> int:
    """How many of a batch's rows each process takes.

    Raises:
        RecipeError: if the processes do not divide them.
    """
    size = world()[1]
    if rows % size:
        fits = [n for n in (rows // size * size, -(-rows // size) * size) if n]
        raise RecipeError(
            f"{name}: a batch has {rows} rows in all, which {size} processes do not divide: set it to "
            f"{' or '.join(map(str, fits))}, or start another number of processes"
        )
    return rows // size


def check(batch_size: int, rows: int, table: str) -> None:
    """RecipeError if a table cannot be trained on in equal parts."""
    if world()[1] > 1 and rows < batch_size:
        raise RecipeError(
            f"training.batch_size: {batch_size}, but the {table} table has {rows} rows: several processes divide whole "
            f"batches only: set it to {rows // world()[1] * world()[1]} at most"
        )


def dealt(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole batch with its rows dealt out in turn: parts then have rows of all kinds, where a batch begins with one
    kind and ends with another."""
    size = world()[1]
    if size == 1:
        return batch
    order = torch.arange(len(next(iter(batch.values())))).view(-1, size).T.flatten()
    return {name: values[order] for name, values in batch.items()}


def agreed(number: int, why: str | None, alone: bool) -> str | None:
    """What a run came to in all processes; they can begin the next one together afterwards.

    One that failed closes its connections first: the others, which may wait for what it will not send, then fail too,
    and come here. Outcomes go through the store in which the processes met, which does not depend on the connections.

    Args:
        number: of the run, the same in all.
        why: it failed in this process; None if it did not.
        alone: whether it failed only because another process did (`left_alone`).

    Returns:
        None if it went well everywhere; else why it failed, with the process that failed by itself.

    Raises:
        RunError: if the others do not come in ten minutes, or over NCCL, whose connections cannot be left so, in one:
            when this process ends, the launcher ends all.
    """
    rank, size = world()
    if size == 1:
        return why
    backend, store = dist.get_backend(), dist.distributed_c10d._get_default_store()
    if why is not None:
        _close()
    keys = [f"trimtab run {number} {other}" for other in range(size)]
    store.set(keys[rank], json.dumps([why, alone]))
    try:
        store.wait(keys, timedelta(minutes=10 if backend == "gloo" else 1))
    except (RuntimeError, ValueError) as error:
        raise RunError(f"{why or 'the run is done here'}; not all other processes answer") from error
    told = [json.loads(store.get(key)) for key in keys]
    failed = {other: found for other, (found, _) in enumerate(told) if found is not None}
    if not failed:
        return None
    if why is None:
        _close()
    again = dist.PrefixStore(f"trimtab after run {number}", store)
    dist.init_process_group(backend, store=again, rank=rank, world_size=size, timeout=PATIENCE)
    divided.meet()
    own = {other: found for other, found in failed.items() if not told[other][1]} or failed
    first = next(iter(own))
    alike = len(own) == size and len(set(own.values())) == 1
    return own[first] if alike else f"process {first} of {size}: {own[first]}"


def _close() -> None:
    """Leave all groups for good: a model of the run, wrapped for them, would keep their connections open."""
    divided.forget()
    gc.collect()
    dist.destroy_process_group()
    gc.collect()


# --- the command line -------------------------------------------------------------------------------------------------


def quiet() -> None:
    """Let the first process alone print; errors are told by all."""
    warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # how transformers says it to Accelerate
    if started() > 1 and not is_first():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (it stays open until the end)


def left_alone(error: BaseException) -> bool:
    """Whether an error says no more than that another process does not answer."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo/", "NCCL", "ProcessGroup"))


def died(command: str, error: BaseException) -> None:
    """Tell of an error with the process's name, and hand it to torchrun for its summary.

    An error that all meet (a wrong recipe, say) is told by the first: the others wait for a moment, in which the
    launcher ends them.
    """
    rank, size = int(os.environ.get("RANK", "0")), started()
    if rank:
        time.sleep(10)
    if left_alone(error):
        print(
            f"trimtab {command}: process {rank} of {size}: another process has ended; which one, and why, stands in "
            "its own message or in the launcher's summary. Started again, a run goes on from its last checkpoint if "
            "training.save_every is set",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return
    print(f"trimtab {command}: process {rank} of {size}: {error}", file=sys.stderr, flush=True)
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)
