"""Encoding and batches: what is learnt, what is cut, in which order, and how a run resumes."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from atp.data.batches import PruningDataModule, encode
from atp.data.batches.loading import BatchOrder, ResumableLoader
from atp.data.encoding import IGNORED, Encoder
from atp.data.records import ChoiceRecord, CompletionRecord, Splits, TextRecord
from atp.data.sources import load_files

CORPUS = ["the court holds that the party may recover damages", "a bill to amend the act and for other purposes"] * 9


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE, by default with <s> and </s>."""
    names = special or {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    begins = "bos_token" in names
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, add_bos_token=begins, **names)


TOKENIZER = make_tokenizer()
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def learnt(example: Any) -> list[int]:
    """The ids that count in a shifted loss."""
    return [int(label) for label in example.labels[1:] if label != IGNORED]


# ---- encoding


def test_a_completion_follows_the_prompt_as_generation_sees_it() -> None:
    record = CompletionRecord("the party", " may recover")
    (example,) = encode(record, TOKENIZER, 64)
    prompt, completion = ids_of("the party"), ids_of(" may recover")
    assert example.input_ids.tolist() == [BOS, *prompt, *completion, EOS]
    assert example.labels.tolist() == [IGNORED] * (1 + len(prompt)) + [*completion, EOS]
    assert example.loss_tokens == len(completion) + 1 and example.text_bytes == len(" may recover")


def test_a_token_that_would_span_the_boundary_is_not_formed() -> None:
    assert len(ids_of("the")) == 1
    (example,) = encode(CompletionRecord("t", "he"), TOKENIZER, 64)
    assert example.input_ids.tolist() == [BOS, *ids_of("t"), *ids_of("he"), EOS]


def test_the_right_choice_is_learnt() -> None:
    record = ChoiceRecord("the court:", (" a bill", " damages", " the act"), 1)
    (example,) = encode(record, TOKENIZER, 64)
    assert learnt(example) == [*ids_of(" damages"), EOS]


def test_loss_on_all_tokens_or_completions_only() -> None:
    record = CompletionRecord("the party", " may recover")
    (example,) = encode(record, TOKENIZER, 64, loss_on="all")
    assert learnt(example) == [*ids_of("the party"), *ids_of(" may recover"), EOS]
    assert example.text_bytes == len("the party may recover")
    assert learnt(encode(TextRecord("the act"), TOKENIZER, 64)[0]) == [*ids_of("the act"), EOS]
    with pytest.raises(ValueError, match=r"data\.loss_on='completion', but 1 records are running text"):
        encode(TextRecord("the act"), TOKENIZER, 64, loss_on="completion")
    with pytest.raises(ValueError, match=r"data\.loss_on='prompt' is unknown"):
        encode(record, TOKENIZER, 64, loss_on="prompt")


@pytest.mark.parametrize("special", [{"eos_token": "</s>"}, {"bos_token": "<s>"}], ids=["no bos", "no eos"])
def test_tokenizers_without_a_special_token(special: dict[str, str]) -> None:
    tokenizer = make_tokenizer(**special)
    bos = [0] if "bos_token" in special else []
    eos = [1] if "eos_token" in special else []
    ids = tokenizer("the act", add_special_tokens=False)["input_ids"]
    (text,) = encode(TextRecord("the act"), tokenizer, 64)
    assert text.input_ids.tolist() == [*bos, *ids, *eos] and text.loss_tokens == len([*bos, *ids, *eos]) - 1
    (pair,) = encode(CompletionRecord("the act", " and"), tokenizer, 64)
    assert learnt(pair) == [*tokenizer(" and", add_special_tokens=False)["input_ids"], *eos]
    assert Encoder(tokenizer, 64).pad_id == (1 if eos else 0)


@settings(deadline=None)
@given(st.text("abc the party\n", min_size=1, max_size=300).filter(str.strip), st.integers(8, 40))
def test_windows_learn_every_token_of_a_text_exactly_once(text: str, max_length: int) -> None:
    windows = encode(TextRecord(text), TOKENIZER, max_length)
    assert [token for window in windows for token in learnt(window)] == [*ids_of(text), EOS]
    assert all(len(window.input_ids) <= max_length and window.input_ids[0] == BOS for window in windows)
    assert sum(window.loss_tokens for window in windows) == len(ids_of(text)) + 1
    assert sum(window.text_bytes for window in windows) == len(text.encode())


