"""Whole runs through the command line: what is left behind, resuming, refusing, sweeping."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import forked
from test_report import make_metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

from atp.export.hf.loading import load_exported

NAMED = re.compile(r"\b(run|metrics)\.([a-z_]+(?:\.[a-z_]+)*)")
ROOT = Path(__file__).parent.parent.parent
FAST = [
    "experiment=smoke",
    "evaluate.baselines=[random,uniform]",
    "evaluate.max_generate=2",
    "trainer.checkpoint_every_n_steps=2",
    "threads=1",
]


def train(*arguments: str, cwd: Path, check: bool = True, fork: bool = True) -> subprocess.CompletedProcess[str]:
    """Run train.py as a user does, without fork to the letter."""
    command = [str(ROOT / "train.py"), *arguments]
    if fork:
        done = forked(*command, cwd=cwd)
    else:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *command]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One finished run and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    done = train(*FAST, "run_dir=one", cwd=folder, fork=False)
    return folder / "one", done.stdout


def _paths(node: object, models: set[str]) -> set[tuple[str, ...]]:
    """Every path in a JSON object, names of models and of metrics alike."""
    if not isinstance(node, dict):
        return {()}
    found: set[tuple[str, ...]] = {()}
    for key, value in node.items():
        named = "*" if key in models or key.endswith(("perplexity", "accuracy", "bits_per_byte", "rougeL")) else key
        found |= {(named, *path) for path in _paths(value, models)}
    return found


def test_the_report_reads_only_what_runs_write(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atp.report import comparison, headlines, page, record, uncertainty

    run, _ = finished
    metrics = json.loads((run / "metrics.json").read_text())
    baselines = {"random", "uniform"}
    models = {"dense", "dense_lora", "pruned", *baselines, *(k for m in metrics["eval"].values() for k in m)}
    written, asked = _paths(metrics, models), set()

    def recording(metrics: dict, *keys: str) -> float | None:
        asked.add(tuple("*" if key in models else key for key in keys))
        return record.number(metrics, *keys)

    for module in (comparison, headlines, page, uncertainty):
        monkeypatch.setattr(module, "number", recording)
    shutil.copytree(run, tmp_path / "one", ignore=shutil.ignore_patterns("checkpoints"))
    page.write_report(tmp_path / "one")
    assert asked and asked <= written
    template = (Path(page.__file__).parent / "templates" / "report.html.j2").read_text()
    named = {("run" if kind == "run" else None, *rest.split(".")) for kind, rest in NAMED.findall(template)}
    assert named and {tuple(part for part in path if part) for path in named} <= written
    assert _paths(make_metrics(), models | {"holding/accuracy", "bill/rougeL"}) <= written, "figures of these tests"


def test_the_run_directory_describes_itself(finished: tuple[Path, str]) -> None:
    run, printed = finished
    for name in (".hydra/config.yaml", "atp.log", "masks.json", "metrics.json", "report.html", "samples.json"):
        assert (run / name).is_file(), name
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"):
        assert (run / "pruned" / name).is_file(), name
    assert (run / "metrics" / "train.csv").read_text().startswith("step,")
    assert "from_pretrained" in printed and "report.html" in printed


def test_metrics_have_their_stable_keys(finished: tuple[Path, str]) -> None:
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    sparsity = {"blocks", "model", "target", "expected_at_freeze", "undecided_at_freeze"}
    assert sparsity <= metrics["sparsity"].keys()
    assert {"dense", "pruned"} <= metrics["parameters"].keys()
    assert metrics["removal"]["max_abs_logit_diff"] < 1e-4
    assert {"dense", "dense_lora", "pruned", "random", "uniform"} == metrics["eval"].keys()
    for values in metrics["eval"].values():
        assert {"perplexity", "bits_per_byte", "clause/accuracy", "holding/accuracy", "bill/rougeL"} <= values.keys()
    assert metrics["recovery"].keys() >= {"perplexity", "mean"}
    assert {"prefill_ratio", "decode_ratio", "dense", "pruned"} <= metrics["speed"].keys()
    assert {"train_peak_mib", "dense_weights_mib", "pruned_weights_mib"} <= metrics["memory"].keys()
    assert {"git", "versions", "seed", "base", "command"} <= metrics["run"].keys()


def test_figures_agree_with_the_exported_model(finished: tuple[Path, str]) -> None:
    """What metrics.json says of size is what counting the exported file gives."""
    run = finished[0]
    metrics = json.loads((run / "metrics.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(run / "pruned", trust_remote_code=True)
    assert sum(p.numel() for p in model.parameters()) == metrics["parameters"]["pruned"]
    blocks = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and "norm" not in n)
    assert blocks == metrics["parameters"]["pruned_blocks"]
    assert 1 - blocks / metrics["parameters"]["dense_blocks"] == pytest.approx(metrics["sparsity"]["blocks"])
    kept = {k: sum(v) for k, v in json.loads((run / "masks.json").read_text())["axes"].items()}
    for layer, widths in enumerate(metrics["widths"]):
        assert kept[f"layers.{layer}.heads"] == widths["num_key_value_heads"]
        assert kept[f"layers.{layer}.channels"] == widths["intermediate_size"]
    size = (run / "pruned" / "model.safetensors").stat().st_size
    assert size == pytest.approx(4 * metrics["parameters"]["pruned"], rel=0.01)


def test_the_export_generates_without_atp(finished: tuple[Path, str]) -> None:
    """A process in which atp cannot be imported loads the directory and continues a prompt as this one does."""
    run = finished[0]
    code = (
        "import sys; sys.modules['atp'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"path = {str(run / 'pruned')!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)\n"
        "tokens = AutoTokenizer.from_pretrained(path, trust_remote_code=True)('A BILL to', return_tensors='pt')\n"
        "print(model.generate(**tokens, max_new_tokens=8, do_sample=False)[0].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(run / "pruned", trust_remote_code=True)
    tokens = AutoTokenizer.from_pretrained(run / "pruned")("A BILL to", return_tensors="pt")
    here = model.generate(**tokens, max_new_tokens=8, do_sample=False)[0].tolist()
    assert done.stdout.strip().splitlines()[-1] == str(here)


def test_a_finished_run_is_neither_overwritten_nor_repeated(finished: tuple[Path, str]) -> None:
    run = finished[0]
    before = (run / "metrics.json").read_bytes()
    again = train(*FAST, "run_dir=one", cwd=run.parent, check=False)
    assert again.returncode == 2
    assert "already holds a finished run" in again.stdout + again.stderr
    resumed = train("resume=one", cwd=run.parent)
    assert "nothing to do" in resumed.stdout and "perplexity" in resumed.stdout
    assert (run / "metrics.json").read_bytes() == before


def test_a_run_that_is_not_verified_ends_with_1_and_says_why(finished: tuple[Path, str], tmp_path: Path) -> None:
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    assert metrics["removal"]["not_verified"] == ""
    assert metrics["removal"]["masked_vs_reloaded"] < 1e-3 * metrics["removal"]["logit_spread"]
    shutil.copytree(finished[0], tmp_path / "one")
    metrics["removal"]["not_verified"] = "masked -> removed: largest logit difference 9.8"
    (tmp_path / "one" / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "one" / "report.html").unlink()
    done = train("resume=one", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "not verified: masked -> removed: largest logit difference 9.8" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert '<p class="fault" role="alert"><strong>Not verified.' in (tmp_path / "one" / "report.html").read_text()
    assert (tmp_path / "one" / "pruned" / "model.safetensors").is_file()


def test_killed_run_goes_on_to_the_same_result(finished: tuple[Path, str], tmp_path: Path) -> None:
    """SIGKILL in the middle of training, then resume=last: the exported weights are the uninterrupted run's."""
    command = [sys.executable, str(ROOT / "train.py"), *FAST, "run_dir=runs/smoke/killed"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoint = tmp_path / "runs/smoke/killed/checkpoints/joint.ckpt"
    deadline = time.monotonic() + 300
    while not checkpoint.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.is_file() and not (tmp_path / "runs/smoke/killed/metrics.json").exists()
    train("experiment=smoke", *FAST[1:], "resume=last", cwd=tmp_path)
    whole = json.loads((finished[0] / "metrics.json").read_text())
    resumed = json.loads((tmp_path / "runs/smoke/killed/metrics.json").read_text())
    assert resumed["eval"] == whole["eval"]
    first = (finished[0] / "pruned" / "model.safetensors").read_bytes()
    assert (tmp_path / "runs/smoke/killed/pruned/model.safetensors").read_bytes() == first


def test_interrupt_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *FAST, "trainer.max_steps=2000", "run_dir=stopped"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    checkpoint = tmp_path / "stopped/checkpoints/joint.ckpt"
    deadline = time.monotonic() + 300
    while not checkpoint.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert f"go on with: resume={tmp_path / 'stopped'}" in output
    assert "Traceback" not in output
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert f"stopped after step {step} of joint" in output


def test_a_sweep_shares_goes_on_and_lists_failures(tmp_path: Path) -> None:
    """Two jobs that work and one that cannot; started again, only that is tried; one reference for all."""
    command = ["-m", "experiment=smoke", "prune=l0", "prune.sparsity=0.3,1.5,0.6", "trainer.max_steps=3"]
    command += ["evaluate.speed=false", "evaluate.samples=0", "evaluate.max_generate=2", "evaluate.forgetting=[]"]
    first = train(*command, "threads=1", cwd=tmp_path, check=False)
    assert first.returncode == 1
    ending = first.stdout[first.stdout.index("sweep runs/sweeps/smoke") :]
    assert "2 finished, 1 failed" in ending and "prune.sparsity is 1.5" in ending
    sweep = tmp_path / "runs" / "sweeps" / "smoke"
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(sweep.glob("*/metrics.json"))}
    assert [round(m["sparsity"]["blocks"], 2) for m in found.values()] == [0.3, 0.6]
    low, high = found.values()
    assert low["eval"]["dense_lora"] == high["eval"]["dense_lora"]
    assert len(list(sweep.glob("*/checkpoints/dense_lora.ckpt"))) == 1
    written = {path: path.stat().st_mtime_ns for path in sweep.glob("*/metrics.json")}
    again = train(*command, "threads=1", cwd=tmp_path, check=False)
    assert again.returncode == 1 and again.stdout.count("is finished; skipped") == 2
    assert {path: path.stat().st_mtime_ns for path in sweep.glob("*/metrics.json")} == written


