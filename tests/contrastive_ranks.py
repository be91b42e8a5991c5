"""What each of four gloo processes computes for test_contrastive_loss_ranks; the processes start once.

They are forked from one that has imported PyTorch, which takes each of them seconds otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from memory import peak_bytes
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.peers import open_clip_losses
from xray.ops import ClipLoss, SigLipLoss, clip_loss, clip_loss_with_ranks, siglip_loss, siglip_loss_with_ranks
from xray.patch import replace_forward
from xray_kernels.contrastive_loss import across_ranks, distributed, exchange, tiling
from xray_kernels.contrastive_loss.spec import sample_features

WORLD, ROWS, WIDTH = 4, 5, 6
SCALE, BIAS, WORKSPACE = 9.0, -2.0, 2**14
UPSTREAM = [1.0, 0.5, 2.0, 0.25]
"""The gradient that arrives at each rank's share of the loss."""
GROUPS = {"four": [0, 1, 2, 3], "three": [0, 2, 3], "two": [1, 3]}
CLIP_MODES = [(local, gather) for local in (False, True) for gather in (False, True)]
SIGLIP_MODES = ("bidir", "shift", "reduce", "gather")
EXCHANGES = ("all_gather", "ring")
LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "clip": (clip_loss, clip_loss_with_ranks),
    "siglip": (siglip_loss, siglip_loss_with_ranks),
}
Found = dict[str, Any]


class Setting(NamedTuple):
    """One way to call both losses: over which ranks, of what dtype, with how many texts of a rank in a part.

    `kept_rows` of the logits have room in the workspace besides the tiles.
    """

    group: str = "four"
    dtype: torch.dtype = torch.float64
    chunk_rows: int = 512
    kept_rows: int = ROWS
    labels: bool = False


SETTINGS = {
    "four ranks": Setting(),
    "parts, some logits kept": Setting(chunk_rows=2, kept_rows=3),
    "labels": Setting(labels=True, chunk_rows=1),
    "three ranks": Setting("three", chunk_rows=2, kept_rows=0),
    "two ranks": Setting("two"),
    "float32": Setting(dtype=torch.float32),
    "bfloat16": Setting(dtype=torch.bfloat16, chunk_rows=2),
}


def all_features(dtype: torch.dtype, world: int) -> tuple[Tensor, Tensor]:
    like = (dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    inputs = sample_features(world * ROWS, WIDTH, like)
    return inputs["image_features"], inputs["text_features"]


def all_labels(world: int) -> Tensor:
    """Seven captions, so that most occur on several ranks, and some twice on one."""
    return torch.arange(world * ROWS).pow(2).remainder(7) * 2**40


def leaves(dtype: torch.dtype, world: int, member: int | None = None) -> list[Tensor]:
    """Features of one rank's pairs, or of all; scale (1,) and bias (); all to be differentiated."""
    part = slice(None) if member is None else slice(member * ROWS, (member + 1) * ROWS)
    image, text = (value[part].clone() for value in all_features(dtype, world))
    wide = torch.promote_types(dtype, torch.float32)
    values = [image, text, torch.tensor([SCALE], dtype=wide), torch.tensor(BIAS, dtype=wide)]
    return [value.requires_grad_() for value in values]


def differentiate(loss: Tensor, values: list[Tensor], upstream: float) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, values, torch.full_like(loss, upstream), allow_unused=True)
    names = ("image", "text", "scale", "bias")
    return {"loss": loss.detach(), **{k: v for k, v in zip(names, grads, strict=False) if v is not None}}


def compute_functions(rank: int, groups: dict[str, Any]) -> Found:
    """Both losses in both exchanges in every setting; of two ranks without ranks of pairs."""
    usual = exchange.CHUNK_ROWS, tiling.KEPT_UNIT, tiling.LEAST_TILES_BYTES
    found: Found = {}
    for name, setting in SETTINGS.items():
        members = GROUPS[setting.group]
        if rank not in members:
            continue
        world, member = len(members), members.index(rank)
        exchange.CHUNK_ROWS, tiling.KEPT_UNIT = setting.chunk_rows, 1
        kept_bytes = setting.kept_rows * world * ROWS * tiling.wide_dtype(setting.dtype).itemsize
        tiling.LEAST_TILES_BYTES = WORKSPACE - kept_bytes
        labels = all_labels(world)[member * ROWS :][:ROWS] if setting.labels else None
        for loss, (plain, with_ranks) in LOSSES.items():
            for way in EXCHANGES:
                values = leaves(setting.dtype, world, member)[: 3 if loss == "clip" else 4]
                options = {"labels": labels, "exchange": way, "max_workspace_bytes": WORKSPACE}
                options["group"] = groups[setting.group]
                if setting.group == "two":
                    result, ranks = plain(*values, **options), {}
                else:
                    result, *both = with_ranks(*values, **options)
                    ranks = dict(zip(("image_ranks", "text_ranks"), both, strict=True))
                found[f"{name} {loss} {way}"] = differentiate(result, values, UPSTREAM[rank]) | ranks
    exchange.CHUNK_ROWS, tiling.KEPT_UNIT, tiling.LEAST_TILES_BYTES = usual
    return found


