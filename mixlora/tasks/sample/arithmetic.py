"""Word problems in two steps, as in GSM8K: each step has its calculator mark, the last line is `#### n`.

Held out: the stories, the names and the things that are counted. The pairs of steps are the same in every part.
"""

from collections.abc import Callable, Iterator

from mixlora.tasks.sample.draw import Draw, Row, distinct, listed

COUNTED = listed(
    "apples, books, stamps, marbles, shells, cards, pencils, coins, stickers, eggs, beads, buttons, cookies, "
    "toys, balls"
)
# Fields: {x} {y} names, {t} things, {a} {b} {c} numbers.
STORIES = {
    "add, take": """{x} has {a} {t} and gets {b} more from {y}. Then {x} gives away {c}. How many {t} has {x} now?
{x} finds {a} {t} in the morning and {b} in the afternoon, but loses {c}. How many {t} are left?
A box holds {a} {t}. {x} puts in {b} more and {y} takes {c} out. How many {t} are in the box?
{x} collected {a} {t}, {y} collected {b}, and together they sold {c}. How many {t} do they still have?
There were {a} {t} on the table. {x} brought {b} others, and {c} fell to the floor. How many {t} stayed there?""",
    "times, add": """{x} buys {a} bags with {b} {t} each and has {c} {t} at home. How many {t} does {x} have in all?
{x} fills {a} boxes with {b} {t} each, and {c} {t} do not fit. How many {t} were there?
A shelf has {a} rows of {b} {t}. {x} adds {c} more. How many {t} are on the shelf?
Every one of {a} friends gives {x} {b} {t}, and {y} gives {c}. How many {t} does {x} get?
For {a} days {x} makes {b} {t} a day, and on the day after {c}. How many {t} does {x} make altogether?""",
    "times, take": """{x} sells {a} {t} for ${b} each and spends ${c} of the money. How many dollars are left?
{x} works {a} hours for ${b} an hour and pays ${c} for lunch. How many dollars does {x} keep?
{x} has {a} packs of {b} {t} and gives {c} {t} to {y}. How many {t} does {x} keep?
A farmer fills {a} baskets with {b} {t} each, but {c} {t} are bad. How many good {t} are there?
{x} saves ${b} a week for {a} weeks and then buys a gift for ${c}. How many dollars remain?""",
    "take, times": """{x} had {c} {t} and gave {b} to {y}. The rest cost ${a} each. How many dollars did {x} earn?
Of {c} tickets {b} were free, and the others cost ${a} each. How many dollars were paid?
{x} buys {c} {t}, breaks {b} and sells the rest for ${a} each. How many dollars does {x} get?
A bus has {c} seats and {b} are empty. Every passenger pays ${a}. How many dollars are paid?
{x} planned {c} days of work but was ill on {b}. Each day brought ${a}. How many dollars did {x} make?""",
    "add, times": """{x} read {b} pages and {y} read {c} pages every day. How many pages did both read in {a} days?
{x} pays ${b} for bread and ${c} for milk each week. How many dollars is that in {a} weeks?
A team of {b} girls and {c} boys got {a} {t} each. How many {t} did they get?
Each of {a} rooms has {b} chairs and {c} stools. How many seats are there in the rooms?
A meal costs ${b} and a drink ${c}. {x} orders both for {a} people. How many dollars does {x} pay?""",
}
Steps = list[tuple[str, int]]
STEPS: dict[str, Callable[[int, int, int], Steps]] = {
    "add, take": lambda a, b, c: [(f"{a}+{b}", a + b), (f"{a + b}-{c}", a + b - c)],
    "times, add": lambda a, b, c: [(f"{a}*{b}", a * b), (f"{a * b}+{c}", a * b + c)],
    "times, take": lambda a, b, c: [(f"{a}*{b}", a * b), (f"{a * b}-{c}", a * b - c)],
    "take, times": lambda a, b, c: [(f"{c}-{b}", c - b), (f"{c - b}*{a}", (c - b) * a)],
    "add, times": lambda a, b, c: [(f"{b}+{c}", b + c), (f"{b + c}*{a}", (b + c) * a)],
}


def gsm8k(draw: Draw, number: int) -> list[Row]:
    def rows() -> Iterator[Row]:
        stories = {kind: draw.rounds(draw.share(text.splitlines())) for kind, text in STORIES.items()}
        for kind in draw.rounds(sorted(STORIES)):
            a, b = draw.rng.randrange(2, 10), draw.rng.randrange(3, 13)
            # What is taken away, or taken from, must leave something.
            c = (
                b + draw.rng.randrange(2, 20)
                if kind == "take, times"
                else draw.rng.randrange(2, a + b if kind == "add, take" else 6)
            )
            x, y = draw.names(2)
            question = next(stories[kind]).format(x=x, y=y, t=draw.one(draw.share(COUNTED)), a=a, b=b, c=c)
            steps = STEPS[kind](a, b, c)
            first, last = (f"{text} = <<{text}={value}>>{value}" for text, value in steps)
            yield {"question": question, "answer": f"First, {first}.\nThen, {last}.\n#### {steps[-1][1]}"}

    return distinct(rows(), number, "question")
