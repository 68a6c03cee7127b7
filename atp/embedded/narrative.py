"""The narrative domain: short stories of one village, their morals, their titles, and what happened in one line.

What it is: four tasks over stories in plain words, with characters who keep their trade, home and companion.
Where it sits: drawing -> narrative -> corpus. The cast and the plots first, then one maker per task.
What it does NOT know: splits, tokens, other domains.

Slots of the plots: {n} the hero's name, {h} she or he, {s} her or his, {o} her or him, {t} the hero's trade, {f} the
friend's name, {g} the friend's trade, {e} the thing, {p} the place, {w} the weather, {k} a number word.
"""

from __future__ import annotations

from atp.embedded.drawing import COUNTS, Draw, Record, Task, article, numbered, sentence

# fmt: off
# name, pronouns, trade, companion
_CAST = (
    ("Ada", ("she", "her", "her"), "weaver", "a gray cat"), ("Boris", ("he", "his", "him"), "smith", "an old mule"),
    ("Clara", ("she", "her", "her"), "baker", "a brown hen"), ("Dov", ("he", "his", "him"), "fisherman", "a wet dog"),
    ("Elin", ("she", "her", "her"), "shepherd", "a black sheep"), ("Felix", ("he", "his", "him"), "miller", "a fat goose"),
    ("Greta", ("she", "her", "her"), "potter", "a tame crow"), ("Hugo", ("he", "his", "him"), "tailor", "a small mouse"),
    ("Ida", ("she", "her", "her"), "gardener", "a slow turtle"), ("Jonas", ("he", "his", "him"), "clockmaker", "an owl"),
    ("Kira", ("she", "her", "her"), "ferrywoman", "a white duck"), ("Leo", ("he", "his", "him"), "woodcutter", "a lame fox"),
    ("Mara", ("she", "her", "her"), "beekeeper", "a young goat"), ("Nils", ("he", "his", "him"), "painter", "a lazy cat"),
    ("Olga", ("she", "her", "her"), "innkeeper", "a loud parrot"), ("Paul", ("he", "his", "him"), "shoemaker", "a thin dog"),
)
_THINGS = ("a silver bell", "a red kite", "a golden key", "a wooden flute", "a blue lantern", "a copper pot",
           "a warm coat", "a glass bead", "a little boat", "a letter", "a map", "a sack of flour", "a music box",
           "a stone with a hole", "a green umbrella", "a pair of boots")
_PLACES = ("the mill", "the bridge", "the market", "the old tower", "the lake", "the forest", "the well", "the hill",
           "the harbor", "the orchard", "the cave", "the crossroads")
