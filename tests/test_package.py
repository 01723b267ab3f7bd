"""The package as a whole: what is in the wheel, what importing it does, and who may import whom."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "memseg"
SHARED = {"errors", "files", "levels", "units"}
"""What every folder may import."""
AT_THE_TOP = {"api.py": {"planning", "profiling", "reports"}, "__init__.py": {"api"}}
"""What single files may import beside that."""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def test_the_wheel_holds_profiles_recipes_and_the_mark_of_types(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("profiles", "recipes"):
        shipped = {f"memseg/{folder}/{path.name}" for path in (ROOT / folder).glob("*.toml")}
        assert shipped, folder
        assert shipped <= names
    assert {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")} | {"memseg/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_importing_memseg_loads_nothing_else():
    done = python("import sys; before = {*sys.modules}; import memseg; print({*sys.modules} - before)")
    assert done.stdout == "{'memseg'}\n", done.stderr


def test_planning_loads_no_torch():
    done = python("import sys, memseg.planning; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def may_import() -> dict[str, set[str]]:
    """What each folder may import, from the table in docs/architecture.md."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `memseg/(\w+)` \| .+? \|(.*)\|$", page, re.MULTILINE)
    return {folder: set(re.findall(r"`(\w+)`", cell)) for folder, cell in rows}


def imported(path: Path) -> set[str]:
    """The parts of memseg that a file imports anywhere in it, also inside functions and for type checkers only."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("memseg.")}


def test_imports_point_one_way():
    allowed = may_import()
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(allowed) == folders
    wrong = [
        f"{path.relative_to(ROOT)} imports memseg.{name}"
        for folder in sorted(folders - {"cli"})
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for name in sorted(imported(path) - allowed[folder] - SHARED - {folder})
    ]
    wrong += [
        f"{path.relative_to(ROOT)} imports memseg.{name}"
        for path in sorted(PACKAGE.glob("*.py"))
        for name in sorted(imported(path) - SHARED - AT_THE_TOP.get(path.name, set()))
    ]
    assert wrong == []


def test_no_folder_imports_one_that_imports_it():
    allowed = may_import()
    placed: set[str] = SHARED | {"resources"}
    waiting = {folder: names for folder, names in allowed.items() if folder != "cli"}
    while ready := {folder for folder, names in waiting.items() if names <= placed}:
        placed |= ready
        waiting = {folder: names for folder, names in waiting.items() if folder not in ready}
    assert not waiting
