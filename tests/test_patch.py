"""`xray.patch`: open_clip's own code with our losses gives its losses and gradients, and gets its own back."""

from __future__ import annotations

import functools
import os
import pickle
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracles import import_oracle
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xray
from xray import ops, patch
from xray_kernels.testing import assert_within_rule

ROWS = 12
ARGUMENTS = {
    "model": "ViT-B-32",
    "distill": False,
    "siglip": False,
    "horovod": False,
    "local_loss": True,
    "gather_with_grad": True,
    "rank": 0,
    "world_size": 1,
    "loss_dist_impl": None,
    "coca_caption_loss_weight": 2.0,
    "coca_contrastive_loss_weight": 0.5,
}
"""What `open_clip.create_loss` reads of open_clip_train's command line."""


@pytest.fixture
def library() -> Iterator[Any]:
    """open_clip, unpatched before and after."""
    package = import_oracle("open_clip")
    losses = (package.loss.ClipLoss, package.loss.SigLipLoss)
    before = [dict(vars(loss)) for loss in losses]
    yield package
    for loss, own in zip(losses, before, strict=True):
        if loss in patch._IN_FORCE:
            patch.Patch("", (loss,), True).undo()
        assert dict(vars(loss)) == own


def create_loss(library: Any, **changes: Any) -> Any:
    return library.create_loss(SimpleNamespace(**{**ARGUMENTS, **changes}))


def features(**options: Any) -> dict[str, Any]:
    """What an open_clip model returns: features of 12 pairs, and the scale."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, ROWS, 8, generator=generator, dtype=torch.float64)
    normalize = torch.nn.functional.normalize
    return {
        "image_features": normalize(image, dim=1),
        "text_features": normalize(image + text, dim=1),
        "logit_scale": torch.tensor(9.0, dtype=torch.float64),
        **options,
    }


class Recorded(TorchDispatchMode):
    """The operators called inside, and whether one of them made N x N numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.square = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.names.add(function.name())
        self.square |= isinstance(result, Tensor) and result.shape == (ROWS, ROWS)
        return result


def computes_with_xray(loss: Any, **options: Any) -> bool:
    """Whether a call of the loss runs our operators and not open_clip's products; it must be one or the other."""
    with Recorded() as recorded:
        loss(**features(**options))
    ours = any(name.startswith("xray_kernels::") for name in recorded.names)
    assert recorded.square is not ours
    return ours


def train_step(
    library: Any, siglip: bool, dtype: torch.dtype, *, amp: bool = False, exact: bool = False
) -> dict[str, Tensor]:
    """One step as open_clip_train takes it: the loss, and the gradient of every parameter of a small CLIP.

    `exact` computes the loss, and it alone, in float64 from what the towers found.
    """
    torch.manual_seed(0)
    model = library.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
        text_cfg={"context_length": 8, "vocab_size": 50, "layers": 1, "width": 32, "heads": 2},
        init_logit_bias=-3.0 if siglip else None,
        output_dict=True,
    ).to(dtype)
    images, texts = torch.randn(ROWS, 3, 16, 16), torch.randint(1, 50, (ROWS, 8))
    loss = create_loss(library, siglip=siglip)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = model(images.to(dtype), texts)
        if exact:
            out = {name: value.double() for name, value in out.items()}
        losses = loss(**out, output_dict=True)
        total = sum(losses.values())
    assert losses.keys() == {"contrastive_loss"}
    total.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ("logit_bias" in grads) is siglip
    return {"loss": total.detach(), **grads}


BOTH = pytest.mark.parametrize("siglip", [False, True], ids=["clip", "siglip"])


@BOTH
def test_training_step_is_the_same(library: Any, siglip: bool) -> None:
    """In float64 to rounding, and in float32 by the rule, open_clip's own error being the yardstick."""
    before, single = (train_step(library, siglip, dtype) for dtype in (torch.float64, torch.float32))
    with patch.open_clip():
        after, ours = (train_step(library, siglip, dtype) for dtype in (torch.float64, torch.float32))
    assert all(value.abs().max() > 0 for value in before.values())
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-13)
    assert_within_rule(ours, single, before, what="float32")


