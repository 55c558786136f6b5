"""Plain opinions about films, for the demo data: from a small grammar, and from film reviews.

The grammar's wording is the project's own and in the public domain. The reviews are those of Pang and Lee, "A
Sentimental Education" (ACL 2004), CC BY 4.0.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from make_corpora import HELD_OUT_FOLD, as_written, table

REVIEWS = "movie_reviews_2000.tsv"

# Lists of fillers, separated by "/". Those after "//" are not in the training set.
FILM = "movie / film / comedy / thriller / drama / western / sequel / love story / horror film // musical / documentary"
PART = (
    "the acting / the plot / the ending / the story / the music / the script / the dialogue / the humour / "
    "the main actor / the direction / the beginning / the camera work // the soundtrack / the lead actress / the cast"
)
ADVERB = "really / so / just / simply / truly / absolutely // honestly / quite frankly"
# Fillers by level, from awful to excellent.
ADJECTIVE = (
    "terrible / awful / horrible / dreadful / unwatchable / pathetic / atrocious / painfully bad / disgusting / "
    "worthless / unbearable / idiotic / the worst // abysmal / appalling / insulting",
    "bad / boring / dull / weak / poor / disappointing / forgettable / predictable / silly / annoying / bland / slow / "
    "stupid / tedious / confusing / lifeless / unfunny / far too long / not good / not funny / not very clever // "
    "lame / clumsy / tiresome / not interesting",
    "okay / average / ordinary / so-so / all right / nothing special / passable / watchable / neither good nor bad / "
    "fine but no more // middling / acceptable",
    "good / fun / enjoyable / nice / entertaining / funny / charming / clever / sweet / touching / interesting / "
    "solid / exciting / not bad at all / never boring / well made // likeable / lovely / anything but dull",
    "great / amazing / fantastic / brilliant / wonderful / superb / excellent / perfect / incredible / outstanding / "
    "stunning / hilarious / unforgettable / magnificent / beautiful / the best // marvellous / awesome / breathtaking",
)
CLAUSE = (
    "I hated it / I hated every minute of it / I want my money back / the worst {film} I have ever seen / "
    "one of the worst films ever made / a complete waste of time / I walked out after an hour / "
    "avoid it at all costs / do not waste your time on this / stay away from this {film} / I could not finish it / "
    "a total disaster / it made me angry / an insult to the audience / I have never seen anything so bad / "
    "pure garbage / "
    "nobody should have to sit through this / it is painful to watch / I regret every penny that I spent on it // "
    "a crime against cinema / what a load of rubbish / I wish I could forget this {film}",
    "I did not like it / I did not enjoy this {film} / I was bored / not worth the money / I expected more / "
    "it did not work for me / it goes on and on / I would not watch it again / I cannot recommend it / I fell asleep / "
    "nobody in it is interesting / I did not laugh once / a waste of good actors / skip this one / "
    "the jokes fall flat / the story goes nowhere / it makes no sense / I kept looking at my watch / "
    "what a disappointment / save your money / I did not care how it ended / I lost interest halfway through // "
    "a bit of a mess / it left me cold / you will be asleep before it ends",
    "it was okay / not great, not terrible / I have seen better and I have seen worse / it passes the time / "
    "some of it is good and some of it is bad / I neither liked nor hated it / you can watch it or leave it / "
    "an average {film}, no more and no less / good in parts / it has its moments, but only a few / "
    "I do not know what to think of it / half of it works // it is what it is / fine for a rainy day",
    "I liked it / I enjoyed it / I enjoyed this {film} a lot / I had fun / worth watching / well worth seeing / "
    "I would recommend it / it made me laugh / it made me smile / I was never bored / I laughed a lot / "
    "I would watch it again / it does not disappoint / it kept me guessing / a good time for the whole family / "
    "give it a chance / it is better than I expected / I was pleasantly surprised / I could not look away / "
    "it has a lot of heart / it was worth every penny // my children liked it too / two hours well spent",
    "I loved it / I loved every minute of it / the best {film} I have ever seen / a masterpiece / "
    "one of the best films of all time / I could not stop laughing / do not miss it / you have to see this {film} / "
    "it blew me away / everyone should see this / I cannot wait to see it again / a must-see / "
    "I cried and laughed, and I loved it / one of my favourite films / I have never seen anything so good / "
    "it is a joy from beginning to end / I was on the edge of my seat / nothing about it could be better / "
    "go and see it right now // it took my breath away / ten out of ten / pure magic",
)
TEMPLATES = (
    "a {adjective} {film}.",
    "what a {adjective} {film}!",
    "this {film} is {adjective}.",
    "this {film} was {adverb} {adjective}.",
    "it is a {adjective} {film}.",
    "it was {adverb} {adjective}.",
    "I found it {adjective}.",
    "I think that this {film} is {adjective}.",
    "{part} is {adjective}.",
    "{part} was {adverb} {adjective}.",
    "{part} is {adjective} and {part2} is {adjective2}.",
    "{adjective} and {adjective2}.",
    *["{clause}."] * 4,
    "{clause}!",
    "{adverb} {adjective}, {clause}.",
    "{clause}, {part} is {adjective}.",
    "this {film} is {adjective}, and {clause}.",
)


def items(text: str, held_out: bool) -> list[str]:
    """The fillers of a list, with or without those after "//"."""
    return [item.strip() for item in (text.replace("//", "/") if held_out else text.split("//")[0]).split("/")]


def grammar_sentence(label: int, draw: random.Random, held_out: bool) -> str:
    """A sentence of 3 to 15 words with that label. held_out: with the fillers that are not in the training set."""
    lists = {"film": FILM, "part": PART, "adverb": ADVERB, "adjective": ADJECTIVE[label], "clause": CLAUSE[label]}
    while True:
        text = draw.choice(TEMPLATES)
        while slots := re.findall(r"{(\w+?)2?}", text):
            text = re.sub(r"{\w+}", draw.choice(items(lists[slots[0]], held_out)), text, count=1)
        words = re.findall(r"[\w'-]{4,}", text.lower())
        fits = 3 <= len(text.split()) <= 15 and len(words) == len(set(words))
        # Some adjectives do not stand before a noun or after "so".
        if not fits or re.search(
            r"\b(an?|so|really|truly|simply|just) (the|no|not|never|neither|nothing|far|fine)\b", text
        ):
            continue
        if re.search(
            r"\ba (okay|all right|well made|anything|painfully)|lutely (okay|average|all|fine|no)|est and\b", text
        ):
            continue
        text = re.sub(r"\ba (?=[aeiou])", "an ", text)
        return re.sub(r"(^|[.?!] )([a-z])", lambda start: start[1] + start[2].upper(), text)


# Words of praise and of blame, the strong ones after "//".
PRAISE = (
    "captivating|charming|clever|compelling|delight|delightful|enjoyable|enjoyed|entertaining|exciting|fascinating|fresh|"
    "fun|funny|good|gripping|heartwarming|impressive|intelligent|intriguing|memorable|moving|pleasure|powerful|"
    "recommend|recommended|refreshing|satisfying|solid|sweet|touching|witty|worth//"
    "amazing|beautiful|beautifully|best|brilliant|brilliantly|excellent|exhilarating|fantastic|flawless|gem|gorgeous|"
    "great|hilarious|loved|magnificent|marvelous|masterpiece|outstanding|perfect|perfectly|remarkable|riveting|"
    "spectacular|stunning|superb|terrific|thrilling|triumph|wonderful|wonderfully"
)
BLAME = (
    "annoying|bad|badly|bland|bored|boredom|boring|cheap|cheesy|cliched|clumsy|contrived|disappointed|disappointing|"
    "disappointment|dreary|dull|fails|failure|flat|flop|forgettable|irritating|lame|lifeless|mediocre|mess|mindless|"
    "pointless|poor|poorly|predictable|shallow|silly|sloppy|stupid|stupidity|tedious|tired|tiresome|ugly|unconvincing|"
    "uninspired|uninteresting|unfunny|wasted|weak|wooden//"
    "abysmal|atrocious|awful|disaster|dreadful|embarrassing|embarrassingly|garbage|horrible|horribly|idiotic|insipid|"
    "insult|insulting|laughable|miserable|painful|painfully|pathetic|ridiculous|terrible|terribly|torture|unwatchable|"
    "waste|worse|worst|worthless|wretched"
)
# A sentence with one of these may turn its words around, or speak of something else.
TURNS = (
    r"\b(not|no|never|nothing|neither|nor|hardly|barely|without|but|although|though|however|despite|while|except|"
    r"instead|rather|less|lacks?|lacking|too|would|could|should|might|may|if|trying|tries|supposed|almost|only|"
    r"unfortunately|why|until|other|better|unless|wish|hope|hoped|expect|expected|even|anything|once|were|was|when|"
    r"surprisingly|role|far|none|fake|kill\w*|love|lose|lost|pretty)\b|n't\b"
)
TOPICS = (
    r"\b(film|movie|picture|acting|actors?|performances?|plot|script|screenplay|story|storyline|scenes?|cast|direct\w*|"
    r"ending|dialogue|characters?|comedy|thriller|drama|humou?r|jokes?|photography|cinematography|music|soundtrack|"
    r"score|effects|editing|entertainment|visuals|writing|production|sequel|romance|experience|flick|cinema|finale|"
    r"pacing|fun)\b"
)


def review_sentences(source: Path, held_out: bool) -> Iterator[tuple[int, str]]:
    """Sentences of 4 to 15 words, with their labels, that plainly say what their review says. source: the collections.

    A sentence of a favourable review has words of praise and none of blame, and the reverse; no word turns it around.
    Strong words make the label 4 or 0 instead of 3 or 1. held_out: of the last fold, which no model here has read.
    """
    praise, blame = (re.compile(rf"\b({words.replace('//', '|')})\b") for words in (PRAISE, BLAME))
    strong = re.compile(rf"\b({PRAISE.split('//')[1]}|{BLAME.split('//')[1]})\b")
    for label, fold, text in table(source / "reviews" / REVIEWS):
        if fold.startswith(HELD_OUT_FOLD) != held_out:
            continue
        for sentence in re.split(r"(?<=[.?!]) ", as_written(text)):
            plain = sentence.lower()
            if not 4 <= len(sentence.split()) <= 15 or not re.fullmatch(r"[A-Z][A-Za-z' ,-]+[.!]", sentence):
                continue
            if (bool(praise.search(plain)), bool(blame.search(plain))) != (label == "1", label == "0"):
                continue
            if re.search(TOPICS, plain) and not re.search(TURNS, plain):
                is_strong = strong.search(plain) is not None
                yield (3 + is_strong if label == "1" else 1 - is_strong), sentence
