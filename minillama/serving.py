"""Answers of the server: requests in OpenAI's form in, dictionaries out. HTTP is in commands/serve.py.

One lock guards the model. It is held for one token at a time, so several texts grow at once, and a client that stops
reading keeps nobody waiting.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minillama.decoding.decoders import Decoding, Writer, text_pieces
from minillama.decoding.filters import check_finite, filters_by_name
from minillama.inference import TextClassifier
from minillama.text.token_texts import token_text
from tokenizer import Tokenizer

MOST = 64  # texts of a request
FILTERS = ("epsilon", "eta", "top_k", "top_p", "min_p", "typical_p")
# Fields of a request: the least and the largest value, and the default. A whole number if the least one is.
NUMBERS: dict[str, tuple[float, float, Any]] = {
    "n": (1, MOST, 1),
    "logprobs": (0, 20, None),
    "seed": (-(2**63), 2**63 - 1, None),
    "top_k": (1, 10**6, None),
    "temperature": (0.0, 100.0, 1.0),
    "repetition_penalty": (0.01, 100.0, 1.0),
} | {name: (0.0, 1.0, None) for name in FILTERS if name != "top_k"}
UNSUPPORTED = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "suffix": "", "best_of": 1}


class Refused(ValueError):
    """A request that is not answered, with the reason and HTTP's status."""

    def __init__(self, reason: object, status: int = 400) -> None:
        super().__init__(str(reason))
        self.status = status


@dataclass
class Token:
    """A token with its log-probability and the likeliest tokens with theirs; the first token of a text has neither."""

    id: int
    logprob: float | None = None
    top: dict[int, float] = field(default_factory=dict)


