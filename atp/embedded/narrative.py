"""The narrative domain: short stories of one village, their morals, their titles, and what happened in one line.

What it is: four tasks over stories in plain words, with characters who keep their trade, home and companion.
Where it sits: drawing -> narrative -> corpus. The cast and the plots are in `wording/narrative.toml`.
What it does NOT know: splits, tokens, other domains.
"""

from __future__ import annotations

from atp.embedded.drawing import COUNTS, Draw, Record, Task, article, numbered, sentence, wording

_WORDS = wording("narrative")
_CAST, _PLACES, _PLOTS = _WORDS["cast"], _WORDS["places"], _WORDS["plots"]
_MORALS = [plot["moral"] for plot in _PLOTS]


def _told(draw: Draw, plot_number: int) -> tuple[str, dict[str, str]]:
    """Tell a plot and return the story with the slots it was filled with."""
    (name, (she, her, him), trade, pet), (friend, (_, _, friend_him), craft, _) = draw.some(_CAST, 2)
    beats = _PLOTS[plot_number]["beats"]
    thing, place, weather = draw.pick(_WORDS["things"]), draw.pick(_PLACES), draw.pick(_WORDS["weathers"])
    the_pet = "the " + pet.split(" ", 1)[1]
    slots = {
        "n": name, "h": she, "s": her, "o": him, "t": trade, "f": friend, "g": craft, "o2": friend_him, "e": thing,
        "p": place, "w": weather, "k": draw.pick(COUNTS), "a": pet, "a_": the_pet,
    }  # fmt: skip
    opening = draw.pick((
        "{n} the {t} lived near {p} with {a}.", "It was a {w} {time}. {n} the {t} set out with {a}.",
        "There was once {at} named {n}, who had {a}.", "One {w} {time} {n} the {t} woke up early.",
        "In the village they still speak of {n} the {t}.",
    ))  # fmt: skip
    parts = [opening.format(**slots, time=draw.pick(_WORDS["times"]), at=article(trade))]
    parts += [sentence(draw.pick(beat).format(**slots)) + "." for beat in beats]
    if draw.chance(0.25):
        parts.insert(draw.whole(2, 4), f"{sentence(the_pet)} looked on.")
    return " ".join(parts), slots


def _key(plot_number: int, slots: dict[str, str]) -> tuple[str, ...]:
    return str(plot_number), slots["n"], slots["f"]


def _story(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    plot = draw.below(len(_PLOTS))
    text, slots = _told(draw, plot)
    if draw.chance(0.5):
        text += f" {draw.pick(('As they say in the village:', 'Remember:', 'And so it is:'))} {_MORALS[plot]}"
    return {"text": text}, _key(plot, slots)


def _moral(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    plot = number % len(_PLOTS)
    text, slots = _told(draw, plot)
    others = draw.some([moral for moral in _MORALS if moral != _MORALS[plot]], 4)
    label = draw.below(5)
    choices = numbered([_MORALS[plot], *others], label, draw)
    return {"prompt": text + "\nMoral:\n", "choices": choices, "label": label}, _key(plot, slots)


def _gist(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    plot = draw.below(len(_PLOTS))
    text, slots = _told(draw, plot)
    completion = sentence(_PLOTS[plot]["gist"].format(**slots))
    return {"prompt": text + "\nIn short:\n", "completion": completion}, _key(plot, slots)


def _title(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    label = number % 4
    plot = draw.below(len(_PLOTS))
    text, slots = _told(draw, plot)
    wrong_plot = draw.other(range(len(_PLOTS)), plot)
    stranger = draw.other([trade for _, _, trade, _ in _CAST], slots["t"])
    elsewhere = draw.other(_PLACES, slots["p"])
    named = _PLOTS[plot]["title"] + ": A Story of {n}"
    misled = {**slots, "t": stranger, "p": elsewhere, "n": draw.other([row[0] for row in _CAST], slots["n"])}
    forms = [named.format(**slots), named.format(**misled)]
    other = _PLOTS[wrong_plot]["title"] + ": A Story of {n}"
    forms += [other.format(**slots), other.format(**misled)]
    choices = numbered([_capitals(form) for form in forms], label, draw)
    return {"prompt": text + "\nTitle:\n", "choices": choices, "label": label}, _key(plot, slots)


def _capitals(title: str) -> str:
    small = {"the", "a", "of", "to", "at", "for", "in", "who"}
    words = title.split()
    return " ".join(w if w in small and i else sentence(w) for i, w in enumerate(words))


TASKS = {
    "story": Task(4, _story),
    "moral": Task(2, _moral),
    "title": Task(2, _title),
    "gist": Task(2, _gist),
}
