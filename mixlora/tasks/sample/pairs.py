"""Questions with two options: everyday goals as in PIQA, blanks that one of two things fits as in WinoGrande.

PIQA: which tool serves a goal. The tools stand in every part, each is right as often as it is wrong. Held out: the
goals and the sentences around goal and tool.

WinoGrande: the sentence tells what kind of thing the blank is, and one of the two things it names is of that kind. Any
kind is asked for against any other, so only the kind decides. Held out: things and sentences.
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
TOLD = """We kept the {x} away from the {y} because the _ was {c}.
Somebody moved the {x} but not the {y} because the _ was {c}.
The {x} and the {y} lay side by side, and the _ was {c}.
She looked at the {x} and then at the {y}, and the _ was {c}.
They talked about the {x} and the {y} since the _ was {c}.
He chose the {x} and not the {y} because the _ was {c}.
After the {x} came the {y}, and only the _ was {c}.
Nobody saw the {x} near the {y}, though the _ was {c}.
One took the {x}, one took the {y}, and the _ was {c}.
The {x} was no match for the {y} since the _ was {c}."""
KINDS = {
    "an animal": "dog, horse, cow, tiger, rabbit, lion, sheep, monkey, elephant, wolf",
    "a fruit": "banana, apple, peach, mango, cherry, pear, grape, orange, plum, pineapple",
    "a tool": "hammer, saw, wrench, drill, chisel, screwdriver, axe, shovel, file, pair of pliers",
    "a vehicle": "car, truck, bus, train, bicycle, motorcycle, van, tractor, scooter, taxi",
    "a musical instrument": "piano, guitar, violin, drum, flute, trumpet, cello, harp, clarinet, banjo",
    "a piece of clothing": "shirt, jacket, skirt, coat, sweater, dress, hat, scarf, glove, sock",
    "a piece of furniture": "table, chair, sofa, desk, bed, bookcase, wardrobe, bench, armchair, stool",
    "a vegetable": "carrot, onion, cabbage, potato, spinach, cucumber, lettuce, broccoli, turnip, celery",
    "a drink": "coffee, lemonade, beer, wine, tea, milk, juice, cocoa, soda, whiskey",
    "a building": "church, school, hotel, hospital, castle, library, theater, barn, museum, factory",
}


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
        told, kinds = draw.rounds(draw.share(TOLD.splitlines())), draw.rounds(sorted(KINDS))
        while True:
            # What is asked for is named first as often as last.
            for named_first in (True, False):
                kind = next(kinds)
                other = draw.one(sorted(set(KINDS) - {kind}))
                right, wrong = (draw.one(draw.share(listed(KINDS[each]))) for each in (kind, other))
                (first, second), gold = draw.among(right, [wrong])
                x, y = (right, wrong) if named_first else (wrong, right)
                yield {
                    "sentence": next(told).format(x=x, y=y, c=kind),
                    "option1": first,
                    "option2": second,
                    "answer": str(gold + 1),
                }

    return distinct(rows(), number, "sentence")
