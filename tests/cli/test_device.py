"""The choice of a device, and what is switched on CUDA. Cards are made up: their tensors lie on the CPU."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minillama.cli.loading import choose_device, choose_dtype
from minillama.decoding import filters
from minillama.layers.precision import sum_dtype


@pytest.fixture
def cards(monkeypatch):
    """Makes as many CUDA devices exist as the test says."""

    def exist(count: int) -> None:
        def empty(size: int, device: torch.device) -> torch.Tensor:
            if device.type == "cuda" and (device.index or 0) >= count:
                raise RuntimeError("CUDA error: invalid device ordinal")
            return torch.zeros(size)

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    return exist


def chosen(device: str | None = None, use_gpu: bool = False, deterministic: bool = False) -> torch.device:
    options: Any = SimpleNamespace(device=device, use_gpu=use_gpu, deterministic=deterministic)
    return choose_device(options)


def under_torchrun(monkeypatch, rank: int, world: int, local_rank: int) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, str(value))


def test_one_process_takes_the_first_card_or_the_named_one(cards, monkeypatch):
    cards(2)
    assert chosen(use_gpu=True) == chosen("cuda") == torch.device("cuda:0")
    assert chosen("cuda:1") == torch.device("cuda:1") and chosen() == torch.device("cpu")
    under_torchrun(monkeypatch, 0, 1, 0)  # torchrun --nproc_per_node=1
    assert chosen(use_gpu=True) == torch.device("cuda:0") and chosen("cuda:1") == torch.device("cuda:1")


def test_each_process_takes_the_card_of_its_rank_on_this_machine(cards, monkeypatch):
    cards(2)
    under_torchrun(monkeypatch, 3, 4, 1)  # the second process of the second machine
    assert chosen(use_gpu=True) == chosen("cuda") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="--device cuda:1 would put 4 processes on one card; give --device cuda"):
        chosen("cuda:1")
    assert chosen("cpu") == torch.device("cpu")


def test_without_enough_cards_the_message_says_so(cards, monkeypatch):
    cards(1)
    with pytest.raises(ValueError, match="--device cuda:1 is not available here; give cpu, cuda or cuda:N"):
        chosen("cuda:1")
    under_torchrun(monkeypatch, 1, 2, 1)
    with pytest.raises(ValueError, match="needs a CUDA device of its own, and there are 1; start fewer processes"):
        chosen(use_gpu=True)
    cards(0)
    with pytest.raises(ValueError, match="--use_gpu: no CUDA device is available here; leave it out to use the CPU"):
        chosen(use_gpu=True)


def test_on_cuda_cudnns_attention_is_off_and_deterministic_kernels_can_be_asked_for(cards, monkeypatch):
    calls: list[tuple[str, bool]] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: calls.append(("cudnn", on)))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: calls.append(("deterministic", on)))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    cards(1)
    chosen(deterministic=True)
    assert calls == []  # the CPU needs nothing
    chosen(use_gpu=True)
    assert calls == [("cudnn", False)]
    chosen(use_gpu=True, deterministic=True)
    assert calls[1:] == [("cudnn", False), ("deterministic", True)]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


# A Mac's GPU, which nobody has tried


def test_a_macs_gpu_is_let_through_with_a_notice_and_in_float32(cards, capsys, monkeypatch):
    cards(0)  # torch.empty succeeds for "mps", as on a Mac
    mac = chosen("mps")
    assert mac == torch.device("mps")
    assert "notice: --device mps is untested; leave it out to use the CPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)  # as an M2's
    dtypes = {name: choose_dtype(SimpleNamespace(dtype=name), mac) for name in ("auto", "bf16")}
    assert dtypes == {"auto": torch.float32, "bf16": torch.bfloat16}
    under_torchrun(monkeypatch, 0, 2, 0)
    with pytest.raises(ValueError, match="--device mps runs in a single process; start it without torchrun"):
        chosen("mps")


def test_without_a_mac_or_on_another_device_the_message_says_so():
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="--device mps is not available here; give cpu, cuda or cuda:N"):
            chosen("mps")
    with pytest.raises(ValueError, match="--device meta is not supported; give cpu, cuda, cuda:N or mps"):
        chosen("meta")


def test_where_there_is_no_float64_the_random_share_is_float32_and_a_draw_follows_the_probabilities(monkeypatch):
    """A Mac's GPU refuses float64. The share is drawn there, and the CPU adds up."""
    assert (sum_dtype(torch.device("mps")), sum_dtype(torch.device("cpu"))) == (torch.float32, torch.float64)
    monkeypatch.setattr(filters, "sum_dtype", lambda device: torch.float32)
    dtypes, rand = [], torch.rand

    def drawn(*size, dtype, **settings):
        dtypes.append(dtype)
        return rand(*size, dtype=dtype, **settings)

    monkeypatch.setattr(torch, "rand", drawn)
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3]).expand(20_000, -1)
    counts = torch.bincount(filters.draw(probabilities, torch.Generator().manual_seed(0)), minlength=4) / 20_000
    assert dtypes == [torch.float32] and counts[1] == 0
    assert counts.tolist() == pytest.approx([0.1, 0.0, 0.6, 0.3], abs=0.015)
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, **settings: torch.full(size, 1 - 2**-24, dtype=dtype))
    assert filters.draw(probabilities[:1]).tolist() == [3]  # the largest share is below the whole
