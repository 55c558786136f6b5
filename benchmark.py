"""Compares speed and memory with other programs, on the same machine in the same run.

examples:
  python benchmark.py train                                    fine-tuning on SST, batch size 80
  python benchmark.py train --lora                             LoRA, against peft
  python benchmark.py train --train data/cfimdb-train.txt --dev data/cfimdb-dev.txt \\
      --label-names data/cfimdb-label-mapping.json --batch_size 10 --rows 200
  python benchmark.py pretrain                                 pretraining at the bundled model's size
  python benchmark.py generate                                 text generation, float32, bfloat16 and int8
  python benchmark.py generate --llama2c ~/llama2.c            the same, and the C programs of that folder
  python benchmark.py words                                    the accuracy of counting words on SST

Each contender runs in its own process, and they take turns. train compares:
  ours          the fine-tuning of run_llama.py
  transformers  LlamaForSequenceClassification (with --lora, peft) and torch's fused AdamW, with the same batches and
                precision as ours
  course        the course's procedure: float32, random batches padded to their longest row, attention and norms in
                plain PyTorch, a Python loop over the parameters, and the training set evaluated after the epoch
pretrain compares the pretraining step of run_llama.py with that of transformers' LlamaForCausalLM (RMSNorm, torch's
fused AdamW): same sizes, random tokens, precision and gradient clipping. Rows have 512 tokens, or the context.
generate compares our text generation with that of transformers, on the same weights. It measures reading a prompt of
512 tokens, decoding 1 and 16 rows, the time from process start to the first token, and the share of the memory
bandwidth that is used. (The bandwidth is measured by reading 256 MB.) Decoding is greedy; ours also samples with
epsilon 0.05. --llama2c adds karpathy/llama2.c's programs; minillama/benchmarks/llama2c.py has the commands that
build them.
words measures the accuracy of counting words: logistic regression on TF-IDF. Of 24 settings it takes the best on dev.
With --dev_predictions (and --test_predictions) it also averages its probabilities with those of a model.

Prints a table, and as the last line a JSON object. Figures are medians over the rounds. Some columns:
  epoch s           seconds of the training and of the evaluation after it
  utilisation       share of the speed of large matrix products in the same precision
  prefill tok/s     tokens of a prompt that are read a second
  sampled:greedy    speed with epsilon-sampling, divided by that without sampling
  tok/s of 16       tokens a second of 16 texts together
  1000 : 10         seconds of the token at position 1000, divided by those at position 10
  of bandwidth      size of the weights, divided by the bytes that the memory could deliver in a token's time
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from config import PRESETS
from minillama.benchmarks import llama2c
from minillama.benchmarks.tables import KINDS, print_tables
from minillama.benchmarks.turns import Measurement, in_turns, measured_in_a_process
from minillama.cli.parser import COUNT, SEED, OneLineParser

MODULES = {"train": "fine_tuning", "pretrain": "pretraining", "generate": "decoding", "words": "words"}
CONTENDERS = {
    "train": ("ours", "transformers", "course"),
    "pretrain": ("ours", "transformers"),
    "generate": ("ours", "ours-bf16", "ours-int8", "transformers", "transformers-bf16"),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(prog="benchmark.py", description=__doc__)
    add = parser.add_argument
    add("what", choices=tuple(MODULES), help="what to measure")
    add("--lora", action="store_true", help="train LoRA adapters instead of all weights")
    add("--train", default="data/sst-train.txt", metavar="FILE", help="(default: %(default)s)")
    add("--dev", default="data/sst-dev.txt", metavar="FILE", help="(default: %(default)s)")
    add("--test", default="data/sst-test.txt", metavar="FILE", help="for words (default: %(default)s)")
    add("--dev_predictions", nargs="+", metavar="FILE", help="for words: a model's, as its --dev_out wrote them; .csv")
    add("--test_predictions", nargs="+", metavar="FILE", help="for words: the same of test; several files are averaged")
    add("--label-names", default="data/sst-label-mapping.json", metavar="FILE", help="(default: %(default)s)")
    add("--tokenizer", metavar="FILE", help="(default: tokenizer.model, else data/tokenizer.model)")
    add("--pretrained-model-path", metavar="FILE", help="(default: random weights of stories42M's size)")
    add("--rows", type=COUNT, default=800, metavar="N", help="training rows of the epoch (default: %(default)s)")
    add("--batch_size", type=COUNT, metavar="N", help="rows a step (default: 80 for train, 8 for pretrain)")
    add("--preset", choices=PRESETS, default="mini", help="sizes for pretrain (default: %(default)s)")
    add("--dtype", choices=("fp32", "bf16"), default="bf16", help="of ours and transformers (default: %(default)s)")
    add("--device", default="cpu", metavar="NAME", help="cpu or cuda (default: %(default)s)")
    add("--llama2c", metavar="FOLDER", help="for generate: folder of llama2.c's programs run and runq, which you built")
    add("--rounds", type=COUNT, default=3, metavar="N", help="times each is measured (default: %(default)s)")
    add("--without", choices=CONTENDERS["train"][1:], nargs="*", default=[], metavar="NAME", help="contenders to skip")
    add("--seed", type=SEED, default=1337, help="(default: %(default)s)")
    # For the processes that `in_turns` starts: measures only this one.
    add("--contender", choices=(*CONTENDERS["train"], *CONTENDERS["generate"]), help=argparse.SUPPRESS)
    return parser


def compare(args: argparse.Namespace, argv: list[str]) -> None:
    """Measures the contenders in turns, and prints the tables."""
    names = [name for name in CONTENDERS[args.what] if name.partition("-")[0] not in args.without]
    programs = Path(args.llama2c) if args.llama2c and args.what == "generate" else None
    if programs:
        llama2c.check_programs(programs)
    with tempfile.TemporaryDirectory() as folder:
        model = args.pretrained_model_path
        if args.what == "generate" and model is None:
            from minillama.benchmarks.decoding import write_random_model

            model = folder
            write_random_model(Path(folder), args.seed)
            argv = [*argv, "--pretrained-model-path", folder]
        contenders: dict[str, Callable[[], Measurement]] = {
            name: partial(measured_in_a_process, name, argv) for name in names
        }
        if programs:
            llama2c.write_inputs(Path(folder), model)
            contenders |= llama2c.contenders(programs, Path(folder))
        found = in_turns(contenders, args.rounds)
    print_tables(KINDS[args.what], found, vars(args))


def main(argv: list[str] | None = None) -> int:
    """Runs the command; the exit code is 0, 2 for bad input, or 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    if args.batch_size is None:
        args.batch_size = 8 if args.what == "pretrain" else 80
    try:
        if args.what != "words" and not args.contender:
            compare(args, argv)
            return 0
        # Imports only the needed module, because the time to the first token includes the imports.
        benchmark = import_module(f"minillama.benchmarks.{MODULES[args.what]}")
        if args.contender:
            if args.device.startswith("cuda") and args.contender.startswith("ours"):
                from minillama.layers.precision import set_up_cuda

                set_up_cuda()
            print(json.dumps(benchmark.measured(args)))
        else:
            benchmark.compare(args)
    except (ValueError, OSError) as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark.py: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