@BOTH
def test_training_step_in_mixed_precision(library: Any, siglip: bool) -> None:
    """By the rule, against the float64 loss of the same towers: their own rounding would drown that of the losses."""
    exact = train_step(library, siglip, torch.float32, amp=True, exact=True)
    before = train_step(library, siglip, torch.float32, amp=True)
    with patch.open_clip():
        after = train_step(library, siglip, torch.float32, amp=True)
    assert_within_rule(after, before, exact, what="amp")
    assert after["loss"].dtype == torch.float32
    assert (before["loss"] - exact["loss"]).abs() > 1e-4 > 100 * (after["loss"] - exact["loss"]).abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_casts_features_as_it_casts_matrix_products(library: Any, dtype: torch.dtype) -> None:
    """Towers of two dtypes meet in autocast's; float64 stays."""
    inputs = features()
    image, text = inputs["image_features"].to(dtype), inputs["text_features"].to(dtype)
    half = dtype == torch.float32
    expected = ops.clip_loss(image.bfloat16(), text.bfloat16(), 9.0) if half else ops.clip_loss(image, text, 9.0)
    with patch.open_clip(), torch.autocast("cpu", torch.bfloat16):
        loss = library.ClipLoss()(image, text.bfloat16() if half else text, 9.0)
    assert torch.equal(loss, expected)


def test_every_name_and_instance_follows(library: Any) -> None:
    """Bound or made before or after: all are one class, which stays itself for isinstance, pickles and subclasses."""
    old = create_loss(library), library.loss.SigLipLoss()
    stored = pickle.dumps(old)
    with patch.open_clip() as made:
        assert str(made).startswith("open_clip ")
        new = create_loss(library), create_loss(library, siglip=True)
        losses = (*old, *new, *pickle.loads(stored), *pickle.loads(pickle.dumps(new)))
        for number, loss in enumerate(losses):
            assert type(loss) is (library.loss.SigLipLoss if number % 2 else library.ClipLoss)
            assert computes_with_xray(loss, logit_bias=-2.0)
            assert type(loss).forward.__module__ == "xray.patch"
    assert not any(computes_with_xray(loss, logit_bias=-2.0) for loss in losses)


def test_other_losses_of_open_clip(library: Any) -> None:
    """CoCaLoss calls ClipLoss.forward and so runs our op; DistillClipLoss needs the logits and stays as it was."""
    generator = torch.Generator().manual_seed(1)
    captions = {
        "logits": torch.randn(2, 5, 7, generator=generator, dtype=torch.float64),
        "labels": torch.randint(1, 7, (2, 5), generator=generator),
    }
    teacher = {f"dist_{name}": value.flip(0) if value.ndim else value for name, value in features().items()}
    coca, distill = create_loss(library, model="coca_ViT-B-32"), create_loss(library, distill=True)
    before = coca(**features(**captions), output_dict=True), distill(**features(**teacher), output_dict=True)
    with patch.open_clip():
        after = coca(**features(**captions), output_dict=True), distill(**features(**teacher), output_dict=True)
        assert computes_with_xray(coca, **captions)
        assert not computes_with_xray(distill, **teacher)
    assert after[0].keys() == {"contrastive_loss", "caption_loss"}
    torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=0)
    assert after[1] == before[1]


def test_overridden_parts_are_used(library: Any) -> None:
    """A subclass, an instance or a later patch that changes a step of open_clip's forward gets that forward."""

    class Smoothed(library.ClipLoss):
        def get_logits(self, *inputs: Any, **named: Any) -> Any:
            return tuple(logits / 2 for logits in super().get_logits(*inputs, **named))

    class Renamed(library.ClipLoss):
        def describe(self) -> str:
            return "no part of forward"

    by_instance = library.loss.SigLipLoss()
    by_instance._loss = lambda image, *rest, **named: image.sum()
    halved = features(logit_scale=features()["logit_scale"] / 2)
    with patch.open_clip(), pytest.MonkeyPatch.context() as later:
        torch.testing.assert_close(Smoothed()(**features()), library.ClipLoss()(**halved))
        assert not computes_with_xray(Smoothed())
        assert computes_with_xray(Renamed())
        assert by_instance(**features(), logit_bias=0.0) == features()["image_features"].sum()
        later.setattr(library.ClipLoss, "get_ground_truth", lambda self, device, count: torch.zeros(count).long())
        assert not computes_with_xray(library.ClipLoss())


