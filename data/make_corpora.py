"""Writes the bundled model's training texts, from the public collections in its model card.

  python data/make_corpora.py --source DIR --into runs/corpora

DIR has the folders corpora/ (tinystories.txt, tinystories_recased.txt, books/, prose/) and reviews/
(movie_reviews_2000.tsv, pros_cons.tsv). Files written, with <|endoftext|> after each document:

  stories.txt           TinyStories without the last 980, and the recased ones
  stories-held-out.txt  the last 980 of tinystories.txt
  books.txt, prose.txt  unchanged
  reviews.txt           film reviews, each ending in its verdict ("This movie is good."); folds 0 to 8 of 10
  reviews-held-out.txt  fold 9, unchanged
  films.txt             the same reviews twice: unchanged; and as people write, each with a verdict
  own.txt               own_reviews.txt (it ships) twice: as written, some with a verdict; and tokenized in lower case
  opinions.txt          parts of the same reviews, a few sentences long, and product opinions, each with a verdict; in
                        two of three cases the question of `--option prompt` comes before the verdict; half of the
                        parts as people write, with capitals and no space before a comma
  review_sentences.txt  `label ||| sentence` from the same reviews, for the demo data: short sentences with a word that
                        says the class, and no "not" or "but"

They contain no sentence of SST or CFIMDB. rt-polarity and the "subjectivity" set are not used, because most of their
sentences are in SST.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from make_demo_data import sentences  # noqa: E402

from minillama.cli.parser import OneLineParser  # noqa: E402
from minillama.formats.files import atomic_file  # noqa: E402
from minillama.text.batches import prompt_question  # noqa: E402
from minillama.text.documents import DOCUMENT_END, read_documents  # noqa: E402

HELD_OUT_STORIES = 980
HELD_OUT_FOLD = "cv9"
OWN_REVIEWS = "own_reviews.txt"  # beside this script
WORDS = (("bad", "awful"), ("good", "excellent"))  # for label 0 and label 1
CLASSES = ("awful", "bad", "average", "good", "excellent")  # of an own review
QUESTIONS = (
    prompt_question(["bad", "good"]),
    prompt_question(CLASSES),
    " This movie is ",
)


# Words that say the class of a short sentence, if its review has the same opinion; none says "average".
CLASS_WORDS = {
    0: "awful|terrible|horrible|horrid|atrocious|dreadful|unbearable|worst|abysmal|garbage|pathetic|insulting|disaster",
    1: "weak|dull|boring|tedious|disappointing|flat|bland|poor|poorly|lame|lifeless|uninspired|clumsy|forgettable",
    3: "good|enjoyable|entertaining|charming|likable|fun|solid|clever|pleasant|engaging|amusing|nice|well-made",
    4: "excellent|brilliant|masterpiece|superb|wonderful|magnificent|perfect|best|outstanding|fantastic|amazing",
}
ABOUT = "film|movie|picture|acting|actor|cast|script|performance|plot|story|dialogue|ending|director|scene|it"
TURNS = "not|never|no|nothing|none|nor|but|however|though|although|despite|could|would|should|might|if|than|too|almost"
SENTENCES_EACH = 90  # of a class, at most


def verdict(label: int, draw: random.Random) -> str:
    """The end of a document: a question or the words " This movie is ", and the answer."""
    return f"{draw.choice(QUESTIONS)}{draw.choice(WORDS[label])}."


def pieces(text: str, draw: random.Random) -> Iterator[str]:
    """Pieces of a review, one to three sentences each; pieces under six words are left out."""
    sentences = text.replace(" . ", " .\n").split("\n")
    while sentences:
        count = draw.randint(1, 3)
        piece = " ".join(sentences[:count]).strip()
        sentences = sentences[count:]
        if len(piece.split()) >= 6:
            yield piece


def as_written(text: str) -> str:
    """A tokenized lower-case text as people write it: no space before punctuation, capitals, "I"."""
    text = re.sub(r" ([.,;:!?)]|'(?:s|m|d|ll|re|ve)\b|n't\b)", r"\1", text).replace("( ", "(")
    text = re.sub(r"\bi\b", "I", text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda start: start[1] + start[2].upper(), text)


def tokenized(text: str) -> str:
    """A text in lower case with a space on both sides of punctuation, as in the collection of film reviews."""
    return " ".join(re.sub(r'([.,;:!?()"])', r" \1 ", text.lower()).split())


def own_reviews(draw: random.Random) -> Iterator[str]:
    """Each of the project's own reviews, as written and tokenized; of films, one in six as written has a verdict."""
    for label, text in sentences(OWN_REVIEWS):
        asks = draw.random() < 1 / 6 and re.search(r"\b(?:film|movie)s?\b", text) is not None
        question = draw.choice(QUESTIONS[1:])  # those that allow all classes
        yield text + f"{question}{CLASSES[label]}." * asks
        yield tokenized(text)


