"""The lines that load a pruned model: one text for the terminal, the report and the model card.

At the very bottom: pure text from plain arguments, so that whoever shows the lines shows the same ones. Imports nothing
of atp, reads no files.
"""

from __future__ import annotations

from pathlib import Path


def load_lines(path: str | Path, stock: bool, *, adapter: bool = False) -> str:
    """The two lines of Python that load a pruned model and its tokenizer.

    Args:
        path: The exported directory.
        stock: Whether a stock class holds the model; otherwise the code beside the weights must be trusted.
        adapter: Whether an adapter lies beside the weights; two more lines then add it.

    Returns:
        Lines to be run as they are, in an environment that has transformers (and peft, for an adapter).
    """
    arguments = repr(str(path)) + ("" if stock else ", trust_remote_code=True")
    classes = ("AutoModelForCausalLM", "AutoTokenizer")
    loaded = ", ".join(f"{name}.from_pretrained({arguments})" for name in classes)
    lines = f"from transformers import {', '.join(classes)}\nmodel, tokenizer = {loaded}"
    if adapter:
        folder = repr(str(Path(path) / "adapter"))
        lines += f"\nfrom peft import PeftModel\nmodel = PeftModel.from_pretrained(model, {folder})"
    return lines


def llama_cpp_line(file: str) -> str:
    """The line of shell that opens a GGUF file."""
    return f'llama-cli -m {file} -p "..."'


def vllm_line(path: str, *, adapter: bool = False) -> str:
    """The line of shell that serves an exported directory; an adapter beside the weights gets the name ``tuned``."""
    return f"vllm serve {path}" + (f" --enable-lora --lora-modules tuned={path}/adapter" if adapter else "")


def onnxruntime_line(file: str) -> str:
    """The line of Python that opens an ONNX graph."""
    return f"session = onnxruntime.InferenceSession({file!r})"