def test_settings_reach_our_modules(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are at the call; what they do over ranks is in test_contrastive_loss_ranks."""
    given: list[dict[str, Any]] = []
    with patch.open_clip():
        for module in (ops.ClipLoss, ops.SigLipLoss):
            monkeypatch.setattr(module, "forward", lambda self, *inputs, **named: given.append(dict(vars(self))))
        clip = create_loss(library, local_loss=False, gather_with_grad=True, rank=1, world_size=3)
        clip.local_loss = True
        clip(**features())
        create_loss(library, siglip=True, rank=2, world_size=3, loss_dist_impl="gather")(**features(), logit_bias=0.0)
    clip_settings, siglip_settings = (
        {name: value for name, value in one.items() if name in ARGUMENTS} for one in given
    )
    assert clip_settings == {"local_loss": True, "gather_with_grad": True, "rank": 1, "world_size": 3}
    assert siglip_settings == {"rank": 2, "world_size": 3}
    assert given[1]["dist_impl"] == "gather"


def test_horovod_is_refused(library: Any) -> None:
    loss = create_loss(library, horovod=True)
    with patch.open_clip(), pytest.raises(ValueError, match="use_horovod must be False: ranks talk through"):
        loss(**features())


def test_calls_nest_and_undo_is_exact(library: Any) -> None:
    own = library.ClipLoss.forward
    outer = patch.open_clip()
    ours = library.ClipLoss.forward
    assert outer.made_here
    with patch.open_clip() as inner:
        assert not inner.made_here
        assert library.ClipLoss.forward is ours
    assert library.ClipLoss.forward is ours, "a block must not undo what was in force before it"
    patch.open_clip().undo()
    assert library.ClipLoss.forward is own
    outer.undo()
    with pytest.raises(KeyError), patch.open_clip():
        raise KeyError
    assert library.ClipLoss.forward is own


def test_undo_keeps_what_others_put_on_top(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = patch.open_clip()
    both = library.ClipLoss.forward, library.loss.SigLipLoss.forward
    monkeypatch.setattr(library.loss.SigLipLoss, "forward", functools.wraps(both[1])(lambda self: None))
    with pytest.raises(patch.PatchError, match=r"open_clip.loss.SigLipLoss.forward was replaced again"):
        made.undo()
    assert library.ClipLoss.forward is both[0], "undone in part"
    monkeypatch.undo()
    made.undo()


def forward_of_old(self: Any, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> None: ...


def test_unknown_losses_are_refused(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other signatures, a class that is missing, methods that others replaced: an error, and nothing is patched."""
    own = library.ClipLoss.forward
    with monkeypatch.context() as changed:
        changed.setattr(library.loss.SigLipLoss, "forward", forward_of_old)
        changed.setattr(library, "__version__", "9.9")
        sentence = (
            r"open_clip 9\.9: SigLipLoss.forward takes \(self, image_features, text_features, logit_scale\); "
            r"xray.patch knows those of open_clip 2\.32\.0 to 3\.3\.0, which take .*logit_bias, output_dict=False\)"
        )
        with pytest.raises(patch.PatchError, match=sentence):
            patch.open_clip()
    with monkeypatch.context() as changed:
        changed.setattr(library.loss.SigLipLoss.__init__, "__defaults__", (False, 0, 1, "shift"))
        with pytest.raises(patch.PatchError, match=r"SigLipLoss.__init__ takes \(self, .*, dist_impl='shift'\); xray"):
            patch.open_clip()
    with monkeypatch.context() as changed:
        changed.delattr(library.loss, "SigLipLoss")
        with pytest.raises(patch.PatchError, match=r"SigLipLoss does not exist; xray.patch knows"):
            patch.open_clip()
    with monkeypatch.context() as changed:
        wrapper = functools.wraps(own)(lambda *inputs, **named: own(*inputs, **named))
        changed.setattr(library.loss.ClipLoss, "forward", wrapper)
        with pytest.raises(patch.PatchError, match=r"ClipLoss.forward was replaced by open_clip.loss; undo"):
            patch.open_clip()
    assert library.ClipLoss.forward is own
    assert not patch._IN_FORCE


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(patch.PatchError, match="open_clip is not installed: pip install open_clip_torch"):
        patch.open_clip()
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit) as end:
        patch.main(["open_clip", __file__])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: open_clip is not installed: pip install open_clip_torch\n"


