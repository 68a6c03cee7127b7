import html
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from rich.console import Console

from atp.export.hf.card import CardFacts, model_card
from atp.loading_lines import load_lines
from atp.model.widths import LayerWidths
from atp.report.page import RunRecord, comparison_table, report_panels, write_report
from atp.report.panel import inline_svg

LAYERS, HEADS, GROUPS, CHANNELS = 4, 8, 4, 96
MASKS = {
    "heads": [[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]],
    "channels": [[int((unit + layer) % 2 == 0) for unit in range(CHANNELS)] for layer in range(LAYERS)],
}
HOSTILE = '<script>alert(1)</script> & "quoted" <img src=x onerror=alert(2)> \x1b[31m \x00 $x^$ \ud800'


def make_metrics():
    kept = [sum(row) for row in MASKS["heads"]]
    widths = [
        {"num_attention_heads": 2 * k, "num_key_value_heads": k, "head_dim": 32, "intermediate_size": CHANNELS // 2}
        for k in kept
    ]
    dense = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": 32, "intermediate_size": CHANNELS}
    scores = {
        "dense": (14.212, 0.482, 0.214),
        "dense_lora": (8.913, 0.812, 0.402),
        "pruned": (9.377, 0.791, 0.388),
        "random": (21.4, 0.301, 0.182),
        "uniform": (12.9, 0.612, 0.322),
    }
    names = ("perplexity", "holding/accuracy", "bill/rougeL")
    return {
        "format": 1,
        "run": {
            "name": "legal_50pct",
            "command": "python train.py experiment=legal_50pct",
            "git": "0123abc",
            "seed": 42,
            "base": "embedded",
            "started": "2025-01-02T03:04:05+00:00",
            "device": "cpu",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
            "seconds": {"fit": 143.2, "export": 0.6},
            "parts": {"training": 90.0, "dense_lora": 30.0},
            "data": {"name": "embedded_legal", "train": 12000, "validation": 400, "test": 600},
        },
        "sparsity": {"target": 0.5, "blocks": 0.5003, "model": 0.4121},
        "parameters": {"dense": 3021312, "pruned": 1776128, "dense_blocks": 2488000, "pruned_blocks": 1243245},
        "removal": {"max_abs_logit_diff": 3.1e-6, "dtype": "float32", "tokens": 2048},
        "eval": {model: dict(zip(names, values, strict=True)) for model, values in scores.items()},
        "eval_counts": {"perplexity": 51234, "holding/accuracy": 200, "bill/rougeL": 150},
        "recovery": {"perplexity": 95.1, "holding/accuracy": 97.4, "bill/rougeL": 96.5, "mean": 96.3},
        "recovery_vs_dense": {"mean": 131.2},
        "baselines": {"random": {"sparsity": 0.4987, "recovery": {"mean": 61.2}}},
        "speed": {
            "dense": {"prefill_tokens_per_s": 18211.2, "prefill_latency_ms": 28.1, "decode_latency_ms": 3.42},
            "pruned": {"prefill_tokens_per_s": 30112.9, "prefill_latency_ms": 17.0, "decode_latency_ms": 2.05},
            "prefill_ratio": 1.653,
            "decode_ratio": 1.668,
            "prompt_tokens": 128,
            "new_tokens": 32,
            "batch_size": 1,
            "repeats": 5,
            "threads": 2,
            "device": "cpu",
        },
        "macs": {"dense_per_token": 2510000, "pruned_per_token": 1270000},
        "memory": {
            "train_peak_mib": 1203.4,
            "dense_weights_mib": 11.5,
            "pruned_weights_mib": 6.8,
        },
        "files": {"dense_mib": 11.6, "pruned_mib": 6.9},
        "widths": widths,
        "dense_widths": [dense] * LAYERS,
    }


def make_csv(phases=True):
    """Lightning's layout: one row per logging call, most cells empty, one column per quantity."""
    columns = ["epoch", "step", "train/loss", "train/task_loss", "mask/sparsity", "mask/target_sparsity"]
    columns += ["mask/heads_kept", "mask/channels_kept", "val/perplexity"] + ["mask/phase"] * phases
    rows = []
    for step in range(0, 100):
        task = 2 + 2 * math.exp(-step / 30)
        rows.append({"epoch": 0, "step": step, "train/loss": task + 0.1, "train/task_loss": task})
        if step % 10 == 0:
            target = min(0.5, max(0.0, (step - 10) / 100))
            phase = {"mask/phase": (step >= 10) + (step >= 70)} if phases else {}
            kept = {"mask/heads_kept": 32 * (1 - target), "mask/channels_kept": LAYERS * CHANNELS * (1 - target)}
            rows.append({"step": step, "mask/sparsity": target, "mask/target_sparsity": target, **kept, **phase})
    rows.append({"step": 99, "val/perplexity": 9.5})
    lines = [",".join(columns), *(",".join(str(row.get(name, "")) for name in columns) for row in rows)]
    return "\n".join(lines) + "\n"


def make_run(path, metrics=None):
    (path / "metrics").mkdir(parents=True)
    (path / ".hydra").mkdir()
    (path / "pruned").mkdir()
    write_json(path / "metrics.json", metrics or make_metrics())
    axes = {f"layers.{layer}.{kind}": row for kind, rows in MASKS.items() for layer, row in enumerate(rows)}
    scores = {name: [0.95 if bit else 0.02 for bit in row] for name, row in axes.items()}
    write_json(path / "masks.json", {"format": 1, "axes": axes, "scores": scores})
    (path / "metrics" / "train.csv").write_text(make_csv())
    sample = {"prompt": "The Lessee shall", "reference": "vacate", "dense": "pay", "pruned": "vacate the premises"}
    write_json(path / "samples.json", [sample, {"prompt": HOSTILE, "reference": None, "dense": HOSTILE, "pruned": ""}])
    (path / ".hydra" / "overrides.yaml").write_text("- experiment=legal_50pct\n")
    (path / ".hydra" / "config.yaml").write_text("prune:\n  sparsity: 0.5\n")
    write_json(path / "pruned" / "config.json", {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}})
    return path


