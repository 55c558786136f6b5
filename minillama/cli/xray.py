"""--xray and --against: the X-ray page of what a command did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minillama.cli.checks import refuse
from minillama.cli.header import report
from minillama.cli.options import Flag, Group, Options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from config import LlamaConfig
    from llama import Llama
    from minillama.cli.xray_page import Subject
    from tokenizer import Tokenizer

SIZES = ("n_layers", "n_heads", "n_kv_heads", "dim", "vocab_size", "attention_type")
BELONGS = "belongs to --option {users}"
XRAY = Group(
    "X-ray",
    (
        Flag(
            "--xray PAGE.html",
            "write a page that shows the forward pass: attention, positions, what each layer would answer, what adds "
            "to the choice, and the candidates",
            elsewhere=BELONGS,
        ),
        Flag(
            "--against MODEL",
            "with --xray: also show a second model of the same sizes, such as the one before fine-tuning",
            elsewhere=BELONGS,
        ),
    ),
)


def check_xray(options: Options) -> None:
    """Raises ValueError if --xray has no single text or --against no page."""
    if options.xray is None:
        if options.against is not None:
            raise ValueError("--against needs a page; add --xray PAGE.html")
        return
    if Path(options.xray).suffix != ".html":
        raise ValueError(f"--xray {options.xray}: the page's name must end in .html")
    refuse(options, ("prompt_file", "interactive", "json", "num_samples", "quantize", "out"), "--xray shows one text")
    if options.against is not None and (not options.against or not Path(options.against).exists()):
        raise FileNotFoundError(f"--against {options.against or 'has no name'}: no such file; name a checkpoint")


class Other(NamedTuple):
    """The model of --against. classifier: with its head, if the file holds one; classes: their names."""

    path: str
    llama: Llama
    classifier: nn.Module | None = None
    classes: Sequence[str] = ()


def shown_tokens(tokens: Sequence[int], given: int, context: int) -> list[int]:
    """The tokens that the page shows, the first ones. Raises ValueError if the `given` ones are too many alone."""
    from minillama.cli.xray_page import MOST_TOKENS, check_length

    check_length(given)
    most = min(MOST_TOKENS, context)
    if len(tokens) > most:
        report(f"notice: --xray shows the first {most} of {len(tokens)} tokens")
    return list(tokens[:most])


def write_xray(options: Options, page: str) -> None:
    """Writes a page to --xray."""
    from minillama.cli.pages import write_page

    write_page(options.xray, page)
    report(f"wrote {options.xray}")


def page_of_tokens(
    path: str,
    llama: Llama,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    given: int,
    settings: dict[str, Any] | None = None,
    other: Other | None = None,
) -> str:
    """The page of a text. given: how many of its tokens are the prompt; settings: of the decoding."""
    from minillama.cli.xray_page import Text, page

    shown = shown_tokens(tokens, given, llama.config.max_seq_len)
    subject = subject_of(path, llama, shown)
    likeliest = int(subject.trace.logits[-1].argmax())
    text = Text(tokenizer, min(given, len(shown)), [*shown[1:], likeliest], settings=settings or {})
    return page(subject, text, subject_of(other.path, other.llama, shown, beside=path) if other else None)


def page_of_classes(
    options: Options,
    model: nn.Module,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    classes: list[str],
    probabilities: list[float],
) -> str:
    """The page of a sentence that a classifier read, with its answer: the probabilities of the classes.

    The other model's answers are those of its own head, if it has one for these classes, else of the first model's.
    """
    from minillama.cli.xray_page import Text, check_length, page

    check_length(len(tokens))
    llama: Any = model.llama
    subject = subject_of(options.finetuned, llama, tokens)
    subject.readout, subject.weight, subject.bias = head_of(model)
    best = probabilities.index(max(probabilities))
    if model.pooling == "mean":
        subject.mean = ranked(classes, probabilities)
    second = None
    if (other := read_other(options, llama.config, tokenizer)) is not None:
        second = subject_of(other.path, other.llama, tokens, beside=options.finetuned)
        own = other.classifier is not None and list(other.classes) == classes
        reads: Any = other.classifier if own else model
        second.readout, second.weight, second.bias = head_of(reads)
        second.borrows_head = not own
        if reads.pooling == "mean":  # the head is linear: its logits of the mean are the mean of its logits
            mean = second.readout(second.trace.hidden).detach().float().mean(0)
            second.mean = ranked(classes, mean.softmax(-1).tolist())
    return page(subject, Text(tokenizer, len(tokens), [best] * len(tokens), classes), second)


def ranked(classes: Sequence[str], probabilities: Sequence[float]) -> list[tuple[str, float]]:
    """The classes with their probabilities, the likeliest first."""
    return sorted(zip(classes, probabilities, strict=True), key=lambda one: -one[1])


def head_of(model: Any) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor | None]:
    """The head of a classifier: hidden states -> logits of the classes; its weight and its bias."""
    if hasattr(model, "classifier_head"):
        head = model.classifier_head
        return head, head.weight, head.bias
    weight = model.llama.output.weight[model.label_ids]
    return (lambda hidden: hidden @ weight.T), weight, None


def subject_of(path: str, llama: Llama, tokens: Sequence[int], beside: str = "") -> Subject:
    """A model on the page. beside: the path of the other one; two files of one name are told apart by their folders."""
    from minillama.cli.xray_page import Subject
    from minillama.decoding.xray import trace

    config = llama.config
    grouped = f" ({config.kv_heads} of keys and values)" if config.kv_heads != config.n_heads else ""
    facts = f"{config.n_layers} layers of {config.n_heads} heads{grouped}, width {config.dim}, {config.convention}"
    name = Path(path).name
    return Subject(path if name == Path(beside).name else name, facts, trace(llama, tokens))


def read_other(options: Options, config: LlamaConfig, tokenizer: Tokenizer) -> Other | None:
    """The model of --against, if it is given: a checkpoint of any format, or a fine-tuned classifier.

    Raises ValueError if its sizes or its mask differ from those of `config`.
    """
    if options.against is None:
        return None
    from classifier import classifier_of
    from llama import load_pretrained
    from minillama.formats.checkpoint import read_fine_tuned

    path = options.against
    causal = None if options.attention is None else options.attention == "causal"
    if Path(path).is_dir() and not (Path(path) / "best.pt").exists():
        other = Other(path, load_pretrained(path, causal=causal))
    else:
        try:
            found = read_fine_tuned(path)
        except ValueError:  # no classifier
            other = Other(path, load_pretrained(path, causal=causal))
        else:
            classifier: Any = classifier_of(found, tokenizer)
            other = Other(path, classifier.llama, classifier, found.label_names)
    for name in (*SIZES, "causal", "sliding_window"):
        ours, theirs = getattr(config, name), getattr(other.llama.config, name)
        if ours != theirs:
            raise ValueError(f"--against {path} has {name} {theirs}, the first model {ours}; they must be the same")
    return other