@settings(deadline=None)
@given(
    st.text("abcd the party\n", min_size=1, max_size=200).filter(str.strip),
    st.text("abcd the party\n", min_size=1, max_size=80).filter(str.strip),
    st.integers(8, 60),
)
def test_a_long_prompt_gives_way_to_its_completion(prompt: str, completion: str, max_length: int) -> None:
    encoder = Encoder(TOKENIZER, max_length)
    ((example,),) = encoder.encode([CompletionRecord(prompt, completion)])
    assert len(example.input_ids) <= max_length
    assert (example.labels[: example.context] == IGNORED).all()
    assert (example.labels[example.context :] == example.input_ids[example.context :]).all()
    whole = Encoder(TOKENIZER, 10_000).encode([CompletionRecord(prompt, completion)])[0][0]
    if 1 + 1 + whole.loss_tokens <= max_length:
        assert learnt(example) == learnt(whole) and encoder.truncated["completions"] == 0
        kept = example.input_ids[1 : example.context].tolist()
        tail = len(kept) // 2
        full = ids_of(prompt)
        assert kept == (full if len(full) <= len(kept) else full[: len(kept) - tail] + full[len(full) - tail :])
    else:
        assert encoder.truncated["completions"] == 1
        assert learnt(example) == learnt(whole)[: example.loss_tokens] and EOS not in learnt(example)


@settings(deadline=None)
@given(st.integers(0, 60), st.lists(st.integers(1, 30), min_size=2, max_size=4), st.integers(8, 64), st.data())
def test_choices_share_one_prompt_and_train_as_they_are_scored(
    prompt: int, sizes: list[int], max_length: int, data: st.DataObject
) -> None:
    label = data.draw(st.integers(0, len(sizes) - 1))
    record = ChoiceRecord("party " * prompt + "x", tuple(" bill" * size for size in sizes), label)
    (item,) = Encoder(TOKENIZER, max_length).choices([record])
    assert all(len(item.prompt) + len(ids) <= max_length for ids in item.continuations)
    (example,) = encode(record, TOKENIZER, max_length)
    assert example.input_ids.tolist() == item.prompt + item.continuations[label]
    assert example.text_bytes == item.text_bytes[label]


def test_generation_prompts_leave_room() -> None:
    encoder = Encoder(TOKENIZER, 40)
    long, short = encoder.prompts(["the party may recover damages " * 9, "the act"], 15)
    assert len(long) == 25 and short == [BOS, *ids_of("the act")] and encoder.truncated["prompts"] == 1
    with pytest.raises(ValueError, match=r"evaluate\.max_new_tokens=40 leaves no room"):
        encoder.prompts(["a"], 40)
    with pytest.raises(ValueError, match=r"data\.max_length=7 is too short"):
        Encoder(TOKENIZER, 7)


# ---- order


@given(st.lists(st.integers(1, 99), min_size=1, max_size=400), st.integers(1, 7), st.integers(0, 3))
def test_every_pass_holds_every_example_once(lengths: list[int], batch_size: int, seed: int) -> None:
    order = BatchOrder(lengths, batch_size, seed)
    for start in (0, order.batches_per_pass):
        batches = [order[start + i] for i in range(order.batches_per_pass)]
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert sum(len(batch) != batch_size for batch in batches) <= 1


def test_order_is_a_function_of_seed_and_index_and_wastes_little() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 500).tolist()
    order = BatchOrder(lengths, 8, seed=1)
    there = [order[i] for i in range(200)]
    assert [BatchOrder(lengths, 8, seed=1)[i] for i in reversed(range(200))] == there[::-1]
    assert there[: order.batches_per_pass] != there[order.batches_per_pass : 2 * order.batches_per_pass]
    assert [BatchOrder(lengths, 8, seed=2)[i] for i in range(200)] != there
    batches = [[lengths[i] for i in batch] for batch in there[: order.batches_per_pass]]
    padded = sum(max(batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    assert np.corrcoef(range(len(batches)), [max(batch) for batch in batches])[0, 1] < 0.5


# ---- batches

WORDS = ["party", "court", "bill", "act", "damages", "may", "recover", "the"]


def make_splits(train: int = 37, validation: int = 9) -> Splits:
    rng = np.random.default_rng(5)

    def record(i: int) -> CompletionRecord:
        return CompletionRecord(f"{i} " + " ".join(rng.choice(WORDS, rng.integers(1, 15))), f" {i}")

    parts = [[record(i) for i in range(start, start + n)] for start, n in ((0, train), (100, validation), (200, 3))]
    return Splits(*parts, name="made")


def make_module(num_batches: int = 14, **options: Any) -> PruningDataModule:
    sizes = {"max_length": 64, "batch_size": 4, "seed": 3} | options
    return PruningDataModule(make_splits(), TOKENIZER, num_batches=num_batches, **sizes)


def numbers(batch: dict[str, torch.Tensor]) -> list[str]:
    """Which records a batch holds, by the number that is their completion."""
    kept = [row[row != IGNORED] for row in batch["labels"]]
    return [TOKENIZER.decode(ids, skip_special_tokens=True).strip() for ids in kept]


def test_calibration_gives_what_is_asked_for_however_short_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """The same batches as training, beyond its length; of data that holds fewer, one pass and a word about it."""
    long, short = make_module(num_batches=24), make_module(num_batches=2)
    wanted = [numbers(batch) for batch in list(long.train_dataloader())[:10]]
    assert [numbers(batch) for batch in short.calibration_dataloader(8)] == wanted[:8]
    assert len(list(short.train_dataloader())) == 2 and "calibration" not in caplog.text
    for _ in range(2):
        assert [numbers(batch) for batch in short.calibration_dataloader(64)] == wanted
    assert caplog.text.count("64 batches asked for") == 1 and "holds 10 of data.batch_size=4" in caplog.text


def test_a_run_is_one_epoch_of_the_batches_asked_for() -> None:
    module = make_module(num_batches=24)
    loader = module.train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 24
    for start in (0, 10):
        seen = [number for batch in batches[start : start + 10] for number in numbers(batch)]
        assert sorted(seen, key=int) == [str(i) for i in range(37)]
    batch = max(batches, key=lambda batch: batch["attention_mask"].eq(0).sum())
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].shape[1] == lengths.max()
    for ids, mask, labels, length in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], lengths, strict=True
    ):
        assert mask[:length].all() and not mask[length:].any() and (labels[length:] == IGNORED).all()
        assert ids[0] == BOS and ids[length - 1] == EOS and (ids[length:] == EOS).all()


