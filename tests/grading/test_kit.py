"""The student's kit: what is cut out, what stays, that it runs, and that each variant asks for something else."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import optimizer
from conftest import ROOT
from llama import llama_from_checkpoint
from minillama.formats.checkpoint import read_checkpoint
from minillama.grading import kit
from minillama.grading.kit import code_files, kit_files, solved_files, solved_text
from minillama.grading.kit_cut import cut_bodies, functions, leaks, solution_lines, stream_of, take
from minillama.grading.kit_setups import EDITIONS, PLAIN, VARIANTS, Setup, exercises, find_setup

STEMS = [Path(name).stem for name in kit.CODE] + ["stand_ins"]
CHANGING = ("norm", "rope", "generate")  # parts that a variant changes


@contextlib.contextmanager
def modules_of(*folders: Path) -> Iterator[None]:
    """A context in which the modules of a kit are imported from these folders."""
    path, known = list(sys.path), {name: sys.modules.pop(name) for name in STEMS if name in sys.modules}
    sys.path[:0] = map(str, folders)
    try:
        yield
    finally:
        sys.path[:] = path
        for name in STEMS:
            sys.modules.pop(name, None)
        sys.modules.update(known)


def results(code: Path, tests: Path, parts: tuple[str, ...]) -> dict[str, str | None]:
    """The error of each part's public tests; None where all pass."""
    found: dict[str, str | None] = {}
    with modules_of(code, tests):
        for part in parts:
            try:
                spec = importlib.util.spec_from_file_location(f"public_{part}", tests / f"test_{part}.py")
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                for name in [name for name in vars(module) if name.startswith("test_")]:
                    getattr(module, name)()
                found[part] = None
            except Exception as error:
                found[part] = f"{type(error).__name__}: {error}"
    return found


def write_code(folder: Path, setup: Setup, solved: bool = True) -> Path:
    """The modules and public tests of a kit, without its data."""
    (folder / "public_tests").mkdir(parents=True)
    cut = {file: [] for file in code_files(setup)}
    for file, names in exercises(setup).values():
        cut[file] += [] if solved else names
    for name in code_files(setup):
        (folder / name).write_text(cut_bodies(solved_text(setup, name), cut[name]))
    for name in [*(f"test_{part}.py" for part in setup.parts), "stand_ins.py"]:
        (folder / "public_tests" / name).write_text(solved_text(setup, f"tests/{name}"))
    return folder


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    kit.write_folders({folder: files})
    return folder


@pytest.fixture(scope="module")
def kits() -> dict[str, dict[str, bytes]]:
    return {edition: kit_files(PLAIN[edition]) for edition in EDITIONS}


@pytest.mark.parametrize("edition", EDITIONS)
def test_no_line_of_a_solution_is_in_a_kit(kits, edition):
    setup = PLAIN[edition]
    own = set().union(*(solution_lines(solved_text(setup, file), names) for file, names in exercises(setup).values()))
    assert len(own) > 50
    assert leaks(kits[edition], own | kit.our_lines()) == []
    with_notes = kits[edition] | {"NOTES.md": b"Hint:\n```\nscores = (query @ key.transpose(-2, -1) / \nmath.sqrt("}
    assert leaks(with_notes, {stream_of("query @ key.transpose(-2, -1) / math.sqrt(")}) != []


@pytest.mark.parametrize("edition", EDITIONS)
def test_the_search_finds_each_line_where_the_solution_is(edition):
    setup = PLAIN[edition]
    for part, (file, names) in exercises(setup).items():
        lines = solution_lines(solved_text(setup, file), names)
        assert lines, part
        assert len(leaks({file: solved_text(setup, file).encode()}, lines)) == len(lines), part


def test_our_own_modules_are_searched_with_their_fused_paths():
    lines = kit.our_lines()
    assert len(lines) > 800
    assert stream_of('p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-step_size)') in lines
    assert stream_of("return cut(logits, logits.softmax(-1) < epsilon)") in lines
    assert stream_of("pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))") in lines


def test_a_body_is_cut_and_signature_docstring_and_shapes_stay():
    source = '''class A:
    @property
    def f(self, x: int) -> int:
        """Says what."""
        # x: (B, T, D)
        y = x  # (B, T)
        # a thought
        return y

    def g(self):
        # the first: (B,  T)
        return 1
'''
    cut = cut_bodies(source, ["A.f", "A.g"])
    assert (
        cut
        == '''class A:
    @property
    def f(self, x: int) -> int:
        """Says what."""
        # x: (B, T, D)
        raise NotImplementedError("A.f is not implemented yet")

    def g(self):
        # the first: (B,  T)
        raise NotImplementedError("A.g is not implemented yet")
'''
    )


@pytest.mark.parametrize("edition", EDITIONS)
def test_every_exercise_says_that_it_is_not_implemented(kits, edition):
    for file, names in exercises(PLAIN[edition]).values():
        source = kits[edition][file].decode()
        solved = functions(solved_text(PLAIN[edition], file))
        for name in names:
            body = functions(source)[name].body
            assert ast.unparse(body[-1]) == f"raise NotImplementedError('{name} is not implemented yet')"
            assert ast.get_docstring(functions(source)[name]) == ast.get_docstring(solved[name])
            assert ast.dump(functions(source)[name].args) == ast.dump(solved[name].args)