def compute_modules(rank: int, source: str, clip: type, siglip: type) -> Found:
    """ClipLoss in its four modes and SigLipLoss in its four exchanges: ours, open_clip's, or these patched."""
    found = {}
    for local, gather in CLIP_MODES:
        module = clip(local_loss=local, gather_with_grad=gather, rank=rank, world_size=WORLD)
        for with_bias in (False, True):
            values = leaves(torch.float64, WORLD, rank)
            loss = module(*values[: 4 if with_bias else 3])
            found[f"{source} clip {local} {gather} {with_bias}"] = differentiate(loss, values, 1.0)
    for implementation in SIGLIP_MODES:
        values = leaves(torch.float64, WORLD, rank)
        loss = siglip(rank=rank, world_size=WORLD, dist_impl=implementation)(*values)
        found[f"{source} siglip {implementation}"] = differentiate(loss, values, 1.0)
    return found


def compute_labelled_modules(rank: int) -> Found:
    labels = all_labels(WORLD)[rank * ROWS :][:ROWS]
    modules: dict[str, nn.Module] = {"clip": ClipLoss(local_loss=True, gather_with_grad=True, world_size=WORLD)}
    modules |= {f"siglip {way}": SigLipLoss(world_size=WORLD, dist_impl=way) for way in ("bidir", "gather")}
    found = {}
    for name, module in modules.items():
        values = leaves(torch.float64, WORLD, rank)[: 3 if name == "clip" else 4]
        loss = module(*values, labels=labels)
        found[f"labelled {name}"] = differentiate(loss, values, UPSTREAM[rank])
    return found


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends to others inside the block, by the collective's name.

    An all-reduce is counted as a ring does it: two passes over all but one of W parts.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.sent = size, dict[str, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._schema.name not in ("c10d::recv_", "c10d::barrier"):
            name = func._schema.name.removeprefix("c10d::")
            inputs = tree_leaves(args[0 if name in ("send", "allreduce_") else 1])
            whole = sum(value.numel() * value.element_size() for value in inputs)
            others = self.size - 1
            times = {"send": 1, "allgather_": others, "_allgather_base_": others, "allreduce_": 2 * others / self.size}
            self.sent[name] = self.sent.get(name, 0) + int(whole * times.get(name, others / self.size))
        return func(*args, **(kwargs or {}))


def compute_traffic(rank: int) -> Found:
    """Bytes sent by one forward and backward pass of features 256 wide."""
    theirs = open_clip_losses()
    found: Found = {}
    for dtype in (torch.float32, torch.bfloat16):
        losses: dict[str, Callable[..., Tensor]] = {
            f"{loss} {way}": partial(LOSSES[loss][0], exchange=way) for loss in LOSSES for way in EXCHANGES
        }
        if theirs is not None:
            losses["open_clip"] = theirs.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=WORLD)
        for name, loss in losses.items():
            features = [F.normalize(torch.randn(12, 256), dim=1).to(dtype).requires_grad_() for _ in range(2)]
            scalars = [torch.tensor(1.0, dtype=dtype)] * (2 if "siglip" in name else 1)
            with Traffic(WORLD) as traffic:
                loss(*features, *scalars).backward()
            found[f"bytes {dtype} {name}"] = traffic.sent
    return found


def compute_memory(rank: int, groups: dict[str, Any]) -> Found:
    """The most bytes that forward and backward hold beyond the inputs, of features (64, 512), by group size."""
    found: Found = {}
    for way in EXCHANGES:
        for name, loss in LOSSES.items():
            for group in ("three", "four"):
                if rank not in GROUPS[group]:
                    continue
                features = [torch.randn(64, 512).requires_grad_() for _ in range(2)]
                scalars = [1.0, 1.0][: 1 if name == "clip" else 2]

                def run(loss: Any = loss[0], features: Any = features, scalars: Any = scalars, **rest: Any) -> None:
                    loss(*features, *scalars, max_workspace_bytes=2**18, **rest).backward()

                measured = partial(peak_bytes, partial(run, group=groups[group], exchange=way))
                # gloo's threads may hold what has been sent for a moment longer, which the least of a few runs lacks
                found[f"peak {name} {way} {group}"] = min(measured() for _ in range(4))
    return found