def write_json(path, content):
    path.write_text(json.dumps(content))


def printed(metrics, width=140, encoding="utf-8"):
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding, write_through=True), width=width)
    console.print(comparison_table(metrics))
    return raw.getvalue().decode(encoding)


def line_of(text, label):
    return next(line for line in text.splitlines() if label in line)


def parsed(page):
    """Parse the page as XML, which accepts only well-formed markup with every attribute quoted and every tag closed."""
    return ElementTree.fromstring(page.read_text("utf-8").replace("<!DOCTYPE html>", ""))


def words(element):
    return " ".join(" ".join(element.itertext()).split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "legal")
    write_report(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def page(finished):
    return parsed(finished / "report.html")


def test_load_gives_every_part(finished):
    report = RunRecord.load(finished)
    assert report.masks == MASKS
    assert report.scores["heads"][0] == [0.95, 0.95, 0.02, 0.95]
    steps, sparsity = report.curves["mask/sparsity"]
    assert steps == list(range(0, 100, 10))
    assert sparsity[:3] == [0.0, 0.0, 0.1]
    assert report.curves["val/perplexity"] == ([99.0], [9.5])
    assert report.phases == ((0.0, "warm-up"), (10.0, "pruning"), (70.0, "frozen"))
    assert report.samples[0].pruned == "vacate the premises"
    assert report.samples[1].reference is None
    assert report.overrides == "- experiment=legal_50pct\n"
    assert report.notes == ()


def test_phases_come_from_the_target_without_a_phase_column(tmp_path):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "metrics" / "train.csv").write_text(make_csv(phases=False))
    assert RunRecord.load(run_dir).phases == ((10.0, "target rises"), (60.0, "full target"))


