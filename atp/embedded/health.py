"""The health domain: clinic notes, study abstracts with a question, patients' letters, statements about a patient.

What it is: four tasks in the manner of biomedical benchmarks, in sentences of this project's own.
Where it sits: drawing -> health -> corpus. The words are in `wording/health.toml`.
What it does NOT know: splits, tokens, other domains. Nothing here is medical advice, and the drugs are invented.
"""

from __future__ import annotations

from typing import Any

from atp.embedded.drawing import (
    COUNTS,
    MONTHS,
    SURNAMES,
    TOWNS,
    Draw,
    Record,
    Task,
    article,
    listed,
    person,
    sentence,
    wording,
)

_WORDS = wording("health")
_AILMENTS, _JOBS, _DRUGS = _WORDS["ailments"], _WORDS["jobs"], _WORDS["drugs"]
_THERAPIES = _WORDS["therapies"] + _DRUGS[:6]
_ANSWERS = ("yes", "no", "maybe")
_AILMENT_NAMES = tuple(row[0] for row in _AILMENTS)


def _note(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    row = draw.pick(_AILMENTS)
    job = draw.pick(_JOBS)
    return (_leaflet if number % 3 == 2 else _visit)(draw, row, job)


def _visit(draw: Draw, row: list[Any], job: str) -> tuple[Record, tuple[str, ...]]:
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


def _leaflet(draw: Draw, row: list[Any], job: str) -> tuple[Record, tuple[str, ...]]:
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
    therapy, group, (effect, outcome) = (
        draw.pick(_THERAPIES),
        draw.pick(_WORDS["groups"]),
        draw.pick(_WORDS["outcomes"]),
    )
    slots = {"t": therapy, "o": outcome, "p": draw.whole(31, 69), "q": draw.whole(4, 29)}
    result = draw.pick(_WORDS["results"][_ANSWERS[label]]).format(**slots, k=draw.pick(COUNTS), d=draw.whole(1, 9))
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
    prompt = f"{methods} {sentence(result)}. {aside}".rstrip() + f"\nCan {therapy} {effect} in {group}?\n"
    return {"prompt": prompt, "choices": list(_ANSWERS), "label": label}, (therapy, group)


def _question(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    told, short = draw.pick(_WORDS["asked"])
    drug, ailment = draw.pick(_DRUGS), draw.pick(_AILMENT_NAMES)
    name, *_ = person(draw)
    job = draw.pick(_JOBS)
    slots = {"n": name, "w": draw.pick(TOWNS), "j": job, "aj": article(job), "y": draw.whole(21, 79)}
    told_first = draw.pick((
        f"For {draw.pick(COUNTS)} months I have taken {drug} against {ailment}.",
        f"My doctor found that I have {ailment} and gave me {drug}.",
        f"I have {ailment}, and since {draw.pick(MONTHS)} my medicine is {drug}.",
    ))  # fmt: skip
    parts = [draw.pick(_WORDS["openings"]).format(**slots), told_first]
    if draw.chance(0.5):
        parts.append(f"Before that I had {draw.other(_DRUGS, drug)}, which did nothing.")
    parts += [sentence(told) + ".", draw.pick(_WORDS["closings"]).format(**slots)]
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
