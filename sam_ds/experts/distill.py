"""Short distillation: the routed model learns from itself with all experts visited, which is the dense model.

The loss is KL(dense || routed) of the next-token distributions on the calibration text: no labels. Stand-ins train,
on request gates and a low-rank update of the experts too; all other weights are frozen. Layers are fitted one by one
(`experts.calibrate`); this is where they learn of each other's errors.

Legend: B rows, S tokens a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sam_ds.errors import InputError
from sam_ds.experts.calibrate import layer_inputs, set_thresholds
from sam_ds.experts.lora import LoraSlices
from sam_ds.experts.model import SamMixin
from sam_ds.experts.surgery import FFN

_WARM_UP = 10
_STANDINS = ("basis_dq", "core_SQp", "spread_pd")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How long and what."""

    steps: int = 100
    rows: int = 8
    """B, rows of the text a step."""
    rate: float = 0.02
    """Of Adam, relative to the root mean square of what it changes; falls to 0 with a cosine."""
    gates: bool = False
    """Whether the gates train too."""
    lora_rank: int = 0
    """Rank of an update of the experts, folded into them at the end (0: none). With it, all experts visited is no
    longer the dense model."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("rows", 1), ("lora_rank", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} of a distillation must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.rate < math.inf:
            raise InputError(f"rate of a distillation must be positive and finite, got {self.rate}")


def distill(
    model: PreTrainedModel, text: Tensor | Iterable[Tensor], config: DistillConfig, *, progress: bool = True
) -> list[float]:
    """Train a converted model in place; returns the loss of every step, in nats a token.

    `text`: token ids, (B, S) or an iterable of such. Thresholds are found anew for the layers' new inputs.
    Raises InputError for a model that is not converted or bears low-rank updates already, has no stand-ins where
    nothing else trains, and for a loss that is not finite; the model is as it was then.
    """
    if not isinstance(model, SamMixin):
        raise InputError("model is not converted; call get_sam_model first")
    layers = model.sam_layers
    if any(layer.lora is not None for layer in layers):
        raise InputError("model has low-rank updates already; call fold_lora() or unload() before distilling")
    if model.sam_config.standin == "none" and not config.gates and not config.lora_rank:
        raise InputError("nothing to distill: the model has no stand-ins, and neither gates nor lora_rank is set")
    batches = [text] if isinstance(text, Tensor) else list(text)
    rows = [row_S for ids_BS in batches for row_S in ids_BS]
    before = {name: value.clone() for name, value in model.state_dict().items() if ".sam." in name}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = model.training
    model.eval()
    try:
        model.requires_grad_(False)
        losses = _train(model, rows, config, progress)
        model.fold_lora(safe=True)
        with torch.no_grad():
            for layer in layers:
                set_thresholds(layer, layer.scores(layer_inputs(model, layer, batches)))
    except BaseException:
        model.load_state_dict(before, strict=False)
        raise
    finally:
        for layer in layers:
            layer.lora = None
            for name in (*_STANDINS, "core_all_Qp"):
                setattr(layer.sam, name, getattr(layer.sam, name).detach())
        for parameter, wants in wanted.items():
            parameter.requires_grad_(wants)
        model.train(training)
    return losses


def _train(model: PreTrainedModel, rows: list[Tensor], config: DistillConfig, progress: bool) -> list[float]:
    assert isinstance(model, SamMixin)
    device = next(model.parameters()).device
    groups = []
    for index, layer in enumerate(model.sam_layers):
        trained = [getattr(layer.sam, name) for name in _STANDINS if getattr(layer.sam, name).numel()]
        trained += [layer.sam.wg] if config.gates else []
        if config.lora_rank:
            layer.lora = _update(layer.ffn, config, index).to(device)
            # A zero factor has no scale of its own.
            groups.append({"params": list(layer.lora.parameters()), "lr": 0.1 * config.rate})
        for value in trained:
            scale = float(value.detach().float().square().mean().sqrt())
            groups.append({"params": [value.requires_grad_()], "lr": config.rate * scale})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / config.steps)),
    )
    generator = torch.Generator().manual_seed(config.seed)
    order: list[int] = []
    losses: list[float] = []
    for step in (bar := tqdm(range(config.steps), desc="distill", unit="step", disable=not progress)):
        while len(order) < config.rows:
            order += torch.randperm(len(rows), generator=generator).tolist()
        drawn, order = order[: config.rows], order[config.rows :]
        ids_BS = nn.utils.rnn.pad_sequence([rows[i] for i in drawn], batch_first=True).to(device)
        loss = _loss(model, ids_BS)
        if not torch.isfinite(loss):
            raise InputError(f"the distillation diverged at step {step}: give a lower rate than {config.rate}")
        optimizer.zero_grad()
        loss.backward()
        for layer in model.sam_layers:
            if layer.sam.core_SQp.grad is not None:
                # Roots have no stand-in.
                layer.sam.core_SQp.grad[: layer.roots] = 0
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        bar.set_postfix(kl=f"{losses[-1]:.4f}")
    for layer in model.sam_layers:
        layer.sam.core_all_Qp = layer.sam.core_SQp.detach().sum(0)
    return losses


def _loss(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    """KL(dense || routed), a mean over tokens."""
    assert isinstance(model, SamMixin)
    updates = [layer.lora for layer in model.sam_layers]
    with torch.no_grad(), model.active(model.sam_config.num_experts):
        for layer in model.sam_layers:
            layer.lora = None
        teacher = model(input_ids=ids_BS, use_cache=False).logits.float().log_softmax(-1)
    for layer, update in zip(model.sam_layers, updates, strict=True):
        layer.lora = update
        layer.sam.core_all_Qp = layer.sam.core_SQp.sum(0)
    student = model(input_ids=ids_BS, use_cache=False).logits.float().log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="sum") / ids_BS.numel()


def _update(ffn: FFN, config: DistillConfig, index: int) -> LoraSlices:
    return LoraSlices(
        hidden=ffn.hidden, neurons=ffn.neurons, gated=ffn.gate is not None, rank=config.lora_rank,
        alpha=2.0 * config.lora_rank, seed=config.seed + index,
    )  # fmt: skip
