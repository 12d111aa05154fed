"""sam_ds: self-assembling expert graphs. Federated learning of the weights and the topology of a language model.

The public verbs are `get_sam_model`, `distill` and `from_pretrained`; `to_deepspeed_moe`, `to_views` and `to_nf4`,
which say what computes the experts; `add_lora`, `save_adapter` and `load_adapter`; `personal_graph`. A converted model
has `save_pretrained`, `merge_and_unload`, `unload`, `print_trainable_parameters`, `active`, `over` and `set_graph`
beside everything its own class has.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sam_ds.errors import InputError

if TYPE_CHECKING:
    from sam_ds.experts.adapter import add_lora, load_adapter, save_adapter
    from sam_ds.experts.checkpoint import from_pretrained
    from sam_ds.experts.config import SamConfig
    from sam_ds.experts.convert import get_sam_model
    from sam_ds.experts.deepspeed_moe import to_deepspeed_moe, to_views
    from sam_ds.experts.distill import DistillConfig, distill
    from sam_ds.experts.nf4 import to_nf4
    from sam_ds.experts.personal import PersonalGraph, personal_graph

__all__ = [
    "DistillConfig", "InputError", "PersonalGraph", "SamConfig", "add_lora", "distill", "from_pretrained",
    "get_sam_model", "load_adapter", "personal_graph", "save_adapter", "to_deepspeed_moe", "to_nf4", "to_views",
]  # fmt: skip

_LAZY = {
    "SamConfig": "config", "DistillConfig": "distill", "distill": "distill", "from_pretrained": "checkpoint",
    "get_sam_model": "convert", "to_deepspeed_moe": "deepspeed_moe", "to_views": "deepspeed_moe",
    "to_nf4": "nf4", "add_lora": "adapter", "save_adapter": "adapter",
    "load_adapter": "adapter", "PersonalGraph": "personal", "personal_graph": "personal",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Lazy, so that the configuration and the pure parts load without torch and transformers.
    if name in _LAZY:
        if name in ("from_pretrained", "get_sam_model"):
            # A model that a script makes may come under transformers.Trainer; our own runs do without it.
            import_module("sam_ds.experts.trainer")
        return getattr(import_module(f"sam_ds.experts.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'sam_ds' has no attribute {name!r}")
