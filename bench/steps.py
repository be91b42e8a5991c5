"""Training steps to compare: this project's, the same by hand, and open_clip's own over the same weights."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.peers import import_without_torchvision
from xray import models
from xray.train import prepare, tasks
from xray.train.recipes import Recipe
from xray_kernels import testing

LEARNING_RATE = 1e-6
"""So low that the many steps of a benchmark leave the model as it was."""
Step = Callable[..., None]


def clip_task(recipe: Recipe, vocab_size: int) -> tasks.ClipTask:
    """The task of a CLIP recipe with random weights; its queries and keys are large enough for attention to prefer some
    tokens, as trained ones do."""
    torch.manual_seed(0)
    task = tasks.ClipTask(recipe, cast(Any, SimpleNamespace(vocab_size=vocab_size)))
    with torch.no_grad():
        for block in task.model.vision.blocks:
            block.attn.qkv.weight *= 2  # type: ignore[operator, union-attr]
    return task


def pairs(recipe: Recipe, vocab_size: int, batch: int, device: torch.device, tokens: int = 0) -> dict[str, Tensor]:
    """Random pixels, and captions of `tokens` tokens on average, half to one and a half times that; 0 means all full.

    A caption's last token has the highest number, by which open_clip finds it, and zeros follow it.
    """
    generator = torch.Generator().manual_seed(1)
    size, most = recipe.image_size, recipe.context_length
    pixels = torch.randn(batch, 3, size, size, generator=generator)
    lengths = torch.full((batch,), most)
    if tokens:
        lengths = torch.randint(tokens // 2, 3 * tokens // 2 + 1, (batch,), generator=generator)
    token_ids = torch.randint(1, vocab_size - 1, (batch, most), generator=generator)
    token_ids[torch.arange(batch), lengths - 1] = vocab_size - 1
    token_ids[torch.arange(most) >= lengths[:, None]] = 0
    return {"pixels": pixels.to(device), "token_ids": token_ids.to(device), "lengths": lengths.to(device)}


def gradients(task: tasks.ClipTask, inputs: dict[str, Tensor], keep_rate: float) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter, by name; the captions are cut to the longest."""
    task.zero_grad()
    with torch.enable_grad():
        loss, _ = task.accumulate(keep_rate, **_cut(inputs))
    found = {name: cast(Tensor, parameter.grad) for name, parameter in task.model.named_parameters()}
    task.zero_grad()
    return {"loss": loss, **found}


def in_reference(task: tasks.ClipTask, inputs: dict[str, Tensor], keep_rate: float) -> dict[str, Tensor]:
    """`gradients` by the reference of every op, in the dtype of the pixels."""
    with testing.use_implementation("reference"):
        return gradients(copy.deepcopy(task).to(inputs["pixels"].dtype), inputs, keep_rate)


