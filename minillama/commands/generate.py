"""--option generate: continues prompts one by one, in batches, or in a conversation."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from minillama.cli import flags
from minillama.cli.bundled import use_bundled_model
from minillama.cli.checks import check_differ, check_prompts, refuse
from minillama.cli.console import HOW_TO_END, check_stdin, read_prompts, show, stdout_is_utf8, typed_lines
from minillama.cli.header import report, warn
from minillama.cli.loading import load_for_inference
from minillama.cli.options import Command, Flag, Group, Options, OwnFlag
from minillama.cli.parser import COUNT, FRACTION, NOT_NEGATIVE, number
from minillama.cli.provenance import Origin, lock_predictions
from minillama.cli.xray import XRAY, check_xray, page_of_tokens, read_other, write_xray

if TYPE_CHECKING:
    from llama import Llama
    from minillama.decoding.decoders import Continuation, Watch, Writer
    from tokenizer import Tokenizer

FILTERS = ("eta", "top_k", "top_p", "min_p", "typical_p")  # besides epsilon, the course's filter
DRAWING = ("sample", "lookup")  # decoders that sample
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
            "treat the prompt as a user message and print only the reply; the chat format is that of Llama 2 "
            "or Llama 3, by the tokenizer's kind",
            bool,
        ),
        Flag("--system TEXT", "with --chat: instructions for the model"),
        flags.MAX_NEW_TOKENS,
        OwnFlag("--stop TEXT", "stop before any of these texts", str, [], nargs="+"),
        OwnFlag("--num_samples N", "number of continuations per prompt", COUNT, 1),
        flags.BATCH_SIZE,
        flags.JSON,
        OwnFlag(
            "--explain",
            "print which candidates the filters kept and removed for each token; --xray shows them on a page",
            bool,
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
            "0: the most likely token; 1: sample from the model's distribution. Prints one text and writes no file",
            NOT_NEGATIVE,
            default_text="one text at 0 and one at 1, each written to a file; 1 if another flag excludes that",
        ),
        Flag(
            "--epsilon E",
            "sample only tokens with at least this probability",
            FRACTION,
            0.05,
            default_text="0.05; 0 with another filter",
        ),
        OwnFlag("--eta E", "like --epsilon, but with a lower threshold if many tokens are likely; try 0.002", FRACTION),
        OwnFlag("--top_k K", "sample only the K most likely tokens (contrastive: 4)", COUNT),
        OwnFlag("--top_p P", "sample only the most likely tokens that together reach probability P", SHARE),
        OwnFlag("--min_p P", "sample only tokens at least P times as likely as the most likely one", SHARE),
        OwnFlag(
            "--typical_p P",
            "sample only tokens whose surprise is nearest to the entropy and that together reach probability P",
            SHARE,
        ),
        OwnFlag(
            "--repetition_penalty R",
            "above 1, tokens that occurred before become less likely, below 1 more likely; 0.01 to 100",
            PENALTY,
            1.0,
        ),
        OwnFlag(
            "--decoder",
            "sample: draw token by token; beam: search the most likely whole text; contrastive: take likely tokens "
            "that differ from the text so far; lookup: draw like sample, but guess tokens from the text so far and "
            "check them together, which is faster if the text repeats itself",
            ("sample", "beam", "contrastive", "lookup"),
            "sample",
        ),
        OwnFlag("--beams N", "beam: number of texts kept at each step", COUNT, 4),
        OwnFlag("--length_penalty L", "beam: above 0 prefers longer texts, below 0 shorter ones", LENGTH_PENALTY, 1.0),
        OwnFlag("--contrast A", "contrastive: weight of dissimilarity, from 0 to 1", SHARE_OR_ZERO, 0.6),
    ),
)


# The options


def writes_two_files(options: Options) -> bool:
    """Whether generate writes the two files of the course, one at temperature 0 and one at 1."""
    other = (
        options.prompt_file,
        options.interactive,
        options.json,
        options.num_samples > 1,
        options.explain,
        options.xray,
    )
    return options.temperature is None and options.decoder == "sample" and not any(other)


def resolve(options: Options) -> Options:
    """Uses the bundled model if needed, and turns epsilon off if another filter is typed."""
    options = use_bundled_model(options)
    if "epsilon" not in options.typed and set(FILTERS) & set(options.typed):
        return options.replace(epsilon=0.0)
    return options


def check(options: Options) -> None:
    """Raises ValueError for options that contradict each other or have no effect."""
    if options.system is not None and not options.chat:
        raise ValueError("--system needs a chat; add --chat")
    check_prompts(options, "json", "explain", "num_samples")
    if options.explain:
        refuse(options, ("json", "prompt_file", "num_samples", "decoder"), "--explain shows the sampling of one text")
    check_xray(options)
    if not writes_two_files(options):
        causes = ("temperature", "decoder", "prompt_file", "interactive", "json", "num_samples", "explain", "xray")
        cause, *_ = options.changed(*causes)
        refuse(
            options,
            ("generated_sentence_low_temp_out", "generated_sentence_high_temp_out"),
            f"with --{cause}, generate does not write the two files at temperature 0 and 1",
        )
    if "" in options.stop:
        raise ValueError("--stop has an empty text, which would stop at once; leave it out")
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
        allowed |= {"epsilon"} if options.epsilon == 0 else set()  # has no effect
        names = [name for name in (*FILTERS, "num_samples", "epsilon") if name not in allowed]
        refuse(options, names, f"{what} does not sample")
    if decoder not in DRAWING:
        refuse(options, ["temperature"] if options.temperature else [], f"--decoder {decoder} does not sample")
        refuse(options, ["repetition_penalty"], f"--decoder {decoder} has no repetition penalty")


def outputs(options: Options) -> list[str]:
    if writes_two_files(options):
        return [options.generated_sentence_low_temp_out, options.generated_sentence_high_temp_out]
    return [options.xray] if options.xray else []


def run(options: Options) -> None:
    """Continues the prompts, at --temperature or at 0 and 1 into the two files of the course."""
    from minillama.decoding.decoders import Decoding, Writer
    from minillama.decoding.fast_llama import fast_model
    from minillama.decoding.filters import filters_by_name

    check_stdin(options)
    texts = [] if options.interactive else read_prompts(options)
    llama, tokenizer, device, dtype = load_for_inference(options)
    context, causal = llama.config.max_seq_len, llama.config.causal
    prompts = [encode(options, tokenizer, [{"role": "user", "content": text}]) for text in texts]
    if prompts:
        warn_of_length(max(map(len, prompts)), options.max_new_tokens, context)
    if options.decoder == "lookup" and not causal:
        raise ValueError("--decoder lookup needs causal attention; leave it out, or add --attention causal")
    if not causal:
        report("notice: attention is bidirectional: each new token changes earlier states, so there is no cache")
    temperature = 1.0 if options.decoder in DRAWING else 0.0
    decoding = Decoding(
        options.decoder,
        options.max_new_tokens,
        temperature=temperature if options.temperature is None else options.temperature,
        filters=filters_by_name(**{name: getattr(options, name) for name in ("epsilon", *FILTERS)}),
        repetition_penalty=options.repetition_penalty,
        beams=options.beams,
        length_penalty=options.length_penalty,
        k=options.top_k or 4,
        contrast=options.contrast,
        stops=options.stop,
        seed=options.seed,
        shows_prompt=not options.chat,
    )
    rows = {"beam": decoding.beams, "contrastive": decoding.k, "lookup": 1}.get(
        options.decoder, max(1, min(options.batch_size, len(prompts) * options.num_samples))
    )
    # The X-ray is of the plain model, which `fast_model` takes apart.
    model = llama if options.xray else fast_model(llama, dtype, options.quantize, rows, tell=report)
    writer = Writer(model, tokenizer, device, decoding)
    if options.interactive:
        converse(options, writer)
    elif options.json or options.prompt_file or options.num_samples > 1:
        write_many(options, writer, texts, prompts)
    elif options.explain or options.xray:
        explain(options, writer, llama, prompts[0])
    elif not writes_two_files(options):
        write_one(writer, prompts[0], show)
    else:
        write_two_files(options, writer, prompts[0])


def encode(options: Options, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The token ids of a conversation with --chat, else of its last message alone."""
    if not options.chat:
        return tokenizer.encode_prompt(messages[-1]["content"])
    system = [{"role": "system", "content": options.system}] if options.system else []
    return tokenizer.encode_chat([*system, *messages])


