"""How the texts of all ranks come to each rank, and how their gradients go home.

Both exchanges give blocks of texts, each while the next is on its way, and take the gradient of each back while that
of the next is computed. With n x D features of b bytes on each of W ranks and T = (W - 1) n D b, a rank sends

                  texts forward    texts backward    gradients    memory
    all_gather    T                0 (kept)          T            N x D
    ring          T                T                 T            n x D

Gradients travel in the dtype of the features, straight to the rank that owns the texts, which sums the W parts in
float32: two roundings, and no more in a larger group.
Source of the ring: SigLIP (Zhai et al., ICCV 2023, section 3.3); here for CLIP's two-way softmax as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from xray_kernels.contrastive_loss.distributed import start_all_gather
from xray_kernels.contrastive_loss.tiling import spans, wide_dtype

MAX_CHUNKS = 4
"""Parts that each rank's texts are gathered in, at most: all but the first travel while one before is computed."""
CHUNK_ROWS = 512
"""Rows of each rank that a part has at least: with fewer, matrix products get thin and messages short."""


class Block(NamedTuple):
    """Texts, or their gradients, of some rows of some ranks, one rank after the other: (ranks * rows, D)."""

    values: Tensor
    owners: slice
    rows: slice


class Transfer(NamedTuple):
    """Gradients on their way home: parts (k, rows, D) for rows of this rank, to be read after all requests.

    `sent` is what others still read.
    """

    parts: Tensor
    rows: slice
    requests: Sequence[Any] = ()
    sent: Tensor | None = None


class Exchange:
    """Texts of all ranks of a group, in blocks; every rank of the group must go through the same calls."""

    holds_all: bool
    """Whether the blocks of all texts are in memory at a time, so that they can be kept for the backward pass."""

    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def blocks(self, text: Tensor) -> Iterator[Block]:
        """Blocks of the texts of all ranks, in an order that every rank has; (n, D) is this rank's own."""
        raise NotImplementedError

    def again(self, kept: Sequence[Tensor]) -> Iterator[Block]:
        """The same blocks, from what was kept: all of them, or this rank's own texts."""
        raise NotImplementedError

    def start_home(self, block: Block, grad: Tensor) -> Transfer:
        """Send the gradient of a block to its owners, and receive theirs of some of this rank's texts."""
        raise NotImplementedError

    def part(self, values: Tensor, block: Block) -> Tensor:
        """Those of (N,) numbers that belong to the texts of a block."""
        return self._view(values, block).reshape(-1)

    def put(self, values: Tensor, block: Block, part: Tensor) -> None:
        """Write them."""
        place = self._view(values, block)
        place.copy_(part.view_as(place))

    def _view(self, values: Tensor, block: Block) -> Tensor:
        return values.view(self.size, values.shape[0] // self.size)[block.owners, block.rows]


class AllGather(Exchange):
    """Each block is some rows of every rank."""

    holds_all = True

    def blocks(self, text: Tensor) -> Iterator[Block]:
        # all are started at once: they arrive in order, and there is room for them
        coming = [(rows, *start_all_gather(text[rows], self.group)) for rows in self._chunks(text.shape[0])]
        for rows, gathered, request in coming:
            request.wait()
            yield Block(gathered, slice(0, self.size), rows)

    def again(self, kept: Sequence[Tensor]) -> Iterator[Block]:
        n = sum(len(chunk) for chunk in kept) // self.size
        for chunk, rows in zip(kept, self._chunks(n), strict=True):
            yield Block(chunk, slice(0, self.size), rows)

    def start_home(self, block: Block, grad: Tensor) -> Transfer:
        grad = grad.contiguous()
        parts = torch.empty_like(grad)
        request = dist.all_to_all_single(parts, grad, group=self.group, async_op=True)
        return Transfer(parts.view(self.size, -1, grad.shape[1]), block.rows, [request], grad)

    def _chunks(self, n: int) -> Iterator[slice]:
        count = max(min(MAX_CHUNKS, n // CHUNK_ROWS), 1)
        return spans(n, -(-n // count))


class Ring(Exchange):
    """Each block is one rank's texts, at step k those of the k-th rank after this one; they go to the rank before."""

    holds_all = False

    def blocks(self, text: Tensor) -> Iterator[Block]:
        text = text.contiguous()
        rows = slice(0, text.shape[0])
        for step in range(self.size):
            owner = (self.rank + step) % self.size
            if step + 1 == self.size:
                yield Block(text, slice(owner, owner + 1), rows)
                return
            received, requests = self._send_receive(text, self.rank - 1, self.rank + 1, tag=0)
            yield Block(text, slice(owner, owner + 1), rows)
            _wait(requests)
            text = received

    def again(self, kept: Sequence[Tensor]) -> Iterator[Block]:
        return self.blocks(*kept)

    def start_home(self, block: Block, grad: Tensor) -> Transfer:
        step = block.owners.start - self.rank
        if step == 0:
            return Transfer(grad[None], block.rows)
        grad = grad.contiguous()
        # while this rank computes the texts of the one `step` after it, its own are with the one `step` before it
        received, requests = self._send_receive(grad, self.rank + step, self.rank - step, tag=1)
        return Transfer(received[None], block.rows, requests, grad)

    def _send_receive(self, value: Tensor, to: int, source: int, tag: int) -> tuple[Tensor, Sequence[Any]]:
        received = torch.empty_like(value)
        target, origin = (dist.get_global_rank(self.group, rank % self.size) for rank in (to, source))
        operations = [
            dist.P2POp(dist.isend, value, target, self.group, tag),
            dist.P2POp(dist.irecv, received, origin, self.group, tag),
        ]
        return received, dist.batch_isend_irecv(operations)


class Homeward:
    """Gradients of texts on their way to their owners: the sum of all that arrive for this rank's (n, D)."""

    def __init__(self, exchange: Exchange, text: Tensor) -> None:
        self.exchange, self.dtype = exchange, text.dtype
        self.total = text.new_zeros(text.shape, dtype=wide_dtype(text.dtype))
        self.travelling: Transfer | None = None

    def send(self, block: Block, grad: Tensor) -> None:
        """Start sending the gradient of a block's texts; meanwhile the one before is added."""
        started = self.exchange.start_home(block, grad)
        self._arrive()
        self.travelling = started

    def finish(self) -> Tensor:
        """The gradient of this rank's texts, in their dtype."""
        self._arrive()
        return self.total.to(self.dtype)

    def _arrive(self) -> None:
        if self.travelling is None:
            return
        _wait(self.travelling.requests)
        self.total[self.travelling.rows] += self.travelling.parts.sum(0, dtype=self.total.dtype)
        self.travelling = None


def _wait(requests: Sequence[Any]) -> None:
    """Let what follows on this device's stream wait for transfers; on the CPU, wait."""
    for request in requests:
        request.wait()


EXCHANGE_TYPES: dict[str, type[Exchange]] = {"all_gather": AllGather, "ring": Ring}
