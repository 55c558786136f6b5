"""The student's kit of a course: our modules with the bodies of the exercises cut out, public tests, data.

The files come from the templates of kit_files/, which take what they can from our modules and say the rest plainly.
Their full text is the reference solution; the kit is the same text with bodies cut out by `ast`. Imports no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minillama.grading.kit_cut import ROOT, cut_bodies, leaks, read_source, solution_lines, take
from minillama.grading.kit_model import checkpoint, converted, read_model, reference
from minillama.grading.kit_setups import Setup, exercises, hidden_part
from minillama.grading.kit_texts import texts

HERE = Path(__file__).resolve().parent / "kit_files"
CODE = (
    *("config.py", "rope.py", "lora.py", "optimizer.py", "llama.py", "classifier.py"),
    *("tokenizer.py", "run_llama.py", "sanity_check.py", "checklist.py"),
)
DATA = ("demo-train.txt", "demo-dev.txt", "demo-test.txt", "demo-label-mapping.json", "mini-llama.model")
# Where our own modules hold what an exercise asks for; None: all functions of the file.
OURS: dict[str, tuple[str, ...] | None] = {
    "llama.py": (
        *("LayerNorm.forward", "RMSNorm.forward", "Attention.forward", "Attention.attend", "LlamaLayer.forward"),
        *("Attention.compute_query_key_value_scores", "Llama.forward", "Llama.last_hidden", "Llama.residual_stream"),
        *("Llama.generate", "last_positions", "gather_positions", "last_token_state"),
    ),
    "rope.py": ("rotary_frequencies", "rotary_table", "rotate", "rotate_in_real_numbers", "apply_rotary_emb"),
    "optimizer.py": ("AdamW.step", "AdamW.update", "one_by_one", "in_one_pass", "Muon.update"),
    "lora.py": (
        *("LoRALayer.__init__", "LoRALayer.forward", "LoRALayer._updated_weight", "LoRALayer.merge", "apply_lora"),
        *("merge_lora_weights", "merge_lora_reversibly", "remove_lora"),
    ),
    "classifier.py": (
        *("LlamaZeroShotClassifier._scores", "LlamaZeroShotClassifier._next_log_probs", "_pooled"),
        *("LlamaZeroShotClassifier._course_reading", "LlamaZeroShotClassifier.forward"),
        *("LlamaEmbeddingClassifier.forward", "LlamaPromptClassifier.forward"),
    ),
}
ROOMS = ("layers", "decoding")  # folders of minillama/ with fused paths, filters and compiled decoders
NOTEBOOK_FORM = {"nbformat": 4, "nbformat_minor": 5}


@lru_cache
def environment() -> Environment:
    return Environment(
        loader=FileSystemLoader([HERE, HERE / "code"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )


@lru_cache
def solved_text(setup: Setup, name: str, kept: tuple[str, ...] = ()) -> str:
    """A file of kit_files/ for this setup, with all exercises solved."""
    return environment().get_template(f"{name}.jinja").render(setup=setup, text=texts(setup), take=take, kept=kept)


def code_files(setup: Setup) -> tuple[str, ...]:
    return tuple(name for name in CODE if name != "lora.py" or setup.lora)


def kit_files(setup: Setup, keep: Sequence[str] = ()) -> dict[str, bytes]:
    """The files of a kit by name, in which the exercises of the parts in `keep` are solved.

    Raises AssertionError if a line of a solution is in one of them.
    """
    files: dict[str, bytes] = {}
    left = {part: place for part, place in exercises(setup).items() if part not in keep}
    for name in code_files(setup):
        names = [function for file, functions in left.values() if file == name for function in functions]
        files[name] = cut_bodies(solved_text(setup, name), names).encode()
    files |= other_files(setup, tuple(keep))
    found = leaks(files, wanted_out(setup, tuple(left)))
    assert not found, f"a line of a solution is in the kit: {found[0]}"
    return files


def solved_files(setup: Setup, seed: int | None, keep: Sequence[str] = ()) -> dict[str, bytes]:
    """The files of the reference solution by name, and the hidden part: seeds, points, what the variant asks for."""
    files = {name: solved_text(setup, name).encode() for name in code_files(setup)}
    hidden = json.dumps(hidden_part(setup, seed, tuple(keep)), indent=2) + "\n"
    return files | other_files(setup, tuple(keep)) | {"hidden.json": hidden.encode()}


def other_files(setup: Setup, keep: tuple[str, ...]) -> dict[str, bytes]:
    """The files that a kit and its solution share: texts, tests, model and data."""
    model = converted(read_model((ROOT / "data" / "mini-llama.safetensors").read_bytes()), setup)
    about = {"edition": setup.edition, **setup.choices(), "parts": list(setup.parts), "kept": list(keep)}
    files = {
        "README.md": solved_text(setup, "README.md", keep).encode(),
        "requirements.txt": (HERE / "requirements.txt").read_bytes(),
        "first_steps.ipynb": notebook((HERE / "first_steps.txt").read_text(encoding="utf-8")).encode(),
        "kit.json": (json.dumps(about, indent=2) + "\n").encode(),
        "LICENSE": (ROOT / "LICENSE").read_bytes(),
        "data/MODEL_CARD.md": (ROOT / "data" / "MODEL_CARD.md").read_bytes(),
        "data/mini-llama.safetensors": checkpoint(model),
        "data/reference.safetensors": reference(model, setup),
    }
    files |= {f"data/{name}": (ROOT / "data" / name).read_bytes() for name in DATA}
    tests = [f"test_{part}.py" for part in setup.parts] + ["stand_ins.py"]
    return files | {f"public_tests/{name}": solved_text(setup, f"tests/{name}").encode() for name in tests}


def solved_text_of(setup: Setup, part: str) -> set[str]:
    """The lines of a part's own solution, as token streams."""
    file, names = exercises(setup)[part]
    return solution_lines(solved_text(setup, file), names)


