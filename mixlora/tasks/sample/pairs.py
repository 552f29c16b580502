"""Questions with two options: everyday goals as in PIQA, blanks with two candidates as in WinoGrande.

PIQA: which tool serves a goal. The tools stand in every part, each is right as often as it is wrong. Held out: the
goals and the sentences around goal and tool.

WinoGrande: a cue after the blank fits one of two names or things. Every sentence can have either cue, so only the cue
decides. Held out: names, things and sentences.
"""

from collections.abc import Iterator

from mixlora.tasks.sample.draw import Draw, Row, distinct, listed, sentence

GOALS = {
    "knife": (
        "slice a loaf of bread, cut a tomato in half, chop an onion, carve a roast turkey, "
        "cut a cake into pieces, dice some carrots, cut up an apple, slice a cucumber, "
        "cut cheese for a sandwich, split a melon"
    ),
    "sponge": (
        "wash the dirty dishes, wipe up spilled milk, scrub the bathtub, clean a greasy pan, wash the car, "
        "wipe the kitchen table, soak up a puddle of juice, clean the sink, scrub a stained plate, wash a window"
    ),
    "pen": (
        "sign a letter, write down a phone number, fill in a form, write a shopping list, address an envelope, "
        "take notes in class, write a postcard, draw a small sketch, do a crossword puzzle, write a check"
    ),
    "hammer": (
        "drive a nail into a board, nail a picture to the wall, knock a wooden peg into place, "
        "pound a tent stake into the ground, fix loose nails in a fence, break a brick, nail down a floor board, "
        "put together a wooden crate with nails, crack a coconut, flatten a bent nail"
    ),
    "needle": (
        "sew on a button, mend a torn shirt, hem a pair of pants, stitch a patch on jeans, "
        "sew up a hole in a sock, repair a ripped seam, stitch a quilt, embroider a flower on cloth, "
        "sew a costume, close the tear in a teddy bear"
    ),
    "shovel": (
        "dig a hole for a tree, clear snow off the driveway, move a pile of sand, dig a ditch, "
        "fill in a hole with dirt, dig up potatoes, scoop gravel into a cart, dig a garden pond, "
        "bury a box in the yard, turn over the soil"
    ),
    "broom": (
        "sweep the kitchen floor, gather dust on the porch, sweep leaves off the steps, "
        "collect crumbs from the floor, clear sawdust from a workshop floor, sweep up broken glass, "
        "get cobwebs off the ceiling, sweep the sidewalk, tidy the floor of a barber shop, sweep out the garage"
    ),
    "ruler": (
        "draw a straight line, measure the width of a book, find how long a pencil is, "
        "mark every inch on a strip of paper, check the length of a card, measure a leaf, "
        "find the height of a cup, draw a perfect square, measure the side of a box, find how wide a photo is"
    ),
    "towel": (
        "dry your hair after a shower, dry wet hands, rub a wet dog dry, dry off after swimming, dry your face, "
        "wrap up after a bath, dry your feet at the beach, pat a washed baby dry, dry your back after the pool, "
        "wipe the sweat off after sport"
    ),
    "oven": (
        "bake a cake, roast a chicken, bake cookies, bake a frozen pizza, bake bread, roast a leg of lamb, "
        "bake a pie, bake potatoes, make a lasagna, bake muffins"
    ),
    "fridge": (
        "keep milk fresh, chill a bottle of juice, store leftovers overnight, keep butter from melting, "
        "cool down a pudding, keep raw fish cold, store yogurt, keep salad crisp, chill some soda, "
        "keep eggs fresh"
    ),
    "ladder": (
        "reach a high shelf, climb onto the roof, change a bulb on a high ceiling, get a kite out of a tree, "
        "clean the roof gutters, pick apples from a tall tree, hang a banner high up, paint the top of a wall, "
        "get up to the attic, rescue a cat from a tree"
    ),
}
ASKED = """How do you {g}?
To {g},
How can I {g}?
What is needed to {g}?
How would somebody {g}?
What helps you to {g}?
In order to {g},"""
USED = ("use the {t}.", "take the {t} for this.", "work with the {t}.", "get the {t} and begin.", "reach for the {t}.")
FIT = """The {x} did not fit into the {y} because the _ was too {c}.
The {x} could not go inside the {y} since the _ was too {c}.
It was impossible to put the {x} in the {y} because the _ was too {c}.
The {x} would not go into the {y} as the _ was too {c}.
Nobody could push the {x} into the {y} because the _ was too {c}.
We could not get the {x} into the {y} because the _ was too {c}.
The {x} was not able to fit in the {y} since the _ was too {c}."""
HELP = """{x} asked {y} for help with the {o} because _ {c}.
{x} wanted advice from {y} about the {o} because _ {c}.
{x} needed the help of {y} with the {o} since _ {c}.
{x} begged {y} to help with the {o} as _ {c}.
{x} went to {y} with questions about the {o} because _ {c}.
{x} let {y} explain the {o} because _ {c}.
{x} called {y} about the {o} since _ {c}."""
FEED = """{x} gave {y} the {o} because _ {c}.
{x} offered {y} the {o} since _ {c}.
{x} handed {y} the {o} because _ {c}.
{x} shared the {o} with {y} because _ {c}.
{x} passed the {o} to {y} because _ {c}.
{x} brought {y} the {o} since _ {c}.
{x} left the {o} for {y} because _ {c}."""
BEAT = """{x} beat {y} in the {o} because _ {c}.
{x} was ahead of {y} in the {o} since _ {c}.
{x} won the {o} against {y} because _ {c}.
{x} finished before {y} in the {o} because _ {c}.
{x} defeated {y} in the {o} since _ {c}.
{x} did better than {y} in the {o} because _ {c}.
{x} easily passed {y} in the {o} because _ {c}."""
SMALL = listed(
    "ball, book, lamp, trophy, doll, statue, clock, guitar, mirror, kettle, chair, drum, vase, radio, pillow"
)
LARGE = listed(
    "box, bag, suitcase, drawer, crate, trunk, basket, closet, locker, chest, van, cabinet, case, cupboard, bin"
)
# sentences, what else is named, the cues that fit x and those that fit y
BLANKS = (
    (FIT, "", "big, large, huge, wide, thick, fat", "small, tiny, little, narrow, tight, shallow"),
    (
        HELP,
        "homework, engine, computer, essay, garden, recipe, puzzle, tax form, sewing, printer",
        "did not understand it, knew nothing about it, was bad at it, was a beginner",
        "understood it well, knew everything about it, was good at it, was an expert",
    ),
    (
        FEED,
        "sandwich, soup, apple, pizza, bread, cake, salad, pie, rice, cheese",
        "was already full, had too much of it, was not hungry, wanted to share",
        "was very hungry, had nothing to eat, was starving, wanted some food",
    ),
    (
        BEAT,
        "race, chess game, match, contest, marathon, quiz, tournament, final, relay, competition",
        "was strong, was in good shape, was well prepared, was very skilled",
        "was weak, was in bad shape, was badly prepared, was very clumsy",
    ),
)