def warn_of_length(prompt: int, new: int, context: int) -> None:
    """Warns if the tokens of a prompt and its continuation do not fit into the model's context."""
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
    keep: Callable[[int], object] = lambda token: None,
) -> Continuation:
    """Continues a prompt, shows the prompt and each new piece of text at once, and reports the speed.

    watch: as in `sampling.stream`. keep: called with each new token.
    """
    from minillama.decoding.decoders import Speed

    speed = Speed()

    def counted():
        for token in writer.ids(prompt, temperature, watch):
            speed.count()
            keep(token)
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
        writer.reset_generator()
        made = write_one(writer, prompt, show, temperature)
        with lock_predictions(path):
            with atomic_file(path) as file:
                file.write(made.prompt + made.text + "\n")
            warn(origin.write_record(path, temperature=temperature))


def write_many(options: Options, writer: Writer, texts: list[str], prompts: list[list[int]]) -> None:
    """Continues each prompt --num_samples times, in batches of --batch_size. Prints the continuations after each
    batch.
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
            # Advance past the tokens of continuations that ended early.
            bar.update(max(0, min(len(prompts), start + size) * options.max_new_tokens - bar.n))
            bar.clear()
            for one, text in zip(made, texts[start:], strict=False):
                if options.json:
                    print(json.dumps(asdict(one) | {"prompt": text}, ensure_ascii=not stdout_is_utf8()))
                else:
                    print(one.prompt + one.text, end="\n\n")
            sys.stdout.flush()
    report(f"{tokens} tokens in {time.perf_counter() - start_time:.2f} s")


def explain(options: Options, writer: Writer, llama: Llama, prompt: list[int]) -> None:
    """Continues a prompt, then shows the candidates of each token, or writes the X-ray page, or both."""
    from minillama.cli.xray_page import check_length
    from minillama.decoding.explanation import Explanation

    how = writer.decoding
    other = None
    if options.xray:  # what cannot be shown is refused before a token is written
        check_length(len(prompt))
        other = read_other(options, llama.config, writer.tokenizer)
    explanation = Explanation(writer.tokenizer, prompt, how.temperature, how.filters)
    tokens = list(prompt)
    write_one(writer, prompt, show, watch=explanation.watch if options.explain else None, keep=tokens.append)
    if options.xray:
        settings = {name: getattr(options, name) for name in ("epsilon", *FILTERS)} | {"temperature": how.temperature}
        settings["repetition_penalty"] = options.repetition_penalty
        path, given = options.pretrained_model_path, len(prompt)
        write_xray(options, page_of_tokens(path, llama, writer.tokenizer, tokens, given, settings, other))
    if options.explain:
        print(f"\n{explanation.table()}")


def converse(options: Options, writer: Writer) -> None:
    """Answers prompts one by one. With --chat they form one conversation, which drops its oldest turns if too long."""
    context, new = writer.model.config.max_seq_len, options.max_new_tokens
    report(f"Type a prompt and press Enter. Ctrl-C stops an answer; {HOW_TO_END}.")
    messages: list[dict[str, str]] = []
    for line in typed_lines():
        if not line.strip():
            continue
        before = messages if options.chat else []
        pieces: list[str] = []

        def show_and_keep(piece: str, pieces: list[str] = pieces) -> None:
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
                report("the oldest turns do not fit into the model's context and are dropped")
            warn_of_length(len(prompt), new, context)
            write_one(writer, prompt, show_and_keep)
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
    (TEXT, DECODING, XRAY, flags.MODEL, flags.DEVICE),
    run,
    """
python run_llama.py --prompt "Once upon a time" --temperature 0.8
python run_llama.py --prompt "Once upon a time" --temperature 0.9 --top_p 0.9 --xray page.html
python run_llama.py --prompt "Lily went to the park" --num_samples 3 --json
""",
    resolve=resolve,
    check=check,
    outputs=outputs,
    only_prints=lambda options: not outputs(options),
)
