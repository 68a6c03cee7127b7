"""Checking an export: every format is loaded in a fresh process and compared with the reference on the same tokens.

The reference is the model as atp itself loads it (strictly, float32), or logits that the caller brings along. Each
format runs in :mod:`atp.export.probe`, a process of its own without atp, so that a wrong file, a missing tensor or a
permutation that only atp would undo shows. Sits above the exporters; knows nothing of training.

Shape suffixes: W windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel

from atp import modeling_atp
from atp.export import probe
from atp.export.loading import StoredModel, load_exported

WINDOW = 256
PROMPT, NEW_TOKENS = 16, 24
SPELLED_CHARACTERS = 4000
SPELLED = (
    "It's 12 o'clock; they'll pay $3,450.75 (net) by 2031-05-06.\n\nSec. 2(b)  two  spaces, naïve café, 東京, 🙂.\n"
)
"""Text on which tokenizers are always compared: what their rules differ on."""
QUANTISED = ("bnb-int8", "bnb-4bit", "torchao-int8", "torchao-4bit")
"""Ways of quantising a Hugging Face directory while it is loaded."""

_PACKAGES = {"gguf": "llama_cpp", "onnx": "onnxruntime", "adapter": "peft"}
_WAYS = {
    "llama_cpp": "pip install 'atp[llamacpp]'",
    "onnxruntime": "pip install 'atp[onnx]'",
    "bitsandbytes": "pip install bitsandbytes",
    "torchao": "pip install torchao",
}


@dataclass(frozen=True)
class Limit:
    """What counts as a match: a largest logit difference in units of the logits' deviation, and top-1 agreement."""

    max_abs: float
    top1: float
    both: bool = False


# Exact formats must meet both; a rounded one is wrong only if it misses both, as near ties flip in small models while
# a misread weight moves logits by several deviations and the likeliest token with them.
LIMITS = {
    "hf": Limit(1e-4, 0.999, both=True),
    "adapter": Limit(1e-3, 0.999, both=True),
    "onnx": Limit(1e-3, 0.999, both=True),
    "f32": Limit(2e-2, 0.999, both=True),
    "f16": Limit(0.3, 0.98),
    "bf16": Limit(0.6, 0.95),
    "q8_0": Limit(0.6, 0.95),
}
ROUGH = Limit(3.0, 0.5)


@dataclass(frozen=True)
class Check:
    """How one format compared.

    Attributes:
        format: hf, adapter, gguf or onnx, with the type or quantisation.
        file: Where it is, relative to the export.
        size_bytes: Size of the weights' files.
        max_abs: Largest absolute logit difference.
        top1: Share of positions with the same likeliest token.
        perplexity: On the tokens compared.
        reference_perplexity: The reference's.
        tokens_per_s: Greedy decoding of one sequence.
        greedy_equal: Greedy tokens equal to the reference's before the first that differs, of how many.
        ok: Whether it matches; None where it could not be run.
        note: Why not, or what to know.
    """

    format: str
    file: str
    size_bytes: int
    max_abs: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    tokens_per_s: float | None = None
    greedy_equal: str = ""
    ok: bool | None = None
    note: str = ""


@dataclass
class Reference:
    """What formats are compared with, as files for the fresh processes.

    Attributes:
        folder: Where the files are.
        deviation: Standard deviation of the logits.
        perplexity: On the tokens.
        greedy: Greedy continuation of the first window's beginning.
        prompt: Tokens of that beginning.
    """

    folder: Path
    deviation: float
    perplexity: float
    greedy: list[int] = field(default_factory=list)
    prompt: int = PROMPT


def verify(
    directory: str | Path,
    *,
    ids_WT: np.ndarray | None = None,
    text: str | None = None,
    tokens: int = 2048,
    quantised: Sequence[str] = (),
    reference_model: PreTrainedModel | None = None,
    threads: int | None = None,
) -> list[Check]:
    """Compares every format of an export with the reference.

    Args:
        directory: The exported directory.
        ids_WT: Token windows [W, T] to compare on; by default windows of `text`.
        text: Text to tokenise; random tokens where there is none or the export has no tokenizer.
        tokens: Most tokens to compare on.
        quantised: Also load the Hugging Face directory in these ways, of :data:`QUANTISED`.
        reference_model: The reference, if not the stored model itself.
        threads: Threads per process; torch's own number by default.

    Returns:
        One entry per format found.

    Raises:
        ValueError: The directory is damaged, or holds code that is not atp's.
    """
    stored = StoredModel(directory)
    _check_code(stored.directory)
    for kind in quantised:
        if kind not in QUANTISED:
            raise ValueError(f"quantisation {kind!r} is not known; choose from {', '.join(QUANTISED)}")
    if ids_WT is None:
        ids_WT = token_windows(stored, text, tokens)
    spelling = _spelling(stored, SPELLED + (text or ""))
    with tempfile.TemporaryDirectory(prefix="atp-verify-") as folder:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = reference_model or load_exported(directory, dtype=torch.float32, device=device)
        reference = _write_reference(model, ids_WT, Path(folder))
        del model
        threads = threads or torch.get_num_threads()
        return [_check(stored, task | spelling, reference, threads) for task in _tasks(stored.directory, quantised)]


