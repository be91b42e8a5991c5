"""Processes find each other in a store that still holds what dead ones wrote."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from xray.train import rendezvous

PATIENCE = timedelta(seconds=20)


@pytest.fixture
def store() -> dist.Store:
    """What torchrun's agent keeps."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)


def client(store: dist.Store, timeout: timedelta = PATIENCE) -> dist.Store:
    assert isinstance(store, dist.TCPStore)
    return dist.TCPStore("localhost", store.port, is_master=False, wait_for_workers=False, timeout=timeout)


def attempt(store: dist.Store, size: int, order: list[int]) -> list[dist.Store]:
    """All ranks of one attempt, started in an order."""
    with ThreadPoolExecutor(size) as pool:
        started = {rank: pool.submit(rendezvous.fresh, client(store), rank, size, PATIENCE) for rank in order}
        return [started[rank].result(timeout=30) for rank in range(size)]


def test_attempts_do_not_see_each_others_keys(store: dist.Store) -> None:
    for number, order in enumerate(([0, 1, 2], [2, 1, 0], [1, 0, 2])):
        ours = attempt(store, 3, order)
        assert not ours[2].check(["address/0"])
        ours[0].set("address/0", str(number))
        assert [own.get("address/0") for own in ours] == [str(number).encode()] * 3


def test_what_dead_processes_wrote_leads_nobody_astray(store: dist.Store) -> None:
    # of an attempt of four, three came, and died before the first did
    dead = [
        threading.Thread(target=_give_up, args=(client(store, timedelta(seconds=0.5)), rank), daemon=True)
        for rank in (1, 2, 3)
    ]
    for thread in dead:
        thread.start()
    for thread in dead:
        thread.join()
    ours = attempt(store, 4, [0, 3, 2, 1])
    ours[3].set("hello", "1")
    assert ours[0].get("hello") == b"1"


def _give_up(store: dist.Store, rank: int) -> None:
    with pytest.raises(dist.DistError):
        rendezvous.fresh(store, rank, 4, PATIENCE)


def test_a_process_that_does_not_come_is_named(store: dist.Store) -> None:
    with pytest.raises(RuntimeError, match=r"processes 1, 2 of 3 did not come in 0:00:00\.2"):
        rendezvous.fresh(store, 0, 3, timedelta(seconds=0.2))