def test_a_resumed_run_keeps_the_later_value_and_survives_a_cut_line(tmp_path):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "metrics" / "train.csv").write_text("train/loss,step\n3.0,1\n2.0,2\n1.5,2\nnan,3\nbroken,4\n1.2")
    steps, losses = RunRecord.load(run_dir).curves["train/loss"]
    assert steps == [1.0, 2.0, 3.0]
    assert losses[:2] == [3.0, 1.5]
    assert math.isnan(losses[2])


@pytest.mark.parametrize(("expected", "is_told"), [(0.14, True), (0.49, False), (0.61, True)])
def test_page_says_how_far_the_masks_had_come(tmp_path, expected, is_told):
    metrics = make_metrics()
    metrics["sparsity"] |= {"expected_at_freeze": expected, "undecided_at_freeze": 0.93}
    page = write_report(make_run(tmp_path / "run", metrics)).read_text("utf-8")
    assert f"expected at the freeze {100 * expected:.1f}%, 93.0% of the units undecided" in page
    assert ("Masks away from their target" in page) is is_told


def test_page_of_a_run_that_did_not_record_it_says_nothing(tmp_path):
    page = write_report(make_run(tmp_path / "run")).read_text("utf-8")
    assert "at the freeze" not in page and "away from their target" not in page


def test_table_holds_the_figures_of_every_model():
    text = printed(make_metrics())
    assert line_of(text, "decoder-block parameters").split()[-5:] == ["2.49", "M", "1.24", "M", "-50.0%"]
    assert line_of(text, "block sparsity, target 50.0%").split()[-3:] == ["0.0%", "50.0%", "49.9%"]
    assert line_of(text, "whole-model sparsity").split()[-2:] == ["0.0%", "41.2%"]
    perplexity = line_of(text, "perplexity (lower is better, n=51,234 tokens)")
    assert perplexity.split()[-6:] == ["14.21", "8.913", "9.377", "21.40", "12.90", "95.1%"]
    accuracy = line_of(text, "holding/accuracy (n=200)")
    assert accuracy.split()[-6:] == ["0.482", "0.812", "0.791", "0.301", "0.612", "97.4%"]
    assert line_of(text, "mean recovery of dense + LoRA").split()[-2:] == ["96.3%", "61.2%"]
    assert line_of(text, "MACs per token").split()[-5:] == ["2.51", "M", "1.27", "M", "-49.4%"]
    assert line_of(text, "prefill latency (ms)").split()[-4:] == ["28.10", "17.00", "1.65x", "speed"]
    assert line_of(text, "decode latency").split()[-4:] == ["3.420", "2.050", "1.67x", "speed"]
    assert line_of(text, "peak memory, training").split()[-1] == "1,203.4"
    assert line_of(text, "file size (MiB)").split()[-3:] == ["11.6", "6.9", "-40.5%"]


def test_table_and_page_say_how_speed_was_measured(page):
    told = "speed: 128 prompt tokens, 32 decoded, batch 1, median of 5, on cpu"
    assert told in " ".join(printed(make_metrics()).split()) and told in words(page)
    metrics = make_metrics()
    del metrics["speed"]["repeats"]
    assert "speed: " not in printed(metrics)


def test_table_leaves_out_models_and_rows_without_figures():
    metrics = make_metrics()
    metrics["eval"] = {name: metrics["eval"][name] for name in ("dense", "pruned")}
    del metrics["speed"]["prefill_ratio"], metrics["macs"], metrics["memory"], metrics["recovery"], metrics["baselines"]
    text = printed(metrics)
    assert "uniform" not in text and "LoRA" not in text.splitlines()[1]
    assert "MACs" not in text and "memory" not in text
    assert "1.65x speed" in line_of(text, "prefill latency")  # from the two latencies


