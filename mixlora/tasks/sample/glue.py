"""Four tasks of GLUE in small: acceptable sentences, sentiment, entailment, paraphrase. Labels alternate.

Held out: names, things, and the frames of the sentences; the ways in which a sentence goes wrong or a second one
differs are the same in every part.
"""

from collections.abc import Iterator

from mixlora.tasks.sample.draw import Draw, Row, distinct, listed, sentence

PERSONS = listed(
    "teacher, doctor, farmer, sailor, child, neighbor, painter, singer, driver, student, lawyer, baker, nurse, "
    "tailor, guard"
)
# third person, plain form, past
VERBS = [
    tuple(words.split("/"))
    for words in listed(
        "buys/buy/bought, paints/paint/painted, finds/find/found, sells/sell/sold, cleans/clean/cleaned, "
        "repairs/repair/repaired, "
        "hides/hide/hid, carries/carry/carried, admires/admire/admired, draws/draw/drew, needs/need/needed, "
        "brings/bring/brought, "
        "loses/lose/lost, wants/want/wanted, borrows/borrow/borrowed"
    )
]
OBJECTS = listed(
    "bicycle, lamp, hat, table, carpet, boat, guitar, coat, mirror, chair, kettle, wagon, basket, blanket, camera"
)
# acceptable, and the same words gone wrong
PHRASES = """The {p} {v} the {o}.|The {p} the {o} {v}.
Every {p} {v} a {o}.|Every {p} {w} a {o}.
The {p} will {w} the {o}.|The {p} will {v} the {o}.
The old {p} {v} a new {o}.|The old {p} {v} a {o} new.
Does the {p} {w} the {o}?|Does the {p} {v} the {o}?
The {p} has a {o}.|The {p} have a {o}.
Who {v} the {o} of the {p}?|Who the {o} {v} of the {p}?
Two {p}s {w} the {o}.|Two {p} {v} the {o}.
The {p} did not {w} a {o}.|The {p} did not {v} a {o}.
This {p} often {v} that {o}.|This {p} often {v} those {o}."""
GOOD = listed(
    "wonderful, brilliant, delightful, charming, great, funny, touching, superb, beautiful, clever, lovely, "
    "fresh, gripping, splendid, masterly"
)
BAD = listed(
    "terrible, boring, dreadful, ghastly, dull, stupid, clumsy, horrible, lifeless, weak, tedious, stale, "
    "painful, bad, forgettable"
)
REVIEWS = """this is a {j} and {k} film .
the story is {j} , the acting {k} .
what a {j} script , what a {k} cast !
the director has made a {j} , {k} picture .
from first to last it is {j} and {k} .
two hours of {j} scenes and {k} jokes .
a {j} comedy with a {k} ending .
the music is {j} and the dialogue is {k} .
{j} , {k} and made for the whole family .
its {j} plot makes for a {k} evening ."""
CITIES = listed(
    "Paris, Oslo, Madrid, Vienna, Dublin, Lisbon, Athens, Warsaw, Berlin, Rome, Prague, Helsinki, Geneva, "
    "Naples, Hamburg"
)
# what is told, what follows from it, what does not
TOLD = """{x}, a {p} from {c}, bought a {o} last week.|{x} bought a {o}.|{y} bought a {o}.
The {p} {x} moved to {c} with a {o}.|{x} lives in {c}.|{x} lives in {d}.
On Monday {x} sold the {o} to a {p} in {c}.|{x} sold the {o}.|{x} kept the {o}.
{x} has worked as a {p} in {c} since spring.|{x} is a {p}.|{x} is a {q}.
In {c} a thief stole the {o} of {x}, a {p}.|The {o} was stolen in {c}.|The {o} was stolen in {d}.
{x} and {y}, a {p}, met in {c} and rented a {o}.|{x} and {y} met in {c}.|{x} and {y} met in {d}.
The {p} gave {x} an old {o} from {c}.|{x} got an old {o}.|{y} got an old {o}.
When {x} came to {c}, the {p} had already fixed the {o}.|The {p} fixed the {o}.|The {q} fixed the {o}.
{x} met a {p} in {c} and showed him the {o}.|{x} met a {p}.|{x} met a {q}.
The {o} that {x} made for the {p} won a prize in {c}.|{x} made the {o}.|{y} made the {o}."""
# a sentence, the same in other words, another sentence of nearly the same words
TWICE = """{x} {s} the {o} in {c} on Friday .|On Friday {x} {s} the {o} in {c} .|On Friday {y} {s} the {o} in {c} .
The {p} {s} a {o} from {c} .|A {o} from {c} was what the {p} {s} .|A {o} from {d} was what the {p} {s} .
It was {x} who {s} the {o} of the {p} .|{x} {s} the {p} 's {o} .|{x} {s} the {q} 's {o} .
In {c} , {x} {s} a {o} for {y} .|{x} {s} a {o} for {y} in {c} .|{x} {s} a {o} for {y} in {d} .
{x} said : " The {p} {s} the {o} . "|{x} said that the {p} {s} the {o} .|{y} said that the {p} {s} the {o} .
The {p} of {c} {s} {x} 's {o} .|{x} 's {o} , the {p} of {c} {s} it .|{y} 's {o} , the {p} of {c} {s} it .
After seeing {c} , {x} {s} the {o} .|{x} {s} the {o} after seeing {c} .|{x} {s} the {o} before seeing {c} .
{x} said that the {p} {s} a {o} .|The {p} {s} a {o} , said {x} .|The {p} {s} a {o} , said {y} .
Last year the {p} {s} the {o} in {c} .|In {c} the {p} {s} the {o} last year .|In {d} the {p} {s} the {o} last year .
{x} , a {p} , {s} the {o} .|The {o} is what the {p} {x} {s} .|The {o} is what the {q} {x} {s} ."""


