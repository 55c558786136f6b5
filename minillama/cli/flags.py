"""Every option of run_llama.py: its type, its default, its line of help. Imports no torch: `--help` stays instant."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from config import NORMS, POSITIONS, PRESETS
from minillama.cli.parser import COUNT, COUNT_OR_ZERO, FRACTION, NOT_NEGATIVE, POSITIVE, SEED, OneLineParser, number
from minillama.formats.names import COURSE_TEMPLATE, RUNS

# What an option takes from the run that made the fine-tuned model, where it is not typed.
OPTIONS_FROM_FINE_TUNED: dict[str, tuple[str, ...]] = {
    "classify": ("pretrained_model_path", "tokenizer", "max_sentence_len", "pooling", "batch_size")
}
OPTIONS_FROM_FINE_TUNED["wise_ft"] = (*OPTIONS_FROM_FINE_TUNED["classify"], "dev", "test")
COURSE_PROMPT = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)

OPTIONS = (
    "generate",
    "prompt",
    "finetune",
    "lora",
    "classify",
    "pretrain",
    "sft",
    "perplexity",
    "tokenizer",
    "convert",
    "wise_ft",
    "report",
)
TRAINING = ("finetune", "lora", "pretrain", "sft")
# What --lora_targets takes: the names of a layer's Linears, and these for several of them.
LORA_TARGETS = {
    "attention": ("compute_query", "compute_key", "compute_value", "compute_output"),
    "mlp": ("w1", "w2", "w3"),
}
LORA_TARGETS["all"] = (*LORA_TARGETS["attention"], *LORA_TARGETS["mlp"])
LORA_VARIANTS = ("rslora", "lora_plus", "dora", "lora_targets")  # options of LoRA alone
# Where pretraining wants another default than fine-tuning.
PRETRAINING_DEFAULTS = {
    "lr": 1e-3,
    "batch_size": 32,
    "schedule": "cosine",
    "warmup_steps": 100,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "adam_beta2": 0.95,
    "epochs": 1,
    "held_out": 0.01,
}
# And where supervised fine-tuning does. No data named: the demo data; no rank given: all weights are trained.
SFT_DEFAULTS = {
    "lr": 5e-4,
    "batch_size": 16,
    "schedule": "cosine",
    "warmup_steps": 20,
    "max_grad_norm": 1.0,
    "max_new_tokens": 32,
    "epochs": 4,
    "lora_rank": None,
    "train": None,
    "dev": None,
    "test": None,
    "dev_out": "sft-dev-answers.jsonl",
    "test_out": "sft-test-answers.jsonl",
}
OPTION_DEFAULTS: dict[str, dict[str, Any]] = {"pretrain": PRETRAINING_DEFAULTS, "sft": SFT_DEFAULTS}
TOKENS = number(int, "a whole number from 0 to 1,000,000", lambda value: 0 <= value <= 1_000_000)
SHARE = number(float, "above 0 and at most 1", lambda value: 0 < value <= 1)
SHARE_OR_ZERO = number(float, "in [0, 1]", lambda value: 0 <= value <= 1)
FILTERS = ("eta", "top_k", "top_p", "min_p", "typical_p")  # beside epsilon, which is the course's
OF_GENERATE = (
    *FILTERS,
    *("repetition_penalty", "decoder", "beams", "length_penalty", "contrast", "stop", "num_samples"),
    *("prompt_file", "interactive", "json", "explain"),
)
REGULARIZERS = ("smart", "bregman", "r_drop")
PARTS = {"smart_eps": "smart", "smart_step": "smart", "smart_noise": "smart", "bregman_beta": "bregman"}
DECODERS = ("sample", "beam", "contrastive", "lookup")
FILE_FORMATS = ("safetensors", "llama2c-v0", "llama2c-v1", "llama2c-v2", "gguf")
FOLDER_FORMATS = ("huggingface", "peft")
ADAPTER_FORMATS = ("adapter", "peft")  # of an adapter without its model
DEFAULT_PRESET = "mini"  # the bundled model's sizes
NEW_MODEL = ("position", "sliding_window", "differential")  # beside its sizes; a checkpoint says them itself

# What may differ between runs, and when one is resumed: it changes no number.
RESUME_MAY_CHANGE = (
    "config",
    "resume",
    "run_dir",
    "save_every",
    "dev_out",
    "test_out",
    "model_out",
    "tokens_dir",
    "device",
    "use_gpu",
    "typed",
    "substituted",
)
CORPUS_ENDINGS = (".txt", ".tokens")
OUTPUT_ENDINGS = {"prompt": "prompting-output.txt", "finetune": "finetuning-output.txt", "lora": "lora-output.txt"}
EXAMPLES = """\
examples:
  python run_llama.py --option generate --prompt "Once upon a time" --temperature 0.8
  python run_llama.py --option prompt --batch_size 10 --train data/sst-train.txt --dev data/sst-dev.txt \\
      --test data/sst-test.txt --label-names data/sst-label-mapping.json \\
      --dev_out sst-dev-prompting-output.txt --test_out sst-test-prompting-output.txt
  python run_llama.py --option finetune --epochs 5 --lr 2e-5 --batch_size 80 --train data/sst-train.txt \\
      --dev data/sst-dev.txt --test data/sst-test.txt --label-names data/sst-label-mapping.json \\
      --dev_out sst-dev-finetuning-output.txt --test_out sst-test-finetuning-output.txt
  python run_llama.py --option classify --finetuned finetune-5-2e-05.pt --prompt "A fine film with a weak end."
  python run_llama.py --option tokenizer --corpus stories/ --vocab_size 4096 --model_out mine.model
  python run_llama.py --option pretrain --corpus stories/ reviews.txt=3 --tokenizer mine.model \\
      --model_out mine.safetensors
  python run_llama.py --option sft --train train.jsonl --dev dev.jsonl --model_out answers.safetensors
  python run_llama.py --option perplexity --corpus other.txt --pretrained-model-path mine.safetensors
  python run_llama.py --option convert --to huggingface --model_out mine --pretrained-model-path mine.safetensors
  python run_llama.py --option wise_ft --finetuned finetune-5-2e-05.pt --ood other.txt --ood_classes 0,0,-1,1,1
  python run_llama.py --option report --runs runs
  python run_llama.py --option lora --lora_rank 4 --lora_alpha 1.0 --lr 2e-5 --batch_size 10 \\
      --dev_out cfimdb-dev-lora-output.txt --test_out cfimdb-test-lora-output.txt
