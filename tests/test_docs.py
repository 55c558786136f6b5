"""The README and docs/: links, flags, commands, and the drawing of the block agree with the program."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import llama
import run_llama
from conftest import ROOT
from llama import Llama, LlamaConfig, llama_from_checkpoint
from make_pictures import PICTURES
from minillama.formats.checkpoint import read_checkpoint
from minillama.layers.kv_cache import KVCache

MADE = ROOT / "docs" / "options.md"  # made from the parser, and tested there
DOCS = sorted({*(ROOT / "docs").glob("*.md")} - {MADE})
PAGES = [ROOT / "README.md", *DOCS]
OTHER_PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "data/README.md", "data/MODEL_CARD.md")]
OTHER_PAGES += [ROOT / "examples" / name for name in ("README.md", "course/README.md")]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SVG = ROOT / "docs" / "block.svg"


def text_of(path):
    return path.read_text(encoding="utf-8")


def page_name(path):
    return str(path.relative_to(ROOT))


def commands_of(path):
    """The commands of a page: the lines of its code blocks that begin with `python`."""
    for block in re.findall(r"^```(?:sh)?\n(.*?)^```", text_of(path), flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("python "):
                yield shlex.split(line, comments=True)


COMMANDS = sorted({tuple(command) for page in PAGES for command in commands_of(page)})


def printed(argv):
    """The text that run_llama.py prints before it leaves."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out), pytest.raises(SystemExit):
        run_llama.main(argv)
    return out.getvalue()


def option_names():
    return re.search(r"choose from ([\w, ]+)\)", printed(["--option", "?"]))[1].split(", ")


# Links and pictures


def slug(heading):
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=page_name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(text_of(page)):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        if anchor:
            assert anchor in [slug(heading) for heading in re.findall(r"^#+ (.*)", text_of(path), flags=re.M)], link


def test_each_page_can_be_reached_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(text_of(ROOT / "README.md"))}
    assert {*DOCS, MADE} <= linked


def test_pictures_are_small_and_shown_and_made_by_make():
    pictures = {path.name for path in (ROOT / "docs" / "pictures").iterdir()}
    shown = {Path(link).name for page in PAGES for link in LINK.findall(text_of(page)) if "pictures/" in link}
    made_by_make_sums = {"addition.svg"}
    assert pictures == shown == {f"{name}.png" for name in PICTURES} | made_by_make_sums
    assert all((ROOT / "docs" / "pictures" / name).stat().st_size < 200_000 for name in pictures)


# The README


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").split()) < 1000


def test_the_readme_installs_an_allowed_pytorch():
    allowed = re.search(r"^torch\S+", text_of(ROOT / "requirements.txt"), flags=re.M)[0]
    assert f'pip install "{allowed}"' in text_of(ROOT / "README.md")


def test_the_readme_has_a_page_for_each_wish():
    table = text_of(ROOT / "README.md").split("| I want to ... |")[1].split("\n\n")[0]
    pages = re.findall(r"\]\(docs/(\w+)\.md\)", table)
    assert pages == ["understand", "xray", "generate", "classify", "pretrain", "course"]


# Flags and commands


def test_flags_that_a_page_names_exist():
    shown = "".join(printed(["--option", name, "--help"]) for name in option_names())
    scripts = [
        text_of(ROOT / f"{name}.py")
        for name in ("benchmark", "course", "fetch_data", "grade", "prepare_submit", "data/make_addition")
    ]
    known = set(re.findall(r"--[\w-]+", shown + "".join(scripts))) | {"--help"}
    elsewhere = {"--nproc_per_node", "--index-url", "--temp", "--dist"}  # of torchrun, pip, llama.cpp and pytest
    elsewhere |= {"--model", "--model_args", "--tasks", "--local-dir"}  # of lm_eval and hf
    for page in PAGES:
        named = set(re.findall(r"(?<![\w`-])--[a-z][\w-]*|(?<=`)--[a-z][\w-]*", text_of(page)))
        assert named <= known | elsewhere, f"{page_name(page)}: {sorted(named - known - elsewhere)}"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command)[:70])
def test_commands_are_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, script, *arguments = command
    if script == "-m":
        assert arguments[0] in ("pip", "pytest", "venv")
        assert all((ROOT / name).exists() for name in arguments if name.startswith("tests/"))
        return
    assert (ROOT / script).is_file()
    if script == "run_llama.py":
        run_llama.parse(arguments)


def test_each_option_is_shown_on_some_page():
    given = [command[command.index("--option") + 1] for command in COMMANDS if "--option" in command]
    assert set(given) == set(option_names())


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "python.md"], ids=page_name)
def test_python_snippets_run(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for snippet in re.findall(r"^```python\n(.*?)^```", text_of(page), flags=re.M | re.S):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(snippet, page_name(page), "exec"), {})
        assert out.getvalue()


def test_the_snippets_of_the_page_about_python_are_one_script_that_runs_from_another_folder(tmp_path):
    page = text_of(ROOT / "docs" / "python.md")
    snippets = re.findall(r"^```python\n(.*?)^```\n\n```\n(.*?)^```", page, flags=re.M | re.S)
    assert len(snippets) == page.count("```python")  # each shows what it prints
    script = "\nprint('-----')\n".join(code for code, _ in snippets).replace("path/to/mini-llama", ROOT.as_posix())
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environ, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.removesuffix("\n").split("\n-----\n")
    shown = [output.removesuffix("\n") for _, output in snippets]
    assert printed[0] == shown[0] and printed[4] == shown[4]
    # Processors round differently, so texts may differ, but no more.
    assert [len(text.splitlines()) for text in printed] == [len(text.splitlines()) for text in shown]
    assert {path.name for path in tmp_path.iterdir()} == {"mine.pt"}


