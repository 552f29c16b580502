"""Domains of purposes (see `facts`): what parts of a body, things in the house and jobs are good for."""

from mixlora.tasks.sample.facts import domain

BODIES = domain(
    "adaptation",
    """An animal that has {x} can use this to
{X} helped an animal of long ago to
Some animals are born with {x}, which lets them
The reason why an animal has {x} is to
With {x} an animal is able to
Nature has given certain animals {x} so that they may
A creature depends on {x} when it has to
It is because of {x} that some animals can
Over many generations animals developed {x} to
Without {x} certain animals could not
A wild animal with {x} is able to
One good thing about {x} is that an animal can""",
    {
        "keep warm": (
            "thick fur, a layer of blubber, soft down feathers, a woolly coat, a heavy winter coat, "
            "a furry skin, a thick layer of fat, long shaggy hair, a dense undercoat, fluffy feathers, "
            "a wooly undercoat, a double layer of fur"
        ),
        "swim fast": (
            "fins, webbed feet, flippers, a broad tail fin, a paddle-shaped tail, a body shaped like a torpedo, "
            "strong fins, feet like paddles, two side fins, a powerful tail fin, strong swimming legs, "
            "broad flat feet for paddling"
        ),
        "fly high": (
            "wings, feathered wings, light hollow bones, flight feathers, strong wing muscles, a wide wingspan, "
            "leathery wings, large flapping wings, long wing feathers, wide thin wings, a pair of wings, "
            "broad wings"
        ),
        "hide well": (
            "camouflage, skin that changes color, spots that match the leaves, a body like a twig, "
            "the color of sand, stripes that blend in with grass, fur as white as snow, "
            "wings that look like bark, a leaf-like shape, colors like those of the ground, "
            "brown speckles like dead leaves, skin like the bark of a tree"
        ),
        "kill prey": (
            "sharp fangs, curved claws, a poisonous bite, powerful jaws, sharp teeth, strong talons, venom, "
            "deadly claws, long sharp teeth, a hooked beak for tearing meat, teeth like knives, a deadly sting"
        ),
    },
)
GEAR = domain(
    "everyday things",
    """A person takes {a} along in order to
Somebody buys {a} because it helps to
{A} is the right thing for people who want to
Without {a} it would be harder to
When you need to use {a}, you want to
A family keeps {a} at home so that they can
The purpose of {a} is to
You should get {a} if you would like to
The inventor of {a} wanted to help people to
A traveler is glad to have {a} because it is time to
{A} lets people
Nobody needs {a} unless they have to""",
    {
        "stay dry": (
            "umbrella, raincoat, waterproof jacket, rain hat, rain poncho, pair of rubber boots, "
            "waterproof tent, rain cape, water-resistant coat, garden canopy for rain, plastic rain cover, "
            "folding umbrella"
        ),
        "stay warm": (
            "scarf, wool hat, heavy blanket, winter coat, pair of mittens, thick sweater, pair of wool socks, "
            "fur coat, hot water bottle, sleeping bag, woolen shawl, padded jacket"
        ),
        "see at night": (
            "flashlight, lantern, headlamp, torch, candle, bedside lamp, bicycle light, oil lamp, night lamp, "
            "street lamp, pocket lamp, miner's lamp"
        ),
        "tell the time": (
            "watch, wall clock, alarm clock, sundial, wristwatch, pocket watch, grandfather clock, "
            "digital clock, kitchen clock, church clock, stopwatch, tower clock"
        ),
        "cross the water": (
            "boat, canoe, ferry, raft, kayak, rowboat, sailboat, ship, motorboat, bridge, dinghy, fishing boat"
        ),
    },
)
DUTIES = domain(
    "duties",
    """{A} gets up early every day to
Because of the job, {a} knows how to
{A} was hired to
The work of {a} is to
We are glad to have {a}, whose job is to
Children who dream of becoming {a} would like to
It takes years until {a} has learned to
People pay {a} to
One thing that {a} does very well is to
In a small town {a} is needed to
{A} has to be good at the task, which is to
For many years {a} has been proud to""",
    {
        "make food": (
            "baker, cook, chef, pizza maker, pastry cook, butcher, kitchen helper, grill cook, confectioner, "
            "sushi chef, sandwich maker, candy maker"
        ),
        "heal the sick": (
            "doctor, nurse, surgeon, physician, pharmacist, heart specialist, healer, children's doctor, "
            "eye doctor, hospital worker, medic, family doctor"
        ),
        "teach pupils": (
            "teacher, professor, math teacher, school principal, tutor, language teacher, history teacher, "
            "art teacher, instructor, kindergarten teacher, substitute teacher, schoolmaster"
        ),
        "protect people": (
            "policeman, firefighter, guard, soldier, lifeguard, police officer, security guard, bodyguard, "
            "sheriff, coast guard, night watchman, fireman"
        ),
        "play music": (
            "pianist, drummer, guitarist, violinist, trumpet player, organist, flute player, fiddler, cellist, "
            "harpist, bass player, jazz musician"
        ),
    },
)
