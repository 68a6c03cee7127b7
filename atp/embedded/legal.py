"""The legal domain: statutes and contracts, clause types, holdings, bills with summaries.

What it is: four tasks in the manner of legal benchmarks, in sentences of this project's own.
Where it sits: drawing -> legal -> corpus. The words are in `wording/legal.toml`.
What it does NOT know: splits, tokens, other domains. Nothing here is law.
"""

from __future__ import annotations

from atp.embedded.drawing import (
    COUNTS,
    MONTHS,
    STATES,
    SURNAMES,
    Draw,
    Record,
    Task,
    article,
    company,
    dollars,
    numbered,
    sentence,
    wording,
)

_WORDS = wording("legal")
_CONTRACTS, _CLAUSES, _ROLES, _AGENCIES = _WORDS["contracts"], _WORDS["clauses"], _WORDS["roles"], _WORDS["agencies"]
CLAUSE_TYPES = tuple(_CLAUSES)
_LONG_BILL = 190  # characters of its sections, beyond which a bill gets no further section


def _statute(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    return _contract(draw) if number % 2 else _code_section(draw)


def _code_section(draw: Draw) -> tuple[Record, tuple[str, ...]]:
    term, meaning, act, document, authority, exempt, kept = draw.pick(_WORDS["regulated"])
    state, chapter, section = draw.pick(STATES), draw.whole(11, 89), draw.whole(101, 140)
    slots = {
        "d": article(document),
        "a": authority,
        "e": exempt,
        "k": kept,
        "f": dollars(draw, 50, 900, 50),
        "m": dollars(draw, 500, 9000, 500),
        "x": f"{chapter}.{section + draw.whole(1, 9)}",
        "o": draw.pick(MONTHS),
        "y": draw.whole(2021, 2039),
        "t": term,
        "T": sentence(term),
        "D": sentence(document),
    }
    parts = [
        f'In this section, "{term}" means {meaning.format(n=draw.pick(("5", "10", "20", "50")))}.',
        f"A person may not {act} in {state} without {article(document)} issued by the {authority}.",
    ]
    for provision in draw.some(_WORDS["provisions"], draw.whole(1, 3)):
        parts.append(provision.format(**slots, n=draw.pick(COUNTS)))
    lettered = "\n".join(f"({'abcdef'[i]}) {part}" for i, part in enumerate(parts))
    title = draw.pick(_WORDS["section_titles"]).format(**slots)
    return {"text": f"{state} Code § {chapter}.{section}. {title}.\n{lettered}"}, (term, state)


def _contract(draw: Draw) -> tuple[Record, tuple[str, ...]]:
    title, first, second, subject, _ = contract = draw.pick(_CONTRACTS)
    kinds = draw.some(CLAUSE_TYPES, draw.whole(2, 4))
    start, state = draw.whole(2, 14), draw.pick(STATES)
    lines = [
        f"{start}.{i + 1} {kind}. {_filled(draw.pick(_CLAUSES[kind]), draw, contract)}." for i, kind in enumerate(kinds)
    ]
    opening = draw.pick((
        f'{title} between {company(draw)} (the "{first}") and {company(draw)} (the "{second}"), made in {state}.',
        f"This {title} is made in {state} by the {first} and the {second}.",
        f"{title}. In this Agreement, the {first} provides the {subject} to the {second} in {state}.",
    ))  # fmt: skip
    return {"text": "\n".join((opening, *lines))}, (title, state)


def _filled(text: str, draw: Draw, contract: list[str]) -> str:
    """Fill a clause's slots and begin it with an upper-case letter."""
    _, first, second, subject, price = contract
    slots = {"A": f"the {first}", "B": f"the {second}", "x": subject, "p": price, "S": draw.pick(STATES)}
    figures = {"n": draw.pick((10, 14, 15, 20, 30, 45, 60, 90)), "q": draw.whole(2, 9), "s": draw.whole(2, 19)}
    return sentence(text.format(**slots, **figures, m=dollars(draw, 5000, 95000, 5000)))


def _clause(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    label = number % len(CLAUSE_TYPES)
    contract = draw.pick(_CONTRACTS)
    core = draw.pick(_CLAUSES[CLAUSE_TYPES[label]])
    lead = draw.pick(_WORDS["leads"]) if draw.chance(0.5) else ""
    text = _filled(lead + core, draw, contract) + "."
    if draw.chance(0.5):
        text += " " + _filled(draw.pick(_WORDS["tails"]), draw, contract)
    prompt = f"{contract[0]}, Section {draw.whole(2, 19)}: {text}\nClause type:\n"
    return {"prompt": prompt, "choices": list(CLAUSE_TYPES), "label": label}, (contract[0], core, lead)


def _holding(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    parties = draw.pick(_ROLES)
    doctrine, condition = draw.pick(_WORDS["doctrines"]), draw.pick(_WORDS["conditions"])
    won = number % 2 == 0
    claimant, respondent = parties
    one, two = draw.some(SURNAMES, 2)
    facts = [f"The {claimant} argued that {draw.pick(doctrine[1:])}", f"The court found that {condition[0]}"]
    if draw.chance(0.5):
        facts[0] = f"The {claimant} relied on {doctrine[0]}"
    end = draw.pick(_WORDS["won" if won else "lost"])
    opening = draw.pick((
        f"{sentence(article(claimant))} named {one} sued {article(respondent)}.",
        f"{one}, {article(claimant)}, brought a suit against {article(respondent)}.",
        f"The case was brought by {one}, {article(claimant)}, against {article(respondent)} in {draw.pick(STATES)}.",
    ))  # fmt: skip
    parts = [opening, f"{facts[0]}.", f"{facts[1]}.", f"{sentence(end)}."]
    if draw.chance(0.5):
        parts.insert(draw.whole(1, 3), draw.pick(_WORDS["backgrounds"]))
    slots = {
        "c": claimant,
        "r": respondent,
        "n": draw.pick(COUNTS),
        "i": draw.pick(STATES),
        "y": draw.whole(1941, 1959),
    }
    told = " ".join(parts).format(**slots)
    prompt = f"{one} v. {two} ({draw.whole(1961, 2024)}). {told}\nHolding:\n"
    choices = _candidates(draw, parties, doctrine[0], condition[1], won)
    label = (number // 2) % len(choices)
    return {"prompt": prompt, "choices": numbered(choices, label, draw), "label": label}, (claimant, doctrine[0])


def _candidates(draw: Draw, parties: list[str], doctrine: str, condition: str, won: bool) -> list[str]:
    """Return the right holding and four that differ from it in one or two slots."""
    doctrines, conditions = [d[0] for d in _WORDS["doctrines"]], [c[1] for c in _WORDS["conditions"]]
    form = draw.below(len(_WORDS["won_forms"]))
    strangers = draw.other(_ROLES, parties)
    wrong_doctrine, wrong_condition = draw.other(doctrines, doctrine), draw.other(conditions, condition)
    swaps = [
        (strangers, doctrine, condition, won),
        (parties[::-1], doctrine, condition, won),
        (parties, doctrine, wrong_condition, won),
        (parties, wrong_doctrine, condition, not won),
        (parties, doctrine, wrong_condition, not won),
        (parties, wrong_doctrine, wrong_condition, won),
    ]
    slots = [(parties, doctrine, condition, won), (parties, doctrine, condition, not won)]
    slots += [(parties, wrong_doctrine, condition, won), *draw.some(swaps, 2)]
    found = []
    for (claimant, respondent), under, where, recovers in slots:
        a, b = article(claimant).split()[0], article(respondent).split()[0]
        text = _WORDS["won_forms" if recovers else "lost_forms"][form]
        found.append(sentence(text.format(a=a, b=b, c=claimant, r=respondent, d=under, w=where)))
    return found


def _bill(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    (officer, department), (name, receivers, purpose) = draw.pick(_AGENCIES), draw.pick(_WORDS["measures"])
    year, first = draw.whole(2021, 2039), draw.whole(2, 95)
    last, amount = year + draw.whole(2, 9), f"${first} million"
    title = f"{name} Act of {year}"
    body = [f"This Act may be cited as the {title}."]
    if draw.chance(0.5):
        finding = draw.pick(_WORDS["findings"]).format(p=purpose, g=receivers, y=year - draw.whole(2, 15))
        body.append(f"Congress finds that {finding}.")
    body.append(f"The {officer} shall make grants to {receivers} to {purpose}.")
    slots = {
        "o": officer,
        "c": draw.other(_AGENCIES, [officer, department])[0],
        "d": 30 * draw.whole(2, 9),
        "m": dollars(draw, 100_000, 900_000, 100_000),
        "g": receivers,
        "q": draw.pick((5, 10, 20, 25, 30)),
        "n": draw.pick(COUNTS),
        "p": purpose,
        "y": year - draw.whole(2, 15),
    }
    for text in draw.some(_WORDS["bill_sections"], draw.whole(0, 2)):
        if len(" ".join(body)) < _LONG_BILL:
            body.append(text.format(**slots))
    body.append(f"There are authorized to be appropriated ${first},000,000 for each year through {last}.")
    lines = "\n".join(f"SEC. {i + 1}. {text}" for i, text in enumerate(body))
    prompt = f"{'H.R.' if number % 2 else 'S.'} {draw.whole(101, 990)}. A BILL to {purpose}.\n{lines}\nSummary:\n"
    summary = (
        f"{title}: Directs the {department} to make grants to {receivers} to {purpose}. "
        f"Authorizes {amount} a year through {last}."
    )
    return {"prompt": prompt, "completion": summary}, (department, name)


TASKS = {
    "statute": Task(2, _statute),
    "clause": Task(3, _clause),
    "holding": Task(3, _holding),
    "bill": Task(2, _bill),
}