def wanted_out(setup: Setup, left: Iterable[str]) -> set[str]:
    """The lines that a kit must not have: of the solutions of the parts left to do, and of our own modules' forms of
    them. A line that a part already solved has, too, may stay.
    """
    left = tuple(left)
    lines = set().union(*(solved_text_of(setup, part) for part in left)) | (our_lines() if left else set())
    kept = [part for part in setup.parts if part not in left]
    return lines.difference(*(solved_text_of(setup, part) for part in kept))


@lru_cache
def our_lines() -> frozenset[str]:
    """The lines of our own modules that solve an exercise, in whatever form."""
    lines: set[str] = set()
    for file, names in OURS.items():
        lines |= solution_lines(read_source(file), names)
    for room in ROOMS:
        for path in sorted((ROOT / "minillama" / room).glob("*.py")):
            lines |= solution_lines(read_source(path.relative_to(ROOT).as_posix()))
    return frozenset(lines)


def notebook(text: str) -> str:
    """A notebook without outputs. text: cells, each after a line `# %%`, or `# %% [markdown]`."""
    cells: list[dict[str, Any]] = []
    for n, part in enumerate(text.split("# %%")[1:]):
        head, _, body = part.partition("\n")
        cell: dict[str, Any] = {
            "cell_type": "markdown" if "[markdown]" in head else "code",
            "id": f"cell-{n}",
            "metadata": {},
        }
        cell["source"] = body.rstrip("\n").splitlines(keepends=True)
        cells.append(cell if cell["cell_type"] == "markdown" else cell | {"execution_count": None, "outputs": []})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps({"cells": cells, "metadata": {"kernelspec": kernel}, **NOTEBOOK_FORM}, indent=1) + "\n"


def write_folders(folders: Mapping[Path, Mapping[str, bytes]]) -> None:
    """Writes each folder's files, all folders or none: first into temporary folders beside them, then renamed.

    A folder may exist if it is empty. Raises OSError.
    """
    temporary: dict[Path, Path] = {}
    renamed: list[Path] = []
    try:
        for folder, files in folders.items():
            temporary[folder] = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            for name, content in files.items():
                path = temporary[folder] / folder.name / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        for folder, made in temporary.items():
            if folder.exists():
                folder.rmdir()  # refuses a folder that is not empty
            os.rename(made / folder.name, folder)
            renamed.append(folder)
    except BaseException:
        for folder in renamed:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        for made in temporary.values():
            shutil.rmtree(made, ignore_errors=True)