def words(draw: Draw) -> dict[str, str]:
    """What the frames are filled with."""
    verb = draw.one(draw.share(VERBS))
    places, people, persons = draw.few(draw.share(CITIES), 2), draw.names(2), draw.few(draw.share(PERSONS), 2)
    drawn = {"x": people[0], "y": people[1], "p": persons[0], "q": persons[1], "c": places[0], "d": places[1]}
    return {**drawn, "v": verb[0], "w": verb[1], "s": verb[2], "o": draw.one(draw.share(OBJECTS))}


def frames(draw: Draw, table: str) -> Iterator[list[str]]:
    """Each frame twice in a row, once for either label."""
    for line in draw.rounds(draw.share(table.splitlines())):
        yield from (line.split("|"), line.split("|"))


def cola(draw: Draw, number: int) -> list[Row]:
    """1: acceptable; 0: word order, agreement or a verb's form is wrong."""

    def rows() -> Iterator[Row]:
        for idx, frame in enumerate(frames(draw, PHRASES)):
            label = (idx + 1) % 2
            yield {"sentence": frame[1 - label].format(**words(draw)), "label": label, "idx": idx}

    return distinct(rows(), number, "sentence")


def sst2(draw: Draw, number: int) -> list[Row]:
    """1: positive. The adjectives of the parts differ too."""

    def rows() -> Iterator[Row]:
        for idx, [frame] in enumerate(frames(draw, REVIEWS)):
            label = (idx + 1) % 2
            j, k = draw.few(draw.share(GOOD if label else BAD), 2)
            yield {"sentence": frame.format(j=j, k=k) + " ", "label": label, "idx": idx}

    return distinct(rows(), number, "sentence")


def rte(draw: Draw, number: int) -> list[Row]:
    """0: the second sentence follows; 1: it does not."""
    return distinct(couples(draw, TOLD, follows=0), number, "sentence1", "sentence2")


def mrpc(draw: Draw, number: int) -> list[Row]:
    """1: both sentences say the same; 0: they do not."""
    return distinct(couples(draw, TWICE, follows=1), number, "sentence1", "sentence2")


def couples(draw: Draw, table: str, *, follows: int) -> Iterator[Row]:
    for idx, (told, same, other) in enumerate(frames(draw, table)):
        label, filling = idx % 2, words(draw)
        second = same if label == follows else other
        yield {
            "sentence1": sentence(told.format(**filling)),
            "sentence2": sentence(second.format(**filling)),
            "label": label,
            "idx": idx,
        }