@pytest.mark.parametrize("width", [80, 100])
def test_table_fits_narrow_terminals_with_whole_numbers(width):
    metrics = make_metrics()
    metrics["eval"]["pruned"]["a_task_with_a_rather_long_name_for_a_column/accuracy"] = 0.123
    text = printed(metrics, width)
    assert max(map(len, text.splitlines())) <= width
    for figure in ("3.02 M", "8.913", "21.40", "0.123", "1.65x speed", "1,203.4", "97.4%"):
        assert figure in text


def test_table_prints_on_a_console_that_is_not_utf8():
    metrics = make_metrics()
    metrics["run"]["name"] = "Verträge [red]"
    metrics["eval"]["pruned"]["契約/accuracy"] = 0.5
    text = printed(metrics, encoding="ascii")
    assert "Vertr?ge [red]: pruned against dense" in text
    assert line_of(text, "??/accuracy").replace("|", " ").split() == ["??/accuracy", "0.500"]


def test_table_shows_no_control_characters():
    metrics = make_metrics()
    metrics["eval"]["pruned"]["\x1b[31mtask/accuracy"] = 0.5
    assert "\x1b" not in printed(metrics)


def test_page_tells_the_run(page):
    text = words(page)
    for part in (
        "50.0%",
        "96.3%",
        "9.377",
        "1.65x",
        "dense base 3.02 M",
        "12,000",
        "python train.py experiment=legal_50pct",
    ):
        assert part in text
    for part in ("torch 2.13.0", "seed 42", "git 0123abc", "experiment=legal_50pct", "sparsity: 0.5", "90.0 (75%)"):
        assert part in text
    assert "from_pretrained(" in text and "trust_remote_code=True" in text
    assert "Not in this report" not in text


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("stock", [False, True])
def test_page_card_and_terminal_load_the_model_alike(tmp_path, stock, adapter):
    run_dir = make_run(tmp_path / "run")
    write_json(run_dir / "pruned" / "config.json", {} if stock else {"auto_map": {"AutoModelForCausalLM": "m.M"}})
    if adapter:
        (run_dir / "pruned" / "adapter").mkdir()
        write_json(run_dir / "pruned" / "adapter" / "adapter_config.json", {})
    shown = html.unescape(write_report(run_dir).read_text())
    assert load_lines(run_dir / "pruned", stock, adapter=adapter) in shown
    assert ("PeftModel" in shown) == adapter and shown.count("trust_remote_code=True") == (0 if stock else 2)
    files = ["adapter/adapter_config.json"] * adapter
    card = model_card(
        CardFacts(title="A", architecture="M", stock=stock, widths=[LayerWidths(2, 1, 8, 6)], files=files)
    )
    assert load_lines("path/to/this/directory", stock, adapter=adapter) in card


def test_page_opens_every_format_with_the_line_that_its_check_noted(tmp_path):
    line = "llama-cli -m gguf/model-f16.gguf"
    checks = [{"format": "hf", "load": ""}, {"format": "gguf f16", "load": line}, {"format": "of an older run"}]
    metrics = make_metrics()
    run_dir = make_run(tmp_path / "run", {**metrics, "export": {**metrics.get("export", {}), "formats": checks}})
    write_json(run_dir / "pruned" / "config.json", {})
    shown = html.unescape(write_report(run_dir).read_text())
    assert f"<code>{line}</code>" in shown and shown.count("from within that directory") == 1


def test_page_gives_the_widths_as_a_table_too(page):
    rows = [words(row) for table in page.iter("table") if table.get("class") == "layers" for row in table.iter("tr")]
    assert rows[1:] == [
        f"{layer} {2 * k} / 8 {k} / 4 32 / 32 48 / 96" for layer, k in enumerate(sum(row) for row in MASKS["heads"])
    ]


