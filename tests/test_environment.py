"""The environment of a run: packages that may be missing or broken, and the processes of the run."""

from __future__ import annotations

import platform
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from conftest import ROOT, break_package
from minillama.environment import PackageError, Process, keep_freed_memory, optional_package, this_process
from minillama.training.run_directory import RunDirectory
from tokenizer import Tokenizer

ERRORS = [
    ImportError("libfoo.so.1: cannot open\nshared object file"),
    OSError("no shared library"),
    AttributeError("module has no attribute 'x'"),
    TypeError("Descriptors cannot be created directly"),
    RuntimeError("no such thing"),
    SystemExit("bye"),
    ModuleNotFoundError("No module named 'protobuf'", name="protobuf"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_broken_package_raises_becomes_one_line_with_the_command_to_type(error):
    with pytest.raises(PackageError, match=r"^it needs p, and p is broken here \(.*\): pip install --force") as raised:
        with optional_package("p", "it needs p"):
            raise error
    assert not raised.value.missing and "\n" not in str(raised.value) and type(error).__name__ in str(raised.value)


def test_a_missing_package_is_told_from_a_broken_one_and_some_errors_go_through():
    with pytest.raises(PackageError, match=r"^it needs p: pip install p$") as raised:
        with optional_package("p", "it needs p"):
            raise ModuleNotFoundError("No module named 'p.q'", name="p.q")
    assert raised.value.missing
    with pytest.raises(KeyboardInterrupt, match="^$"), optional_package("p", "it needs p"):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="^mine$"), optional_package("p", "it needs p", passes=(ValueError,)):
        raise ValueError("mine")


TINY_JSON = (
    '{"version": "1.0", "added_tokens": [{"id": 1, "content": "</s>", "special": true, "single_word": false, '
    '"lstrip": false, "rstrip": false, "normalized": false}], '
    '"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
)


@pytest.mark.parametrize("package", ["tiktoken", "tokenizers"])
@pytest.mark.parametrize("when", ["import", "use"])
def test_a_tokenizer_whose_package_is_broken_is_refused_with_the_command_to_type(
    tmp_path, monkeypatch, package, when, asset
):
    path = tmp_path / "tokenizer.json"
    path.write_text(TINY_JSON, encoding="utf-8")
    if package == "tiktoken":
        path = asset("tokenizers/gpt2_encoder.json")
    if when == "import":
        break_package(monkeypatch, package, RuntimeError("built for another machine"))
    else:

        def fails(*_, **__):
            raise RuntimeError("built for another machine")

        monkeypatch.setitem(
            sys.modules, package, SimpleNamespace(Encoding=fails, Tokenizer=SimpleNamespace(from_str=fails))
        )
    with pytest.raises(
        ValueError, match=rf"{package} is broken here \(RuntimeError: built.*--force-reinstall {package}$"
    ):
        Tokenizer(tokenizer_model=path)


def test_a_bad_tokenizer_json_is_not_blamed_on_the_package(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {"type": "none"}}', encoding="utf-8")
    with pytest.raises(ValueError, match="is not a tokenizer.json that can be read"):
        Tokenizer(tokenizer_model=path)


@pytest.mark.parametrize("when", ["import", "making it", "first number"])
def test_metrics_are_kept_without_tensorboard_and_a_broken_one_is_told_of_once(tmp_path, monkeypatch, capsys, when):
    def fails(*_, **__):
        raise TypeError("Descriptors cannot\nbe created directly")

    if when == "import":
        break_package(monkeypatch, "tensorboard", TypeError("Descriptors cannot\nbe created directly"))
    else:
        writer = SimpleNamespace(add_scalar=fails)
        fake = ModuleType("torch.utils.tensorboard")
        fake.SummaryWriter = fails if when == "making it" else lambda *_, **__: writer
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    run = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        run.metric(step, loss=0.5, name="x")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "tensorboard is broken here (TypeError: Descriptors cannot be created directly)" in line


def test_a_missing_tensorboard_is_nothing_to_tell(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    RunDirectory(tmp_path).metric(1, loss=0.5)
    assert capsys.readouterr().err == "" and [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# The processes

SET = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ALONE = Process(0, 1, 0)


@pytest.mark.parametrize(
    "values, wanted",
    [
        ((None, None, None), ALONE),
        (("", "", ""), ALONE),
        ((None, "", None), ALONE),
        ((None, "4", None), ALONE),
        (("", "4", "3"), ALONE),
        (("3", None, "3"), ALONE),
        (("3", " ", "3"), ALONE),
        (("-1", None, "-1"), ALONE),
        (("0", "1", None), ALONE),
        ((None, None, "x"), ALONE),
        (("3", "4", "1"), Process(3, 4, 1)),
        (("3", "4", None), Process(3, 4, 3)),
        (("3", "4", ""), Process(3, 4, 3)),
    ],
)
def test_the_process_is_what_torchrun_says_or_alone(monkeypatch, values, wanted):
    for name, value in zip(SET, values, strict=True):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert this_process() == wanted


@pytest.mark.parametrize(
    "values, message",
    [
        (("one", "2", "0"), "environment variable RANK is 'one'; it must be a whole number"),
        (("0", "2.0", "0"), "environment variable WORLD_SIZE is '2.0'"),
        ((None, "two", None), "environment variable WORLD_SIZE is 'two'"),
        (("0", "2", "x" * 99), f"environment variable LOCAL_RANK is '{'x' * 40}'"),
        (("2", "2", "0"), "RANK=2, WORLD_SIZE=2, LOCAL_RANK=0; a rank must be from 0 to WORLD_SIZE - 1"),
        (("-1", "2", "0"), "RANK=-1, WORLD_SIZE=2"),
        (("0", "0", "0"), "RANK=0, WORLD_SIZE=0"),
        (("0", "2", "-1"), "WORLD_SIZE=2, LOCAL_RANK=-1"),
    ],
)
def test_process_numbers_that_cannot_be_are_told(monkeypatch, values, message):
    for name, value in zip(SET, values, strict=True):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as told:
        this_process()
    assert "unset" in str(told.value)


FAULTS = """
import resource, sys
import numpy as np
from minillama.environment import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(8 << 20)  # 64 MiB
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_was_freed_is_used_again_without_a_call_of_the_system():
    def faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < 10 < faults("returned")


@pytest.mark.parametrize("system", ["darwin", "win32", "linux"])
def test_other_systems_and_c_libraries_keep_their_way_with_memory(monkeypatch, system):
    def library(name):
        assert system == "linux"
        return SimpleNamespace()  # musl: no mallopt

    monkeypatch.setattr("ctypes.CDLL", library)
    monkeypatch.setattr(sys, "platform", system)
    keep_freed_memory()
