"""Optimizers: what they compute, whole and sharded, and which parameters decay and how fast each layer learns."""

import functools
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from optimizer_ranks import NAMES, RATES, WORLD, compute, inputs, model, recipe, trained
from oracles import import_oracle
from torch import Tensor, nn

from xray import data, models, train
from xray.train import optimizer, tasks
from xray.train.recipes import RECIPES

DECAYED = ("first.weight", "second.weight", "third.weight")


# What an optimizer computes


def by_formula(name: str) -> dict[str, Tensor]:
    """What the papers' formulas give in float64: AdamW (arXiv 1711.05101), Lion (2302.06675), LAMB (1904.00962)."""
    settings = recipe(name)
    (beta1, beta2), eps = settings.betas, settings.epsilon
    task = model(torch.float64)
    first: dict[str, Any] = defaultdict(float)
    second: dict[str, Any] = defaultdict(float)
    for number, rate in enumerate(RATES):
        task.zero_grad()
        task(inputs(number).double()).backward()
        for key, parameter in task.named_parameters():
            w, g = parameter.data, parameter.grad
            assert g is not None
            decay = settings.weight_decay if key in DECAYED else 0.0
            if name == "lion":
                update = (beta1 * first[key] + (1 - beta1) * g).sign() + decay * w
                first[key] = beta2 * first[key] + (1 - beta2) * g
            else:
                first[key] = beta1 * first[key] + (1 - beta1) * g
                second[key] = beta2 * second[key] + (1 - beta2) * g**2
                mean, square = first[key] / (1 - beta1 ** (number + 1)), second[key] / (1 - beta2 ** (number + 1))
                update = mean / (square.sqrt() + eps) + decay * w
                if name == "lamb" and decay and w.norm() > 0:
                    update = update * w.norm() / update.norm()
            parameter.data -= rate * update
    return {key: parameter.detach() for key, parameter in task.named_parameters()}