def test_what_the_kit_takes_from_our_modules_must_be_there():
    assert take("lora.py", "ATTENTION_PROJECTIONS").startswith("ATTENTION_PROJECTIONS = (")
    assert "@property" in take("config.py", "LlamaConfig.head_dim")
    with pytest.raises(ValueError, match="llama.py has no Lama.forward any more"):
        take("llama.py", "Lama.forward")
    with pytest.raises(ValueError, match="no line has 'nothing' any more"):
        take("llama.py", "FeedForward", drop=["nothing"])
    with pytest.raises(ValueError, match="'nothing' is not there any more"):
        take("llama.py", swap={"nothing": ""})


@pytest.mark.parametrize("edition", EDITIONS)
def test_no_line_is_longer_than_120(edition):
    for seed in range(16):
        setup = find_setup(edition, seed)
        for name in (*code_files(setup), *(f"tests/test_{part}.py" for part in setup.parts), "tests/stand_ins.py"):
            assert max(map(len, solved_text(setup, name).splitlines())) <= 120, (seed, name)


@pytest.mark.parametrize("edition", EDITIONS)
def test_two_runs_give_the_same_bytes(kits, edition):
    solved_text.cache_clear()
    assert kit_files(PLAIN[edition]) == kits[edition]


def test_editions_differ_as_they_should(kits):
    assert set(kits["fall2025"]) - set(kits["2024"]) == {"lora.py", "public_tests/test_lora.py"}
    code = {edition: files["llama.py"].decode() for edition, files in kits.items()}
    assert "class RMSNorm" in code["2024"] and "LayerNorm" not in code["2024"]
    assert "causal: bool = True" in code["spring2026"] and "top_p: float = 0.95" in code["spring2026"]
    assert "epsilon: float = 0.05" in code["fall2025"] and b"causal: bool = False" in kits["fall2025"]["config.py"]


def test_kept_parts_are_solved_and_no_other():
    setup = PLAIN["fall2025"]
    files = kit_files(setup, ("norm", "lora"))
    assert files["lora.py"].decode() == solved_text(setup, "lora.py")
    assert files["llama.py"].count(b"NotImplementedError") == 5
    assert b"norm, lora are already done" in files["README.md"]
    whole = kit_files(setup, setup.parts)
    assert {name: whole[name].decode() for name in code_files(setup)} == {
        name: solved_text(setup, name) for name in code_files(setup)
    }


def test_the_hidden_part_is_in_the_solution_alone(kits):
    setup = find_setup("fall2025", 7301)
    hidden = json.loads(solved_files(setup, 7301, ("norm",))["hidden.json"])
    assert hidden["seed"] == 7301 and "norm" not in hidden["points"] and hidden["kept"] == ["norm"]
    assert hidden["variant"] == setup.choices()
    assert hidden["switches"] == ["norm.eps_outside", "rope.split_halves"]
    assert hidden["probe_seed"] != json.loads(solved_files(setup, 7301 + VARIANTS)["hidden.json"])["probe_seed"]
    for name, content in kit_files(setup).items():
        assert name.startswith("data/") or b"7301" not in content
    assert not any("hidden" in name for name in kits["fall2025"])


def test_the_48_variants_differ_and_neighbours_in_all():
    for edition in EDITIONS:
        setups = [find_setup(edition, seed) for seed in range(VARIANTS + 1)]
        assert setups[0] == setups[VARIANTS] == find_setup(edition) == PLAIN[edition]
        assert len(set(setups)) == VARIANTS
        for one, other in zip(setups, setups[1:], strict=False):
            assert (one.norm, one.eps) != (other.norm, other.eps)
            assert (one.pairing, one.sign) != (other.pairing, other.sign)
            assert one.sampling != other.sampling


def test_the_empty_kit_ticks_nothing(tmp_path):
    setup = PLAIN["fall2025"]
    folder = write_code(tmp_path / "kit", setup, solved=False)
    found = results(folder, folder / "public_tests", setup.parts)
    assert list(found) == list(setup.parts)
    for part, error in found.items():
        assert error is not None and "is not implemented yet" in error, part


@pytest.mark.parametrize("edition", EDITIONS)
def test_each_solution_passes_its_public_tests_alone(tmp_path, edition):
    """All parts together, and each one with all others left undone."""
    setup = PLAIN[edition]
    folder = write_code(tmp_path / "all", setup)
    assert set(results(folder, folder / "public_tests", setup.parts).values()) == {None}
    for part in setup.parts:
        alone = write_code(tmp_path / part, setup, solved=False)
        file, _ = exercises(setup)[part]
        others = [names for own, (where, names) in exercises(setup).items() if own != part and where == file]
        text = cut_bodies(solved_text(setup, file), [name for names in others for name in names])
        (alone / file).write_text(text)
        found = results(alone, alone / "public_tests", setup.parts)
        assert found[part] is None, (part, found[part])
        assert sum(error is None for error in found.values()) == 1, part


