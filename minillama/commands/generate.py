"""--option generate: continues prompts, one by one, in batches, or in a conversation."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from minillama.cli import flags
from minillama.cli.bundled import use_bundled_model
from minillama.cli.checks import check_differ, check_prompts, refuse
from minillama.cli.console import check_stdin, lines_typed, prompts_of, show, speaks_utf8
from minillama.cli.header import report, warn
from minillama.cli.loading import load_for_inference
from minillama.cli.options import Command, Flag, Group, Options, OwnFlag
from minillama.cli.parser import COUNT, FRACTION, NOT_NEGATIVE, number
from minillama.cli.provenance import Origin, writing_turn

if TYPE_CHECKING:
    from minillama.decoding.decoders import Continuation, Watch, Writer
    from minillama.decoding.filters import Filter
    from tokenizer import Tokenizer

FILTERS = ("eta", "top_k", "top_p", "min_p", "typical_p")  # beside epsilon, the course's
DRAWING = ("sample", "lookup")  # decoders
COURSE_FILES = ("generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt")
SHARE = number(float, "above 0 and at most 1", lambda value: 0 < value <= 1)
SHARE_OR_ZERO = number(float, "in [0, 1]", lambda value: 0 <= value <= 1)
PENALTY = number(float, "from 0.01 to 100 (1 changes nothing)", lambda value: 0.01 <= value <= 100)
LENGTH_PENALTY = number(float, "from -10 to 10", lambda value: -10 <= value <= 10)

TEXT = Group(
    "text",
    (
        flags.PROMPT,
        flags.PROMPT_FILE,
        flags.INTERACTIVE,
        Flag(
            "--chat",
            "the prompt is what a user says, the text the reply, in the chat format of Llama 2 or Llama 3, by the "
            "tokenizer's kind; prints the reply alone",
            bool,
        ),
        Flag("--system TEXT", "with --chat: instructions for the model"),
        flags.MAX_NEW_TOKENS,
        OwnFlag("--stop TEXT", "end before any of these texts", str, [], nargs="+"),
        OwnFlag("--num_samples N", "continuations of each prompt", COUNT, 1),
        flags.BATCH_SIZE,
        flags.JSON,
        OwnFlag(
            "--explain PAGE.html",
            "show for each token which candidates the filters kept and which they cut, as a table in the terminal, and "
            "as a page if one is named",
            nargs="?",
            const="",
        ),
        flags.QUANTIZE,
        *(
            Flag(f"--generated_sentence_{name}_temp_out FILE", f"the text at temperature {value}", str, file)
            for name, value, file in zip(("low", "high"), (0, 1), COURSE_FILES, strict=True)
        ),
    ),
)
DECODING = Group(
    "how tokens are chosen",
    (
        Flag(
            "--temperature T",
            "0 takes the likeliest token, 1 samples from the model's distribution. Prints one text and writes no file",
            NOT_NEGATIVE,
            default_text="one text at 0 and one at 1, each written to its file; 1 where another flag excludes that",
        ),
        Flag(
            "--epsilon E",
            "keep tokens of at least this probability",
            FRACTION,
            0.05,
            default_text="0.05; 0 with another filter",
        ),
        OwnFlag("--eta E", "like --epsilon, but lower where many tokens are likely; try 0.002", FRACTION),
        OwnFlag("--top_k K", "sample only the K likeliest tokens (contrastive: 4)", COUNT),
        OwnFlag("--top_p P", "sample only the likeliest tokens that together reach probability P", SHARE),
        OwnFlag("--min_p P", "sample only tokens at least P times as likely as the likeliest", SHARE),
        OwnFlag(
            "--typical_p P",
            "sample only the tokens whose surprise is nearest to the expected one and that together reach probability "
            "P",
            SHARE,
        ),
        OwnFlag(
            "--repetition_penalty R",
            "above 1, up to 100, makes tokens that occurred before less likely; below 1, down to 0.01, more likely",
            PENALTY,
            1.0,
        ),
        OwnFlag(
            "--decoder",
            "sample draws token by token; beam searches the likeliest whole text; contrastive takes likely tokens that "
            "are unlike the text so far; lookup draws like sample, but guesses ahead from the text so far and checks "
            "the guesses together, which is faster where text repeats itself",
            ("sample", "beam", "contrastive", "lookup"),
            "sample",
        ),
        OwnFlag("--beams N", "beam: texts kept at each step", COUNT, 4),
        OwnFlag("--length_penalty L", "beam: above 0 favours longer texts, below 0 shorter ones", LENGTH_PENALTY, 1.0),
        OwnFlag("--contrast A", "contrastive: weight of being unlike, from 0 to 1", SHARE_OR_ZERO, 0.6),
    ),
)


# The options


def writes_two_files(options: Options) -> bool:
    """Whether generate does what the course asks for: a text at temperature 0 and one at 1, each in its file."""
    other = (options.prompt_file, options.interactive, options.json, options.num_samples > 1)
    return options.temperature is None and options.decoder == "sample" and options.explain is None and not any(other)


def resolve(options: Options) -> Options:
    """Epsilon is off by default where another filter is given."""
    options = use_bundled_model(options)
    if "epsilon" not in options.typed and set(FILTERS) & set(options.typed):
        return options.replace(epsilon=0.0)
    return options


def check(options: Options) -> None:
    """Raises ValueError for options that contradict each other or would have no effect."""
    if options.system is not None and not options.chat:
        raise ValueError("--system is part of a chat; add --chat")
    check_prompts(options, "json", "explain", "num_samples")
    if options.explain is not None:
        refuse(options, ("json", "prompt_file", "num_samples", "decoder"), "--explain shows how one text was sampled")
        if options.explain and not options.explain.endswith(".html"):
            raise ValueError(f"--explain {options.explain}: the page's name must end in .html")
    if not writes_two_files(options):
        causes = ("temperature", "decoder", "prompt_file", "interactive", "json", "num_samples", "explain")
        cause, *_ = options.changed(*causes)
        refuse(
            options,
            ("generated_sentence_low_temp_out", "generated_sentence_high_temp_out"),
            f"with --{cause} the two texts, at temperature 0 and at 1, and their files are not made",
        )
    if "" in options.stop:
        raise ValueError("--stop has an empty text, which would end everything at once; leave it out")
    check_decoder(options)
    check_differ(outputs(options))


def check_decoder(options: Options) -> None:
    """Raises ValueError for settings that the decoder does not use."""
    decoder = options.decoder
    for name, owner in (("beams", "beam"), ("length_penalty", "beam"), ("contrast", "contrastive")):
        if decoder != owner:
            refuse(options, [name], f"--{name} is for --decoder {owner}")
    if decoder == "lookup":
        refuse(options, ["repetition_penalty"], "--decoder lookup has no repetition penalty")
    if options.temperature == 0 or decoder not in DRAWING:
        what = "temperature 0" if decoder in DRAWING else f"--decoder {decoder}"
        allowed = {"top_k"} if decoder == "contrastive" else set()
        allowed |= {"epsilon"} if options.epsilon == 0 else set()  # which cuts nothing
        names = [name for name in (*FILTERS, "num_samples", "epsilon") if name not in allowed]
        refuse(options, names, f"{what} draws nothing")
    if decoder not in DRAWING:
        refuse(options, ["temperature"] if options.temperature else [], f"--decoder {decoder} draws nothing")
        refuse(options, ["repetition_penalty"], f"--decoder {decoder} has no repetition penalty")


def outputs(options: Options) -> list[str]:
    if writes_two_files(options):
        return [options.generated_sentence_low_temp_out, options.generated_sentence_high_temp_out]
    return [options.explain] if options.explain else []


def run(options: Options) -> None:
    """Continues the prompt at the temperature asked for, or at 0 and at 1 into the course's two files."""
    from minillama.decoding.decoders import Decoding, Writer
    from minillama.decoding.fast_llama import fast_model

    check_stdin(options)
    texts = [] if options.interactive else prompts_of(options)
    llama, tokenizer, device, dtype = load_for_inference(options)
    context, causal = llama.config.max_seq_len, llama.config.causal
    prompts = [encode(options, tokenizer, [{"role": "user", "content": text}]) for text in texts]
    if prompts:
        warn_of_length(max(map(len, prompts)), options.max_new_tokens, context)
    if options.decoder == "lookup" and not causal:
        raise ValueError("--decoder lookup needs causal attention; leave it out, or add --attention causal")
    if not causal:
        report("notice: attention is bidirectional here: each new token changes those before it, so there is no cache")
    temperature = 1.0 if options.decoder in DRAWING else 0.0
    decoding = Decoding(
        options.decoder,
        options.max_new_tokens,
        temperature=temperature if options.temperature is None else options.temperature,
        filters=filters_of(options),
        repetition_penalty=options.repetition_penalty,
        beams=options.beams,
        length_penalty=options.length_penalty,
        k=options.top_k or 4,
        contrast=options.contrast,
        stops=options.stop,
        seed=options.seed,
        shows_prompt=not options.chat,
    )
    writer = Writer(fast_model(llama, dtype, options.quantize), tokenizer, device, decoding)
    if options.interactive:
        converse(options, writer)
    elif options.json or options.prompt_file or options.num_samples > 1:
        write_many(options, writer, texts, prompts)
    elif options.explain is not None:
        explain(options, writer, prompts[0])
    elif not writes_two_files(options):
        write_one(writer, prompts[0], show)
    else:
        write_two_files(options, writer, prompts[0])


