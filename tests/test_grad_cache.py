"""GradCache: chunks give the gradients of one big batch, in the memory of a chunk, with the same random numbers."""

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xray import data, models, train
from xray.ops import clip_loss, siglip_loss
from xray.train import distributed
from xray.train.grad_cache import cached_backward, split_batch
from xray.train.recipes import RECIPES, Recipe

BATCH, WIDTH = 11, 6
Batch = dict[str, Tensor]
Gradients = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors are small here: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Towers(nn.Module):
    """Two encoders with dropout, with token drop from a generator of their own, and a scale and bias between them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(5, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, WIDTH))
        self.text = nn.Sequential(nn.Linear(7, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, WIDTH))
        self.logit_scale = nn.Parameter(torch.full((1,), 1.5))
        self.logit_bias = nn.Parameter(torch.full((1,), -2.0))
        self.generator = torch.Generator().manual_seed(1)
        self.drop = dropout > 0
        self.double()

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        if self.drop:
            image = image * (torch.rand(image.shape, generator=self.generator) > 0.3)
        features = (nn.functional.normalize(tower(x)) for tower, x in ((self.image, image), (self.text, text)))
        return (*features, self.logit_scale.exp(), self.logit_bias * 1)


def batch_of(count: int = BATCH) -> Batch:
    source = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(count, width, generator=source, dtype=torch.float64)
        for name, width in (("image", 5), ("text", 7))
    }


def caller(model: nn.Module) -> Callable[[Batch], Sequence[Tensor]]:
    return lambda chunk: model(**chunk)


def clip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return clip_loss(image, text, scale)


def in_one_graph(
    encode: Callable[[Any], Sequence[Tensor]], chunks: Sequence[Any], loss: Callable[..., Tensor], num_shared: int
) -> Tensor:
    """What `cached_backward` must equal: all chunks' graphs alive, and one backward pass through all of them."""
    parts = [tuple(encode(chunk)) for chunk in chunks]
    count = len(parts[0]) - num_shared
    value = loss(*(torch.cat(feature) for feature in list(zip(*parts, strict=True))[:count]), *parts[-1][count:])
    value.backward()
    return value.detach()


def gradients_of(model: nn.Module) -> Gradients:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: distributed.whole(grad).clone() for name, grad in found.items() if grad is not None}


def check_close(actual: Gradients, expected: Gradients, bound: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    assert all(float(value.abs().max()) > 1e-6 for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=bound, atol=bound, msg=name)


# Gradients


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 10, 11, 64])
@pytest.mark.parametrize("loss", [clip, siglip_loss])
def test_gradients_are_those_of_the_whole_batch(loss: Callable[..., Tensor], chunk_size: int) -> None:
    """They are added to what is there; scale and bias count once however many chunks there are."""
    one, other, batch = Towers(), Towers(), batch_of()
    if loss is clip:
        one.logit_bias.requires_grad_(False)
        other.logit_bias.requires_grad_(False)
    for model in (one, other):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    outputs = one(**batch)
    expected = loss(*outputs)
    expected.backward()
    chunks = split_batch(batch, chunk_size)
    assert [len(chunk["text"]) for chunk in chunks][:-1] == [chunk_size] * (len(chunks) - 1)
    value, inputs = cached_backward(caller(other), chunks, loss, num_shared=2)
    check_close(gradients_of(other), gradients_of(one))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    for found, output in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(found, output.detach(), rtol=1e-12, atol=1e-14)
    assert not any(tensor.requires_grad for tensor in (value, *inputs))


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_random_numbers_are_replayed(chunk_size: int) -> None:
    """Dropout and a generator's masks; afterwards random states are those after encoding every chunk once."""
    one, other, chunks = Towers(0.4), Towers(0.4), split_batch(batch_of(), chunk_size)

    def noisy(*inputs: Tensor) -> Tensor:
        return siglip_loss(*inputs) * (1 + torch.rand(()))

    torch.manual_seed(5)
    expected = in_one_graph(caller(one), chunks, noisy, 2)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    value, _ = cached_backward(caller(other), chunks, noisy, num_shared=2, generators=[other.generator])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    check_close(gradients_of(other), gradients_of(one))
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(other.generator.get_state(), one.generator.get_state())


