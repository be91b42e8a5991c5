"""The command line: `xray demo | data | train | export | eval`.

Settings are written key=value, as in `xray train clip_tiny steps=200 out=runs/try`. Each command imports
what it needs when it runs, so `xray --help` answers at once. A mistake in what was asked for ends in one
line, "error: ...", and exit status 2; Ctrl-C in 128 + the signal's number; a training run that
SIGTERM has ended, saved, in 0.
"""

import argparse
import difflib
import inspect
import json
import os
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xray

MISTAKE = 2
INTERRUPTED = 130


class UsageError(ValueError):
    """The command line asks for something that does not exist, or lacks something."""


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line raises UsageError instead of printing the whole usage."""

    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def program(*command: str) -> typing.NoReturn:
    """The `xray` program: `main` on `command` and the process's own arguments, and the end of the process."""
    status = main([*command, *sys.argv[1:]])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Meshes that torch caches keep gloo's threads alive. One that lets go of its last tensor while the
        # interpreter shuts down aborts the process, so there is no shutdown: multiprocessing ends so, too.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 2 a mistake of the user's, 128 + n ended by
    signal n.

    Args:
        arguments: what follows the program's name; None takes the process's own.
    """
    # OpenMP reads this when torch is loaded, which no command has done yet. Threads that wait for the next loop spin
    # for long, which starves other processes; asleep at once, they cost a third of the speed to wake. The demo's
    # training on 2 cores, images/s: asleep 117, this many turns 159, spinning 149; beside two busy processes asleep 71,
    # this 66.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    words = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        return _run(words)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if traceback:
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return MISTAKE


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _run(words: list[str]) -> int:
    parser, commands = _parser()
    if words and not words[0].startswith("-") and words[0] not in commands:
        near = difflib.get_close_matches(words[0], commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(commands)}"
        raise UsageError(f"there is no command {words[0]!r}; {hint}")
    options, rest = parser.parse_known_args(words)
    if rest:
        # argparse loses settings that come after an option.
        if not hasattr(options, "settings") or any(word.startswith("-") or "=" not in word for word in rest):
            raise UsageError(f"{rest[0]!r} is not understood here; see `xray {words[0]} --help`")
        options.settings += rest
    if not hasattr(options, "command"):
        parser.print_help()
        return 0
    return int(options.command(options) or 0)


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    parser = _Parser(
        prog="xray",
        description="Vision models that prune tokens, learned from image-text and video-hashtag pairs.",
        epilog="Settings are written key=value. --traceback shows where an error comes from.",
    )
    parser.add_argument("--version", action="version", version=f"xray {xray.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    demo = commands.add_parser("demo", help="fetch data, train the three stages, evaluate, write a report")
    _settings(demo, "out=runs/demo and others")
    demo.set_defaults(command=_demo)

    data = commands.add_parser("data", help="fetch public sets, pack a folder into shards, generate shapes")
    data.set_defaults(command=lambda options: data.print_help())
    actions = data.add_subparsers(metavar="ACTION", parser_class=_Parser)
    fetch = actions.add_parser("fetch", help="download public sets into the cache")
    fetch.add_argument("words", nargs="*", metavar="NAME", help="sets to fetch, and settings such as cache=DIR")
    fetch.set_defaults(command=_fetch)
    pack = actions.add_parser("pack", help="pack a folder of captioned images and clips into a dataset")
    pack.add_argument(
        "source",
        metavar="DIR",
        help="media files and their metadata.csv or metadata.jsonl",
    )
    pack.add_argument("out", metavar="OUT", help="the dataset folder to make")
    _settings(pack, "max_side=256 max_frames=16 seed=0 and others")
    pack.set_defaults(command=_pack)
    generate = actions.add_parser("generate", help="make the set of coloured shapes")
    generate.add_argument("out", metavar="OUT", help="the dataset folder to make")
    _settings(generate, "size=600 seed=0 image_size=32 num_frames=4")
    generate.set_defaults(command=_generate)

    curate = commands.add_parser(
        "curate",
        help="make dirty pairs and tagged clips into clean, balanced shards",
        description="Curate SOURCE (a Parquet, CSV or JSONL table, WebDataset shards, or a folder; a path or URL) into "
        "the dataset folder OUT, and print what every step did. A run that was stopped goes on when it is started "
        "again; other settings compute anew only what they change.",
        epilog="`xray curate explain ID OUT` tells one sample's story. A source of that name is ./explain.",
    )
    curate.add_argument("source", nargs="?", metavar="SOURCE", help="what to curate, or the word explain")
    curate.add_argument("out", nargs="?", metavar="OUT", help="the dataset folder to make or to go on with")
    _settings(curate, "columns=caption=text,url=link seed=0 engine=ray balance=tags and all others that --show names")
    curate.add_argument("--steps", action="store_true", help="list the steps")
    curate.add_argument("--show", action="store_true", help="print the settings and do not curate")
    curate.set_defaults(command=_curate)

    train = commands.add_parser(
        "train",
        help="train a recipe",
        description="Train a recipe. The run's folder gets metrics.jsonl, checkpoints and model.safetensors.",
        epilog="Ctrl-C and SIGTERM save a checkpoint, resume=latest goes on. On several GPUs: torchrun -m xray.train",
    )
    train.add_argument("recipe", nargs="?", metavar="RECIPE", help="see --list")
    _settings(train, "out=DIR steps=N seed=S init=CHECKPOINT resume=latest and all others that --show names")
    train.add_argument("--list", action="store_true", help="list the recipes")
    train.add_argument("--show", action="store_true", help="print the recipe's settings and do not train")
    train.add_argument("--dry-run", action="store_true", help="print sizes, costs, memory and shards and do not train")
    train.add_argument("--ranks", type=int, metavar="N", help="processes that --dry-run plans for")
    train.set_defaults(command=_train)

    export = commands.add_parser("export", help="write a run's weights, or a checkpoint's, as one safetensors file")
    export.add_argument("source", metavar="RUN", help="a run's folder, or one of its checkpoints")
    export.add_argument("out", metavar="OUT", help="the file to write")
    _settings(export, "step=N (default: the last), timm=true for the image encoder under timm's names")
    export.set_defaults(command=_export)

    evaluate = commands.add_parser("eval", help="evaluate a trained model on held-out data")
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="a model.safetensors, or the folder of its run")
    _settings(evaluate, "data=DIR (default: what the run was trained on), json=FILE, batch_size=64 and others")
    evaluate.set_defaults(command=_evaluate)
    return parser, list(commands.choices)


def _settings(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("settings", nargs="*", default=[], metavar="key=value", help=text)


def _curate(options: argparse.Namespace) -> int:
    from xray import curate
    from xray.curate import ledger, pipeline
    from xray.data.shards import INDEX

    if options.steps:
        for step in curate.STEPS:
            purpose = (step.run.__doc__ or "").splitlines()[0]
            print(textwrap.fill(purpose, 100, initial_indent=f"{step.name:18}", subsequent_indent=" " * 18))
        return 0
    if options.source == "explain" and _asks_to_explain(options):
        print(curate.explain(options.out, options.settings[0]))
        return 0
    pairs = options.settings
    if options.show:  # neither SOURCE nor OUT is needed: a setting may stand in their place
        pairs = [word for word in (options.source, options.out, *pairs) if word is not None and "=" in word]
    settings = curate.Settings(**_keywords(curate.Settings, _pairs(pairs), ()))
    if options.show:
        _show(vars(settings))
        return 0
    if options.out is None:
        raise UsageError("curate needs SOURCE and OUT; see `xray curate --help`")
    done = curate.curate(options.source, options.out, settings)
    print(done, ledger.account(done.out), done.out / INDEX, done.out / pipeline.CARD, sep="\n")
    return 0


def _asks_to_explain(options: argparse.Namespace) -> bool:
    """Whether "explain" is followed by an id and a folder, or else is a source of that name."""
    if len(options.settings) == 1 and ("=" not in options.settings[0] or Path(options.settings[0]).is_dir()):
        return True
    if Path(options.source).exists():
        return False
    raise UsageError("explain needs an id and the folder of a curation: xray curate explain ID OUT")


def _train(options: argparse.Namespace) -> int:
    from xray import train

    if options.list or options.recipe is None:
        print(recipe_table())
        return 0
    recipe = train.recipe_for(options.recipe, options.settings)
    if options.ranks is not None and (options.ranks < 1 or not options.dry_run):
        raise UsageError("--ranks N, at least 1, goes with --dry-run: torchrun decides how many processes train")
    if options.dry_run:
        from xray.train import plan

        print(plan.describe(recipe, options.ranks or _world_size()))
        return 0
    train.validate(recipe)
    if options.show:
        _show(vars(recipe))
        return 0
    try:
        out = train.run(recipe)
    except train.Stopped as stopped:
        if _is_first():
            print(stopped, file=sys.stderr)
        # A scheduler that ends a job gracefully by SIGTERM is to see that it ended well.
        return 0 if stopped.signal_number == signal.SIGTERM else 128 + stopped.signal_number
    if _is_first():
        print(out / "model.safetensors")
    return 0


def _show(settings: Mapping[str, Any]) -> None:
    """Print settings as they can be given again."""
    for key, value in settings.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        print(f"{key}={text.lower() if isinstance(value, bool) else text}")


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _export(options: argparse.Namespace) -> int:
    from xray.train.export import export

    print(export(options.source, options.out, **_keywords(export, _pairs(options.settings), ("source", "out"))))
    return 0


def recipe_table() -> str:
    """The recipes, a line each: name, size, input, length, and what they are for."""
    from xray.train import RECIPES

    rows = [("recipe", "model", "pixels", "steps", "batch", "")]
    for name, function in RECIPES.items():
        recipe = function()
        purpose = (function.__doc__ or "").split("\n")[0]
        numbers = (str(recipe.image_size), f"{recipe.steps:,}", f"{recipe.batch_size:,}")
        rows.append((name, recipe.model, *numbers, purpose))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(row[2:5], widths[2:], strict=True)]
        lines.append("  ".join([*cells, row[5]]).rstrip())
    return "\n".join(lines)


def _evaluate(options: argparse.Namespace) -> int:
    settings = _pairs(options.settings)
    written = settings.pop("json", "")
    dataset = settings.pop("data", "") or _training_data(Path(options.checkpoint))
    from xray.evaluate import evaluate_checkpoint

    keywords = _keywords(evaluate_checkpoint, settings, ("checkpoint", "dataset"), ("data", "json"))
    result = evaluate_checkpoint(options.checkpoint, dataset, **keywords)
    print(result_table(result))
    if written:
        Path(written).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _training_data(checkpoint: Path) -> str:
    """The dataset folder that a run was trained on, from the recipe.json beside its model."""
    run = checkpoint if checkpoint.is_dir() else checkpoint.parent
    try:
        data = str(json.loads((run / "recipe.json").read_text(encoding="utf-8"))["data"])
    except (OSError, ValueError, KeyError, TypeError):
        if not checkpoint.exists():
            raise UsageError(f"the checkpoint {checkpoint} does not exist") from None
        raise UsageError(f"{run} does not say what data it was trained on: give data=DIR") from None
    if data != "generated":
        return data.split(",")[0].strip()
    made = sorted(run.glob("generated-*"))
    if not made:
        raise UsageError(f"the generated set is no longer in {run}: give data=DIR, made by `xray data generate DIR`")
    return str(made[-1])


def result_table(result: Mapping[str, Any], indent: str = "") -> str:
    """Numbers of nested dictionaries, one a line and aligned; a list shows how long it is."""
    lines = []
    plain = {key: value for key, value in result.items() if not isinstance(value, Mapping)}
    width = max((len(key) for key in plain), default=0)
    for key, value in plain.items():
        if isinstance(value, float):
            text = f"{value:.4g}"
        else:
            text = f"{len(value)} entries" if isinstance(value, list) else str(value)
        lines.append(f"{indent}{key.ljust(width)}  {text}")
    for key, value in result.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}", result_table(value, indent + "  ")]
    return "\n".join(lines)


def _demo(options: argparse.Namespace) -> int:
    settings = _pairs(options.settings)
    from xray import demo

    out = Path(settings.pop("out", "runs/demo"))
    demo.run(out, **_keywords(demo.run, settings, ("out",), ("out",)))
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from xray import data

    names = [word for word in options.words if "=" not in word]
    if not names:
        raise UsageError(f"fetch needs one or more names: {', '.join(data.SOURCES)}")
    settings = _pairs(word for word in options.words if "=" in word)
    keywords = _keywords(data.fetch, settings, ("name",))
    missing = []
    for name in sorted(names, key=lambda name: name in data.SOURCES):  # mistakes before downloads
        try:
            print(f"{name}: {data.fetch(name, **keywords)}")
        except data.SourceUnavailable as error:
            missing.append(name)
            print(f"{name}: {error}", file=sys.stderr)
    return MISTAKE if missing else 0


def _pack(options: argparse.Namespace) -> int:
    from xray import data

    keywords = _keywords(data.pack, _pairs(options.settings), ("source_dir", "out"))
    print(data.pack(options.source, options.out, **keywords))
    return 0


def _generate(options: argparse.Namespace) -> int:
    from xray import data

    print(data.generated(options.out, **_keywords(data.generated, _pairs(options.settings), ("root",))))
    return 0


def _pairs(arguments: Iterable[str]) -> dict[str, str]:
    """ "key=value" words as a dictionary of strings."""
    pairs = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise UsageError(f"{argument!r} is not a setting: write key=value")
        pairs[key] = text
    return pairs


def _keywords(
    function: Callable[..., Any], settings: Mapping[str, str], given: Sequence[str], also: Sequence[str] = ()
) -> dict[str, Any]:
    """Settings as keyword arguments of a function, converted to the types of its annotations.

    Args:
        function: what will be called.
        settings: strings by name.
        given: parameters that the command fills itself.
        also: further settings of the command, for suggestions.
    """
    hints = typing.get_type_hints(function)
    known = [name for name in inspect.signature(function).parameters if name not in given and _kinds(hints.get(name))]
    keywords: dict[str, Any] = {}
    for key, text in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *also], n=1)
            hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join([*also, *known])}"
            raise UsageError(f"there is no setting {key!r}; {hint}")
        keywords[key] = _value(key, text, _kinds(hints[key]))
    return keywords


_READABLE = (bool, int, float, Path, str, type(None))


def _kinds(hint: Any) -> list[type]:
    """The types of an annotation that can be read from a word, narrowest first."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if union else (hint,)
    kinds = [kind for kind in _READABLE if kind in members]
    return kinds if kinds != [type(None)] else []


def _value(key: str, text: str, kinds: Sequence[type]) -> Any:
    from xray.train.overrides import WORDS

    if type(None) in kinds and text.lower() == "none":
        return None
    for kind in kinds:
        try:
            if kind is bool:
                return WORDS[text.lower()]
            return kind(text)
        except (ValueError, KeyError, TypeError):
            continue
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    raise UsageError(f"{key} is {text!r} and must be {' or '.join(names.get(kind, 'none') for kind in kinds)}")
