"""Masks over a LoRA model: generators, samplers, budgets, gates; the only room that knows PEFT."""
