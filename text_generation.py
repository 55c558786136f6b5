"""The option that writes text: prompts in, continuations out; as they are made, in batches, in a conversation, or with
what each token was chosen from.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import generation
from dataset import LINE_END, pad, read_text
from environment import ready, report
from explanation import Explanation
from files import atomic_file
from generation import Filter, LanguageModel
from inference import InferenceLlama
from options import writes_two_files
from tokenizer import Tokenizer

HISTORY = Path.home() / ".mini-llama-history"  # what was typed in the interactive loop


@dataclass
class Continuation:
    """One prompt's; finish says what ended it: "end" (of sequence), "stop" (a text of --stop), "length"."""

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
        (generation.epsilon_filter, "epsilon", args.epsilon or None),
        (generation.eta_filter, "eta", args.eta),
        (generation.top_k_filter, "k", args.top_k),
        (generation.top_p_filter, "p", args.top_p),
        (generation.min_p_filter, "p", args.min_p),
        (generation.typical_filter, "mass", args.typical_p),
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
        args, stops, count = self.args, self.tokenizer.stop_ids, self.args.max_new_tokens
        idx = torch.tensor([prompt], device=self.device)
        if args.decoder == "sample":
            for chosen in self.stream(idx, None, temperature, watch):
                yield int(chosen)
            return
        if args.decoder == "beam":
            found, _ = generation.beam_search(
                self.model, idx, count, beams=args.beams, length_penalty=args.length_penalty, eos_ids=stops
            )
        elif args.decoder == "contrastive":
            found = generation.contrastive_search(
                self.model, idx, count, k=args.top_k or 4, alpha=args.contrast, eos_ids=stops
            )
        else:
            found = generation.lookup_decoding(
                self.model,
                idx,
                count,
                temperature=temperature,
                filters=self.filters,
                eos_ids=stops,
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
        """`generation.stream` with the options' settings."""
        return generation.stream(
            self.model,
            idx,
            self.args.max_new_tokens,
            temperature=temperature,
            epsilon=0.0,  # among the filters
            filters=self.filters,
            repetition_penalty=self.args.repetition_penalty,
            attention_mask=mask,
            eos_ids=self.tokenizer.stop_ids,
            generator=self.generator,
            watch=watch,
        )

    def one(
        self,
        prompt: list[int],
        temperature: float,
        show: Callable[[str], None],
        watch: Callable[[Tensor, Tensor], None] | None = None,
        echo: bool = True,
    ) -> Continuation:
        """Continues a prompt, handing on each piece of the text, the prompt's first if `echo`, as it is made."""
        speed, ids = Speed(), []
        before = self.tokenizer.decode(prompt) if echo else ""
        shown = ""

        def counted() -> Iterator[int]:
            for token in self.ids(prompt, temperature, watch):
                speed.count()
                ids.append(token)
                yield token

        pieces = text_pieces(self.tokenizer, prompt if echo else [], counted(), self.args.stop)
        try:
            for piece in pieces:
                show(piece)
                shown += piece
        finally:
            show("\n")
            report(str(speed))
        return Continuation(before, shown[len(before) :], len(ids), self.finish(ids))

    def finish(self, ids: Sequence[int]) -> str:
        """What ended these tokens."""
        if ids and ids[-1] in self.tokenizer.stop_ids:
            return "end"
        return "length" if len(ids) >= self.args.max_new_tokens else "stop"

    def batch(self, prompts: list[list[int]], temperature: float, bar: tqdm) -> list[Continuation]:
        """Continues prompts together, each as it would be alone."""
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
        found = []
        for prompt, ids in zip(prompts, rows, strict=True):
            before = self.tokenizer.decode(prompt)
            text = "".join(text_pieces(self.tokenizer, prompt, iter(ids), self.args.stop))
            found.append(Continuation(before, text[len(before) :], len(ids), self.finish(ids)))
        return found

    def stopped(self, prompt: list[int], ids: list[int]) -> bool:
        """Whether a text of --stop has come up."""
        if not self.args.stop:
            return False
        text = self.tokenizer.decode(prompt + ids)[len(self.tokenizer.decode(prompt)) :]
        return any(stop in text for stop in self.args.stop)


def text_pieces(tokenizer: Tokenizer, prompt: list[int], ids: Iterator[int], stops: Sequence[str]) -> Iterator[str]:
    """The text of prompt and ids in pieces, as soon as they are certain: no half of a character, and nothing that may
    be the beginning of one of `stops`. Ends before the first of these that follows the prompt.
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
            return
        certain = text.rstrip("\ufffd")
        waiting = max((overlap(certain[length:], stop) for stop in stops), default=0)
        certain = certain[: len(certain) - waiting]
        if len(certain) > len(shown):
            yield certain[len(shown) :]
            shown = certain
    yield text[len(shown) :]


def overlap(text: str, stop: str) -> int:
    """How many of the text's last characters are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)


def show(piece: str) -> None:
    """Prints a piece of text where the last one ended, at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def prompts_of(args: argparse.Namespace, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each prompt asked for."""
    texts = [args.prompt]
    if args.prompt_file is not None:
        lines = LINE_END.split(read_text(args.prompt_file, "file of prompts, one a line"))
        texts = [line for line in lines if line.strip()]
    return [encode(args, tokenizer, [{"role": "user", "content": text}]) for text in texts]


def encode(args: argparse.Namespace, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a conversation that waits for an answer, or, without --chat, of its last message."""
    if not args.chat:
        return tokenizer.encode(messages[-1]["content"], bos=True, eos=False)
    system = [{"role": "system", "content": args.system}] if args.system else []
    return tokenizer.encode_chat([*system, *messages])


def generate(args: argparse.Namespace) -> None:
    """generate: continues the prompt at the temperature asked for, or at 0 and at 1 into the course's two files."""
    llama, tokenizer, device, dtype = ready(args)
    context, causal = llama.config.max_seq_len, llama.config.causal
    prompts = [] if args.interactive else prompts_of(args, tokenizer)
    longest = max(map(len, prompts), default=0)
    if longest + args.max_new_tokens > context:
        report(
            f"warning: {longest} tokens of prompt and {args.max_new_tokens} new ones exceed the model's context of "
            f"{context}; it will see only the last {context}"
        )
    if args.decoder == "lookup" and not causal:
        raise ValueError("--decoder lookup needs causal attention; leave it out, or add --attention causal")
    if not causal:
        report("notice: attention is bidirectional here, so that each new token changes those before it: no cache")
    writer = Writer(args, InferenceLlama(llama, dtype, args.quantize), tokenizer, device)
    draws = args.decoder in ("sample", "lookup")
    temperature = args.temperature if args.temperature is not None else 1.0 if draws else 0.0
    if args.interactive:
        converse(writer, temperature)
    elif args.json or args.prompt_file or args.num_samples > 1:
        write_many(writer, [prompt for prompt in prompts for _ in range(args.num_samples)], temperature)
    elif args.explain is not None:
        explain(writer, prompts[0], temperature)
    elif not writes_two_files(args):
        writer.one(prompts[0], temperature, show, echo=not args.chat)
    else:
        for each, path in ((0.0, args.generated_sentence_low_temp_out), (1.0, args.generated_sentence_high_temp_out)):
            report(f"\ntemperature {each:g} -> {path}")
            writer.start_anew()
            made = writer.one(prompts[0], each, show, echo=not args.chat)
            with atomic_file(path) as file:
                file.write(made.prompt + made.text + "\n")


def write_many(writer: Writer, prompts: list[list[int]], temperature: float) -> None:
    """Continues all prompts, in batches of --batch_size, and prints each continuation when its batch is done."""
    args, speed = writer.args, Speed()
    size = args.batch_size if args.decoder == "sample" else 1
    most = len(prompts) * args.max_new_tokens
    with tqdm(total=most, desc="generating", unit="token", leave=False, disable=None) as bar:
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            if args.decoder == "sample":
                made = writer.batch(some, temperature, bar)
            else:
                made = [continued(writer, prompt, temperature) for prompt in some]
            speed.count(sum(one.tokens for one in made))
            bar.update(max(0, min(len(prompts), start + size) * args.max_new_tokens - bar.n))  # what ended early
            bar.clear()
            for one in made:
                if args.json:
                    print(json.dumps(asdict(one), ensure_ascii=False))
                else:
                    print(("" if args.chat else one.prompt) + one.text, end="\n\n")
            sys.stdout.flush()
    report(f"{speed.tokens} tokens in {time.perf_counter() - speed.start:.2f} s")


def continued(writer: Writer, prompt: list[int], temperature: float) -> Continuation:
    """One continuation by a decoder that takes one prompt at a time."""
    ids = list(writer.ids(prompt, temperature))
    before = writer.tokenizer.decode(prompt)
    text = "".join(text_pieces(writer.tokenizer, prompt, iter(ids), writer.args.stop))
    return Continuation(before, text[len(before) :], len(ids), writer.finish(ids))


def explain(writer: Writer, prompt: list[int], temperature: float) -> None:
    """Continues a prompt, then shows what each token was chosen from."""
    args = writer.args
    explanation = Explanation(writer.tokenizer, prompt, temperature, writer.filters)
    writer.one(prompt, temperature, show, watch=explanation.watch, echo=not args.chat)
    print(f"\n{explanation.table()}")
    if args.explain:
        with atomic_file(args.explain) as file:
            file.write(explanation.page())
        report(f"wrote {args.explain}")


def lines_typed() -> Iterable[str]:
    """What is typed, line by line, until Ctrl-D; on a terminal with a history that the next time still has."""
    asks = "> " if sys.stdin.isatty() else ""
    if asks:
        try:
            import readline

            if HISTORY.exists():
                readline.read_history_file(HISTORY)
        except (ImportError, OSError):
            readline = None  # type: ignore[assignment]
    try:
        while True:
            try:
                yield input(asks)
            except EOFError:
                show("\n" if asks else "")
                return
            except KeyboardInterrupt:
                show("\n")
                report("Ctrl-C stops an answer; Ctrl-D ends")
    finally:
        if asks and readline is not None:
            try:
                readline.set_history_length(1000)
                readline.write_history_file(HISTORY)
            except OSError as error:
                report(f"warning: the history could not be kept: {error}")


def converse(writer: Writer, temperature: float) -> None:
    """Answers one prompt after the other; with --chat they are one conversation, of which the oldest is forgotten."""
    args, context = writer.args, writer.model.config.max_seq_len
    report("Type a prompt, and Enter. Ctrl-C stops an answer, Ctrl-D ends.")
    said: list[dict[str, str]] = []
    for line in lines_typed():
        if not line.strip():
            continue
        said = [*(said if args.chat else []), {"role": "user", "content": line}]
        prompt = encode(args, writer.tokenizer, said)
        while len(prompt) + args.max_new_tokens > context and len(said) > 2:
            said = said[2:]
            prompt = encode(args, writer.tokenizer, said)
        pieces: list[str] = []

        def tell(piece: str, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            show(piece)

        try:
            writer.one(prompt, temperature, tell, echo=not args.chat)
        except KeyboardInterrupt:
            report("stopped")
        said.append({"role": "assistant", "content": "".join(pieces).strip()})
