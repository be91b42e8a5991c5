"""Contrastive batches larger than memory: the gradients of one big batch from encoders that see it in chunks.

A contrastive loss compares every sample of a batch with every other, so gradients of its parts do not add up
to its own, and plain gradient accumulation trains on fewer negatives. GradCache (Gao et al., "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983) splits the chain rule at the
features instead, which are small:

1. encode every chunk without gradient and keep its features;
2. compute the loss over all features, and its gradients with respect to them;
3. encode every chunk again, now with gradient and with the random numbers of the first time, and feed it
   its features' gradients.

Activations of one chunk are alive at a time, for the price of one more forward pass: 4/3 of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Chunk = TypeVar("Chunk")
RandomSource = tuple[Callable[[], Tensor], Callable[[Tensor], Any]]  # how to read a state, and how to set it


def split_batch(batch: Mapping[str, Tensor], chunk_size: int) -> list[dict[str, Tensor]]:
    """Cut a batch into chunks of `chunk_size` samples, the last of what is left.

    Args:
        batch: tensors by name, all with the samples along their first dimension. The chunks are views.
        chunk_size: at least 1; a size beyond the batch gives one chunk.

    Raises:
        ValueError: a size below 1, or tensors of unequal or no length.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    lengths = {name: tensor.shape[0] if tensor.ndim else 0 for name, tensor in batch.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"batch must hold tensors of one length, at least 1, in dimension 0, got lengths {lengths}")
    parts = zip(*(tensor.split(chunk_size) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def cached_backward(
    encode: Callable[[Chunk], Sequence[Tensor]],
    chunks: Sequence[Chunk],
    loss: Callable[..., Tensor],
    *,
    num_shared: int = 0,
    modules: Sequence[nn.Module] = (),
    generators: Sequence[torch.Generator] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Add to `.grad` what ``loss(*encode(whole_batch)).backward()`` would add, a chunk's activations at a time.

        chunks = split_batch({"pixels": pixels, "token_ids": token_ids, "lengths": lengths}, 256)
        loss, features = cached_backward(lambda chunk: model(**chunk), chunks, clip_loss, num_shared=1)

    One chunk is encoded once and differentiated directly. The caller's autocast holds in both passes and not
    in the backward passes.

    Args:
        encode: takes a chunk and returns tensors, first features with the samples along dimension 0, then
            `num_shared` others. It is called twice a chunk and must do the same both times: random numbers
            are taken care of, other state is not. A layer that mixes samples, such as a batch norm in
            training, sees those of a chunk, and updates its running statistics twice.
        chunks: what `encode` takes, in any form, all of it this process's batch. Sizes may differ; over
            several processes all need the same number.
        loss: takes what `encode` returns, each feature joined over all chunks, and returns a scalar. It is
            called once, over all ranks where it communicates (``clip_loss(..., group=...)``), and parameters
            that it uses by itself get their gradient too. Those of a module in `modules` must come from
            `encode`: outside of a wrapper's forward they are shards (FSDP2) or not reduced (DDP).
        num_shared: how many of `encode`'s last tensors are not made of samples, such as a logit scale or bias.
            The loss gets the last chunk's, and they are differentiated once, with the last chunk.
        modules: the FSDP2 roots, or DDP or FSDP1 modules, that `encode` calls. Their gradients are reduced
            once, by the last chunk; until then each process holds whole gradients, of FSDP2 too, which gathers
            weights three times a chunk. `encode` must call them by forward or by a method registered with
            `register_fsdp_forward_method`. Other modules are left alone.
        generators: generators that `encode` draws from besides the default ones of the CPU and of the current
            accelerator device, which are always restored.

    Returns:
        The loss, and the tensors that it got, all without gradient. Random states are then what encoding
        every chunk once and computing the loss leave behind.

    Raises:
        ValueError: no chunk, a `num_shared` beyond what `encode` returns, another number of tensors from one
            chunk than from another, features without dimension, or a loss that is not a scalar.
        Exception: whatever `encode` or `loss` raise. Where that is in the second pass, random states are as
            after the first, wrappers reduce again, and the gradients of the chunks done are in `.grad`:
            zero them.
    """
    if not chunks:
        raise ValueError("chunks must hold at least one chunk, got none")
    if len(chunks) == 1:
        outputs = _encode(encode, chunks[0], num_shared)
        value = _scalar(loss(*outputs))
        plain_backward([value])
        return value.detach(), [output.detach() for output in outputs]

    sources = _random_sources(generators)
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append([read() for read, _ in sources])
            parts.append(_encode(encode, chunk, num_shared))
        inputs = _join(parts, num_shared)
    value = _scalar(loss(*inputs))
    plain_backward([value])
    gradients = _split_gradients(inputs, parts, num_shared)
    del parts

    after = [read() for read, _ in sources]
    try:
        with _no_reduction(modules):
            for chunk, state, gradient in zip(chunks[:-1], states, gradients, strict=False):
                _replay(encode, chunk, num_shared, gradient, sources, state)
        _replay(encode, chunks[-1], num_shared, gradients[-1], sources, states[-1])
    finally:
        _restore(sources, after)
    return value.detach(), [tensor.detach() for tensor in inputs]


def plain_backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> None:
    """Autograd's backward pass of scalars, or of tensors and their gradients, as it is outside of autocast."""
    # Autocast keeps its copies of weights until it ends, which is after this; the graph holds those that it needs.
    # Where pytorch/pytorch#165068 is missing, a copy made in the first pass would cut its weight off from the second.
    torch.clear_autocast_cache()
    with torch.autocast(tensors[0].device.type, enabled=False):
        torch.autograd.backward(tensors, gradients)


def _encode(encode: Callable[[Chunk], Sequence[Tensor]], chunk: Chunk, num_shared: int) -> list[Tensor]:
    outputs = list(encode(chunk))
    if not 0 <= num_shared < len(outputs):
        raise ValueError(
            f"num_shared must be at least 0 and less than the number of tensors that encode returns, got {num_shared} "
            f"and {len(outputs)} tensors"
        )
    for index, output in enumerate(outputs[: len(outputs) - num_shared]):
        if output.ndim == 0:
            raise ValueError(
                f"encode must return features with the samples along dimension 0, got a scalar as tensor {index}: "
                "return what is not made of samples last, and count it in num_shared"
            )
    return outputs


def _scalar(value: Tensor) -> Tensor:
    if value.ndim:
        raise ValueError(f"loss must return a scalar, got shape {tuple(value.shape)}")
    return value


def _join(parts: Sequence[Sequence[Tensor]], num_shared: int) -> list[Tensor]:
    """What the loss takes, as leaves of the graph: each feature of all chunks, then the last chunk's shared ones."""
    if len({len(outputs) for outputs in parts}) > 1:
        raise ValueError(f"encode must return as many tensors each time, got {[len(outputs) for outputs in parts]}")
    num_features = len(parts[0]) - num_shared
    features = [torch.cat([outputs[index] for outputs in parts]) for index in range(num_features)]
    shared = [tensor.detach() for tensor in parts[-1][num_features:]]
    return [tensor.requires_grad_(tensor.is_floating_point()) for tensor in (*features, *shared)]


def _split_gradients(
    inputs: Sequence[Tensor], parts: Sequence[Sequence[Tensor]], num_shared: int
) -> list[list[Tensor | None]]:
    """The gradient of every chunk's outputs; None where there is none, as for shared ones but of the last chunk."""
    columns: list[Sequence[Tensor | None]] = []
    for index, tensor in enumerate(inputs):
        gradient = tensor.grad
        if gradient is None:
            columns.append([None] * len(parts))
        elif index >= len(inputs) - num_shared:
            columns.append([*[None] * (len(parts) - 1), gradient])
        else:
            columns.append(gradient.split([outputs[index].shape[0] for outputs in parts]))
    return [list(row) for row in zip(*columns, strict=True)]


def _replay(
    encode: Callable[[Chunk], Sequence[Tensor]],
    chunk: Chunk,
    num_shared: int,
    gradients: Sequence[Tensor | None],
    sources: Sequence[RandomSource],
    state: Sequence[Tensor],
) -> None:
    """The second pass of one chunk, whose graph ends with this call."""
    _restore(sources, state)
    outputs = _encode(encode, chunk, num_shared)
    fed = [
        (output, gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if gradient is not None and output.requires_grad  # a frozen encoder's do not
    ]
    if fed:
        plain_backward(*zip(*fed, strict=True))


def _random_sources(generators: Sequence[torch.Generator]) -> list[RandomSource]:
    sources: list[RandomSource] = [(torch.get_rng_state, torch.set_rng_state)]
    sources += [(generator.get_state, generator.set_state) for generator in generators]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        # To ask an idle accelerator would start it; torch.mps cannot be asked whether it is.
        if getattr(module, "is_initialized", lambda: True)():
            sources.append((module.get_rng_state, module.set_rng_state))
    return sources


def _restore(sources: Sequence[RandomSource], states: Sequence[Tensor]) -> None:
    for (_, write), state in zip(sources, states, strict=True):
        write(state)


@contextmanager
def _no_reduction(modules: Sequence[Any]) -> Iterator[None]:
    """Backward passes inside keep the gradients of wrapped modules on their process."""
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "set_requires_gradient_sync"):  # FSDP2
                stack.callback(module.set_requires_gradient_sync, True)
                module.set_requires_gradient_sync(False)
            elif hasattr(module, "no_sync"):
                stack.enter_context(module.no_sync())
        yield
