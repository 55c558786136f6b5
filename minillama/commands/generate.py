"""The option that writes text: prompts in, continuations out; as they are made, in batches, in a conversation, or with
what each token was chosen from.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from minillama.cli.console import check_stdin, lines_typed, prompts_of, show, speaks_utf8
from minillama.cli.loading import load_for_inference, report, warn
from minillama.cli.options import writes_two_files
from minillama.cli.provenance import Origin, writing_turn
from minillama.decoding import filters, sampling
from minillama.decoding.beam_search import beam_search
from minillama.decoding.contrastive_search import contrastive_search
from minillama.decoding.explanation import Explanation
from minillama.decoding.fast_llama import fast_model
from minillama.decoding.filters import Filter
from minillama.decoding.lookup import lookup_decoding
from minillama.decoding.sampling import LanguageModel
from minillama.formats.files import atomic_file
from minillama.text.batches import pad
from tokenizer import Tokenizer


@dataclass
class Continuation:
    """One prompt's; finish says what ended it: "end" (of sequence), "stop" (a text of --stop), "length". tokens: how
    many were made, with those of the end or the stop.
    """

    prompt: str
    text: str
    tokens: int
    finish: str


class Speed:
    """Counts tokens from the moment it is made; the first one waits for the prompt to be read."""

    def __init__(self) -> None:
        self.start, self.first, self.tokens = time.perf_counter(), 0.0, 0

    def count(self, tokens: int = 1) -> None:
        self.tokens += tokens
        self.first = self.first or time.perf_counter()

    def __str__(self) -> str:
        end = time.perf_counter()
        said = f"{self.tokens} tokens in {end - self.start:.2f} s"
        if self.tokens < 2 or self.first - self.start > 0.9 * (end - self.start):  # all came at once
            return f"{said}, {self.tokens / (end - self.start):.0f} a second"
        rate = (self.tokens - 1) / (end - self.first)
        return f"{said}; the first after {self.first - self.start:.2f} s, then {rate:.0f} a second"


def filters_of(args: argparse.Namespace) -> list[Filter]:
    """The filters asked for, --epsilon first."""
    chosen = (
        (filters.epsilon_filter, "epsilon", args.epsilon or None),
        (filters.eta_filter, "eta", args.eta),
        (filters.top_k_filter, "k", args.top_k),
        (filters.top_p_filter, "p", args.top_p),
        (filters.min_p_filter, "p", args.min_p),
        (filters.typical_filter, "mass", args.typical_p),
    )
    return [partial(kept, **{name: value}) for kept, name, value in chosen if value is not None]


@dataclass
class Writer:
    """A model that continues prompts as the options say."""

    args: argparse.Namespace
    model: LanguageModel
    tokenizer: Tokenizer
    device: torch.device

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device)
        self.filters = filters_of(self.args)
        self.start_anew()

    def start_anew(self) -> None:
        """Has what is drawn from here on depend on --seed alone."""
        self.generator.manual_seed(self.args.seed)

    def ids(
        self, prompt: list[int], temperature: float, watch: Callable[[Tensor, Tensor], None] | None = None
    ) -> Iterator[int]:
        """The tokens after one prompt, by the decoder asked for; all at once if that cannot but see them together."""
        args, count = self.args, self.args.max_new_tokens
        stops, banned = self.tokenizer.stop_ids, self.tokenizer.unused_ids
        idx = torch.tensor([prompt], device=self.device)
        if args.decoder == "sample":
            for chosen in self.stream(idx, None, temperature, watch):
                yield int(chosen)
            return
        if args.decoder == "beam":
            found, _ = beam_search(
                self.model,
                idx,
                count,
                beams=args.beams,
                length_penalty=args.length_penalty,
                eos_ids=stops,
                banned_ids=banned,
            )
        elif args.decoder == "contrastive":
            found = contrastive_search(
                self.model, idx, count, k=args.top_k or 4, alpha=args.contrast, eos_ids=stops, banned_ids=banned
            )
        else:
            found = lookup_decoding(
                self.model,
                idx,
                count,
                temperature=temperature,
                filters=self.filters,
                eos_ids=stops,
                banned_ids=banned,
                generator=self.generator,
            )
        yield from found[len(prompt) :].tolist()

    def stream(
        self,
        idx: Tensor,
        mask: Tensor | None,
        temperature: float,
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Iterator[Tensor]:
        """`sampling.stream` with the options' settings."""
        return sampling.stream(
            self.model,
            idx,
            self.args.max_new_tokens,
            temperature=temperature,
            epsilon=0.0,  # among the filters
            filters=self.filters,
            repetition_penalty=self.args.repetition_penalty,
            attention_mask=mask,
            eos_ids=self.tokenizer.stop_ids,
            banned_ids=self.tokenizer.unused_ids,
            generator=self.generator,
            watch=watch,
        )

    def one(
        self,
        prompt: list[int],
        temperature: float,
        show: Callable[[str], None],
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Continuation:
        """Continues a prompt, handing on each piece of the text as it is made, first the prompt's that is shown."""
        speed = Speed()

        def counted() -> Iterator[int]:
            for token in self.ids(prompt, temperature, watch):
                speed.count()
                yield token

        try:
            return self.continuation(prompt, counted(), show)
        finally:
            show("\n")
            report(str(speed))

    def shown(self, prompt: list[int]) -> list[int]:
        """The part of a prompt that is shown before its continuation: in a chat nothing, the answer is a text of its
        own.
        """
        return [] if self.args.chat else prompt

    def continuation(
        self, prompt: list[int], ids: Iterator[int], show: Callable[[str], None] = lambda piece: None
    ) -> Continuation:
        """The text that the ids make of a prompt, handed on piece by piece; takes no more of them than it needs."""
        taken: list[int] = []
        pieces: list[str] = []
        stopped = False

        def counted() -> Iterator[int]:
            for token in ids:
                taken.append(token)
                yield token

        def told() -> Iterator[str]:
            nonlocal stopped
            stopped = yield from text_pieces(self.tokenizer, self.shown(prompt), counted(), self.args.stop)

        for piece in told():
            show(piece)
            pieces.append(piece)
        ended = bool(taken) and taken[-1] in self.tokenizer.stop_ids
        finish = "stop" if stopped else "end" if ended else "length"
        return Continuation(pieces[0], "".join(pieces[1:]), len(taken), finish)

    def batch(self, prompts: list[list[int]], temperature: float, bar: tqdm) -> list[Continuation]:
        """Continues prompts together: at temperature 0 each as it would be alone, else with draws that depend on which
        prompts are together.
        """
        idx, mask = pad(prompts, self.tokenizer.pad_id, side="left")
        rows: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        for chosen in self.stream(idx.to(self.device), None if mask is None else mask.to(self.device), temperature):
            for row, token in enumerate(chosen.tolist()):
                if not ended[row]:
                    rows[row].append(token)
                    ended[row] = token in self.tokenizer.stop_ids or self.stopped(prompts[row], rows[row])
                    bar.update(1)
            if all(ended):
                break
        return [self.continuation(prompt, iter(ids)) for prompt, ids in zip(prompts, rows, strict=True)]

    def stopped(self, prompt: list[int], ids: list[int]) -> bool:
        """Whether a text of --stop has come up, as `continuation` would find it."""
        if not self.args.stop:
            return False
        before = self.shown(prompt)
        text = self.tokenizer.decode(before + ids)[len(self.tokenizer.decode(before)) :]
        return any(stop in text for stop in self.args.stop)


def text_pieces(
    tokenizer: Tokenizer, prompt: list[int], ids: Iterator[int], stops: Sequence[str]
) -> Generator[str, None, bool]:
    """The text of prompt and ids in pieces, the prompt first, each as soon as it is certain: no half of a character,
    and nothing that may be the beginning of one of `stops`. Ends before the first of these that follows the prompt;
    returns whether there was one.
    """
    tokens = list(prompt)
    shown = tokenizer.decode(tokens)
    length = len(shown)
    yield shown
    text = shown
    for token in ids:
        tokens.append(token)
        text = tokenizer.decode(tokens)
        found = [place for place in (text.find(stop, length) for stop in stops) if place >= 0]
        if found:
            yield text[len(shown) : min(found)]
            return True
        certain = text.rstrip("\ufffd")
        waiting = max((overlap(certain[length:], stop) for stop in stops), default=0)
        certain = certain[: len(certain) - waiting]
        if len(certain) > len(shown):
            yield certain[len(shown) :]
            shown = certain
    yield text[len(shown) :]
    return False


def overlap(text: str, stop: str) -> int:
    """How many of the text's last characters are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)


def encode(args: argparse.Namespace, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a conversation that waits for an answer, or, without --chat, of its last message."""
    if not args.chat:
        return tokenizer.encode_prompt(messages[-1]["content"])
    system = [{"role": "system", "content": args.system}] if args.system else []
    return tokenizer.encode_chat([*system, *messages])


def generate(args: argparse.Namespace) -> None:
    """generate: continues the prompt at the temperature asked for, or at 0 and at 1 into the course's two files."""
    check_stdin(args)
    texts = [] if args.interactive else prompts_of(args)
    llama, tokenizer, device, dtype = load_for_inference(args)
    context, causal = llama.config.max_seq_len, llama.config.causal
    prompts = [encode(args, tokenizer, [{"role": "user", "content": text}]) for text in texts]
    if prompts:
        warn_of_length(max(map(len, prompts)), args.max_new_tokens, context)
    if args.decoder == "lookup" and not causal:
        raise ValueError("--decoder lookup needs causal attention; leave it out, or add --attention causal")
    if not causal:
        report("notice: attention is bidirectional here, so that each new token changes those before it: no cache")
    writer = Writer(args, fast_model(llama, dtype, args.quantize), tokenizer, device)
    draws = args.decoder in ("sample", "lookup")
    temperature = args.temperature if args.temperature is not None else 1.0 if draws else 0.0
    if args.interactive:
        converse(writer, temperature)
    elif args.json or args.prompt_file or args.num_samples > 1:
        write_many(writer, texts, prompts, temperature)
    elif args.explain is not None:
        explain(writer, prompts[0], temperature)
    elif not writes_two_files(args):
        writer.one(prompts[0], temperature, show)
    else:
        origin = Origin.of(args, {})
        for each, path in ((0.0, args.generated_sentence_low_temp_out), (1.0, args.generated_sentence_high_temp_out)):
            report(f"\ntemperature {each:g} -> {path}")
            writer.start_anew()
            made = writer.one(prompts[0], each, show)
            with writing_turn(path):
                with atomic_file(path) as file:
                    file.write(made.prompt + made.text + "\n")
                warn(origin.write_record(path, temperature=each))


def warn_of_length(prompt: int, new: int, context: int) -> None:
    """Tells if a prompt and what is to follow, in tokens, do not fit into the model's context."""
    if prompt + new > context:
        report(
            f"warning: {prompt} tokens of prompt and {new} new ones exceed the model's context of {context}; it will "
            f"see only the last {context}"
        )


def write_many(writer: Writer, texts: list[str], prompts: list[list[int]], temperature: float) -> None:
    """Continues all prompts, --num_samples times each, in batches of --batch_size, and prints each continuation when
    its batch is done.
    """
    args, speed = writer.args, Speed()
    texts = [text for text in texts for _ in range(args.num_samples)]
    prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
    size = args.batch_size if args.decoder == "sample" else 1
    most = len(prompts) * args.max_new_tokens
    with tqdm(total=most, desc="generating", unit="token", leave=False, disable=None) as bar:
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            if args.decoder == "sample":
                made = writer.batch(some, temperature, bar)
            else:
                made = [writer.continuation(prompt, writer.ids(prompt, temperature)) for prompt in some]
            speed.count(sum(one.tokens for one in made))
            bar.update(max(0, min(len(prompts), start + size) * args.max_new_tokens - bar.n))  # what ended early
            bar.clear()
            for one, text in zip(made, texts[start:], strict=False):
                if args.json:
                    print(json.dumps(asdict(one) | {"prompt": text}, ensure_ascii=not speaks_utf8()))
                else:
                    print(one.prompt + one.text, end="\n\n")
            sys.stdout.flush()
    report(f"{speed.tokens} tokens in {time.perf_counter() - speed.start:.2f} s")


def explain(writer: Writer, prompt: list[int], temperature: float) -> None:
    """Continues a prompt, then shows what each token was chosen from."""
    args = writer.args
    explanation = Explanation(writer.tokenizer, prompt, temperature, writer.filters, args.repetition_penalty)
    writer.one(prompt, temperature, show, watch=explanation.watch)
    if args.explain:
        with atomic_file(args.explain) as file:
            file.write(explanation.page())
        report(f"wrote {args.explain}")
    print(f"\n{explanation.table()}")


def converse(writer: Writer, temperature: float) -> None:
    """Answers one prompt after the other; with --chat they are one conversation, of which the oldest is forgotten."""
    args, context = writer.args, writer.model.config.max_seq_len
    report("Type a prompt, and Enter. Ctrl-C stops an answer, Ctrl-D ends.")
    said: list[dict[str, str]] = []
    for line in lines_typed():
        if not line.strip():
            continue
        before = said if args.chat else []
        pieces: list[str] = []

        def tell(piece: str, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            show(piece)

        try:
            said = [*before, {"role": "user", "content": line}]
            prompt = encode(args, writer.tokenizer, said)
            turns = len(said)
            while len(prompt) + args.max_new_tokens > context and len(said) > 2:
                said = said[2:]
                prompt = encode(args, writer.tokenizer, said)
            if len(said) < turns:
                report("the oldest turns no longer fit into the model's context and are left out")
            warn_of_length(len(prompt), args.max_new_tokens, context)
            writer.one(prompt, temperature, tell)
        except KeyboardInterrupt:
            report("stopped")
        except ValueError as error:  # what was typed cannot be a prompt
            report(str(error))
            said = before
            continue
        said.append({"role": "assistant", "content": "".join(pieces).strip()})