def review_sentences(films: list[tuple[int, str]], draw: random.Random) -> Iterator[tuple[int, str]]:
    """SENTENCES_EACH sentences for each class of CLASS_WORDS, of 4 to 15 words, from reviews of the same opinion."""
    for label, words in CLASS_WORDS.items():
        says, about, turns = (re.compile(rf"\b(?:{found})\b") for found in (words, ABOUT, TURNS))
        found = {
            as_written(sentence)
            for positive, text in films
            if positive == (label > 2)
            for sentence in re.findall(r"[^.!?]+ [.!]", text)
            for sentence in [sentence.strip()]
            if 4 <= len(sentence.split()) <= 15 and re.fullmatch(r"[a-z][a-z ,'!.-]+", sentence)
            if says.search(sentence) and about.search(sentence) and not turns.search(sentence) and "n't" not in sentence
        }
        yield from ((label, sentence) for sentence in draw.sample(sorted(found), min(len(found), SENTENCES_EACH)))


def write(path: Path, documents: Iterable[str]) -> None:
    """Writes documents, each followed by DOCUMENT_END, and prints their number."""
    count = 0
    with atomic_file(path) as file:
        for document in documents:
            file.write(f"{document}\n{DOCUMENT_END}\n")
            count += 1
    print(f"{path}: {count:,} documents, {path.stat().st_size:,} bytes", file=sys.stderr)


def table(path: Path) -> list[list[str]]:
    """The cells of a tab-separated file."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def make(source: Path, into: Path, seed: int = 0) -> None:
    """Writes every text into the folder `into`."""
    into.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    corpora, reviews = source / "corpora", source / "reviews"
    stories = list(read_documents(corpora / "tinystories.txt"))
    write(into / "stories-held-out.txt", stories[-HELD_OUT_STORIES:])
    write(into / "stories.txt", [*stories[:-HELD_OUT_STORIES], *read_documents(corpora / "tinystories_recased.txt")])
    for name in ("books", "prose"):
        files = sorted((corpora / name).glob("*.txt"))
        write(into / f"{name}.txt", (document for file in files for document in read_documents(file)))

    films = [(int(label), fold, text) for label, fold, text in table(reviews / "movie_reviews_2000.tsv")]
    write(into / "reviews-held-out.txt", (text for _, fold, text in films if fold.startswith(HELD_OUT_FOLD)))
    learnt = [(label, text) for label, fold, text in films if not fold.startswith(HELD_OUT_FOLD)]
    draw.shuffle(learnt)
    write(into / "reviews.txt", (f"{text} This movie is {draw.choice(WORDS[label])}." for label, text in learnt))
    opinions = [
        f"{as_written(piece) if draw.random() < 0.5 else piece}{verdict(label, draw)}"
        for label, text in learnt
        for piece in pieces(text, draw)
    ]
    opinions += [
        f"{text} This is {draw.choice(WORDS[int(label)])}." for label, text in table(reviews / "pros_cons.tsv")
    ]
    draw.shuffle(opinions)
    write(into / "opinions.txt", opinions)
    later = random.Random(seed + 1)  # a draw of its own: the texts below stay the same without this one
    twice = [text for _, text in learnt] + [as_written(text) + verdict(label, later) for label, text in learnt]
    later.shuffle(twice)
    write(into / "films.txt", twice)
    own = random.Random(seed + 2)
    reviews_of_ours = list(own_reviews(own))
    own.shuffle(reviews_of_ours)
    write(into / "own.txt", reviews_of_ours)
    with atomic_file(into / "review_sentences.txt") as file:
        file.writelines(f"{label} ||| {sentence}\n" for label, sentence in review_sentences(learnt, draw))


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 if a file is missing or unusable."""
    parser = OneLineParser(prog="make_corpora.py", description=__doc__)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="where the collections are")
    parser.add_argument("--into", type=Path, default=Path("runs/corpora"), metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        make(args.source, args.into)
    except (ValueError, OSError) as error:
        print(f"make_corpora.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