@pytest.mark.parametrize("edition", ["fall2025", "2024"])
def test_our_own_modules_pass_the_public_tests(tmp_path, edition):
    """The second half of the round trip: our bodies behave as the kit's solution does."""
    setup = PLAIN[edition]
    folder = write_code(tmp_path / "kit", setup)
    parts = [part for part in setup.parts if (part, edition) != ("generate", "2024")]  # ours drops unlikely tokens
    assert set(results(ROOT, folder / "public_tests", parts).values()) == {None}


@pytest.mark.parametrize("edition", EDITIONS)
def test_each_variant_passes_its_own_tests_and_fails_those_of_others(tmp_path, edition):
    folders = [write_code(tmp_path / str(n), find_setup(edition, n)) for n in range(VARIANTS)]
    for n, folder in enumerate(folders):
        assert set(results(folder, folder / "public_tests", CHANGING).values()) == {None}, n
        for other in {(n + 1) % VARIANTS, (n + 16) % VARIANTS, (7 * n + 5) % VARIANTS} - {n}:
            one, two = find_setup(edition, n), find_setup(edition, other)
            differ = {
                "norm": (one.norm, one.eps) != (two.norm, two.eps),
                "rope": (one.pairing, one.sign) != (two.pairing, two.sign),
                "generate": one.sampling != two.sampling,
            }
            found = results(folder, folders[other] / "public_tests", CHANGING)
            failed = {part for part, error in found.items() if error}
            assert failed == {part for part in differ if differ[part]}, (n, other)


@pytest.mark.parametrize(("edition", "seed"), [("fall2025", 0), ("2024", 0), ("spring2026", 2), ("fall2025", 7)])
def test_the_solution_agrees_with_the_reference_outputs(tmp_path, capsys, edition, seed):
    folder = write_files(tmp_path / "solved", solved_files(find_setup(edition, seed), seed))
    with modules_of(folder):
        import sanity_check

        assert sanity_check.main() == 0
    assert "DIFFER" not in capsys.readouterr().out


@pytest.mark.parametrize(("edition", "seed"), [("fall2025", 0), ("fall2025", 7), ("spring2026", 0)])
def test_the_solved_model_computes_what_ours_does(tmp_path, edition, seed):
    """With LayerNorm and eps inside the root. The rotary convention may differ: the weights are in its order."""
    setup = find_setup(edition, seed)
    ours = llama_from_checkpoint(read_checkpoint(ROOT / "data" / "mini-llama.safetensors"), norm="layernorm").eval()
    folder = write_files(tmp_path / "solved", solved_files(setup, seed))
    ids = torch.randint(0, 4096, (3, 20), generator=torch.Generator().manual_seed(1))
    with modules_of(folder), torch.no_grad():
        import llama

        theirs = llama.load_pretrained(folder / "data" / "mini-llama.safetensors")
        assert (setup.norm, setup.eps) == ("layernorm", "inside")
        for got, wanted in zip(theirs(ids, targets=ids), ours(ids, targets=ids), strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
        greedy = theirs.generate(ids[:, :5], 10, temperature=0.0)
        assert greedy.tolist() == ours.generate(ids[:, :5], 10, temperature=0.0).tolist()


def test_the_solved_optimizer_steps_as_ours_does(tmp_path):
    folder = write_code(tmp_path / "solved", PLAIN["fall2025"])
    with modules_of(folder):
        import optimizer as theirs
    moved = []
    for module in (theirs, optimizer):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(3)]
        groups = [{"params": weights[:2], "weight_decay": 0.5}, {"params": weights[2:], "correct_bias": False}]
        steps = module.AdamW(groups, lr=0.05, max_grad_norm=2.0)
        for _ in range(10):
            for weight in weights:
                weight.grad = torch.randn(4, 3, generator=generator)
            steps.step()
        moved.append(torch.stack([weight.detach() for weight in weights]))
    torch.testing.assert_close(moved[0], moved[1], atol=1e-6, rtol=1e-5)


def test_the_checklist_ticks_itself(tmp_path, capsys):
    setup = PLAIN["fall2025"]
    folder = write_code(tmp_path / "kit", setup, solved=False)
    (folder / "rope.py").write_text(solved_text(setup, "rope.py"))
    with modules_of(folder):
        import checklist

        assert checklist.main([]) == 1
        out = capsys.readouterr().out
        assert checklist.main(["rope"]) == 0 and checklist.main(["rop"]) == 2
    assert "[x] rope" in out and "[ ] norm" in out and "LayerNorm.forward is not implemented yet" in out
    assert out.endswith("1 of 11 done\n")


def test_the_notebook_has_no_outputs(kits):
    cells = json.loads(kits["fall2025"]["first_steps.ipynb"])["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5 and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    for cell in code:
        ast.parse("".join(cell["source"]))