# The pages about the code


def test_files_that_a_page_names_exist():
    for page in PAGES:
        for name in re.findall(r"\bminillama/[\w/]+\.py\b", text_of(page)):
            assert (ROOT / name).is_file(), f"{page_name(page)}: {name}"


def test_the_table_of_files_names_every_module_and_folder_and_nothing_else():
    page = text_of(ROOT / "docs" / "architecture.md")
    table = page[page.index("| where | holds |") :].partition("\n\n")[0]
    files = re.findall(r"`(\w+\.py)`", table)
    assert set(files) == {path.name for path in ROOT.glob("*.py")}
    rooms = {path.name for path in (ROOT / "minillama").iterdir() if (path / "__init__.py").exists()}
    assert set(re.findall(r"`minillama/(\w+)/`", table)) == rooms


def test_the_architecture_page_has_the_sizes_and_names_of_the_model():
    page = text_of(ROOT / "docs" / "architecture.md")
    with torch.device("meta"):
        model = Llama(LlamaConfig())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{total / 1e6:.1f} million parameters" in page
    assert f"feed-forward width {model.layers[0].feed_forward.w1.out_features}" in page
    names = set(re.findall(r"`(\w+)`", page[page.index("## One block") : page.index("## The path of a prompt")]))
    files = ["llama.py", "rope.py", "config.py", "minillama/layers/kernels.py"]
    source = "".join(text_of(ROOT / name) for name in files)
    assert not {name for name in names if name not in source}


# The drawing


class Softmax(TorchFunctionMode):
    """Records the tensors that go into softmax, and come out."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax":
            self.seen |= {"scores": args[0], "weights": result}
        return result


@pytest.fixture
def block(monkeypatch):
    """The first block of the bundled model, and what it computes: three rows of five tokens after four others."""
    checkpoint = read_checkpoint(ROOT / "data" / "mini-llama.safetensors")
    model = llama_from_checkpoint(checkpoint, attention_kernel="manual")
    layer, seen = model.layers[0], {}

    def watch(module, *names):
        def hook(_, inputs, output):
            seen.update(zip(names, (output, *inputs), strict=False))

        module.register_forward_hook(hook)

    watch(layer, "after_feed_forward", "x")
    watch(layer.attention_norm, "attention_norm")
    watch(layer.attention, "attention")
    watch(layer.attention.compute_output, "compute_output")
    watch(layer.ffn_norm, "ffn_norm", "after_attention")
    watch(layer.feed_forward.w1, "gate")
    watch(layer.feed_forward.w3, "up")
    watch(layer.feed_forward.w2, "down", "gated")
    split = layer.attention.compute_value.register_forward_hook
    split(lambda module, inputs, output: seen.update(value=output.unflatten(-1, (-1, model.config.head_dim))))

    def record(owner, name, arguments, results):
        """Records the tensors that the first call of a function takes and gives."""
        called = getattr(owner, name)

        def recorded(*args, **kwargs):
            given = called(*args, **kwargs)
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            for key, value in (*zip(arguments, tensors, strict=False), *zip(results, given, strict=False)):
                seen.setdefault(key, value)
            return given

        monkeypatch.setattr(owner, name, recorded)

    tokens = torch.arange(27).reshape(3, 9) + 100
    cache = model.new_cache()
    with torch.no_grad():
        model(tokens[:, :4], cache=cache)
        seen.clear()
        record(llama, "apply_rotary_emb", ("query", "key"), ("rotated_query", "rotated_key"))
        record(KVCache, "append", (), ("cached_key", "cached_value"))
        scores = layer.attention.compute_query_key_value_scores

        def compute(*args):
            mixed = scores(*args)
            by_head = dict(zip(("query_by_head", "repeated_key", "repeated_value"), args, strict=False))
            seen.update(by_head, mixed=mixed)
            return mixed

        monkeypatch.setattr(layer.attention, "compute_query_key_value_scores", compute)
        with Softmax(seen):
            model(tokens[:, 4:], cache=cache)
    return model.config, seen


def test_the_drawing_has_the_shapes_of_a_forward_pass(block):
    config, seen = block
    sizes = {"B": 3, "T": 5, "S": 9, "D": config.dim, "H": config.n_heads, "K": config.n_kv_heads}
    sizes |= {"hd": config.head_dim, "F": seen["gate"].shape[-1]}
    assert len(set(sizes.values())) == len(sizes)  # so that no letter can stand for another
    drawn = {}
    for text in ElementTree.fromstring(text_of(SVG)).iter():
        if "data-tensor" in text.attrib:
            letters = text.attrib["data-shape"].split()
            assert f"({', '.join(letters)})" in text.text  # the reader sees what is tested
            drawn |= dict.fromkeys(text.attrib["data-tensor"].split(), letters)
    assert {name: [sizes[letter] for letter in letters] for name, letters in drawn.items()} == {
        name: list(seen[name].shape) for name in drawn
    }
    assert set(drawn) == set(seen) - {"attention"}


def test_the_drawing_explains_its_letters():
    svg = text_of(SVG)
    letters = {letter for shape in re.findall(r'data-shape="([^"]*)"', svg) for letter in shape.split()}
    explained = " ".join(re.findall(r'class="note"[^>]*>([^<]*)<', svg))
    assert all(re.search(rf"\b{letter} ", explained) for letter in letters)
