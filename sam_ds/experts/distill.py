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
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sam_ds.errors import InputError
from sam_ds.experts.calibrate import set_thresholds
from sam_ds.experts.inputs import check_text, layer_inputs
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


def check_distillation(config: DistillConfig, standin: str) -> None:
    """Raise InputError where nothing would train."""
    if standin == "none" and not config.gates and not config.lora_rank:
        raise InputError("nothing to distill: standin is 'none', and neither gates nor lora_rank is set")


def distill(
    model: PreTrainedModel, text: Tensor | Iterable[Tensor], config: DistillConfig, *, progress: bool = True
) -> list[float]:
    """Train a converted model in place; returns the loss of every step, in nats a token.

    `text`: token ids, (B, S) or an iterable of such, rows of one length. Thresholds are found anew for the layers' new
    inputs. Raises InputError for a model that is not converted or bears low-rank updates already, where nothing would
    train, for text of no or unequal rows or with ids the model has not, and for a loss that is not finite. Whatever
    goes wrong, the model is left as it was.
    """
    if not isinstance(model, SamMixin):
        raise InputError("model is not converted; call get_sam_model first")
    model.check_views("distilled")
    layers = model.sam_layers
    if any(layer.lora is not None for layer in layers):
        raise InputError("model has low-rank updates already; call fold_lora() or unload() before distilling")
    check_distillation(config, model.sam_config.standin)
    batches = [text] if isinstance(text, Tensor) else list(text)
    check_text(model, batches)
    if len({ids_BS.shape[1] for ids_BS in batches}) > 1:
        raise InputError("the rows of the text have unequal lengths; pack them to one length")
    before = {name: value.clone() for name, value in model.state_dict().items() if ".sam." in name}
    state = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    training = model.training
    model.eval()
    try:
        model.requires_grad_(False)
        for parameter in state:
            parameter.grad = None
        with torch.enable_grad():
            losses = _train(model, torch.cat(batches), config, progress)
        with torch.no_grad():
            if model.sam_config.routing == "threshold":
                for layer, x_Td in zip(layers, layer_inputs(model, layers, batches), strict=True):
                    set_thresholds(layer, layer.scores(x_Td))
        # Last: what it changes is not kept.
        model.fold_lora(safe=True)
    except BaseException:
        model.load_state_dict(before, strict=False)
        raise
    finally:
        for layer in layers:
            layer.lora = None
            for name in (*_STANDINS, "core_all_Qp"):
                setattr(layer.sam, name, getattr(layer.sam, name).detach())
        for parameter, (wants, gradient) in state.items():
            parameter.requires_grad_(wants)
            parameter.grad = gradient
        model.train(training)
    return losses


def _train(model: PreTrainedModel, text_BS: Tensor, config: DistillConfig, progress: bool) -> list[float]:
    assert isinstance(model, SamMixin)
    device = next(model.parameters()).device
    trained: list[Tensor] = []
    masters: list[Tensor] = []
    groups = []

    def train(value: Tensor, rate: float) -> None:
        trained.append(value.requires_grad_())
        # In fp32 whatever the model's precision: half precision loses small steps and the squares of Adam.
        masters.append(value.detach().float().clone())
        groups.append({"params": masters[-1:], "lr": rate})

    for index, layer in enumerate(model.sam_layers):
        values = [getattr(layer.sam, name) for name in _STANDINS] + ([layer.sam.wg] if config.gates else [])
        for value in values:
            if value.numel():
                train(value, config.rate * float(value.detach().float().square().mean().sqrt()))
        if config.lora_rank:
            layer.lora = _update(layer.ffn, config, index).to(layer.matrices()[0])
            for value in layer.lora.parameters():
                # Factors that start at zero have no scale of their own.
                train(value, 0.1 * config.rate)
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
            order += torch.randperm(len(text_BS), generator=generator).tolist()
        drawn, order = order[: config.rows], order[config.rows :]
        loss = _loss(model, text_BS[drawn].to(device))
        if not torch.isfinite(loss):
            raise InputError(f"the distillation diverged at step {step}: give a lower rate than {config.rate}")
        loss.backward()
        for layer in model.sam_layers:
            if layer.sam.core_SQp.grad is not None:
                # Roots have no stand-in.
                layer.sam.core_SQp.grad[: layer.roots] = 0
        for value, master in zip(trained, masters, strict=True):
            master.grad, value.grad = None if value.grad is None else value.grad.float(), None
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for value, master in zip(trained, masters, strict=True):
                value.copy_(master)
        losses.append(float(loss.detach()))
        bar.set_postfix(kl=f"{losses[-1]:.4f}")
    for layer in model.sam_layers:
        layer.sam.core_all_Qp = layer.sam.core_SQp.detach().sum(0)
    return losses


def _loss(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    """KL(dense || routed), a mean over tokens."""
    assert isinstance(model, SamMixin)
    updates = [layer.lora for layer in model.sam_layers]
    with torch.no_grad(), model.dense():
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
