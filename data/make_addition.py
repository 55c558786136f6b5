"""Writes sums of two numbers for `--option sft`, and a tokenizer of their characters.

  addition-{train,dev,test}.jsonl  {"prompt": "417+2950=", "answer": "3367"}
  addition.model                   a SentencePiece model: ten digits, "+", "=", beside <unk>, <s> and </s>

A pair of numbers is in one split only, in whatever order: no sum of dev or test, and none with its numbers exchanged,
is in train. Numbers have 1 to --digits digits, and each count of digits is as frequent as the others.
"""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minillama.cli.parser import COUNT, OneLineParser, into_and_seed  # noqa: E402

CHARACTERS = "0123456789+="
HELD_OUT = 1000  # sums in dev, and in test
Pair = tuple[int, int]


def draw_pairs(count: int, digits: int, seed: int) -> list[Pair]:
    """Pairs of numbers, no two of which have the same numbers."""
    draw = random.Random(seed)

    def number() -> int:
        size = draw.randint(1, digits)
        return draw.randrange(10 ** (size - 1) if size > 1 else 0, 10**size)

    found: dict[Pair, Pair] = {}
    while len(found) < count:
        a, b = number(), number()
        found.setdefault((min(a, b), max(a, b)), (a, b))
    return list(found.values())


def example(a: int, b: int, digits: int, pad: bool, reverse: bool) -> dict[str, str]:
    """A sum as prompt and answer. pad: zeros before short numbers. reverse: the answer's last digit comes first."""
    width = digits if pad else 1
    answer = f"{a + b:0{width + pad}d}"
    return {"prompt": f"{a:0{width}d}+{b:0{width}d}=", "answer": answer[::-1] if reverse else answer}


def write_tokenizer(path: Path) -> None:
    """A SentencePiece model with one piece for each character."""
    import sentencepiece

    from minillama.formats.files import atomic_file

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CHARACTERS]),
        model_writer=model,
        model_type="char",
        vocab_size=3 + len(CHARACTERS),
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=3,
    )
    with atomic_file(path, "wb") as file:
        file.write(model.getvalue())


def write_files(folder: Path, pairs: list[Pair], digits: int, pad: bool, reverse: bool) -> dict[str, int]:
    """Writes the three splits and the tokenizer; returns the number of rows of each split."""
    from minillama.formats.files import atomic_file

    splits = {"dev": pairs[:HELD_OUT], "test": pairs[HELD_OUT : 2 * HELD_OUT], "train": pairs[2 * HELD_OUT :]}
    for split, found in splits.items():
        with atomic_file(folder / f"addition-{split}.jsonl") as file:
            file.writelines(json.dumps(example(*pair, digits, pad, reverse)) + "\n" for pair in found)
    write_tokenizer(folder / "addition.model")
    return {split: len(found) for split, found in splits.items()}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = OneLineParser(prog="make_addition.py", description=__doc__)
    parser.add_argument("--digits", type=COUNT, default=4, metavar="N", help="of the numbers (default: %(default)s)")
    parser.add_argument("--rows", type=COUNT, default=100_000, metavar="N", help="of train (default: %(default)s)")
    parser.add_argument("--pad", action="store_true", help="write zeros before short numbers")
    parser.add_argument("--reverse", action="store_true", help="write the last digit of the answer first")
    options = into_and_seed(parser, arguments, Path())
    largest = 10**options.digits * (10**options.digits + 1) // 2  # unordered pairs
    if options.rows > largest // 2:
        parser.error(f"--rows {options.rows}: numbers of {options.digits} digits allow at most {largest // 2}")
    pairs = draw_pairs(options.rows + 2 * HELD_OUT, options.digits, options.seed)
    try:
        rows = write_files(options.into, pairs, options.digits, options.pad, options.reverse)
    except OSError as error:
        parser.error(f"--into {options.into}: {error.strerror or error}")
    named = ", ".join(f"addition-{split}.jsonl ({count:,} rows)" for split, count in rows.items())
    print(f"wrote {named} and addition.model, in {options.into.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
