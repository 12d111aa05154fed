"""Checkpoints of `transformers.Trainer`: what SAM adds comes back with the weights. Importing this sees to it.

On resuming, and for the best model at the end, Trainer reads a checkpoint's plain weights into the model that it has,
and never tells the model which folder they are from: so its two methods that read are wrapped, for converted models
only. Under DeepSpeed and FSDP it restores the whole module itself: all but the budgets of the layers and the
assembler's prior, which a model converted with the same text has anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import Trainer

from sam_ds.experts.checkpoint import restore_sam
from sam_ds.experts.model import SamMixin


def _restoring(method: Callable[..., None], folder_of: Callable[..., str]) -> Callable[..., None]:
    @wraps(method)
    def load(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        folder = folder_of(trainer, *args, **kwargs)
        # What Trainer says of a folder that is not there is its own affair.
        if isinstance(trainer.model, SamMixin) and not sharded and Path(folder).is_dir():
            restore_sam(trainer.model, folder)
        method(trainer, *args, **kwargs)

    return load


_FOLDER_OF: dict[str, Callable[..., str]] = {
    "_load_from_checkpoint": lambda trainer, resume_from_checkpoint, model=None: resume_from_checkpoint,
    "_load_best_model": lambda trainer: trainer.state.best_model_checkpoint,
}
for _name, _folder_of in _FOLDER_OF.items():
    setattr(Trainer, _name, _restoring(getattr(Trainer, _name), _folder_of))