def _spelling(stored: StoredModel, text: str) -> dict[str, Any]:
    """A text and its ids by the export's own tokenizer, for engines that bring another."""
    if not (stored.directory / "tokenizer.json").is_file():
        return {}
    tokenizer = AutoTokenizer.from_pretrained(str(stored.directory), local_files_only=True)
    text = text[:SPELLED_CHARACTERS]
    return {"text": text, "text_ids": list(tokenizer(text, verbose=False)["input_ids"])}


def token_windows(stored: StoredModel, text: str | None, tokens: int) -> np.ndarray:
    """Windows [W, T] of a text's tokens, no longer than every format's exact context; random without a tokenizer."""
    config = stored.config
    context = int(config.max_position_embeddings)
    if getattr(config, "sliding_window", None):
        context = min(context, int(config.sliding_window))
    length = min(WINDOW, context, tokens)
    ids: list[int] = []
    if text and (stored.directory / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(str(stored.directory), local_files_only=True)
        ids = list(tokenizer(text, verbose=False)["input_ids"])[:tokens]
    if len(ids) < length:
        ids = np.random.default_rng(0).integers(0, config.vocab_size, tokens).tolist()
    count = max(len(ids) // length, 1)
    return np.asarray(ids[: count * length], np.int64).reshape(count, length)


@torch.inference_mode()
def _write_reference(model: PreTrainedModel, ids_WT: np.ndarray, folder: Path) -> Reference:
    """Reference logits on disk, one window at a time."""
    np.save(folder / "ids.npy", ids_WT)
    shape = (*ids_WT.shape, model.config.vocab_size)
    logits_WTV = np.lib.format.open_memmap(folder / "reference.npy", mode="w+", dtype=np.float32, shape=shape)
    nll, squares = 0.0, 0.0
    for index, ids_T in enumerate(ids_WT):
        ids = torch.tensor(ids_T[None], device=model.device)
        logits_TV = model(input_ids=ids).logits[0].float()
        nll += float(torch.nn.functional.cross_entropy(logits_TV[:-1], ids[0, 1:], reduction="sum"))
        squares += float(logits_TV.var())
        logits_WTV[index] = logits_TV.cpu().numpy()
    logits_WTV.flush()
    scored = ids_WT.size - len(ids_WT)
    prompt = min(PROMPT, ids_WT.shape[1] // 2)
    new_tokens = min(NEW_TOKENS, ids_WT.shape[1] - prompt)
    perplexity = float(np.exp(min(nll / max(scored, 1), 700.0)))
    deviation = float(np.sqrt(squares / len(ids_WT)))
    return Reference(folder, deviation, perplexity, _greedy(model, ids_WT[0, :prompt], new_tokens), prompt)


def _greedy(model: PreTrainedModel, prompt_T: np.ndarray, new_tokens: int) -> list[int]:
    """Greedy continuation without a cache: what every engine's cache must reproduce."""
    ids = torch.tensor(prompt_T[None], device=model.device)
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return [int(index) for index in ids[0, len(prompt_T) :]]


def _check_code(directory: Path) -> None:
    """Refuses a modeling file that is not atp's: a fresh process would run it."""
    file = directory / "modeling_atp.py"
    names_code = "auto_map" in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    same = file.is_file() and file.read_bytes() == Path(modeling_atp.__file__).read_bytes()
    if names_code and not same:
        raise ValueError(
            f"{file} is missing or differs from this version of atp, and verifying would run it; export the directory "
            f"again (python -m atp.export {directory} --to hf --output NEW_DIRECTORY)"
        )


def _tasks(directory: Path, quantised: Sequence[str]) -> list[dict[str, Any]]:
    """What there is to check, in a fixed order."""
    adapted = (directory / "adapter" / "adapter_config.json").is_file()
    tasks: list[dict[str, Any]] = [{"format": "adapter" if adapted else "hf", "path": str(directory)}]
    tasks += [{**tasks[0], "quantised": kind} for kind in quantised]
    tasks += [{"format": "gguf", "path": str(file)} for file in sorted(directory.glob("gguf/*.gguf"))]
    tasks += [{"format": "onnx", "path": str(file)} for file in sorted(directory.glob("onnx/*.onnx"))]
    return tasks


def _check(stored: StoredModel, task: dict[str, Any], reference: Reference, threads: int) -> Check:
    kind = task["format"]
    path = Path(task["path"])
    name = kind if kind != "gguf" else f"gguf {path.stem.removeprefix('model-')}"
    if task.get("quantised"):
        name = f"{kind} {task['quantised']}"
    if kind in ("hf", "adapter"):
        size = sum(file.stat().st_size for file in (*path.glob("*.safetensors"), *path.glob("adapter/*.safetensors")))
    else:
        size = sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))
    common: dict[str, Any] = {"format": name, "file": os.path.relpath(path, stored.directory), "size_bytes": size}
    common["reference_perplexity"] = reference.perplexity
    package = _PACKAGES.get(kind) or (task.get("quantised") and _quantiser(task["quantised"]))
    if package and importlib.util.find_spec(package) is None:
        return Check(**common, note=f"not run: {package} is not installed ({_WAYS.get(package, package)})")
    result = _probe(task, reference, threads)
    if "error" in result:
        # A quantiser that this platform lacks a kernel for says nothing about the export.
        ok = None if task.get("quantised") else False
        return Check(**common, ok=ok, note=result["error"])
    limit = ROUGH if task.get("quantised") else LIMITS.get(kind, LIMITS.get(name.split()[-1], ROUGH))
    equal = next(
        (i for i, pair in enumerate(zip(result["greedy"], reference.greedy, strict=False)) if pair[0] != pair[1]),
        len(reference.greedy),
    )
    return Check(
        **common,
        max_abs=result["max_abs"],
        top1=result["top1"],
        perplexity=result["perplexity"],
        tokens_per_s=result["tokens_per_s"],
        greedy_equal=f"{equal}/{len(reference.greedy)}",
        ok=_matches(result, limit, reference.deviation) and not result["spelling"],
        note=result["spelling"],
    )


def _quantiser(kind: str) -> str:
    return "bitsandbytes" if kind.startswith("bnb") else "torchao"


def _matches(result: dict[str, Any], limit: Limit, deviation: float) -> bool:
    if result["max_abs"] is None:
        return False
    near = result["max_abs"] <= limit.max_abs * max(deviation, 1.0)
    agrees = result["top1"] >= limit.top1
    return near and agrees if limit.both else near or agrees


def _probe(task: dict[str, Any], reference: Reference, threads: int) -> dict[str, Any]:
    """Runs one format in a fresh process."""
    ids_WT = np.load(reference.folder / "ids.npy", mmap_mode="r")
    task = task | {
        "ids": str(reference.folder / "ids.npy"),
        "reference": str(reference.folder / "reference.npy"),
        "context": int(ids_WT.shape[1]) + 1,
        "prompt": reference.prompt,
        "new_tokens": len(reference.greedy),
        "threads": threads,
    }
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(reference.folder / "modules"),
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, "-P", "-W", "ignore", probe.__file__]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    if done.returncode < 0:
        return {"error": f"the engine was killed by signal {-done.returncode}"}
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {"error": lines[-1][:160] if lines else f"exit code {done.returncode}"}