def compute_compiled(rank: int, group: Any) -> Found:
    """A compiled caller of both losses, with work before, between and after them."""

    def step(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        image, text = F.normalize(image * 2, dim=1), F.normalize(text, dim=1)
        first = clip_loss(image, text, scale, group=group) + 1
        return first * 2 + siglip_loss(image, text, scale, bias, group=group, exchange="ring")

    found: Found = {}
    for name, function in (("compiled", torch.compile(step, backend="eager")), ("eager", step)):
        values = leaves(torch.float64, 2, GROUPS["two"].index(rank))
        found[name] = differentiate(function(*values), values, 1.0)
    return found


class Towers(nn.Module):
    """Two towers, and a scale and a bias as FSDP2 wants them, of shape (1,)."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)
        self.log_scale, self.bias = nn.Parameter(torch.tensor([1.5])), nn.Parameter(torch.tensor([BIAS]))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1)


def towers(seed: int = 0) -> Towers:
    torch.manual_seed(seed)
    return Towers().double()


def towers_loss(model: Towers, image: Tensor, text: Tensor, **options: Any) -> Tensor:
    """Both losses, with the scale and the bias outside of forward."""
    image, text = model(image, text)
    scale = model.log_scale.exp()
    return clip_loss(image, text, scale, **options) + siglip_loss(image, text, scale, model.bias, **options)


def compute_sharded(rank: int, groups: dict[str, Any]) -> Found:
    """Gradients of parameters that FSDP2 shards, and of a scale and a bias sharded over other meshes."""
    found: Found = {}
    meshes = {"two by two": init_device_mesh("cpu", (2, 2))}
    if rank in GROUPS["two"]:
        mesh = meshes["two"] = DeviceMesh.from_group(groups["two"], "cpu")
        model = towers()
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        image, text = (value[GROUPS["two"].index(rank) * ROWS :][:ROWS] for value in all_features(torch.float64, 2))
        towers_loss(model, image, text, group=groups["two"]).backward()
        parameters: dict[str, Any] = dict(model.named_parameters())
        assert isinstance(parameters["log_scale"], DTensor)
        found["fsdp"] = {name: value.grad.full_tensor() for name, value in parameters.items()}
        found["fsdp shards"] = [len(value.to_local()) for value in (parameters["bias"], parameters["bias"].grad)]
    for name, mesh in meshes.items():
        members = GROUPS["two" if name == "two" else "four"]
        placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        for way in EXCHANGES:
            image, text, *scalars = leaves(torch.float64, len(members), members.index(rank))
            sharded: list[Any] = [
                nn.Parameter(distribute_tensor(value.detach().reshape(1), mesh, placements)) for value in scalars
            ]
            group = groups["two" if name == "two" else "four"]
            siglip_loss(image, text, *sharded, group=group, exchange=way).backward()
            found[f"sharded {name} {way}"] = [value.grad.to_local() for value in sharded]
    return found


def message(function: Callable[[], Any]) -> str:
    try:
        function()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def compute_refusals(rank: int, groups: dict[str, Any]) -> Found:
    """What each rank is told where one of them, the odd one, differs or gives something that will not do."""
    image, text = all_features(torch.float32, 1)
    odd = rank == 1
    wide, long = (F.pad(value, padding) for value, padding in ((image, (0, 1)), (image, (0, 0, 0, 1))))
    trained = image.clone().requires_grad_()
    labels = torch.arange(ROWS)

    def alike(usual: Tensor, other: Tensor) -> Tensor:
        value = other if odd else usual
        return clip_loss(value, value, 1.0)

    calls: dict[str, Callable[[], Any]] = {
        "rows": lambda: alike(image, long),
        "rows in a ring": lambda: siglip_loss(*((long, long) if odd else (image, text)), 1.0, 0.0, exchange="ring"),
        "columns": lambda: alike(image, wide),
        "dtype": lambda: alike(image, image.bfloat16()),
        "exchange": lambda: clip_loss(image, text, 1.0, exchange=EXCHANGES[odd]),
        "labels": lambda: clip_loss(image, text, 1.0, labels=None if odd else labels),
        "loss": lambda: siglip_loss(image, text, 1.0, 1.0) if odd else clip_loss(image, text, 1.0),
        "ranks of pairs": lambda: (clip_loss_with_ranks if odd else clip_loss)(image, text, 1.0),
        "gradients": lambda: clip_loss(image, trained if odd else text, 1.0),
        "labels that are no integers": lambda: clip_loss(image, text, 1.0, labels=labels.float() if odd else labels),
        "features that are no tensor": lambda: siglip_loss([1.0] if odd else image, text, 1.0, 0.0),  # type: ignore[arg-type]
        "bias of a module": lambda: ClipLoss(world_size=WORLD)(image, text, 1.0, torch.ones(2 if odd else 1)),
        "device": lambda: clip_loss(image.to("meta"), text.to("meta"), 1.0),
        "world size": lambda: ClipLoss(world_size=WORLD + 1)(image, text, 1.0),
    }
    if rank not in GROUPS["two"]:
        calls["outsider"] = lambda: clip_loss(image, text, 1.0, group=groups["two"])
    found: Found = {name: message(call) for name, call in calls.items()}
    values = leaves(torch.float64, WORLD, rank)
    for way in EXCHANGES:
        grad = torch.autograd.grad(clip_loss(*values[:3], exchange=way), values[0], create_graph=True)[0]
        found[f"twice {way}"] = message(partial(torch.autograd.grad, grad.sum(), values[0]))
    return found


def compute_agreements(rank: int, group: Any) -> Found:
    """Agreements that are not read where nothing changed, as on an accelerator whose group has no CPU backend."""
    terms = distributed.Terms(*range(len(distributed.Terms._fields)))
    other = terms._replace(rows=100)
    distributed._is_read = lambda device: False
    found: Found = {}
    for name, mine in (
        ("first", terms),
        ("same", terms),
        ("one differs", other if rank == 1 else terms),
        ("all change", other),
        ("one returns", terms if rank == 1 else other),
    ):
        found[f"agreement {name}"] = message(partial(distributed.agree, mine, group))
    return found


def compute_deaths(rank: int, groups: dict[str, Any]) -> Found:
    """Rank 3 fails within an all-gather of ranks 0, 2, 3 and ends; then rank 1 within a ring of ranks 0, 1, 2.

    The last one to end writes nothing more than the others: each returns when it has met an error.
    """
    found: Found = {}
    calls = {"statistics": 0}
    op = across_ranks.local.contrastive_statistics

    def failing(*args: Any) -> Any:
        calls["statistics"] += 1
        if calls["statistics"] == 2:
            raise RuntimeError("out of memory")
        return op(*args)

    exchange.CHUNK_ROWS = 2
    image, text = all_features(torch.float32, 1)
    for victim, group, way in ((3, "three", "all_gather"), (1, "ring", "ring")):
        if group not in groups:
            continue
        if rank == victim:
            across_ranks.local.contrastive_statistics = failing
        start = time.monotonic()
        found[f"death {way}"] = message(partial(clip_loss, image, text, 1.0, group=groups[group], exchange=way))
        found[f"seconds {way}"] = time.monotonic() - start
        if rank == victim:
            break
    return found


def compute(rank: int, folder: str) -> None:
    """All that the tests look at, on one rank, written to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    members = GROUPS | {"ring": [0, 1, 2]}
    groups = {name: dist.new_group(ranks) for name, ranks in members.items()}
    groups = {name: group for name, group in groups.items() if rank in members[name] or name == "two"}
    clocks: dict[str, float] = {}
    found: Found = {"clocks": clocks}

    def add(name: str, part: Callable[[], Found]) -> None:
        start = time.monotonic()
        found.update(part())
        clocks[name] = time.monotonic() - start

    add("functions", lambda: compute_functions(rank, groups))
    add("ours", lambda: compute_modules(rank, "ours", ClipLoss, SigLipLoss))
    theirs = open_clip_losses()
    if theirs is not None:
        add("theirs", lambda: compute_modules(rank, "theirs", theirs.ClipLoss, theirs.SigLipLoss))
        replace_forward(theirs.ClipLoss, ClipLoss)
        replace_forward(theirs.SigLipLoss, SigLipLoss)
        add("patched", lambda: compute_modules(rank, "patched", theirs.ClipLoss, theirs.SigLipLoss))
    add("labelled", lambda: compute_labelled_modules(rank))
    found["alone"] = ClipLoss(world_size=1)(*leaves(torch.float64, WORLD, rank)[:3]).detach()
    add("refusals", lambda: compute_refusals(rank, groups))
    add("traffic", lambda: compute_traffic(rank))
    add("memory", lambda: compute_memory(rank, groups))
    if rank in GROUPS["two"]:
        add("compiled", lambda: compute_compiled(rank, groups["two"]))
    add("sharded", lambda: compute_sharded(rank, groups))
    add("agreements", lambda: compute_agreements(rank, groups["four"]))
    distributed._is_read = lambda device: True
    add("deaths", lambda: compute_deaths(rank, groups))
    torch.save(found, f"{folder}/{rank}.pt")
