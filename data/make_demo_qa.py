"""Writes the demo questions: short stories about two children, each with questions that the story answers.

Whatever is asked for, the story tells of both children: two names, two toys of two colours, two feelings. So the
answer is neither the most frequent one nor the only one of its kind, and who reads only the question does not know it.
All wording is the project's own and in the public domain.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line import OneLineParser  # noqa: E402

Rows = dict[str, list[dict[str, str]]]  # {"prompt": ..., "answer": ...} by split

STORIES = {"train": 680, "dev": 75, "test": 75}
QUESTIONS = 2  # of each story

# Fillers, parted by "/". What follows "//" is kept out of the training set.
FILLERS = {
    "girl": "Lily / Mia / Anna / Lucy / Sara / Emma / Molly / Sue / Amy / Kitty / Rosie / Bella / Lola / Nina / Ruby / "
    "Tina // Jane / Daisy / Ella",
    "boy": "Tom / Ben / Tim / Max / Sam / Jack / Leo / Bob / Jim / Joe / Dan / Nick / Mark / Jake / Alex / Josh // "
    "Peter / Fred / Billy",
    "toy": "ball / kite / car / doll / hat / boat / balloon / book / truck / drum / cup / bike / bag / bell / coat / "
    "shirt / ring / flag / pen / block / rope / dress / ribbon / spoon / lamp // train / robot / plane",
    "colour": "red / blue / green / yellow / pink / purple / orange / white / black / silver // brown / gold",
    "place": "the park / the beach / the zoo / the garden / the farm / the forest / the lake / the shop / the hill / "
    "school / the pond / the market / the playground / the castle / the village // the river / the library",
    "spot": "under the bed / behind a tree / in a box / on a chair / under a big rock / near the door / in the grass / "
    "behind the house / on the roof / in the mud / under the table / on the bed / in the kitchen / near the window "
    "// under a bush / in a basket / on a shelf",
    "feeling": "happy / sad / scared / angry / proud / tired / excited / surprised / sleepy / hungry / worried / "
    "sick / cold / shy / bored // lonely / brave",
    "animal": "dog / cat / bird / frog / rabbit / duck / bear / mouse / fox / hen / pig / cow / sheep / turtle / "
    "lion / monkey / bee / snake / goat / puppy // horse / squirrel / owl",
    "food": "an apple / a cookie / some cake / soup / some bread / a banana / ice cream / a carrot / some cheese / "
    "a pie / pizza / a sandwich / an egg / some honey / candy // a pear / some rice",
}

# What happens, in this order, though only some of it in a story. X and Y are the two children in either order; each
# line is a way to tell it. A question and its answer follow "?"; what stands in brackets, the story must have told.
EVENTS = [
    """
    {X} had a {colour_X} {toy_X}. {Y} had a {colour_Y} {toy_Y}.
    {X} had a {toy_X}, and {Y} had a {toy_Y}. The {toy_X} was {colour_X}. The {toy_Y} was {colour_Y}.
    {X}'s {toy_X} was {colour_X}. {Y}'s {toy_Y} was {colour_Y}.
    ? What colour was the {toy_X}? The {toy_X} was [{colour_X}].
    ? What did {X} have? {X} had [a {colour_X} {toy_X}].
    ? Who had the {colour_X} {toy_X}? [{X}].
    """,
    """
    One day {X} went to {place_X}, and {Y} went to {place_Y}.
    {X} went to {place_X} with {his_X} mom. {Y} wanted to go to {place_Y} and ran there.
    In the morning {X} was at {place_X}, but {Y} was at {place_Y}.
    ? Where did {X} go? {X} went to [{place_X}].
    ? Where was {X}? {X} was at [{place_X}].
    ? Who went to {place_X}? [{X}].
    """,
    """
    {X} lost the {toy_X}, but {Y} found it {spot_X}.
    {X} left the {toy_X} {spot_X}, and {Y} left the {toy_Y} {spot_Y}.
    The {toy_X} was {spot_X}, and the {toy_Y} was {spot_Y}.
    ? Where was the {toy_X}? The {toy_X} was [{spot_X}].
    """,
    """
    {X} saw a {animal_X} there. {Y} saw a {animal_Y}.
    {X} saw a {animal_X} and wanted to play. {Y} ran after a {animal_Y}.
    "Look, a {animal_X}!" said {X}. "I see a {animal_Y}," said {Y}.
    ? What did {X} see? {X} saw [a {animal_X}].
    ? Who saw a {animal_X}? [{X}].
    """,
    """
    Then {X} ate {food_X}, and {Y} ate {food_Y}.
    For lunch {X} had {food_X}. {Y} wanted {food_Y} and ate it all up.
    ? What did {X} eat? {X} ate [{food_X}].
    ? Who ate {food_X}? [{X}].
    """,
    """
    {X} felt {feeling_X}, but {Y} felt {feeling_Y}.
    At the end of the day {X} was {feeling_X}. {Y} was {feeling_Y}.
    {X} went home and was very {feeling_X}, and {Y} was so {feeling_Y}.
    ? How did {X} feel? {X} felt [{feeling_X}].
    ? Who was {feeling_X}? [{X}].
    """,
]
EVENTS_OF_A_STORY = 2


def items(text: str, held_out: bool) -> list[str]:
    """The fillers of a list; without the held-out ones, those that the training set may hold."""
    return [item.strip() for item in (text.replace("//", "/") if held_out else text.split("//")[0]).split("/")]


def make_story(draw: random.Random, held_out: bool) -> tuple[str, list[tuple[str, str]]]:
    """A story and all questions on it, with their answers."""
    fillers = {kind: items(text, held_out) for kind, text in FILLERS.items()}
    children = [(name, kind) for kind in ("girl", "boy") for name in fillers[kind]]
    chosen: dict[str, str] = {}
    for child, (name, sex) in zip("AB", draw.sample(children, 2), strict=True):
        chosen |= {child: name, f"his_{child}": "her" if sex == "girl" else "his"}
    for kind in list(fillers)[2:]:
        chosen |= {f"{kind}_{child}": one for child, one in zip("AB", draw.sample(fillers[kind], 2), strict=True)}
    story, asked = [], []
    for event in sorted(draw.sample(range(len(EVENTS)), EVENTS_OF_A_STORY)):
        lines = [line.strip() for line in EVENTS[event].strip().split("\n")]
        first, second = draw.sample("AB", 2)
        telling = draw.choice([line for line in lines if line[0] != "?"])
        story.append(filled(telling, first, second, chosen))
        for line in lines:
            question, mark, answer = line.removeprefix("? ").partition("? ")
            for one, other in ("AB", "BA") if line[0] == "?" else ():
                asked.append(tuple(filled(text, one, other, chosen) for text in (question + mark.strip(), answer)))
    text = " ".join(story)
    # Only what is told: not every telling says where both toys were.
    known = [(question, answer) for question, answer in asked if answer.split("[")[1].split("]")[0] in text]
    return text, [(question, re.sub(r"[][]", "", answer)) for question, answer in known]


def filled(template: str, first: str, second: str, chosen: dict[str, str]) -> str:
    """The template with its fillers, X being the child `first` and Y `second`."""
    names = {"X": first, "Y": second}
    text = re.sub(r"\{(\w*?)([XY])\}", lambda slot: chosen[slot[1] + names[slot[2]]], template)
    return re.sub(r"\b([Aa])(?= [aeiou])", r"\1n", text)


def make_rows(seed: int = 0) -> Rows:
    """The rows by split. No story is in two of them."""
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
    for split, found in rows.items():
        name = f"demo-qa-{split}.jsonl"
        part = folder / f".{name}.{os.getpid()}.part"
        try:
            part.write_bytes("".join(json.dumps(row) + "\n" for row in found).encode("utf-8"))
            os.replace(part, folder / name)
        finally:
            part.unlink(missing_ok=True)


def question_of(prompt: str) -> str:
    """What a prompt asks, behind its story."""
    return re.split(r"[.?!\"] (?=[A-Z])", prompt)[-1]


def baselines(rows: Rows, split: str) -> dict[str, float]:
    """The exact matches of who does not read: the most frequent answer to a question that begins like this one, and the
    answer to the question most like it.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second or two: not for --help

    asked = {name: [question_of(row["prompt"]) for row in rows[name]] for name in ("train", split)}
    gold = {name: [row["answer"] for row in rows[name]] for name in ("train", split)}
    frequent: dict[str, Counter[str]] = {}
    for question, answer in zip(asked["train"], gold["train"], strict=True):
        frequent.setdefault(kind_of(question), Counter())[answer] += 1
    by_kind = [frequent[kind_of(question)].most_common(1)[0][0] for question in asked[split]]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2)).fit(asked["train"])
    alike = vectorizer.transform(asked[split]) @ vectorizer.transform(asked["train"]).T  # cosines
    nearest = [gold["train"][i] for i in alike.toarray().argmax(-1)]
    return {
        "the most frequent answer to such a question": share(by_kind, gold[split]),
        "the answer to the most similar question": share(nearest, gold[split]),
    }


