"""Windows, simulated: the program without what only Unix has, and with files that cannot be replaced while open."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from minillama.environment import keep_freed_memory
from minillama.formats.files import release_pages

# The simulation reads /proc. On Windows itself, the other tests show what this one does.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="simulates Windows with Linux's /proc")

# Python reads a module of this name at its start.
WINDOWS = r"""
import builtins, errno, os, signal, sys

for name in ("SIGPIPE", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGQUIT", "SIGCHLD"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("getuid", "geteuid", "getgid", "getegid", "set_blocking", "mkfifo", "chown", "getpgid", "killpg", "setsid",
             "O_DIRECTORY", "O_NOFOLLOW"):
    if hasattr(os, name):
        delattr(os, name)

MISSING = {"fcntl", "resource", "readline", "pwd", "grp", "termios", "tty", "pty", "syslog"}


class NoSuchModule:
    def find_spec(self, name, path=None, target=None):
        if name in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


for name in MISSING:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, NoSuchModule())

real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "rename", "unlink", "remove")}

def no_folders(path, flags, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
    return real["open"](path, flags, *args, **kwargs)


def fsync(descriptor):
    flags = [line for line in builtins.open(f"/proc/self/fdinfo/{descriptor}") if line.startswith("flags")]
    if int(flags[0].split()[1], 8) & 3 == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    return real["fsync"](descriptor)


def in_use(path):
    # Whether this process has the file open, or mapped into memory
    path = os.path.realpath(path)
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}") == path and os.path.isfile(path):
                return True
        except OSError:
            pass
    with builtins.open("/proc/self/maps") as maps:
        return any(line.rstrip("\n").endswith(" " + path) for line in maps)


def unless_in_use(name):
    def call(*paths, **kwargs):
        for path in paths[:2]:
            if isinstance(path, (str, os.PathLike)) and in_use(path):
                with builtins.open(os.environ["IN_USE"], "a") as log:
                    log.write(f"{name} {path}\n")
                raise PermissionError(errno.EACCES, "The process cannot access the file", os.fspath(path))
        return real[name](*paths, **kwargs)
    return call


os.open, os.fsync = no_folders, fsync
for name in ("replace", "rename", "unlink", "remove"):
    setattr(os, name, unless_in_use(name))
"""
# Said by the program itself, and not only in this file: what runs is the simulation.
CHECK = """
import importlib, os, signal
for name in ("fcntl", "resource", "readline"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is still here")
assert not hasattr(signal, "SIGPIPE") and not hasattr(os, "getuid")
"""


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Runs Python in a folder of its own, as on Windows; gives the finished process."""
    folder = tmp_path_factory.mktemp("windows")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(WINDOWS, encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LC_", "LANG"))}
    environ |= {"PYTHONPATH": str(folder / "site"), "IN_USE": str(folder / "in-use"), "OMP_NUM_THREADS": "1"}
    environ |= {"NUMBA_DISABLE_JIT": "1", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}

    def run(*arguments: str, input: bytes | None = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=environ, input=input, capture_output=True, timeout=300
        )

    run.folder = folder  # type: ignore[attr-defined]
    assert run("-c", CHECK).returncode == 0
    return run


PROGRAM = str(ROOT / "run_llama.py")


def succeeded(done) -> str:
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode()


def test_the_help_and_each_script_start(windows):
    assert "usage: python run_llama.py" in succeeded(windows(PROGRAM, "--help"))
    for script in ("fetch_data.py", "prepare_submit.py", "sanity_check.py", "benchmark.py"):
        assert "usage" in succeeded(windows(str(ROOT / script), "--help"))


def test_the_modules_of_the_program_can_be_imported(windows):
    names = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "minillama").rglob("*.py")]
    names = [".".join(name.parts) for name in names if name.name not in ("__init__", "numba_step")]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import importlib\n"
    succeeded(windows("-c", code + f"for name in {sorted(names)!r}: importlib.import_module(name)"))


def test_prompts_come_from_a_pipe(windows):
    arguments = ("--prompt_file", "-", "--temperature", "0", "--max_new_tokens", "4", "--json")
    done = windows(PROGRAM, *arguments, input="Caf\u00e9\r\nThe cat\r\n".encode())
    lines = [json.loads(line) for line in succeeded(done).splitlines()]
    assert [line["prompt"] for line in lines] == ["Caf\u00e9", "The cat"]


def test_a_closed_pipe_ends_the_program_with_its_code(windows):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import run_llama\n"
    code += "def parse(argv): raise BrokenPipeError\nrun_llama.parse = parse\nsys.exit(run_llama.main([]))"
    assert windows("-c", code).returncode == 128 + 13


@pytest.mark.slow
def test_fine_tuning_stopping_and_going_on_and_a_report(windows):
    folder = windows.folder
    rows = [f"{i % 2} ||| the film number {i} is {'bad' if i % 2 else 'good'}\n" for i in range(8)]
    for split in ("train", "dev", "test"):
        (folder / f"{split}.txt").write_text("".join(rows), encoding="utf-8")
    (folder / "labels.json").write_text('["good", "bad"]', encoding="utf-8")
    data = [part for split in ("train", "dev", "test") for part in (f"--{split}", f"{split}.txt")]
    data += ["--label-names", "labels.json", "--dev_out", "dev-finetuning-output.txt"]
    data += ["--test_out", "test-finetuning-output.txt", "--run_dir", "mine"]
    arguments = ("--option", "finetune", *data, "--epochs", "2", "--batch_size", "4", "--save_every", "1")
    succeeded(windows(PROGRAM, *arguments))
    before = (folder / "dev-finetuning-output.txt").read_bytes()
    assert before.count(b"\n") == 8 and b"\r" not in before
    succeeded(windows(PROGRAM, "--resume", "--run_dir", "mine"))  # finished: predicts again, over the same files
    assert (folder / "dev-finetuning-output.txt").read_bytes() == before
    succeeded(windows(PROGRAM, "--option", "report", "--runs", "mine"))
    assert "mine" in (folder / "report.html").read_text(encoding="utf-8")
    model = next(folder.glob("finetune-*.pt"))
    found = succeeded(windows(PROGRAM, "--option", "classify", "--finetuned", model.name, "--prompt", "a good film"))
    assert found.startswith(("good ", "bad "))


def test_nothing_of_glibc_is_called_elsewhere(monkeypatch):
    def no_library(name):
        raise TypeError("LoadLibrary() argument 1 must be str, not None")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    with pytest.raises(TypeError, match="LoadLibrary"):
        keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "sysconf")
    keep_freed_memory()
    release_pages(torch.zeros(10_000))


def test_no_file_was_replaced_or_removed_while_it_was_open(windows):
    log = windows.folder / "in-use"
    done = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    assert [line for line in done if not line.endswith("lock")] == []  # a lock that stays is no harm
