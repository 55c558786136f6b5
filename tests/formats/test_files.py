"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import pickle
import re
import stat
import tempfile
from pathlib import Path

import pytest
import torch

from minillama.formats.checkpoint import write_checkpoint
from minillama.formats.files import (
    atomic_file,
    check_writable,
    read_safetensors,
    read_torch,
    release_pages,
    write_safetensors_file,
    write_torch,
)
from models import tiny_llama


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("mode", "text"), [("w", "näh\n"), ("wb", "näh\n".encode())])
@pytest.mark.parametrize("exists", [True, False])
def test_atomic_file_replaces_the_file_when_the_block_ends(tmp_path, mode, text, exists):
    path = tmp_path / "out.txt"
    if exists:
        path.write_text("old")
    with atomic_file(path, mode) as file:
        file.write(text)
        assert path.exists() == exists
        assert not exists or path.read_text() == "old"
    assert path.read_bytes() == "näh\n".encode()
    assert names(tmp_path) == ["out.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error, exists):
    path = tmp_path / "out.txt"
    if exists:
        path.write_text("old")
    with pytest.raises(error, match="on the way"), atomic_file(path) as file:
        file.write("half of the new")
        raise error("on the way")
    assert names(tmp_path) == (["out.txt"] if exists else [])
    assert not exists or path.read_text() == "old"


def test_an_error_while_saving_leaves_the_old_checkpoint(tmp_path):
    model, path = tiny_llama(n_layers=1), tmp_path / "model.pt"
    write_checkpoint(path, model.state_dict(), model.config)
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        write_checkpoint(path, model.state_dict(), model.config, note=lambda: None)
    assert path.read_bytes() == before and names(tmp_path) == ["model.pt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_obeys_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "out.txt") as file:
            file.write("new")
    finally:
        after = os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.txt").stat().st_mode) == mode
    assert after == umask


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_goes_on_pointing_and_its_target_is_replaced(tmp_path, dangling):
    target, link = tmp_path / "folder" / "target.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    if not dangling:
        target.write_text("old")
    link.symlink_to(target)
    with atomic_file(link) as file:
        file.write("new")
    assert link.is_symlink() and link.readlink() == target
    assert target.read_text() == "new"
    assert names(tmp_path) == ["folder", "link.txt"] and names(target.parent) == ["target.txt"]


def test_check_writable_touches_nothing(tmp_path):
    old = tmp_path / "old.txt"
    old.write_text("old")
    check_writable(old, tmp_path / "new.txt", str(tmp_path / "newer.txt"))
    assert names(tmp_path) == ["old.txt"] and old.read_text() == "old"


def test_check_writable_names_the_path_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "gone" / "out.txt", tmp_path / "file" / "out.txt"):
        with pytest.raises(FileNotFoundError, match=f"{path}: there is no folder {path.parent}; create it first"):
            check_writable(tmp_path / "fine.txt", path)
    with pytest.raises(IsADirectoryError, match=f"{re.escape(str(tmp_path))} is a folder; give the name of a file"):
        check_writable(tmp_path)

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(PermissionError, match="out.txt cannot be written: Permission denied; choose another folder"):
        check_writable(tmp_path / "out.txt")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal device to write to")
def test_a_device_is_written_to_and_not_replaced():
    reader, writer = os.openpty()
    with atomic_file(os.ttyname(writer)) as file:
        file.write("text\n")
    assert os.read(reader, 100).strip() == b"text" and os.isatty(writer)
    os.close(reader)
    os.close(writer)


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="only Linux releases pages")
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_released_pages_are_read_from_the_file_again_unless_they_were_changed(tmp_path, kind):
    wanted = {name: torch.randn(1 << 20) for name in "ab"}  # 4 MiB each
    if kind == "torch":
        write_torch(tmp_path / "file", wanted)
        found = read_torch(tmp_path / "file", mapped=True)
    else:
        write_safetensors_file(tmp_path / "file", wanted, {})
        found = read_safetensors(tmp_path / "file")

    def mapped():
        """MiB of files in this process's memory."""
        return int(Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0]) / 1024

    before = mapped()
    for tensor in found.values():
        tensor.sum()
    assert mapped() > before + 7
    found["b"][-5000] = 7.0  # in the middle of the tensor
    memory = torch.ones(1 << 20)
    release_pages(*found.values(), memory, torch.empty(3), torch.empty(1 << 20, device="meta"))
    assert mapped() < before + 5  # only "b", or what is not changed of it
    assert torch.equal(found["a"], wanted["a"]) and memory.sum() == 1 << 20
    assert found["b"][-5000] == 7.0 and torch.equal(found["b"][:-5000], wanted["b"][:-5000])
