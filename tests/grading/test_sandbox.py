"""The sandbox: what a student's code may do, and what ends it."""

from __future__ import annotations

import os

import numpy as np
import pytest

from minillama.grading import wire
from minillama.grading.confinement import Limits
from minillama.grading.kit_setups import PLAIN
from minillama.grading.parts import cases
from minillama.grading.sandbox import Sandbox, judged_files, namespaces

LLAMA = """
import ctypes, os, shutil, socket, subprocess, sys, threading, time
import torch
from torch import nn

class LayerNorm(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps, self.weight, self.bias = eps, nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        BODY
        wide = x.float()
        away = wide - wide.mean(-1, keepdim=True)
        normed = away / torch.sqrt((away * away).mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float() + self.bias.float()).to(x.dtype)
"""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    with Sandbox(tmp_path_factory.mktemp("empty"), PLAIN["fall2025"], Limits(seconds=3, wall=20.0)) as box:
        yield box


@pytest.fixture
def run(sandbox, tmp_path):
    """Runs the probes of the norm with a LayerNorm that begins with these lines."""

    def run_body(body="", source=LLAMA):
        lines = body.splitlines() or ["pass"]
        code = source.replace("BODY", ("\n" + " " * 8).join(lines))
        (tmp_path / "llama.py").write_text(code, encoding="utf-8")
        sandbox.folder = tmp_path
        return sandbox.run("norm", cases("norm", PLAIN["fall2025"], 0))

    return run_body


def test_gives_back_arrays(run):
    result = run()
    probes = cases("norm", PLAIN["fall2025"], 0)
    assert not result.end and not result.problems and result.done
    assert sorted(result.answers) == list(range(len(probes)))
    x = probes[0].arrays["x"].astype(np.float64)
    away = x - x.mean(-1, keepdims=True)
    wanted = away / np.sqrt((away**2).mean(-1, keepdims=True) + probes[0].settings["eps"])
    wanted = wanted * probes[0].arrays["weight"] + probes[0].arrays["bias"]
    np.testing.assert_allclose(result.answers[0]["output"], wanted, atol=1e-5)


