"""The page of families: as the script writes it, and every cell of it true of a model that lost units of the kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_batch, tiny_model
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from atp import embedded
from atp.cut.removal import max_logit_difference, remove, slice_adapter
from atp.errors import UserError
from atp.export.gguf.file import export_gguf
from atp.export.gguf.layout import check_layout, gguf_layout
from atp.export.hf.loading import load_exported
from atp.export.hf.writing import export_hf
from atp.export.llama_cpp.engine import LlamaCppEngine
from atp.export.matrix import INSIDE_HEADS, cell, page
from atp.export.onnx_graph import export_onnx
from atp.masks.adapter import extract_adapter
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.merging import base_tensors, merged_tensors
from atp.model.families import FAMILIES, Family, is_stock
from atp.space.space import PruningSpace
from atp.space.units import KINDS

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "families.md"
BATCH = tiny_batch()
CELLS = [pytest.param(family, kind, id=f"{name}-{kind}") for name, family in FAMILIES.items() for kind in KINDS]
LAYERS = 2


def masks_of(space: PruningSpace, *, layers: int) -> Tensor:
    """Masks under which the first layers lose a third of their units; the residual stream does in any case."""
    masks_U = torch.ones(space.num_units)
    for axis in space.axes:
        if axis.layer < layers:
            masks = masks_U[axis.offset : axis.offset + axis.size]
            if axis.kind == "query_heads":  # every KV head keeps as many
                masks[:: space.layers[axis.layer].group_size] = 0.0
            else:  # a quarter of the stream, which leaves what heads divide
                masks[: axis.size // (4 if axis.kind == "hidden" else 3)] = 0.0
    return masks_U


def test_the_page_is_what_the_script_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m atp.export.matrix > docs/how-to/families.md"


@pytest.mark.parametrize(("family", "kind"), CELLS)
def test_a_kind_is_exact_merged_and_as_an_adapter_or_refused(family: Family, kind: str, tmp_path: Path) -> None:
    model = tiny_model(family.model_type, layers=LAYERS)
    if not cell(family, kind, "prune").works:
        with pytest.raises(UserError, match=f"prune.space holds '{kind}'"):
            PruningSpace.from_model(model, (kind,))
        return
    space = PruningSpace.from_model(model, (kind,))
    masked = MaskedModel(add_lora(model, r=2), space).eval()
    for name, parameter in masked.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.2)
    masks_U = masks_of(space, layers=LAYERS)
    masked.set_masks(masks_U)
    config, peft_model = masked.peft_model.get_base_model().config, masked.peft_model
    removed = remove(merged_tensors(peft_model), config, space, masks_U)
    assert max_logit_difference(masked, removed, [BATCH]) < 1e-4
    base = remove(base_tensors(peft_model), config, space, masks_U)
    export_hf(base, None, tmp_path / "model", adapter=slice_adapter(extract_adapter(peft_model), space, masks_U))
    assert max_logit_difference(masked, load_exported(tmp_path / "model"), [BATCH]) < 1e-4
    assert is_stock(removed.config) == (cell(family, kind, "hf").text == "stock")


def pruned_for_llama_cpp(family: Family, kind: str, column: str, **options: int) -> PreTrainedModel:
    tied = column == "gguf_per_layer" or family.gguf_tied_only
    model = tiny_model(family.model_type, layers=LAYERS, tied=tied, for_llama_cpp=True, **options)
    space = PruningSpace.from_model(model, (kind,))
    masks_U = masks_of(space, layers=LAYERS if column == "gguf" else 1)
    return remove(model.state_dict().items(), model.config, space, masks_U)


@pytest.mark.parametrize("column", ["gguf", "gguf_per_layer"])
@pytest.mark.parametrize(("family", "kind"), CELLS)
def test_llama_cpp_is_refused_before_training_or_a_file_can_be_laid_out(family: Family, kind: str, column: str) -> None:
    found, dense = cell(family, kind, column), tiny_model(family.model_type, layers=LAYERS, for_llama_cpp=True).config
    dense.tie_word_embeddings = column == "gguf_per_layer" or family.gguf_tied_only
    if not found.works:
        with pytest.raises(UserError, match=found.text):
            check_layout(dense, uniform=column == "gguf", axes=[kind])
        with pytest.raises(UserError, match="GGUF"):
            gguf_layout(pruned_for_llama_cpp(family, kind, column).config)
        return
    assert check_layout(dense, uniform=column == "gguf", axes=[kind])
    layout = gguf_layout(pruned_for_llama_cpp(family, kind, column).config)
    named = {"llama"} if family.model_type == "qwen2" else set()
    if column == "gguf_per_layer" and kind in (*INSIDE_HEADS, "hidden"):
        named.add(family.gguf[0])  # these widths are equal in all layers as far as the file goes
    assert layout.architecture in {found.text.split("`")[1], *named}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_graph_computes_what_the_model_does(family: Family, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'atp[onnx]'")
    model = tiny_model(family.model_type, layers=LAYERS)
    space = PruningSpace.from_model(model, tuple(kind for kind in KINDS if cell(family, kind, "onnx").works))
    small = remove(model.state_dict().items(), model.config, space, masks_of(space, layers=1))
    export_hf(small, None, tmp_path / "model")
    session = onnxruntime.InferenceSession(str(export_onnx(tmp_path / "model", cache=False)))
    ids, mask = BATCH["input_ids"], BATCH["attention_mask"]
    (found,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        expected = small(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(torch.from_numpy(found)[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("column", ["gguf", "gguf_per_layer"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_llama_cpp_itself_computes_what_the_model_does(family: Family, column: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'atp[llamacpp]'")
    tokenizer = AutoTokenizer.from_pretrained(embedded.base_dir())
    ids_T = torch.randint(5, 2048, (14,), generator=torch.Generator().manual_seed(0))
    # llama.cpp looks GELU up in a table of halves
    most = 2e-5 if "silu" in family.activations else 2e-3
    for kind in KINDS:
        if not cell(family, kind, column).works:
            continue
        model = pruned_for_llama_cpp(family, kind, column, vocabulary=2048)
        export_hf(model, tokenizer, tmp_path / kind)
        (written,) = export_gguf(tmp_path / kind, types=["f32"])
        with torch.no_grad():
            expected = torch.log_softmax(model(ids_T[None]).logits[0].double(), -1)
        engine = LlamaCppEngine({"path": str(written.path), "context": len(ids_T)})
        found = torch.log_softmax(torch.from_numpy(engine.logits(ids_T.numpy())).double(), -1)
        engine.close()
        assert (found - expected).abs().max() < most, kind


@pytest.mark.parametrize(
    "family", [one for one in FAMILIES.values() if one.gguf_tied_only], ids=lambda one: one.model_type
)
def test_a_head_that_llama_cpp_does_not_know_is_refused(family: Family) -> None:
    own_head = tiny_model(family.model_type, for_llama_cpp=True)
    for refused in (lambda: check_layout(own_head.config, uniform=True), lambda: gguf_layout(own_head.config)):
        with pytest.raises(UserError, match=r"head of its own \(tie_word_embeddings=false\); leave export\.gguf out"):
            refused()