def test_loading_leaves_the_global_random_state_alone_and_workers_change_nothing() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plain = list(make_module().train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)
    forked = list(make_module(num_workers=2).train_dataloader())
    assert all(torch.equal(a[key], b[key]) for a, b in zip(plain, forked, strict=True) for key in a)


def test_processes_see_different_batches_that_make_up_the_order() -> None:
    module = make_module()
    module.setup()
    order = BatchOrder([len(example.input_ids) for example in module._train], 4, 3)

    def loader(rank: int) -> ResumableLoader:
        return ResumableLoader(module._train, order, num_batches=5, pad_id=0, rank=rank, world_size=2)

    seen = [[numbers(batch) for batch in loader(rank)] for rank in range(2)]
    assert len(seen[0]) == len(seen[1]) == 5
    assert sorted(int(n) for part in seen for batch in part for n in batch) == list(range(37))


def test_validation_is_bounded_and_always_the_same() -> None:
    module = make_module(max_validation_examples=6, batch_size=4)
    loader = module.val_dataloader()
    first, second = list(loader), list(loader)
    assert len(loader) == len(first) == 2
    found = [number for batch in first for number in numbers(batch)]
    assert len(found) == 6 and set(found) <= {str(i) for i in range(100, 109)}
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)
    assert [numbers(batch) for batch in make_module(max_validation_examples=6).val_dataloader()] == [
        *map(numbers, first)
    ]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data\.max_length=64 exceeds the model's context of 32 tokens.*max_length=32"
    ):
        make_module(model_context=32)
    for name in ("batch_size", "num_batches", "max_validation_examples"):
        with pytest.raises(ValueError, match=rf"data\.{name}=0 must be at least 1"):
            make_module(**{name: 0})
    for name in ("train", "validation", "test"):
        splits = replace(make_splits(), **{name: []})
        with pytest.raises(ValueError, match=f"the {name} split of 'made' is empty"):
            PruningDataModule(splits, TOKENIZER, max_length=64, batch_size=4, num_batches=3, seed=0)


def test_answers_longer_than_a_sequence_are_counted_and_refused_if_none_fits(caplog: pytest.LogCaptureFixture) -> None:
    long, short = (CompletionRecord("a bill", " to amend the act" * n, "t") for n in (9, 1))
    needed = len(encode(long, TOKENIZER, 999)[0].input_ids) - len(ids_of("a bill")) + 1

    def module(*train: CompletionRecord, max_length: int = 16) -> PruningDataModule:
        splits = Splits(list(train), [short], [short], "mine")
        return PruningDataModule(splits, TOKENIZER, max_length=max_length, batch_size=1, num_batches=1, seed=0)

    with caplog.at_level(logging.WARNING):
        module(short, long, short).setup()
    assert "mine: 1 of 3 answers are longer than data.max_length=16 tokens allow" in caplog.text
    assert f"data.max_length={needed}" in caplog.text
    with pytest.raises(ValueError, match=rf"2 of 2 answers are longer.*the longest needs data\.max_length={needed} "):
        module(long, long).setup()
    caplog.clear()
    module(long, long, max_length=needed).setup()
    assert "longer" not in caplog.text


