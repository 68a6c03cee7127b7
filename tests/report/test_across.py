"""Many runs side by side: grouping over seeds, ranking, what is left out and why, two runs compared."""

from __future__ import annotations

import copy
import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_report import make_metrics, make_run, write_json

from atp.commands import compare
from atp.commands.report import main
from atp.report.across import budget_lines, write_across
from atp.report.differences import figure_differences, mask_overlaps
from atp.report.pareto import Point, pareto_front
from atp.report.record import RunRecord
from atp.report.runs import data_differs, find_runs, group_runs, smallest_within, table
from atp.report.uncertainty import interval, wilson
from benchmarks import picture

FOUR = ((0.2, 0, 4.0, 99), (0.2, 1, 4.4, 98), (0.5, 0, 6.0, 96), (0.5, 1, 7.0, 94))


def make(path: Path, sparsity: float, seed: int, perplexity: float, recovery: float, **settings: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    metrics = make_metrics()
    metrics["run"]["seed"] = seed
    metrics["sparsity"] |= {"target": sparsity, "blocks": sparsity}
    metrics["parameters"]["pruned"] = round(metrics["parameters"]["dense"] * (1 - sparsity))
    metrics["eval"]["pruned"]["perplexity"] = perplexity
    metrics["recovery"] = {"mean": recovery}
    metrics["recovery_vs_dense"] = {"mean": recovery}
    make_run(path, metrics)
    config = {"seed": seed, "name": "x", "prune": {"sparsity": sparsity}, "data": {"max_length": 64}, **settings}
    write_json(path / "config.json", {"overrides": [], "config": config})
    return path


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two ratios with two seeds each, and every kind of run that cannot be shown."""
    for sparsity, seed, perplexity, recovery in FOUR:
        make(tmp_path / f"s{sparsity}_{seed}", sparsity, seed, perplexity, recovery)
    for name in ("half", "failed", "old"):
        (tmp_path / name).mkdir()
    write_json(tmp_path / "half" / "config.json", {"overrides": [], "config": {}})
    write_json(tmp_path / "failed" / "job.json", {"state": "failed", "reason": "ValueError: no", "time": 1.0})
    write_json(tmp_path / "old" / "metrics.json", make_metrics() | {"format": 0})
    return tmp_path


def test_seeds_are_grouped_and_the_rest_is_told(sweep: Path) -> None:
    found, left_out = find_runs([sweep])
    groups = group_runs(found)
    assert [(g.label, len(g.runs)) for g in groups] == [("sparsity=0.2", 2), ("sparsity=0.5", 2)]
    spread = groups[0].figure("eval", "pruned", "perplexity")
    assert spread is not None and spread.mean == pytest.approx(4.2)
    assert spread.deviation == pytest.approx(0.2 * 2**0.5)
    reasons = {path.name: reason for path, reason in left_out}
    assert reasons.keys() == {"half", "failed", "old"}
    assert "unfinished" in reasons["half"] and f"resume={sweep / 'half'}" in reasons["half"]
    assert reasons["failed"] == "failed: ValueError: no" and "reads format 1" in reasons["old"]
    columns, rows = table(groups)
    assert rows[1][columns.index("perplexity")] == "6.5 ± 0.71"


def test_smallest_model_within_a_loss(sweep: Path) -> None:
    groups = group_runs(find_runs([sweep])[0])
    assert smallest_within(groups, 1.0) is None
    assert smallest_within(groups, 2.0) is groups[0] and smallest_within(groups, 5.0) is groups[1]
    answers = dict(budget_lines(groups, "perplexity"))
    assert answers["smallest model within 1% of dense + LoRA (mean recovery)"] == "none of these runs"
    assert answers["best perplexity at a target of 50%"] == "sparsity=0.5 (6.5)"


def test_front_is_what_nothing_beats() -> None:
    points = [Point("a", 1, 9), Point("b", 2, 5), Point("c", 3, 6), Point("d", 4, 5), Point("e", 5, 1)]
    assert [p.label for p in pareto_front(points, True)] == ["a", "b", "e"]
    assert [p.label for p in pareto_front(points, False)] == ["a"]


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if tag == "a" and name == "href"]


def test_one_command_writes_page_and_tables(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep)]) == 0
    out, err = capsys.readouterr()
    assert "sparsity=0.5" in out and out.count("± ") >= 2 and "left out" in err
    page = (sweep / "report.html").read_text()
    for cost in ("parameters", "latency", "memory"):
        assert f"Quality against {cost}" in page
    assert "Settings and results" in page
    assert "plus or minus 0.71 over 2 seeds" in page and "http" not in page.replace("http-equiv", "")
    links = Links()
    links.feed(page)
    assert len(links.found) == 4 and all((sweep / link).exists() for link in links.found)
    rows = list(csv.DictReader((sweep / "table.csv").read_text().splitlines()))
    assert [float(row["eval.pruned.perplexity"]) for row in rows] == [4.0, 4.4, 6.0, 7.0]
    assert (sweep / "table.md").read_text().splitlines()[1].startswith("| --- |")
    assert (sweep / "figures" / "pareto.png").is_file()


def test_points_are_named_by_ratio_where_nothing_else_varies(sweep: Path) -> None:
    def page() -> str:
        assert main([str(sweep)]) == 0
        return (sweep / "report.html").read_text()

    assert "named by their target sparsity" in page() and ">20%</text>" in page()
    make(sweep / "wide", 0.5, 0, 5.0, 97, lora={"r": 32})
    assert "Numbers name the rows" in page() and ">20%</text>" not in page()


def test_picture_of_a_sweep_is_one_command_and_small(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = sweep / "picture.png"
    assert picture.main([str(sweep), str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size < 150_000
    told = capsys.readouterr()
    assert "sparsity=0.2: 2 runs, perplexity 4.200" in told.out and "left out" in told.err
    with pytest.raises(SystemExit, match="2"):
        picture.main([str(sweep), str(target), "--sparsity", "0.9"])
    assert "no finished run at a target of 0.9" in capsys.readouterr().err


def test_one_run_gets_its_own_page_again(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = sweep / "s0.2_0"
    assert main([str(run)]) == 0
    assert (run / "report.html").is_file() and str(run / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such directory"),
        (["half"], "there is no finished run"),
        ([".", "--metric", "bleu"], "--metric bleu: no run has it; there are perplexity"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sweep)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_other_data_is_warned_of(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_differs(find_runs([sweep])[0]) == ""
    make(sweep / "other", 0.2, 0, 4.0, 99, data={"max_length": 32})
    assert "different data" in data_differs(find_runs([sweep])[0])
    main([str(sweep)])
    assert "warning: The runs use different data" in capsys.readouterr().err
    assert "different data" in (sweep / "report.html").read_text()


def test_hostile_names_are_shown_not_run(tmp_path: Path) -> None:
    make(tmp_path / "a", 0.2, 0, 4.0, 99, note="<script>alert(1)</script>")
    make(tmp_path / "b", 0.3, 0, 4.0, 99, note="|x|")
    found, left_out = find_runs([tmp_path])
    page = write_across(found, left_out, tmp_path).read_text()
    assert "<script>" not in page


def test_intervals_recorded_or_from_counts() -> None:
    metrics = make_metrics()
    metrics["eval"]["pruned"]["clause/accuracy"], metrics["eval_counts"]["clause/accuracy"] = 0.9, 100
    low, high = interval(metrics, "pruned", "clause/accuracy") or (0.0, 0.0)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert interval(metrics, "pruned", "perplexity") is None
    metrics["intervals"] = {"pruned": {"perplexity": [4.0, 5.0], "clause/accuracy": [0.85, 0.93]}}
    assert interval(metrics, "pruned", "perplexity") == (4.0, 5.0)
    assert interval(metrics, "pruned", "clause/accuracy") == (0.85, 0.93)
    assert wilson(1.0, 10)[1] == pytest.approx(1.0) and wilson(0.0, 10)[0] == 0.0


def test_compare_counts_shared_units(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = sweep / "s0.2_0", sweep / "s0.5_0"
    masks = json.loads((b / "masks.json").read_text())
    first = masks["axes"]["layers.0.heads"]
    first[first.index(1)] = 0
    write_json(b / "masks.json", masks)
    overlaps = {(o.kind, o.layer): o for o in mask_overlaps(RunRecord.load(a), RunRecord.load(b))}
    one = overlaps[("heads", 0)]
    assert (one.kept_a, one.kept_b, one.both) == (sum(first) + 1, sum(first), sum(first))
    assert one.jaccard == pytest.approx(sum(first) / (sum(first) + 1)) and overlaps[("channels", 1)].jaccard == 1.0
    assert compare.main([str(a), str(b), "--json", str(sweep / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "prune.sparsity" in out and "Jaccard" in out
    written = json.loads((sweep / "out.json").read_text())
    figures = {figure["name"]: figure for figure in written["figures"]}
    assert figures["perplexity"]["difference"] == pytest.approx(2.0)
    assert written["settings"] == {"prune.sparsity": [0.2, 0.5]}


def test_difference_of_two_accuracies() -> None:
    """Newcombe 1998, table II, example (a), method 10: 56/70 minus 48/80 is 0.2 with interval 0.0524 to 0.3339."""
    a, b = make_metrics(), make_metrics()
    for metrics, share, count in ((a, 48 / 80, 80), (b, 56 / 70, 70)):
        metrics["eval"] = {"dense": {}, "pruned": {"t/accuracy": share}}
        metrics["eval_counts"] = {"t/accuracy": count}
    a_interval, b_interval = interval(a, "pruned", "t/accuracy"), interval(b, "pruned", "t/accuracy")
    assert a_interval and b_interval
    (found,) = [d for d in figure_differences(a, b) if d.name == "t/accuracy"]
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=1e-4) and found.is_clear is True


def test_compare_refuses_what_cannot_be_compared(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(sweep / "half"), str(sweep / "s0.2_0")]) == 2
    assert "metrics.json: no such file" in capsys.readouterr().err
    masks = json.loads((sweep / "s0.2_0" / "masks.json").read_text())
    shorter = copy.deepcopy(masks)
    shorter["axes"]["layers.0.heads"] = shorter["axes"]["layers.0.heads"][:-1]
    write_json(sweep / "s0.2_1" / "masks.json", shorter)
    assert compare.main([str(sweep / "s0.2_0"), str(sweep / "s0.2_1")]) == 2
    assert "units do not correspond" in capsys.readouterr().err