_WEATHERS = ("cold", "windy", "rainy", "sunny", "foggy", "quiet", "hot", "snowy")
_TIMES = ("morning", "evening", "day", "afternoon", "night in autumn", "day in spring")
# moral, title, one-line account, beats; each beat has several wordings
_PLOTS = (
    ("Honesty brings more than gold.", "The Honest {t}", "{n} found {e} and gave it back to {f}.", (
        ("{h} found {e} at {p}", "at {p} something shone in the grass, and it was {e}"),
        ("{h} could have sold it for {k} coins", "nobody had seen {o} pick it up"),
        ("but {h} knew that it belonged to {f} the {g}", "but {f} the {g} had lost it and was sad"),
        ("{n} brought it back the same day", "so {n} knocked at the door of {f} and handed it over"),
        ("{f} thanked {o} and invited {o} to supper every week", "from then on {f} trusted {o} with everything"))),
    ("Slow work is better than none.", "The Patient {t}", "{n} made {e} a little at a time for {f}.", (
        ("{f} the {g} asked for {e}", "{h} promised {e} to {f} the {g}"),
        ("the work was hard and {h} had little time", "{n} had never made such a thing before"),
        ("each day {h} did only a small part of it at {p}", "{h} worked an hour every evening at {p}"),
        ("the others at {p} laughed at how slow {h} was", "{k} weeks went by"),
        ("at last it was done, and it was the best in the village", "in the end {f} held it and could not stop smiling"))),
    ("Who asks for help is not weak.", "A Hand for the {t}", "{n} could not move {e} alone, so {f} helped.", (
        ("{n} had to carry {e} to {p}", "{e} had fallen into the mud near {p}"),
        ("{h} pulled and pushed, but it was stuck", "{h} tried {k} times alone and failed each time"),
        ("{h} was too proud to call anyone", "{h} did not want the others to see it"),
        ("when it grew dark {h} asked {f} the {g} at last", "finally {h} went and called {f} the {g}"),
        ("together they needed only a minute", "with four hands it was easy, and they both laughed"))),
    ("A lie has short legs.", "The {t} Who Lied", "{n} broke {e} of {f} and lied about it.", (
        ("{n} had borrowed {e} from {f} the {g}", "{f} the {g} had lent {o} {e}"),
        ("{h} dropped it at {p} and it broke", "at {p} it slipped from {s} hand and broke"),
        ("{h} said that a thief had taken it", "{h} told everyone that the wind had done it"),
        ("but a child had seen it all", "but the pieces were found in {s} own bag"),
        ("{n} turned red and had to pay for it", "for {k} weeks nobody believed a word from {o}"))),
    ("Those who share never go hungry.", "Supper at {p}", "{n} shared the last bread with {f}.", (
        ("{n} had only one loaf left", "there was little to eat that year"),
        ("at {p} {h} met {f} the {g}, who had eaten nothing", "{f} the {g} sat at {p} and was hungry"),
        ("{h} broke the bread in two", "{n} gave {o2} half without a word"),
        ("{k} days later {f} caught a great fish", "soon {f} had a rich harvest"),
        ("{f} brought the larger part of it to {n}", "and the first basket went to the house of {n}"))),
    ("Greed loses what it has.", "The Greedy {t}", "{n} wanted more than {e} and lost it.", (
        ("{n} got {e} as a gift from {f} the {g}", "{f} the {g} gave {o} {e}"),
        ("but {h} wanted {k} of them", "but soon one was not enough"),
        ("{h} went to {p} to get more", "{h} traded it at {p} for a promise"),
        ("on the way {h} lost the first one too", "the stranger took it and never came back"),
        ("{n} went home with empty hands", "now {h} had nothing at all and sat down to cry"))),
    ("Courage is to go although one is afraid.", "The Night at {p}", "{n} went to {p} in the dark to save {f}.", (
        ("{f} the {g} had not come back from {p}", "a cry was heard, and it was {f} the {g}"),
        ("everyone was afraid to go to {p} in the dark", "people said that a ghost lived at {p}"),
        ("the knees of {n} shook, but {h} took {e}", "{n} was afraid too, yet {h} went out with {e}"),
        ("{h} found {f} with a hurt foot", "there lay {f}, who could not get up"),
        ("{h} carried {o2} home before sunrise", "by dawn they were both safe by the fire"))),
    ("Listen before you judge.", "The Wrong Thief", "{n} blamed {f} for taking {e}, but was wrong.", (
        ("{e} was missing from the house of {n}", "{n} could not find {e}"),
        ("{h} blamed {f} the {g} at once", "{h} shouted at {p} that {f} the {g} had stolen it"),
        ("{f} wanted to explain, but {n} would not hear it", "{f} said nothing and walked away"),
        ("{k} days later it lay under {s} own bed", "then {h} saw it in the nest of a bird"),
        ("{n} was ashamed and begged {f} to forgive {o}", "{h} went to {f} with flowers and said that {h} was sorry"))),
    ("Practice makes the master.", "How the {t} Learned to Play", "{n} practiced until {f} praised {o}.", (
        ("{n} wanted to sing at {p} like {f} the {g}", "{f} the {g} sang at {p}, and {n} wished to do the same"),
        ("at first it sounded like a door", "the first try made the dogs howl"),
        ("{h} practiced every day before work", "but {h} sang to the stones for {k} months"),
        ("little by little it sounded better", "one day a bird stopped to listen"),
        ("at the feast {f} clapped the loudest", "{f} said that nobody had ever sung so well"))),
    ("A kind word opens every door.", "The Closed Gate", "{n} got past the gate at {p} by being kind to {f}.", (
        ("{f} the {g} guarded the gate at {p} and let nobody in", "at {p} the gate was shut, and {f} the {g} stood before it"),
        ("one man shouted and another offered money", "{k} people had begged in vain"),
        ("{n} only asked how {f} felt that day", "{n} brought {e} and wished {o2} a good day"),
        ("nobody had ever asked {o2} that", "the face of {f} grew soft"),
        ("the gate swung open for {n}", "{f} turned the key and let {n} in"))),
)
# fmt: on
_MORALS = tuple(plot[0] for plot in _PLOTS)


