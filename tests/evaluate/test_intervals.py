"""Intervals and paired comparisons, and the command line that scores any model."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from test_evaluate import RECORDS, TOKENIZER, VOCABULARY
from torchmetrics.functional.classification import multiclass_f1_score

from atp import embedded
from atp.commands.evaluate import main, parse
from atp.data.prompt import Prompt
from atp.evaluate.intervals import Items, interval, paired, score
from atp.evaluate.quality import evaluate
from atp.report.evidence import evidence


def test_statistics_match_their_definitions() -> None:
    import torch

    rng = random.Random(0)
    picked = [float(rng.randrange(4)) for _ in range(50)]
    right = [float(rng.randrange(4)) for _ in range(50)]
    tensors = (torch.tensor(picked).long(), torch.tensor(right).long())
    assert score(Items("macro_f1", picked, right)) == pytest.approx(
        float(multiclass_f1_score(*tensors, num_classes=4, average="macro")), rel=1e-5
    )
    assert score(Items("perplexity", [2.0, 4.0], [1.0, 2.0])) == pytest.approx(math.exp(2))
    assert score(Items("bits", [math.log(2) * 6], [3.0])) == pytest.approx(2)
    assert score(Items("mean", [1.0, 0.0, 0.0, 1.0])) == 0.5
    assert score(Items("perplexity", [1e5], [1.0])) == math.inf


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(100):
        low, high = interval(Items("mean", rng.binomial(1, 0.6, 80).astype(float).tolist()), seed=trial) or (0, 0)
        hits += low <= 0.6 <= high
    assert 88 <= hits <= 100
    assert interval(Items("mean", [1.0])) is None and interval(Items("mean", [1.0, 0.0]), resamples=0) is None


def test_pairing_finds_a_difference_that_intervals_apart_cannot() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 100)
    of, against = Items("mean", (hard - 1 + rng.normal(0, 0.5, 100)).tolist()), Items("mean", hard.tolist())
    found = paired(of, against)
    assert found is not None and found["significant"] and found["items"] == 100
    assert found["difference"] == pytest.approx(-1, abs=0.3) and found["half_width"] < 0.3
    apart = interval(of), interval(against)
    assert apart[0] is not None and apart[1] is not None and apart[0][1] > apart[1][0]
    assert paired(of, of) is not None and not paired(of, of)["significant"]  # type: ignore[index]
    assert paired(of, Items("mean", [1.0])) is None
    assert paired(of, against) == found


def test_every_metric_has_items_counts_and_an_interval_around_it() -> None:
    model = tiny_model(vocabulary=VOCABULARY)
    metrics = evaluate(model, TOKENIZER, RECORDS * 3, max_length=64, batch_size=4, max_new_tokens=4, max_generate=4)
    intervals = metrics.intervals(200)
    assert set(intervals) == set(metrics.values) == set(metrics.items)
    for name, (low, high) in intervals.items():
        assert low <= metrics.values[name] * (1 + 1e-9) and metrics.values[name] <= high * (1 + 1e-9), name
        assert score(metrics.items[name]) == pytest.approx(metrics.values[name], rel=1e-5), name


def test_normalisation_can_change_the_choice() -> None:
    model = tiny_model(vocabulary=VOCABULARY)
    accuracy = {
        way: evaluate(model, TOKENIZER, RECORDS * 4, max_length=64, batch_size=8, max_generate=0, normalise=way)
        for way in ("tokens", "characters", "none")
    }
    by_task = evaluate(
        model, TOKENIZER, RECORDS * 4, max_length=64, batch_size=8, max_generate=0, normalise={"holding": "none"}
    )
    assert by_task.items["holding/accuracy"] == accuracy["none"].items["holding/accuracy"]
    assert by_task.items["clause/accuracy"] == accuracy["tokens"].items["clause/accuracy"]
    assert len({tuple(one.items["holding/macro_f1"].first) for one in accuracy.values()}) > 1
    with pytest.raises(ValueError, match=r"evaluate\.normalise='length' is unknown"):
        evaluate(model, TOKENIZER, RECORDS, max_length=64, batch_size=8, max_generate=0, normalise="length")


def test_evidence_says_what_is_sure() -> None:
    metrics = {
        "eval": {"pruned": {"t/accuracy": 0.5, "perplexity": 9.0}, "dense": {"t/accuracy": 0.52, "perplexity": 6.0}},
        "intervals": {"pruned": {"t/accuracy": [0.45, 0.55]}},
        "paired": {
            "pruned_vs_dense": {
                "t/accuracy": {"difference": -0.02, "half_width": 0.05, "items": 200, "significant": False},
                "perplexity": {"difference": 3.0, "half_width": 0.4, "items": 200, "significant": True},
            }
        },
        "forgetting": {"dense": {"health": {"perplexity": 4.0}}, "pruned": {"health": {"perplexity": 21.0}}},
        "prompt": {"name": "task", "tokens_added": 12.5, "share_of_context": 0.05, "system": "Do it."},
        "overlap": {"exact_dropped": {"train": 2}, "near": {"train_test": 1}, "near_duplicates": "drop"},
    }
    tables = {table.title: table.rows for table in evidence(metrics)}
    pair = {row[0]: row for row in tables["pruned against dense base, on the same items"]}
    assert pair["t/accuracy"][1:5] == ("50.0", "45.0 to 55.0", "-2.0 ± 5.0", "unclear")
    assert pair["perplexity"][3:5] == ("+3.000 ± 0.400", "worse")
    assert ("health", "4.000", "21.000") in tables["What pruning forgot: perplexity off target"]
    assert ("tokens added per record", "12.50") in tables["Prompt"]
    assert ("nearly equal, train against test: dropped", "1") in tables["Overlap between splits"]
    assert evidence({}) == []


# ---- the command line


def test_any_model_is_scored_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"Is {i} even?", "choices": [" no", " yes"], "label": i % 2} for i in range(12)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "result.json"
    common = ["max_items=6", "max_generate=2", "max_new_tokens=4", "bootstrap=50", "max_length=128"]
    main(["embedded", "task=legal/holding", f"records={file}", f"against={embedded.base_dir()}", *common, f"out={out}"])
    result = json.loads(out.read_text())
    scored = result["models"]["embedded"]
    assert scored["records"]["counts"]["choice/accuracy"] == 6
    assert "holding/accuracy" in scored["legal/holding"]["intervals"]
    assert result["paired"]["records"]["choice/accuracy"]["difference"] == 0
    assert result["recovery"]["legal/holding"]["mean"] == pytest.approx(100)
    printed = capsys.readouterr().out
    assert "legal/holding\n" in printed.replace(" ", "") and " accuracy " in printed and "…" not in printed
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(Prompt("mine", system="Say whether the number can be halved.").plain()))
    main(["embedded", f"records={file}", f"prompt={prompt}", *common, f"out={out}"])
    cost = json.loads(out.read_text())["prompt"]["embedded"]
    assert cost["tokens_added"] > 5 and cost["shared_prefix_tokens"] > 5
    assert f"'mine', {cost['tokens_added']:g} tokens added per record" in " ".join(capsys.readouterr().out.split())


def test_the_prompt_of_an_exported_model_is_used(tmp_path: Path) -> None:
    from atp.commands.evaluate import prompt_to_ask_with

    def asked(name: str, chosen: str, stops: Sequence[int] = ()) -> Prompt:
        return prompt_to_ask_with(name, chosen, TOKENIZER, stops)

    plain = Prompt("mine", system="S").plain()
    (tmp_path / "prompt.json").write_text(json.dumps(plain))
    assert asked(str(tmp_path), "auto").system == "S"
    assert asked(str(tmp_path), "none").is_empty
    (tmp_path / "prompt.json").write_text(json.dumps({**plain, "inference": False}))
    assert asked(str(tmp_path), "auto").is_empty
    with pytest.raises(ValueError, match="no such file"):
        asked(str(tmp_path), "other.json")
    with pytest.raises(ValueError, match="prompt=chat: the tokenizer of m has no chat template"):
        asked("m", "chat")
    (tmp_path / "prompt.json").write_text("[]")
    with pytest.raises(ValueError, match="a prompt is an object with name, system"):
        asked("embedded", str(tmp_path / "prompt.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=casehold"], "give MODEL; got none"),
        (["m", "tsk=casehold"], "there is no option 'tsk'; did you mean 'task'"),
        (["m", "task=x", "batch_size=few"], "batch_size='few' must be a whole number"),
        (["m"], "name what to score"),
        (["m", "task=x", "batch_size=0"], "batch_size=0 must be at least 1"),
        (["m", "task=x", "bootstrap=-1"], "bootstrap=-1 must not be negative"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(arguments)


def test_mistakes_end_with_a_message_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["./nowhere", "task=legal"], "nowhere: no such directory"),
        (["embedded", "task=casehod"], "did you mean casehold"),
        (["embedded", "task=legal", "dtype=int4"], "dtype='int4' is unknown"),
        (["embedded", "records=nowhere.jsonl"], "set records to a file"),
    ):
        assert main(arguments) == 2 and message in capsys.readouterr().err
