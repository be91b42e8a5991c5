"""The contrastive losses over three gloo processes: exact against one process, equal to open_clip's modules, and
these equal to themselves once `xray.patch` has been at them.

The processes start once and compute everything (`compute`); the tests read what each rank found.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist

from xray.ops import ClipLoss, SigLipLoss, clip_loss, siglip_loss
from xray.patch import replace_forward
from xray_kernels.contrastive_loss.spec import sample_features

WORLD, ROWS, WIDTH = 3, 5, 6
SCALE, BIAS = 9.0, -2.0
UPSTREAM = [1.0, 0.5, 2.0]
"""The gradient that arrives at each rank's share of the loss."""
MEMBERS = [0, 2]
"""The ranks of a smaller group."""
CLIP_MODES = [(local, gather) for local in (False, True) for gather in (False, True)]
SIGLIP_MODES = ("bidir", "shift", "reduce", "gather")
EXCHANGES = ("all_gather", "ring")
Found = dict[str, Any]


def all_features(dtype: torch.dtype, world: int = WORLD) -> tuple[Tensor, Tensor]:
    like = (dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    inputs = sample_features(world * ROWS, WIDTH, like)
    return inputs["image_features"], inputs["text_features"]


def leaves(dtype: torch.dtype, part: slice) -> list[Tensor]:
    """Features of some pairs, scale (1,) and bias (), all to be differentiated."""
    image, text = (value[part].clone() for value in all_features(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    values = [image, text, torch.tensor([SCALE], dtype=wide), torch.tensor(BIAS, dtype=wide)]
    return [value.requires_grad_() for value in values]


def differentiate(loss: Tensor, values: list[Tensor], upstream: float) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, values, torch.full_like(loss, upstream), allow_unused=True)
    names = ("image", "text", "scale", "bias")
    return {"loss": loss.detach(), **{k: v for k, v in zip(names, grads, strict=False) if v is not None}}


def open_clip_losses() -> Any:
    """open_clip's `loss.py` alone, as its package imports torchvision; None where it is not installed."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        return None
    spec = importlib.util.spec_from_file_location(
        "open_clip_loss", Path(package.submodule_search_locations[0]) / "loss.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compute_functions(rank: int, group: Any, member: int, name: str, dtype: torch.dtype) -> Found:
    """Both losses in both exchanges; `member` is this process's place in the group."""
    part = slice(member * ROWS, (member + 1) * ROWS)
    found = {}
    for exchange in EXCHANGES:
        values = leaves(dtype, part)
        loss = clip_loss(*values[:3], group=group, exchange=exchange, max_workspace_bytes=2**14)
        found[f"{name} clip {exchange}"] = differentiate(loss, values, UPSTREAM[rank])
        values = leaves(dtype, part)
        loss = siglip_loss(*values, group=group, exchange=exchange, max_workspace_bytes=2**14)
        found[f"{name} siglip {exchange}"] = differentiate(loss, values, UPSTREAM[rank])
    return found


def compute_modules(rank: int, source: str, clip: type, siglip: type) -> Found:
    """ClipLoss in its four modes and SigLipLoss in its four exchanges: ours, open_clip's, or these patched."""
    part, found = slice(rank * ROWS, (rank + 1) * ROWS), {}
    for local, gather in CLIP_MODES:
        module = clip(local_loss=local, gather_with_grad=gather, rank=rank, world_size=WORLD)
        for with_bias in (False, True):
            values = leaves(torch.float64, part)
            loss = module(*values[: 4 if with_bias else 3])
            found[f"{source} clip {local} {gather} {with_bias}"] = differentiate(loss, values, 1.0)
    for implementation in SIGLIP_MODES:
        values = leaves(torch.float64, part)
        loss = siglip(rank=rank, world_size=WORLD, dist_impl=implementation)(*values)
        found[f"{source} siglip {implementation}"] = differentiate(loss, values, 1.0)
    return found


def message(function: Callable[[], Any]) -> str:
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def compute_refusals(rank: int, pair: Any) -> Found:
    rows = ROWS + (rank == 1)
    image, text = torch.zeros(rows, WIDTH), torch.zeros(rows, WIDTH)
    found: Found = {"unequal rows": message(lambda: clip_loss(image, text, 1.0))}
    found["unequal rows of siglip"] = message(lambda: siglip_loss(image, text, 1.0, 0.0, exchange="ring"))
    found["world size"] = message(lambda: ClipLoss(world_size=WORLD + 1)(image, text, 1.0))
    if rank not in MEMBERS:
        found["outsider"] = message(lambda: clip_loss(image, text, 1.0, group=pair))
    values = leaves(torch.float64, slice(rank * ROWS, (rank + 1) * ROWS))
    for exchange in EXCHANGES:
        grad = torch.autograd.grad(clip_loss(*values[:3], exchange=exchange), values[0], create_graph=True)[0]
        found[f"twice {exchange}"] = message(partial(torch.autograd.grad, grad.sum(), values[0]))
    return found


def compute(rank: int, folder: str) -> None:
    """All that the tests below look at, on one rank, written to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    pair = dist.new_group(MEMBERS)
    found = compute_functions(rank, None, rank, "all", torch.float64)
    found |= compute_functions(rank, None, rank, "half", torch.bfloat16)
    if rank in MEMBERS:
        found |= compute_functions(rank, pair, MEMBERS.index(rank), "pair", torch.float64)
    found |= compute_modules(rank, "ours", ClipLoss, SigLipLoss)
    theirs = open_clip_losses()
    if theirs is not None:
        found |= compute_modules(rank, "theirs", theirs.ClipLoss, theirs.SigLipLoss)
        replace_forward(theirs.ClipLoss, ClipLoss)
        replace_forward(theirs.SigLipLoss, SigLipLoss)
        found |= compute_modules(rank, "patched", theirs.ClipLoss, theirs.SigLipLoss)
    values = leaves(torch.float64, slice(rank * ROWS, (rank + 1) * ROWS))
    found["alone"] = ClipLoss(world_size=1)(*values[:3]).detach()
    found |= compute_refusals(rank, pair)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each rank found."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch.distributed with gloo is not available")
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(compute, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def shares(loss: str, values: list[Tensor], world: int) -> Tensor:
    """Each rank's share of the loss, (world,), from the whole matrix: its rows, and for CLIP its columns."""
    image, text, scale, bias = values
    logits = image @ text.T * scale
    if loss == "clip":
        per_pair = (logits.logsumexp(1) + logits.logsumexp(0)) / 2 - logits.diagonal()
        return per_pair.view(world, ROWS).mean(1)
    sign = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return torch.nn.functional.softplus(-sign * (logits + bias)).view(world, -1).sum(1) / ROWS


def expected(loss: str, dtype: torch.dtype, members: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Shares, and the gradients of their sum weighted by what arrives at each, in float64 on one process."""
    values = [value.detach().double().requires_grad_() for value in leaves(dtype, slice(len(members) * ROWS))]
    found = shares(loss, values, len(members))
    upstream = torch.tensor([UPSTREAM[rank] for rank in members], dtype=torch.float64)
    return found.detach(), differentiate((found * upstream).sum(), values, 1.0)


def naming(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


def check(found: list[dict[str, Tensor]], loss: str, dtype: torch.dtype, members: list[int], bound: float) -> None:
    """Shares and gradients of all ranks together against one process, to `bound` of the largest value."""
    truth, grads = expected(loss, dtype, members)
    together = {
        "loss": (torch.stack([one["loss"] for one in found]), truth),
        "image": (torch.cat([one["image"] for one in found]), grads["image"]),
        "text": (torch.cat([one["text"] for one in found]), grads["text"]),
        "scale": (torch.stack([one["scale"] for one in found]).sum(0), grads["scale"]),
    }
    if loss == "siglip":
        together["bias"] = (torch.stack([one["bias"] for one in found]).sum(0), grads["bias"])
    for name, (actual, value) in together.items():
        torch.testing.assert_close(
            actual.double(),
            value,
            rtol=0,
            atol=bound * float(value.abs().max()),
            msg=naming(name),
        )


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_ranks_equal_one_process(ranks: list[Found], loss: str, exchange: str) -> None:
    """Shares and every gradient, also where the gradient that arrives differs from rank to rank."""
    check([found[f"all {loss} {exchange}"] for found in ranks], loss, torch.float64, [0, 1, 2], 1e-12)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_half_precision_over_ranks(ranks: list[Found], loss: str, exchange: str) -> None:
    """bfloat16 features: gradients are rounded to bfloat16 once a rank, the loss not at all."""
    found = [found[f"half {loss} {exchange}"] for found in ranks]
    assert all((one["loss"].dtype, one["text"].dtype) == (torch.float32, torch.bfloat16) for one in found)
    check(found, loss, torch.bfloat16, [0, 1, 2], 2**-7)
    truth, _ = expected(loss, torch.bfloat16, [0, 1, 2])
    torch.testing.assert_close(torch.stack([one["loss"] for one in found]).double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_a_group_of_some_ranks(ranks: list[Found], loss: str, exchange: str) -> None:
    check([ranks[rank][f"pair {loss} {exchange}"] for rank in MEMBERS], loss, torch.float64, MEMBERS, 1e-12)


def theirs(ranks: list[Found], name: str) -> list[dict[str, Tensor]]:
    if f"theirs {name}" not in ranks[0]:
        pytest.skip("open_clip is not installed")
    return [found[f"theirs {name}"] for found in ranks]


def check_equal(ours: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> None:
    """Loss and towers on every rank; the gradients of scale and bias after DDP's mean."""
    for one, other in zip(ours, others, strict=True):
        assert one.keys() == other.keys()
        for name in ("loss", "image", "text"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12, msg=naming(name))
    for name in ours[0].keys() & {"scale", "bias"}:
        mean, other_mean = (torch.stack([one[name] for one in each]).mean(0) for each in (ours, others))
        torch.testing.assert_close(mean, other_mean, rtol=1e-9, atol=1e-12, msg=naming(name))


SOURCES = pytest.mark.parametrize("source", ["ours", "patched"])


@SOURCES
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("local", "gather"), CLIP_MODES)
def test_clip_module_equals_open_clip(
    ranks: list[Found], local: bool, gather: bool, with_bias: bool, source: str
) -> None:
    name = f"clip {local} {gather} {with_bias}"
    others = theirs(ranks, name)
    check_equal([found[f"{source} {name}"] for found in ranks], others)


def test_modes_of_the_clip_module_differ_as_documented(ranks: list[Found]) -> None:
    """Exact, exact, 1 / W of it, and something else; so the comparison above tells the modes apart."""

    def image_grad(local: bool, gather: bool) -> Tensor:
        return torch.cat([found[f"ours clip {local} {gather} False"]["image"] for found in ranks])

    exact = image_grad(True, True)
    torch.testing.assert_close(image_grad(False, True), exact)
    torch.testing.assert_close(image_grad(False, False) * WORLD, exact)
    assert (image_grad(True, False) - exact).abs().max() > 0.1 * exact.abs().max()


@SOURCES
@pytest.mark.parametrize("implementation", SIGLIP_MODES)
def test_siglip_module_equals_open_clip(ranks: list[Found], implementation: str, source: str) -> None:
    name = f"siglip {implementation}"
    others = theirs(ranks, name)
    check_equal([found[f"{source} {name}"] for found in ranks], others)


def test_world_size_one_stays_on_its_process(ranks: list[Found]) -> None:
    """Even where torch.distributed is initialised, as open_clip does."""
    for rank, found in enumerate(ranks):
        values = [value.detach() for value in leaves(torch.float64, slice(rank * ROWS, (rank + 1) * ROWS))]
        torch.testing.assert_close(found["alone"], shares("clip", values, 1)[0])


def test_refusals_over_ranks(ranks: list[Found]) -> None:
    for rank, found in enumerate(ranks):
        sentence = (
            "ValueError: image_features must have the same number of rows on every rank, "
            f"got {ROWS + (rank == 1)} on rank {rank} and between {ROWS} and {ROWS + 1} over the group"
        )
        assert found["unequal rows"] == found["unequal rows of siglip"] == sentence
        assert found["world size"].startswith("ValueError: world_size must be that of the default group, 3, got 4")
        for exchange in EXCHANGES:
            assert "RuntimeError" in found[f"twice {exchange}"]
    assert ranks[1]["outsider"].startswith("ValueError: group does not contain this process")
