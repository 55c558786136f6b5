"""Safetensors files: written, read, and refused."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

from config import parameter_shapes
from conftest import umask
from llama import load_pretrained
from minillama.formats.checkpoint import METADATA_KEY, read_checkpoint, write_safetensors
from models import described, safetensors_file, tiny_llama

IDS = torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(0))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"norm": "rmsnorm", "causal": True}])
def test_safetensors_give_the_same_model_back(tmp_path, changes):
    model = tiny_llama(**changes)
    path = tmp_path / "model.any"
    write_safetensors(path, model.state_dict(), model.config)
    again = load_pretrained(path)
    assert again.config == model.config and same(again.state_dict(), model.state_dict())
    assert torch.equal(again(IDS)[0], model(IDS)[0])
    stored = safetensors.torch.load_file(path)
    assert ("output.weight" in stored) == (not model.config.tie_embeddings)
    assert stored.keys() == set(parameter_shapes(model.config)) - {"output.weight"} | stored.keys() & {"output.weight"}
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~umask()) and not list(tmp_path.glob(".*"))


def to_bf16_by_hand(tensor: torch.Tensor) -> torch.Tensor:
    """The upper half of float32's bits, to the nearest, a tie to the even."""
    bits = tensor.numpy().view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) & np.uint64(0xFFFF0000)
    return torch.from_numpy(rounded.astype(np.uint32).view(np.float32))


def test_safetensors_round_to_bf16(tmp_path):
    model = tiny_llama()
    write_safetensors(tmp_path / "a", model.state_dict(), model.config, torch.bfloat16)
    write_safetensors(tmp_path / "b", model.state_dict(), model.config)
    for name, tensor in read_checkpoint(tmp_path / "a").state.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.float(), to_bf16_by_hand(model.state_dict()[name]))
    assert (tmp_path / "a").stat().st_size < 0.6 * (tmp_path / "b").stat().st_size
    again = load_pretrained(tmp_path / "a")
    assert {p.dtype for p in again.parameters()} == {
        torch.float32
    } and again.output.weight is again.tok_embeddings.weight


def test_safetensors_of_one_model_are_the_same_bytes(tmp_path):
    """The library itself puts the metadata in an order of chance."""
    model, found = tiny_llama(n_layers=1), set()
    for _ in range(12):
        write_safetensors(tmp_path / "a", model.state_dict(), model.config)
        found.add((tmp_path / "a").read_bytes())
    assert len(found) == 1
    (content,) = found
    size = struct.unpack_from("<Q", content)[0]
    assert size % 8 == 0 and json.loads(content[8 : 8 + size])["__metadata__"]["format"] == "pt"


def test_safetensors_whose_length_begins_like_a_pickle_are_read(tmp_path):
    model, path = tiny_llama(n_layers=1), tmp_path / "a.safetensors"
    write_safetensors(path, model.state_dict(), model.config)
    content = path.read_bytes()
    size = struct.unpack_from("<Q", content)[0]
    header = content[8 : 8 + size].rstrip().ljust(size + (0x80 - size) % 0x100)
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    assert path.read_bytes()[0] == 0x80 and same(load_pretrained(path).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "metadata, message",
    [
        (None, 'has no "model_args", so the model\'s sizes are unknown'),
        ({"format": "pt"}, 'has no "model_args"'),
        (described(model_args=None), 'has no "model_args"'),
        ({METADATA_KEY: "{"}, "is damaged or cut short"),
        ({METADATA_KEY: "[1]"}, "is damaged or cut short"),
        ({METADATA_KEY: "5"}, "is damaged or cut short"),
        (described(format_version=9), "has format version 9"),
        (described(kind="classifier"), "is a fine-tuned classifier"),
        (described(model_args=tiny_llama(dim=64).config.to_dict()), "its model_args ask for"),
    ],
)
def test_safetensors_that_are_not_ours_are_refused_in_one_line(tmp_path, metadata, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_pretrained(safetensors_file(tmp_path / "a.safetensors", metadata))
    assert "\n" not in str(raised.value) and "a.safetensors" in str(raised.value)


def test_safetensors_with_ours_in_the_metadata_are_read(tmp_path):
    """The files that are refused above differ from this one only in the fault that they name."""
    model = load_pretrained(safetensors_file(tmp_path / "a", described()))
    assert same(model.state_dict(), tiny_llama().state_dict())
    with pytest.raises(ValueError, match="norm.weight holds NaN"):
        load_pretrained(safetensors_file(tmp_path / "b", described(), **{"norm.weight": torch.full((32,), torch.nan)}))
    with pytest.raises(ValueError, match="'norm.weight', which is not a tensor of weights"):
        load_pretrained(safetensors_file(tmp_path / "c", described(), **{"norm.weight": torch.ones(32).to(torch.int8)}))


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 0.9999])
def test_safetensors_cut_short_are_refused(tmp_path, share):
    model = tiny_llama()
    path = tmp_path / "a.safetensors"
    write_safetensors(path, model.state_dict(), model.config)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"a\.safetensors is .*(damaged or cut short|or was cut short)"):
        load_pretrained(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or cut short"):
        load_pretrained(path)


def test_safetensors_that_cannot_be_written_leave_the_old_file(tmp_path, monkeypatch):
    model, path = tiny_llama(), tmp_path / "a"
    path.write_bytes(b"before")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(path, model.state_dict(), model.config)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["a"]
