"""The contrastive losses over four gloo processes: exact against one process, lean, equal to open_clip's modules, and
these equal to themselves once `xray.patch` has been at them.

The processes start once and compute everything (`contrastive_ranks`); the tests read what each rank found.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable

import pytest
import torch
from contrastive_ranks import (
    CLIP_MODES,
    EXCHANGES,
    GROUPS,
    LOSSES,
    ROWS,
    SETTINGS,
    SIGLIP_MODES,
    UPSTREAM,
    WORLD,
    Found,
    all_features,
    all_labels,
    compute,
    differentiate,
    leaves,
    towers,
    towers_loss,
)
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from xray_kernels.contrastive_loss.exchange import Block, Homeward, Ring
from xray_kernels.testing import assert_within_rule

PATIENCE = 240
"""Seconds for all that the processes do, which is about 25 on two busy cores; what still runs then has hung."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each rank found."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch.distributed with gloo is not available")
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["contrastive_ranks", "torch._dynamo"])
    processes = [context.Process(target=compute, args=(rank, str(folder)), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE
    states: list[int | None] = [None] * WORLD
    while None in states and not any(states) and time.monotonic() < deadline:
        time.sleep(0.05)
        states = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert states == [0] * WORLD, "exit codes of the processes; None is one that did not end"
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def shares(
    loss: str, values: list[Tensor], world: int, labels: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each rank's share of the loss, (world,), from the whole matrix: its rows, and for CLIP its columns; and ranks."""
    image, text, scale, bias = values
    logits = image @ text.T * scale
    places = torch.arange(len(image)) if labels is None else labels
    positives = places[:, None] == places
    own = logits.diagonal()
    found = {
        "image_ranks": ((logits >= own[:, None]) & ~positives).sum(1, dtype=torch.int32),
        "text_ranks": ((logits >= own) & ~positives).sum(0, dtype=torch.int32),
    }
    if loss == "clip":
        mean_positive = (logits * positives).sum(1) / positives.sum(1)
        per_pair = (logits.logsumexp(1) + logits.logsumexp(0)) / 2 - mean_positive
        return per_pair.view(world, ROWS).mean(1), found
    sign = 2 * positives.to(logits.dtype) - 1
    return F.softplus(-sign * (logits + bias)).view(world, -1).sum(1) / ROWS, found


def expected(
    loss: str, dtype: torch.dtype, members: list[int], *, labelled: bool = False, compute_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Shares, the gradients of their sum weighted by what arrives at each, and ranks, on one process."""
    world = len(members)
    values = [value.detach().to(compute_dtype).requires_grad_() for value in leaves(dtype, world)]
    values[2:] = [value.detach().requires_grad_() for value in values[2:]]
    found, places = shares(loss, values, world, all_labels(world) if labelled else None)
    upstream = torch.tensor([UPSTREAM[rank] for rank in members], dtype=compute_dtype)
    grads = differentiate((found * upstream).sum(), values, 1.0)
    return grads | {"loss": found.detach()} | places


def together(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Results of all ranks as one process has them: rows joined, gradients of scale and bias summed."""
    ways: dict[str, Callable[[list[Tensor]], Tensor]] = {"loss": torch.stack}
    ways |= dict.fromkeys(("scale", "bias"), lambda each: torch.stack(each).sum(0))
    return {name: ways.get(name, torch.cat)([one[name] for one in found]) for name in found[0]}


def naming(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_equal_one_process(ranks: list[Found], name: str, loss: str, exchange: str) -> None:
    """Shares, ranks of pairs and every gradient, also where the gradient that arrives differs from rank to rank."""
    setting = SETTINGS[name]
    members = GROUPS[setting.group]
    found = together([ranks[rank][f"{name} {loss} {exchange}"] for rank in members])
    truth = expected(loss, setting.dtype, members, labelled=setting.labels, compute_dtype=torch.float64)
    truth = {key: truth[key] for key in found}
    assert len(found) == (4 if loss == "clip" else 5) + (0 if setting.group == "two" else 2)
    if setting.dtype == torch.float64:
        for key, value in truth.items():
            bound = 1e-12 * float(value.abs().max())
            torch.testing.assert_close(found[key], value, rtol=0, atol=bound, msg=naming(key))
        return
    assert found["loss"].dtype == torch.float32
    assert found["text"].dtype == found["image"].dtype == setting.dtype
    composed = expected(loss, setting.dtype, members, compute_dtype=setting.dtype)
    assert_within_rule(found, composed, truth, what=f"{name} {loss} {exchange}")
    ulp = torch.finfo(setting.dtype).eps
    for key in ("image", "text"):  # rounded once by each rank, and once more as a sum
        bound = 2 * ulp * float(truth[key].abs().max())
        torch.testing.assert_close(found[key].double(), truth[key], rtol=0, atol=bound, msg=naming(key))
    torch.testing.assert_close(found["loss"].double(), truth["loss"], rtol=1e-5, atol=0)


def test_gradients_of_many_ranks_are_summed_in_float32() -> None:
    """A gradient of 1 and 64 of 1/512 make 1.125; in bfloat16 each of these would be lost beside the 1."""

    class Arrived(Ring):
        """All gradients are this rank's already."""

        def __init__(self) -> None:
            self.rank = 0

    homeward = Homeward(Arrived(), torch.zeros(2, 3, dtype=torch.bfloat16))
    for value in (1.0, *[1 / 512] * 64):
        grad = torch.full((1, 3), value, dtype=torch.bfloat16)
        homeward.send(Block(grad, slice(0, 1), slice(1, 2)), grad)
    total = torch.tensor([[0.0], [1.125]], dtype=torch.bfloat16).expand(2, 3)
    assert torch.equal(homeward.finish(), total)


def test_labels_occur_on_several_ranks() -> None:
    """So the comparison above would see labels of another rank's rows."""
    owners = torch.arange(WORLD).repeat_interleave(ROWS)
    labels = all_labels(WORLD)
    assert all(len(owners[labels == label].unique()) > 1 for label in labels.unique()[:3])
    assert any(len(part.unique()) < ROWS for part in labels.view(WORLD, ROWS))


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


@pytest.mark.parametrize("name", ["clip", "siglip bidir", "siglip gather"])
def test_modules_take_labels_over_ranks(ranks: list[Found], name: str) -> None:
    found = together([found[f"labelled {name}"] for found in ranks])
    truth = expected(name.split()[0], torch.float64, GROUPS["four"], labelled=True, compute_dtype=torch.float64)
    for key, value in found.items():
        torch.testing.assert_close(value, truth[key], rtol=1e-9, atol=1e-12, msg=naming(key))


def test_world_size_one_stays_on_its_process(ranks: list[Found]) -> None:
    """Even where torch.distributed is initialised, as open_clip does."""
    for rank, found in enumerate(ranks):
        values = [value.detach() for value in leaves(torch.float64, WORLD, rank)]
        torch.testing.assert_close(found["alone"], shares("clip", values, 1)[0][0])


DIFFERENCES = {
    "rows": ("the number of rows of image_features", ROWS, ROWS + 1),
    "rows in a ring": ("the number of rows of image_features", ROWS, ROWS + 1),
    "columns": ("the number of columns of image_features", 6, 7),
    "dtype": ("the dtype of image_features", torch.float32, torch.bfloat16),
    "exchange": ("exchange", "all_gather", "ring"),
    "labels": ("whether labels are given", "yes", "no"),
    "loss": ("the loss", "clip_loss", "siglip_loss"),
    "ranks of pairs": ("whether ranks of pairs are asked for", "no", "yes"),
    "gradients": ("what requires a gradient", "nothing", "text_features"),
}
"""What rank 1 brings otherwise than the others: its name, theirs, its own."""


@pytest.mark.parametrize("name", DIFFERENCES)
def test_every_rank_is_told_what_differs(ranks: list[Found], name: str) -> None:
    what, usual, odd = DIFFERENCES[name]
    for rank, found in enumerate(ranks):
        mine, other = (odd, usual) if rank == 1 else (usual, odd)
        sentence = f"{what} must be the same on every rank, got {mine} on rank {rank} and {other} on another"
        assert found[name] == f"ValueError: {sentence}"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("labels that are no integers", "TypeError: labels must be integers"),
        ("features that are no tensor", "TypeError: image_features must be a tensor"),
        ("bias of a module", "ValueError: logit_bias must have shape () or (1,), got (2,)"),
    ],
)
def test_a_rank_that_refuses_its_input_stops_the_others(ranks: list[Found], name: str, error: str) -> None:
    for rank, found in enumerate(ranks):
        if rank == 1:
            assert found[name].startswith(error)
        else:
            assert found[name].startswith("RuntimeError: rank 1 of the group failed before the exchange")


def test_refusals_of_one_rank_alone(ranks: list[Found]) -> None:
    for found in ranks:
        assert found["device"].startswith("RuntimeError: image_features is on meta but the process group's backend is")
        assert found["world size"].startswith("ValueError: world_size must be that of the default group, 4, got 5")
        for exchange in EXCHANGES:
            assert "RuntimeError" in found[f"twice {exchange}"]
    assert all(ranks[rank]["outsider"].startswith("ValueError: group does not contain this process") for rank in (0, 2))


def test_agreement_that_is_not_read_back(ranks: list[Found]) -> None:
    """As on accelerators: only a rank whose terms are new reads, so of ranks that differ at least one raises."""
    for rank, found in enumerate(ranks):
        raising = {"one differs": 1, "one returns": 1}
        for name in ("first", "same", "one differs", "all change", "one returns"):
            told = found[f"agreement {name}"]
            assert told.startswith("ValueError: the number of rows") == (raising.get(name) == rank), (name, rank, told)


@pytest.mark.parametrize(("exchange", "victim", "others"), [("all_gather", 3, (0, 2)), ("ring", 1, (0, 2))])
def test_a_rank_that_dies_ends_the_others(ranks: list[Found], exchange: str, victim: int, others: tuple[int]) -> None:
    assert ranks[victim][f"death {exchange}"] == "RuntimeError: out of memory"
    for rank in others:
        assert ranks[rank][f"death {exchange}"].startswith("RuntimeError: ")
        assert ranks[rank][f"seconds {exchange}"] < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_sent(ranks: list[Found], dtype: torch.dtype) -> None:
    """Texts once and their gradients once, where open_clip sends texts and images, and gradients of both."""
    once = (WORLD - 1) * 12 * 256 * dtype.itemsize
    for found in ranks:
        for loss in LOSSES:
            gathered, ring = (found[f"bytes {dtype} {loss} {exchange}"] for exchange in EXCHANGES)
            assert gathered["alltoall_base_"] == once
            assert once <= gathered["_allgather_base_"] < 1.02 * once
            assert sum(gathered.values()) <= 0.55 * 4 * once
            assert ring["send"] == 3 * once
            assert sum(ring.values()) - ring["send"] < 0.04 * 4 * once
        if f"bytes {dtype} open_clip" in found:
            assert sum(found[f"bytes {dtype} open_clip"].values()) == 4 * once


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_of_a_ring_does_not_grow_with_the_ranks(ranks: list[Found], loss: str) -> None:
    """From three ranks on, when a block is computed while one comes; gathered texts and gradients do grow."""
    block = 64 * 512 * 4
    for rank in GROUPS["three"]:
        grown = {
            exchange: ranks[rank][f"peak {loss} {exchange} four"] - ranks[rank][f"peak {loss} {exchange} three"]
            for exchange in EXCHANGES
        }
        assert abs(grown["ring"]) < block / 4, grown
        assert grown["all_gather"] > block, grown


def test_a_compiled_caller_gets_the_same(ranks: list[Found]) -> None:
    for rank in GROUPS["two"]:
        for name, value in ranks[rank]["eager"].items():
            torch.testing.assert_close(ranks[rank]["compiled"][name], value, msg=naming(name))


def test_sharded_parameters_get_the_gradient_of_the_global_loss(ranks: list[Found]) -> None:
    """FSDP2 over two ranks, the second of which holds nothing of the scale and the bias."""
    model = towers()
    towers_loss(model, *all_features(torch.float64, 2)).backward()
    for rank, elements in zip(GROUPS["two"], (1, 0), strict=True):
        assert ranks[rank]["fsdp shards"] == [elements, elements]
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(ranks[rank]["fsdp"][name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("mesh", ["two", "two by two"])
def test_scale_and_bias_may_be_sharded(ranks: list[Found], mesh: str, exchange: str) -> None:
    """One element over two ranks, or over each row of a mesh: the owner's gradient is the mean over all ranks."""
    members = GROUPS["two" if mesh == "two" else "four"]
    values = leaves(torch.float64, len(members))
    truth = differentiate(shares("siglip", values, len(members))[0].mean(), values, 1.0)
    for place, rank in enumerate(members):
        for name, shard in zip(("scale", "bias"), ranks[rank][f"sharded {mesh} {exchange}"], strict=True):
            owned = truth[name].reshape(1) if place % 2 == 0 else truth[name].new_empty(0)
            torch.testing.assert_close(shard, owned, rtol=1e-9, atol=1e-12, msg=naming(name))
