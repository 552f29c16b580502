"""Scenes to continue, as in HellaSwag: the right ending belongs to the scene, the others to other scenes.

Held out: who acts, how a scene begins, and the endings themselves. The scenes are the same in every part.
"""

from collections.abc import Iterator

from mixlora.tasks.sample.draw import Draw, Row, distinct, sentence

WHO = [
    "a man",
    "a woman",
    "a young girl",
    "an old man",
    "a boy",
    "a tall woman",
    "a person",
    "the teacher",
    "a teenager",
    "a young man",
    "the father",
    "a girl",
    "somebody",
    "the mother",
    "an old woman",
]
# activity -> how it begins (ten), how it goes on (seven)
SCENES = {
    "Cooking soup": (
        "stands in the kitchen at the stove|takes a big pot from the shelf|chops carrots and onions|reads a recipe|"
        "washes some potatoes|puts on an apron|lights the gas stove|fills a pot with water|"
        "cuts meat into cubes|peels the garlic",
        "stirs the soup with a spoon|adds salt and pepper|lets everything boil slowly|"
        "tastes it and adds some herbs|"
        "pours the broth into bowls|simmers the vegetables|serves a hot meal",
    ),
    "Washing a dog": (
        "leads a muddy dog to a tub|calls the dirty puppy|fills a tub for the dog|holds a wet dog by its collar|"
        "lifts a small dog into the bath|buys some dog shampoo|brings the poodle to the hose|"
        "takes the leash off the dog|"
        "kneels beside the furry dog|pets the hound next to a bucket",
        "rubs shampoo into its fur|rinses the fur with warm water|dries the animal with a towel|"
        "scrubs its paws and belly|combs the clean wet fur|laughs as the pet shakes itself|"
        "sprays its back with water",
    ),
    "Skiing": (
        "stands at the top of a snowy mountain|puts on ski boots|rides the chair lift up|"
        "buckles a helmet in the snow|"
        "looks down the white slope|holds two ski poles|steps into the bindings|zips up a ski jacket|"
        "gets off the lift|"
        "walks through deep snow with skis",
        "glides down the slope|turns left and right in the snow|races downhill past the trees|"
        "jumps over a small bump of snow|slides to a stop at the bottom|speeds down the icy hill|"
        "falls into the soft snow",
    ),
    "Playing the piano": (
        "sits down on the piano bench|opens the lid of the piano|looks at the sheet music|enters the concert stage|"
        "lays both hands on the keys|puts the notes on the stand|adjusts the piano stool|tunes the old piano|"
        "bows to the audience at the grand piano|practices a scale",
        "plays a gentle song|presses the keys faster and faster|moves the fingers over the keyboard|"
        "ends the melody with a loud chord|plays a sad tune|sings along with the music|performs a waltz",
    ),
    "Painting a wall": (
        "covers the floor with plastic|opens a can of blue paint|stands on a ladder by the wall|"
        "holds a paint roller|"
        "tapes the edges of the room|mixes the white paint|cleans the wall of the room|buys a wide brush|"
        "dips a brush in the bucket|pours paint into a tray",
        "rolls the color onto the wall|brushes the corners with a second coat|waits until the paint dries|"
        "paints the wall from top to bottom|coats the whole wall evenly|spreads the paint with long strokes|"
        "adds another layer of color",
    ),
    "Swimming": (
        "stands at the edge of the pool|puts on goggles and a swimsuit|climbs onto the diving board|"
        "walks to the lake with a towel|"
        "warms up beside the pool|steps down the pool ladder|puts on a bathing cap|waits on the starting block|"
        "tests the water with a toe|blows up a swim ring",
        "dives into the water|swims to the other side|kicks both legs in the water|"
        "floats on the back|comes up for air and swims on|swims several laps|splashes through the pool",
    ),
    "Gardening": (
        "kneels by the flower bed|carries seeds into the garden|puts on garden gloves|digs a hole for a rose bush|"
        "pulls weeds from the soil|brings a bag of compost|rakes the vegetable patch|pushes a wheelbarrow of earth|"
        "opens a packet of seeds|looks at the tomato plants",
        "plants the seeds in the soil|waters the young plants|covers the roots with earth|"
        "trims the bushes|puts the flowers into the ground|presses the soil around the stem|"
        "picks the ripe tomatoes",
    ),
    "Cutting hair": (
        "sits down in the barber's chair|combs the long wet hair|ties a cape round the customer's neck|"
        "enters the hair salon|"
        "takes scissors and a comb|asks for a short haircut|wets the client's hair|holds the clippers|"
        "looks in the mirror at the barber's|parts the hair with a comb",
        "trims the ends of the hair|shaves the neck|cuts the bangs short|"
        "blows the hair dry|snips off several inches|brushes the loose hair away|styles it with gel",
    ),
    "Playing basketball": (
        "dribbles the ball across the court|ties the shoes on the basketball court|waits under the hoop|"
        "runs onto the court|"
        "catches a pass near the basket|stands at the free throw line|bounces the ball|blocks another player|"
        "joins the basketball team|warms up by the hoop",
        "shoots the ball at the basket|scores two points|jumps up for a slam dunk|"
        "misses the shot and takes the rebound|passes to a team mate|throws the ball through the hoop|"
        "makes a three point shot",
    ),
    "Riding a horse": (
        "puts a saddle on the horse|leads a pony out of the stable|puts on a riding helmet|strokes the brown horse|"
        "climbs onto the stallion|holds the reins|walks the mare to the field|brushes the mane of the horse|"
        "checks the stirrups|enters the riding ring",
        "gallops across the field|rides over the fence|trots round the ring|"
        "pulls the reins to stop|canters along the trail|jumps over the hurdle on its back|"
        "pats its neck and rides on",
    ),
}


def hellaswag(draw: Draw, number: int) -> list[Row]:
    parted = {
        scene: [draw.share(text.split("|")) for text in texts] for scene, texts in SCENES.items()
    }  # beginnings, endings

    def rows() -> Iterator[Row]:
        scenes, who = draw.rounds(sorted(SCENES)), draw.rounds(draw.share(WHO))
        begins = {scene: draw.rounds(begin) for scene, (begin, _) in parted.items()}
        ends = {scene: draw.rounds(end) for scene, (_, end) in parted.items()}
        for ind, scene in enumerate(scenes):
            others = draw.few(sorted(set(SCENES) - {scene}), 3)
            endings, gold = draw.among(next(ends[scene]), [next(ends[other]) for other in others])
            begin = f"{sentence(next(who))} {next(begins[scene])}."
            yield {
                "ind": ind,
                "activity_label": scene,
                "ctx_a": begin,
                "ctx_b": "then the person",
                "ctx": f"{begin} Then the person",
                "endings": [f"{ending}." for ending in endings],
                "source_id": "sample",
                "split": "train" if 0 in draw.places else "val",
                "split_type": "indomain",
                "label": str(gold),
            }

    return distinct(rows(), number, "ctx")