@pytest.mark.parametrize("initialised", [True, False])
def test_the_accelerators_random_numbers_are_replayed(monkeypatch: pytest.MonkeyPatch, initialised: bool) -> None:
    """With an accelerator that is only its random state; one that is not in use is not started."""
    source = torch.Generator().manual_seed(3)
    module = SimpleNamespace(
        is_initialized=lambda: initialised, get_rng_state=source.get_state, set_rng_state=source.set_state
    )
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    drawn = []

    def encode(chunk: Tensor) -> list[Tensor]:
        drawn.append(torch.rand((), generator=source).item())
        return [chunk * drawn[-1]]

    leaf = torch.ones(4, 2, requires_grad=True)
    cached_backward(encode, leaf.split(1), torch.sum)
    assert len(set(drawn)) == (4 if initialised else 8)
    assert (drawn[:4] == drawn[4:]) == initialised


def test_clip_with_evit_compiled_and_recomputed_blocks() -> None:
    vision = replace(models.SIZES["tiny"], keep_rate=0.6)
    text = models.TextConfig(vocab_size=50, context_length=8, width=16, depth=1, heads=2)
    source = torch.Generator().manual_seed(4)
    batch = {
        "pixels": torch.randn(6, 3, 32, 32, generator=source, dtype=torch.float64),
        "token_ids": torch.randint(0, 50, (6, 8), generator=source),
        "lengths": torch.tensor([8, 3, 4, 5, 1, 8]),
    }
    torch.manual_seed(0)
    model = models.Clip(models.ClipConfig(vision=vision, text=text, embed_dim=12)).double()
    clip_loss(*model(**batch)).backward()
    expected = gradients_of(model)
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, models.layers.Block):
            compiled = torch.compile(module.forward, backend="eager", dynamic=False)
            module.forward = partial(  # type: ignore[method-assign]
                checkpoint, compiled, use_reentrant=False, preserve_rng_state=False
            )
    features = []

    def encode(chunk: Batch) -> Sequence[Tensor]:
        features.append(model(**chunk))
        return features[-1]

    cached_backward(encode, split_batch(batch, 3), clip_loss, num_shared=1)
    actual = gradients_of(model)
    # The bias of keys moves all of a row's logits alike: its gradient is zero but for rounding.
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-12, msg=name)
    for first, second in zip(features[:2], features[2:], strict=True):
        assert torch.equal(first.image_features, second.image_features)