def piqa(draw: Draw, number: int) -> list[Row]:
    def rows() -> Iterator[Row]:
        asked, used = draw.rounds(draw.share(ASKED.splitlines())), draw.share(USED)
        goals = {tool: draw.rounds(draw.share(listed(text))) for tool, text in GOALS.items()}
        for tool in draw.rounds(sorted(GOALS)):
            (first, second), label = draw.among(tool, [draw.one(sorted(set(GOALS) - {tool}))])
            way = draw.one(used)
            yield {
                "goal": next(asked).format(g=next(goals[tool])),
                "sol1": sentence(way.format(t=first)),
                "sol2": sentence(way.format(t=second)),
                "label": label,
            }

    return distinct(rows(), number, "goal")


def winogrande(draw: Draw, number: int) -> list[Row]:
    def rows() -> Iterator[Row]:
        texts = [draw.rounds(draw.share(text.splitlines())) for text, *_ in BLANKS]
        while True:
            for side in (0, 1):
                for (_, objects, *cues), sentences in zip(BLANKS, texts, strict=True):
                    pair, other = draw.names(2), ""
                    if objects:
                        other = draw.one(draw.share(listed(objects)))
                    else:
                        pair = [draw.one(draw.share(SMALL)), draw.one(draw.share(LARGE))]
                    (first, second), gold = draw.among(pair[side], [pair[1 - side]])
                    cue = draw.one(listed(cues[side]))
                    yield {
                        "sentence": next(sentences).format(x=pair[0], y=pair[1], o=other, c=cue),
                        "option1": first,
                        "option2": second,
                        "answer": str(gold + 1),
                    }

    return distinct(rows(), number, "sentence")
