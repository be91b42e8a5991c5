"""The README's code runs, its commands exist, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from xray.train import RECIPES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_code_runs_and_keeps_its_promise() -> None:
    (code,) = blocks("python")
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    assert names["x"].shape == (2, 140, 768)
    assert "# (2, 140, 768)" in code


def test_recipes_of_the_commands_exist() -> None:
    words = [shlex.split(line, comments=True) for line in "".join(blocks("sh")).replace("\\\n", " ").splitlines()]
    recipes = {line[line.index("train") + 1] for line in words if "train" in line}
    assert {name for name in recipes if not name.startswith("-")} <= set(RECIPES)
    assert len(recipes) > 3


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / target).exists(), f"{name} links to {target}"


def test_files_named_in_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:csrc|xray_kernels|xray|tests|bench|\.ci)/[\w./<>]*)`", text)
    assert len(named) > 10
    for path in named:
        assert (ROOT / path.replace("<op>", "token_reorganize").replace("<device>/", "")).exists(), path


def test_make_targets_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for name in DOCUMENTS:
        for target in re.findall(r"(?:^|`)make (\w+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE):
            assert target in targets, f"{name}: make {target}"
