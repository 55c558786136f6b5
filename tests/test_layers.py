"""The floor plan: imports lead downward through the layers that CONTRIBUTING.md lists, and outward to few packages."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from conftest import ROOT

TABLE = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.M)
LAYER = {name: int(number) for number, files in TABLE for name in re.findall(r"`(\w+)\.py`", files)}
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
CORE = {"torch", "sentencepiece", "numpy", "tqdm", "sklearn", "safetensors"}


def imports(module, *, top_level_only=False):
    """The first names of all that a module imports, for type checking included."""
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_lead_to_a_lower_layer(module):
    assert module in LAYER, f"give {module}.py its layer in CONTRIBUTING.md"
    for other in set(imports(module)) & set(MODULES):
        assert LAYER[other] < LAYER[module], f"{module} imports {other}"


@pytest.mark.parametrize("module", MODULES)
def test_only_core_packages_are_imported_at_the_top(module):
    outside = set(imports(module, top_level_only=True)) - set(MODULES) - set(sys.stdlib_module_names)
    assert outside <= CORE


def test_the_core_packages_are_those_that_get_installed():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.match(r"[\w-]+", line)[0] for line in lines if line and not line.startswith("#")}
    used = {name for module in MODULES for name in imports(module)} & CORE
    assert {"sklearn" if name == "scikit-learn" else name for name in required} >= used
