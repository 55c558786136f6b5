"""The speed and memory of one fine-tuning epoch by this program, by transformers and by the course's procedure."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classifier import LlamaEmbeddingClassifier
from llama import LayerNorm, Llama, LlamaConfig, load_pretrained
from lora import apply_lora
from minillama.benchmarks import measuring
from minillama.environment import optional_package
from minillama.layers.precision import DTYPES, autocast
from minillama.text.batches import by_length, cut_in_batches, shuffled_batches, to_batch, tokenize_rows
from minillama.text.labelled import Row, class_names, read_labels, read_rows
from minillama.training.classification import Classification
from minillama.training.distributed import Processes
from minillama.training.evaluation import evaluate
from minillama.training.loop import Training
from minillama.training.run_directory import RunDirectory
from minillama.training.settings import Settings
from optimizer import AdamW
from tokenizer import Tokenizer

LR, RANK, ALPHA = 2e-5, 4, 1
# A function that trains on the rows at the given positions, and one that evaluates.
Contender = tuple[Callable[[list[int]], Any], Callable[[], Any]]


@dataclass(frozen=True)
class Job:
    """Model, data and settings, equal for all contenders."""

    llama: Llama
    rows: dict[str, list[Row]]  # by split
    labels: int  # number of classes
    pad_id: int
    batch_size: int
    seed: int
    device: str
    dtype: torch.dtype  # of the matrix products
    lora: bool


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one epoch of one contender: seconds for training and for evaluation, and peak memory in bytes."""
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(tokenizer_model=args.tokenizer)
    labels = read_labels(args.label_names)
    llama = load_pretrained(args.pretrained_model_path) if args.pretrained_model_path else Llama(LlamaConfig())
    limit = {"train": args.rows, "dev": -(-args.rows // 8)}  # SST's dev set is an eighth of its training set
    rows = {
        split: tokenize_rows(read_rows(path, labels)[: limit[split]], tokenizer, llama.config.max_seq_len)[0]
        for split, path in (("train", args.train), ("dev", args.dev))
    }
    is_course = args.contender == "course"
    dtype = torch.float32 if is_course else DTYPES[args.dtype]
    plan = shuffled_batches(rows["train"], args.batch_size, args.seed, 1, bucketed=not is_course)
    make = {"ours": ours, "transformers": transformers, "course": course}[args.contender]
    classes = len(class_names(labels))
    job = Job(llama, rows, classes, tokenizer.pad_id, args.batch_size, args.seed, args.device, dtype, args.lora)
    step, evaluations = make(job)

    for positions in plan[:2]:  # warm up, the longest batch among them
        step(positions)
    start = measuring.now(args.device)
    for positions in plan:
        step(positions)
    trained = measuring.now(args.device)
    evaluations()
    end = measuring.now(args.device)
    tokens = sum(len(row.ids) for row in rows["train"])
    return {
        "train_seconds": trained - start,
        "evaluation_seconds": end - trained,
        "steps": len(plan),
        "rows": len(rows["train"]),
        "tokens": tokens,
        "peak_bytes": measuring.peak_bytes(args.device),
        # Forward, and backward to inputs and (unless frozen) to weights: 2 operations per weight and token each.
        "operations": (4 if args.lora else 6) * measuring.matrix_weights(llama) * tokens,
        "ceiling": measuring.matrix_product_ceiling(args.device, dtype),
    }


def ours(job: Job) -> Contender:
    """Our contender: the step of the training loop, and its evaluation on dev."""
    config = SimpleNamespace(llama=job.llama, num_labels=job.labels, hidden_dropout_prob=0.3, option="finetune")
    model = LlamaEmbeddingClassifier(config).to(job.device).train()
    if job.lora:
        apply_lora(model, RANK, ALPHA)
    task = Classification(job.rows["train"], job.rows["dev"], 1, job.batch_size, job.seed, job.pad_id)
    run = RunDirectory(tempfile.gettempdir(), writes=False)
    training = Training(model, task, Settings(LR, job.dtype), run, Processes())
    return (
        lambda positions: training.step(positions, LR),
        lambda: evaluate(model, job.rows["dev"], job.batch_size, pad_id=job.pad_id, dtype=job.dtype),
    )


def transformers(job: Job) -> Contender:
    """The contender transformers: its classifier (RMSNorm, causal) with torch's fused AdamW and the same batches."""
    with optional_package("transformers", "the comparison needs transformers (or give --without transformers)"):
        from transformers import LlamaForSequenceClassification
    theirs = measuring.their_config(job.llama, num_labels=job.labels, pad_token_id=job.pad_id)
    model: Any = LlamaForSequenceClassification(theirs)
    if job.lora:
        with optional_package("peft", "the comparison needs peft (or give --without transformers)"):
            from peft import LoraConfig, get_peft_model
        targets = [f"{name}_proj" for name in "qkvo"]
        adapter = LoraConfig(
            task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules=targets, modules_to_save=["score"]
        )
        model = get_peft_model(model, adapter)
    model.to(job.device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)

    def logits(positions: list[int], split: str) -> tuple[Tensor, Tensor]:
        ids, mask, targets, _ = to_batch(job.rows[split], positions, job.pad_id)
        with autocast(torch.device(job.device), job.dtype):
            attention_mask = None if mask is None else mask.long().to(job.device)
            found = model(ids.to(job.device), attention_mask=attention_mask).logits
        return found.float(), targets.to(job.device)

    def step(positions: list[int]) -> None:
        found, targets = logits(positions, "train")
        loss = F.cross_entropy(found, targets)
        loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate_dev() -> None:
        model.eval()
        for positions in cut_in_batches(by_length(job.rows["dev"]), job.batch_size):
            logits(positions, "dev")[0].argmax(-1).tolist()

    return step, evaluate_dev


class CourseClassifier(nn.Module):
    """The course's classifier: attention in plain PyTorch, and the last column of each row as its state."""

    def __init__(self, llama: Llama, labels: int) -> None:
        super().__init__()
        self.llama = Llama(replace(llama.config, attention_kernel="manual"))
        self.dropout = nn.Dropout(0.3)
        self.classifier_head = nn.Linear(llama.config.dim, labels)

    def forward(self, ids: Tensor) -> Tensor:
        _, hidden = self.llama(ids)
        return self.classifier_head(self.dropout(hidden[:, -1])).log_softmax(-1)


def course_norm(norm: LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm in plain PyTorch."""
    centred = x.float() - x.float().mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
    return (normed * norm.weight + norm.bias).to(x.dtype)


def course(job: Job) -> Contender:
    """The contender course: the course's procedure, with our model in plain PyTorch."""
    LayerNorm.forward = course_norm  # type: ignore[assignment]
    model = CourseClassifier(job.llama, job.labels).to(job.device).train()
    if job.lora:
        apply_lora(model, RANK, ALPHA)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=False)

    def step(positions: list[int]) -> None:
        ids, _, targets, _ = to_batch(job.rows["train"], positions, job.pad_id)
        optimizer.zero_grad()
        loss = F.nll_loss(model(ids.to(job.device)), targets.to(job.device))
        loss.item()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate_both() -> None:
        model.eval()
        for rows in job.rows.values():
            for positions in cut_in_batches(range(len(rows)), job.batch_size):
                model(to_batch(rows, positions, job.pad_id).ids.to(job.device)).argmax(-1).tolist()

    return step, evaluate_both
