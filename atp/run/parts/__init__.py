"""From configuration to objects: base model, tokenizer, data, training modules, trainer.

The only place where the typed configuration meets constructors; everything that is called takes plain keyword
arguments. It knows nothing of the order of stages.
"""

from atp.run.parts.base import DTYPES, check_tokenizer, export_dtype, load_base, load_tokenizer, model_source
from atp.run.parts.components import component, device_of, make_loggers, make_trainer
from atp.run.parts.data import (
    check_packing,
    data_faults,
    data_module,
    load_beyond,
    load_scored,
    load_splits,
    normalisation,
)
from atp.run.parts.ignored import tell_settings
from atp.run.parts.prompting import export_generation, load_prompt
from atp.run.parts.quantization import check_quantization
from atp.run.parts.training import (
    check_start,
    cost_model,
    is_distilled,
    make_repair,
    min_units,
    pruning_module,
    pruning_space,
    tuning_module,
    two_stage,
)

__all__ = [
    "DTYPES",
    "check_packing",
    "check_quantization",
    "check_start",
    "check_tokenizer",
    "component",
    "cost_model",
    "data_faults",
    "data_module",
    "device_of",
    "export_dtype",
    "export_generation",
    "is_distilled",
    "load_base",
    "load_beyond",
    "load_prompt",
    "load_scored",
    "load_splits",
    "load_tokenizer",
    "make_loggers",
    "make_repair",
    "make_trainer",
    "min_units",
    "model_source",
    "normalisation",
    "pruning_module",
    "pruning_space",
    "tell_settings",
    "tuning_module",
    "two_stage",
]
