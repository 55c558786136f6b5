"""Answers of the server: requests in OpenAI's form in, dictionaries out. No HTTP here (commands/serve.py).

One lock guards the model. It is held for one token at a time, so that several texts grow at once, and a reader that
stops reading keeps nobody waiting.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillama.decoding.decoders import Decoding, Writer, text_pieces
from minillama.decoding.filters import filters_by_name
from minillama.inference import TextClassifier
from minillama.text.token_texts import token_text
from tokenizer import Tokenizer

MOST_CHOICES = 64  # texts of one request
MOST_LOGPROBS = 20
FILTERS = ("eta", "top_k", "top_p", "min_p", "typical_p")
# What OpenAI's clients may send, and the values that change nothing here.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
}
IGNORED = ("model", "user", "metadata", "store", "stream_options")
Field = tuple[type | tuple[type, ...], Callable[[Any], bool], str, Any]  # kind, test, what is allowed, default
NUMBER = (int, float)
FIELDS: dict[str, Field] = {
    "max_tokens": (int, lambda x: x >= 0, "a whole number, 0 or more", 16),
    "temperature": (NUMBER, lambda x: 0 <= x <= 100, "a number from 0 to 100", 1.0),
    "n": (int, lambda x: 1 <= x <= MOST_CHOICES, f"a whole number from 1 to {MOST_CHOICES}", 1),
    "stream": (bool, lambda x: True, "true or false", False),
    "echo": (bool, lambda x: True, "true or false", False),
    "logprobs": (int, lambda x: 0 <= x <= MOST_LOGPROBS, f"a whole number from 0 to {MOST_LOGPROBS}", None),
    "seed": (int, lambda x: -(2**63) <= x < 2**63, "a whole number of 64 bits", None),
    "stop": ((str, list), lambda x: True, "a text or a list of texts", ()),
    "epsilon": (NUMBER, lambda x: 0 <= x < 1, "a number from 0, below 1", 0.0),
    "repetition_penalty": (NUMBER, lambda x: 0.01 <= x <= 100, "a number from 0.01 to 100", 1.0),
} | {name: (NUMBER, lambda x: True, "a number", None) for name in FILTERS}


class BadRequest(ValueError):
    """A request that cannot be answered, in one sentence."""


@dataclass
class Token:
    """A token of an answer, with its log-probability and the likeliest tokens; None for the first token of a text."""

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


class Engine:
    """A model that answers requests. name: of the model; classifier: for `classify`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        device: torch.device,
        name: str,
        classifier: TextClassifier | None = None,
    ) -> None:
        self.model, self.tokenizer, self.device, self.name, self.classifier = model, tokenizer, device, name, classifier
        self.context = model.config.max_seq_len
        self.lock = threading.Lock()
        self.started = int(time.time())
        before = tokenizer.encode("a", bos=False, eos=False)
        self.texts = [token_text(tokenizer, token, before, plain=True) for token in range(model.config.vocab_size)]

    # Requests

    def settings(self, request: dict[str, Any], *more: str) -> dict[str, Any]:
        """The checked fields of a request. more: names of others that the caller reads."""
        for name, value in request.items():
            if name in WITHOUT_EFFECT and value is not None and value not in WITHOUT_EFFECT[name]:
                raise BadRequest(f"{name} is not supported; leave it out")
            if name not in (*FIELDS, *WITHOUT_EFFECT, *IGNORED, *more):
                raise BadRequest(f"{name[:40]!r} is not a field of this request")
        found = {}
        for name, (kind, allowed, words, default) in FIELDS.items():
            value = request.get(name)
            if value is None:
                value = default
            elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not allowed(value):
                raise BadRequest(f"{name} is {str(value)[:40]}; it must be {words}")
            found[name] = value
        if found["max_tokens"] > self.context:
            raise BadRequest(f"max_tokens is {found['max_tokens']}; the model's context is {self.context}")
        stops = [found["stop"]] if isinstance(found["stop"], str) else list(found["stop"])
        if len(stops) > 16 or not all(isinstance(stop, str) and stop for stop in stops):
            raise BadRequest("stop must be a text or a list of at most 16 texts, none of them empty")
        return found | {"stop": stops}

    def decoding(self, settings: dict[str, Any], number: int) -> Decoding:
        """The settings of the text with this number."""
        seed = torch.seed() % 2**62 if settings["seed"] is None else settings["seed"] % 2**62 + number
        try:
            filters = filters_by_name(settings["epsilon"], **{name: settings[name] for name in FILTERS})
        except ValueError as error:
            raise BadRequest(str(error)) from None
        return Decoding(
            max_new_tokens=settings["max_tokens"],
            temperature=float(settings["temperature"]),
            filters=filters,
            repetition_penalty=float(settings["repetition_penalty"]),
            stops=settings["stop"],
            seed=seed,
            shows_prompt=False,
        )

    def prompts(self, value: Any) -> list[list[int]]:
        """The prompts of a request as tokens: of a text, a list of texts, a list of tokens, or a list of such lists."""
        many = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
        if len(many) > MOST_CHOICES:
            raise BadRequest(f"there are {len(many)} prompts; at most {MOST_CHOICES} are answered at once")
        return [self.encoded(one) for one in many]

    def encoded(self, prompt: Any) -> list[int]:
        """The tokens of one prompt."""
        if isinstance(prompt, str):
            try:
                ids = self.tokenizer.encode_prompt(prompt)
            except ValueError as error:
                raise BadRequest(str(error)) from None
        elif isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
            ids = prompt
            if outside := [one for one in ids if not 0 <= one < self.model.config.vocab_size]:
                raise BadRequest(f"token {outside[0]} is not in the vocabulary of {self.model.config.vocab_size}")
        else:
            raise BadRequest("prompt must be a text, a list of texts, or a list of token ids that is not empty")
        if len(ids) > self.context:
            raise BadRequest(f"the prompt has {len(ids)} tokens, more than the model's context of {self.context}")
        return ids

    # Answers

    def models(self) -> dict[str, Any]:
        facts = {"id": self.name, "object": "model", "created": self.started, "owned_by": "mini-llama"}
        return {"object": "list", "data": [facts | {"max_model_len": self.context}]}

    def tokenizer_info(self) -> dict[str, Any]:
        """The special tokens, by the names that lm-evaluation-harness asks for."""
        names = {i: name for name, i in self.tokenizer.special_ids.items()}
        bos, eos = (
            names.get(i, default) for i, default in ((self.tokenizer.bos_id, "<s>"), (self.tokenizer.eos_id, "</s>"))
        )
        return {"bos_token": bos, "eos_token": eos, "pad_token": eos, "vocab_size": self.model.config.vocab_size}

    def tokenize(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"prompt": text} -> its tokens. A text that is the name of a special token is that token."""
        text = request.get("prompt")
        if not isinstance(text, str):
            raise BadRequest("prompt must be a text")
        info = self.tokenizer_info()
        special = {info["bos_token"]: self.tokenizer.bos_id, info["eos_token"]: self.tokenizer.eos_id}
        try:
            ids = [special[text]] if text in special else self.tokenizer.encode(text, bos=False, eos=False)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        if request.get("add_special_tokens") and self.tokenizer.adds_bos:
            ids = [self.tokenizer.bos_id, *ids]
        return {"tokens": ids, "count": len(ids), "max_model_len": self.context, "texts": [self.texts[i] for i in ids]}

    def detokenize(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"tokens": ids} -> their text."""
        tokens = request.get("tokens")
        if tokens == []:
            return {"prompt": ""}
        if not isinstance(tokens, list):
            raise BadRequest("tokens must be a list of token ids")
        return {"prompt": self.tokenizer.decode(self.encoded(tokens))}

    def classify(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"text": a text or a list of texts} -> the class and the probability of every class, for each."""
        if self.classifier is None:
            raise BadRequest("this server has no classifier; start it with --finetuned FILE")
        texts = [request["text"]] if isinstance(request.get("text"), str) else request.get("text")
        if not isinstance(texts, list) or not 0 < len(texts) <= MOST_CHOICES:
            raise BadRequest(f"text must be a text, or a list of 1 to {MOST_CHOICES} texts")
        try:
            with self.lock:
                found = self.classifier(texts)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        return {"results": [{"class": next(iter(one)), "probabilities": one} for one in found]}

    def complete(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The answer to /v1/completions: one dictionary, or with "stream" one for each piece of text."""
        settings = self.settings(request, "prompt")
        prompts = [one for one in self.prompts(request.get("prompt")) for _ in range(settings["n"])]
        if len(prompts) > MOST_CHOICES:
            raise BadRequest(f"{len(prompts)} texts are asked for; at most {MOST_CHOICES} are answered at once")
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        head["model"] = self.name
        decodings = [self.decoding(settings, number) for number in range(len(prompts))]
        return self._complete(head, settings, prompts, decodings)

    def _complete(
        self, head: dict[str, Any], settings: dict[str, Any], prompts: list[list[int]], decodings: list[Decoding]
    ) -> Iterator[dict[str, Any]]:
        choices, made = [], 0
        for index, (prompt, decoding) in enumerate(zip(prompts, decodings, strict=True)):
            text, tokens, finish = "", [], None
            for piece, new, finish in self.pieces(prompt, decoding, settings):
                if settings["stream"]:
                    choice = {"index": index, "text": piece, "finish_reason": finish}
                    yield head | {"choices": [choice | {"logprobs": self.logprobs(new, settings, len(text))}]}
                text, tokens = text + piece, tokens + new
            choice = {"index": index, "text": text, "finish_reason": finish}
            choices.append(choice | {"logprobs": self.logprobs(tokens, settings)})
            made += len(tokens) - (len(prompt) if settings["echo"] else 0)
        read = sum(map(len, prompts))
        if not settings["stream"]:
            usage = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
            yield head | {"choices": choices, "usage": usage}

    def chat(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The answer to /v1/chat/completions."""
        if "max_completion_tokens" in request:
            request = request | {"max_tokens": request["max_completion_tokens"]}
        settings = self.settings({"max_tokens": 256} | request, "messages", "max_completion_tokens")
        try:
            prompt = self.encoded(self.tokenizer.encode_chat(request.get("messages") or []))
        except (ValueError, TypeError) as error:
            raise BadRequest(str(error)) from None
        decoding = self.decoding(settings, 0)
        kind = "chat.completion.chunk" if settings["stream"] else "chat.completion"
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}
        return self._chat(head, settings | {"echo": False, "logprobs": None}, prompt, decoding)

    def _chat(
        self, head: dict[str, Any], settings: dict[str, Any], prompt: list[int], decoding: Decoding
    ) -> Iterator[dict[str, Any]]:
        text, count, finish = "", 0, None
        for piece, new, finish in self.pieces(prompt, decoding, settings):
            piece = piece if text else piece.lstrip()
            if settings["stream"]:
                delta = {"content": piece} if text else {"role": "assistant", "content": piece}
                yield head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
            text, count = text + piece, count + len(new)
        if not settings["stream"]:
            message = {"role": "assistant", "content": text}
            usage = {"prompt_tokens": len(prompt), "completion_tokens": count, "total_tokens": len(prompt) + count}
            yield head | {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}

    # Tokens

    def pieces(
        self, prompt: list[int], decoding: Decoding, settings: dict[str, Any]
    ) -> Iterator[tuple[str, list[Token], str | None]]:
        """The text of a continuation in pieces, each with its tokens; with the last one, why it ended.

        With "echo" the prompt is the first piece.
        """
        wanted = settings["logprobs"]
        if settings["echo"]:
            yield self.tokenizer.decode(prompt), self.scored(prompt, wanted), None
        if not decoding.max_new_tokens:
            yield "", [], "length"
            return
        taken: list[Token] = []
        waiting: list[Token] = []

        def ids() -> Iterator[int]:
            for token in self.steps(prompt, decoding, wanted):
                taken.append(token)
                waiting.append(token)
                yield token.id

        # After the prompt, because some tokenizers drop a text's first space.
        found = text_pieces(self.tokenizer, prompt, ids(), decoding.stops)
        next(found)  # the prompt
        while True:
            try:
                piece = next(found)
            except StopIteration as end:
                ended = end.value or taken[-1].id in self.tokenizer.stop_ids
                yield "", waiting, "stop" if ended else "length"
                return
            if piece:
                yield piece, waiting, None
                waiting = []

    def steps(self, prompt: list[int], decoding: Decoding, wanted: int | None) -> Iterator[Token]:
        """The new tokens, one by one. The lock is held for one at a time."""
        writer = Writer(self.model, self.tokenizer, self.device, decoding)
        seen: list[Token] = []

        def watch(logits: Tensor, chosen: Tensor) -> None:
            seen.append(self.token(int(chosen), logits[0], wanted))

        steps = writer.ids(prompt, watch=watch)
        while True:
            with self.lock:
                if next(steps, None) is None:
                    return
            yield seen.pop()

    def scored(self, prompt: list[int], wanted: int | None) -> list[Token]:
        """The tokens of a prompt with their log-probabilities; the first has none."""
        if wanted is None or len(prompt) < 2:
            return [Token(token) for token in prompt]
        idx = torch.tensor([prompt], device=self.device)
        with self.lock:
            logits, _ = self.model(idx, idx)
        later = [self.token(token, row, wanted) for token, row in zip(prompt[1:], logits[0], strict=False)]
        return [Token(prompt[0]), *later]

    def token(self, chosen: int, logits: Tensor, wanted: int | None) -> Token:
        """A token and its log-probability under logits (V,), at temperature 1 and without filters."""
        if wanted is None:
            return Token(chosen)
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.topk(min(wanted, len(logprobs)))
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Token(chosen, float(logprobs[chosen]), top)

    def logprobs(self, tokens: Sequence[Token], settings: dict[str, Any], start: int = 0) -> dict[str, Any] | None:
        """Log-probabilities in OpenAI's form; beyond it `token_ids` and `top_ids`. start: of the text of `tokens`."""
        if settings["logprobs"] is None:
            return None
        offsets, texts = [], [self.texts[token.id] for token in tokens]
        for text in texts:
            offsets.append(start)
            start += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [None if token.top is None else self.by_text(token) for token in tokens],
            "text_offset": offsets,
            "token_ids": [token.id for token in tokens],
            "top_ids": [[] if token.top is None else [one for one, _ in token.top] for token in tokens],
        }

    def by_text(self, token: Token) -> dict[str, float]:
        """The likeliest tokens and the chosen one, by text; of two with the same text the second is shown by number."""
        found: dict[str, float] = {}
        chosen = [] if token.logprob is None or token.id in dict(token.top or []) else [(token.id, token.logprob)]
        for one, logprob in (*(token.top or []), *chosen):
            found[self.texts[one] if self.texts[one] not in found else f"<{one}>"] = logprob
        return found
