"""The house rules that can be checked: which layer imports which, file sizes, and the README's tree."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sorted(path for package in ("xray", "xray_kernels") for path in (ROOT / package).rglob("*.py"))

# what each layer may import of this project, besides itself
ALLOWED = {
    "xray_kernels": set(),
    "xray.ops": {"xray_kernels"},
    "xray.patch": {"xray.ops"},
    "xray.models": {"xray.ops"},
    "xray.data": set(),
    "xray.train": {"xray.models", "xray.data", "xray.ops"},
    "xray.evaluate": {"xray.models", "xray.data", "xray.ops", "xray.pages"},
    "xray.pages": set(),
    "xray.curate": {"xray.data", "xray.models", "xray.pages"},
    "xray.demo": {"xray.models", "xray.data", "xray.ops", "xray.train", "xray.evaluate", "xray.curate"},
    "xray.cli": {
        "xray.models",
        "xray.data",
        "xray.ops",
        "xray.train",
        "xray.evaluate",
        "xray.demo",
        "xray.curate",
        "xray_kernels",
    },
}


def layer_of(module: str) -> str:
    parts = module.split(".")
    return "xray_kernels" if parts[0] == "xray_kernels" else ".".join(parts[:2])


def imported_layers(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"xray.{a.name}" for a in node.names] if node.module == "xray" else [node.module or ""]
        else:
            continue
        found |= {layer_of(name) for name in names if name.split(".")[0] in ("xray", "xray_kernels")}
    return found - {"xray", "xray.__version__"}


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    layer = layer_of(module)
    if layer == "xray.__init__" or module.endswith(".__main__"):  # programs start at the top
        return
    assert imported_layers(path) - {layer} <= ALLOWED[layer]


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_files_are_of_a_readable_size() -> None:
    long = {str(p.relative_to(ROOT)): n for p in PYTHON if (n := len(p.read_text().splitlines())) > 450}
    assert not long


def test_no_paths_of_one_machine() -> None:
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml", ".cpp", ".h", ".cu", ".txt", ".json") and path.exists():
            found = re.search(r"/(?:root|home|work|tmp)/[a-z]", path.read_text())
            assert found is None, f"{path.relative_to(ROOT)} holds {found.group() if found else ''}"


def test_readme_tree_names_what_exists() -> None:
    """Every path of the README's annotated tree exists, and every package and csrc folder is in it."""
    readme = (ROOT / "README.md").read_text()
    block = next(b for b in re.findall(r"```text\n(.*?)```", readme, re.S) if "xray_kernels/" in b and "csrc/" in b)
    for name in re.findall(r"^\s*([\w./]+/|[\w.]+\.(?:py|md|toml|txt))\s", block, re.M):
        assert list(ROOT.glob(f"**/{name.rstrip('/')}")), f"the README's tree names {name}, which does not exist"
    for folder in (*(ROOT / "xray").iterdir(), *(ROOT / "xray_kernels").iterdir()):
        if folder.is_dir() and (folder / "__init__.py").exists():
            assert f"{folder.name}/" in block, f"the README's tree lacks {folder.name}/"
