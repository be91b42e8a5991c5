"""Whole training steps: what the loop costs, side by side with open_clip's own step, and on a GPU at ViT-L/14.

open_clip is given the same weights and the same batch, and runs `train_one_epoch` of its training program with the
optimizer that this program builds. Loss and gradients agree before anything is timed. It always computes
`context_length` tokens of a caption; ours computes as many as the longest caption of the batch has, so captions that
fill the context are the strict comparison, and those of usual length have a line of their own.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import results, steps
from bench.harness import DEVICE, STEP, Bench, Peer, Work, copy_of, matmul_for
from bench.results import GREEN, MATMUL, Target, Timing
from xray import data, models, train
from xray.train import recipes, tasks
from xray.train.recipes import Recipe
from xray_kernels.testing import Inputs, OpSpec, nbytes

ON_GPU = DEVICE.type == "cuda"
KEEP_RATE = 0.7
OURS, OURS_EVIT, THEIRS = "xray", f"xray, keep {KEEP_RATE}", "open_clip"
COMPILED = ", compiled"
on_cpu = pytest.mark.skipif(ON_GPU, reason="compared on a CPU, in float32")


@dataclass(frozen=True)
class Size:
    """A CLIP model and what a step takes: pairs, and tokens of a caption of usual length on average."""

    name: str
    recipe: Recipe
    vocab_size: int
    batch: int
    caption: int


SMOKE = Size("tiny", replace(recipes.clip_tiny(), num_frames=1), 64, 4, 8)
SIZES = (
    Size("demo size, 64 px", replace(recipes.demo_clip(), num_frames=1), 4096, 64, 12),
    Size("ViT-S/16, 224 px", replace(recipes.clip_s16(), num_frames=1, compile=False), 49_408, 8, 16),
)
LARGE = Size(
    "ViT-L/14, 224 px", replace(recipes.clip_l14(), num_frames=1, activation_checkpointing="none"), 49_408, 128, 16
)


def flops(size: Size, keep_rate: float, tokens: int = 0) -> int:
    """Of a step: the forward pass and, at twice the price, the backward pass."""
    config = steps.clip_task(size.recipe, size.vocab_size).model.config
    return 3 * size.batch * models.model_cost(config, keep_rate=keep_rate, text_tokens=tokens or None).flops


def peers_of(size: Size, with_compiled: bool) -> tuple[Peer, ...]:
    """open_clip first; each pair of peers with and without EViT shares a model."""
    task = steps.clip_task(size.recipe, size.vocab_size)
    composition = functools.partial(_reference, task=task)
    theirs = steps.OpenClip(task)
    found = [Peer(THEIRS, theirs.gradients, timed=theirs.step())]
    if with_compiled:
        twin = steps.OpenClip(task)
        found.append(Peer(THEIRS + COMPILED, twin.gradients, needs="g++", slow=True, timed=twin.step(compiled=True)))
    for compiled in (False, True) if with_compiled else (False,):
        recipe = replace(size.recipe, compile=compiled)
        step = steps.OurStep(steps.clip_task(recipe, size.vocab_size), recipe)
        for name, keep_rate in ((OURS, 1.0), (OURS_EVIT, KEEP_RATE)):
            found.append(
                Peer(
                    name + COMPILED * compiled,
                    functools.partial(_gradients, task=step.task, keep_rate=keep_rate),
                    needs="g++" if compiled else "",
                    slow=compiled,
                    ours=True,
                    default=name == OURS and not compiled,
                    composition=None if keep_rate == 1 else functools.partial(composition, keep_rate=keep_rate),
                    timed=functools.partial(step, keep_rate),
                )
            )
    return tuple(found)


def _gradients(task: tasks.ClipTask, keep_rate: float, **inputs: Tensor) -> dict[str, Tensor]:
    return steps.gradients(task, inputs, keep_rate)


def _reference(task: tasks.ClipTask, keep_rate: float, **inputs: Tensor) -> dict[str, Tensor]:
    return steps.in_reference(task, inputs, keep_rate)


@on_cpu
@pytest.mark.parametrize("captions", ["full captions", "short captions"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.recipe.model)
def test_step(size: Size, captions: str, bench: Bench) -> None:
    if importlib.util.find_spec("open_clip") is None or importlib.util.find_spec("open_clip_train") is None:
        pytest.skip("open_clip_torch is not installed, with its open_clip_train")
    size = size if bench.full else SMOKE
    full = captions == "full captions"
    inputs: Inputs = dict(
        steps.pairs(size.recipe, size.vocab_size, size.batch, DEVICE, tokens=0 if full else size.caption)
    )
    peers = peers_of(size, with_compiled=full and size.recipe.model == SIZES[0].recipe.model)
    longest = int(inputs["lengths"].max())

    weights = nbytes(*steps.clip_task(size.recipe, size.vocab_size).parameters())
    spec = OpSpec(
        "training_step",
        peers[-1].function,
        peers[0].function,
        (),
        lambda inputs: (7 * weights + nbytes(inputs["pixels"]), 0),  # AdamW reads four numbers a weight, writes three
        lambda inputs: (flops(size, 1.0, longest), 0),
    )
    targets = [Target(THEIRS, 1.2, OURS), Target(THEIRS, 1.6, OURS_EVIT)] if full else []
    case = f"CLIP {size.name}, {size.batch} pairs, {captions} of up to {longest} tokens"
    bench.compare(spec, inputs, peers, case, STEP, targets, samples=size.batch)


LOOP_SIZES = (
    replace(recipes.demo_clip(), batch_size=64),
    replace(recipes.clip_s16(), model="ti16", embed_dim=192, text_width=192, text_depth=4, text_heads=3, batch_size=4),
)
LOOP_STEPS, WARM_UP, SMOKE_STEPS = 44, 4, 4


@on_cpu
@pytest.mark.parametrize("recipe", LOOP_SIZES, ids=lambda recipe: recipe.model)
def test_loop(recipe: Recipe, bench: Bench, tmp_path: Path) -> None:
    """`xray.train.run` against the same steps by hand, in turns, from the same weights and over the same batches."""
    recipe = recipe if bench.full else replace(recipes.clip_tiny(), batch_size=8)
    recipe = steps.without_files(
        recipe,
        data=str(data.generated(tmp_path / "data", 240, image_size=recipe.image_size, clip_share=0.0)),
        num_frames=1,
        clip_fraction=0.0,
        keep_rate=1.0,
        keep_rate_warmup=0,
        short_texts=0.0,
        weight_decay=0.0,  # so which parameters decay does not matter
        epsilon=1e-8,
        steps=LOOP_STEPS if bench.full else SMOKE_STEPS,
        warmup_steps=2,
        vocab_size=512,
        num_workers=0,
        compile=False,
        peak_tflops=1.0,  # nothing is measured at the start
        out=str(tmp_path / "run"),
        init=str(tmp_path / "start.safetensors"),
    )
    dataset = data.Dataset(recipe.data, "train")
    artifacts = tasks.learn(recipe, zip(dataset.column("caption"), dataset.column("tags"), strict=True))
    task = tasks.build(recipe, artifacts)
    steps.save_task(task, recipe.init, **artifacts)
    bare = steps.BareLoop(task, recipe)
    work = _loop_work(recipe, task)
    copied, multiplied = copy_of(work.bytes), matmul_for(torch.float32)
    others = {"bare": bare.prepared, "copy": lambda batch: copied, "matmul": lambda batch: multiplied}
    turns: list[steps.TurnsWithTheLoop] = []

    def wrap(batches: Any) -> steps.TurnsWithTheLoop:
        turns.append(steps.TurnsWithTheLoop(batches, others))
        return turns[0]

    before = results.processor_seconds()
    with steps.loader_replaced(wrap):
        train.run(recipe)
    turns[0].end_step()
    samples = {name: values[WARM_UP:] for name, values in turns[0].samples.items()}
    verdict = _same_losses(Path(recipe.out), [float(loss) for loss in bare.losses])
    if bench.full:
        timings = [
            Timing("bare loop", GREEN, samples["bare"]),
            Timing("xray.train", verdict, samples["loop"], ours=True, default=True),
        ]
        wanted = [Target("bare loop", 1 / 1.02)]
        bench.record(work, timings, samples["copy"], samples["matmul"], before, {}, wanted)
    assert verdict == GREEN
    assert len(turns[0].samples["bare"]) == len(turns[0].samples["loop"]) == recipe.steps


def _loop_work(recipe: Recipe, task: Any) -> Work:
    config = task.model.config
    case = f"CLIP {recipe.model}, {recipe.image_size} px, {recipe.batch_size} pairs, data outside"
    operations = 3 * recipe.batch_size * models.model_cost(config).flops
    return Work("train", case, torch.float32, STEP, 7 * nbytes(*task.parameters()), operations, recipe.batch_size)


def _same_losses(out: Path, bare: list[float]) -> str:
    """Both train the same model if their losses agree at every step."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    loop = [record["loss"] for line in lines if "loss" in (record := json.loads(line))]
    if len(loop) != len(bare):
        return f"parity red, {len(loop)} steps of the loop and {len(bare)} by hand"
    error = max(abs(a - b) / abs(b) for a, b in zip(loop, bare, strict=True))
    return GREEN if error < 1e-5 else f"parity red, losses differ by {error:.2g} of themselves"


