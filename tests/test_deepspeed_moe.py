"""The `deepspeed` back end: the numbers of the `torch` back end, on one, two and four ranks, whatever they route."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, build, close, convert, logits, same_state, tokens

from sam_ds.clients.engine import deepspeed
from sam_ds.errors import InputError
from sam_ds.experts.config import SamConfig
from sam_ds.experts.deepspeed_moe import DagMaskGate, MoeFFN, check_ep_size, places_of, to_deepspeed_moe, to_views
from sam_ds.experts.distill import DistillConfig, distill
from sam_ds.experts.nf4 import to_nf4
from sam_ds.experts.units import prepare

CONFIG = SamConfig(num_experts=8, top_k=3, roots=1, standin_rank=4)
"""Seven routed experts: no ep_size but 1 divides them."""
STEPS = 10


@pytest.fixture(autouse=True)
def _process_group(one_rank):
    """That of one rank; the tests of several make their own processes."""
    deepspeed.init_distributed("gloo")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_views_in_every_family(family):
    model = convert(build(family), CONFIG)
    ours = copy.deepcopy(model)
    to_deepspeed_moe(ours)
    assert all(isinstance(layer, MoeFFN) for layer in ours.sam_layers)
    ids = tokens(3, 17, seed=2)
    for k in (8, 3):
        with model.active(k), ours.active(k):
            for either in (model, ours):
                either.zero_grad()
                either(input_ids=ids, labels=ids).loss.backward()
            close(logits(ours), logits(model))
    to_views(ours)
    for (name, parameter), mine in zip(model.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(parameter, mine), name
    same_state(ours.state_dict(), model.state_dict())
    close(logits(ours.merge_and_unload()), logits(model.merge_and_unload()))


def gradients(model):
    """Of all parameters, those of spread experts put where the views have them."""
    found = {name: p.grad for name, p in model.named_parameters() if ".moe." not in name}
    for path, layer in model.named_modules():
        if isinstance(layer, MoeFFN):
            own = layer.moe.deepspeed_moe.experts.deepspeed_experts
            for name, ours in zip(layer.ffn_names, ("up", "gate", "down"), strict=True):
                parts = [found[f"{path}.{name}.weight"]]
                parts += [getattr(expert, ours).weight.grad for expert in own]
                found[f"{path}.{name}.weight"] = torch.cat(parts, dim=1 if ours == "down" else 0)
    return found


def test_gradients_are_those_of_the_views(tiny_llama):
    model = convert(tiny_llama(), CONFIG)
    prepare(model, "full", rank=0, alpha=0, seed=0, dense=True)
    ours = copy.deepcopy(model)
    to_deepspeed_moe(ours)
    ids = tokens(5, 9, seed=2)
    for either in (model, ours):
        either(input_ids=ids, labels=ids).loss.backward()
    found = gradients(ours)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-5, msg=name)
    assert all(layer.sam.wg.grad.any() for layer in ours.sam_layers)


def test_what_is_frozen_stays_frozen(tiny_gpt2):
    model = convert(tiny_gpt2(), CONFIG)
    prepare(model, "full", rank=0, alpha=0, seed=0, dense=False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not before["transformer.h.0.mlp.c_proj.bias"] and before["transformer.h.0.mlp.c_proj.weight"]
    to_deepspeed_moe(model)
    assert not model.get_parameter("transformer.h.0.mlp.c_proj.bias").requires_grad
    assert all(p.requires_grad for name, p in model.named_parameters() if ".moe." in name)
    to_views(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_the_gate_keeps_the_contract():
    """Every visit has one place of its own in its expert's buffer; -1 stands for none; what is masked is not sent."""
    generator = torch.Generator().manual_seed(0)
    visited_TR = torch.rand(12, 5, generator=generator) < 0.4
    visited_TR[3] = False
    visited_TR[:, 2] = False
    weight_TR = torch.rand(12, 5, generator=generator)
    gate = DagMaskGate([0, 1, 2, 4, 5], 6)
    used_T = torch.ones(12)
    used_T[7] = 0
    for used in (None, used_T):
        gate.visited_TR, gate.weight_TR = visited_TR, weight_TR
        loss, capacity, total, index_JT, location_JT, out_JT, counts = gate(torch.zeros(12, 3), used, True, False)
        expected_TR = visited_TR if used is None else visited_TR & (used_T[:, None] > 0)
        found = {(int(i), t, float(w)) for column, own in zip(index_JT, out_JT, strict=True)
                 for t, (i, w) in enumerate(zip(column, own, strict=True)) if i >= 0}  # fmt: skip
        place = [0, 1, 2, 4, 5]
        assert found == {(place[e], t, float(weight_TR[t, e])) for t, e in expected_TR.nonzero().tolist()}
        places = list(zip(index_JT[index_JT >= 0].tolist(), location_JT[index_JT >= 0].tolist(), strict=True))
        assert len(set(places)) == len(places) and max(location for _, location in places) < capacity
        assert counts.tolist() == [*expected_TR.sum(0)[:3].tolist(), 0, *expected_TR.sum(0)[3:].tolist()]
        assert (loss, capacity, total) == (0, counts.max(), 6)
    assert not list(gate.state_dict())


