"""How the processes of a run find each other, also after some of them have died and been started again.

torchrun's agent keeps one key-value store for all restarts of its processes, so what dead processes wrote is there
still, and a new process group may find the address of a process that is gone: "Connection refused" (pytorch#135712).
Counting restarts does not tell attempts apart, as the nodes count differently. Here processes agree on a name for the
attempt that only living ones can know, and the group keeps its keys under that name.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""How gloo and NCCL say that another process has ended."""


def join(backend: str, timeout: timedelta) -> None:
    """Make the default process group of the processes that torchrun has started; all of them must call it.

    Args:
        backend: as for `torch.distributed.init_process_group`.
        timeout: how long processes wait for each other, here and in every collective.

    Raises:
        RuntimeError: (or a subclass) a process did not come in time, or the address is taken.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = fresh(store, rank, size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def fresh(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The part of a store that belongs to this attempt of `size` processes, empty at first.

    Each process but the first writes a random number; the first answers every number it sees, a dead process's
    included, by the attempt's name, and waits until all have acknowledged that name, which the dead never do.
    """
    if rank > 0:
        number = uuid.uuid4().hex
        store.set(f"xray/number/{rank}", number)
        name = store.get(f"xray/name/{number}").decode()
        store.set(f"xray/known/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    name, missing = uuid.uuid4().hex, set(range(1, size))
    answered: set[bytes] = set()
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"xray/number/{other}"]) and (asked := store.get(f"xray/number/{other}")) not in answered:
                store.set(f"xray/name/{asked.decode()}", name)
                answered.add(asked)
        missing -= {other for other in missing if store.check([f"xray/known/{name}/{other}"])}
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"processes {', '.join(map(str, sorted(missing)))} of {size} did not come in {timeout}")
        time.sleep(0.01 if missing else 0)
    return dist.PrefixStore(name, store)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has ended, rather than for a mistake of its own."""
    text = str(error)
    return dist.is_initialized() and any(sign in text for sign in LOST)
