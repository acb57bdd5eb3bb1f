# SPDX-License-Identifier: Apache-2.0
"""Import arrows point one way, every file names its licence, and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "opendino"
MAY_IMPORT = {
    "native": {"native"},
    "models": {"native", "models"},
    "images": {"models", "images"},
    "distributed": {"distributed"},
    "pretrain": {"native", "models", "images", "distributed", "pretrain"},
    "export": {"models", "images", "export"},
    "embed": {"native", "models", "images", "export", "embed"},
    "evaluate": {"models", "images", "evaluate"},
    "heads": {"models", "images", "embed", "evaluate", "heads"},
    "finetune": {"models", "images", "embed", "evaluate", "heads", "finetune"},
    "views": {"models", "images", "views"},
    "report": {"models", "images", "report"},
    "sample_data": {"models", "images", "sample_data"},
}
FREE = {"errors", "_version", "logs"}


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "opendino" else [f"opendino.{a.name}" for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("opendino.")}
    return found - FREE


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_import_arrows_point_one_way(room):
    files = list((SOURCE / room).rglob("*.py"))
    assert files
    for path in files:
        assert rooms_imported(path) <= MAY_IMPORT[room], path


def test_arrow_check_sees_an_arrow(tmp_path):
    (tmp_path / "x.py").write_text("import os\nfrom opendino.cli.embed import main\nfrom opendino import views\n")
    assert rooms_imported(tmp_path / "x.py") == {"cli", "views"}


def test_every_file_names_its_licence():
    root = SOURCE.parents[1]
    files = [p for d in ("src", "tests", "benchmarks") for p in (root / d).rglob("*.py")]
    missing = [p for p in files if not p.read_text().startswith("# SPDX-License-Identifier: Apache-2.0")]
    assert not missing


def test_importing_the_package_imports_no_torch():
    code = "import sys, opendino; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
