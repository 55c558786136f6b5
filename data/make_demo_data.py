"""Writes the demo data: short opinions, most of them about films, in five classes. They come from three places:

  own_sentences.txt     plain sentences, written one by one by language models; public domain
  review_sentences.txt  short sentences of film reviews, found by make_corpora.py; CC BY 4.0, Pang and Lee, ACL 2004
  the grammar below     tricky sentences; public domain

The label is the meaning of the whole sentence. Most tricky ones have a verdict and a decoy from the same lists (a
rejected opinion, a hope, a fear, one part of the film). So praise and blame occur in every class, and counting words
is not enough.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minillama.cli.parser import OneLineParser, into_and_seed  # noqa: E402

Rows = dict[str, list[tuple[int, str]]]  # (label, sentence) by split

LABELS = ["awful", "bad", "average", "good", "excellent"]
TRICKY = {"train": 500, "dev": 100, "test": 100}  # a fifth for each class
PLAIN_EACH = 20  # own sentences of each class in dev, and in test; all others are in train
HERE = Path(__file__).resolve().parent

# Lists of fillers, separated by "/". Those after "//" are not in the training set.
NEUTRAL = {
    "style": "low-budget / big-budget / Danish / Korean / Italian / black-and-white / long // French / Brazilian",
    "genre": "thriller / comedy / documentary / western / musical / romance / heist film / ghost story / war film / "
    "courtroom drama / space opera / road movie / cartoon / biography / family drama // detective story / fairy tale",
    "part": "the acting / the script / the pacing / the score / the camera work / the ending / the dialogue / "
    "the plot / the editing / the lead performance / the opening scene / the humour / the love story / "
    "the costume design // the lighting / the final act / the narration",
    "critics": "critics / my friends / the papers / most of my colleagues / the people next door // bloggers / "
    "my students",
    "person": "my uncle / my neighbour / the man behind me / my old teacher / my flatmate // the usher / my dentist",
    "he": "brother / father / husband / nephew // son",
    "she": "sister / mother / aunt / niece // daughter",
}
# Fillers by level, from awful to excellent.
LEVELED = {
    # Follows "is", for a film or a part of it.
    "adjective": (
        "dreadful / unbearable / atrocious / abysmal / a disgrace / beyond saving / entirely without merit / "
        "painfully bad / as bad as it gets / nowhere near bearable / perfectly awful // appalling / wretched / "
        "not worth one kind word",
        "dull / weak / flat / rather tedious / far from convincing / less than inspired / hardly a success / clumsy / "
        "not very good / somewhat disappointing / a bit of a bore / not as clever as it should be // lacklustre / "
        "not exactly thrilling / on the tired side",
        "so-so / middling / neither good nor bad / average / ordinary / no better and no worse than most / "
        "half brilliant and half dreadful / as often dull as delightful / strong and weak in equal measure / "
        "not quite a success and not quite a failure // run-of-the-mill / as easy to praise as to blame / "
        "fair to middling",
        "good / pleasing / enjoyable / quite charming / far from dull / not bad at all / better than most / solid / "
        "never boring / likeable / anything but weak / nicely done // engaging / pleasantly clever / "
        "anything but tedious",
        "superb / magnificent / flawless / breathtaking / astonishingly good / nothing short of brilliant / "
        "without a single weak moment / impossible to fault / as good as it gets / very nearly perfect / "
        "too good for words / not just fine but dazzling // sublime / beyond all praise / never less than stunning",
    ),
    # What somebody calls a film, or expects of it.
    "noun": (
        "a disaster / a train wreck / the worst film of the year / a complete and utter failure / a catastrophe / "
        "an insult to anyone who bought a ticket / pure torture / a new low point for everyone involved / "
        "a horror without one good moment // an ordeal from start to finish / a crime against cinema",
        "a letdown / a disappointment / a bit of a bore / a rather tired exercise / something of a failure / "
        "something less than a success / a flat and forgettable affair / a film with little to say / "
        "a work without much charm // a misfire / a slightly dreary evening",
        "a mixed bag / a so-so affair / an average night at the pictures / something between a hit and a flop / "
        "half a masterpiece and half a mess / a film of equal strengths and weaknesses / "
        "a perfectly ordinary piece of work // a middling effort / a tie between wit and boredom",
        "a good time / a pleasant evening out / solid entertainment / a likeable piece of work / "
        "a film with real charm / quite a success / far more of a success than a failure / "
        "fun with few dull moments // a cheerful and well-made thing / good company for an evening",
        "a masterpiece / a triumph / one of the best films of the decade / a classic in the making / "
        "a work of genius / a joy from the first shot to the last / a marvel without one dull minute / "
        "the best thing on any screen // a treasure / a wonder without one bad scene",
    ),
    # Follows "is", for a whole film only.
    "whole": (
        "not even good for a laugh / so bad that no star could save it / less a story than a punishment // "
        "enough to make a saint demand a refund",
        "hardly the masterpiece that its posters promise / not half as clever as it thinks / "
        "less a delight than a duty // not quite worth the price of a ticket",
        "no masterpiece and no disaster / worth neither praise nor blame / as likely to please you as to bore you // "
        "exactly as good as it is bad",
        "not the bore that its title suggests / more fun than it has any right to be / hard not to like // "
        "well worth the price of a ticket",
        "so good that I forgot the time / without equal this year / not one second too long and not one note wrong // "
        "enough to make a cynic weep for joy",
    ),
    # What the speaker felt or did.
    "clause": (
        "I wanted my money and my evening back / I would pay never to see it again / "
        "I left in a rage, for all my hopes / I could not find one good thing in it / "
        "I would not wish it on my worst enemy / I hated every minute of it // I sat there in pain and disbelief",
        "I checked my watch more than once / I left a little disappointed / I never quite cared how it would end / "
        "I sighed where I had hoped to cheer / I yawned more often than I smiled / I could not warm to it // "
        "I stifled quite a few yawns",
        "I left with a shrug / I liked and disliked it in equal measure / I felt neither cheated nor thrilled / "
        "I got neither the marvel that I hoped for nor the mess that I feared / "
        "I was bored as often as I was delighted / I would neither recommend it nor warn against it // "
        "I came out exactly as happy as I went in",
        "I had a good time / I left in a good mood / I was never bored / I smiled more often than I yawned / "
        "I would recommend it to a friend / I smiled where I had expected to yawn // I found quite a lot to like",
        "I have already bought a ticket to see it again / I loved every minute of it / "
        "I would not change a single frame / I have not seen anything better this year / "
        "I fell in love where I had come to sneer / I could not find one fault in it // "
        "I was in heaven from start to finish",
    ),
}
# One template a line; those with "*" are not in the training set. A slot is {kind_role}: role v is the verdict (the
# label), w another filler of its level, d the decoy, o its opposite. {is_...} draws from all lists that follow "is".
TEMPLATES = {
    # The decoy is on another side of average than the verdict.
    "contrast": """
        {part} is {adjective_d}, but the {film} as a whole is {is_v}.
        although {part} is {adjective_d}, this {film} is {adjective_v}.
        this {film} is {is_v}, even though {part} is {adjective_d}.
        {part} of this {film} is {adjective_d}, and yet {clause_v}.
        the first hour of this {film} is {adjective_d}, but all that matters comes after it, and that is {adjective_v}.
        the last scene of this {film} is {adjective_d}, but by then everything else has been {adjective_v}.
        whatever one says about {part}, which is {adjective_d}, this {film} remains {noun_v}.
        I do not deny that {part} is {adjective_d}, yet taken as a whole the {film} is {adjective_v}.
        there is no denying, even for those of us who find {part} {adjective_d}, that this {film} is {adjective_v}.
        nobody will talk me out of calling this {film} {noun_v}, although {part} is {adjective_d}.
        yes, {part} is {adjective_d}. No, that does not change what I think of the {film}: {clause_v}.
        * {clause_v}, though I admit that {part} of this {film} is {adjective_d}.
        * {clause_v}. So much for {critics}, who told me that this {film} is {is_d}.
        * that {part} is {adjective_d} does not change the verdict: this {film} is {is_v}.
    """,
    # The decoy is from any other level.
    "any": """
        {critics} call this {film} {noun_d}. I call it {noun_v}.
        I call this {film} {noun_v}, whatever {critics} may mean when they call it {noun_d}.
        do not listen when {critics} tell you that this {film} is {is_d}: it is {is_v}.
        my {he} calls this {film} {noun_d}, my {she} calls it {noun_v}, and I am on the side of my {she}.
        my {he} calls this {film} {noun_v}, my {she} calls it {noun_d}, and I am on the side of my {he}.
        my {she} says that this {film} is {is_d}; my {he} says that it is {is_v}. My {she} is wrong.
        my {she} says that this {film} is {is_v}; my {he} says that it is {is_d}. My {he} is wrong.
        I expected {noun_d}, and what I got from this {film} was {noun_v}.
        the trailer led me to expect {noun_d}, but the {film} itself is {noun_v}.
        on first viewing I found this {film} {adjective_d}, but I was unwell; a second one proved it {adjective_v}.
        on second viewing this {film} seemed {adjective_d}, but I was unwell; I trust the first: it is {adjective_v}.
        where the book was {adjective_d}, the {film} that they made of it is {adjective_v}.
        the {film} is {adjective_v}, even if the book that it was made from is {adjective_d}.
        the sequel is going to be {noun_d}, I am told, but the {film} that I saw today is {is_v}.
        to call this {film} {noun_d} is a mistake, since it is {noun_v}.
        it would be wrong to call this {film} {noun_d}, and just as wrong not to call it {noun_v}.
        it would be wrong not to call this {film} {noun_v}, and just as wrong to call it {noun_d}.
        {critics} call this {film} {noun_v}, and they are right; only {person} calls it {noun_d}.
        you may ask whether this {film} is {noun_d} or {noun_v}, and I say that it is the latter.
        you may ask whether this {film} is {noun_v} or {noun_d}, and I say that it is the former.
        "{clause_d}," said {person} after the {film}, but I cannot agree: it is {is_v}.
        "{clause_d}," said my {he} after the {film}; "{clause_v}," said my {she}. I agree with my {she}.
        "{clause_v}," said my {he} after the {film}; "{clause_d}," said my {she}. I agree with my {he}.
        of this {film} {person} wrote: "{clause_d}." I would have written: "{clause_v}."
        * had I left at half-time, I would have called this {film} {noun_d}; but I stayed, and now I call it {noun_v}.
        * {person} was the only one to find this {film} {adjective_d}; like everybody else, I found it {adjective_v}.
        * where {person} saw {noun_d}, I saw {noun_v}, and we were in the same {film}.
    """,
    # The decoy is praise, and higher than the verdict.
    "better": """
        with a better script this {film} might have been {noun_d}; as it stands, it is {noun_v}.
        I wish I could say that this {film} is {is_d}, but it is {is_v}.
        * the posters promise {noun_d}; what the {film} delivers is {noun_v}.
    """,
    # The decoy is blame, and lower than the verdict.
    "worse": """
        in clumsier hands this {film} would have been {noun_d}; in these it is {noun_v}.
        I went into this {film} fearing {noun_d}, and what I saw is {is_v}.
        * this {film} could so easily have been {noun_d}, but it is {noun_v}.
    """,
    "draw": """
        {part} is {adjective_d} and {part2} is {adjective_o}, so for me the {film} ends in a draw.
        for every scene of this {film} that is {adjective_d}, there is another that is {adjective_o}.
        half of this {film} is {adjective_d} and the other half is {adjective_o}, which leaves me in the middle.
        {part} is {adjective_d}, {part2} is {adjective_o}, and I cannot decide which weighs more in this {film}.
        * {part} is {adjective_d}, {part2} is {adjective_o}, and between them this {film} breaks even.
    """,
    "no draw": """
        {part} is {adjective_d} and {part2} is {adjective_o}, yet the {film} does not end in a draw: it is {noun_v}.
        half of this {film} is {adjective_d} and half is {adjective_o}, but I am not in the middle: {clause_v}.
        * {part} is {adjective_d} and {part2} is {adjective_o}, but this {film} does not break even: it is {is_v}.
    """,
    "plain": """
        {part} is {adjective_v}, {part2} is {adjective_w}, and the rest of this {film} is no different.
        I can only say about this {film} that it is {is_v}, and that {clause_v}.
        * it is {noun_v}, this {film}, and {clause_v}.
    """,
}
NOT_THERE = "acting|performance|costume|camera|love story"  # rare in a documentary or a cartoon
# Whether a decoy's level is allowed for a verdict. If none is, the templates are not used for that label.
ALLOWED: dict[str, Callable[[int, int], bool]] = {
    "contrast": lambda verdict, decoy: (verdict > 2) - (verdict < 2) != (decoy > 2) - (decoy < 2),
    "any": lambda verdict, decoy: decoy != verdict,
    "better": lambda verdict, decoy: decoy > max(verdict, 2),
    "worse": lambda verdict, decoy: decoy < min(verdict, 2),
    "draw": lambda verdict, decoy: verdict == 2 != decoy,
    "no draw": lambda verdict, decoy: verdict != 2 != decoy,
    "plain": lambda verdict, decoy: True,
}


class Grammar:
    """Draws sentences, with or without the held-out fillers and templates."""

    def __init__(self, draw: random.Random, held_out: bool) -> None:
        self.draw = draw
        lines = [(relation, line.strip()) for relation, text in TEMPLATES.items() for line in text.strip().split("\n")]
        self.templates = [(relation, line.lstrip("* ")) for relation, line in lines if held_out or line[0] != "*"]

        def items(text: str) -> list[str]:
            return [item.strip() for item in (text.replace("//", "/") if held_out else text.split("//")[0]).split("/")]

        self.fillers = {kind: items(text) for kind, text in NEUTRAL.items()}
        for level in range(5):
            lists = {kind: items(texts[level]) for kind, texts in LEVELED.items()}
            lists["is"] = lists["adjective"] + lists["noun"] + lists["whole"]
            self.fillers |= {f"{kind}{level}": found for kind, found in lists.items()}

    def sentence(self, label: int) -> tuple[str, tuple[str, ...]]:
        """A sentence with that label, and its frame: the template and the opinions."""
        while True:
            relation, template = self.draw.choice(self.templates)
            decoys = [level for level in range(5) if ALLOWED[relation](label, level)]
            if not decoys:
                continue
            decoy = self.draw.choice(decoys)
            levels = {"v": label, "w": label, "d": decoy, "o": 4 - decoy}
            full = template.replace("{film}", self.draw.choice(["{style} {genre}", "{genre}"]))
            chosen: dict[str, str] = {}
            for slot in re.findall(r"\{(\w+)\}", full):
                kind, _, role = slot.partition("_")
                if slot not in chosen:
                    chosen[slot] = self.draw.choice(self.fillers[f"{kind.rstrip('2')}{levels.get(role, '')}"])
            text = full.format_map(chosen)
            words = [word for filler in chosen.values() for word in set(re.findall(r"\w{4,}", filler))]
            if len(words) > len(set(words)) or not 8 <= len(text.split()) <= 40:
                continue  # two fillers share a word, or the length is wrong
            if re.search("documentary|cartoon", text) and re.search(NOT_THERE, text):
                continue
            opinions = [filler for slot, filler in chosen.items() if "_" in slot]
            return re.sub(r"(^|[.?!] )([a-z])", lambda start: start[1] + start[2].upper(), text), (template, *opinions)


def tricky_rows(draw: random.Random) -> Rows:
    """The rows by split. No two have the same frame, so no two differ only in the film, its parts or the people."""
    rows: Rows = {}
    frames = set()
    for split, size in TRICKY.items():
        grammar = Grammar(draw, held_out=split != "train")
        rows[split] = []
        for label in list(range(5)) * (size // 5):
            sentence, frame = grammar.sentence(label)
            while frame in frames:
                sentence, frame = grammar.sentence(label)
            frames.add(frame)
            rows[split].append((label, sentence))
    return rows


def sentences(name: str) -> list[tuple[int, str]]:
    """The labelled sentences of a file in this folder."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [(int(label), text) for label, text in (line.split(" ||| ", 1) for line in lines)]


