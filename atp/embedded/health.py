"""The health domain: clinic notes, study abstracts with a question, patients' letters, statements about a patient.

What it is: four tasks in the manner of biomedical benchmarks, in sentences of this project's own.
Where it sits: drawing -> health -> corpus. Wording tables first, then one maker per task.
What it does NOT know: splits, tokens, other domains. Nothing here is medical advice; most drugs do not exist.
"""

from __future__ import annotations

from atp.embedded.drawing import COUNTS, MONTHS, SURNAMES, TOWNS, Draw, Record, Task, article, listed, person, sentence

# fmt: off
# condition, symptoms, finding, test, remedy, advice
_AILMENTS = (
    ("asthma", ("wheezing", "a tight chest", "a cough at night"), "wheezes over both lungs", "a breathing test",
     "an inhaler twice a day", "avoid smoke and dust"),
    ("pneumonia", ("fever", "a wet cough", "chills"), "crackles at the right base", "a chest film",
     "an antibiotic for seven days", "rest and drink plenty of water"),
    ("migraine", ("throbbing headache", "nausea", "trouble with bright light"), "a normal neurological exam",
     "no imaging", "a tablet at the first sign of pain", "keep a headache diary"),
    ("anemia", ("tiredness", "pale skin", "shortness of breath on stairs"), "pale gums", "a blood count",
     "iron tablets for three months", "eat beans and red meat"),
    ("gout", ("a swollen toe", "sudden joint pain", "redness of the foot"), "a hot and tender big toe",
     "a uric acid level", "a short course of steroids", "cut down on beer and meat"),
    ("diabetes", ("thirst", "frequent urination", "weight loss"), "dry lips", "a fasting sugar level",
     "a tablet with each meal", "walk every day and eat less sugar"),
    ("high blood pressure", ("headache in the morning", "dizziness", "nosebleeds"), "a pressure of 168 over 98",
     "a heart tracing", "a water tablet each morning", "use less salt"),
    ("an ear infection", ("ear pain", "poor hearing", "fever"), "a red and bulging eardrum", "no further test",
     "ear drops for five days", "keep the ear dry"),
    ("a kidney stone", ("pain in the flank", "blood in the urine", "vomiting"), "tenderness over the left kidney",
     "a scan of the belly", "pain relief and fluids", "drink three liters a day"),
    ("eczema", ("itching", "dry patches of skin", "a rash on the elbows"), "scaly patches on both arms", "no biopsy",
     "a steroid cream at night", "use mild soap"),
    ("reflux", ("heartburn", "a sour taste", "a cough after meals"), "a soft belly", "no scope for now",
     "an acid blocker before breakfast", "do not lie down after eating"),
    ("a sprained ankle", ("ankle pain", "swelling", "trouble walking"), "bruising below the outer ankle",
     "an ankle film", "a brace for two weeks", "raise the leg and use ice"),
    ("an underactive thyroid", ("weight gain", "feeling cold", "dry hair"), "a slow pulse", "a thyroid level",
     "a thyroid tablet each morning", "take the tablet on an empty stomach"),
    ("depression", ("low mood", "poor sleep", "loss of interest"), "a flat voice", "a mood score",
     "weekly talking sessions", "keep a regular day"),
)
_DRUGS = ("Avelor", "Brenzil", "Cortavin", "Dalperone", "Elmitab", "Fenoril", "Gastrix", "Hydramol", "Indavane",
          "Jolvex", "Lantrol", "Mirapex", "Nortavan", "Ostelin", "Pravamol", "Rulitene")
_JOBS = ("teacher", "baker", "nurse", "farmer", "driver", "clerk", "carpenter", "student", "cook", "retired miner",
         "plumber", "painter", "librarian", "fisherman")
_GROUPS = ("older adults", "pregnant women", "smokers", "children with asthma", "adults with diabetes",
           "patients after heart surgery", "nurses on night shifts", "stroke survivors", "teenagers", "office workers",
           "patients with gout", "women over sixty", "premature infants", "dialysis patients")
_THERAPIES = ("vitamin D", "daily walking", "a low-salt diet", "music before surgery", "a flu shot", "yoga",
              "an early discharge plan", "telephone coaching", "fish oil", "light therapy", "a reminder app",
              "cold packs", "breathing exercises", "green tea", *_DRUGS[:6])
# outcome, how the trial words it
_OUTCOMES = (("lower blood pressure", "blood pressure"), ("reduce falls", "the number of falls"),
             ("improve sleep", "sleep quality"), ("shorten the hospital stay", "the length of stay"),
             ("relieve pain", "the pain score"), ("prevent infection", "the infection rate"),
             ("reduce weight", "body weight"), ("lower the fever", "temperature"),
             ("improve memory", "the memory score"), ("reduce anxiety", "the anxiety score"),
             ("speed up wound healing", "the time to healing"), ("reduce readmissions", "the readmission rate"))