@pytest.mark.slow
def test_a_run_writes_and_verifies_the_formats_it_is_asked_for(tmp_path: Path) -> None:
    """Pruned base with adapter, GGUF and ONNX; what each loads to is compared in a process of its own."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'atp[llamacpp]'")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'atp[onnx]'")
    wanted = ["export=[hf,gguf,adapter,onnx]", "export.gguf=[f32]", "export.verify=true", "export.verify_tokens=256"]
    done = train("experiment=smoke", "threads=1", "evaluate.reference=false", *wanted, "run_dir=one", cwd=tmp_path)
    assert "PeftModel.from_pretrained" in done.stdout
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    checks = {check["format"]: check for check in metrics["export"]["formats"]}
    assert checks.keys() == {"adapter", "gguf f32", "onnx"} and metrics["export"]["adapter"]
    for name in checks:
        assert checks[name]["ok"] and checks[name]["max_abs"] < 1e-3
    assert metrics["removal"]["max_abs_logit_diff"] < 1e-4
    card = (tmp_path / "one" / "pruned" / "README.md").read_text()
    assert "gguf/model-f32.gguf" in card and "## Formats" in card


@pytest.mark.slow
def test_a_finished_run_is_taken_apart_into_base_and_adapter_later(finished: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "one")
    command = ["atp.export", "one", "--to", "adapter"]
    done = forked(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "largest logit difference from one/pruned" in done.stdout
    adapter, merged = load_exported(tmp_path / "one" / "unmerged"), load_exported(tmp_path / "one" / "pruned")
    assert (tmp_path / "one" / "unmerged" / "adapter" / "adapter_model.safetensors").is_file()
    ids = torch.arange(100)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapter(ids).logits, merged(ids).logits, atol=1e-4, rtol=0)
    again = forked(*command, cwd=tmp_path)
    assert again.returncode == 2 and "not empty" in again.stderr and "--overwrite" in again.stderr
    (tmp_path / "one" / "checkpoints" / "joint.ckpt").unlink()
    gone = forked(*command, "--overwrite", cwd=tmp_path)
    assert gone.returncode == 2 and "joint.ckpt" in gone.stderr


def test_a_format_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    done = train("experiment=smoke", "export.gguf=[q99]", "run_dir=one", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "GGUF type 'q99' is not known" in done.stdout + done.stderr
    assert not (tmp_path / "one" / "checkpoints").exists()
