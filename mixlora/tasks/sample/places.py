"""More domains (see `facts`): where people work, where things are kept, states of matter and parts of speech."""

from mixlora.tasks.sample.facts import domain

JOBS = domain(
    "jobs",
    """Where would you most likely meet {a} at work?
{A} goes to work in the morning. Where to?
In what place does {a} usually work?
Somebody wants to talk to {a} during the day. Where should they go?
Where does {a} spend the working day?
A visitor looks for {a}. Which place is best?
If you needed {a}, to which place would you go?""",
    {
        "hospital": (
            "nurse, surgeon, doctor, midwife, physician, heart specialist, medical student, patient, "
            "children's doctor, head nurse"
        ),
        "school": (
            "teacher, principal, pupil, math teacher, student, substitute teacher, art teacher, "
            "school librarian, headmaster, class teacher"
        ),
        "restaurant": (
            "waiter, chef, cook, head waiter, pastry chef, waitress, kitchen helper, diner, pizza maker, sushi chef"
        ),
        "farm": (
            "farmer, cowherd, shepherd, milkmaid, field hand, pig keeper, tractor driver, fruit picker, "
            "chicken keeper, dairyman"
        ),
        "ship": ("sailor, captain, deckhand, ship's cook, first mate, helmsman, navigator, pirate, admiral, cabin boy"),
        "court": (
            "judge, lawyer, juror, defendant, prosecutor, attorney, court clerk, bailiff, witness, public defender"
        ),
    },
)
ROOMS = domain(
    "rooms",
    """Where would you put {a} at home?
{A} is usually found where?
Somebody bought {a}. Where does it belong?
In which place would you first look for {a}?
Where do most people keep {a}?
You notice {a} when you enter. Where are you?
After the move, {a} has to be carried to the right place. Which place is it?""",
    {
        "kitchen": (
            "frying pan, toaster, cutting board, stove, teapot, spatula, refrigerator, rolling pin, soup ladle, "
            "saucepan"
        ),
        "bathroom": (
            "toothbrush, shower curtain, bathtub, bar of soap, toilet brush, shampoo bottle, shower cap, "
            "hair dryer, towel rack, toilet seat"
        ),
        "bedroom": (
            "pillow, mattress, blanket, nightgown, bed sheet, pair of pajamas, wardrobe, alarm clock, quilt, bed"
        ),
        "garage": (
            "car, bicycle pump, spare tire, lawn mower, toolbox, motorcycle, can of motor oil, snow shovel, "
            "car jack, trailer"
        ),
        "garden": (
            "rose bush, flower bed, birdbath, sprinkler, apple tree, tomato plant, compost heap, garden gnome, "
            "hedge, greenhouse"
        ),
        "office": (
            "stapler, desk, printer, copy machine, filing cabinet, paper clip, office chair, fax machine, "
            "business report, meeting table"
        ),
    },
)
STATES = domain(
    "chemistry",
    """At room temperature, what is {x}?
Is {x} a solid, a liquid or a gas?
In which state of matter do we usually find {x}?
A teacher asks for the state of {x} on a warm day. Which answer is right?
How would you classify {x}?
Which state of matter is {x}?
A jar holds {x}. What is the state of matter inside?""",
    {
        "a solid": (
            "a brick, a coin, a spoon, a stone, a nail, a pencil, a plate, a key, a wooden board, a glass marble"
        ),
        "a liquid": "water, milk, orange juice, olive oil, vinegar, honey, lemonade, gasoline, coffee, tea",
        "a gas": "air, oxygen, helium, steam, nitrogen, carbon dioxide, hydrogen, methane, neon, water vapor",
    },
)
SPEECH = domain(
    "grammar",
    """Which part of speech is the word "{x}"?
What type of word is "{x}"?
A pupil looks up "{x}" in a dictionary. Which part of speech is given?
How does a grammar book label the word "{x}"?
Sort the word "{x}" by its part of speech.
In grammar, "{x}" counts as what?
Name the word class of "{x}".""",
    {
        "noun": "table, river, teacher, happiness, garden, friend, window, country, bread, music",
        "verb": "run, eat, sing, write, speak, bring, listen, arrive, forget, carry",
        "adjective": "happy, tall, green, lazy, beautiful, angry, narrow, gentle, famous, young",
        "adverb": "quickly, slowly, happily, softly, often, loudly, never, carefully, always, badly",
    },
)
