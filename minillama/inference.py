"""Lists of texts in Python: `complete` continues them, and a `TextClassifier` gives the classes of a fine-tuned file.

These are what the commands generate and classify do, without a command line (docs/python.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from classifier import classifier_of
from config import DEFAULT_EPSILON
from llama import Llama
from minillama.decoding.decoders import Decoding, Writer
from minillama.decoding.fast_llama import InferenceLlama
from minillama.decoding.filters import filters_by_name
from minillama.environment import HERE
from minillama.formats.checkpoint import FineTuned, read_fine_tuned
from minillama.formats.names import tokenizer_beside
from minillama.text.batches import cut_in_batches, prompt_parts, tokenize_rows
from minillama.text.labelled import LINE_END, Row
from minillama.training.evaluation import class_log_probs
from tokenizer import Tokenizer


def complete(
    model: Llama | InferenceLlama,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_new_tokens: int = 75,
    temperature: float = 1.0,
    *,
    epsilon: float = DEFAULT_EPSILON,
    eta: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    batch_size: int = 8,
) -> list[str]:
    """The continuation of each text, without the text. It ends at an end token or before one of the texts `stop`.

    model: a `Llama`, which is in evaluation mode meanwhile, or the result of `fast_model`. tokenizer: the model's; it
    is fitted to the model. Temperature 0 is greedy, and then a text's continuation does not depend on the others.
    epsilon to typical_p: see `filters_by_name`. seed: of the draws (default: from torch's generator, so that
    torch.manual_seed decides). batch_size: how many texts are continued together. Warns of a text beyond the model's
    context. Raises ValueError for settings out of range, and for another model's tokenizer.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts is one string ({texts[:40]!r}); give a list, such as [text]")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    texts = list(texts)
    stops = [stop] if isinstance(stop, str) else list(stop)
    if "" in stops:
        raise ValueError("stop has an empty text, which would stop at once; leave it out")
    tokenizer.fit_to_model(model.config.vocab_size)
    decoding = Decoding(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        filters=filters_by_name(epsilon, eta, top_k, top_p, min_p, typical_p),
        repetition_penalty=repetition_penalty,
        stops=stops,
        seed=int(torch.randint(2**62, ())) if seed is None else seed,
    )
    writer = Writer(model, tokenizer, model.tok_embeddings.weight.device, decoding)
    prompts = [tokenizer.encode_prompt(text) for text in texts]
    longest, context = max(map(len, prompts), default=0), model.config.max_seq_len
    if longest + max_new_tokens > context:
        warnings.warn(
            f"{longest} tokens of prompt and {max_new_tokens} new ones exceed the model's context of {context}; it "
            f"sees only the last {context}",
            stacklevel=2,
        )
    was_training = isinstance(model, nn.Module) and model.training
    try:
        if was_training:
            model.eval()  # type: ignore[union-attr]
        batches = cut_in_batches(range(len(prompts)), batch_size)
        found = [one for batch in batches for one in writer.batch([prompts[i] for i in batch])]
    finally:
        if was_training:
            model.train()  # type: ignore[union-attr]
    return [one.text for one in found]


class TextClassifier:
    """The classifier in a file of finetune or lora. Calling it with a list of texts gives the classes' probabilities.

    path: the best.pt of a run, or the file that it wrote. tokenizer: by default the one of its training. Attributes:
    `model` (its `forward` gives log-probabilities), `tokenizer`, `label_names`. Raises FileNotFoundError or ValueError
    if the file is missing, damaged or no classifier, or belongs to another tokenizer.
    """

    def __init__(
        self, path: str | PathLike[str], tokenizer: Tokenizer | None = None, device: str | torch.device = "cpu"
    ) -> None:
        found = read_fine_tuned(path)
        self.tokenizer = tokenizer or tokenizer_of(found)
        self.tokenizer.fit_to_model(found.config.vocab_size)
        self.model = classifier_of(found, self.tokenizer).to(device)
        self.label_names = found.label_names
        self.context = found.config.max_seq_len
        self.max_sentence_len = found.options.get("max_sentence_len")
        self.prompt: tuple[str, ...] = ()
        if found.head == "prompt":
            self.prompt = prompt_parts(found.template, found.words, self.model.pooling)

    def __call__(self, texts: Sequence[str], batch_size: int = 8) -> list[dict[str, float]]:
        """The probability of each class for every text, by the class's name, the likeliest class first.

        Warns if texts are cut to the model's context. Raises ValueError for an empty text.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts is one string ({texts[:40]!r}); give a list, such as [text]")
        texts = list(texts)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"text {number} is {text!r}; give strings")
            if not text.strip():
                raise ValueError(f"text {number} is empty; leave it out")
        plain = [Row(0, LINE_END.sub(" ", text.strip())) for text in texts]
        before, question = self.prompt or ("", None)
        rows, cut = tokenize_rows(
            plain,
            self.tokenizer,
            self.context,
            before=before,
            question=question,
            max_sentence_len=self.max_sentence_len,
        )
        if cut:
            warnings.warn(f"{cut} of {len(rows)} texts were cut to the model's {self.context} tokens", stacklevel=2)
        bucketed = self.model.pooling != "last_column"
        pad_id = self.tokenizer.pad_id
        found = class_log_probs(self.model, rows, batch_size, pad_id=pad_id, bucketed=bucketed, name="classifying")
        named = [dict(zip(self.label_names, row, strict=True)) for row in found.exp().tolist()]
        return [dict(sorted(row.items(), key=lambda item: -item[1])) for row in named]


def tokenizer_of(found: FineTuned) -> Tokenizer:
    """The tokenizer with which a classifier was trained: the one it names, or the one beside its base model.

    A path of its run counts from the working directory, then from the project's folder. Raises FileNotFoundError.
    """
    named, base = (found.options.get(name) for name in ("tokenizer", "pretrained_model_path"))
    likely = [named] if isinstance(named, str) else []
    if isinstance(base, str) and not likely:
        likely = [base] if Path(base).is_dir() else [tokenizer_beside(base), "tokenizer.model"]
    for path in (folder / name for name in likely for folder in (Path(), HERE, HERE / "data")):
        if path.exists():
            return Tokenizer(path)
    raise FileNotFoundError(
        f"{found.path} was trained with the tokenizer {' or '.join(likely) or '(unknown)'}, which is missing; give "
        'TextClassifier(..., tokenizer=Tokenizer("its file"))'
    )