def test_the_data_describes_itself_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="atp.data.batches"):
        module = make_module(num_batches=20, max_length=20)
        module.setup()
        module.setup("fit")
        told = module.describe()
    assert len(caplog.records) == 1 and "made" in caplog.text
    assert told["records"] == {"train": 37, "validation": 9, "test": 3}
    assert told["examples"] == {"train": 37, "validation": 9}
    assert told["passes"] == 2.0 and told["length"]["p100"] == 20 and 0 <= told["padding"] < 0.5
    assert told["truncated"]["prompts"] == sum(
        len(encode(r, TOKENIZER, 999)[0].input_ids) > 20 for r in module.splits.train
    )
    assert told["loss_tokens"] == sum(encode(r, TOKENIZER, 20)[0].loss_tokens for r in module.splits.train)


# ---- resuming


def test_a_loader_goes_on_where_its_state_was_taken() -> None:
    whole = [numbers(batch) for batch in make_module().train_dataloader()]
    loader = make_module().train_dataloader()
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    resumed = make_module(num_batches=14).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert len(resumed) == 14
    assert [numbers(batch) for batch in resumed] == whole[5:]
    assert [numbers(batch) for batch in resumed] == whole  # a further epoch starts over


@pytest.mark.parametrize(("name", "value"), [("seed", 9), ("batch_size", 2), ("max_length", 16)])
def test_a_state_of_other_data_is_refused(name: str, value: int) -> None:
    state = make_module().train_dataloader().state_dict()
    with pytest.raises(ValueError, match=r"cannot resume within this data: .* was .*, is "):
        make_module(**{name: value}).train_dataloader().load_state_dict(state)


class Recorder(lightning.LightningModule):
    """Notes which batches it trained on; fails at a given step if asked to."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []
        self.validated = 0
        self.fail_at = fail_at

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == self.fail_at:
            raise RuntimeError("as asked")
        self.seen.append(numbers(batch))
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.validated += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def train(module: Recorder, folder: Path, resume: str | None = None, steps: int = 7, **options: Any) -> Recorder:
    data = make_module(num_batches=14, num_workers=options.pop("num_workers", 0))
    callbacks: list[Callback] = [
        ModelCheckpoint(folder, filename="at-{step}", every_n_train_steps=3, save_top_k=-1, save_on_exception=True)
    ]
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=14 // steps,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=5,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.filterwarnings("error:.*not resumable.*")
@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize(("num_workers", "steps"), [(0, 14), (2, 14), (0, 7)], ids=["plain", "workers", "accumulating"])
def test_a_resumed_training_sees_what_the_uninterrupted_one_would(tmp_path: Path, num_workers: int, steps: int) -> None:
    whole = train(Recorder(), tmp_path / "whole", steps=steps, num_workers=num_workers)
    assert len(whole.seen) == 14 and whole.validated > 0
    batches = 3 * 14 // steps
    for checkpoint, done in (("at-step=3.ckpt", batches), ("at-step=6.ckpt", 2 * batches)):
        path = str(tmp_path / "whole" / checkpoint)
        resumed = train(Recorder(), tmp_path / "again", resume=path, steps=steps, num_workers=num_workers)
        assert resumed.seen == whole.seen[done:]
        assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_the_batch_of_a_failed_step_comes_again(tmp_path: Path) -> None:
    whole = train(Recorder(), tmp_path / "whole", steps=14)
    with pytest.raises(RuntimeError, match="as asked"):
        train(Recorder(fail_at=8), tmp_path / "failed", steps=14)
    (saved,) = [path for path in (tmp_path / "failed").glob("*.ckpt") if "step=8" in path.name]
    resumed = train(Recorder(), tmp_path / "again", resume=str(saved), steps=14)
    assert resumed.seen == whole.seen[8:]
    assert torch.equal(resumed.weight, whole.weight)


# ---- real files


def test_real_records_and_tokenizer(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories3M")
    splits = load_files(shared / "data" / "legal" / "uscode_sections.jsonl", seed=0)
    splits = replace(splits, train=list(splits.train)[:300])
    module = PruningDataModule(
        splits, tokenizer, max_length=512, batch_size=8, num_batches=10, seed=0, model_context=512
    )
    told = module.describe()
    assert told["examples"]["train"] > 300 and told["truncated"]["texts"] > 0 and told["length"]["p100"] == 512
    for batch in module.train_dataloader():
        assert batch["input_ids"].shape[1] <= 512 and (batch["input_ids"][:, 0] == tokenizer.bos_token_id).all()


@pytest.mark.parametrize("name", ["stories260K", "stories3M"])
def test_the_boundary_holds_with_a_tokenizer_that_marks_spaces(shared: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for prompt, completion in (
        ("Once upon a time:", " there was"),
        ("Once upon a time\n", "there was"),
        ("Once up", "on a"),
    ):
        (example,) = encode(CompletionRecord(prompt, completion), tokenizer, 64)
        found = example.input_ids.tolist()
        assert found[: example.context] == [tokenizer.bos_token_id, *ids(prompt)]
        assert tokenizer.decode(found[1:-1]).replace(" ", "") == (prompt + completion).replace(" ", "")