SCRIPT = '''
"""A training script as open_clip's users write it."""
import sys
from argparse import Namespace

import torch
from helper import HELPED
from open_clip import CLIP, create_loss

torch.manual_seed(0)
model = CLIP(
    embed_dim=16,
    vision_cfg={"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
    text_cfg={"context_length": 8, "vocab_size": 50, "layers": 1, "width": 32, "heads": 2},
    output_dict=True,
)
args = Namespace(model="tiny", distill=False, siglip=False, horovod=False)
args.local_loss = args.gather_with_grad = "--local" in sys.argv
args.rank, args.world_size = 0, 1
loss = create_loss(args)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
images, texts = torch.randn(12, 3, 16, 16), torch.randint(1, 50, (12, 8))
if __name__ == "__main__":
    for step in range(3):
        optimizer.zero_grad()
        losses = loss(**model(images, texts), output_dict=True)
        sum(losses.values()).backward()
        optimizer.step()
        print(losses["contrastive_loss"].item())
    print(type(loss).__module__, loss.forward.__module__, *sys.argv)
'''


def run_patched(*arguments: str, folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """`python -m xray.patch open_clip ...` in a process of its own, where open_clip imports without torchvision."""
    (site / "sitecustomize.py").write_text('from oracles import import_oracle\n\nimport_oracle("open_clip")\n')
    places = (site, Path(__file__).parent, Path(xray.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "xray.patch", "open_clip", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))},
        capture_output=True,
        text=True,
    )


def test_unmodified_script_trains_alike(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process without the patch and in its own with it: the same losses, and ours ran in the second."""
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    (folder / "helper.py").write_text("HELPED = True\n")
    words = ["../project/train.py", "--local", "-m", "--help"]
    with monkeypatch.context() as changed:
        changed.chdir(elsewhere)
        changed.setattr(sys, "argv", words)
        changed.syspath_prepend(folder)
        runpy.run_path(words[0], run_name="__main__")
    *alone, facts = capsys.readouterr().out.splitlines()
    assert facts == "open_clip.loss open_clip.loss ../project/train.py --local -m --help"

    done = run_patched(*words, folder=elsewhere, site=tmp_path)
    assert done.returncode == 0, done.stderr
    *patched, facts = done.stdout.splitlines()
    assert facts == "open_clip.loss xray.patch ../project/train.py --local -m --help"
    assert "xray.patch: open_clip " in done.stderr
    torch.testing.assert_close([float(x) for x in patched], [float(x) for x in alone], rtol=1e-5, atol=0)
    assert len({*alone}) == len(alone) == 3


def test_modules_run_as_python_runs_them(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: the name and the arguments that the module sees, and one line about the patch, from rank 0."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").touch()
    (tmp_path / "recipes" / "clip.py").write_text(
        "import sys, pickle\nfrom open_clip.loss import ClipLoss\n\nclass Mine:\n    pass\n\n"
        "pickle.loads(pickle.dumps(Mine()))\n"
        "print(__name__, __spec__.name, ClipLoss.forward.__module__, sys.argv[1:])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(sys, "argv", ["before"])
        patch.main(["open_clip", "-m", "recipes.clip", "--lr", "1", "--help"])
        printed, said = capsys.readouterr()
        assert printed == "__main__ recipes.clip xray.patch ['--lr', '1', '--help']\n"
        assert ("xray.patch: open_clip" in said) is (rank == "0")
    patch.open_clip().undo()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: library, SCRIPT"),
        ("open_clap train.py", "invalid choice: 'open_clap'"),
        ("open_clip", "required: SCRIPT"),
        ("open_clip nowhere.py", "there is no file 'nowhere.py'; a module goes with -m"),
        ("open_clip -m nowhere", "there is no module 'nowhere'; a file goes without -m"),
        ("open_clip -m xray.nowhere.train", "there is no module 'xray.nowhere.train'"),
    ],
)
def test_wrong_command_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        patch.main(words.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_import_and_help_are_lean() -> None:
    code = (
        "import sys, xray.patch\n"
        "try:\n    xray.patch.main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print(*[name for name in ('torch', 'open_clip', 'timm', 'numpy', 'xray.ops') if name in sys.modules])"
    )
    root = Path(xray.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    *shown, heavy = done.stdout.splitlines()
    assert heavy == ""
    assert "torchrun --nproc-per-node 8 -m xray.patch open_clip -m open_clip_train.main" in "\n".join(shown)
