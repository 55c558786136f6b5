"""--compile: the number of graphs over an epoch of bucketed lengths, and equal results. No code is compiled here."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from classifier import LlamaEmbeddingClassifier
from llama import Llama
from minillama.decoding.sampling import generate
from minillama.text.labelled import Row
from minillama.training.classification import Classification
from minillama.training.compilation import compile_model, writing
from minillama.training.distributed import Processes
from minillama.training.loop import Training
from minillama.training.run_directory import RunDirectory
from minillama.training.settings import Settings
from models import random_ids, tiny_llama

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def counters():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def rows_of(lengths: list[int]) -> list[Row]:
    return [Row(i % 3, f"row {i}", tuple(1 + (i * j) % 60 for j in range(n))) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_an_epoch_of_bucketed_lengths_has_three_graphs_at_most(dtype, tmp_path, counters):
    lengths = [3 + i % 60 for i in range(96)]
    llama = tiny_llama(dropout=0.1, max_seq_len=64)
    settings = {"num_labels": 3, "hidden_dropout_prob": 0.1, "option": "finetune"}
    model = LlamaEmbeddingClassifier(SimpleNamespace(llama=llama, **settings))
    compile_model(model, CPU, dynamic=True, backend="eager")
    task = Classification(rows_of(lengths), rows_of(lengths[:40]), epochs=2, batch_size=8, seed=1)
    run = RunDirectory(tmp_path)
    run.create({})
    training = Training(model, task, Settings(lr=1e-3, dtype=dtype), run, Processes(), lambda line: None)
    training.epoch()
    training.end_epoch(lambda *_: None)
    widths = {max(len(task.rows[i].ids) for i in batch) for batch in task.plan(1)}
    assert len(widths) > 8
    assert 2 <= counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]


KINDS = {
    "bidirectional": {},
    "rmsnorm": {"causal": True, "norm": "rmsnorm"},
    "window": {"causal": True, "sliding_window": 5},
    "alibi": {"causal": True, "position_embedding_type": "alibi"},
    "differential": {"causal": True, "attention_type": "differential"},
}


@pytest.mark.parametrize(
    "kind",
    [kind if kind == "rmsnorm" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_compiled_it_gives_the_same_losses_and_gradients(kind, counters):
    model = tiny_llama(**KINDS[kind]).double().train()
    plain = copy.deepcopy(model)
    compile_model(model, CPU, dynamic=True, backend="eager")
    for length in (9, 17):
        ids = random_ids(3, length, seed=length)
        found = [backward(one, ids) for one in (model, plain)]
        for mine, wanted in zip(*found, strict=True):
            torch.testing.assert_close(mine, wanted, atol=1e-9, rtol=1e-7)
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]


def backward(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """The losses of predicting each token, and all gradients."""
    model.zero_grad()
    (losses, _), _ = model(ids, ids, losses=True)
    losses.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [losses.detach(), *gradients]


def test_text_is_written_without_compiling(counters):
    model: Llama = tiny_llama(causal=True)
    wanted = generate(model, random_ids(1, 5), 12, temperature=0.0)
    compile_model(model, CPU, dynamic=True, backend="eager")
    with writing(model, torch.float32) as llama:
        found = generate(llama, random_ids(1, 5), 12, temperature=0.0)
    assert found.equal(wanted) and counters["stats"]["unique_graphs"] == 0
    model(random_ids(2, 5))
    assert counters["stats"]["unique_graphs"] == 1
