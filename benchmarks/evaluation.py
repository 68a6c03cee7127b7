"""How long evaluation takes against a naive loop: ``python -m benchmarks.evaluation [--quick] [--device cuda]``.

Scores multiple-choice items and generates summaries, once as ATP does (batches of like length, a prompt read once and
its choices as one row after it, batched decoding with the KV cache) and once item by item: a forward pass for every
choice, and ``generate`` of transformers, also with its cache, for every summary. Items are 200 of CaseHOLD and 200 of
BillSum where ``../shared/data`` lies beside the repository, otherwise the embedded legal tasks. Both ways run in
alternation in one process and must pick the same choices and write the same texts. The aim is a ratio of at most 0.25.
Other work on the machine's cores distorts the ratio. Prints a table and writes ``benchmarks/results/evaluation.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from atp import embedded
from atp.data.domains import load_domain
from atp.data.encoding import Choices, Encoder
from atp.data.records import ChoiceRecord, CompletionRecord
from atp.data.sources import load_embedded
from atp.evaluate.scoring import choice_nats, evaluating, greedy

AIM = 0.25
REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"


def load_items(count: int) -> tuple[str, list[ChoiceRecord], list[CompletionRecord]]:
    """So many choice and so many completion records, and where they are from."""
    legal = SHARED / "data" / "legal"
    if legal.is_dir():
        where, found = "CaseHOLD and BillSum", []
        for task in ("casehold", "billsum"):
            splits = load_domain({task: None}, seed=0, path=str(legal), test_fraction=0.9, near_duplicates="ignore")
            found += [*splits.test, *splits.validation, *splits.train]
    else:
        where, found = "embedded legal tasks", load_embedded("legal", train=1, validation=1, test=6 * count).test
    choices = [record for record in found if isinstance(record, ChoiceRecord)][:count]
    completions = [record for record in found if isinstance(record, CompletionRecord)][:count]
    return where, choices, completions


def picked(nats: Sequence[Sequence[float]]) -> int:
    """The choice of the highest log-likelihood per token."""
    scores = [sum(one) / len(one) for one in nats]
    return scores.index(min(scores))


def naive_picks(model: PreTrainedModel, items: Sequence[Choices], device: torch.device) -> list[int]:
    """One forward pass for every choice of every item."""
    found = []
    for item in items:
        nats = []
        for continuation in item.continuations:
            ids = torch.tensor([item.prompt + continuation], device=device)
            logits = model(input_ids=ids).logits[0, len(item.prompt) - 1 : -1]
            nats.append(functional.cross_entropy(logits.float(), ids[0, len(item.prompt) :], reduction="none").tolist())
        found.append(picked(nats))
    return found


def naive_texts(
    model: PreTrainedModel, prompts: Sequence[list[int]], stops: list[int], new_tokens: int, device: torch.device
) -> list[list[int]]:
    """One call of ``generate`` for every prompt."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        made: Any = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=0,
        )
        continuation = made[0, len(prompt) :].tolist()
        end = next((at for at, token in enumerate(continuation) if token in stops), len(continuation))
        found.append(continuation[:end])
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time both ways, part by part."""
    device = torch.device(options.device)
    path = options.model or (SHARED / "models/stories3M" if (SHARED / "models/stories3M").is_dir() else None)
    path = path or embedded.base_dir()
    tokenizer = AutoTokenizer.from_pretrained(path)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    where, choice_records, completion_records = load_items(options.items)
    encoder = Encoder(tokenizer, options.max_length, close=False)
    items = encoder.choices(choice_records)
    prompts = encoder.prompts([record.prompt for record in completion_records], options.new_tokens)
    stops = [int(tokenizer.eos_token_id)]
    how: dict[str, Any] = {"batch_size": options.batch_size, "pad_id": encoder.pad_id, "device": device}
    ways: dict[str, Any] = {
        ("choices", "ATP"): lambda: [picked(nats) for nats in choice_nats(model, items, **how)],
        ("choices", "naive"): lambda: naive_picks(model, items, device),
        ("texts", "ATP"): lambda: greedy(model, prompts, stops=stops, max_new_tokens=options.new_tokens, **how),
        ("texts", "naive"): lambda: naive_texts(model, prompts, stops, options.new_tokens, device),
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in ways}
    results: dict[tuple[str, str], Any] = {}
    with evaluating(model):
        choice_nats(model, items[:8], **how)
        naive_texts(model, prompts[:1], stops, 4, device)
        for number in range(options.rounds):
            for key in list(ways)[:: -1 if number % 2 else 1]:
                started = time.perf_counter()
                results[key] = ways[key]()
                seconds[key].append(time.perf_counter() - started)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    total = {way: sum(value for key, value in medians.items() if key[1] == way) for way in ("ATP", "naive")}
    return {
        "items": where,
        "model": Path(path).name,
        "choices": len(items),
        "texts": len(prompts),
        "max_length": options.max_length,
        "new_tokens": options.new_tokens,
        "batch_size": options.batch_size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "seconds": {f"{part}, {way}": round(value, 2) for (part, way), value in medians.items()},
        "ratio": {
            **{part: round(medians[part, "ATP"] / medians[part, "naive"], 4) for part in ("choices", "texts")},
            "both": round(total["ATP"] / total["naive"], 4),
        },
        "aim": AIM,
        "same": {part: agreement(results[part, "ATP"], results[part, "naive"]) for part in ("choices", "texts")},
    }


def agreement(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Share of equal entries."""
    return sum(a == b for a, b in zip(first, second, strict=True)) / max(1, len(first))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200, help="choice items, and as many summaries")
    parser.add_argument("--model", type=Path, help="directory of a model; unset takes stories3M or the embedded one")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="20 items of each")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/evaluation.json")
    options = parser.parse_args()
    if options.quick:
        options.items = min(options.items, 20)
    result = measure(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{result['items']}, {result['model']}, {result['threads']} threads on {result['device']}")
    for part in ("choices", "texts"):
        ours, naive = (result["seconds"][f"{part}, {way}"] for way in ("ATP", "naive"))
        same = result["same"][part]
        print(f"{part:8s} {ours:8.2f} s, naive {naive:8.2f} s: {result['ratio'][part]:.3f}; same results {same:.1%}")
    print(f"both: {result['ratio']['both']:.3f} (aim {AIM})")


if __name__ == "__main__":
    main()
