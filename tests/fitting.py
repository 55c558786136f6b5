"""Small tasks and classifiers, and their training in a folder of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from classifier import LlamaEmbeddingClassifier, LlamaPromptClassifier
from lora import apply_lora
from minillama.formats.files import write_torch
from minillama.text.batches import to_batch
from minillama.text.corpus import Corpus, Text
from minillama.text.documents import Tokens
from minillama.text.examples import Example, tokenize_examples
from minillama.text.labelled import Row
from minillama.training.answering import Instruction
from minillama.training.classification import Classification, row_losses
from minillama.training.distributed import Processes
from minillama.training.evaluation import forward
from minillama.training.language_modelling import LanguageModelling
from minillama.training.loop import train
from minillama.training.run_directory import RunDirectory
from minillama.training.settings import Settings
from models import some_stories, tiny_llama


class Bag(nn.Module):
    """The smallest model of the right shape: a mean of embeddings, and one score a class."""

    def __init__(self, classes=3, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(20, classes, generator=generator))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.seen = []

    def forward(self, ids, mask=None):
        self.seen.append((self.training, ids.tolist()))
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        mean = (self.table[ids] * mask.unsqueeze(-1)).sum(1) / mask.sum(-1, keepdim=True)
        return mean.log_softmax(-1)


def some_rows(count=11, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, n: torch.randint(low, high, (n,), generator=generator).tolist()  # noqa: E731
    return [Row(i % classes, f"row {i}", tuple(draw(0, 20, n))) for i, n in enumerate(draw(1, 9, count))]


def settings(**changes):
    """The settings of the loop and of the task together; `split` parts them."""
    return SimpleNamespace(**({"epochs": 2, "batch_size": 4, "lr": 0.05, "seed": 3} | changes))


def split(chosen, rows, dev):
    """The task on these rows, and the settings of the loop."""
    of_the_task = {field.name for field in dataclasses.fields(Classification)}
    values = vars(chosen)
    task = Classification(rows, dev, **{name: value for name, value in values.items() if name in of_the_task})
    return task, Settings(**{name: value for name, value in values.items() if name not in of_the_task})


def quiet(line):
    pass


class Fit:
    """Trains in a folder of its own under tmp_path, or in one that has a name already."""

    def __init__(self, tmp_path):
        self.tmp_path, self.count = tmp_path, 0

    def run(self, name=None):
        self.count += 1
        run = RunDirectory(self.tmp_path / (name or str(self.count)))
        run.path.mkdir(exist_ok=True)
        return run

    def __call__(self, model, rows, dev, chosen, name=None, log=quiet, seen=None):
        run = self.run(name)

        def write_best(state, epoch, evaluation):
            write_torch(run.best_path, {"model": state})
            if seen:
                seen(state, epoch, evaluation)

        train(model, *split(chosen, rows, dev), run, write_best=write_best, log=log)
        return run


def metrics(run):
    lines = [json.loads(line) for line in run.metrics_path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def a_classifier(option="finetune", dropout=0.0, seed=5, classes=3):
    torch.manual_seed(seed)
    config = SimpleNamespace(
        llama=tiny_llama(seed=seed),
        num_labels=classes,
        hidden_dropout_prob=dropout,
        option="lora" if option == "dora" else option,
    )
    model = LlamaEmbeddingClassifier(config)
    return model if option == "finetune" else apply_lora(model, 2, 4.0, dora=option == "dora")


def state_of(run):
    return torch.load(run.last_path, weights_only=True)


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert_same(dict(enumerate(a)), dict(enumerate(b)))
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


class Words:
    def encode(self, name, bos, eos):
        return [{"bad": 7, "fair": 8, "good": 9}[name]]


def classifier(head="linear", option="finetune", classes=2, dropout=0.0, **sizes):
    llama = tiny_llama(**({"vocab_size": 20, "dim": 8, "n_layers": 1, "n_heads": 2, "dropout": dropout} | sizes))
    config = SimpleNamespace(llama=llama, num_labels=classes, hidden_dropout_prob=dropout, option=option)
    torch.manual_seed(3)
    if head == "prompt":
        model = LlamaPromptClassifier(config, Words(), ["bad", "fair", "good"][:classes])
    else:
        model = LlamaEmbeddingClassifier(config)
        nn.init.normal_(model.classifier_head.weight)
    model = apply_lora(model, 2, 4.0) if option == "lora" else model
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return model.train()


def some_texts(lengths=(4, 2, 5, 3, 3), classes=2):
    draw = torch.Generator().manual_seed(0)
    return [
        Row(i % classes, "", tuple(torch.randint(4, 20, (n,), generator=draw).tolist())) for i, n in enumerate(lengths)
    ]


def task(rows=None, **changes):
    rows = rows or some_texts()
    return Classification(rows, rows, **({"epochs": 2, "batch_size": 4, "seed": 3} | changes))


def losses(model, chosen, positions=(0, 1, 2, 3, 4), dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return chosen.losses(model, list(positions), dtype)[0]


def plain(model, positions=(0, 1, 2, 3, 4), dtype=torch.float32, seed=0, smoothing=0.0):
    """The loss without any regularizer, by the formula."""
    torch.manual_seed(seed)
    batch = to_batch(some_texts(), list(positions), 0)
    return row_losses(forward(model, batch.ids, batch.mask, dtype), batch.labels, smoothing)


LENGTH = 8


def some_tokens(tokenizer, documents):
    rows = [tokenizer.encode(document, bos=True, eos=True) for document in documents]
    starts = np.cumsum([0, *map(len, rows)]).astype("<u8")
    text_bytes = np.array([len(document.encode()) for document in documents], "<u8")
    ids = np.array(sum(rows, []), "<u2")
    return Tokens(Path(), ids, starts, text_bytes, ids.tobytes().hex())


def a_task(tokenizer, *, texts=2, held_out=2.0, steps=10, **changes):
    found = [
        Text(f"t{i}", [some_tokens(tokenizer, some_stories(8, seed=i, words=12 + 12 * i))], LENGTH, held_out)
        for i in range(texts)
    ]
    settings = {"batch_size": 4, "eval_every": 4, "seed": 3, "sample_tokens": 5} | changes
    return LanguageModelling(Corpus(found, 3), tokenizer, steps, **settings)


def some_examples(tokenizer, count, seed=0):
    pairs = zip(some_stories(count, seed=seed, words=12), some_stories(count, seed=seed + 1, words=6), strict=True)
    return tokenize_examples(
        "a.jsonl", [Example(a[: 5 + 7 * i % 40].strip(), b[: 3 + 5 * i % 20]) for i, (a, b) in enumerate(pairs)],
        tokenizer, 32, 6,
    )[0]  # fmt: skip


def an_instruction(tokenizer, **changes):
    splits = some_examples(tokenizer, 11), some_examples(tokenizer, 7, seed=5)
    settings = {"epochs": 2, "batch_size": 4, "window": 32, "seed": 3, "max_new_tokens": 6} | changes
    return Instruction(*splits, tokenizer, **settings)


def a_llama(seed=0):
    return tiny_llama(seed=seed, vocab_size=320, causal=True)


def by_hand(model, window):
    """(summed loss in nats, how many guessed right), token by token in float64."""
    nats, right = 0.0, 0
    for t in range(1, len(window)):
        with torch.no_grad():
            logits = model(torch.tensor([window[:t].tolist()]))[0][0, -1].double()
        nats -= logits.log_softmax(-1)[int(window[t])].item()
        right += int(logits.argmax() == int(window[t]))
    return nats, right


def judged(task, model, **changes):
    return task.score(model, torch.float32, Processes(), lambda: None, "epoch 1", **changes)
