"""Classifiers on a Llama: zero-shot by the probability of each label's words, a linear head, and label-word prediction.

All read each row's last real token under a padding mask, or with `config.pooling = "mean"` the mean of all real tokens,
so a row's result does not depend on its batch. "last_column" reproduces the course, which ignores the mask. There,
queries attend to padding, and the last column is read even if it is padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llama import Llama, last_positions, load_pretrained
from lora import merge_lora_weights
from minillama.formats.adapters import adapter_of
from minillama.formats.checkpoint import FineTuned
from minillama.layers.precision import at_least_float32
from minillama.text.batches import word_ids
from tokenizer import Tokenizer

POOLINGS = ("last_token", "mean", "last_column")


def _read_config(config: Any, asks: bool = False) -> tuple[Llama, str]:
    """The backbone and the pooling of a classifier's config.

    config: a namespace with pretrained_model_path or a loaded model `llama`. Optional: `pooling`, and `norm` and
    `causal`, which override the checkpoint's. asks: the model answers a prompt, at one token, so no "mean" is possible.
    """
    pooling = getattr(config, "pooling", "last_token")
    possible = [name for name in POOLINGS if not (asks and name == "mean")]
    if pooling not in possible:
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(possible)}")
    llama = getattr(config, "llama", None)
    if llama is None:
        llama = load_pretrained(
            config.pretrained_model_path, getattr(config, "norm", None), getattr(config, "causal", None)
        )
    return llama, pooling


class LlamaZeroShotClassifier(nn.Module):
    """Scores each label by the log-probability of its tokens as the continuation of the input.

    After `calibrate`, their log-probability after inputs without content is subtracted. config: pretrained_model_path,
    num_labels; see `_read_config`. label_names: one for each label, else ValueError.
    """

    def __init__(self, config: SimpleNamespace, tokenizer: Tokenizer, label_names: Sequence[str]) -> None:
        super().__init__()
        if config.num_labels != len(label_names):
            raise ValueError(f"num_labels is {config.num_labels}, but there are {len(label_names)} label names")
        self.num_labels = config.num_labels
        self.llama, self.pooling = _read_config(config, asks=True)
        # A label follows the prompt's last word, so its first piece includes a space ("▁good").
        self.label_name_ids = [word_ids(tokenizer, name) for name in label_names]
        # All tokens of a label except the last must fit after the input.
        self.max_input_len = self.llama.config.max_seq_len + 1 - max(map(len, self.label_name_ids))
        self.log_prior: Tensor
        self.register_buffer("log_prior", torch.zeros(self.num_labels), persistent=False)

    @torch.no_grad()
    def calibrate(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Changes the score of label y for input x to log p(y | x) - log mean_c p(y | c).

        c: inputs without content, ids (C, T) and mask as for `forward`. Returns the second term (num_labels,).

        In contextual calibration (arXiv 2102.09690: W = diag(p_cf)^-1, b = 0), c is the prompt filled with "N/A",
        "[MASK]" and the empty string. The paper also normalises over the labels before the division and takes a
        softmax after it. Both keep the order of the labels and are left out here. Domain-conditional PMI
        (arXiv 2104.08315) subtracts log p(y | domain premise); its only c is the prompt with the empty string.
        """
        self.log_prior = self._scores(input_ids, attention_mask).logsumexp(0) - math.log(len(input_ids))
        return self.log_prior

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """ids (B, T), mask bool (B, T), padding on either side -> scores of the labels (B, num_labels), float32."""
        return self._scores(input_ids, attention_mask) - self.log_prior

    def _scores(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Log-probabilities of the labels (B, num_labels), float32, uncalibrated and not normalised over the labels.

        The score of several tokens is log p(first | input) + log p(second | input, first) + ...
        """
        if self.pooling == "last_column":
            return self._course_reading(input_ids)
        scores = input_ids.new_zeros(len(input_ids), self.num_labels, dtype=torch.float32)
        # One pass for every distinct beginning of a label. In one pass over whole labels, bidirectional attention would
        # show the model the tokens that it has to predict.
        beginnings = {tuple(ids[:n]) for ids in self.label_name_ids for n in range(len(ids))}
        for beginning in sorted(beginnings):
            following = self._next_log_probs(input_ids, attention_mask, beginning)  # (B, V)
            for label, ids in enumerate(self.label_name_ids):
                n = len(beginning)
                if n < len(ids) and tuple(ids[:n]) == beginning:
                    scores[:, label] += following[:, ids[n]]
        return scores

    def _next_log_probs(self, input_ids: Tensor, mask: Tensor | None, beginning: tuple[int, ...]) -> Tensor:
        """Log-probabilities (B, V) of the token after each row and `beginning`."""
        if beginning:
            rows, columns = input_ids.shape
            if mask is None:
                mask = torch.ones_like(input_ids, dtype=torch.bool)
            more = mask.new_zeros(rows, len(beginning))
            input_ids = torch.cat((input_ids, input_ids.new_zeros(more.shape)), dim=1)
            mask = torch.cat((mask, more), dim=1)
            after = torch.arange(len(beginning), device=input_ids.device)
            places = last_positions(input_ids, mask)[:, None] + 1 + after  # right after each row's last real token
            input_ids = input_ids.scatter(1, places, input_ids.new_tensor(beginning).expand(rows, -1))
            mask = mask.scatter(1, places, True)
        logits = self.llama.output(self.llama.last_hidden(input_ids, mask))
        return logits.float().log_softmax(-1)

    def _course_reading(self, input_ids: Tensor) -> Tensor:
        """Log-probabilities at the last column; a label's tokens are summed at this one position."""
        logits, _ = self.llama(input_ids)
        following = logits[:, -1].float().log_softmax(-1)
        return torch.stack([following[:, ids].sum(-1) for ids in self.label_name_ids], dim=-1)


class LlamaEmbeddingClassifier(nn.Module):
    """A linear head on the hidden state of each row's last real token; with pooling "mean", on that of all of them.

    config: pretrained_model_path, num_labels, hidden_dropout_prob, option; see `_read_config`. The option "pretrain"
    freezes the backbone, "finetune" trains it, and "lora" leaves it to apply_lora. Raises ValueError for others.
    """

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        if config.option not in ("pretrain", "finetune", "lora"):
            raise ValueError(f"option is {config.option!r}; it must be one of pretrain, finetune, lora")
        self.num_labels = config.num_labels
        self.llama, self.pooling = _read_config(config)
        self.llama.requires_grad_(config.option != "pretrain")
        if not self.llama.config.tie_embeddings:
            self.llama.output.requires_grad_(False)  # unused here, so it would never get a gradient
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier_head = nn.Linear(self.llama.config.dim, self.num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """ids (B, T), mask bool (B, T) -> log-probabilities (B, num_labels), float32 or wider."""
        return at_least_float32(self.classifier_head(_pooled(self, input_ids, attention_mask))).log_softmax(-1)


class LlamaPromptClassifier(nn.Module):
    """Prompt-based fine-tuning (LM-BFF, arXiv 2012.15723): logits of the label words after a sentence and a question.

    The head is the output projection, so all weights are pretrained. Before training, its predictions are those of the
    zero-shot classifier for labels of one token. config: pretrained_model_path, hidden_dropout_prob; see
    `_read_config`. words: one for each label. Only their first tokens count; if two are equal, raises ValueError.
    """

    def __init__(self, config: SimpleNamespace, tokenizer: Tokenizer, words: Sequence[str]) -> None:
        super().__init__()
        self.label_ids = [word_ids(tokenizer, word)[0] for word in words]
        for i, first in enumerate(self.label_ids):
            if (j := self.label_ids.index(first)) < i:
                raise ValueError(
                    f"the labels {words[j]!r} and {words[i]!r} begin with the same token, "
                    f"{tokenizer.decode([first])!r}, and cannot be distinguished; give other --label_words, or "
                    "--head linear"
                )
        self.num_labels = len(words)
        self.llama, self.pooling = _read_config(config, asks=True)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """ids (B, T), mask bool (B, T) -> log-probabilities over the labels (B, num_labels), float32 or wider."""
        logits = self.llama.output(_pooled(self, input_ids, attention_mask))[:, self.label_ids]
        return at_least_float32(logits).log_softmax(-1)


def _pooled(model: LlamaEmbeddingClassifier | LlamaPromptClassifier, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The hidden state of each row (B, D), after dropout."""
    if model.pooling == "mean":
        _, hidden = model.llama(ids, attention_mask=mask)  # (B, T, D)
        hidden = at_least_float32(hidden)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        share = real / real.sum(-1, keepdim=True)  # of each token in its row's mean
        return model.dropout((share[..., None].to(hidden.dtype) * hidden).sum(1))
    return model.dropout(model.llama.last_hidden(ids, None if model.pooling == "last_column" else mask))


def acting_dropout(model: nn.Module) -> float:
    """The largest dropout probability in a model; if it is 0, two passes in training mode are equal."""
    return max((module.p for module in model.modules() if isinstance(module, nn.Dropout)), default=0.0)


class MergedClasses(nn.Module):
    """A classifier for a data set with fewer classes: adds the probabilities of the model's classes that it merges.

    counts_as: for each class of the model, the class of the data set, or -1 for none.
    """

    def __init__(self, model: nn.Module, counts_as: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.members = [[i for i, k in enumerate(counts_as) if k == one] for one in range(max(counts_as) + 1)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """ids (B, T), mask bool (B, T) -> log-probabilities (B, the data set's classes)."""
        log_probs = self.model(input_ids, attention_mask)
        return torch.stack([log_probs[:, members].logsumexp(-1) for members in self.members], dim=-1)


def classifier_of(found: FineTuned, tokenizer: Tokenizer) -> LlamaEmbeddingClassifier | LlamaPromptClassifier:
    """The classifier in a file, in float32 and evaluation mode, on the CPU, with LoRA updates merged.

    Raises ValueError if the tensors are not those of such a classifier.
    """
    mismatch = ValueError(f"{found.path}: its tensors are not those of a classifier of its sizes; train it again")
    if found.config.n_layers > len(found.state):
        raise mismatch
    with_lora = any(name.endswith(".lora_A") for name in found.state)
    adapter = adapter_of(found.path, found.state, found.options) if with_lora else None
    with torch.device("meta"):  # allocates nothing: the file's tensors are assigned below
        config = SimpleNamespace(
            llama=Llama(found.config),
            num_labels=len(found.label_names),
            hidden_dropout_prob=0.0,
            option="finetune",
            pooling=found.options.get("pooling", "last_token"),
        )
        model: LlamaEmbeddingClassifier | LlamaPromptClassifier
        if found.head == "prompt":
            model = LlamaPromptClassifier(config, tokenizer, found.words)
        else:
            model = LlamaEmbeddingClassifier(config)
    state = {
        name.replace(".original_layer.", "."): tensor.float()
        for name, tensor in found.state.items()
        if adapter is None or name.removeprefix("llama.") not in adapter.state
    }
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise mismatch from error
    model.llama.tie_weights()
    if adapter is not None:
        adapter.apply(model.llama)
        merge_lora_weights(model)
    return model.eval()
