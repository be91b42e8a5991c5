"""Other codebases run on `xray.ops` without a change to their code.

    xray.patch.open_clip()                                                in a program, before or after its imports
    python -m xray.patch open_clip -m open_clip_train.main ARGUMENTS      around a module, or a script.py
    torchrun ... -m xray.patch open_clip -m open_clip_train.main ...      the same on many processes

A patch replaces the method of a library's class that computes, and leaves the class. Putting another class under the
library's names would miss every module that imported the name before, every instance made before and every subclass,
and would part `isinstance` and pickles of before from those of after. In place all of these follow, and `undo` is
exact.

What a patch does not reach: a bound method that was kept from before (`forward = loss.forward`); a repository's own
copy of the library's source; processes that the program starts by "spawn", unless they make the call, too.

Importing this module imports neither the library nor torch.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import inspect
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

Forward = Callable[..., Any]

_IN_FORCE: dict[type, tuple[Forward, Forward]] = {}
"""Patched classes: the `forward` that was put in, and the one that it replaced."""


class PatchError(RuntimeError):
    """The library is missing, or it is not the one that the patch was made for."""


@dataclass(frozen=True)
class Patch:
    """What was patched. As a context manager it undoes, at the end of the block, what its own call patched.

    Attributes:
        library: its name and version.
        classes: those whose `forward` is replaced.
        made_here: whether the call that returned this made the patch; otherwise it was in force already.
    """

    library: str
    classes: tuple[type, ...]
    made_here: bool

    def undo(self) -> None:
        """Give the classes their own methods back, whichever call patched them; nothing where that is done.

        Raises:
            PatchError: something else has replaced a patched method since, and would be lost.
        """
        patched = [one for one in self.classes if one in _IN_FORCE]
        for one in patched:
            if vars(one)["forward"] is not _IN_FORCE[one][0]:
                raise PatchError(f"{_name(one)}.forward was replaced again after xray.patch; undo that first")
        for one in patched:
            _, one.forward = _IN_FORCE.pop(one)  # type: ignore[attr-defined]

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.made_here:
            self.undo()

    def __str__(self) -> str:
        return f"{self.library}: {' and '.join(_name(one) for one in self.classes)} compute with xray.ops"


def open_clip() -> Patch:
    """open_clip's `ClipLoss` and `SigLipLoss` compute with `xray.ops`: the N x N logits are never held.

    So do `CoCaLoss` and other subclasses that call the `forward` of these. A subclass or an instance with its own
    `get_logits`, `get_ground_truth` or `_loss` keeps open_clip's code throughout, and so does `DistillClipLoss`, which
    needs the logits. Values and gradients are open_clip's in every mode, see `xray.ops.ClipLoss`; for half-precision
    features the loss is float32. Under `torch.autocast` the features are cast as autocast casts what it multiplies.
    A second call changes nothing.

    Raises:
        PatchError: open_clip is not installed, or its losses have other signatures than in 2.32.0 to 3.3.0, or
            something else has replaced methods of them.
        ValueError: at the first loss, `use_horovod`, or another setting that `xray.ops` refuses.
    """
    try:
        package = importlib.import_module("open_clip")
    except ModuleNotFoundError as error:
        if error.name != "open_clip":
            raise
        raise PatchError("open_clip is not installed: pip install open_clip_torch") from None
    from xray import ops

    library = f"open_clip {getattr(package, '__version__', 'of unknown version')}"
    source = importlib.import_module("open_clip.loss")
    classes, fresh = [], []
    for ours in (ops.ClipLoss, ops.SigLipLoss):
        theirs: Any = getattr(source, ours.__name__, None)
        if theirs is None or not _patched(theirs):
            _check(theirs, ours, source, f"{library}: {ours.__name__}", "those of open_clip 2.32.0 to 3.3.0")
            fresh.append((theirs, ours))
        classes.append(theirs)
    for theirs, ours in fresh:
        replace_forward(theirs, ours)
    return Patch(library, tuple(classes), bool(fresh))


LIBRARIES: dict[str, Callable[[], Patch]] = {"open_clip": open_clip}
"""What can be patched, by the name of its function here."""


def replace_forward(theirs: type, ours: type) -> None:
    """Let the `forward` of a contrastive loss, and of its subclasses, compute by `ours`, which has its signatures.

    Instances keep their settings in attributes named as the arguments of `ours`.
    """
    import torch

    original: Forward = theirs.forward  # type: ignore[attr-defined]
    parts = {name: function for name, function in _methods(theirs).items() if name not in ("__init__", "forward")}
    settings = tuple(inspect.signature(ours).parameters)

    # without its __module__, which says where to look for the code that runs
    @functools.wraps(original, assigned=("__name__", "__qualname__", "__doc__"))
    def forward(self: Any, image_features: Any, text_features: Any, *rest: Any, **named: Any) -> Any:
        if any(getattr(getattr(self, name), "__func__", None) is not function for name, function in parts.items()):
            return original(self, image_features, text_features, *rest, **named)
        # made anew each time, so that settings changed after construction count
        loss = ours(**{name: getattr(self, name) for name in settings})
        device = image_features.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            image_features, text_features = (
                features if features.dtype == torch.float64 else features.to(dtype)  # as autocast does
                for features in (image_features, text_features)
            )
        return loss(image_features, text_features, *rest, **named)

    theirs.forward = forward  # type: ignore[attr-defined]
    _IN_FORCE[theirs] = (forward, original)


def _patched(theirs: type) -> bool:
    return theirs in _IN_FORCE and vars(theirs)["forward"] is _IN_FORCE[theirs][0]


def _check(theirs: type | None, ours: type, source: ModuleType, name: str, known: str) -> None:
    """`theirs` has the signatures of `ours`, and its methods are those that its module `source` defines."""
    if theirs is None:
        raise PatchError(f"{name} does not exist; xray.patch knows {known}")
    for method in ("__init__", "forward"):
        found, needed = _signature(getattr(theirs, method)), _signature(getattr(ours, method))
        # what ours takes by keyword only is its own addition, with a default
        added = inspect.Parameter.KEYWORD_ONLY
        needed = needed.replace(parameters=[one for one in needed.parameters.values() if one.kind is not added])
        if found != needed:
            raise PatchError(f"{name}.{method} takes {found}; xray.patch knows {known}, which take {needed}")
    for method, function in _methods(theirs).items():
        if function.__globals__ is not vars(source):
            raise PatchError(f"{name}.{method} was replaced by {function.__module__}; undo that before xray.patch")


def _methods(one: type) -> dict[str, FunctionType]:
    return {name: value for name, value in vars(one).items() if isinstance(value, FunctionType)}


def _signature(function: Forward) -> inspect.Signature:
    """Names, kinds and defaults of the arguments."""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)


def _name(one: type) -> str:
    return f"{one.__module__}.{one.__qualname__}"


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m xray.patch LIBRARY [-m] SCRIPT ...`: patch, then run the script as `python [-m] SCRIPT ...` does.

    Args:
        arguments: what follows the program's name; None takes the process's own.
    """
    parser = argparse.ArgumentParser(
        prog="python -m xray.patch",
        allow_abbrev=False,
        description="Run a program whose library computes with xray.ops. No line of it changes.",
        epilog="examples:\n"
        "  python -m xray.patch open_clip -m open_clip_train.main --model ViT-B-32 ...\n"
        "  python -m xray.patch open_clip train.py --epochs 3\n"
        "  torchrun --nproc-per-node 8 -m xray.patch open_clip -m open_clip_train.main ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("library", choices=LIBRARIES, help="what to patch: %(choices)s")
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="a Python file, or a module with -m")
    parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help="arguments of the program")
    options = parser.parse_args(arguments)
    if options.module and not _module_exists(options.script):
        parser.error(f"there is no module {options.script!r}; a file goes without -m")
    if not options.module and not os.path.isfile(options.script):
        parser.error(f"there is no file {options.script!r}; a module goes with -m")
    sys.argv = [options.script, *options.rest]
    if not options.module and not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.abspath(options.script))  # so a library beside the script is patched
    try:
        patch = LIBRARIES[options.library]()
    except PatchError as error:
        parser.exit(2, f"error: {error}\n")
    if os.environ.get("RANK", "0") == "0":  # torchrun's
        print(f"xray.patch: {patch}", file=sys.stderr, flush=True)
    if options.module:
        runpy.run_module(options.script, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(options.script, run_name="__main__")


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:  # a package on the way to it
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        return False


if __name__ == "__main__":
    # `__main__` is another module than the xray.patch that programs import, and what is in force is noted once
    from xray.patch import main as run

    run()
