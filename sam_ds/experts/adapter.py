"""Low-rank updates of the experts as PEFT knows them: its `LoraConfig` in, its adapter folder out.

The slices of all experts of a matrix are one ordinary LoRA pair on the permuted FFN, which stock PEFT loads onto the
plain model of the same folder. Where gate and up are one fused map, its pair has both ranks, with zeros between.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sam_ds.errors import InputError
from sam_ds.experts.attention import updated_maps
from sam_ds.experts.model import SamMixin
from sam_ds.experts.units import prepare

_READ = ("r", "lora_alpha", "target_modules")
_ABOUT = (
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "auto_mapping",
    "fan_in_fan_out", "runtime_config",
)  # fmt: skip
"""What of a `LoraConfig` says nothing of the updates themselves, or follows from the model."""
_GATES = "sam_gates.safetensors"


def add_lora(model: PreTrainedModel, config: LoraConfig, *, seed: int = 0) -> None:
    """Put low-rank updates on the experts of a converted model and let them and the gates train, nothing else.

    Of `config`, r, lora_alpha and target_modules are read: all linear maps of the FFNs, or None. Raises InputError for
    anything else that is set, and for a model that is not converted or has updates already.
    """
    if not isinstance(model, SamMixin):
        raise InputError("model is not converted; call get_sam_model first")
    if any(layer.lora is not None for layer in model.sam_layers):
        raise InputError("model has low-rank updates already; save_adapter or fold_lora() first")
    for field in fields(LoraConfig):
        value, default = getattr(config, field.name), getattr(LoraConfig(), field.name)
        if field.name not in (*_READ, *_ABOUT) and value != default:
            raise InputError(f"LoraConfig has {field.name}={value!r}, which slices by expert do not know; leave it at "
                             f"{default!r}")  # fmt: skip
    names = {name for layer in model.sam_layers for name in layer.ffn_names if name is not None}
    wanted = config.target_modules
    if wanted is not None and (isinstance(wanted, str) or set(wanted) != names):
        raise InputError(f"target_modules must be {sorted(names)}, the maps that experts are slices of, got "
                         f"{wanted!r}; put an adapter on the attention with get_peft_model")  # fmt: skip
    prepare(model, "lora", rank=config.r, alpha=config.lora_alpha, seed=seed)


def adapter_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """PEFT's names and shapes: `base_model.model.PATH.lora_A.weight` (R, inputs), `lora_B.weight` (outputs, R).

    Raises InputError where the layers hold only some experts, or no low-rank updates, or the attention has some.
    """
    if maps := list(updated_maps(model)):
        raise InputError(f"{maps[0]} has a low-rank update of its own, which this adapter does not know; call "
                         "fold_lora() and save the model, or train without attention updates")  # fmt: skip
    state = {}
    adapted = _adapted(model)
    for layer, (up, gate, down) in zip(adapted.sam_layers, _paths(adapted), strict=True):
        lora = layer.lora
        assert lora is not None
        pairs = {down: (lora.down_rows.t(), lora.down_out.t())}
        if gate is None or gate == up:
            pairs[up] = (lora.up_in.t(), lora.up_rows)
        if gate is not None:
            assert lora.gate_in is not None and lora.gate_rows is not None
            own = (lora.gate_in.t(), lora.gate_rows)
            if gate == up:
                pairs[up] = torch.cat([own[0], pairs[up][0]]), torch.block_diag(own[1], pairs[up][1])
            else:
                pairs |= {gate: own, up: (lora.up_in.t(), lora.up_rows)}
        for name, (a_Ri, b_oR) in pairs.items():
            path = f"base_model.model.{name}"
            state[f"{path}.lora_A.weight"] = a_Ri.detach().cpu().contiguous()
            state[f"{path}.lora_B.weight"] = b_oR.detach().cpu().contiguous()
    return state


def save_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Write what `PeftModel.from_pretrained(plain, folder)` reads, where `plain` has the neurons in this model's order;
    beside it, in a file that PEFT does not read, the gates, and the gains of messages, for `load_adapter`.

    Raises InputError as `adapter_state`. Under ZeRO-3, call it inside
    `deepspeed.zero.GatheredParameters(model.parameters())`, on every rank.
    """
    state = adapter_state(model)
    assert isinstance(model, SamMixin)
    paths, lora = _paths(model), model.sam_layers[0].lora
    assert lora is not None
    rank = lora.up_in.shape[1]
    fused = [up for up, gate, _ in paths if gate == up]
    config = LoraConfig(
        r=rank, lora_alpha=lora.scale * rank,  # type: ignore[arg-type]  # PEFT divides it by r, whatever it is
        rank_pattern=dict.fromkeys(fused, 2 * rank),
        alpha_pattern=dict.fromkeys(fused, 2 * lora.scale * rank),
        # By their whole paths: GPT-2's attention has a `c_proj` too.
        target_modules=sorted({path for own in paths for path in own if path is not None}),
        fan_in_fan_out=isinstance(model.get_submodule(paths[0][0]), Conv1D), task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path or None,
    )  # fmt: skip
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(state, Path(folder) / "adapter_model.safetensors")
    gates = {f"{index}": layer.sam.wg.detach().cpu().contiguous() for index, layer in enumerate(model.sam_layers)}
    gates |= {
        f"{index}.gain": layer.sam.gain_SE.detach().cpu().contiguous()
        for index, layer in enumerate(model.sam_layers) if layer.sam.gain_SE is not None
    }  # fmt: skip
    save_file(gates, Path(folder) / _GATES)
    config.inference_mode = True
    config.save_pretrained(str(folder))