def _cut(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Captions as the tokenizer gives them: as long as the longest of the batch."""
    return {**inputs, "token_ids": inputs["token_ids"][:, : int(inputs["lengths"].max())]}


class OurStep:
    """A step as the training loop does it, of inputs that lie on the device.

    Args:
        task: the model; steps change it.
        recipe: says how the gradient is clipped, and whether blocks are compiled.
        dtype: what matrix products run in, by autocast where it is not float32.
    """

    def __init__(self, task: tasks.ClipTask, recipe: Recipe, dtype: torch.dtype = torch.float32) -> None:
        self.task, self.recipe, self.dtype = task, recipe, dtype
        prepare.accelerate(task, recipe)
        self.optimizer = torch.optim.AdamW(task.parameters(), lr=LEARNING_RATE, betas=recipe.betas, fused=True)

    @torch.enable_grad()
    def __call__(self, keep_rate: float, **inputs: Tensor) -> None:
        """Forward, backward, clipping, the step's numbers, and the optimizer."""
        with torch.autocast(inputs["pixels"].device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss, extra = self.task.accumulate(keep_rate, **_cut(inputs))
        norm = torch.nn.utils.clip_grad_norm_(self.task.parameters(), self.recipe.grad_clip)
        torch.stack([loss.float(), norm.float(), *extra.values()]).tolist()
        self.optimizer.step()
        self.task.settle()
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self, keep_rate: float, **inputs: Tensor) -> Tensor:
        """The gradient of all parameters, end to end, in float32; none of them is changed."""
        with torch.enable_grad(), torch.autocast(inputs["pixels"].device.type, self.dtype, self.dtype != torch.float32):
            self.task.accumulate(keep_rate, **_cut(inputs))
        found = torch.cat([cast(Tensor, parameter.grad).flatten() for parameter in self.task.parameters()])
        self.optimizer.zero_grad(set_to_none=True)
        return found


def exact_gradient(recipe: Recipe, vocab_size: int, inputs: dict[str, Tensor], keep_rate: float) -> Tensor:
    """`OurStep.gradient` in float32, with as little memory as it takes."""
    recipe = replace(recipe, compile=False, activation_checkpointing="full")
    task = clip_task(recipe, vocab_size).to(inputs["pixels"].device)
    return OurStep(task, recipe).gradient(keep_rate, **inputs)


class OpenClip:
    """open_clip's model with the same weights as one of ours, and its own training step.

    It is configured to be the same function: no LayerNorm before the blocks, and our epsilon in the others. Ours has a
    bias of the patches and a time embedding, which are 0 here and are trained by what reaches the positions.
    """

    def __init__(self, task: tasks.ClipTask) -> None:
        config = task.model.config
        vision, text = config.vision, config.text
        clip = import_without_torchvision("open_clip.model").CLIP
        self.model: nn.Module = clip(
            config.embed_dim,
            {
                "layers": vision.depth,
                "width": vision.width,
                "head_width": vision.width // vision.heads,
                "mlp_ratio": vision.mlp_ratio,
                "patch_size": vision.patch_size,
                "image_size": vision.image_size,
                "no_ln_pre": True,
                "norm_kwargs": {"eps": vision.layer_norm_eps},
            },
            {
                "context_length": text.context_length,
                "vocab_size": text.vocab_size,
                "width": text.width,
                "heads": text.heads,
                "layers": text.depth,
                "mlp_ratio": text.mlp_ratio,
                "norm_kwargs": {"eps": vision.layer_norm_eps},
            },
            output_dict=True,
        )
        self.model.load_state_dict(_as_theirs(dict(task.model.state_dict())))
        self.loss = import_without_torchvision("open_clip.loss").ClipLoss()

    def gradients(self, pixels: Tensor, token_ids: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Its loss and gradients, by the names of our parameters, in the dtype of the pixels."""
        model = copy.deepcopy(self.model).to(pixels.dtype)
        with torch.enable_grad():
            loss = sum(self.loss(**model(pixels, token_ids), output_dict=True).values())
            loss.backward()
        return {"loss": loss.detach(), **_as_ours({n: cast(Tensor, p.grad) for n, p in model.named_parameters()})}

    def step(self, compiled: bool = False) -> Step:
        """`train_one_epoch` of open_clip_train over one batch, with the optimizer that its `main` builds."""
        train = import_without_torchvision("open_clip_train.train").train_one_epoch
        kept_out: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        for name, p in self.model.named_parameters():
            out = p.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))
            (kept_out if out else decayed).append(p)
        optimizer = torch.optim.AdamW(
            [{"params": kept_out, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}],
            lr=LEARNING_RATE,
            betas=(0.9, 0.98),
            eps=1e-6,
        )
        model = torch.compile(self.model) if compiled else self.model
        arguments = SimpleNamespace(
            device="cpu",
            precision="fp32",
            distill=False,
            accum_freq=1,
            skip_scheduler=True,
            horovod=False,
            grad_clip_norm=None,
            log_every_n_steps=100,
            rank=0,
            world_size=1,
            wandb=False,
        )

        @torch.enable_grad()
        def step(pixels: Tensor, token_ids: Tensor, lengths: Tensor) -> None:
            arguments.batch_size = len(pixels)
            data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=_OneBatch(pixels, token_ids))}
            train(model, data, self.loss, 0, optimizer, None, None, None, arguments)

        return step


class _OneBatch:
    num_batches = 1

    def __init__(self, *batch: Tensor) -> None:
        self.batch, self.num_samples = batch, len(batch[0])

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter([self.batch])


_BLOCKS = (("vision.blocks.", "visual.transformer.resblocks."), ("text.blocks.", "transformer.resblocks."))
_LAYERS = (
    ("norm1.", "ln_1."),
    ("norm2.", "ln_2."),
    ("attn.qkv.", "attn.in_proj_"),
    ("attn.proj.", "attn.out_proj."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
)
_OTHERS = {
    "vision.patch_embed.proj.weight": "visual.conv1.weight",
    "vision.norm.weight": "visual.ln_post.weight",
    "vision.norm.bias": "visual.ln_post.bias",
    "text.token_embedding.weight": "token_embedding.weight",
    "text.norm.weight": "ln_final.weight",
    "text.norm.bias": "ln_final.bias",
}


def _their_name(name: str) -> str:
    """open_clip's name of a parameter that both have in the same shape; "" of the others."""
    for ours, theirs in _BLOCKS:
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            for before, after in _LAYERS:
                name = name.replace(before, after)
            return name
    return _OTHERS.get(name, "")


def _as_theirs(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under open_clip's names and in its shapes. Its class token has a position, ours has none."""
    theirs = {there: tensor for name, tensor in ours.items() if (there := _their_name(name))}
    positions = ours["vision.pos_embed"][0]
    theirs |= {
        "visual.class_embedding": ours["vision.cls_token"][0, 0],
        "visual.positional_embedding": torch.cat([torch.zeros_like(positions[:1]), positions]),
        "visual.proj": ours["vision_projection.weight"].T,
        "positional_embedding": ours["text.position_embedding"][0],
        "text_projection": ours["text_projection.weight"].T,
        "logit_scale": ours["logit_scale"][0],
    }
    return {name: tensor.clone() for name, tensor in theirs.items()}


def _as_ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of open_clip's parameters as those of ours."""
    ours = {}
    for tower, depth in _depths(theirs).items():
        for block in range(depth):
            for layer, _ in _LAYERS:
                for kind in ("weight", "bias"):
                    name = f"{tower}{block}.{layer}{kind}"
                    ours[name] = theirs[_their_name(name)]
    ours |= {name: theirs[there] for name, there in _OTHERS.items()}
    positions = theirs["visual.positional_embedding"][1:]
    return ours | {
        "vision.cls_token": theirs["visual.class_embedding"][None, None],
        "vision.pos_embed": positions[None],
        "vision.time_embed": positions.sum(0)[None, None],
        "vision.patch_embed.proj.bias": positions.sum(0),
        "vision_projection.weight": theirs["visual.proj"].T,
        "text.position_embedding": theirs["positional_embedding"][None],
        "text_projection.weight": theirs["text_projection"].T,
        "logit_scale": theirs["logit_scale"][None],
    }


def _depths(theirs: Iterable[str]) -> dict[str, int]:
    names = list(theirs)
    return {
        ours: 1 + max(int(name.removeprefix(there).split(".")[0]) for name in names if name.startswith(there))
        for ours, there in _BLOCKS
    }


class TurnsWithTheLoop:
    """Batches for the training loop that let other functions have their turns between its steps, and time all of them.

    What the loop does from getting a batch to asking for the next is its step; a batch is made outside of it. The
    others' turn comes before a step and after the next by turns, so that neither side always finds what the other left
    in the caches.

    Args:
        batches: the loop's.
        others: what else has a turn at each step: called with the step's batch; an untimed preparation gives the call.
    """

    def __init__(self, batches: Iterator[Any], others: dict[str, Callable[[Any], Callable[[], None]]]) -> None:
        self.batches, self.others = batches, others
        self.samples: dict[str, list[float]] = {"loop": [], **{name: [] for name in others}}
        self._began: float | None = None
        self._batch: Any = None

    def __iter__(self) -> TurnsWithTheLoop:
        return self

    def __next__(self) -> Any:
        """The next batch; the first call ends no step."""
        self.end_step()
        self._batch = next(self.batches)
        if len(self.samples["loop"]) % 2 == 0:
            self._others_turn()
        self._began = time.perf_counter()
        return self._batch

    def end_step(self) -> None:
        """Stop the clock of the loop's step; call it once more when the loop is done."""
        if self._began is None:
            return
        self.samples["loop"].append(time.perf_counter() - self._began)
        self._began = None
        if len(self.samples["loop"]) % 2 == 0:
            self._others_turn()

    def _others_turn(self) -> None:
        for name, prepared in self.others.items():
            function = prepared(self._batch)
            began = time.perf_counter()
            function()
            self.samples[name].append(time.perf_counter() - began)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


class BareLoop:
    """Forward, backward, clipping and step by hand, of the task that a recipe trains from the same weights."""

    def __init__(self, task: tasks.Task, recipe: Recipe) -> None:
        self.task, self.recipe = task, recipe
        self.optimizer = torch.optim.AdamW(
            task.parameters(),
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.epsilon,
            weight_decay=0,
            fused=True,
        )
        self.losses: list[Tensor] = []

    def prepared(self, batch: Any) -> Callable[[], None]:
        """The step of a batch, whose inputs are ready and whose learning rate is set."""
        from xray.train.schedule import learning_rate

        inputs = self.task.inputs(batch, 0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, len(self.losses))
        return lambda: self._step(inputs)

    def _step(self, inputs: dict[str, Any]) -> None:
        loss, _ = self.task(self.recipe.keep_rate, **inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.task.parameters(), self.recipe.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())


@contextlib.contextmanager
def loader_replaced(wrap: Callable[[Iterator[Any]], Iterator[Any]]) -> Iterator[None]:
    """The training loop's batches go through `wrap`."""
    from xray import data

    real = data.loader
    data.loader = lambda *arguments, **keywords: wrap(real(*arguments, **keywords))
    try:
        yield
    finally:
        data.loader = real


def without_files(recipe: Recipe, **changes: Any) -> Recipe:
    """A recipe that writes little and says nothing."""
    quiet = {"tensorboard": False, "progress": False, "checkpoint_every": 0, "overwrite": True}
    return replace(recipe, **{**quiet, **changes})


def save_task(task: tasks.Task, path: Any, **strings: Any) -> None:
    """The task's model as a file to start from, by a recipe's `init`."""
    models.save(task.model, path, **strings)