def test_charts_have_titles_text_alternatives_and_units(page):
    charts = [figure for figure in page.iter("figure") if figure.find("svg") is not None]
    alternatives = {words(chart.find("figcaption")): chart.find("svg").get("aria-label") for chart in charts}
    assert len(alternatives) == len(charts) == 11
    assert "layer 1: 0 of 4 kept" in alternatives["Which heads were kept"]
    assert "layer 0: 50% kept" in alternatives["Share of channels kept"]
    assert "layer 0: 6 of 8" in alternatives["Attention heads left in each layer"]
    assert "frozen from step 70" in alternatives["Sparsity against its target"]
    assert "heads from 100 at step 0 to 50 at step 90" in alternatives["Heads and channels kept"]
    assert "Prefill time 60.5%" in alternatives["What the pruned model costs"]
    assert all(chart.find("svg").get("role") == "img" for chart in charts)
    drawn = {words(chart.find("figcaption")): words(chart.find("svg")) for chart in charts}
    assert (
        "optimiser step" in drawn["Training loss and its parts"] and "warm-up" in drawn["Training loss and its parts"]
    )
    assert "dense + LoRA" in drawn["Task metrics on held-out data"]


def test_page_stands_alone(finished, page):
    source = (finished / "report.html").read_text("utf-8")
    assert not list(page.iter("script")) and not list(page.iter("link")) and not list(page.iter("iframe"))
    for element in page.iter():
        for name, value in element.attrib.items():
            assert not re.search(r"https?:|//", value), (element.tag, name)
            if name in ("src", "href"):
                assert value.startswith(("#", "data:"))
    style = "".join(words(element) for element in page.iter("style"))
    assert "@import" not in style and "url(" not in style
    assert "prefers-color-scheme: dark" in style and "@media print" in style
    assert not re.search(r"xmlns|DOCTYPE svg", source)
    assert not re.search(r"#0[1-9]0[1-9]0[1-9]\b", source)  # every placeholder colour has become a variable


def test_identifiers_are_unique_and_references_resolve(page):
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in page.iter():
        for value in element.attrib.values():
            assert set(re.findall(r"url\(#([^)]+)\)", value)) <= set(ids)


def test_hostile_text_is_shown_not_run(tmp_path):
    metrics = make_metrics()
    metrics["run"] |= {"name": HOSTILE, "command": HOSTILE, "base": HOSTILE, "data": {HOSTILE: HOSTILE}}
    metrics["eval"]["pruned"][f"{HOSTILE}/accuracy"] = 0.5
    metrics["speed"]["device"] = HOSTILE
    run_dir = make_run(tmp_path / "run", metrics)
    (run_dir / ".hydra" / "config.yaml").write_text("a: </code></pre><script>1</script>\n")
    (run_dir / "metrics" / "train.csv").unlink()
    tree = parsed(write_report(run_dir))
    assert not list(tree.iter("script")) and not list(tree.iter("img"))
    assert not [name for element in tree.iter() for name in element.attrib if name.startswith("on")]
    assert words(tree).count("<script>alert(1)</script>") >= 6
    assert any("<script>" in (svg.get("aria-label") or "") for svg in tree.iter("svg"))


def test_pictures_are_written(finished):
    for name in ("masks", "training", "widths"):
        assert (finished / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(finished / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
    assert not [path for path in finished.rglob("*.tmp")]


def test_report_of_metrics_alone(tmp_path):
    write_json(tmp_path / "metrics.json", {"format": 1})
    text = words(parsed(write_report(tmp_path)))
    assert "No figures were recorded." in text and "holds no exported model" in text
    for name in ("masks.json", "metrics/train.csv", "samples.json"):
        assert f"{name} is not in this run directory" in text
    assert "metrics.json has nothing under: run, sparsity" in text
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("masks.json", "{not json"),
        ("masks.json", '{"format": 1, "axes": {"layers.0.heads": [0, 0.5]}}'),
        ("masks.json", '{"format": 1, "axes": {"layers.0.heads": 3}}'),
        ("masks.json", "[]"),
        ("metrics/train.csv", "loss,value\n1,2\n"),
        ("samples.json", '[{"prompt": 3}]'),
        ("samples.json", "17"),
    ],
)
def test_a_damaged_part_is_left_out_with_a_note(tmp_path, name, content):
    run_dir = make_run(tmp_path / "run")
    (run_dir / name).write_text(content)
    report = RunRecord.load(run_dir)
    assert len(report.notes) == 1
    assert report.notes[0].startswith(f"{name} could not be read")
    assert [bool(part) for part in (report.masks, report.curves, report.samples)].count(False) == 1