def make_rows(seed: int = 0) -> Rows:
    """The rows by split: tricky and plain ones, mixed. No sentence comes twice."""
    draw = random.Random(seed)
    rows = tricky_rows(draw)
    own = sentences("own_sentences.txt")
    draw.shuffle(own)
    for label in range(5):
        found = [row for row in own if row[0] == label]
        for split, part in (
            ("dev", found[:PLAIN_EACH]),
            ("test", found[PLAIN_EACH : 2 * PLAIN_EACH]),
            ("train", found[2 * PLAIN_EACH :]),
        ):
            rows[split] += part
    taken = {text.lower() for split in rows for _, text in rows[split]}
    for label, text in sentences("review_sentences.txt"):
        if text.lower() not in taken:
            taken.add(text.lower())
            rows["train"].append((label, text))
    for split in rows:
        draw.shuffle(rows[split])
    return rows


def write_files(folder: Path, rows: Rows) -> None:
    """Writes demo-train.txt, demo-dev.txt, demo-test.txt and demo-label-mapping.json into `folder`, each atomically."""
    from minillama.formats.files import atomic_file  # imports torch: not for --help

    for split, found in rows.items():
        with atomic_file(folder / f"demo-{split}.txt") as file:
            file.writelines(f"{label} ||| {text}\n" for label, text in found)
    with atomic_file(folder / "demo-label-mapping.json") as file:
        file.write(json.dumps(LABELS, indent=2) + "\n")


def baseline(rows: Rows) -> dict[str, float | None]:
    """The accuracy of counting words."""
    from minillama.text.labelled import Row  # takes a second or two: not for --help
    from minillama.training.word_counts import counting_words

    return counting_words({split: [Row(label, text) for label, text in rows[split]] for split in rows})


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    about = """Writes the demo data: opinions about films in five classes, plain and tricky ones. Then prints the
accuracy of counting words: logistic regression on TF-IDF features."""
    parser = OneLineParser(prog="make_demo_data.py", description=about)
    options = into_and_seed(parser, arguments, HERE)
    rows = make_rows(options.seed)
    try:
        write_files(options.into, rows)
    except OSError as error:
        parser.error(f"--into {options.into}: {error.strerror or error}")
    print(f"{options.into}: " + ", ".join(f"demo-{split}.txt with {len(rows[split]):,} rows" for split in rows))
    scores = baseline(rows)
    print(f"TF-IDF + logistic regression (C={scores['C']:g}): dev {scores['dev']:.3f}, test {scores['test']:.3f}")
    print("chance: 0.200")
    return 0


if __name__ == "__main__":
    sys.exit(main())
