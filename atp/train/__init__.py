"""Training: LoRA tuning, masks and adapters learnt together, and what is watched, logged and saved meanwhile.

Takes the masked model, a generator, a sampler, a budget and batches; gives a Lightning module, callbacks and loggers,
and in the end a checkpoint of what trained and the frozen masks. It knows nothing of Hydra, of the order of stages, or
of how results are measured.
"""
