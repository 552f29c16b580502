"""Yes/no questions with a passage, as in BoolQ: the passage says so, or says the contrary.

Three quarters of the questions ask for a statement that the passage makes or denies; a quarter ask for a value that
it gives, the right one or another. Each question can have either answer, so only the passage decides. Held out: the
places, the statements, the kinds of value, and the sentences around.
"""

from collections.abc import Iterator

from mixlora.tasks.sample.draw import Draw, Row, distinct, listed

TOWNS = listed(
    "Marlow, Tarrin, Ostberg, Lindal, Corvey, Brenholm, Sellwick, Ardane, Pelham, Norvik, Hartsea, Quillan, "
    "Duneford, "
    "Velmont, Rosby, Kestral, Ilmar, Wexby, Thornlea, Galdor, Fenwick, Stavely, Morvane, Elsmere, Cradock"
)
KINDS = listed("museum, library, castle, theater, park, hotel, bridge, station, school, market")
# statement, its contrary, question
SAID = """Dogs are allowed in {p}|Dogs are not allowed in {p}|are dogs allowed in {p}
Visitors may take photos in {p}|Visitors may not take photos in {p}|may visitors take photos in {p}
{p} is open on Sundays|{p} is not open on Sundays|is {p} open on sundays
{p} belongs to the city|{p} does not belong to the city|does {p} belong to the city
Food is sold in {p}|Food is not sold in {p}|is food sold in {p}
Children have to pay in {p}|Children do not have to pay in {p}|do children have to pay in {p}
{p} has a parking lot|{p} does not have a parking lot|does {p} have a parking lot
People can rent a bicycle at {p}|People can not rent a bicycle at {p}|can people rent a bicycle at {p}
{p} was damaged in the war|{p} was not damaged in the war|was {p} damaged in the war
Concerts are held in {p}|Concerts are not held in {p}|are concerts held in {p}
{p} is heated in winter|{p} is not heated in winter|is {p} heated in winter
Smoking is allowed in {p}|Smoking is not allowed in {p}|is smoking allowed in {p}
{p} has an elevator|{p} does not have an elevator|does {p} have an elevator
{p} was painted last year|{p} was not painted last year|was {p} painted last year
Buses stop at {p}|Buses do not stop at {p}|do buses stop at {p}
A ticket is needed for {p}|A ticket is not needed for {p}|is a ticket needed for {p}
{p} is famous abroad|{p} is not famous abroad|is {p} famous abroad
{p} has a garden|{p} does not have a garden|does {p} have a garden
Guides work at {p}|Guides do not work at {p}|do guides work at {p}
{p} can be reached by train|{p} can not be reached by train|can {p} be reached by train"""
# statement, question, values
VALUED = """{p} is painted {v}|is {p} painted {v}|red, green, blue, white, yellow
{p} was built of {v}|was {p} built of {v}|stone, brick, wood, steel, concrete
{p} closes in {v}|does {p} close in {v}|January, March, June, August, October
{p} is run by a {v}|is {p} run by a {v}|lawyer, doctor, teacher, priest, painter
{p} stands near the {v}|does {p} stand near the {v}|river, forest, harbor, airport, church
{p} was designed by {v}|was {p} designed by {v}|an Italian, a German, a Swede, a Turk, a Spaniard
{p} is cleaned every {v}|is {p} cleaned every {v}|Monday, Tuesday, Thursday, Friday, Saturday
{p} is known for its {v}|is {p} known for its {v}|roof, tower, gate, windows, stairs
{p} was sold to a {v}|was {p} sold to a {v}|bank, family, company, club, charity
{p} opens at {v}|does {p} open at {v}|six, seven, eight, nine, ten"""
BEFORE = (
    "Many people know this place.",
    "Here is a note from a guide book.",
    "The town is small and old.",
    "A newspaper wrote about it.",
    "This is what the sign says.",
)
AFTER = (
    "More is told in the town hall.",
    "Every guide will tell you so.",
    "Many people come each year.",
    "There is a map beside the road.",
    "It is a pleasant place for a walk.",
)


def boolq(draw: Draw, number: int) -> list[Row]:
    def rows() -> Iterator[Row]:
        said = draw.rounds([line.split("|") for line in draw.share(SAID.splitlines())])
        valued = draw.rounds([line.split("|") for line in draw.share(VALUED.splitlines())])
        while True:
            for answer in (True, False) * 3:
                yes, no, question = next(said)
                yield row(draw, yes if answer else no, question, answer)
            for answer in (True, False):
                text, question, values = next(valued)
                told, other = draw.few(listed(values), 2)
                asked = told if answer else other
                yield row(draw, text.replace("{v}", told), question.replace("{v}", asked.lower()), answer)

    return distinct(rows(), number, "question", "passage")


def row(draw: Draw, statement: str, question: str, answer: bool) -> Row:
    place = f"the {draw.one(draw.share(TOWNS))} {draw.one(draw.share(KINDS))}"
    said = statement.format(p=place)
    passage = f"{draw.one(draw.share(BEFORE))} {said[0].upper()}{said[1:]}. {draw.one(draw.share(AFTER))}"
    return {"question": question.format(p=place.lower()), "answer": answer, "passage": passage}