def filters_of(options: Options) -> list[Filter]:
    """The filters asked for, --epsilon first."""
    from minillama.decoding import filters

    chosen = (
        (filters.epsilon_filter, "epsilon", options.epsilon or None),
        (filters.eta_filter, "eta", options.eta),
        (filters.top_k_filter, "k", options.top_k),
        (filters.top_p_filter, "p", options.top_p),
        (filters.min_p_filter, "p", options.min_p),
        (filters.typical_filter, "mass", options.typical_p),
    )
    return [partial(kept, **{name: value}) for kept, name, value in chosen if value is not None]


def encode(options: Options, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a conversation that waits for an answer, or, without --chat, of its last message."""
    if not options.chat:
        return tokenizer.encode_prompt(messages[-1]["content"])
    system = [{"role": "system", "content": options.system}] if options.system else []
    return tokenizer.encode_chat([*system, *messages])


def warn_of_length(prompt: int, new: int, context: int) -> None:
    """Warns if a prompt and its continuation, in tokens, do not fit into the model's context."""
    if prompt + new > context:
        report(
            f"warning: {prompt} tokens of prompt and {new} new ones exceed the model's context of {context}; it will "
            f"see only the last {context}"
        )


def write_one(
    writer: Writer,
    prompt: list[int],
    show: Callable[[str], None],
    temperature: float | None = None,
    watch: Watch | None = None,
) -> Continuation:
    """Continues a prompt and shows each piece of the text at once, the prompt's first; then reports the speed."""
    from minillama.decoding.decoders import Speed

    speed = Speed()

    def counted():
        for token in writer.ids(prompt, temperature, watch):
            speed.count()
            yield token

    try:
        return writer.continuation(prompt, counted(), show)
    finally:
        show("\n")
        report(str(speed))


def write_two_files(options: Options, writer: Writer, prompt: list[int]) -> None:
    """Writes the course's two files, at temperature 0 and at 1, with their records."""
    from minillama.formats.files import atomic_file

    origin = Origin.of(options, {})
    for temperature, path in zip((0.0, 1.0), outputs(options), strict=True):
        report(f"\ntemperature {temperature:g} -> {path}")
        writer.start_anew()
        made = write_one(writer, prompt, show, temperature)
        with writing_turn(path):
            with atomic_file(path) as file:
                file.write(made.prompt + made.text + "\n")
            warn(origin.write_record(path, temperature=temperature))


def write_many(options: Options, writer: Writer, texts: list[str], prompts: list[list[int]]) -> None:
    """Continues all prompts, --num_samples times each, in batches of --batch_size, and prints each continuation when
    its batch is done.
    """
    from tqdm import tqdm

    start_time, tokens = time.perf_counter(), 0
    texts = [text for text in texts for _ in range(options.num_samples)]
    prompts = [prompt for prompt in prompts for _ in range(options.num_samples)]
    size = options.batch_size if options.decoder == "sample" else 1
    most = len(prompts) * options.max_new_tokens
    with tqdm(total=most, desc="generating", unit="token", leave=False, disable=None) as bar:
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            if options.decoder == "sample":
                made = writer.batch(some, bar.update)
            else:
                made = [writer.continuation(prompt, writer.ids(prompt)) for prompt in some]
            tokens += sum(one.tokens for one in made)
            # The part of those that ended early.
            bar.update(max(0, min(len(prompts), start + size) * options.max_new_tokens - bar.n))
            bar.clear()
            for one, text in zip(made, texts[start:], strict=False):
                if options.json:
                    print(json.dumps(asdict(one) | {"prompt": text}, ensure_ascii=not speaks_utf8()))
                else:
                    print(one.prompt + one.text, end="\n\n")
            sys.stdout.flush()
    report(f"{tokens} tokens in {time.perf_counter() - start_time:.2f} s")


def explain(options: Options, writer: Writer, prompt: list[int]) -> None:
    """Continues a prompt, then shows what each token was chosen from."""
    from minillama.decoding.explanation import Explanation
    from minillama.formats.files import atomic_file

    how = writer.decoding
    explanation = Explanation(writer.tokenizer, prompt, how.temperature, how.filters, how.repetition_penalty)
    write_one(writer, prompt, show, watch=explanation.watch)
    if options.explain:
        with atomic_file(options.explain) as file:
            file.write(explanation.page())
        report(f"wrote {options.explain}")
    print(f"\n{explanation.table()}")


def converse(options: Options, writer: Writer) -> None:
    """Answers one prompt after the other; with --chat they are one conversation, of which the oldest is forgotten."""
    context, new = writer.model.config.max_seq_len, options.max_new_tokens
    report("Type a prompt, and Enter. Ctrl-C stops an answer, Ctrl-D ends.")
    messages: list[dict[str, str]] = []
    for line in lines_typed():
        if not line.strip():
            continue
        before = messages if options.chat else []
        pieces: list[str] = []

        def tell(piece: str, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            show(piece)

        try:
            messages = [*before, {"role": "user", "content": line}]
            prompt = encode(options, writer.tokenizer, messages)
            turns = len(messages)
            while len(prompt) + new > context and len(messages) > 2:
                messages = messages[2:]
                prompt = encode(options, writer.tokenizer, messages)
            if len(messages) < turns:
                report("the oldest turns no longer fit into the model's context and are left out")
            warn_of_length(len(prompt), new, context)
            write_one(writer, prompt, tell)
        except KeyboardInterrupt:
            report("stopped")
        except ValueError as error:  # the line cannot be a prompt
            report(str(error))
            messages = before
            continue
        messages.append({"role": "assistant", "content": "".join(pieces).strip()})


COMMAND = Command(
    "generate",
    "continue a prompt",
    (TEXT, DECODING, flags.MODEL, flags.DEVICE),
    run,
    """
python run_llama.py --prompt "Once upon a time" --temperature 0.8
python run_llama.py --prompt "Once upon a time" --temperature 0.9 --top_p 0.9 --explain page.html
python run_llama.py --prompt "Lily went to the park" --num_samples 3 --json
""",
    resolve=resolve,
    check=check,
    outputs=outputs,
    only_prints=lambda options: not outputs(options),
)
