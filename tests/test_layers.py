"""The layer rule: imports lead one way through the folders, and only to few outside packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from conftest import ROOT

# A room imports from itself and from those above it in this list; type hints count. Rooms are folders of minillama/,
# and the modules at the root.
ORDER = [
    ("config", "environment"),
    ("rope", "lora", "optimizer"),
    ("layers",),
    ("formats",),
    ("tokenizer",),
    ("text",),
    ("llama",),
    ("decoding",),
    ("classifier",),
    ("training",),
    ("inference",),
    ("serving",),
    ("grading",),
    ("cli",),
    ("commands", "benchmarks"),
    ("run_llama", "sanity_check", "fetch_data", "prepare_submit", "benchmark", "grade", "course"),
]
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "minillama").rglob("*.py")])
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if path.name != "__init__.py"]
CORE = {"torch", "sentencepiece", "numpy", "tqdm", "sklearn", "safetensors", "numba", "jinja2"}
# Called by a method, inside it: `Llama.generate` decodes.
INSIDE = {("llama", "minillama.decoding.sampling")}
# What fetches the course's data knows its checksums, which the hand-in is compared with.
BESIDE = {("prepare_submit", "fetch_data")}


def room(module):
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "minillama" and rest else first


def imports(module, *, top_level_only=False):
    """All modules that a module imports, for type checking included."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            is_folder = (ROOT / node.module.replace(".", "/")).is_dir()
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if is_folder else [node.module]


def ours(module):
    return set(imports(module)) & set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_lead_one_way(module):
    for other in ours(module):
        if (module, other) in INSIDE:
            assert other not in imports(module, top_level_only=True)
        elif room(other) != room(module) and (module, other) not in BESIDE:
            assert FLOOR[room(other)] < FLOOR[room(module)], f"{module} imports {other}"
    if room(module) == "commands":
        assert not any(room(other) == "commands" for other in ours(module)), "a command imports another command"


def test_no_imports_go_in_a_circle():
    left = {module: {other for other in ours(module) if (module, other) not in INSIDE} for module in MODULES}
    while free := [module for module, needed in left.items() if not needed]:
        left = {module: needed - set(free) for module, needed in left.items() if module not in free}
    assert not left


@pytest.mark.parametrize("module", MODULES)
def test_only_core_packages_are_imported_at_the_top(module):
    names = {name.partition(".")[0] for name in imports(module, top_level_only=True)}
    assert names - {name.partition(".")[0] for name in MODULES} - set(sys.stdlib_module_names) <= CORE
    assert "numba" not in names or module == "minillama.decoding.numba_step"  # the program also runs without it
    assert module == "minillama.decoding.compiled_decoder" or not any(
        name.startswith("minillama.decoding.numba_step") for name in imports(module)
    )


def test_the_core_packages_are_those_that_get_installed():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.match(r"[\w-]+", line)[0] for line in lines if line and not line.startswith("#")}
    used = {name.partition(".")[0] for module in MODULES for name in imports(module)} & CORE
    assert {"sklearn" if name == "scikit-learn" else name for name in required} >= used


def test_the_root_holds_a_dozen_modules_and_none_is_long():
    assert len([path for path in FILES if path.parent == ROOT]) <= 14
    assert not [path for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 400]


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in ("cli", "commands")])
def test_a_command_imports_torch_only_when_it_runs(module):
    loads_torch = {
        "layers",
        "formats",
        "text",
        "llama",
        "decoding",
        "classifier",
        "training",
        "inference",
        "lora",
        "rope",
        "optimizer",
    }
    for name in imports(module, top_level_only=True):
        assert name.partition(".")[0] not in ("torch", "numpy", "tqdm", "sklearn")
        assert room(name) not in loads_torch or name == "minillama.formats.names"


def test_the_modules_that_outside_code_imports_load_no_command_line():
    contract = "config, rope, lora, optimizer, llama, classifier, tokenizer"
    code = f"import sys, {contract}; print([m for m in sys.modules if m.startswith(('minillama.c', 'argparse'))])"
    known = "import sys, torch; print('argparse' in sys.modules)"  # torch itself may load it
    found, by_torch = (
        subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for line in (code, known)
    )
    assert found.strip() in ("[]", "['argparse']" if by_torch.strip() == "True" else "[]")
