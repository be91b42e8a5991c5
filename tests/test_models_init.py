"""Where parameters come from: the meta device, `reset_parameters`, and `initialize` by seed and name alone."""

from __future__ import annotations

import dataclasses
import math
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xray import models
from xray.models.layers import sin_cos_positions

VISION = dataclasses.replace(models.SIZES["tiny"], num_frames=3, num_registers=2)
TEXT = models.TextConfig(vocab_size=50, context_length=12, width=32, depth=2, heads=2)
BUILD: dict[str, Callable[[], nn.Module]] = {
    "vision": lambda: models.VisionTransformer(VISION),
    "text": lambda: models.TextTransformer(TEXT),
    "clip": lambda: models.Clip(models.ClipConfig(VISION, TEXT, embed_dim=24)),
    "mae": lambda: models.MaskedAutoencoder(models.MaeConfig(VISION, 16, 1, 2)),
    "tags": lambda: models.TagClassifier(models.TagConfig(VISION, 5)),
}


def on_meta(kind: str) -> nn.Module:
    with torch.device("meta"):
        return BUILD[kind]()


def poison(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal_values(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


class OnlyMeta(TorchDispatchMode):
    """Fails at the first operation whose result takes memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert all(leaf.is_meta for leaf in tree_leaves(result) if isinstance(leaf, Tensor)), func
        return result


@pytest.mark.parametrize("kind", BUILD)
def test_models_are_built_on_meta_without_memory_or_random_numbers(kind: str) -> None:
    state = torch.get_rng_state()
    with OnlyMeta():
        model = on_meta(kind)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in BUILD[kind]().named_parameters()
    }


@pytest.mark.parametrize("kind", BUILD)
def test_each_parameter_is_initialised_by_its_own_module_alone(kind: str) -> None:
    model = on_meta(kind).to_empty(device="cpu")
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        poison(model)
        module.reset_parameters()  # type: ignore[operator]
        for parameter in model.parameters():
            touched = not parameter.isnan().any()
            assert touched == any(parameter is one for one in own.values())


XAVIER = "xavier"
WIDE = models.VisionConfig(32, 4, 96, 1, 2, num_frames=3, num_registers=40)
DISTRIBUTIONS: dict[str, Any] = {
    r"(qkv|attn\.proj|fc1|fc2|patch_embed\.proj|decoder_embed|decoder_pred)\.weight": XAVIER,
    r"(?<!norm)(?<!norm1)(?<!norm2)\.bias": 0.0,
    r"norm\d?\.weight": 1.0,
    r"norm\d?\.bias": 0.0,
    r"time_embed": 0.0,
    r"(cls_token|reg_token|mask_token|token_embedding\.weight|head\.weight)": 0.02,
    r"position_embedding": 0.01,
    r"vision_projection\.weight": 96**-0.5,
    r"text_projection\.weight": 64**-0.5,
    r"logit_scale": math.log(1 / 0.07),
}


@pytest.mark.parametrize("way", ["constructor", "initialize"])
def test_distributions_of_initial_values(way: str) -> None:
    torch.manual_seed(1)
    text = models.TextConfig(vocab_size=99, context_length=40, width=64, depth=1, heads=2)
    built = [
        models.Clip(models.ClipConfig(WIDE, text, embed_dim=80)),
        models.MaskedAutoencoder(models.MaeConfig(WIDE, 112, 1, 2)),
        models.TagClassifier(models.TagConfig(WIDE, 60)),
    ]
    for model in built:
        if way == "initialize":
            poison(model)
            models.initialize(model, 1)
        for name, parameter in model.named_parameters():
            tensor = parameter.detach()
            if name.endswith("pos_embed"):
                assert torch.equal(tensor, sin_cos_positions(8, tensor.shape[-1])), name
                continue
            (found,) = (value for pattern, value in DISTRIBUTIONS.items() if re.search(f"{pattern}$", name))
            if found == XAVIER:
                fans = tensor.shape[0] + tensor[0].numel()
                bound = math.sqrt(6 / fans)
                assert 0.99 * bound < tensor.abs().max() <= bound, name
                assert tensor.std() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
            elif name.endswith(("bias", "time_embed", "logit_scale")) or "norm" in name:
                torch.testing.assert_close(tensor, torch.full_like(tensor, found))
            else:
                # five standard errors of a deviation and of a mean
                assert tensor.std().item() == pytest.approx(found, rel=5 / math.sqrt(2 * tensor.numel())), name
                assert abs(tensor.mean().item()) < 5 * found / math.sqrt(tensor.numel()), name
            if name.endswith("head.weight"):
                assert tensor.abs().max() < 0.1


@pytest.mark.parametrize("kind", BUILD)
def test_initialize_depends_on_seed_and_names_alone(kind: str) -> None:
    torch.manual_seed(5)
    built = BUILD[kind]()
    state = torch.get_rng_state()
    models.initialize(built, 7)
    assert torch.equal(torch.get_rng_state(), state)
    expected = values(built)
    materialised = on_meta(kind).to_empty(device="cpu")
    poison(materialised)
    torch.manual_seed(6)
    with torch.device("meta"):  # as a caller may who builds and fills under one roof
        models.initialize(materialised, 7)
    assert_equal_values(values(materialised), expected)
    models.initialize(built, 8)
    same = {name for name, value in values(built).items() if torch.equal(value, expected[name])}
    constant = r"(bias|norm\d?\.weight|time_embed|pos_embed|logit_scale)$"
    assert same == {name for name in expected if re.search(constant, name)}


def test_initialize_gives_each_module_numbers_of_its_own() -> None:
    models.initialize(small := models.VisionTransformer(VISION), 0)
    models.initialize(large := models.VisionTransformer(dataclasses.replace(VISION, depth=6, num_registers=0)), 0)
    shared = {name: value for name, value in values(large).items() if name.startswith(("blocks.0.", "blocks.3."))}
    assert_equal_values(shared, {name: values(small)[name] for name in shared})
    weights = [value for name, value in values(small).items() if name.endswith("qkv.weight")]
    assert len(weights) == 4
    assert not any(torch.equal(a, b) for a in weights for b in weights if a is not b)


def test_initialize_hands_over_one_module_at_a_time() -> None:
    model = on_meta("mae")
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    given: dict[int, Tensor] = {}
    most = 0

    def assign(parameter: nn.Parameter, value: Tensor) -> None:
        nonlocal most
        assert (value.shape, value.dtype, value.device.type) == (parameter.shape, parameter.dtype, "cpu")
        assert not value.requires_grad
        alive.add(value)
        most = max(most, len(alive))
        assert id(parameter) not in given
        given[id(parameter)] = value.clone()

    before = dict(model.named_parameters())
    models.initialize(model, 7, assign=assign)
    assert most == 1
    assert all(parameter is before[name] and parameter.is_meta for name, parameter in model.named_parameters())
    models.initialize(plain := BUILD["mae"](), 7)
    assert_equal_values({name: given[id(parameter)] for name, parameter in before.items()}, values(plain))


def test_initialize_keeps_dtypes_and_frozen_parameters() -> None:
    model = BUILD["tags"]().bfloat16()
    model.head.requires_grad_(False)
    poison(model)
    given: set[torch.dtype] = set()
    models.initialize(model, 0, assign=lambda parameter, value: given.add(value.dtype))
    assert given == {torch.bfloat16}
    models.initialize(model, 0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.weight", "head.bias"]


class Homemade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), Homemade()), TypeError, r"Homemade '1' must have reset_parameters"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), TypeError, "parameters only.*buffers in BatchNorm1d '1'"),
        (nn.Linear(2, 2, device="meta"), ValueError, "meta device: call model.to_empty"),
    ],
)
def test_what_cannot_be_initialised_is_named_and_nothing_changed(
    model: nn.Module, error: type[Exception], message: str
) -> None:
    before = values(model)
    state = torch.get_rng_state()
    with pytest.raises(error, match=message) as caught:
        models.initialize(model, 0)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)
    if error is TypeError:
        assert_equal_values(values(model), before)


@pytest.fixture
def rank_one_of_three() -> Iterator[None]:
    """A process group of which only this process exists; nothing may be communicated."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("rank_one_of_three")
def test_sharded_models_get_their_shard_of_what_a_whole_model_gets(tmp_path: Any) -> None:
    mesh = init_device_mesh("cpu", (3,))
    sharded: Any = on_meta("clip")
    for block in (*sharded.vision.blocks, *sharded.text.blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded.to_empty(device="cpu")

    @torch.no_grad()
    def cut(parameter: nn.Parameter, value: Tensor) -> None:
        assert isinstance(parameter, DTensor)
        parameter.copy_(distribute_tensor(value, mesh, parameter.placements, src_data_rank=None))

    def assert_second_third_of(model: nn.Module) -> None:
        for (name, shard), whole in zip(sharded.named_parameters(), model.parameters(), strict=True):
            thirds = (*whole.chunk(3), whole[:0])
            assert torch.equal(shard.to_local(), thirds[1]), name

    poison(sharded)
    whole: Any = BUILD["clip"]()
    models.initialize(whole, 3)
    models.initialize(sharded, 3, assign=cut)
    assert_second_third_of(whole)
    models.initialize(whole, 4)
    models.save(whole, tmp_path / "model.safetensors")
    names = models.load_encoder(sharded, tmp_path / "model.safetensors", assign=cut)
    names += models.load_rest(sharded, tmp_path / "model.safetensors", assign=cut)
    assert sorted(names) == sorted(values(whole))
    assert_second_third_of(whole)