AGREEMENT = {1.0: 0.99, KEEP_RATE: 0.95}
"""Keep rate -> cosine between the gradient in bfloat16 and the one in float32. Rounding may swap the last kept with the
first dropped token, so EViT's agrees less."""


@functools.cache
def gpu_step(size: Size, compiled: bool) -> steps.OurStep:
    recipe = replace(size.recipe, compile=compiled)
    return steps.OurStep(steps.clip_task(recipe, size.vocab_size).to(DEVICE), recipe, torch.bfloat16)


@pytest.mark.skipif(not ON_GPU, reason="measured on a GPU")
@pytest.mark.parametrize("keep_rate", [1.0, KEEP_RATE])
def test_gpu_step(keep_rate: float, bench: Bench) -> None:
    """ViT-L/14 in bfloat16 by autocast, as the loop does it, with and without `torch.compile`.

    Its roofline is the share of the matrix product beside: MFU against a measured peak. EViT's baseline is the dense
    step, compiled.
    """
    size = LARGE if bench.full else SMOKE
    inputs = steps.pairs(size.recipe, size.vocab_size, size.batch, DEVICE)
    exact = steps.exact_gradient(size.recipe, size.vocab_size, inputs, keep_rate)
    name = OURS if keep_rate == 1 else OURS_EVIT
    compiled = Peer(name + COMPILED, gpu_step(size, True), needs="g++", slow=True, ours=True, default=True)
    wanted = [Peer(name, gpu_step(size, False), ours=True, default=not bench.full), compiled]
    skipped = {peer.name: why for peer in wanted if (why := peer.absent(bench.full))}
    peers = [peer for peer in wanted if peer.name not in skipped]
    verdicts, functions, memory = {}, {}, {}
    for peer in peers:
        found = peer.function.gradient(keep_rate, **inputs)  # type: ignore[attr-defined]
        agreement = float(torch.cosine_similarity(found, exact, dim=0))
        agrees = agreement >= AGREEMENT[keep_rate]
        verdicts[peer.name] = GREEN if agrees else f"parity red, gradient: cosine {agreement:.4f} to that in float32"
        functions[peer.name] = _synchronized(functools.partial(peer.function, keep_rate, **inputs))
        memory[peer.name] = _peak_memory(functions[peer.name], peer.function)  # type: ignore[arg-type]
    del exact, found
    targets = [Target(MATMUL, 0.45)]
    if keep_rate != 1 and not skipped:
        dense = Peer(OURS + COMPILED, gpu_step(size, True), ours=True)
        peers.insert(0, dense)
        verdicts[dense.name] = GREEN  # the dense benchmark looks at it
        functions[dense.name] = _synchronized(functools.partial(dense.function, 1.0, **inputs))
        targets = [Target(dense.name, 1.3)]
    operations = flops(size, keep_rate)
    case = f"CLIP {size.name}, {size.batch} pairs, full captions of {size.recipe.context_length} tokens"
    weights = 7 * nbytes(*gpu_step(size, False).task.parameters())
    work = Work("training_step", case, torch.bfloat16, STEP, weights, operations, size.batch)
    red = {name: verdict for name, verdict in verdicts.items() if verdict != GREEN}
    timed = {name: function for name, function in functions.items() if name not in red}
    bench.measure(work, peers, verdicts, timed, skipped, targets, memory)
    assert not red, red


def _synchronized(function: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        function()
        if ON_GPU:
            torch.cuda.synchronize()

    return call


def _peak_memory(function: Callable[[], None], step: steps.OurStep) -> int:
    """Most bytes that a step holds: its weights, the optimizer's two numbers for each, and what it allocates."""
    function()  # makes the optimizer's state, compiles
    if not ON_GPU:
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before + 3 * nbytes(*step.task.parameters())