_ANSWERS = ("yes", "no", "maybe")
_RESULTS = {
    "yes": ("{o} changed far more with {t} than without it ({p} against {q} percent, p = 0.00{d})",
            "compared with the control group, {o} was clearly better with {t} (p = 0.00{d})",
            "the benefit for {o} was large and was seen at all {k} sites",
            "{o} improved in {p} percent of those given {t} and in {q} percent of the others, a significant difference",
            "every measure, {o} included, favored {t}"),
    "no": ("{o} was the same with and without {t} ({q} against {q} percent, p = 0.{p})",
           "compared with the control group, {o} was no better with {t} (p = 0.{p})",
           "no benefit for {o} was seen at any of the {k} sites",
           "{o} improved in {q} percent of both groups, with no significant difference",
           "no measure, {o} included, favored {t}"),
    "maybe": ("{o} changed somewhat more with {t}, but the interval was wide and the trial was stopped early",
              "compared with the control group, {o} was better with {t} in men but not in women",
              "a benefit for {o} was seen at only {k} of the sites",
              "{o} improved in {p} percent of those given {t}, but nearly half of the others had left the study",
              "some measures favored {t}, while {o} gave an unclear picture"),
}
# what is asked: the letter's sentence, the short question; {d} drug, {a} ailment
_ASKED = (
    ("I would like to know what harm it can do to me", "What are the side effects of {d}?"),
    ("we hope to have a baby soon and I wonder if I should stop it", "Is {d} safe in pregnancy?"),
    ("yesterday I forgot it and did not know whether to take two", "What should be done about a missed dose of {d}?"),
    ("at a party I had two glasses of wine on top of it", "Can alcohol be taken with {d}?"),
    ("nobody told me for how many weeks to go on with it", "How long should {d} be taken?"),
    ("the pharmacy is far too dear and I need something cheaper", "Is there a cheaper alternative to {d}?"),
    ("my daughter is only four and weighs very little", "What is the dose of {d} for a child?"),
    ("my mother had the same trouble, and so did her mother", "Is {a} inherited?"),
    ("I want to know if it will ever go away for good", "Can {a} be cured?"),
    ("please tell me what I may eat and what I may not", "What diet is good for {a}?"),
    ("I am afraid that my children will catch it from me", "Is {a} contagious?"),
    ("I do not know what kind of doctor to see about it", "Which specialist treats {a}?"),
)
_OPENINGS = ("I am a {y}-year-old {j} from {w}.", "My name is {n} and I live in {w}.", "Hello, I write from {w}.",
             "Dear doctor, I am {y} and work as {aj}.", "Good morning, my name is {n}.")
_CLOSINGS = ("Thank you for your help.", "I hope to hear from you.", "Please answer soon.", "Many thanks, {n}.", "")
# fmt: on
_AILMENT_NAMES = tuple(row[0] for row in _AILMENTS)