class Seen(torch.autograd.Function):
    """The identity, which notes whether autocast is on in its forward and backward passes."""

    notes: ClassVar[list[tuple[str, bool]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Seen.notes.append(("forward", torch.is_autocast_enabled("cpu")))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Seen.notes.append(("backward", torch.is_autocast_enabled("cpu")))
        return gradient


def test_autocast_around_it_holds_for_both_forward_passes_only() -> None:
    one, other, chunks = Towers().float(), Towers().float(), split_batch(batch_of(), 4)
    chunks = [{name: value.float() for name, value in chunk.items()} for chunk in chunks]
    # Without its cache, so that a weight's gradients of several chunks add up in float32 here too.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        parts = [one(**chunk) for chunk in chunks]
        image, text = (torch.cat([part[index] for part in parts]) for index in (0, 1))
        loss = siglip_loss(image, text, *parts[-1][2:])
    loss.backward()
    Seen.notes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        value, inputs = cached_backward(
            lambda chunk: [Seen.apply(x) for x in other(**chunk)], chunks, siglip_loss, num_shared=2
        )
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(value, loss.detach())
    assert torch.equal(inputs[0], image.detach())
    check_close(gradients_of(other), gradients_of(one), bound=1e-5)
    assert set(Seen.notes) == {("forward", True), ("backward", False)}


def test_outputs_that_get_no_gradient() -> None:
    """Whole numbers, a frozen encoder, and features that the loss leaves out."""
    weight, frozen = torch.ones(3, dtype=torch.float64, requires_grad=True), torch.arange(3.0, dtype=torch.float64)
    x = torch.arange(15.0, dtype=torch.float64).view(5, 3)

    def loss(features: Tensor, numbers: Tensor, constant: Tensor, unused: Tensor) -> Tensor:
        assert numbers.tolist() == [0, 3, 6, 9, 12]
        return (features.square() * numbers[:, None] * constant).sum()

    def encode(chunk: Tensor) -> list[Tensor]:
        return [chunk * weight, chunk[:, 0].long(), chunk + frozen, chunk * weight]

    cached_backward(encode, x.split(2), loss)
    expected = (2 * x.square() * x[:, :1] * (x + frozen)).sum(0)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=0)


def test_the_loss_gets_the_last_chunks_shared_tensors() -> None:
    x = torch.arange(4.0)[:, None]
    _, inputs = cached_backward(
        lambda chunk: [chunk, chunk.sum()], x.split(1), lambda features, shared: (features * shared).sum(), num_shared=1
    )
    assert [tensor.tolist() for tensor in inputs] == [x.tolist(), 3.0]


def test_parameters_of_the_loss_count_once() -> None:
    model, scale = Towers(), torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    cached_backward(
        lambda chunk: model(**chunk)[:2], split_batch(batch_of(), 3), lambda i, t: clip_loss(i, t, scale.exp())
    )
    other = Towers()
    clip_loss(*other(**batch_of())[:3]).backward()
    torch.testing.assert_close(scale.grad, other.logit_scale.grad, rtol=1e-12, atol=0)


# Memory


@contextmanager
def live_bytes() -> Iterator[list[int]]:
    """[now, peak] of the bytes that graphs keep for their backward passes."""
    count = [0, 0]

    def freed(size: int) -> None:
        count[0] -= size

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()
            size = tensor.numel() * tensor.element_size()
            count[0] += size
            count[1] = max(count)
            weakref.finalize(self, freed, size)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield count


def test_activations_of_one_chunk_are_alive() -> None:
    """The peak is that of one chunk's graph, and nothing of an encoder is alive while the loss is computed."""
    batch, peaks = batch_of(64), {}
    during_loss = []

    def loss(*inputs: Tensor) -> Tensor:
        during_loss.append(count[0])
        return siglip_loss(*inputs)

    for chunk_size in (2, 16, 64):
        with live_bytes() as count:
            cached_backward(caller(Towers(0.1)), split_batch(batch, chunk_size), loss, num_shared=2)
        assert count[0] == 0
        peaks[chunk_size] = count[1]
    with live_bytes() as count:
        outputs = Towers(0.1)(**split_batch(batch, 2)[0])
        one_chunk = count[1]
    del outputs
    with live_bytes() as count:
        in_one_graph(caller(Towers(0.1)), split_batch(batch, 2), siglip_loss, 2)
    features_of_loss = peaks[2] - one_chunk
    assert 0 <= features_of_loss <= 4 * 64 * WIDTH * 8
    assert peaks[16] < 0.4 * peaks[64]
    assert count[1] > 0.9 * peaks[64]
    assert during_loss[:2] == [0, 0]
    assert during_loss[2] > 0


# Failures


class Wrapper(nn.Module):
    """Notes of every call whether its backward pass would be followed by a reduction, as DDP's would."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.reduces = True
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, **chunk: Tensor) -> Sequence[Tensor]:
        self.calls.append((torch.is_grad_enabled(), self.reduces))
        return self.model(**chunk)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.reduces = False
        try:
            yield
        finally:
            self.reduces = True


def test_only_the_last_chunk_reduces() -> None:
    wrapped = Wrapper(Towers())
    cached_backward(caller(wrapped), split_batch(batch_of(), 4), clip, num_shared=2, modules=[wrapped, Towers()])
    assert wrapped.calls == [(False, True)] * 3 + [(True, False)] * 2 + [(True, True)]


@pytest.mark.parametrize("call", range(6))
def test_an_exception_leaves_things_in_order(call: int) -> None:
    model, chunks = Towers(0.4), split_batch(batch_of(), 4)
    wrapped = Wrapper(model)

    def encode(chunk: Batch) -> Sequence[Tensor]:
        outputs = wrapped(**chunk)
        if len(wrapped.calls) == call + 1:
            raise ArithmeticError("no")
        return outputs

    def step(function: Callable[[Batch], Sequence[Tensor]]) -> None:
        keywords: dict[str, Any] = {"num_shared": 2, "modules": [wrapped], "generators": [model.generator]}
        torch.manual_seed(7)
        model.generator.manual_seed(8)
        cached_backward(function, chunks, siglip_loss, **keywords)

    step(caller(wrapped))
    expected, after = gradients_of(model), (torch.get_rng_state(), model.generator.get_state())
    model.zero_grad()
    wrapped.calls.clear()
    with pytest.raises(ArithmeticError, match="no"):
        step(encode)
    assert torch.is_grad_enabled()
    assert wrapped.reduces
    if call < 4:  # the first gradients come with the fifth call
        assert not gradients_of(model)
    if call >= 3:
        assert torch.equal(torch.get_rng_state(), after[0])
        assert torch.equal(model.generator.get_state(), after[1])
    model.zero_grad()
    step(caller(wrapped))
    check_close(gradients_of(model), expected, bound=0)


@pytest.mark.parametrize(
    ("encode", "loss", "keywords", "message"),
    [
        (lambda x: [x], torch.sum, {"chunks": []}, "chunks must hold at least one chunk"),
        (
            lambda x: [x],
            torch.sum,
            {"num_shared": 1},
            "num_shared must be at least 0 and less than .* got 1 and 1 tensors",
        ),
        (lambda x: [x], torch.sum, {"num_shared": -1}, "num_shared must be at least 0 .* got -1"),
        (lambda x: [x.sum()], torch.sum, {}, "samples along dimension 0, got a scalar as tensor 0"),
        (lambda x: [x], torch.exp, {}, r"loss must return a scalar, got shape \(4, 2\)"),
        (lambda x: [x] * int(x[0, 0]), torch.add, {}, r"as many tensors each time, got \[1, 2\]"),
    ],
)
def test_what_it_cannot_use(encode: Any, loss: Any, keywords: dict[str, Any], message: str) -> None:
    chunks = [torch.ones(2, 2, requires_grad=True), torch.full((2, 2), 2.0, requires_grad=True)]
    with pytest.raises(ValueError, match=message):
        cached_backward(**{"encode": encode, "chunks": chunks, "loss": loss, **keywords})


def test_batches_that_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        split_batch(batch_of(), 0)
    for batch in ({}, {"a": torch.ones(())}, {"a": torch.ones(0, 2)}, {"a": torch.ones(2), "b": torch.ones(3)}):
        with pytest.raises(ValueError, match="batch must hold tensors of one length, at least 1"):
            split_batch(batch, 2)


# Recipes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated set, made once."""
    return data.generated(tmp_path_factory.mktemp("data") / "shapes", 80, image_size=32, num_frames=2)


def tiny(out: Path, shapes: Path, **changes: Any) -> Recipe:
    quiet: dict[str, Any] = {"tensorboard": False, "progress": False, "batch_size": 10, "steps": 4, "num_frames": 2}
    return replace(
        RECIPES["clip_tiny"](), out=str(out), data=str(shapes), **{**quiet, "keep_rate_warmup": 2, **changes}
    )


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_in_chunks_is_the_run_without(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a step that must not count; and a run that is gone on with is the uninterrupted one."""
    real_loader = data.loader

    def poisoned(*arguments: Any, **keywords: Any) -> Iterator[data.Batch]:
        for step, batch in enumerate(real_loader(*arguments, **keywords), start=keywords["start_step"] + 1):
            if step == 3:
                batch.pixels[-1, 0, 0, 0] = torch.nan
            yield batch

    seen: list[tuple[int, bool]] = []
    encode_text = models.Clip.encode_text

    def watched(self: models.Clip, token_ids: Tensor, lengths: Tensor) -> Tensor:
        seen.append((len(token_ids), torch.is_grad_enabled()))
        return encode_text(self, token_ids, lengths)

    monkeypatch.setattr(data, "loader", poisoned)
    monkeypatch.setattr(models.Clip, "encode_text", watched)
    whole = train.run(tiny(tmp_path / "whole", shapes))
    assert seen == [(10, True)] * 4
    seen.clear()
    recipe = tiny(tmp_path / "chunks", shapes, chunk_size=4, checkpoint_every=1, keep_checkpoints=4)
    chunks = train.run(recipe)
    assert seen == [(size, with_gradient) for with_gradient in (False, True) for size in (4, 4, 2)] * 4
    for one, other in zip(lines(chunks), lines(whole), strict=True):
        assert one.keys() == other.keys()
        for key in ("loss", "grad_norm", "top1", "text_to_image_rank", "logit_scale", "keep_rate", "lr"):
            assert one[key] == (pytest.approx(other[key], rel=1e-4) if other[key] is not None else None), key
    assert [line["skipped"] for line in lines(chunks)] == [False, False, True, False]
    weights, others = load_file(chunks / "model.safetensors"), load_file(whole / "model.safetensors")
    moved = sum(line["lr"] for line in lines(whole))  # AdamW moves a gradient of mere rounding as far as any other
    for name, tensor in others.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=moved if ".qkv.bias" in name else 1e-4, msg=name)
    resumed = train.run(replace(recipe, resume=str(chunks / "checkpoints" / "step-2"), overwrite=True))
    again = load_file(resumed / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("name", "chunk_size", "message"),
    [
        ("clip_tiny", -1, "chunk_size is -1 and must be at least 0"),
        ("tags_tiny", 8, "chunk_size is 8 and must be 0 for tags, whose loss compares no samples with each other"),
        ("mae_tiny", 8, "chunk_size is 8 and must be 0 for mae"),
    ],
)
def test_chunk_sizes_that_mean_nothing(name: str, chunk_size: int, message: str) -> None:
    with pytest.raises(train.TrainError) as caught:
        train.run(replace(RECIPES[name](), chunk_size=chunk_size))
    assert str(caught.value).startswith(message)
