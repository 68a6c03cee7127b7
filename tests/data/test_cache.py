"""Token ids between runs: the same as without a cache, made anew whenever anything that decides them differs."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from atp import embedded
from atp.data.batches import PruningDataModule
from atp.data.encoding import Encoder, Example
from atp.data.encoding import cache as cache_module
from atp.data.encoding.cache import TokenCache, cache_key, default_folder
from atp.data.records import ChoiceRecord, CompletionRecord, Record, TextRecord
from atp.data.sources import load_embedded

RECORDS: list[Record] = [
    TextRecord("a statute of some length " * 30),
    CompletionRecord("the prompt ", "and its completion"),
    ChoiceRecord("which? ", ("this", "that"), 1),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded.base_dir())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "FEWEST_RECORDS", 1)


def same(first: list[Example], second: list[Example]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(a.input_ids, b.input_ids)
        and np.array_equal(a.labels, b.labels)
        and (a.context, a.text_bytes) == (b.context, b.text_bytes)
        for a, b in zip(first, second, strict=True)
    )


def test_what_is_read_is_what_was_encoded(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, small: None) -> None:
    plain = Encoder(tokenizer, 32)
    expected = [example for some in plain.encode(RECORDS) for example in some]
    for _ in range(2):
        encoder = Encoder(tokenizer, 32)
        assert same(TokenCache(tmp_path).examples(RECORDS, encoder, "auto"), expected)
        assert encoder.counts() == plain.counts()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 == len(list(tmp_path.iterdir()))


def test_a_second_run_does_not_tokenise(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    TokenCache(tmp_path).examples(RECORDS, Encoder(tokenizer, 32), "auto")
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("tokenised again"))
    assert TokenCache(tmp_path).examples(RECORDS, Encoder(tokenizer, 32), "auto")


def test_everything_that_decides_the_ids_is_in_the_key(tokenizer: PreTrainedTokenizerBase) -> None:
    other = AutoTokenizer.from_pretrained(embedded.base_dir())
    other.add_tokens(["completion"])
    changed: list[Record] = [*RECORDS[:2], dataclasses.replace(RECORDS[2], label=0)]  # type: ignore[call-arg]
    moved: list[Record] = [RECORDS[0], CompletionRecord("the prompt and", " its completion"), RECORDS[2]]
    keys = [
        cache_key(RECORDS, Encoder(tokenizer, 32), "auto"),
        cache_key(RECORDS, Encoder(tokenizer, 33), "auto"),
        cache_key(RECORDS, Encoder(tokenizer, 32, stride=8), "auto"),
        cache_key(RECORDS, Encoder(tokenizer, 32, close=False), "auto"),
        cache_key(RECORDS, Encoder(tokenizer, 32), "all"),
        cache_key(RECORDS, Encoder(other, 32), "auto"),
        cache_key(changed, Encoder(tokenizer, 32), "auto"),
        cache_key(moved, Encoder(tokenizer, 32), "auto"),
        cache_key(RECORDS[::-1], Encoder(tokenizer, 32), "auto"),
    ]
    assert len(set(keys)) == len(keys)
    again = AutoTokenizer.from_pretrained(embedded.base_dir())
    assert cache_key(list(RECORDS), Encoder(again, 32), "auto") == keys[0]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped", "other counts"])
def test_a_broken_file_is_made_anew_with_a_warning(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, small: None, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    expected = TokenCache(tmp_path).examples(RECORDS, Encoder(tokenizer, 32), "auto")
    (path,) = tmp_path.glob("*.safetensors")
    whole = bytearray(path.read_bytes())
    if damage == "flipped":
        whole[-1] ^= 1
    other = whole.replace(b"longest_answer", b"longest_number")
    path.write_bytes({"truncated": whole[:-9], "garbage": b"not tensors", "flipped": whole}.get(damage, other))
    with caplog.at_level(logging.WARNING):
        assert same(TokenCache(tmp_path).examples(RECORDS, Encoder(tokenizer, 32), "auto"), expected)
    assert "tokenising anew" in caplog.text
    caplog.clear()
    assert same(TokenCache(tmp_path).examples(RECORDS, Encoder(tokenizer, 32), "auto"), expected)
    assert not caplog.text


def test_a_folder_that_cannot_be_written_to_costs_only_time(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, small: None, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert TokenCache(tmp_path / "file").examples(RECORDS, Encoder(tokenizer, 32), "auto")
    assert "data.cache" in caplog.text


def test_what_was_used_longest_ago_goes_first(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "MOST_BYTES", 1)
    for length in (16, 32):
        TokenCache(tmp_path).examples(RECORDS, Encoder(tokenizer, length), "auto")
    (left,) = tmp_path.glob("*.safetensors")
    assert left.stem == cache_key(RECORDS, Encoder(tokenizer, 32), "auto")


def test_few_records_are_not_cached(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    TokenCache(tmp_path / "none").examples(RECORDS, Encoder(tokenizer, 32), "auto")
    assert not (tmp_path / "none").exists()


def test_batches_are_the_same_with_and_without(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    splits = load_embedded("legal", train=600, validation=8, test=8)

    def made(cache: TokenCache | None) -> PruningDataModule:
        return PruningDataModule(
            splits, tokenizer, max_length=96, batch_size=4, num_batches=20, seed=1, packing=True, cache=cache
        )

    plain = made(None)
    for _ in range(2):
        cached = made(TokenCache(tmp_path))
        assert cached.describe() == plain.describe()
        for ours, theirs in zip(cached.train_dataloader(), plain.train_dataloader(), strict=True):
            assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_the_environment_chooses_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATP_CACHE", "/somewhere")
    assert default_folder() == Path("/somewhere/tokens")
    monkeypatch.delenv("ATP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_folder() == Path("/caches/atp/tokens")
