"""Per-layer models under transformers' Auto classes, registered when first needed.

`import atp` calls :func:`register_on_demand` and loads neither torch nor transformers. Sits beside the architecture,
whose per-layer model types it registers; it knows nothing of widths or weights.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from atp.imports import after_import
from atp.model.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_REGISTRY = "transformers.models.auto.configuration_auto"


def register_on_demand() -> None:
    """Makes transformers' Auto classes load per-layer models without `trust_remote_code`, importing nothing now.

    Placeholders stand in for the config classes as soon as transformers' registry is imported, by whomever; the first
    use of one imports modeling_atp, which registers the real classes. (Importing them right away would make
    `import atp` take seconds, and registering them while transformers is being imported runs into its import cycles.)
    """
    after_import(_REGISTRY, _register_placeholders)


class _Placeholder:
    """Stands in for a per-layer config class until it is used."""

    model_type: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.resolve()(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Makes a config of the real class, as AutoConfig asks of a config class."""
        return cls.resolve().from_dict(config_dict, **kwargs)

    @classmethod
    def resolve(cls) -> type[PreTrainedConfig]:
        """Registers the real classes in place of the placeholders and returns the one for this model type."""
        from atp.model import modeling_atp

        modeling_atp.register()
        return modeling_atp.CONFIG_CLASSES[cls.model_type]


def _register_placeholders(registry: ModuleType) -> None:
    if "atp.model.modeling_atp" in sys.modules:
        return
    for family in FAMILIES.values():
        model_type = family.per_layer_type
        placeholder = type(f"Placeholder_{model_type}", (_Placeholder,), {"model_type": model_type})
        registry.AutoConfig.register(model_type, placeholder, exist_ok=True)
