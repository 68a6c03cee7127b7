"""Every (family x shape x format) cell: does it load in its engine, and how far are its logits.

Tiny random models with every width the pruning space can leave, exported, loaded in transformers, llama.cpp and
onnxruntime, and compared with the removed model on the same tokens. Needs `pip install -e '.[dev]'`.

    python benchmarks/export_matrix.py [--output benchmarks/results/export_matrix.md]
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/model")]

from test_architecture import CASES, SHAPES, VOCAB, dense_model, pruned_model  # noqa: E402

from atp.export.gguf.file import export_gguf  # noqa: E402
from atp.export.hf.writing import export_hf  # noqa: E402
from atp.export.llama_cpp.engine import LlamaCppEngine  # noqa: E402
from atp.export.onnx_graph import export_onnx  # noqa: E402
from atp.export.verify import engines  # noqa: E402

TOKENS = 48
COLUMNS = ("hf class", "hf", "gguf arch", "gguf f32", "gguf f16", "gguf q8_0", "onnx")


def main() -> None:
    """Fills the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="models to try; by default all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    lines = [f"| family | shape | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for case in arguments.cases:
        dense = dense_model(CASES[case])
        for shape in SHAPES:
            with tempfile.TemporaryDirectory() as folder:
                cells = row(pruned_model(dense, CASES[case], SHAPES[shape]), Path(folder) / "model")
            lines.append(f"| {case} | {shape} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        head = (
            "Largest absolute logit difference from the removed model, float32 PyTorch on the CPU; logits deviate by "
            "about 1.5. Random weights, 4 layers, vocabulary 61. Made by `python benchmarks/export_matrix.py`.\n\n"
        )
        arguments.output.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def row(model, directory: Path) -> list[str]:
    """The cells of one model."""
    export_hf(model, None, directory)
    ids_T = np.random.default_rng(0).integers(0, VOCAB, TOKENS)

    def difference(engine: Callable[[], object], tokens: int = TOKENS) -> str:
        with torch.no_grad():
            expected = model(input_ids=torch.tensor(ids_T[None, :tokens])).logits[0].numpy()
        return f"{np.abs(engine().logits(ids_T[:tokens]) - expected).max():.1e}"

    cells = [type(model).__name__]
    cells.append(difference(lambda: engines.TransformersEngine({"format": "hf", "path": str(directory)})))
    try:
        files = export_gguf(directory, types=["f32", "f16", "q8_0"], tokenizer=False)
    except ValueError:
        cells += ["refused"] * 4
    else:
        windowed = any("sliding window" in note for note in files[0].notes)
        context = 4 if windowed else TOKENS  # the context in which both agree
        cells.append(files[0].architecture)
        for file in files:
            task = {"path": str(file.path), "context": 64}
            cells.append(difference(lambda task=task: LlamaCppEngine(task), context))
    graph = export_onnx(directory)
    cells.append(difference(lambda: engines.OnnxEngine({"path": str(graph)})))
    return cells


if __name__ == "__main__":
    main()
