"""`get_sam_model`: from a dense causal LM to expert graphs in place, with calibration text.

What can be refused is refused before a weight is moved.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sam_ds.errors import InputError
from sam_ds.experts.allocation import lost_by_budget, output_fisher
from sam_ds.experts.calibrate import calibrate_layer, discover, hidden_of
from sam_ds.experts.config import SamConfig
from sam_ds.experts.inputs import DISCOVERY_TOKENS, check_text, evenly, layer_inputs
from sam_ds.experts.model import SamMixin, inject_layers, wrap_ffns
from sam_ds.experts.saliency import saliency
from sam_ds.experts.surgery import find_ffns, permute_neurons
from sam_ds.experts.verify import check_layers


def check_architecture(architecture: PreTrainedConfig, config: SamConfig) -> PreTrainedModel:
    """All that can be said before weights are read; returns the model without any (on the meta device).

    Raises InputError as `get_sam_model` does: no FFN found, E does not divide the neurons, a rank above the hidden
    size; ValueError where the architecture has no causal language model.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(architecture)
    wrap_ffns(find_ffns(model), config)
    return model


@torch.no_grad()
def get_sam_model(
    model: PreTrainedModel, config: SamConfig, *, calibration: Tensor | Iterable[Tensor], progress: bool = True
) -> SamMixin:
    """Find the experts latent in `model`'s feed-forward layers and put the gate and the graph on them, in place.

    `calibration`: token ids, a (B, S) tensor or an iterable of such; a few thousand tokens of text like the model's.
    The model computes what it did where all experts are visited (`with model.active(config.num_experts)`).

    Raises InputError: no FFN found, or one that does not compute what its parts suggest, or whose weights cannot be
    put in another order (quantized, shared); already converted or a mixture of experts; E does not divide the neurons
    (naming the divisors); stand-ins of a rank above the hidden size; too few calibration tokens, a token id outside
    the vocabulary, weights or activations that are not finite (naming the parameter or layer). Whatever goes wrong, the
    model is left as it was.
    """
    if isinstance(model, SamMixin):
        raise InputError("model is converted already; call merge_and_unload() first to convert it anew")
    ffns = find_ffns(model)
    for ffn in ffns:
        if ffn.sharded:
            raise InputError(f"{ffn.path} was cut into shards by ZeRO-3 as it was loaded: load the model, and convert "
                             "it, before TrainingArguments or HfDeepSpeedConfig are made")  # fmt: skip
    layers = wrap_ffns(ffns, config)
    batches = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    tokens = sum(ids.numel() for ids in batches)
    needed = 4 * config.num_experts * (config.standin_shape(ffns[0].hidden)[0] + 1)
    if tokens < needed:
        raise InputError(f"calibration has {tokens} tokens; fitting {config.num_experts} experts needs {needed}")
    check_text(model, batches)
    # One NaN would spread over a fit, and no forward pass says which weight it came from.
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{name} of the model holds values that are not finite: the checkpoint is damaged, "
                             "or its precision too low for it")  # fmt: skip
    training = model.training
    model.eval()
    try:
        check_layers(model, ffns, layers, next(ids_BS[:1] for ids_BS in batches if ids_BS.numel()))
        some = evenly(batches, DISCOVERY_TOKENS)
        fisher = None
        if config.allocation == "sensitivity":
            fisher = output_fisher(model, ffns, some, seed=config.seed)
        salient = saliency(model, ffns, some) if config.root_choice == "saliency" else [None] * len(ffns)
        # All are found before the first is put in place: what is refused here leaves every weight where it was.
        orders, lost = [], []
        inputs = layer_inputs(model, [ffn.entry for ffn in ffns], some)
        for index, ffn in enumerate(tqdm(ffns, desc="find experts", unit="layer", disable=not progress)):
            x_Td = next(inputs)
            order_m = discover(
                ffn, x_Td, num_experts=config.num_experts, roots=config.roots, features=config.features,
                regroups=config.regroups, top_k=config.top_k, seed=config.seed + index, saliency_m=salient[index],
            )  # fmt: skip
            orders.append(order_m)
            if fisher is not None:
                hidden_Tm, down_md = hidden_of(ffn, x_Td)[:, order_m], ffn.weights()[2][order_m]
                lost.append(lost_by_budget(
                    hidden_Tm, down_md, fisher[index], num_experts=config.num_experts, roots=config.roots
                ))  # fmt: skip
        for ffn, order_m in zip(ffns, orders, strict=True):
            permute_neurons(ffn, order_m)
        converted = inject_layers(model, config, ffns, layers, torch.stack(lost).cpu() if lost else None)
        try:
            affinity = []
            inputs = layer_inputs(model, layers, batches)
            for index, layer in enumerate(tqdm(layers, desc="fit gates", unit="layer", disable=not progress)):
                affinity.append(
                    calibrate_layer(
                        layer, next(inputs), standin=config.standin, density=config.density, seed=config.seed + index,
                        graph=config.graph,
                    )
                )  # fmt: skip
        except BaseException:
            converted.unload()
            for ffn, order_m in zip(ffns, orders, strict=True):
                permute_neurons(ffn, order_m.argsort())
            raise
        converted.sam_affinity_LEE = torch.stack(affinity)
    finally:
        model.train(training)
    return converted
