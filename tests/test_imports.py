"""Imports go one way, files stay short, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import imgshared

ROOT = Path(imgshared.__file__).parent
LEVEL = {
    "types": 0,
    **dict.fromkeys(("config", "data", "models", "losses", "metrics"), 1),
    "methods": 2,
    "build": 3,
    "training": 4,
    "prediction": 5,  # opens a run: its folder, its checkpoint, its device
    "slides": 6,
    "evaluation": 6,
    "api": 7,
    "demo": 8,
    "cli": 9,
}
OF_TRAINING = {
    "imgshared.training." + name for name in ("checkpoint", "devices", "folder")
}  # all that prediction needs
MODULES = sorted(ROOT.rglob("*.py"))


def room(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path):
    """Every imgshared module that a file imports, wherever in the file, by its full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = [f"{node.module}.{name.name}" for name in node.names]
            is_package = (ROOT.parent / str(node.module).replace(".", "/")).is_dir()
            found |= set(inside) if is_package else {str(node.module)}
    return {name for name in found if name.split(".")[0] == "imgshared" and name != "imgshared"}


def faults(path, names):
    here = room(path)
    for name in names:
        there = name.split(".")[1]
        if there not in LEVEL or there == here:
            continue
        if LEVEL[there] >= LEVEL[here]:
            yield f"{path.relative_to(ROOT)} imports {name}"
        if here == "prediction" and there == "training" and name not in OF_TRAINING:
            yield f"{path.relative_to(ROOT)} imports {name}"


def test_every_room_has_its_level():
    assert {room(p) for p in MODULES} - {"__init__"} == set(LEVEL)


def test_imports_go_one_way():
    assert [f for p in MODULES if room(p) != "__init__" for f in faults(p, imported(p))] == []


@pytest.mark.parametrize(
    ("module", "name", "allowed"),
    [
        ("data/feed.py", "imgshared.models.latents", False),  # siblings
        ("losses.py", "imgshared.metrics", False),
        ("types.py", "imgshared.config", False),
        ("training/loop.py", "imgshared.prediction.run", False),
        ("prediction/run.py", "imgshared.training.loop", False),
        ("prediction/run.py", "imgshared.training.checkpoint", True),
        ("data/feed.py", "imgshared.data.store", True),
        ("methods/apollo.py", "imgshared.losses", True),
    ],
)
def test_the_rule_tells_right_from_wrong(module, name, allowed):
    assert (not list(faults(ROOT / module, [name]))) == allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_none_is_a_drawer_for_everything(path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")


@pytest.mark.parametrize("module", ["imgshared", "imgshared.cli"])
def test_the_command_line_starts_without_torch(module):
    heavy = ("torch", "anndata", "zarr", "sklearn", "skimage", "timm", "matplotlib")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_offers_its_verbs():
    for name in imgshared.__all__:
        assert callable(getattr(imgshared, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = imgshared.nothing
