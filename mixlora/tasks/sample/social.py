"""Small social scenes, as in Social IQa: what a person feels or wants after an event.

The answers are few and stand in every part. Held out: the events, the names and the question sentences.
"""

from collections.abc import Iterator

from mixlora.tasks.sample.draw import Draw, Row, distinct

FEELINGS = {
    "happy": """won first prize in the contest
got a puppy for a birthday present
passed the final exam with top marks
was invited to a fun party
heard that the holidays begin tomorrow
found a ticket for a favorite band
danced all evening with good friends
got the job of a lifetime
laughed at a funny film with friends
received a big bunch of flowers""",
    "sad": """lost a beloved grandmother
buried the old family dog
said goodbye to a best friend who moved away
was left alone on a birthday
heard that a dear friend had died
cried over a broken heart
missed the family very much
found the pet bird dead in its cage
lost a wedding ring in the sea
was dropped from the school team""",
    "angry": """was insulted by a rude stranger
was cheated out of some money
found that a thief had stolen the bicycle
was blamed for something that a coworker did
saw a bully hit a small child
was lied to by a business partner
had the car scratched by a careless neighbor
was pushed out of the line by a rude man
saw somebody kick a dog
was called a liar in front of everybody""",
    "afraid": """heard strange footsteps in the dark house
met a growling bear in the woods
was chased by a man with a knife
got lost in a dark forest at night
saw a huge snake beside the bed
was caught in a small boat in a storm
stood at the edge of a high cliff
woke up because the house was on fire
was trapped in a cave with bats
heard a scream from the empty cellar""",
    "tired": """worked for twenty hours without a break
carried heavy boxes up the stairs all day
ran a whole marathon
stayed awake all night with the baby
hiked thirty miles with a heavy pack
did two shifts in a row
did not sleep for two nights
shoveled snow from morning to evening
swam across the wide lake
moved furniture for ten hours""",
}
WISHES = {
    "eat something": """had no food since yesterday
skipped breakfast and lunch
smelled fresh bread and had an empty stomach
came home starving from school
had a growling stomach all morning
fasted for a whole day
missed dinner because of a meeting
was very hungry after the game
forgot the lunch box at home
had nothing but a cracker all day""",
    "drink water": """walked through the hot desert
had a very dry mouth
got thirsty after eating salty chips
ran in the burning sun
ate a very spicy pepper
was thirsty after the long race
sweated for hours in the heat
worked on a dry and dusty road
finished a hard tennis match on a hot day
had a dry throat from talking""",
    "say sorry": """broke the neighbor's window by accident
stepped on a woman's foot
spilled coffee on a guest
forgot a friend's birthday
was rude to a kind aunt
bumped into an old man
told a lie to a good friend
damaged a borrowed book
kept everybody waiting for an hour
shouted at a child for no reason""",
    "go to sleep": """yawned all evening
could hardly keep both eyes open
came home after midnight and was worn out
nodded off in front of the television
was exhausted after the long flight
felt drowsy after the late film
was awake for far too long
lay down in bed at last
drove all night without any rest
put on pajamas late at night""",
    "see a doctor": """had a high fever and a bad cough
broke an arm on the ice
felt a sharp pain in the chest
had a rash all over the body
could not stop vomiting
cut a finger to the bone
had a terrible headache for a week
twisted an ankle badly
was bitten by a sick dog
got a painful ear infection""",
}
ASKS = {
    "feel": """How would {x} feel afterwards?
What would {x} feel as a result?
How does {x} feel now?
How would you describe how {x} feels?
How is {x} likely to feel after this?
Which feeling does {x} have now?
What are the feelings of {x} at this moment?""",
    "want": """What will {x} want to do next?
What does {x} need to do now?
What would {x} like to do after this?
Which wish does {x} have now?
What is {x} going to do next?
What is {x} likely to want afterwards?
After this, what would {x} wish to do?""",
}
WHEN = ("", "Yesterday ", "Last week ", "On Monday ", "This time ", "Once ", "In the end ")


def siqa(draw: Draw, number: int) -> list[Row]:
    def rows() -> Iterator[Row]:
        tables = [(draw.rounds(draw.share(ASKS[ask].splitlines())), table) for ask, table in SUBJECTS]
        golds = [draw.rounds(sorted(table)) for _, table in tables]
        events = [
            {answer: draw.rounds(draw.share(lines.splitlines())) for answer, lines in table.items()}
            for _, table in tables
        ]
        while True:
            for (asks, table), gold_of, event_of in zip(tables, golds, events, strict=True):
                gold, [name] = next(gold_of), draw.names(1)
                options, place = draw.among(gold, draw.few(sorted(set(table) - {gold}), 2))
                yield {
                    "context": f"{draw.one(draw.share(WHEN))}{name} {next(event_of[gold])}.",
                    "question": next(asks).format(x=name),
                    **dict(zip(("answerA", "answerB", "answerC"), options, strict=True)),
                    "label": str(place + 1),
                }

    return distinct(rows(), number, "context", "question")


SUBJECTS = (("feel", FEELINGS), ("want", WISHES))