# What the code does, and what must be in the sentence about it.
HOSTILE = {
    "loops": ("while True: pass", "computed for more than 3 seconds"),
    "exits": ("sys.exit(0)", "it calls sys.exit"),
    "exits at once": ("os._exit(0)", "the process ended before it had answered"),
    "takes 10 GB": ("torch.ones(10**10, dtype=torch.uint8)", "more than 3 GB of memory"),
    "takes 10 GB in Python": ("bytearray(10**10)", "more than 3 GB of memory"),
    "prints 1 GB": ("for _ in range(1000): print('x' * 10**6)", "more than 16 MB"),
    "prints 1 GB unseen": (
        "for _ in range(1000):\n    try: os.write(1, b'x' * 10**6)\n    except OSError: pass",
        "printed more than 16 MB",
    ),
    "writes many files": ("for i in range(40): open(f'f{i}', 'wb').write(b'x' * (15 << 20))", "wrote more than 64 MB"),
    "forks": ("os.fork()", "start another process"),
    "starts a program": ("subprocess.run(['true'])", "start another process"),
    "kills its parent": ("os.kill(os.getppid(), 9)", "end a process"),
    "deletes a folder": ("shutil.rmtree(TARGET)", "tried to change"),
    "deletes a file": ("os.remove(TARGET + '/precious.txt')", "tried to change"),
    "writes outside": ("open(TARGET + '/precious.txt', 'w')", "tried to write"),
    "uses the network": ("socket.create_connection(('127.0.0.1', 9), 1)", "use the network"),
    "reads the answers": ("open(GRADER + '/answers.py').read()", "belongs to the grader"),
    "writes into every channel": (
        "for fd in range(3, 1000):\n    try: os.write(fd, b'forged' * 99)\n    except OSError: pass",
        "something else was written to the channel",
    ),
    "closes every channel": ("os.closerange(3, 2000)", "the process ended"),
    "crashes": ("ctypes.string_at(0)", "signal 11"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_code_ends_with_a_sentence_and_touches_nothing(run, tmp_path_factory, case):
    target = tmp_path_factory.mktemp("target")
    (target / "precious.txt").write_text("mine")
    os.chmod(target, 0o777)
    os.chmod(target / "precious.txt", 0o666)
    body, words = HOSTILE[case]
    from minillama.environment import HERE

    body = body.replace("TARGET", repr(str(target))).replace("GRADER", repr(str(HERE / "minillama" / "grading")))
    result = run(body)
    said = [result.end, *(f"{problem.rule} {problem.text}" for problem in result.problems.values())]
    assert any(words in sentence for sentence in said), said
    assert (target / "precious.txt").read_text() == "mine"
    assert result.end or not result.answers  # either gives no points
    assert not run().end  # the next one is judged as usual


def test_forks_through_c_are_limited_and_ended(run):
    result = run("fork = ctypes.CDLL(None).fork\nwhile True: fork()")
    assert result.end and not result.answers
    assert not run().end


@pytest.mark.skipif(not namespaces() and os.geteuid() != 0, reason="unshare is not allowed here")
def test_a_signal_through_c_does_not_end_the_grader(run):
    result = run("ctypes.CDLL(None).kill(os.getppid(), 9)")
    assert not result.end or "ended" in result.end
    assert not run().end


def test_writing_through_c_is_refused(run, tmp_path_factory):
    target = tmp_path_factory.mktemp("target")
    os.chmod(target, 0o777)
    run(f"ctypes.CDLL(None).open({str(target / 'evil').encode()!r}, 0o101, 0o666)")
    assert not list(target.iterdir())


def test_patched_functions_and_forged_prints_change_nothing(run):
    lines = ["torch.allclose = lambda *a, **k: True", "torch.equal = torch.allclose", "torch.save = lambda *a: None"]
    result = run("\n".join([*lines, "print('norm: 100 points')", "return x"]))
    assert not np.allclose(result.answers[0]["output"], run().answers[0]["output"], atol=1e-2)


def test_a_loop_at_the_top_is_told_with_its_module(run):
    result = run(source="while True: pass\n")
    assert result.loading == "llama" and "computed for more than" in result.end


def test_an_error_is_told_with_its_line(run):
    problem = run("raise ValueError('no idea')").problems[0]
    assert problem[:3] == ("ValueError", "no idea", "llama.py") and problem.function == "forward"
    assert problem.place == f"llama.py, line {problem.line} (forward)"
    problem = run(source="def f(:\n").problems[0]
    assert (problem.type, problem.module, problem.line) == ("SyntaxError", "llama", 1)


def test_the_grader_cannot_be_imported_and_ours_is_not_taken_for_a_missing_module(run):
    assert run("import minillama.grading.answers").problems[0].type == "ModuleNotFoundError"
    assert run("import lora").problems[0].type == "ModuleNotFoundError"


def test_each_run_gets_a_fresh_copy(run, tmp_path):
    lines = ["if not hasattr(torch, 'fresh'): torch.fresh = not os.path.exists('mark')"]
    body = "\n".join([*lines, "assert torch.fresh", "open('mark', 'w').close()"])
    assert not run(body).problems
    assert not run(body).problems
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama.py"]


def test_copies_no_links_caches_or_large_files(tmp_path):
    (tmp_path / "llama.py").write_text("x = 1")
    (tmp_path / "big.bin").write_bytes(bytes(3 << 20))
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "llama.pyc").write_bytes(b"x")
    (tmp_path / "link.py").symlink_to("/etc/passwd")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("x")
    assert [path.name for path in judged_files(tmp_path)] == ["llama.py"]


def test_messages_go_there_and_back():
    arrays = {"file": np.arange(6, dtype=np.float32).reshape(2, 3).T, "x.y": np.array(2.0), "none": np.zeros((0, 3))}
    header, found = wire.unpacked(wire.packed({"part": "norm"}, arrays))
    assert header == {"part": "norm"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype and found[name].shape == array.shape


def test_messages_that_lie_are_refused():
    with pytest.raises(wire.BadMessage, match="no numbers"):
        wire.packed({}, {"x": np.array([{}])})
    raw = wire.packed({}, {"x": np.zeros(4)})
    for bad in (raw[:-30], raw.replace(b"(4,)", b"(9,)"), b"garbage", raw.replace(b"'<f8'", b"'|O8'")):
        with pytest.raises(wire.BadMessage, match="message|wrong size or kind"):
            wire.unpacked(bad)
    reader, writer = os.pipe()
    os.write(writer, b"token" + (1 << 40).to_bytes(8, "little"))
    with pytest.raises(wire.BadMessage, match="something else"):
        wire.receive(reader, before=b"token")