def as_plain(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The checks as JSON values."""
    return [asdict(check) for check in checks]


def mismatches(checks: Sequence[Check]) -> list[Check]:
    """The checks that failed; one that could not be run is not among them."""
    return [check for check in checks if check.ok is False]


def verification_table(checks: Sequence[Check], title: str = "") -> Table:
    """The checks as a table for the terminal."""
    table = Table(title=title or None)
    table.add_column("format", no_wrap=True)
    titles = ("size MiB", "max logit diff", "top-1", "perplexity", "reference", "greedy =", "tokens/s")
    for name in titles:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result")
    for check in checks:
        state = {True: "ok", False: "MISMATCH", None: "not run"}[check.ok]
        numbers = (
            f"{check.size_bytes / 2**20:.2f}",
            "" if check.max_abs is None else f"{check.max_abs:.2g}",
            "" if check.top1 is None else f"{check.top1:.2%}",
            "" if check.perplexity is None else f"{check.perplexity:.4g}",
            "" if check.reference_perplexity is None else f"{check.reference_perplexity:.4g}",
            check.greedy_equal,
            "" if check.tokens_per_s is None else f"{check.tokens_per_s:.1f}",
        )
        table.add_row(check.format, *numbers, f"{state}: {check.note}" if check.note else state)
    return table