@torch.no_grad()
def load_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Put what `save_adapter` wrote on a model converted alike: its updates, its gates and gains.

    Raises InputError as `add_lora`, and where the folder is not of such a model.
    """
    config = LoraConfig.from_pretrained(str(folder))
    rank, alpha = config.r, config.lora_alpha
    add_lora(model, LoraConfig(r=rank, lora_alpha=alpha))
    assert isinstance(model, SamMixin)
    try:
        state = load_file(Path(folder) / "adapter_model.safetensors")
        gates = load_file(Path(folder) / _GATES)
        for index, (layer, (up, gate, down)) in enumerate(zip(model.sam_layers, _paths(model), strict=True)):
            lora, name = layer.lora, "base_model.model.{}.lora_{}.weight".format
            assert lora is not None
            lora.down_rows.copy_(state[name(down, "A")].t())
            lora.down_out.copy_(state[name(down, "B")].t())
            a_Ri, b_oR = state[name(up, "A")], state[name(up, "B")]
            if gate is not None:
                assert lora.gate_in is not None and lora.gate_rows is not None
                own = (a_Ri[:rank], b_oR[: len(b_oR) // 2, :rank])
                if gate == up:
                    a_Ri, b_oR = a_Ri[rank:], b_oR[len(b_oR) // 2 :, rank:]
                else:
                    own = state[name(gate, "A")], state[name(gate, "B")]
                lora.gate_in.copy_(own[0].t())
                lora.gate_rows.copy_(own[1])
            lora.up_in.copy_(a_Ri.t())
            lora.up_rows.copy_(b_oR)
            layer.sam.wg.copy_(gates[f"{index}"])
            if layer.sam.gain_SE is not None:
                layer.sam.gain_SE.copy_(gates[f"{index}.gain"])
    except (KeyError, RuntimeError, OSError) as error:
        for layer in model.sam_layers:
            layer.lora = None
        raise InputError(f"{folder} holds no adapter of this model: {str(error).splitlines()[0]}") from error


def _adapted(model: PreTrainedModel) -> SamMixin:
    if not isinstance(model, SamMixin):
        raise InputError("model is not converted; call get_sam_model first")
    for layer in model.sam_layers:
        if layer.lora is None:
            raise InputError("model has no low-rank updates; add_lora puts them on it")
        if any(hasattr(value, "ds_shape") and value.numel() == 0 for value in layer.lora.parameters()):
            raise InputError("ZeRO-3 has cut the low-rank updates into shards: save them inside "
                             "deepspeed.zero.GatheredParameters(model.parameters())")  # fmt: skip
        if layer.slots < layer.num_experts:
            raise InputError(f"{layer.ffn.path} holds {layer.slots} of {layer.num_experts} experts, an adapter is of "
                             "all: save it where they are together")  # fmt: skip
    return model


def _paths(model: SamMixin) -> list[tuple[str, str | None, str]]:
    """Of every layer, where its up, gate and down maps are."""
    path_of = {id(module): path for path, module in model.named_modules()}
    found = []
    for layer in model.sam_layers:
        owner = path_of[id(layer.ffn.module)]
        up, gate, down = layer.ffn_names
        found.append((f"{owner}.{up}", None if gate is None else f"{owner}.{gate}", f"{owner}.{down}"))
    return found