class Engine:
    """A model that answers requests. name: of the model; classifier: for `classify`."""

    def __init__(
        self, model: Any, tokenizer: Tokenizer, device: torch.device, name: str, classifier: TextClassifier | None
    ) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.name, self.classifier = name, classifier
        self.context, self.vocabulary = model.config.max_seq_len, model.config.vocab_size
        self.lock, self.started = threading.Lock(), int(time.time())
        self.letter = tokenizer.encode("a", bos=False, eos=False)
        self.texts = [token_text(tokenizer, token, self.letter, plain=True) for token in range(self.vocabulary)]
        names = {i: name for name, i in tokenizer.special_ids.items()}
        self.bos, self.eos = names.get(tokenizer.bos_id, "<s>"), names.get(tokenizer.eos_id, "</s>")

    # Small requests

    def models(self) -> dict[str, Any]:
        facts = {"id": self.name, "object": "model", "created": self.started, "owned_by": "mini-llama"}
        return {"object": "list", "data": [facts | {"max_model_len": self.context}]}

    def tokenizer_info(self) -> dict[str, Any]:
        """The names of the special tokens, for lm-evaluation-harness."""
        return {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.eos, "vocab_size": self.vocabulary}

    def tokenize(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"prompt": text} -> its tokens. A text that is the name of a special token is that token."""
        text, tokenizer = request.get("prompt"), self.tokenizer
        if not isinstance(text, str):
            raise Refused("prompt must be a text")
        special = {self.bos: tokenizer.bos_id, self.eos: tokenizer.eos_id}
        try:
            ids = [special[text]] if text in special else tokenizer.encode(text, bos=False, eos=False)
        except ValueError as error:
            raise Refused(error) from None
        ids = [tokenizer.bos_id, *ids] if request.get("add_special_tokens") and tokenizer.adds_bos else ids
        return {"tokens": ids, "count": len(ids), "max_model_len": self.context, "texts": [self.texts[i] for i in ids]}

    def detokenize(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"tokens": ids} -> their text."""
        tokens = request.get("tokens")
        if not isinstance(tokens, list):
            raise Refused("tokens must be a list of token ids")
        return {"prompt": self.tokenizer.decode(self.checked(tokens)) if tokens else ""}

    def classify(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"text": a text or a list of texts} -> for each, the class and the probability of every class."""
        if self.classifier is None:
            raise Refused("this server has no classifier; start it with --finetuned FILE")
        texts = [request["text"]] if isinstance(request.get("text"), str) else request.get("text")
        if not isinstance(texts, list) or not 0 < len(texts) <= MOST:
            raise Refused(f"text must be a text, or a list of 1 to {MOST} texts")
        try:
            with self.lock:
                found = self.classifier(texts)
        except ValueError as error:
            raise Refused(error) from None
        return {"results": [{"class": next(iter(one)), "probabilities": one} for one in found]}

    # Texts

    def settings(self, request: dict[str, Any]) -> dict[str, Any]:
        """The checked fields of a request."""
        for name, harmless in UNSUPPORTED.items():
            if request.get(name) not in (None, harmless):
                raise Refused(f"{name} is not supported; leave it out")
        found: dict[str, Any] = {name: request.get(name) or False for name in ("stream", "echo")}
        if wrong := [name for name in found if not isinstance(found[name], bool)]:
            raise Refused(f"{wrong[0]} must be true or false")
        ranges = NUMBERS | {"max_tokens": (0, self.context, 16)}
        for name, (least, largest, default) in ranges.items():
            kind = (int,) if isinstance(least, int) else (int, float)
            value = default if request.get(name) is None else request[name]
            if value is not None and (type(value) not in kind or not least <= value <= largest):
                what = "a whole number" if kind == (int,) else "a number"
                raise Refused(f"{name} is {str(value)[:40]}; it must be {what} from {least} to {largest}")
            found[name] = value
        if found["logprobs"] is not None and found["echo"] and not self.model.config.causal:
            raise Refused("this model's attention is bidirectional: it sees the tokens that it would predict")
        stops = request.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(stops, list) or len(stops) > 16 or not all(isinstance(one, str) and one for one in stops):
            raise Refused("stop must be a text, or a list of at most 16 texts, none of them empty")
        return found | {"stop": stops}

    def decoding(self, settings: dict[str, Any], number: int) -> Decoding:
        """The settings of the text with this number."""
        seed = torch.seed() if settings["seed"] is None else settings["seed"] + number
        try:
            filters = filters_by_name(
                **{name: settings[name] for name in FILTERS} | {"epsilon": settings["epsilon"] or 0.0}
            )
        except ValueError as error:
            raise Refused(error) from None
        return Decoding(
            max_new_tokens=settings["max_tokens"],
            temperature=float(settings["temperature"]),
            filters=filters,
            repetition_penalty=float(settings["repetition_penalty"]),
            stops=settings["stop"],
            seed=seed % 2**62,
            shows_prompt=False,
        )

    def encoded(self, prompt: Any) -> list[int]:
        """The tokens of a prompt, a text or a list of tokens."""
        if isinstance(prompt, str):
            try:
                prompt = self.tokenizer.encode_prompt(prompt)
            except ValueError as error:
                raise Refused(error) from None
        prompt = self.checked(prompt)
        if len(prompt) > self.context:
            raise Refused(f"the prompt has {len(prompt)} tokens, more than the model's context of {self.context}")
        return prompt

    def checked(self, tokens: Any) -> list[int]:
        """Returns the tokens, if they are a list of token ids that is not empty."""
        if not isinstance(tokens, list) or not tokens or any(type(one) is not int for one in tokens):
            raise Refused("a prompt must be a text, or a list of token ids that is not empty")
        if outside := [one for one in tokens if not 0 <= one < self.vocabulary]:
            raise Refused(f"token {str(outside[0])[:20]} is not in the vocabulary of {self.vocabulary}")
        return tokens

    def complete(self, request: dict[str, Any], chat: bool = False) -> Iterator[dict[str, Any]]:
        """The answer to /v1/completions, or of a chat: one dictionary, or with "stream" one for each piece of text."""
        if chat:
            limit = request.get("max_completion_tokens", request.get("max_tokens"))
            given = self.settings(request | {"max_tokens": min(256, self.context) if limit is None else limit})
            settings = given | {"echo": False, "logprobs": None}
            try:
                prompts = [self.encoded(self.tokenizer.encode_chat(request.get("messages") or []))]
            except (TypeError, ValueError) as error:
                raise Refused(error) from None
        else:
            settings, asked = self.settings(request), request.get("prompt")
            many = asked if isinstance(asked, list) and asked and isinstance(asked[0], str | list) else [asked]
            prompts = [self.encoded(one) for one in many[: MOST + 1]]
        prompts = [prompt for prompt in prompts for _ in range(settings["n"])]
        if len(prompts) > MOST:
            raise Refused(f"at most {MOST} texts are answered at once; this request asks for more")
        decodings = [self.decoding(settings, number) for number in range(len(prompts))]
        return self._answers(prompts, decodings, settings, chat)

    def _answers(
        self, prompts: list[list[int]], decodings: list[Decoding], settings: dict[str, Any], chat: bool
    ) -> Iterator[dict[str, Any]]:
        stream = settings["stream"]
        kind = f"chat.completion{'.chunk' * stream}" if chat else "text_completion"
        head = {"id": f"{'chat' * chat}cmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
        head["model"] = self.name

        def choice(index: int, finish: str | None, text: str, tokens: list[Token], start: int = 0) -> dict[str, Any]:
            found = {"index": index, "finish_reason": finish, "logprobs": self.logprobs(tokens, settings, text, start)}
            if chat:
                return found | {"delta" if stream else "message": {"role": "assistant", "content": text}}
            return found | {"text": text}

        choices, read, made = [], sum(map(len, prompts)), 0
        for index, (prompt, decoding) in enumerate(zip(prompts, decodings, strict=True)):
            text, tokens, finish = "", list[Token](), None
            for piece, new, finish in self.pieces(prompt, decoding, settings):
                piece = piece.lstrip() if chat and not text else piece
                if stream:
                    yield head | {"choices": [choice(index, finish, piece, new, len(text))]}
                text, tokens = text + piece, tokens + new
            choices.append(choice(index, finish, text, tokens))
            made += len(tokens) - len(prompt) * settings["echo"]
        if not stream:
            usage = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
            yield head | {"choices": choices, "usage": usage}

    # Tokens

    def pieces(
        self, prompt: list[int], decoding: Decoding, settings: dict[str, Any]
    ) -> Iterator[tuple[str, list[Token], str | None]]:
        """The text of a continuation in pieces, each with its tokens; with the last one, why the text ended.

        With "echo" the prompt is the first piece.
        """
        wanted, last = settings["logprobs"], 0
        waiting: list[Token] = []
        if settings["echo"]:
            yield self.tokenizer.decode(prompt), self.scored(prompt, wanted), None

        def ids() -> Iterator[int]:
            nonlocal last
            for token in self.steps(prompt, decoding, wanted) if decoding.max_new_tokens else ():
                waiting.append(token)
                last = token.id
                yield token.id

        # The prompt comes first, because some tokenizers drop the first space of a text.
        found = text_pieces(self.tokenizer, prompt, ids(), decoding.stops)
        next(found)
        while True:
            try:
                piece = next(found)
            except StopIteration as end:
                ended = end.value or (decoding.max_new_tokens > 0 and last in self.tokenizer.stop_ids)
                yield "", waiting, "stop" if ended else "length"
                return
            yield piece, waiting[:], None
            waiting.clear()

    def steps(self, prompt: list[int], decoding: Decoding, wanted: int | None) -> Iterator[Token]:
        """The new tokens, one by one."""
        seen: list[Token] = []

        def watch(logits: Tensor, chosen: Tensor) -> None:
            seen.append(self.token(int(chosen), logits[0], wanted))

        steps = Writer(self.model, self.tokenizer, self.device, decoding).ids(prompt, watch=watch)
        while True:
            with self.lock:
                if next(steps, None) is None:
                    return
            yield seen.pop()

    def scored(self, prompt: list[int], wanted: int | None) -> list[Token]:
        """The tokens of a prompt with their log-probabilities."""
        if wanted is None or len(prompt) < 2:
            return [Token(token) for token in prompt]
        idx = torch.tensor([prompt], device=self.device)
        with self.lock:
            logits, _ = self.model(idx, idx)
        later = zip(prompt[1:], logits[0], strict=False)
        return [Token(prompt[0]), *(self.token(token, row, wanted) for token, row in later)]

    def token(self, chosen: int, logits: Tensor, wanted: int | None) -> Token:
        """A token and its log-probability under logits (V,), at temperature 1 and without filters."""
        if wanted is None:
            return Token(chosen)
        check_finite(logits)
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.topk(min(wanted, len(logprobs))).indices.tolist()
        return Token(
            chosen, float(logprobs[chosen]), {one: float(logprobs[one]) for one in dict.fromkeys([*best, chosen])}
        )

    def logprobs(
        self, tokens: Sequence[Token], settings: dict[str, Any], text: str, start: int
    ) -> dict[str, Any] | None:
        """Log-probabilities in OpenAI's form; `token_ids` and `top_ids` are beyond it. text: of the tokens, which
        begins at `start` of the choice.
        """
        if settings["logprobs"] is None:
            return None
        offsets, tops, ids = [], [], [] if settings["echo"] and start == 0 else self.letter
        shorter = len(self.tokenizer.decode(ids)) - start
        for token in tokens:  # a character of several tokens comes with the last of them
            offsets.append(min(len(self.tokenizer.decode(ids).rstrip("\ufffd")) - shorter, start + len(text)))
            ids = [*ids, token.id]
            top: dict[str, float] = {}
            for one, logprob in token.top.items():  # of two tokens with one text, the second is shown by its number
                top[f"<{one}>" if self.texts[one] in top else self.texts[one]] = logprob
            tops.append(top if token.logprob is not None else None)
        return {
            "tokens": [self.texts[token.id] for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
            "token_ids": [token.id for token in tokens],
            "top_ids": [list(token.top) for token in tokens],
        }
