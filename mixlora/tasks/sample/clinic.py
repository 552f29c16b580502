"""Clinical vignettes with four diagnoses, as in MedQA. They are school examples and no medical advice.

Held out: the conditions, and the sentences that introduce patient and question; the rivals come from the same part. So
what training can teach is to go from findings to a name, not which names to say.
"""

from collections.abc import Iterator

from mixlora.tasks.sample.draw import Draw, Row, distinct, listed, sentence

# Each condition with findings of which a vignette shows three.
CONDITIONS = {
    "Acute appendicitis": (
        "pain that moved to the right lower belly, loss of appetite, low fever, rebound tenderness, "
        "vomiting after the pain began"
    ),
    "Iron deficiency anemia": "fatigue, pale skin, spoon-shaped nails, a low ferritin level, a craving for ice",
    "Bacterial pneumonia": (
        "high fever, cough with rusty sputum, chest pain on breathing in, crackles over one lung, "
        "a shadow in the lower lobe on X-ray"
    ),
    "Migraine headache": (
        "one-sided throbbing headache, nausea, sensitivity to light, flashing zigzag lines before the pain, "
        "relief in a dark room"
    ),
    "Kidney stone disease": (
        "sudden flank pain that comes in waves, pain that spreads to the groin, blood in the urine, "
        "restlessness, nausea"
    ),
    "Hyperthyroidism": (
        "weight loss despite good appetite, a fast heartbeat, heat intolerance, trembling hands, "
        "a swelling in the front of the neck"
    ),
    "Acute gouty arthritis": (
        "sudden pain in the big toe, a red and swollen joint, a high uric acid level, "
        "pain after a meal of meat and beer, needle-shaped crystals in the joint fluid"
    ),
    "Bronchial asthma": (
        "wheezing, attacks of short breath at night, a tight chest after exercise, relief from an inhaler, "
        "a history of hay fever"
    ),
    "Type 1 diabetes": (
        "great thirst, frequent urination, weight loss in a child, a very high blood glucose, fruity breath"
    ),
    "Carpal tunnel syndrome": (
        "numbness of thumb and index finger, tingling hands at night, weak grip, many hours of typing, "
        "relief by shaking the hand"
    ),
    "Hypothyroidism": "weight gain, feeling cold all the time, dry skin, a slow heartbeat, constipation",
    "Heart attack": (
        "crushing chest pain, pain that spreads to the left arm, sweating, a raised troponin, raised ST segments"
    ),
    "Parkinson disease": (
        "a tremor of one hand at rest, slow movements, stiff muscles, a shuffling gait, a face with little expression"
    ),
    "Lactose intolerance": (
        "bloating after drinking milk, watery stools after ice cream, cramps after dairy foods, "
        "no complaints on a milk-free diet, gas after eating cream"
    ),
    "Bacterial meningitis": (
        "stiff neck, high fever, severe headache, confusion, many white cells in the spinal fluid"
    ),
    "Multiple sclerosis": (
        "blurred vision in one eye that got better, numb legs some months later, "
        "bright spots in the white matter of the brain, an electric feeling on bending the neck, "
        "weakness that comes and goes"
    ),
    "Acute pancreatitis": (
        "upper belly pain that spreads to the back, a very high lipase, heavy drinking, vomiting, "
        "pain that eases on leaning forward"
    ),
    "Rheumatoid arthritis": (
        "morning stiffness for two hours, swollen finger joints on both hands, "
        "antibodies against citrullinated proteins, fatigue, nodules at the elbows"
    ),
    "Allergic rhinitis": (
        "sneezing in spring, itchy eyes, a clear runny nose, complaints after contact with pollen, "
        "pale swollen nasal lining"
    ),
    "Pulmonary embolism": (
        "sudden shortness of breath, a swollen calf, a long flight some days ago, chest pain on breathing in, "
        "coughing up blood"
    ),
    "Chickenpox infection": (
        "an itchy rash with blisters, spots at different stages, mild fever in a child, "
        "contact with a sick classmate, crusts on the scalp"
    ),
    "Reflux disease": (
        "burning behind the breastbone, a sour taste in the mouth, complaints on lying down, "
        "relief from antacids, hoarseness in the morning"
    ),
    "Osteoarthritis": (
        "knee pain on climbing stairs, pain that is worse in the evening, a narrow joint space on X-ray, "
        "brief stiffness after rest, bony knobs at the finger joints"
    ),
    "Urinary tract infection": (
        "burning on urination, frequent need to urinate, cloudy urine, bacteria in the urine, pain above the pubic bone"
    ),
    "Celiac disease": (
        "diarrhea after eating bread, weight loss, antibodies against transglutaminase, "
        "flat villi in the small bowel, relief on a diet without wheat"
    ),
}
OPENINGS = """A {age}-year-old {who} comes to the physician because of {first}. There is also {second} and {third}.
A {age}-year-old {who} reports {first}. The examination shows {second} and {third}.
A {age}-year-old {who} has had {first} together with {second}. The doctor also notes {third}.
A {who} aged {age} is seen in the clinic with {first}, {second} and {third}.
The chart of a {age}-year-old {who} mentions {first}, {second} and also {third}.
Because of {first}, a {age}-year-old {who} sees a doctor, who also finds {second} and {third}.
An ambulance brings a {age}-year-old {who} with {first}, {second} and {third}."""
ASKS = (
    "Which of the following is the most likely diagnosis?",
    "What is the most likely diagnosis?",
    "Which condition explains these findings best?",
    "Which diagnosis fits best?",
    "What is the most likely cause of these findings?",
)
PEOPLE = listed("man, woman, teacher, nurse, student, farmer, lawyer, cook, driver, clerk")
CHILDREN = {"Type 1 diabetes", "Chickenpox infection"}


def medqa(draw: Draw, number: int) -> list[Row]:
    findings = {name: listed(text) for name, text in draw.share(list(CONDITIONS.items()))}

    def rows() -> Iterator[Row]:
        openings, asks = draw.rounds(draw.share(OPENINGS.splitlines())), draw.rounds(draw.share(ASKS))
        for name in draw.rounds(sorted(findings)):
            shown = draw.few(findings[name], 3)
            age = draw.rng.randrange(6, 15) if name in CHILDREN else draw.rng.randrange(23, 79)
            who = draw.one(("boy", "girl")) if name in CHILDREN else draw.one(draw.share(PEOPLE))
            told = next(openings).format(age=age, who=who, first=shown[0], second=shown[1], third=shown[2])
            options, gold = draw.among(name, draw.few(sorted(set(findings) - {name}), 3))
            yield {
                "question": f"{sentence(told)} {next(asks)}",
                "answer": name,
                "options": dict(zip("ABCD", options, strict=True)),
                "meta_info": "step1",
                "answer_idx": "ABCD"[gold],
                "metamap_phrases": shown,
            }

    return distinct(rows(), number, "question")
