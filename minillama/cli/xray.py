"""--xray and --against: the X-ray page of what a command did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillama.cli.checks import refuse
from minillama.cli.header import report
from minillama.cli.options import Flag, Group, Options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from config import LlamaConfig
    from llama import Llama
    from minillama.cli.xray_page import Subject
    from tokenizer import Tokenizer

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
    if not options.xray.endswith(".html"):
        raise ValueError(f"--xray {options.xray}: the page's name must end in .html")
    refuse(options, ("prompt_file", "interactive", "json", "num_samples", "quantize", "out"), "--xray shows one text")
    if options.against is not None and not Path(options.against).exists():
        raise FileNotFoundError(f"--against {options.against}: no such file")


def shown_tokens(tokens: Sequence[int], given: int) -> list[int]:
    """The tokens that the page shows, the first ones. Raises ValueError if the `given` ones are too many alone."""
    from minillama.cli.xray_page import MOST_TOKENS, check_length

    check_length(given)
    if len(tokens) > MOST_TOKENS:
        report(f"notice: --xray shows the first {MOST_TOKENS} of {len(tokens)} tokens")
    return list(tokens[:MOST_TOKENS])


def write_tokens(
    options: Options,
    llama: Llama,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    given: int,
    settings: dict[str, Any] | None = None,
) -> None:
    """Writes the page of a text, see `page_of_tokens`."""
    from minillama.cli.pages import write_page

    path = options.pretrained_model_path
    write_page(options.xray, page_of_tokens(path, llama, tokenizer, tokens, given, settings, options.against))
    report(f"wrote {options.xray}")


def page_of_tokens(
    path: str,
    llama: Llama,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    given: int,
    settings: dict[str, Any] | None = None,
    against: str | None = None,
) -> str:
    """The page of a text. given: how many of its tokens are the prompt; settings: of the decoding; against: a second
    model's file.
    """
    from minillama.cli.xray_page import Text, page

    shown = shown_tokens(tokens, given)
    subject = subject_of(path, llama, shown)
    likeliest = int(subject.trace.logits[-1].argmax())
    text = Text(tokenizer, given, [*shown[1:], likeliest], settings=settings or {})
    other = subject_of(against, read_other(against, llama.config, tokenizer), shown) if against else None
    return page(subject, text, other)


def write_classes(
    options: Options, model: nn.Module, tokenizer: Tokenizer, tokens: Sequence[int], classes: list[str]
) -> None:
    """Writes the page of a sentence that a classifier read."""
    from minillama.cli.pages import write_page
    from minillama.cli.xray_page import Text, check_length, page

    check_length(len(tokens))
    llama: Any = model.llama
    readout, weight, bias = head_of(model)
    subject = subject_of(options.finetuned, llama, tokens)
    subject.readout, subject.weight, subject.bias = readout, weight, bias
    best = int(readout(subject.trace.hidden[-1:]).argmax())
    other = None
    if options.against is not None:
        other = subject_of(options.against, read_other(options.against, llama.config, tokenizer), tokens)
        other.readout, other.weight, other.bias = readout, weight, bias
    text = Text(tokenizer, len(tokens), [best] * len(tokens), classes)
    write_page(options.xray, page(subject, text, other))
    report(f"wrote {options.xray}")


def head_of(model: Any) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor | None]:
    """The head of a classifier: hidden states -> logits of the classes; its weight and its bias."""
    if hasattr(model, "classifier_head"):
        head = model.classifier_head
        return head, head.weight, head.bias
    weight = model.llama.output.weight[model.label_ids]
    return (lambda hidden: hidden @ weight.T), weight, None


def subject_of(path: str, llama: Llama, tokens: Sequence[int]) -> Subject:
    """A model on the page."""
    from minillama.cli.xray_page import Subject
    from minillama.decoding.xray import trace

    config = llama.config
    grouped = f" ({config.kv_heads} of keys and values)" if config.kv_heads != config.n_heads else ""
    facts = f"{config.n_layers} layers of {config.n_heads} heads{grouped}, width {config.dim}, {config.convention}"
    return Subject(Path(path).name, facts, trace(llama, tokens))


def read_other(path: str, config: LlamaConfig, tokenizer: Tokenizer) -> Llama:
    """The model of --against: of a checkpoint, or of a fine-tuned classifier. It is read as the first one is.

    Raises ValueError if its sizes differ from those of `config`.
    """
    from classifier import classifier_of
    from llama import load_pretrained
    from minillama.formats.checkpoint import read_fine_tuned

    try:
        found = read_fine_tuned(path)
    except ValueError:  # no classifier
        llama = load_pretrained(path, causal=config.causal)
    else:
        llama = classifier_of(found, tokenizer).llama
    for name in ("n_layers", "n_heads", "n_kv_heads", "dim", "vocab_size", "attention_type"):
        ours, theirs = getattr(config, name), getattr(llama.config, name)
        if ours != theirs:
            raise ValueError(f"--against {path} has {name} {theirs}, the first model {ours}; they must be the same")
    return llama