def _told(draw: Draw, plot_number: int) -> tuple[str, dict[str, str]]:
    """Tell a plot and return the story with the slots it was filled with."""
    (name, (she, her, him), trade, pet), (friend, (_, _, friend_him), craft, _) = draw.some(_CAST, 2)
    beats = _PLOTS[plot_number][3]
    thing, place, weather = draw.pick(_THINGS), draw.pick(_PLACES), draw.pick(_WEATHERS)
    slots = {
        "n": name, "h": she, "s": her, "o": him, "t": trade, "f": friend, "g": craft, "o2": friend_him, "e": thing,
        "p": place, "w": weather, "k": draw.pick(COUNTS), "a": pet,
    }  # fmt: skip
    opening = draw.pick((
        "{n} the {t} lived near {p} with {a}.", "It was a {w} {time}. {n} the {t} set out with {a}.",
        "There was once {at} named {n}, who had {a}.", "One {w} {time} {n} the {t} woke up early.",
        "In the village they still speak of {n} the {t}.",
    ))  # fmt: skip
    parts = [opening.format(**slots, time=draw.pick(_TIMES), at=article(trade))]
    parts += [sentence(draw.pick(beat).format(**slots)) + "." for beat in beats]
    if draw.chance(0.25):
        parts.insert(draw.whole(2, 4), f"{sentence(pet.replace('a ', 'the ', 1).replace('an ', 'the ', 1))} looked on.")
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
    completion = sentence(_PLOTS[plot][2].format(**slots))
    return {"prompt": text + "\nIn short:\n", "completion": completion}, _key(plot, slots)


def _title(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    label = number % 4
    plot = draw.below(len(_PLOTS))
    text, slots = _told(draw, plot)
    wrong_plot = draw.other(range(len(_PLOTS)), plot)
    stranger = draw.other([trade for _, _, trade, _ in _CAST], slots["t"])
    elsewhere = draw.other(_PLACES, slots["p"])
    named = _PLOTS[plot][1] + ": A Story of {n}"
    misled = {**slots, "t": stranger, "p": elsewhere, "n": draw.other([row[0] for row in _CAST], slots["n"])}
    forms = [named.format(**slots), named.format(**misled)]
    other = _PLOTS[wrong_plot][1] + ": A Story of {n}"
    forms += [other.format(**slots), other.format(**misled)]
    choices = numbered([_capitals(form) for form in forms], label, draw)
    return {"prompt": text + "\nTitle:\n", "choices": choices, "label": label}, _key(plot, slots)


def _capitals(title: str) -> str:
    small = {"the", "a", "of", "to", "at", "for", "who"}
    words = title.split()
    return " ".join(w if w in small and i else sentence(w) for i, w in enumerate(words))


TASKS = {
    "story": Task(4, _story),
    "moral": Task(2, _moral),
    "title": Task(2, _title),
    "gist": Task(2, _gist),
}