def kind_of(question: str) -> str:
    """Its first two words, such as "What colour"."""
    return " ".join(question.split()[:2])


def share(found: Sequence[str], gold: Sequence[str]) -> float:
    """How many of the answers are right."""
    return sum(a == b for a, b in zip(found, gold, strict=True)) / len(gold)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    about = """Writes the demo questions: short stories about two children, each with questions that the story answers.
Then prints how often one is right without reading."""
    parser = OneLineParser(prog="make_demo_qa.py", description=about)
    here = Path(__file__).resolve().parent
    parser.add_argument("--into", type=Path, default=here, metavar="DIR", help="where to write (default: this folder)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="0 or more; 0, the default, gives what ships")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed {options.seed}: it must be 0 or more")
    if not options.into.is_dir():
        parser.error(f"--into {options.into}: there is no such folder")
    rows = make_rows(options.seed)
    try:
        write_files(options.into, rows)
    except OSError as error:
        parser.error(f"--into {options.into}: {error.strerror or error}")
    print(f"{options.into}: " + ", ".join(f"demo-qa-{split}.jsonl with {len(rows[split])} rows" for split in rows))
    for split in ("dev", "test"):
        print(
            f"exact match on {split}: " + ", ".join(f"{name} {one:.3f}" for name, one in baselines(rows, split).items())
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
