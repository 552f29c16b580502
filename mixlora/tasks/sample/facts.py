"""What is common knowledge: domains of things and the kind, use, place or effect that each has.

A domain's answers are few and stand in every part; its things and its question sentences are dealt out to the parts
(see `draw`). So what training can teach is the relation; the test asks it of other things, in
other sentences.
"""

from dataclasses import dataclass

from mixlora.tasks.sample.draw import listed


@dataclass(frozen=True)
class Domain:
    """`asks`: over {x} (the thing), {a} (with its article), {X} and {A} (with a capital). `kinds`: answer -> things."""

    topic: str
    asks: tuple[str, ...]
    kinds: dict[str, list[str]]


def domain(topic: str, asks: str, kinds: dict[str, str]) -> Domain:
    return Domain(topic, tuple(asks.strip().splitlines()), {kind: listed(things) for kind, things in kinds.items()})


ANIMALS = domain(
    "biology",
    """To which group of animals does {a} belong?
{A} is a kind of what?
What kind of animal is {a}?
In which class would a zoo put {a}?
A book lists {a} among the animals of one group. Which group is it?
A child sees {a} in a film. What type of animal is it?
Scientists who sort living things count {a} as which type?""",
    {
        "mammal": "dog, otter, horse, rabbit, cow, squirrel, bear, goat, deer, mouse, lion, sheep",
        "bird": "sparrow, eagle, owl, pigeon, robin, duck, crow, parrot, swan, hawk, goose, chicken",
        "fish": "trout, salmon, tuna, carp, cod, herring, shark, sardine, pike, catfish, mackerel, goldfish",
        "insect": ("beetle, ant, bee, moth, fly, wasp, butterfly, cricket, mosquito, termite, dragonfly, grasshopper"),
        "reptile": (
            "snake, lizard, turtle, tortoise, alligator, crocodile, python, iguana, cobra, gecko, chameleon, "
            "rattlesnake"
        ),
    },
)
FOODS = domain(
    "nutrition",
    """To which food group does {x} belong?
A cook puts {x} with the other foods of its kind. Which kind is it?
What kind of food is {x}?
On a chart of food groups, where would {x} be?
Which group of foods includes {x}?
When somebody eats {x}, which type of food is eaten?
A shop keeps {x} on the shelf of one food group. Which group is it?""",
    {
        "fruit": "apple, banana, grape, peach, pear, plum, cherry, mango, orange, strawberry, melon, apricot",
        "vegetables": (
            "carrot, broccoli, spinach, cabbage, lettuce, celery, onion, cauliflower, turnip, radish, kale, beet"
        ),
        "grains": "rice, wheat, oats, barley, rye, millet, bread, pasta, corn flour, oatmeal, buckwheat, noodles",
        "dairy": (
            "milk, cheese, butter, yogurt, cream, sour cream, cottage cheese, buttermilk, ice cream, cheddar, "
            "whipped cream, mozzarella"
        ),
        "meat": "beef, pork, ham, bacon, lamb, sausage, veal, steak, mutton, salami, turkey breast, ribs",
    },
)
MATERIALS = domain(
    "materials",
    """What kind of material is {x}?
In a collection of samples, {x} has which label?
A worker handles {x} every day. What sort of material is that?
Which word describes {x}?
Of what type is the substance that we call {x}?
{X} is an example of what?
A museum has a room for each type of material. In which room is {x}?""",
    {
        "metal": "iron, copper, gold, silver, tin, steel, zinc, aluminum, lead, nickel, bronze, brass",
        "wood": "oak, pine, maple, birch, cedar, mahogany, walnut, spruce, ebony, teak, beech, plywood",
        "rock": (
            "granite, marble, limestone, sandstone, slate, basalt, shale, lava stone, flint, pumice, quartzite, gravel"
        ),
        "cloth": "cotton, wool, silk, linen, denim, velvet, satin, flannel, felt, lace, corduroy, polyester",
        "gas": ("oxygen, nitrogen, helium, hydrogen, neon, methane, carbon dioxide, steam, argon, air, propane, ozone"),
    },
)
TOOLS = domain(
    "tools",
    """What is {a} used for?
Somebody takes {a} out of a drawer. For what work is it meant?
A person who holds {a} is most likely doing what?
Why would anybody buy {a}?
For which work was {a} invented?
The main purpose of {a} is what?
A worker asks for {a}. Which work is about to begin?""",
    {
        "cutting things": (
            "knife, pair of scissors, saw, axe, razor, pair of shears, scalpel, cleaver, hatchet, sword, blade, "
            "chainsaw"
        ),
        "measuring things": (
            "ruler, thermometer, scale, stopwatch, tape measure, clock, yardstick, speedometer, balance, "
            "barometer, meter stick, timer"
        ),
        "cleaning things": (
            "broom, mop, sponge, vacuum cleaner, dishcloth, toothbrush, dustpan, bar of soap, duster, "
            "washing machine, scrubbing brush, dishwasher"
        ),
        "writing things": (
            "pen, pencil, crayon, marker, typewriter, quill, ballpoint, fountain pen, piece of chalk, felt tip, "
            "keyboard, highlighter"
        ),
        "digging holes": (
            "shovel, spade, pickaxe, garden trowel, excavator, digging machine, backhoe, auger, garden fork, "
            "mining drill, hoe, post hole digger"
        ),
    },
)
DEVICES = domain(
    "energy",
    """What does {a} mainly give off or make?
Electricity or fuel goes into {a}. What comes out of it?
People switch on {a} because they want what?
Into what does {a} turn most of its energy?
What would be missing if {a} stopped working?
{A} is a useful source of what?
Which output is expected of {a}?""",
    {
        "light": (
            "lamp, flashlight, lantern, headlight, light bulb, torch, candle, spotlight, streetlight, "
            "lighthouse, night light, chandelier"
        ),
        "sound": "radio, drum, bell, whistle, loudspeaker, trumpet, siren, guitar, violin, doorbell, horn, piano",
        "heat": (
            "heater, oven, furnace, toaster, stove, radiator, campfire, electric blanket, hot plate, boiler, "
            "fireplace, clothes iron"
        ),
        "motion": (
            "car, motor, fan, truck, train, bicycle, elevator, propeller, motorcycle, escalator, tractor, airplane"
        ),
    },
)
EFFECTS = domain(
    "physical change",
    """{x}. What happens to it?
During an experiment, {x}. Which result would a student see?
{x}. Which change is most likely?
While the class is watching, {x}. What will be observed?
{x}. What is the most likely effect?
One day {x}. How does that change it?
{x}. Which statement describes it afterwards?""",
    {
        "It gets warmer.": (
            "is set beside a fire, is put into a hot oven, lies in strong sunshine, is held over a flame, "
            "is laid on a heater, is dropped into hot soup, lies on burning sand, "
            "is covered by an electric blanket, is placed in boiling water, stays near a furnace"
        ),
        "It gets colder.": (
            "is put into a freezer, is packed in ice, is carried out into the snow, "
            "lies outdoors on a winter night, is left in a refrigerator, is dropped into icy water, "
            "is buried under snow, stays on a frozen lake, is cooled with ice cubes, is left in the cold wind"
        ),
        "It gets wet.": (
            "is left out in the rain, is dropped into a pond, is sprayed with a hose, "
            "is dipped in a bucket of water, is splashed by a wave, falls into a river, "
            "is held under a waterfall, sinks into a swimming pool, is put under a shower, falls into the sea"
        ),
        "It gets dirty.": (
            "is rolled in mud, is dropped into the dust, is dragged through soil, falls into a pile of ashes, "
            "is smeared with grease, is buried in the garden dirt, is covered with soot, lands in a muddy ditch, "
            "is rubbed with charcoal, is splattered with paint and mud"
        ),
        "It gets clean.": (
            "is scrubbed with soap, is wiped with a cloth and soap, is washed in the sink, "
            "is polished with a cloth, is brushed with soapy water, goes through the dishwasher, "
            "is rinsed and washed with shampoo, is dusted and polished, is washed by hand with detergent, "
            "is wiped with a cleaning spray"
        ),
        "It breaks.": (
            "is hit with a hammer, is dropped from a high roof, is run over by a truck, is crushed by a boulder, "
            "is thrown hard against a wall, is smashed with a rock, is stepped on by an elephant, "
            "falls from a tall tower, is struck by a heavy axe, is squeezed in a crushing machine"
        ),
    },
)
THINGS = listed(
    "plate, cup, bottle, toy car, vase, bowl, jar, tile, mirror, lamp, clock, doll, glass, watch, pot, "
    "teapot, statue, jug, camera, phone, "
    "toy train, flute, helmet, radio, picture frame, candlestick, figurine, lantern, tablet, pair of glasses"
)
