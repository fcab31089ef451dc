"""The import laws that import-linter cannot see: the Rust core's importers, and no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pkt

PACKAGE = Path(pkt.__file__).parent
CORE_IMPORTERS = {
    "adapter/folder.py",
    "checkpoint.py",
    "disk.py",
    "stream.py",
    "sensitivity/__init__.py",
    "selection.py",
    "thin.py",
    "merging/blocks.py",
    "merging/writing.py",
}


def _imports_core(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        if any("_core" in name.split(".") for name in names):
            return True
    return False


def test_the_core_is_imported_by_nine_modules_only() -> None:
    importers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if _imports_core(path.read_text(encoding="utf-8"))
    }
    assert importers == CORE_IMPORTERS


@pytest.mark.parametrize(
    "statement",
    [
        "import pkt._core",
        "from pkt import _core",
        "from pkt._core import Reader",
        "from . import _core",
    ],
)
def test_every_spelling_of_a_core_import_is_seen(statement: str) -> None:
    assert _imports_core(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "import pkt",
        "import pkt.api",
        "import pkt.cli",
        "pkt.inspect",
        "import pkt.errors, pkt.records",
    ],
)
def test_no_torch_is_loaded_by(statement: str) -> None:
    check = "assert not {'torch', 'transformers'} & {*sys.modules}"
    code = f"import sys, pkt\n{statement}\n{check}"
    subprocess.run([sys.executable, "-c", code], check=True)