@pytest.mark.parametrize(("routed", "ep_size"), [(7, 1), (7, 2), (7, 4), (15, 4), (12, 8), (4, 4), (5, 4)])
def test_places_are_equal_shares_and_every_rank_has_an_expert(routed, ep_size):
    places, total = places_of(routed, ep_size)
    share = total // ep_size
    assert total % ep_size == 0 and len(places) == routed and places == sorted(set(places))
    held = [sum(place // share == rank for place in places) for rank in range(ep_size)]
    assert max(held) == share and min(held) >= share - 1 and min(held) >= 1


@pytest.mark.parametrize(("sizes", "message"), [
    ((8, 1, 2, 3), r"ep_size=2 does not divide the 3 ranks"),
    ((8, 1, 0, 2), r"ep_size=0 does not divide the 2 ranks"),
    ((8, 1, 3, 6), r"ep_size=3 does not divide num_experts=8"),
    ((4, 2, 4, 4), r"ep_size=4 leaves a rank without an expert"),
])  # fmt: skip
def test_ep_sizes_that_cannot_be_are_refused(sizes, message):
    num_experts, roots, ep_size, ranks = sizes
    with pytest.raises(InputError, match=message):
        check_ep_size(num_experts, roots, ep_size, ranks)


def test_what_cannot_be_moved_is_refused_and_left_alone(tiny_llama, tmp_path, monkeypatch):
    dense = tiny_llama()
    with pytest.raises(InputError, match="not converted"):
        to_deepspeed_moe(dense)
    model = convert(dense, CONFIG)
    before = logits(model)
    with pytest.raises(InputError, match="ep_size=2 does not divide the 1 ranks"):
        to_deepspeed_moe(model, ep_size=2)
    weight = model.sam_layers[1].ffn.module.up_proj.weight
    weight.ds_shape = weight.shape
    with pytest.raises(InputError, match="ZeRO-3.*ZeRO 0, 1 or 2"):
        to_deepspeed_moe(model)
    del weight.ds_shape
    prepare(model, "lora", rank=2, alpha=4, seed=0)
    with pytest.raises(InputError, match="low-rank updates"):
        to_deepspeed_moe(model)
    model.fold_lora()
    with monkeypatch.context() as patch:
        patch.setattr(deepspeed.comm, "is_initialized", lambda: False)
        with pytest.raises(InputError, match="init_distributed"):
            to_deepspeed_moe(model)
    assert torch.equal(logits(model), before)
    to_deepspeed_moe(model)
    for refused in (lambda: model.save_pretrained(tmp_path), model.unload, model.merge_and_unload, model.fold_lora):
        with pytest.raises(InputError, match="to_views"):
            refused()
    with pytest.raises(InputError, match="already"):
        to_deepspeed_moe(model)
    with pytest.raises(InputError, match="say what trains before to_deepspeed_moe"):
        prepare(model, "lora", rank=2, alpha=4, seed=0)
    with pytest.raises(InputError, match="before the model is distilled"):
        distill(model, tokens(), DistillConfig(steps=1), progress=False)
    four_bits = convert(tiny_llama(), CONFIG)
    to_nf4(four_bits)
    with pytest.raises(InputError, match="the experts are in nf4"):
        to_deepspeed_moe(four_bits)
    with pytest.raises(InputError, match="not converted"):
        to_views(tiny_llama())
    close(logits(model), before)


# ------------------------------------------------------------------ several ranks

CASES = {
    2: [
        ("llama", 1, None), ("llama", 2, None), ("llama", 0, 1), ("llama", 2, 1), ("llama", 0, 2), ("llama", 2, 2),
        ("gpt2", 1, None), ("gpt2", 1, 2),
    ],
    4: [("llama", 1, None), ("llama", 2, 2), ("llama", 0, 4), ("llama", 2, 4)],
}  # fmt: skip
"""By number of ranks: family, ZeRO stage, ep_size (None: the views)."""


def batches(rank: int) -> list[torch.Tensor]:
    """Ranks differ in what they read and in how much."""
    return [tokens(2 + (rank + step) % 3, 7 + 2 * rank, seed=100 * step + rank) for step in range(STEPS)]


def engine_of(model, stage: int):
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    group = {"params": [p for p in model.parameters() if p.requires_grad], "name": "all"}
    # Adam would forgive a gradient that is too large.
    optimizer = torch.optim.SGD(split_params_into_different_moe_groups_for_optimizer(group), lr=0.05, momentum=0.9)
    settings = {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": False}, "steps_per_print": 10**9,
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def run(engine, own: list[torch.Tensor]) -> list[float]:
    losses = []
    for ids in own:
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def converted(family: str):
    """The third routed expert scores so little that nobody visits it."""
    model = convert(build(family), CONFIG)
    prepare(model, "full", rank=0, alpha=0, seed=0, dense=True)
    with torch.no_grad():
        for layer in model.sam_layers:
            layer.sam.wg[3] = 0
            layer.sam.wg[3, -1] = -1e3
    return model


def train_on_ranks(rank: int, ranks: int, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    deepspeed.init_distributed("gloo")
    own, found = batches(rank), {}
    for family, stage, ep_size in CASES[ranks]:
        model = converted(family)
        if ep_size is not None:
            to_deepspeed_moe(model, ep_size)
        engine = engine_of(model, stage)
        logits_BSV = engine(input_ids=own[0], use_cache=False).logits.detach()
        losses = run(engine, own[:5])
        if ep_size is not None and ep_size > 1:
            checkpoint = folder / f"{family}-{stage}-{ep_size}"
            engine.save_checkpoint(str(checkpoint))
            losses += run(engine, own[5:])
            other = converted(family)
            to_deepspeed_moe(other, ep_size)
            again = engine_of(other, stage)
            again.load_checkpoint(str(checkpoint))
            assert run(again, own[5:]) == losses[5:], "a loaded checkpoint goes on otherwise"
            again.destroy()
        else:
            losses += run(engine, own[5:])
        to_views(model)
        state = {name: value.float() for name, value in model.state_dict().items()}
        found[family, stage, ep_size] = {"logits": logits_BSV, "losses": losses, "state": state}
        engine.destroy()
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def trained(request, tmp_path_factory):
    """{case: logits, losses and state} of every rank."""
    folder = tmp_path_factory.mktemp("moe")
    torch.multiprocessing.spawn(train_on_ranks, (request.param, folder), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.distributed
def test_ten_steps_on_several_ranks_are_those_of_the_views(trained):
    """Every stage and ep_size, batches of unequal size, one expert without a token."""
    for found in trained:
        for case, own in found.items():
            views = found[case[0], 1, None]
            torch.testing.assert_close(own["logits"], views["logits"], atol=1e-5, rtol=1e-5)
            assert own["losses"] == pytest.approx(views["losses"], abs=1e-5), case
            for name, value in views["state"].items():
                torch.testing.assert_close(own["state"][name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.distributed
def test_ranks_end_with_the_same_model(trained):
    for key, own in trained[0].items():
        for other in trained[1:]:
            same_state(other[key]["state"], own["state"])
        assert len(own["losses"]) == STEPS