def _note(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    row = draw.pick(_AILMENTS)
    job = draw.pick(_JOBS)
    return (_leaflet if number % 3 == 2 else _visit)(draw, row, job)


def _visit(draw: Draw, row: tuple, job: str) -> tuple[Record, tuple[str, ...]]:
    condition, symptoms, finding, test, remedy, advice = row
    name, she, her, _ = person(draw)
    history = draw.other(_AILMENT_NAMES, condition)
    first, second, third = draw.some(symptoms, 3)
    drug = draw.pick(_DRUGS)
    parts = [
        f"{name} {draw.pick(SURNAMES)}, {article(f'{draw.whole(21, 79)}-year-old {job}')}, "
        f"came in with {first} and {second} for {draw.pick(COUNTS)} days.",
        draw.pick((f"{sentence(she)} also reports {third}.", f"{sentence(she)} denies {third}.")),
        draw.pick((
            f"{sentence(her)} history includes {history}, for which {she} takes {drug}.",
            f"{sentence(she)} takes {drug} for {history} and has no allergies.",
            f"{sentence(she)} takes no medicine and had {history} as a child.",
        )),
        f"The exam shows {finding}, with a pulse of {draw.whole(60, 110, 2)} "
        f"and a temperature of {draw.whole(97, 102)}.{draw.below(10)}.",
        f"Assessment: {condition}.",
        f"Plan: {test}; {remedy}; {advice}. Return in {draw.pick(COUNTS)} weeks.",
    ]  # fmt: skip
    if draw.chance(0.3):
        parts.insert(4, f"{name} is worried about {her} work as {article(job)}.")
    return {"text": "Visit note. " + " ".join(parts)}, (condition, job)


def _leaflet(draw: Draw, row: tuple, job: str) -> tuple[Record, tuple[str, ...]]:
    condition, symptoms, finding, test, remedy, advice = row
    name, she, _, her = person(draw)
    parts = [
        f"What to know about {condition}. The common signs are {listed(draw.some(symptoms, 3))}.",
        f"A doctor may find {finding} and ask for {test}.",
        f"Most people are given {remedy}. It also helps to {advice}.",
        f"{name}, {article(job)} who has had {condition} since {draw.pick(MONTHS)}, says that {she} felt better "
        f"after {draw.pick(COUNTS)} weeks.",
        draw.pick((
            f"Ask for help at once if {symptoms[0]} gets worse.",
            f"{draw.pick(_DRUGS)} did not help {her}, and {she} no longer takes it.",
            "Do not stop a medicine without asking your doctor.",
        )),
    ]  # fmt: skip
    return {"text": " ".join(parts)}, (condition, job)


def _abstract(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    label = number % len(_ANSWERS)
    therapy, group, (effect, outcome) = draw.pick(_THERAPIES), draw.pick(_GROUPS), draw.pick(_OUTCOMES)
    slots = {"t": therapy, "o": outcome, "p": draw.whole(31, 69), "q": draw.whole(4, 29)}
    result = draw.pick(_RESULTS[_ANSWERS[label]]).format(**slots, k=draw.pick(COUNTS), d=draw.whole(1, 9))
    size, months = draw.whole(40, 900, 10), draw.pick(COUNTS)
    methods = draw.pick((
        f"We assigned {size} {group} to {therapy} or to usual care for {months} months.",
        f"In this trial, {size} {group} were followed for {months} months with or without {therapy}.",
        f"Records of {size} {group} from {draw.pick(TOWNS)} were reviewed over {months} years.",
    ))  # fmt: skip
    aside = draw.pick((
        "Side effects were mild.", "Age did not matter.", "", f"Costs rose by {draw.whole(2, 9)} percent.",
        f"{sentence(draw.pick(COUNTS))} patients withdrew.",
    ))  # fmt: skip
    prompt = f"{methods} {sentence(result)}. {aside}".rstrip() + f"\nDoes {therapy} {effect} in {group}?\n"
    return {"prompt": prompt, "choices": list(_ANSWERS), "label": label}, (therapy, group)


def _question(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    told, short = draw.pick(_ASKED)
    drug, ailment = draw.pick(_DRUGS), draw.pick(_AILMENT_NAMES)
    name, *_ = person(draw)
    job = draw.pick(_JOBS)
    slots = {"n": name, "w": draw.pick(TOWNS), "j": job, "aj": article(job), "y": draw.whole(21, 79)}
    told_first = draw.pick((
        f"For {draw.pick(COUNTS)} months I have taken {drug} against {ailment}.",
        f"My doctor found that I have {ailment} and gave me {drug}.",
        f"I have {ailment}, and since {draw.pick(MONTHS)} my medicine is {drug}.",
    ))  # fmt: skip
    parts = [draw.pick(_OPENINGS).format(**slots), told_first]
    if draw.chance(0.5):
        parts.append(f"Before that I had {draw.other(_DRUGS, drug)}, which did nothing.")
    parts += [sentence(told) + ".", draw.pick(_CLOSINGS).format(**slots)]
    completion = short.format(d=drug, a=ailment)
    return {"prompt": " ".join(parts).rstrip() + "\nShort question:\n", "completion": completion}, (drug, ailment)


_RELATIONS = ("follows", "contradicts", "unknown")


def _inference(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    label = number % len(_RELATIONS)
    row = draw.pick(_AILMENTS)
    present, absent, unsaid = draw.some(row[1], 3)
    drug, job, ailment = draw.pick(_DRUGS), draw.pick(_JOBS), draw.other(_AILMENT_NAMES, row[0])
    name, she, *_ = person(draw)
    age = draw.whole(21, 79)
    note = draw.pick((
        f"{name}, a {job} of {age}, reports {present} but no {absent.removeprefix('a ')}",
        f"{name} is {age} and works as {article(job)}; {she} has {present} and denies {absent}",
    ))  # fmt: skip
    note += draw.pick((f", and takes {drug}.", f". Past history: {ailment}. Medicine: {drug}."))
    other_drug = draw.other(_DRUGS, drug)
    statement = draw.pick((
        (f"{name} has {present}.", f"{name} takes {drug}.", f"{name} does not have {absent}.",
         f"{name} works as {article(job)}."),
        (f"{name} has {absent}.", f"{name} does not take {drug}.", f"{name} does not have {present}.",
         f"{name} takes no medicine."),
        (f"{name} has {unsaid}.", f"{name} was treated in {draw.pick(TOWNS)}.", f"{name} is allergic to {other_drug}.",
         f"{name} has {draw.whole(2, 5)} children."),
    )[label])  # fmt: skip
    prompt = f"{note}\nStatement: {statement}\nRelation:\n"
    return {"prompt": prompt, "choices": list(_RELATIONS), "label": label}, (row[0], job)


TASKS = {
    "note": Task(3, _note),
    "abstract": Task(3, _abstract),
    "question": Task(2, _question),
    "inference": Task(2, _inference),
}
