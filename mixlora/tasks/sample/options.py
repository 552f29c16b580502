"""Option questions over the domains of `facts`, `places` and `purposes`: ARC, OpenBookQA, CommonsenseQA, ScienceQA.

Every answer of a domain is right equally often and its rivals are drawn evenly, so neither the answer alone nor its
length says which is right. Held out: the things and the sentences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mixlora.tasks.sample import facts, places, purposes
from mixlora.tasks.sample.draw import Draw, Row, a, distinct, sentence
from mixlora.tasks.sample.facts import Domain

LETTERS = "ABCDE"


@dataclass(frozen=True)
class Question:
    domain: Domain
    text: str
    thing: str
    options: list[str]
    gold: int


def questions(draw: Draw, domains: Sequence[Domain], most: int) -> Iterator[Question]:
    """Domain after domain, kind after kind; at most `most` options."""
    kinds = {d.topic: draw.rounds(sorted(d.kinds)) for d in domains}
    things = {(d.topic, k): draw.rounds(draw.share(d.kinds[k])) for d in domains for k in d.kinds}
    asks = {d.topic: draw.rounds(draw.share(d.asks)) for d in domains}
    while True:
        for d in domains:
            kind = next(kinds[d.topic])
            thing = happening(draw, d, next(things[d.topic, kind]))
            wrong = draw.few(sorted(set(d.kinds) - {kind}), min(most, len(d.kinds)) - 1)
            yield Question(d, filled(next(asks[d.topic]), thing), thing, *draw.among(kind, wrong))


def happening(draw: Draw, domain: Domain, thing: str) -> str:
    """The effects are those of something that is done to an object."""
    return f"{a(draw.one(draw.share(facts.THINGS)))} {thing}" if domain is facts.EFFECTS else thing


def filled(ask: str, thing: str) -> str:
    text = ask.format(x=thing, X=sentence(thing), a=a(thing), A=sentence(a(thing)))
    return sentence(text)


def choices(question: Question) -> tuple[dict[str, list[str]], str]:
    labels = list(LETTERS[: len(question.options)])
    return {"text": question.options, "label": labels}, labels[question.gold]


def arc(draw: Draw, domains: Sequence[Domain]) -> Iterator[Row]:
    for number, question in enumerate(questions(draw, domains, 4)):
        shown, key = choices(question)
        yield {"id": draw.id(number), "question": question.text, "choices": shown, "answerKey": key}


def arc_easy(draw: Draw, number: int) -> list[Row]:
    """What a thing is or is for: animals, foods, materials, tools, devices."""
    domains = (facts.ANIMALS, facts.FOODS, facts.MATERIALS, facts.TOOLS, facts.DEVICES)
    return distinct(arc(draw, domains), number, "question")


def arc_challenge(draw: Draw, number: int) -> list[Row]:
    """What becomes of a thing to which something is done. Neither the thing nor what is done is in two parts."""
    return distinct(arc(draw, (facts.EFFECTS,)), number, "question")


def openbookqa(draw: Draw, number: int) -> list[Row]:
    """Sentences to complete: what a part of a body, a thing in the house or a job is good for."""

    def rows() -> Iterator[Row]:
        for n, question in enumerate(questions(draw, (purposes.BODIES, purposes.GEAR, purposes.DUTIES), 4)):
            shown, key = choices(question)
            yield {"id": draw.id(n), "question_stem": question.text, "choices": shown, "answerKey": key}

    return distinct(rows(), number, "question_stem")


def commonsense_qa(draw: Draw, number: int) -> list[Row]:
    """Where people work and where things are kept."""

    def rows() -> Iterator[Row]:
        for n, question in enumerate(questions(draw, (places.JOBS, places.ROOMS), 5)):
            shown, key = choices(question)
            yield {
                "id": draw.id(n),
                "question": question.text,
                "question_concept": question.thing,
                "choices": {"label": shown["label"], "text": shown["text"]},
                "answerKey": key,
            }

    return distinct(rows(), number, "question")


def scienceqa(draw: Draw, number: int) -> list[Row]:
    """States of matter, materials, living things, foods, energy and parts of speech, without pictures."""
    domains = (places.STATES, facts.MATERIALS, places.SPEECH, facts.ANIMALS, facts.DEVICES, facts.FOODS)

    def rows() -> Iterator[Row]:
        for question in questions(draw, domains, 4):
            language = question.domain is places.SPEECH
            gold = question.options[question.gold]
            yield {
                "image": None,
                "question": question.text,
                "choices": question.options,
                "answer": question.gold,
                "hint": "",
                "task": "closed choice",
                "grade": "grade4",
                "subject": "language science" if language else "natural science",
                "topic": question.domain.topic,
                "category": question.domain.topic,
                "skill": "Sort things by their kind",
                "lecture": "",
                "solution": f"The right answer is: {gold}.",
            }

    return distinct(rows(), number, "question")
