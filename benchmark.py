"""Measures speed and memory against others, in one run on one machine, as ratios.

examples:
  python benchmark.py train                                    fine-tuning on SST, batch size 80
  python benchmark.py train --lora                             LoRA, against peft
  python benchmark.py train --train data/cfimdb-train.txt --dev data/cfimdb-dev.txt \\
      --label-names data/cfimdb-label-mapping.json --batch_size 10 --rows 200
  python benchmark.py generate                                 text generation, float32, bfloat16 and int8
  python benchmark.py words                                    the accuracy of counting words on SST

train compares, each in a process of its own and in turns:
  ours          what run_llama.py does
  transformers  its LlamaForSequenceClassification (with --lora, peft), torch's fused AdamW, the same rows in the same
                batches and the same precision
  course        the course's procedure: float32, random batches padded to their longest row, attention and norms written
                out, a Python loop over the parameters, the training set evaluated again after the epoch
generate compares, on the same weights and each in a process of its own, ours and transformers' generate: a prompt of
512 tokens read, tokens decoded one after the other, 1 and 16 rows at once, the first token from the start of the
process, and how much of the memory's bandwidth is used, measured by reading 256 MB.
words tells how far counting words gets: logistic regression on TF-IDF of 1-grams, and of 1- and 2-grams.

Prints a table for people and, as the last line, a JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from minillama.benchmarks import decoding as decoding_speed
from minillama.cli.parser import COUNT, SEED, OneLineParser
from minillama.environment import optional_package

if TYPE_CHECKING:
    import torch

    from llama import Llama
    from minillama.text.labelled import Row

CONTENDERS = ("ours", "transformers", "course")
LR, RANK, ALPHA = 2e-5, 4, 1


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = OneLineParser(prog="benchmark.py", description=__doc__)
    add = parser.add_argument
    add("what", choices=("train", "generate", "words"), help="what to measure")
    add("--lora", action="store_true", help="train LoRA adapters instead of all weights")
    add("--train", default="data/sst-train.txt", metavar="FILE", help="(default: %(default)s)")
    add("--dev", default="data/sst-dev.txt", metavar="FILE", help="(default: %(default)s)")
    add("--test", default="data/sst-test.txt", metavar="FILE", help="for words (default: %(default)s)")
    add("--label-names", default="data/sst-label-mapping.json", metavar="FILE", help="(default: %(default)s)")
    add("--tokenizer", metavar="FILE", help="(default: tokenizer.model, else data/tokenizer.model)")
    add("--pretrained-model-path", metavar="FILE", help="(default: random weights of stories42M's size)")
    add("--rows", type=COUNT, default=800, metavar="N", help="training rows of the epoch (default: %(default)s)")
    add("--batch_size", type=COUNT, default=80, metavar="N", help="rows a step (default: %(default)s)")
    add("--dtype", choices=("fp32", "bf16"), default="bf16", help="of ours and transformers (default: %(default)s)")
    add("--device", default="cpu", metavar="NAME", help="cpu or cuda (default: %(default)s)")
    add("--rounds", type=COUNT, default=3, metavar="N", help="times each is measured (default: %(default)s)")
    add("--without", choices=CONTENDERS[1:], nargs="*", default=[], metavar="NAME", help="leave a contender out")
    add("--seed", type=SEED, default=1337, help="(default: %(default)s)")
    add(
        "--contender", choices=(*CONTENDERS, *decoding_speed.CONTENDERS), help=argparse.SUPPRESS
    )  # measure this one only, in this process
    return parser


# In a contender's own process


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """One epoch of one contender: seconds for its training steps and for its evaluations, and its peak memory."""
    import torch

    from llama import Llama, LlamaConfig, load_pretrained
    from minillama.layers.precision import DTYPES
    from minillama.text.batches import shuffled_batches, tokenize_rows
    from minillama.text.labelled import class_names, read_labels, read_rows
    from tokenizer import Tokenizer

    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(tokenizer_model=args.tokenizer)
    labels = read_labels(args.label_names)
    llama = load_pretrained(args.pretrained_model_path) if args.pretrained_model_path else Llama(LlamaConfig())
    limit = {"train": args.rows, "dev": -(-args.rows // 8)}  # SST's dev set is an eighth of its training set
    rows = {
        split: tokenize_rows(read_rows(path, labels)[: limit[split]], tokenizer, llama.config.max_seq_len)[0]
        for split, path in (("train", args.train), ("dev", args.dev))
    }
    dtype = torch.float32 if args.contender == "course" else DTYPES[args.dtype]
    plan = shuffled_batches(rows["train"], args.batch_size, args.seed, 1, bucketed=args.contender != "course")
    make = {"ours": ours, "transformers": transformers, "course": course}[args.contender]
    step, evaluations = make(args, llama, rows, len(class_names(labels)), dtype, tokenizer.pad_id)

    def synchronized() -> float:
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    for positions in plan[:2]:  # warm up, the longest batch among them
        step(positions)
    start = synchronized()
    for positions in plan:
        step(positions)
    trained = synchronized()
    evaluations()
    end = synchronized()
    peak = torch.cuda.max_memory_allocated() if args.device != "cpu" else resource_peak()
    real = sum(len(row.ids) for row in rows["train"])
    matrices = sum(p.numel() for name, p in llama.named_parameters() if p.dim() == 2 and "tok_embeddings" not in name)
    return {
        "train_seconds": trained - start,
        "evaluation_seconds": end - trained,
        "steps": len(plan),
        "rows": len(rows["train"]),
        "tokens": real,
        "peak_bytes": peak,
        # Forward, and backward to inputs and (unless frozen) to weights: 2 operations a weight and token each.
        "operations": (4 if args.lora else 6) * matrices * real,
        "ceiling": matrix_product_ceiling(args.device, dtype),
    }


def resource_peak() -> int:
    """This process's largest resident memory, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def matrix_product_ceiling(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product here and now, the best of several."""
    import torch

    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        c = a @ b
        c[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


Contender = tuple[Callable[[list[int]], Any], Callable[[], Any]]


def ours(
    args: argparse.Namespace, llama: Llama, rows: dict[str, list[Row]], labels: int, dtype: torch.dtype, pad_id: int
) -> Contender:
    """The training loop's own step, and its evaluation on dev."""
    from classifier import LlamaEmbeddingClassifier
    from lora import apply_lora
    from minillama.training.classification import Classification
    from minillama.training.distributed import Processes
    from minillama.training.evaluation import evaluate
    from minillama.training.loop import Settings, Training
    from minillama.training.run_directory import RunDirectory

    config = SimpleNamespace(llama=llama, num_labels=labels, hidden_dropout_prob=0.3, option="finetune")
    model = LlamaEmbeddingClassifier(config).to(args.device).train()
    if args.lora:
        apply_lora(model, RANK, ALPHA)
    task = Classification(rows["train"], rows["dev"], 1, args.batch_size, args.seed, pad_id)
    run = RunDirectory(tempfile.gettempdir(), writes=False)
    training = Training(model, task, Settings(LR, dtype), run, Processes())
    return (
        lambda positions: training.step(positions, LR),
        lambda: evaluate(model, rows["dev"], args.batch_size, pad_id=pad_id, dtype=dtype),
    )


def transformers(
    args: argparse.Namespace, llama: Llama, rows: dict[str, list[Row]], labels: int, dtype: torch.dtype, pad_id: int
) -> Contender:
    """transformers' classifier (RMSNorm, causal) with torch's fused AdamW, on the same rows in the same batches."""
    import torch
    import torch.nn.functional as F

    from minillama.text.batches import by_length, cut_in_batches, to_batch

    with optional_package("transformers", "the comparison needs transformers (or give --without transformers)"):
        from transformers import LlamaConfig as TheirConfig
        from transformers import LlamaForSequenceClassification
    own = llama.config
    model: Any = LlamaForSequenceClassification(
        TheirConfig(  # type: ignore[call-arg]
            vocab_size=own.vocab_size,
            hidden_size=own.dim,
            intermediate_size=llama.layers[0].feed_forward.w1.out_features,  # type: ignore[union-attr, arg-type]
            num_hidden_layers=own.n_layers,
            num_attention_heads=own.n_heads,
            num_key_value_heads=own.kv_heads,
            max_position_embeddings=own.max_seq_len,
            num_labels=labels,
            pad_token_id=pad_id,
            use_cache=False,
        )
    )
    if args.lora:
        with optional_package("peft", "the comparison needs peft (or give --without transformers)"):
            from peft import LoraConfig, get_peft_model
        targets = [f"{name}_proj" for name in "qkvo"]
        adapter = LoraConfig(
            task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules=targets, modules_to_save=["score"]
        )
        model = get_peft_model(model, adapter)
    model.to(args.device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)

    def logits(positions: list[int], split: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask, targets, _ = to_batch(rows[split], positions, pad_id)
        with torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32):
            attention_mask = None if mask is None else mask.long().to(args.device)
            found = model(ids.to(args.device), attention_mask=attention_mask).logits
        return found.float(), targets.to(args.device)

    def step(positions: list[int]) -> None:
        found, targets = logits(positions, "train")
        loss = F.cross_entropy(found, targets)
        loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()
        for positions in cut_in_batches(by_length(rows["dev"]), args.batch_size):
            logits(positions, "dev")[0].argmax(-1).tolist()

    return step, evaluate


def course(
    args: argparse.Namespace, llama: Llama, rows: dict[str, list[Row]], labels: int, dtype: torch.dtype, pad_id: int
) -> Contender:
    """The course's procedure. Its model is ours with every shortcut off."""
    from dataclasses import replace

    import torch
    import torch.nn.functional as F

    from llama import LayerNorm, Llama
    from lora import apply_lora
    from minillama.text.batches import cut_in_batches, to_batch
    from optimizer import AdamW

    def by_formula(norm: LayerNorm, x: torch.Tensor) -> torch.Tensor:
        centred = x.float() - x.float().mean(-1, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
        return (normed * norm.weight + norm.bias).to(x.dtype)

    LayerNorm.forward = by_formula  # type: ignore[assignment]

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llama = Llama(replace(llama.config, attention_kernel="manual"))
            self.dropout = torch.nn.Dropout(0.3)
            self.classifier_head = torch.nn.Linear(llama.config.dim, labels)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            _, hidden = self.llama(ids)
            return self.classifier_head(self.dropout(hidden[:, -1])).log_softmax(-1)

    model = Classifier().to(args.device).train()
    if args.lora:
        apply_lora(model, RANK, ALPHA)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=False)

    def step(positions: list[int]) -> None:
        ids, _, targets, _ = to_batch(rows["train"], positions, pad_id)
        optimizer.zero_grad()
        loss = F.nll_loss(model(ids.to(args.device)), targets.to(args.device))
        loss.item()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()
        for split in ("train", "dev"):
            for positions in cut_in_batches(range(len(rows[split])), args.batch_size):
                model(to_batch(rows[split], positions, pad_id).ids.to(args.device)).argmax(-1).tolist()

    return step, evaluate


# In the process that compares


def in_turns(names: Sequence[str], rounds: int, argv: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The measurements of each contender, `rounds` times, each time in a process of its own."""
    from tqdm import tqdm

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    turns = [(i, name) for i in range(rounds) for name in names]
    for _, name in tqdm(turns, desc="measuring", leave=False, disable=None):
        command = [sys.executable, str(Path(__file__).resolve()), *argv, "--contender", name]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if process.returncode != 0:
            sys.exit(process.returncode)  # it said why
        found[name].append(json.loads(process.stdout.splitlines()[-1]))
    return found


def compare_generation(args: argparse.Namespace, argv: list[str]) -> None:
    """Measures each way to generate in turns, on the same weights, and prints how they compare."""
    names = [name for name in decoding_speed.CONTENDERS if name.partition("-")[0] not in args.without]
    with tempfile.TemporaryDirectory() as folder:
        if args.pretrained_model_path is None:
            decoding_speed.write_random_model(Path(folder), args.seed)
            argv = [*argv, "--pretrained-model-path", folder]
        found = in_turns(names, args.rounds, argv)
    table, ratios = decoding_speed.summary(found)
    decoding_speed.print_summary(table, ratios)
    print(json.dumps({"options": vars(args), "table": table, "ratios": ratios, "rounds": found}))


def compare(args: argparse.Namespace, argv: list[str]) -> None:
    """Measures each contender `rounds` times, in turns, and prints how they compare."""
    names = [name for name in CONTENDERS if name not in args.without]
    found = in_turns(names, args.rounds, argv)

    def median(name: str, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(value, found[name]))

    def epoch(one: dict[str, Any]) -> float:
        return one["train_seconds"] + one["evaluation_seconds"]

    table = {
        name: {
            "seconds_a_step": median(name, lambda one: one["train_seconds"] / one["steps"]),
            "rows_a_second": median(name, lambda one: one["rows"] / one["train_seconds"]),
            "tokens_a_second": median(name, lambda one: one["tokens"] / one["train_seconds"]),
            "epoch_seconds": median(name, epoch),
            "peak_mib": median(name, lambda one: one["peak_bytes"] / 2**20),
            "utilisation": median(name, lambda one: one["operations"] / one["train_seconds"] / one["ceiling"]),
        }
        for name in names
    }
    heads = ("s/step", "rows/s", "tokens/s", "epoch s", "peak MiB", "utilisation")
    print(f"{'':14}" + "".join(f"{head:>12}" for head in heads))
    for name, values in table.items():
        print(
            f"{name:14}" + "".join(f"{value:12.3f}" if value < 10 else f"{value:12,.0f}" for value in values.values())
        )
    ratios: dict[str, Any] = {}
    for name in names[1:]:
        pairs = list(zip(found[name], found["ours"], strict=True))
        # Over equal rows: a step of transformers, an epoch with its evaluations of the course's procedure.
        ratios[name] = {
            "step": statistics.median(a["train_seconds"] / b["train_seconds"] for a, b in pairs),
            "epoch": statistics.median(epoch(a) / epoch(b) for a, b in pairs),
            "memory": statistics.median(b["peak_bytes"] / a["peak_bytes"] for a, b in pairs),
        }
        print(
            f"ours against {name}: {ratios[name]['step']:.2f}x a step, {ratios[name]['epoch']:.2f}x an epoch with its "
            f"evaluations, {ratios[name]['memory']:.2f} of the memory (median of {args.rounds} rounds)"
        )
    print(json.dumps({"options": vars(args), "table": table, "ratios": ratios, "rounds": found}))


def words(args: argparse.Namespace) -> None:
    """How far counting words gets on these files."""
    from minillama.text.labelled import read_labels, read_rows
    from minillama.training.evaluation import counting_words

    labels = read_labels(args.label_names)
    rows = {split: read_rows(getattr(args, split), labels) for split in ("train", "dev", "test")}
    found = {f"1- to {n}-grams": counting_words(rows, n) for n in (1, 2)}
    for name, scores in found.items():
        accuracies = (
            f"{split} {'no gold labels' if (a := scores[split]) is None else f'{a:.3f}'}" for split in ("dev", "test")
        )
        print(f"TF-IDF of {name}, logistic regression (C {scores['C']:g}): {', '.join(accuracies)}")
    print(json.dumps({"options": vars(args), "words": found}))


def main(argv: list[str] | None = None) -> int:
    """Runs the command; the exit code is 0, 2 for bad input, or 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    try:
        if args.contender and args.what == "generate":
            print(json.dumps(decoding_speed.measured(args)))
        elif args.what == "generate":
            compare_generation(args, argv)
        elif args.contender:
            print(json.dumps(measured(args)))
        elif args.what == "words":
            words(args)
        else:
            compare(args, argv)
    except (ValueError, OSError) as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark.py: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