def test_page_without_its_optional_parts_shows_the_rest_and_the_notes(tmp_path):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "masks.json").write_text("{not json")
    (run_dir / "metrics" / "train.csv").unlink()
    text = words(parsed(write_report(run_dir)))
    assert "masks.json could not be read" in text and "metrics/train.csv is not in this run directory" in text
    assert "96.3%" in text and "Attention heads left in each layer" in text and "vacate the premises" in text
    assert not (run_dir / "figures" / "masks.png").exists()


def test_figures_that_are_missing_or_not_finite(tmp_path):
    metrics = make_metrics()
    metrics["eval"]["random"]["perplexity"] = math.inf
    metrics["eval"]["pruned"]["holding/accuracy"] = None
    metrics["macs"]["pruned_per_token"] = math.nan
    metrics["widths"] = metrics["widths"][:-1]
    write_json(tmp_path / "metrics.json", metrics)
    tree = parsed(write_report(tmp_path))
    assert "Widths kept in each layer" not in words(tree)
    cells = {words(row.find("th")): [words(cell) for cell in row.iter("td")] for row in tree.iter("tr")}
    assert cells["perplexity (lower is better, n=51,234 tokens)"][3] == "inf"
    assert cells["holding/accuracy (n=200)"][2] == ""
    assert cells["MACs per token"][2] == "nan"


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        (("format",), 2, "'format' is 2"),
        (("eval", "pruned", "perplexity"), "9.4", "'eval.pruned.perplexity' must be a number, got '9.4'"),
        (("eval", "dense"), [1], "'eval.dense' must be an object"),
        (("sparsity", "blocks"), True, "'sparsity.blocks' must be a number, got True"),
        (("speed", "pruned", "decode_latency_ms"), "fast", "'speed.pruned.decode_latency_ms' must be a number"),
        (("widths",), {"0": 1}, "'widths' must be a list"),
        (("widths", 2, "head_dim"), 1.5, "'widths.2.head_dim' must be a count"),
        (("run", "name"), 7, "'run.name' must be a string"),
    ],
)
def test_malformed_metrics_are_named(tmp_path, path, value, key):
    metrics = make_metrics()
    node = metrics
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    run_dir = make_run(tmp_path / "run", metrics)
    with pytest.raises(ValueError, match=re.escape(key)) as error:
        write_report(run_dir)
    assert str(run_dir / "metrics.json") in str(error.value)
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ('{"format": 1', "not valid JSON"), ("[]", "expected a JSON object"), ("\xff", "JSON")],
)
def test_unreadable_metrics_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        RunRecord.load(tmp_path)
    assert str(Path(tmp_path) / "metrics.json") in str(error.value)


def test_writing_again_replaces_the_page_and_a_failure_leaves_it_whole(tmp_path):
    write_json(tmp_path / "metrics.json", {"format": 1, "sparsity": {"blocks": 0.25}})
    first = write_report(tmp_path).read_text()
    write_json(tmp_path / "metrics.json", {"format": 1, "sparsity": {"blocks": 0.75}})
    second = write_report(tmp_path).read_text()
    assert "25.0%" in first and "75.0%" not in first and "75.0%" in second
    write_json(tmp_path / "metrics.json", {"format": 0})
    with pytest.raises(ValueError, match="format"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "report.html"]


def test_the_same_chart_gives_the_same_markup(finished):
    panels = report_panels(RunRecord.load(finished))
    chart = panels["masks"][0]
    assert inline_svg(chart) == inline_svg(chart)
    assert inline_svg(chart) in (finished / "report.html").read_text("utf-8")
