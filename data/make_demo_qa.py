"""Writes the demo questions: short stories about two children, each with questions that the story answers.

An answer cannot be guessed without the story, because it is equally likely in other stories. A story has only one thing
that a child had, saw or ate, so a question about the child has one answer. All wording is the project's own and in the
public domain.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minillama.cli.parser import OneLineParser, into_and_seed  # noqa: E402

Rows = dict[str, list[dict[str, str]]]  # {"prompt": ..., "answer": ...} by split

STORIES = {"train": 850, "dev": 75, "test": 75}
QUESTIONS = 2  # of each story

# Fillers, separated by "/". Those after "//" are not in the training set.
FILLERS = {
    "girl": "Lily / Mia / Anna / Lucy / Sara / Emma / Molly / Sue / Amy / Kitty // Daisy",
    "boy": "Tom / Ben / Tim / Max / Sam / Jack / Leo / Bob / Jim / Joe // Peter",
    "toy": "ball / kite / car / doll / hat / boat / balloon / book / truck / drum / cup / bike // train / robot",
    "colour": "red / blue / green / yellow / pink / purple / white / black",
    "place": "the park / the beach / the zoo / the garden / the farm / the forest / the lake / the shop",
    "spot": "under the bed / behind a tree / in a box / on a chair / near the door / in the grass / on the roof / "
    "in the mud",
    "feeling": "happy / sad / scared / angry / proud / tired / excited / sick",
    "animal": "dog / cat / bird / frog / rabbit / duck / bear / mouse / fox / hen // owl",
    "food": "an apple / a cookie / some cake / some soup / some bread / a banana / a carrot / some cheese",
}

# Events in the order of a story, which has some of them. X is one of the two children. Each line describes the event;
# lines with "?" are a question and its answer.
EVENTS = [
    """
    {X} had a {colour} {toy}.
    {X} got a {colour} {toy} from {his} mom.
    {X} had a {toy}. It was {colour}.
    ? What colour was the {toy}? {colour}
    ? What did {X} have? a {colour} {toy}
    ? Who had a {toy}? {X}
    """,
    """
    One day {X} went to {place}.
    {X} ran to {place} in the morning.
    {X} wanted to play and went to {place}.
    ? Where did {X} go? {place}
    ? Who went to {place}? {X}
    """,
    """
    {X} left the {toy} {spot}.
    {X} hid the {toy} {spot}.
    {X} put the {toy} {spot} and forgot it.
    ? Where was the {toy}? {spot}
    """,
    """
    {X} saw a {animal}.
    {X} saw a {animal} and ran after it.
    "Look, a {animal}!" said {X}.
    ? What did {X} see? a {animal}
    ? Who saw a {animal}? {X}
    """,
    """
    Then {X} ate {food}.
    For lunch {X} had {food}.
    {X} wanted {food} and ate it all up.
    ? What did {X} eat? {food}
    ? Who ate {food}? {X}
    """,
    """
    {X} felt very {feeling}.
    At the end of the day {X} was {feeling}.
    "I am so {feeling}," said {X}.
    ? How did {X} feel? {feeling}
    ? Who was {feeling}? {X}
    """,
]
EVENTS_OF_A_STORY = 3


def items(text: str, held_out: bool) -> list[str]:
    """The fillers of a list, with or without the held-out ones."""
    return [item.strip() for item in (text.replace("//", "/") if held_out else text.split("//")[0]).split("/")]


def make_story(draw: random.Random, held_out: bool) -> tuple[str, list[tuple[str, str]]]:
    """A story of two children, and all questions on it with their answers."""
    fillers = {kind: items(text, held_out) for kind, text in FILLERS.items()}
    her = dict.fromkeys(fillers.pop("girl"), "her") | dict.fromkeys(fillers.pop("boy"), "his")
    children = draw.sample(list(her), 2)
    acting = [*children, *draw.choices(children, k=EVENTS_OF_A_STORY - 2)]
    draw.shuffle(acting)
    chosen = {kind: draw.choice(found) for kind, found in fillers.items()}
    story, asked = [], []
    for event, child in zip(sorted(draw.sample(range(len(EVENTS)), EVENTS_OF_A_STORY)), acting, strict=True):
        slots = chosen | {"X": child, "his": her[child]}
        lines = [line.strip() for line in EVENTS[event].strip().split("\n")]
        story.append(filled(draw.choice([line for line in lines if line[0] != "?"]), slots))
        for line in lines:
            if line[0] == "?":
                question, mark, answer = filled(line.removeprefix("? "), slots).partition("? ")
                asked.append((question + mark.strip(), answer))
    text = " ".join(story)
    return text, [(question, answer) for question, answer in asked if answer in text]


def filled(template: str, slots: dict[str, str]) -> str:
    """The template with its fillers, and "an" for "a" before vowels."""
    return re.sub(r"\b([Aa])(?= [aeiou])", r"\1n", template.format_map(slots))


def make_rows(seed: int = 0) -> Rows:
    """The rows by split. No story is in two splits."""
    draw = random.Random(seed)
    rows: Rows = {}
    stories: set[str] = set()
    for split, size in STORIES.items():
        rows[split] = []
        for _ in range(size):
            story, asked = make_story(draw, held_out=split != "train")
            while story in stories:
                story, asked = make_story(draw, held_out=split != "train")
            stories.add(story)
            for question, answer in draw.sample(asked, QUESTIONS):
                rows[split].append({"prompt": f"{story} {question}", "answer": answer})
    return rows


def write_files(folder: Path, rows: Rows) -> None:
    """Writes demo-qa-train.jsonl, demo-qa-dev.jsonl and demo-qa-test.jsonl into `folder`, each atomically."""
    from minillama.formats.files import atomic_file  # imports torch: not for --help

    for split, found in rows.items():
        with atomic_file(folder / f"demo-qa-{split}.jsonl") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)


def question_of(prompt: str) -> str:
    """The question of a prompt, without its story."""
    return re.split(r"[.?!\"] (?=[A-Z])", prompt)[-1]


def baselines(rows: Rows, split: str) -> dict[str, float]:
    """Shares of exact matches without the story, of two baselines.

    These are the most frequent answer to questions with the same first two words, and the most similar one's answer.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second or two: not for --help
    from sklearn.metrics import accuracy_score

    asked = {name: [question_of(row["prompt"]) for row in rows[name]] for name in ("train", split)}
    gold = {name: [row["answer"] for row in rows[name]] for name in ("train", split)}
    frequent: dict[tuple[str, ...], Counter[str]] = {}
    for question, answer in zip(asked["train"], gold["train"], strict=True):
        frequent.setdefault(tuple(question.split()[:2]), Counter())[answer] += 1
    by_kind = [frequent[tuple(question.split()[:2])].most_common(1)[0][0] for question in asked[split]]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2)).fit(asked["train"])
    alike = vectorizer.transform(asked[split]) @ vectorizer.transform(asked["train"]).T  # cosines
    nearest = [gold["train"][i] for i in alike.toarray().argmax(-1)]
    return {
        "the most frequent answer to such questions": accuracy_score(gold[split], by_kind),
        "the answer to the most similar question": accuracy_score(gold[split], nearest),
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    about = """Writes the demo questions: short stories about two children, each with questions that the story answers.
Then prints the share of right answers of baselines that do not read the story."""
    parser = OneLineParser(prog="make_demo_qa.py", description=about)
    options = into_and_seed(parser, arguments, Path(__file__).resolve().parent)
    rows = make_rows(options.seed)
    try:
        write_files(options.into, rows)
    except OSError as error:
        parser.error(f"--into {options.into}: {error.strerror or error}")
    print(f"{options.into}: " + ", ".join(f"demo-qa-{split}.jsonl with {len(rows[split])} rows" for split in rows))
    for split in ("dev", "test"):
        shares = ", ".join(f"{name} {share:.3f}" for name, share in baselines(rows, split).items())
        print(f"exact match on {split}: {shares}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