"""


def numbers(kind: type, allowed: str, accepts: Callable[[list[Any]], bool]) -> Callable[[str], list[Any]]:
    """An argparse type: numbers with commas between, refused unless `accepts` takes all of them."""

    def parse(text: str) -> list[Any]:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or not accepts(values):
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be {allowed}")
        return values

    return parse


ALPHAS = numbers(
    float,
    "numbers from 0 to 1, rising, with commas between",
    lambda values: values == sorted(set(values)) and 0 <= values[0] and values[-1] <= 1,
)
COUNTS_AS = numbers(
    int,
    "a class number or -1 for each class of the model, with commas between; 0, 1 and so on, none left out",
    lambda values: max(values) >= 1 and set(values) - {-1} == set(range(max(values) + 1)),
)


def words(text: str) -> list[str]:
    """An argparse type: words with commas between."""
    found = [word.strip() for word in text.split(",")]
    if len(found) < 2 or not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be two words or more, each once, as in a,b")
    return found


def build_parser() -> OneLineParser:
    """The options, grouped; every default is written in this file and nowhere else."""
    parser = OneLineParser(
        prog="run_llama.py",
        description="Runs a Llama: generates text, classifies by prompting, fine-tunes, also with LoRA, pretrains.",
        epilog=EXAMPLES,
    )
    for add_group, _ in GROUPS:
        add_group(parser)
    return parser


def _what_to_do(parser: OneLineParser) -> None:
    add = parser.add_argument
    add(
        "--option",
        choices=OPTIONS,
        default="generate",
        help="what to do: continue a prompt; classify sentences by asking the model; train all weights and a "
        "classifier head; train LoRA adapters and a head; classify sentences of your own with what these made; train a "
        "language model on text; train one to answer prompts; tell how well a model predicts a text; make a tokenizer "
        "from text; write a checkpoint in another format; mix a fine-tuned model with the one it came from; gather "
        "runs into one page (default: %(default)s)",
    )
    add("--seed", type=SEED, default=1337, help="seed of every random draw (default: %(default)s)")
    add(
        "--config",
        metavar="FILE",
        help='options from a JSON object, such as {"option": "lora", "lr": 3e-3, "eval_train": true}, as if typed; '
        "what is on the command line overrides it (default: none; examples/ has some)",
    )


def _model(parser: OneLineParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add(
        "--pretrained-model-path",
        default="stories42M.pt",
        metavar="PATH",
        help="checkpoint: the course's .pt or ours, our .safetensors, llama2.c's .pt or .bin, or a folder as Meta "
        "(Llama 1 to 3.2) or Hugging Face has it; told apart by what is in it. pretrain starts from random weights "
        "unless it is given (default: %(default)s, and where that is missing the bundled model)",
    )
    add(
        "--tokenizer",
        metavar="PATH",
        help="SentencePiece model, Llama 3's tokenizer.model, GPT-2's pair of files, or a tokenizer.json (default: "
        "the one with the checkpoint, else tokenizer.model, else data/tokenizer.model; for a new model the bundled "
        "one)",
    )
    add(
        "--adapter",
        metavar="PATH",
        help="LoRA adapter merged into the model: a file of --option lora, or a folder that peft saved (default: none)",
    )
    add("--norm", choices=NORMS, help="the model's norm (default: what the checkpoint says; a new one: layernorm)")
    add(
        "--attention",
        choices=("causal", "bidirectional"),
        help="whether a token sees what follows it (default: what the checkpoint says; the course's are bidirectional, "
        "new ones causal)",
    )


def _device(parser: OneLineParser) -> None:
    add = parser.add_argument_group("device and precision").add_argument
    add("--use_gpu", action="store_true", help="run on the first CUDA device")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cpu, or cuda with --use_gpu)")
    add(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="precision of the matrix products; weights that are trained stay float32. auto: bf16 where the hardware "
        "multiplies it itself, else fp32; fp32 for generation on the CPU (default: %(default)s)",
    )


def _generate(parser: OneLineParser) -> None:
    add = parser.add_argument_group("generate").add_argument
    add(
        "--prompt",
        default=COURSE_PROMPT,
        metavar="TEXT",
        help="what to continue (default: the course's film review), or for classify the sentence",
    )
    add(
        "--chat",
        action="store_true",
        help="the prompt is what a user says, the continuation the reply, in the format of Llama 2's or Llama 3's chat "
        "models, whichever the tokenizer is; prints the reply alone",
    )
    add("--system", metavar="TEXT", help="with --chat: what the model is told before (default: nothing)")
    add("--max_new_tokens", type=TOKENS, default=75, metavar="N", help="tokens to add (default: %(default)s)")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="end where one of these comes up, without it")
    add("--num_samples", type=COUNT, default=1, metavar="N", help="continuations of each prompt (default: %(default)s)")
    add(
        "--prompt_file",
        metavar="FILE",
        help="continue, or classify, every line of a file (-: of what is piped in), --batch_size of them at a time, "
        "instead of --prompt; above temperature 0 what is drawn depends on which are together",
    )
    add(
        "--interactive",
        action="store_true",
        help="ask for one prompt after the other, with --chat in one conversation; Ctrl-C stops an answer, Ctrl-D ends",
    )
    add(
        "--json",
        action="store_true",
        help="print a JSON object a line, for programs: one for each continuation, or sentence of classify",
    )
    add(
        "--explain",
        nargs="?",
        const="",
        metavar="PAGE.html",
        help="show for each token which candidates the filters kept and which they cut, as a table in the terminal, "
        "and as a page if one is named",
    )
    add(
        "--quantize",
        choices=("int8",),
        help="keep the weights in 8 bits, also for perplexity: smaller and faster, a little less exact (default: no)",
    )
    add(
        "--generated_sentence_low_temp_out",
        default="generated-sentence-temp-0.txt",
        metavar="FILE",
        help="(default: %(default)s)",
    )
    add(
        "--generated_sentence_high_temp_out",
        default="generated-sentence-temp-1.txt",
        metavar="FILE",
        help="(default: %(default)s)",
    )


def _decoding(parser: OneLineParser) -> None:
    add = parser.add_argument_group("generate: how tokens are chosen").add_argument
    add(
        "--temperature",
        type=NOT_NEGATIVE,
        metavar="T",
        help="0 takes the likeliest token, 1 samples as the model thinks. Prints one continuation and writes no file "
        "(default: one at 0 and one at 1, each written to its file; 1 where another option asks for something else)",
    )
    add(
        "--epsilon",
        type=FRACTION,
        default=0.05,
        metavar="E",
        help="sample only tokens of at least this probability; 0 keeps all (default: %(default)s; 0 where another "
        "filter is given)",
    )
    add("--eta", type=FRACTION, metavar="E", help="like --epsilon, but lower where many tokens are likely; try 0.002")
    add("--top_k", type=COUNT, metavar="K", help="sample only the K likeliest tokens (contrastive: 4)")
    add(
        "--top_p",
        type=SHARE,
        metavar="P",
        help="sample only the likeliest tokens, as few as have probability P together",
    )
    add("--min_p", type=SHARE, metavar="P", help="sample only tokens at least P times as likely as the likeliest")
    add(
        "--typical_p",
        type=SHARE,
        metavar="P",
        help="sample only the tokens whose surprise is nearest to what is expected, as few as have P together",
    )
    add(
        "--repetition_penalty",
        type=number(float, "from 0.01 to 100 (1 changes nothing)", lambda value: 0.01 <= value <= 100),
        default=1.0,
        metavar="R",
        help="above 1, up to 100, makes tokens that occurred before less likely, below 1, down to 0.01, likelier "
        "(default: %(default)s)",
    )
    add(
        "--decoder",
        choices=DECODERS,
        default="sample",
        help="sample draws token by token; beam searches the likeliest whole text; contrastive takes likely tokens "
        "that are unlike what was said; lookup draws as sample does, but guesses ahead from the text so far and checks "
        "the guesses together, which is faster where text repeats itself (default: %(default)s)",
    )
    add("--beams", type=COUNT, default=4, metavar="N", help="beam: beginnings kept at each step (default: %(default)s)")
    add(
        "--length_penalty",
        type=number(float, "from -10 to 10", lambda value: -10 <= value <= 10),
        default=1.0,
        metavar="L",
        help="beam: above 0 favours longer texts, below 0 shorter ones (default: %(default)s)",
    )
    add(
        "--contrast",
        type=SHARE_OR_ZERO,
        default=0.6,
        metavar="A",
        help="contrastive: weight of being unlike, from 0 to 1 (default: %(default)s)",
    )


def _data(parser: OneLineParser) -> None:
    add = parser.add_argument_group(
        "data of prompt, finetune, lora and wise_ft",
        "A data file has lines of `label ||| sentence`; or it is a .csv of label and texts, as AG News\n"
        "has them; or a .tsv of label and text, and maybe more columns: the text is the longest, the\n"
        "first of the others the fold. PATH#fold=PATTERN takes only the rows whose fold matches, as in\n"
        '"reviews.tsv#fold=cv[0-8]*".',
    ).add_argument
    for split in ("train", "dev", "test"):
        add(f"--{split}", default=f"data/cfimdb-{split}.txt", metavar="FILE", help="(default: %(default)s)")
    add(
        "--label-names",
        default="data/cfimdb-label-mapping.json",
        metavar="FILE",
        help="JSON: a list of class names, those of the labels 0, 1, ...; or an object from the labels of the data to "
        'class names, as in {"0": "bad", "1": null, "2": "good"}, where null leaves rows out. Class ids go by first '
        "mention (default: %(default)s)",
    )
    add(
        "--dev_out",
        default="cfimdb-dev-prompting-output.txt",
        metavar="FILE",
        help="predictions for dev (default: %(default)s)",
    )
    add(
        "--test_out",
        default="cfimdb-test-prompting-output.txt",
        metavar="FILE",
        help="predictions for test (default: %(default)s)",
    )


def _rows(parser: OneLineParser) -> None:
    add = parser.add_argument_group("how rows are read").add_argument
    add(
        "--max_sentence_len",
        type=COUNT,
        metavar="N",
        help="cut sentences to N tokens (default: to the model's context)",
    )
    add("--batch_size", type=COUNT, default=8, metavar="N", help="rows a step (default: %(default)s)")
    add(
        "--pooling",
        choices=("last_token", "last_column"),
        default="last_token",
        help="what is read of a row: its last real token, padding masked; or, as the course does it, the batch's last "
        "column, padding and all (default: %(default)s)",
    )


def _prompting(parser: OneLineParser) -> None:
    add = parser.add_argument_group("prompt, and --head prompt of finetune and lora").add_argument
    add(
        "--template",
        default=COURSE_TEMPLATE,
        metavar="TEXT",
        help="what the model reads of a row: {sentence} is the row's, {labels} a list such as `bad, average, or good`. "
        "The label follows after a space. A row too long loses the end of its sentence (default: %(default)r)",
    )
    add(
        "--label_words",
        type=words,
        metavar="W1,W2,...",
        help="what stands for each class in the prompt, in the order of the class ids (default: the class names)",
    )
    add(
        "--calibrate",
        choices=("none", "contextual", "pmi"),
        default="none",
        help="prompt: divide a label's probability by that after a prompt without content: contextual, the mean of "
        'those with "N/A", "[MASK]" and nothing for a sentence; pmi, that with nothing (default: %(default)s)',
    )


def _training(parser: OneLineParser) -> None:
    add = parser.add_argument_group("training (finetune, lora, pretrain, sft)").add_argument
    add(
        "--adam_beta2",
        type=FRACTION,
        default=0.999,
        metavar="B",
        help="AdamW's memory of squared gradients (default: %(default)s)",
    )
    add("--epochs", type=COUNT, default=5, metavar="N", help="passes over the training set (default: %(default)s)")
    add("--lr", type=POSITIVE, default=2e-5, help="learning rate; LoRA likes ten times more (default: %(default)s)")
    add(
        "--dropout",
        type=FRACTION,
        metavar="P",
        help="dropout inside the model: of embeddings, attention weights and what each block adds (default: what the "
        "checkpoint says, mostly 0)",
    )
    add(
        "--micro_batch_size",
        type=COUNT,
        metavar="N",
        help="rows computed at once, where --batch_size rows do not fit into memory; the step is the same "
        "(default: all of the batch)",
    )
    add("--schedule", choices=("constant", "cosine"), default="constant", help="of --lr (default: %(default)s)")
    add(
        "--warmup_steps",
        type=COUNT_OR_ZERO,
        default=0,
        metavar="N",
        help="steps in which --lr is reached, from nearly 0 (default: %(default)s)",
    )
    add("--min_lr", type=NOT_NEGATIVE, default=0.0, help="where the cosine ends (default: %(default)s)")
    add(
        "--weight_decay",
        type=NOT_NEGATIVE,
        default=0.0,
        metavar="W",
        help="of matrices, not of norms and biases (default: %(default)s)",
    )
    add("--max_grad_norm", type=POSITIVE, metavar="G", help="clip the gradient's norm to G (default: leave it)")
    add("--patience", type=COUNT, metavar="N", help="stop after N epochs without a better dev (default: never)")


def _classifier(parser: OneLineParser) -> None:
    add = parser.add_argument_group("the classifier (finetune, lora)").add_argument
    add(
        "--head",
        choices=("linear", "prompt"),
        default="linear",
        help="what is trained beside the model: a linear layer on each sentence's last token; or nothing "
        "new: the model is asked as in --option prompt, by --template, and trained to answer with the label's word, "
        "of which the first token counts (default: %(default)s)",
    )
    add(
        "--hidden_dropout_prob",
        type=FRACTION,
        default=0.3,
        metavar="P",
        help="dropout before the head (default: %(default)s)",
    )
    add(
        "--label_smoothing",
        type=FRACTION,
        default=0.0,
        metavar="S",
        help="spread S of each label over all classes (default: %(default)s)",
    )
    add("--eval_train", action="store_true", help="score the whole training set after each epoch, too")


def _regularizers(parser: OneLineParser) -> None:
    add = parser.add_argument_group(
        "regularizers (finetune, lora)", "What they add is part of the training loss that is shown."
    ).add_argument
    add(
        "--smart",
        type=NOT_NEGATIVE,
        default=0.0,
        metavar="L",
        help="add L times how much the class distribution changes at worst, in symmetric KL, when "
        "the embeddings move a little (SMART; 1 to 5 usual, a step takes up to five times as long; default: off)",
    )
    for name, value, what in (
        ("eps", 1e-3, "how far each number of an embedding may move; what --smart adds grows with its square"),
        ("step", 0.1, "the step towards the worst move, for the gradient's largest number"),
        ("noise", 1e-3, "standard deviation of the noise that it starts from"),
    ):
        add(f"--smart_{name}", type=POSITIVE, default=value, metavar="X", help=f"{what} (default: %(default)s)")
    add(
        "--bregman",
        type=NOT_NEGATIVE,
        default=0.0,
        metavar="MU",
        help="add MU times the symmetric KL between the class distributions of the model and of a "
        "moving average of its weights (SMART's other half; 1 usual; default: off)",
    )
    add(
        "--bregman_beta",
        type=FRACTION,
        metavar="B",
        help="how much of that average stays at each step (default: 0.99 in the first tenth of the steps, then 0.999)",
    )
    add(
        "--r_drop",
        type=NOT_NEGATIVE,
        default=0.0,
        metavar="A",
        help="read each row twice, under two dropout masks, and add A times half their symmetric KL "
        "(R-Drop; 1 to 5 usual, a step takes twice as long; default: off)",
    )


def _lora(parser: OneLineParser) -> None:
    add = parser.add_argument_group("LoRA (lora; sft with --lora_rank)").add_argument
    add("--lora_rank", type=COUNT, default=4, metavar="R", help="rank of the LoRA update (default: %(default)s)")
    add(
        "--lora_alpha",
        type=POSITIVE,
        default=1.0,
        metavar="A",
        help="the update counts alpha / rank (default: %(default)s)",
    )
    add("--rslora", action="store_true", help="the update counts alpha / sqrt(rank), for high ranks (rsLoRA)")
    add(
        "--lora_plus",
        type=POSITIVE,
        default=1.0,
        metavar="RATIO",
        help="learning rate of every lora_B, as a multiple of --lr; LoRA+ suggests 16 (default: %(default)s)",
    )
    add("--dora", action="store_true", help="train the length of each weight row apart from its direction (DoRA)")
    add(
        "--lora_targets",
        nargs="+",
        choices=(*LORA_TARGETS, *LORA_TARGETS["all"]),
        default=["attention"],
        metavar="NAME",
        help=f"what to adapt: {', '.join(LORA_TARGETS)}, or some of {', '.join(LORA_TARGETS['all'])} "
        "(default: attention)",
    )


def _language_models(parser: OneLineParser) -> None:
    add = parser.add_argument_group(
        "language models (pretrain, perplexity, tokenizer)",
        "Pretraining has defaults of its own: "
        + ", ".join(f"--{name} {value}" for name, value in PRETRAINING_DEFAULTS.items())
        + ". With --pretrained-model-path it goes on from that checkpoint, else it starts from random weights.",
    ).add_argument
    add(
        "--corpus",
        nargs="+",
        default=[],
        metavar="TEXT[=WEIGHT]",
        help="text files, or folders of .txt files; <|endoftext|> parts documents. WEIGHT: how often its text comes in "
        "one pass (1)",
    )
    add(
        "--held_out",
        type=NOT_NEGATIVE,
        default=0.0,
        metavar="N",
        help="the last documents of each text, a share below 1 or a number: pretrain keeps them to judge by, "
        "perplexity reads them alone (default: all of it)",
    )
    add("--preset", choices=PRESETS, help="sizes of a new model (default: mini, the bundled model's)")
    for name, what in (
        ("dim", "width"),
        ("n_layers", "layers"),
        ("n_heads", "query heads"),
        ("n_kv_heads", "key/value heads"),
        ("max_seq_len", "context in tokens"),
    ):
        add(f"--{name}", type=COUNT, metavar="N", help=f"{what} of a new model (default: the preset's)")
    add(
        "--position",
        choices=POSITIONS,
        help="how a new model knows positions: rotary turns queries and keys, alibi takes off what is far (default: "
        "rotary)",
    )
    add(
        "--sliding_window",
        type=COUNT,
        metavar="N",
        help="a token of a new model sees itself and the N - 1 before it (default: all before it)",
    )
    add(
        "--differential",
        action="store_true",
        help="differential attention in a new model: the difference of two softmaxes, from pairs of heads",
    )
    add(
        "--window",
        type=COUNT,
        metavar="N",
        help="tokens of one row; in training one document follows another in it (default: the model's context; sft: "
        "what its longest example takes)",
    )
    add("--stride", type=COUNT, metavar="N", help="perplexity: tokens between windows (default: half the window)")
    add("--max_steps", type=COUNT, metavar="N", help="stop after N steps (default: --epochs passes over the corpus)")
    add("--eval_every", type=COUNT, default=200, metavar="N", help="judge every N steps (default: %(default)s)")
    add("--sample_prompt", default="Once upon a time", metavar="TEXT", help="continued after each judgement")
    add("--tokens_dir", default="runs/tokens", metavar="DIR", help="where tokenized texts go (default: %(default)s)")
    add(
        "--vocab_size",
        type=COUNT,
        metavar="N",
        help="pieces of a new tokenizer (default: 4096); a new model has its tokenizer's",
    )
    add(
        "--out_dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of --model_out (default: fp32, for convert what the checkpoint has; llama2.c's are always fp32 or int8)",
    )
    add(
        "--model_out",
        metavar="PATH",
        help="where the model or tokenizer goes; a safetensors file gets its tokenizer beside it",
    )


def _supervised(parser: OneLineParser) -> None:
    own = ", ".join(f"--{name} {value}" for name, value in SFT_DEFAULTS.items() if value is not None)
    add = parser.add_argument_group(
        "supervised fine-tuning (sft)",
        'Trains on --train and --dev, and answers --test if there is one: lines of {"prompt": "...", "answer": "..."} '
        "(default: the demo data, data/demo-qa-*). All weights, or with --lora_rank LoRA's or a variant's, merged in "
        "at the end; examples that fit share a row of --window tokens, and do not see each other. It has defaults of "
        "its own: "
        f"{own}.",
    ).add_argument
    add(
        "--answer_rows",
        type=COUNT_OR_ZERO,
        default=200,
        metavar="N",
        help="rows of dev, evenly spread, that are answered after each epoch, to keep the best by token F1; 0: to keep "
        "the best by dev loss (default: %(default)s)",
    )


def _convert(parser: OneLineParser) -> None:
    add = parser.add_argument_group("convert").add_argument
    add(
        "--to",
        choices=(*FILE_FORMATS, *FOLDER_FORMATS, "adapter"),
        default="safetensors",
        help="what --model_out becomes: a file of ours, of llama2.c (v2: int8) or of llama.cpp, or a folder of "
        "transformers, or, for an --adapter by itself, a file of ours or a folder of peft (default: %(default)s)",
    )


def _fine_tuned(parser: OneLineParser) -> None:
    add = parser.add_argument_group(
        "classify and wise_ft",
        "classify prints what a fine-tuned model makes of the sentence in --prompt, of those in --prompt_file, or of\n"
        "what is typed (--interactive): the class, its probability, the sentence; --json has every class.",
    ).add_argument
    add("--finetuned", metavar="FILE", help="the best.pt of a run, or the .pt that finetune or lora wrote")


def _wise_ft(parser: OneLineParser) -> None:
    add = parser.add_argument_group(
        "wise_ft",
        "Mixes the weights, (1 - alpha) * base + alpha * fine-tuned (WiSE-FT), and judges each mixture on dev and "
        "--ood, test only at the alpha that is best on dev. "
        "The base, tokenizer, dev and test are those of the run that made "
        "the file, unless typed. Predictions are written only where --dev_out and --test_out are typed. --model_out "
        "takes the model at the best alpha, a fine-tuned model like any other.",
    ).add_argument
    add(
        "--alphas",
        type=ALPHAS,
        default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
        metavar="A,A,...",
        help="1 alone judges the fine-tuned model as it is (default: %(default)s)",
    )
    add(
        "--ood",
        nargs="+",
        default=[],
        metavar="FILE",
        help="labelled data from elsewhere, as for --dev; each scored by itself",
    )
    add(
        "--ood_classes",
        nargs="+",
        type=COUNTS_AS,
        default=[],
        metavar="K,K,...",
        help="which class of the --ood file each class of the model counts as, -1 for none, as 0,0,-1,1,1: their "
        "probabilities are added. One for all files, or one for each (default: the classes are the same). Where "
        "-1 comes first, write --ood_classes=-1,...",
    )
    add(
        "--ood_label_names",
        nargs="+",
        default=[],
        metavar="FILE",
        help="label files of the --ood files, one for all or one for each; their classes are the model's by name, or "
        "where names differ, by number (default: the labels that the model was trained with)",
    )
    add(
        "--curve_out",
        default="wise-ft-curve.csv",
        metavar="FILE.csv",
        help="where the accuracies go; beside it their picture, a page of HTML (default: %(default)s)",
    )


def _run(parser: OneLineParser) -> None:
    add = parser.add_argument_group("the run (finetune, lora, pretrain, sft)").add_argument
    add(
        "--run_dir",
        metavar="DIR",
        help="where options, metrics, log and checkpoints of the run go (default: a new folder under runs/)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --run_dir (default: the latest under runs/), to the very same result. It has the "
        "options it was started with; those that change a number cannot be changed",
    )
    add(
        "--save_every",
        type=COUNT,
        default=500,
        metavar="N",
        help="save the state every N steps, and after each epoch (default: %(default)s)",
    )
    add(
        "--fsdp",
        action="store_true",
        help="shard the model over the processes that torchrun starts, instead of a copy in each",
    )
    add("--compile", action="store_true", help="compile the model with torch.compile: slow to start")


def _report(parser: OneLineParser) -> None:
    add = parser.add_argument_group("report").add_argument
    add(
        "--runs",
        nargs="+",
        default=[RUNS],
        metavar="DIR",
        help=f"folders of runs, or folders that hold some (default: {RUNS})",
    )
    add("--report_out", default="report.html", metavar="FILE", help="the page to write (default: %(default)s)")
    add(
        "--curves",
        nargs="+",
        default=[],
        metavar="FILE.csv",
        help="tables of accuracy between two sets of weights: a column alpha, then one a data set (default: none)",
    )


# The groups in the order of --help, each with the values of --option for which its options do something.
GROUPS: tuple[tuple[Callable[[OneLineParser], None], tuple[str, ...]], ...] = (
    (_what_to_do, OPTIONS),
    (_model, OPTIONS),
    (_device, OPTIONS),
    (_generate, ("generate",)),
    (_decoding, ("generate",)),
    (_data, ("prompt", "finetune", "lora", "sft", "wise_ft")),
    (_rows, ("prompt", "finetune", "lora", "wise_ft", "classify")),
    (_prompting, ("prompt", "finetune", "lora")),
    (_training, TRAINING),
    (_classifier, ("finetune", "lora")),
    (_regularizers, ("finetune", "lora")),
    (_lora, ("lora", "sft")),
    (_language_models, ("pretrain", "perplexity", "tokenizer")),
    (_supervised, ("sft",)),
    (_convert, ("convert",)),
    (_fine_tuned, ("classify", "wise_ft")),
    (_wise_ft, ("wise_ft",)),
    (_run, TRAINING),
    (_report, ("report",)),
)
ALSO_USED_BY = {
    "max_new_tokens": ("sft",),
    "quantize": ("perplexity",),
    "batch_size": ("generate", "pretrain", "sft"),
    "window": ("sft",),
    "out_dtype": ("sft", "convert"),
    "model_out": ("sft", "convert", "wise_ft"),
    **dict.fromkeys(("prompt", "prompt_file", "interactive", "json"), ("classify",)),
}


@lru_cache(maxsize=1)
def used_by() -> dict[str, tuple[str, ...]]:
    """The values of --option for which each option does something."""
    found: dict[str, tuple[str, ...]] = {}
    for add_group, users in GROUPS:
        parser = OneLineParser(add_help=False)
        add_group(parser)
        found |= {action.dest: users for action in parser._actions}
    return found | {name: (*found[name], *others) for name, others in ALSO_USED_BY.items()}