@pytest.fixture(scope="module")
def formulas() -> dict[str, dict[str, Tensor]]:
    return {name: by_formula(name) for name in NAMES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    """What each rank has after training."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["optimizer_ranks", "torch._dynamo"])
    multiprocessing.start_processes(compute, (str(folder),), nprocs=WORLD, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key].double(), value, rtol=1e-5, atol=1e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_is_its_papers_formula(formulas: dict[str, dict[str, Tensor]], name: str) -> None:
    assert_near(trained(name), formulas[name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", ["four", "two by two"])
def test_shards_are_stepped_as_the_whole(
    formulas: dict[str, dict[str, Tensor]], ranks: list[dict[tuple[str, str], dict[str, Tensor]]], name: str, shape: str
) -> None:
    for found in ranks:
        assert_near(found[name, shape], formulas[name])


def test_lamb_agrees_with_timms() -> None:
    theirs = import_oracle("timm.optim").Lamb
    parameters: list[list[nn.Parameter]] = [
        [nn.Parameter(torch.linspace(-1, 1, size)) for size in (4, 9)] + [nn.Parameter(torch.zeros(3))]
        for _ in range(2)
    ]
    options: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-4}
    makers: tuple[Any, ...] = (optimizer.Lamb, functools.partial(theirs, max_grad_norm=None))
    for make, (first, *others) in zip(makers, parameters, strict=True):
        made = make([{"params": others, "weight_decay": 0.3}, {"params": [first], "weight_decay": 0.0}], **options)
        for step in range(5):
            for parameter in (first, *others):
                parameter.grad = torch.sin(torch.arange(parameter.numel()) + step).view_as(parameter)
            made.step()
    for ours, other in zip(*parameters, strict=True):
        torch.testing.assert_close(ours, other)


def test_lamb_leaves_parameters_without_gradient_and_counts_steps_of_each() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    made = optimizer.Lamb([{"params": parameters}, {"params": [nn.Parameter(torch.ones(1))]}], lr=0.1)
    parameters[0].grad = torch.ones(2)
    assert made.step() is None
    assert torch.equal(parameters[1], torch.ones(2))
    assert made.state.keys() == {parameters[0]}
    parameters[1].grad = torch.ones(2)
    assert made.step(lambda: 3.0) == 3.0
    assert [int(made.state[parameter]["step"]) for parameter in parameters] == [2, 1]
    assert parameters[1].tolist() == pytest.approx([0.9, 0.9])  # a first step, of bias-corrected means


@pytest.mark.parametrize("name", NAMES)
def test_a_run_learns_with_each_optimizer_and_goes_on(name: str, shapes_set: Path, tmp_path: Path) -> None:
    rates = {"adamw": 2e-3, "lion": 5e-4, "lamb": 2e-2}
    quiet: dict[str, Any] = {"tensorboard": False, "progress": False, "batch_size": 8, "steps": 6}
    common: dict[str, Any] = {**quiet, "data": str(shapes_set), "learning_rate": rates[name], "layer_decay": 0.8}
    settings = replace(RECIPES["mae_tiny"](), optimizer=name, weight_decay=0.1, checkpoint_every=3, **common)
    whole = train.run(replace(settings, out=str(tmp_path / "whole")))
    halfway = str(whole / "checkpoints" / "step-3")
    again = train.run(replace(settings, out=str(tmp_path / "again"), resume=halfway))
    ours, _ = models.load(whole / "model.safetensors")
    other, _ = models.load(again / "model.safetensors")
    for (key, one), two in zip(ours.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), key


@pytest.fixture(scope="module")
def shapes_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.generated(tmp_path_factory.mktemp("data") / "shapes", 40, image_size=32, num_frames=2)


def test_lion_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lion_pytorch.foreach", None)
    with pytest.raises(train.TrainError, match="optimizer is lion, which needs the package lion-pytorch: pip install"):
        optimizer.build(recipe("lion"), model())


def test_lamb_needs_weight_decay() -> None:
    with pytest.raises(train.TrainError, match="weight_decay is 0 and must be more than 0 for lamb"):
        train.validate(replace(RECIPES["mae_tiny"](), optimizer="lamb"))


# NVIDIA apex

FUSED = (
    "class FusedLAMB:\n    def __init__(self, groups, **options): self.param_groups, self.options = groups, options\n"
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages, in which no apex was imported yet."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(site: Path, **files: str) -> None:
    for name, text in files.items():
        path = site / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


@pytest.mark.parametrize("package", ["none", "PyPI's", "without kernels"])
def test_another_apex_is_no_apex(site: Path, package: str) -> None:
    if package == "PyPI's":
        (site / "apex").mkdir()
        (site / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")
        install(site, amp_C="")  # left by NVIDIA's, which the other has replaced
    if package == "without kernels":
        install(site, apex__optimizers__fused_lamb=FUSED, apex__optimizers____init__="")
    assert optimizer._apex_lamb() is None
    assert isinstance(optimizer.build(recipe("lamb"), model()), optimizer.Lamb)


def test_apex_steps_whole_parameters_on_a_gpu_only(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, apex__optimizers__fused_lamb=FUSED, amp_C="")
    (site / "apex" / "optimizers" / "__init__.py").write_text("from apex.optimizers.fused_lamb import FusedLAMB\n")
    try:
        assert isinstance(optimizer.build(recipe("lamb"), model()), optimizer.Lamb)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        made: Any = optimizer.build(recipe("lamb"), model())
        assert type(made).__module__ == "apex.optimizers.fused_lamb"
        assert made.options["betas"] == (0.9, 0.95)
        assert made.options["eps"] == 1e-3
        assert made.options["max_grad_norm"] > 1e38  # the loop clips
        assert [group["weight_decay"] for group in made.param_groups] == [0.0, 0.1]
        assert {group["lr"] for group in made.param_groups} == {recipe("lamb").learning_rate}
    finally:
        forget()


# Groups


def clip_task(**changes: Any) -> tasks.Task:
    settings = replace(RECIPES["clip_tiny"](), **changes)
    return tasks.build(settings, {"tokenizer": data.Tokenizer.train(["a red circle"], 300).to_json()})


def test_only_weights_of_layers_decay() -> None:
    task = clip_task()
    groups = optimizer.parameter_groups(task, 0.3)
    names = {parameter: name for name, parameter in task.named_parameters()}
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.3]
    assert [group["lr_scale"] for group in groups] == [1.0, 1.0]
    free, decayed = (
        [names[parameter] for parameter in group["params"]]
        for group in sorted(groups, key=lambda group: group["weight_decay"])
    )
    assert sorted(decayed + free) == sorted(names.values())
    assert all(name.endswith("weight") for name in decayed)
    assert not [name for name in decayed if "norm" in name or "embed" in name.replace("patch_embed", "")]
    assert {"model.logit_scale", "model.vision.cls_token", "model.text.token_embedding.weight"} <= set(free)
    assert "model.vision.blocks.0.mlp.fc1.weight" in decayed


def lr_scales(module: nn.Module, layer_decay: float) -> dict[str, tuple[float, float]]:
    """(part of the learning rate, weight decay) of each parameter by name."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = optimizer.parameter_groups(module, 0.1, layer_decay)
    found = {names[p]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(names)
    return found


@pytest.mark.parametrize("task", ["mae", "tags", "clip"])
def test_layers_of_the_image_encoder_learn_more_slowly_the_lower_they_are(task: str) -> None:
    settings = RECIPES[f"{task}_tiny"]()
    module = clip_task() if task == "clip" else tasks.build(settings, {"tags": '["a", "b"]'})
    encoder = "model.vision." if task == "clip" else "model.encoder."
    depth = models.SIZES["tiny"].depth
    scales = {name: scale for name, (scale, _) in lr_scales(module, 0.5).items()}
    for name, scale in scales.items():
        inside, _, rest = name.partition(encoder)
        layer = depth + 1
        if not inside and rest.startswith("blocks."):
            layer = int(rest.split(".")[1]) + 1
        elif not inside and not rest.startswith("norm."):
            layer = 0
        assert scale == 0.5 ** (depth + 1 - layer), name
    assert scales[f"{encoder}pos_embed"] == scales[f"{encoder}patch_embed.proj.weight"] == 0.5**5
    assert scales[f"{encoder}blocks.0.mlp.fc1.weight"] == 0.5**4
    assert scales[f"{encoder}blocks.3.mlp.fc1.weight"] == 0.5
    assert scales[f"{encoder}norm.weight"] == 1.0


def test_layer_decay_is_that_of_timm() -> None:
    timm, groups_of = import_oracle("timm"), import_oracle("timm.optim").param_groups_layer_decay
    size = models.SIZES["tiny"]
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": size.width, "depth": size.depth, "num_heads": size.heads}
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=2, **shape)
    names = {parameter: name for name, parameter in theirs.named_parameters()}
    groups = groups_of(theirs, weight_decay=0.1, layer_decay=0.75)
    expected = {names[p]: group["lr_scale"] for group in groups for p in group["params"]}
    ours = {name: scale for name, (scale, _) in lr_scales(models.VisionTransformer(size), 0.75).items()}
    for name in list(expected):  # timm has the final norm learn with the last block, BEiT and MAE with the head
        if name.startswith(("norm.", "head.")):
            del expected[name]
    assert expected.keys() == {name for name in ours if not name.startswith(("norm.", "time_embed"))}
    assert {name: ours[name] for name in expected} == pytest.approx(expected)


def test_groups_are_few_and_the_same_on_the_meta_device() -> None:
    with torch.device("meta"):
        hollow = clip_task()
    for layer_decay, most in ((1.0, 2), (0.7, 2 * (models.SIZES["tiny"].depth + 2))):
        groups = [
            [(group["lr_scale"], group["weight_decay"], len(group["params"])) for group in made]
            for made in (optimizer.parameter_groups(task, 0.1, layer_decay) for task in (clip_task(), hollow))
        ]
        assert groups[0] == groups[1]
        assert len(groups[0]) <= most
