"""The finance domain: filings with consistent figures, statements with a tone, tables told in a sentence.

What it is: four tasks in the manner of financial benchmarks, in sentences of this project's own.
Where it sits: drawing -> finance -> corpus. The words are in `wording/finance.toml`.
What it does NOT know: splits, tokens, other domains. Every company is invented.
"""

from __future__ import annotations

from atp.embedded.drawing import (
    COUNTS,
    MONTHS,
    ROOTS,
    STATES,
    SURNAMES,
    TOWNS,
    TRADES,
    Draw,
    Record,
    Task,
    company,
    listed,
    sentence,
    wording,
)

_WORDS = wording("finance")
_LINES, _RISKS, _UP, _DOWN = _WORDS["lines"], _WORDS["risks"], _WORDS["up"], _WORDS["down"]
_QUARTERS = ("first", "second", "third", "fourth")
_TONES = ("positive", "negative", "neutral")


def _filing(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    return _risk_factor(draw) if number % 3 == 2 else _discussion(draw)


def _change(draw: Draw, low: int, high: int) -> tuple[int, int, int]:
    """Return a figure of a year, a percentage, and the figure of the year before, which agree exactly."""
    before = draw.whole(low, high, 20)
    percent = draw.pick((5, 10, 15, 20, 25, 30, 40, 50))
    return before + before * percent // 100, percent, before


def _discussion(draw: Draw) -> tuple[Record, tuple[str, ...]]:
    root, trade = draw.pick(ROOTS), draw.pick(TRADES)
    year, quarter = draw.whole(2019, 2035), draw.pick(_QUARTERS)
    line, good = draw.pick(_LINES)
    segment, other = draw.some(_WORDS["segments"], 2)
    now, percent, before = _change(draw, 40, 600)
    up = draw.chance(0.5)
    if not up:
        now, before = before, now
        percent = round(100 * (before - now) / before)
    cause = draw.pick(_UP if up == good else _DOWN)
    verb, noun = ("rose", "an increase") if up else ("fell", "a decrease")
    parts = [
        f"{sentence(line)} {verb} to ${now} million in the {quarter} quarter of {year} "
        f"from ${before} million a year before, {noun} of {percent} percent.",
        f"The change was mainly due to {cause} in {segment}.",
    ]
    extras = (
        f"{sentence(other)} contributed ${draw.whole(5, 35)} million, about the same as in {year - 1}.",
        f"We spent ${draw.whole(2, 30)} million on new plant and paid a dividend of {draw.whole(10, 90, 5)} cents "
        f"per share.",
        f"At the end of the quarter we held cash of ${draw.whole(10, 200, 5)} million and debt of "
        f"${draw.whole(10, 300, 5)} million.",
        f"We expect {line} to {'rise' if up else 'fall'} further in {year + 1}, helped by {cause}."
        if up == good
        else f"We do not expect {cause} to last beyond {year + 1}.",
        f"We opened {draw.pick(COUNTS)} sites in {draw.pick(STATES)} "
        f"and closed {draw.pick(COUNTS)} in {draw.pick(TOWNS)}.",
    )
    parts += draw.some(extras, draw.whole(1, 3))
    return {"text": f"{root} {trade} quarterly report. " + " ".join(parts)}, (line, segment, quarter)


def _risk_factor(draw: Draw) -> tuple[Record, tuple[str, ...]]:
    root, trade = draw.pick(ROOTS), draw.pick(TRADES)
    chosen = draw.some(_RISKS, 2)
    told = []
    for i, (_, fact, effect) in enumerate(chosen):
        fact = fact.format(p=draw.whole(12, 88), s=draw.pick(STATES))
        joint = draw.pick((", and ", ". If this changed, ", "; "))
        lead = "" if i == 0 else draw.pick(("In addition, ", "Furthermore, ", ""))
        told.append(f"{sentence(lead + fact)}{joint}{effect}.")
    names = listed([name for name, _, _ in chosen])
    closing = draw.pick((
        "We cannot promise that our insurance would cover such a loss.",
        f"In {draw.whole(2015, 2030)} such an event cost us ${draw.whole(2, 40)} million.",
        f"Our plan for such events was last reviewed in {draw.pick(MONTHS)}.",
    ))  # fmt: skip
    return {"text": f"{root} {trade} risk factors: {names}. {' '.join(told)} {closing}"}, (root, trade, names)


def _sentiment(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    label = number % len(_TONES)
    root, trade = draw.pick(ROOTS), draw.pick(TRADES)
    line, good = draw.pick(_LINES)
    about_line = draw.chance(0.6)
    if about_line:
        forms = _WORDS["flat"] if label == 2 else (_WORDS["rose"] if good == (label == 0) else _WORDS["fell"])
    else:
        forms = _WORDS[("good", "bad", "plain")[label]]
    tail = "" if about_line and label == 2 else draw.pick(_WORDS["tails"])
    slots = {
        "c": f"{root} {trade}", "l": line, "p": draw.whole(2, 60), "m": draw.pick(MONTHS), "w": draw.pick(TOWNS),
        "s": draw.pick(STATES), "x": draw.pick(SURNAMES), "q": draw.pick(_QUARTERS), "u": draw.pick(_UP),
        "v": draw.pick(_DOWN),
    }  # fmt: skip
    form = draw.pick(forms)
    text = sentence((form + tail).format(**slots))
    record = {"prompt": f"{text}.\nTone:\n", "choices": list(_TONES), "label": label}
    return record, (form, line if about_line else root)


def _table(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    firm = company(draw)
    year, quarter = draw.whole(2019, 2035), draw.whole(1, 4)
    (line, _), (second, _) = draw.some(_LINES, 2)
    line, second = line.removeprefix("the "), second.removeprefix("the ")
    now, _, before = _change(draw, 40, 600)
    if draw.chance(0.5):
        now, before = before, now
    other = draw.whole(5, 99)
    rows = [f"Company | {firm}", f"Quarter | Q{quarter} {year}", f"{sentence(line)} | ${now} million",
            f"{sentence(line)} a year before | ${before} million"]  # fmt: skip
    rows.insert(draw.whole(2, 4), f"{sentence(second)} | ${other} million")
    if draw.chance(0.5):
        rows.insert(draw.whole(2, 4), f"Employees | {draw.whole(200, 9900, 100):,}")
    moved = "rose" if now > before else "fell"
    completion = (
        f"In the {_QUARTERS[quarter - 1]} quarter of {year}, {line} of {firm} {moved} from ${before} million "
        f"to ${now} million, while {second} came to ${other} million."
    )
    return {"prompt": "\n".join(rows) + "\nIn words:\n", "completion": completion}, (line, second, str(quarter))


def _category(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    label = number % len(_RISKS)
    root, trade = draw.pick(ROOTS), draw.pick(TRADES)
    _, fact, effect = _RISKS[label]
    other_fact, other_effect = draw.other(_RISKS, _RISKS[label])[1:]
    slots = {"p": draw.whole(12, 88), "s": draw.pick(STATES)}
    form = draw.pick((
        f"{root} {trade} states: {fact}. Therefore, {effect}.",
        f"The report of {root} {trade} notes that {effect}, since {fact}.",
        f"{root} {trade} no longer says that {other_fact}, but it warns that {effect}.",
        f"At {root} {trade} it is not true that {other_effect}; rather, {fact}.",
    ))  # fmt: skip
    prompt = f"{form.format(**slots)}\nRisk:\n"
    return {"prompt": prompt, "choices": [name for name, _, _ in _RISKS], "label": label}, (root, trade)


TASKS = {
    "filing": Task(3, _filing),
    "sentiment": Task(3, _sentiment),
    "table": Task(2, _table),
    "risk": Task(2, _category),
}
