"""Budgets of the layers: what is lost is what the formula says, the split is the best there is."""

import copy
import itertools

import pytest
import torch
from reference import expert_output, layer_input
from torch.nn import functional as F

from sam_ds.experts.allocation import allocate, lost_by_budget, output_fisher
from sam_ds.experts.calibrate import hidden_of
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import get_sam_model
from sam_ds.experts.inputs import evenly
from sam_ds.experts.surgery import find_ffns


def text(rows=40, seed=0):
    return torch.randint(3, 97, (rows, 32), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["llama", "gpt2"])
def dense(request, tiny_llama, tiny_gpt2):
    return tiny_llama() if request.param == "llama" else tiny_gpt2()


def test_fisher_is_the_outer_product_of_the_gradients(dense):
    """Row by row with the labels that are drawn, and a gradient taken with respect to an added zero."""
    ffns = find_ffns(dense)
    ids_BS = text(rows=3)
    ours = output_fisher(dense, ffns, [ids_BS], seed=5)
    logits = dense(input_ids=ids_BS).logits.detach().flatten(0, 1)
    drawn_T = torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(5))[:, 0]
    for index, ffn in enumerate(ffns):
        expected_dd = torch.zeros(32, 32)
        for row_S, labels_S in zip(ids_BS, drawn_T.view(ids_BS.shape), strict=True):
            zero_Sd = torch.zeros(32, 32, requires_grad=True)
            handle = ffn.exit.register_forward_hook(lambda _, __, y, zero_Sd=zero_Sd: y + zero_Sd)
            loss = F.cross_entropy(dense(input_ids=row_S[None]).logits[0], labels_S, reduction="sum")
            handle.remove()
            gradient_Sd = torch.autograd.grad(loss, zero_Sd)[0]
            expected_dd += sum(torch.outer(g_d, g_d) for g_d in gradient_Sd) / ids_BS.numel()
        torch.testing.assert_close(ours[index], expected_dd, atol=1e-7, rtol=1e-4)
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_fisher_of_a_frozen_model(dense):
    ffns = find_ffns(dense)
    before = output_fisher(dense, ffns, [text(rows=3)], seed=5)
    for after, expected in zip(output_fisher(dense.requires_grad_(False), ffns, [text(rows=3)], seed=5), before,
                               strict=True):  # fmt: skip
        torch.testing.assert_close(after, expected)


@torch.no_grad()
def test_lost_is_what_the_experts_left_out_would_have_added(dense):
    model = get_sam_model(
        copy.deepcopy(dense), SamConfig(num_experts=8, top_k=4, standin_rank=4), calibration=text(), progress=False
    )
    layer = model.sam_layers[0]
    x_Td = layer_input(model, layer, [text(rows=2, seed=3)])
    root_dd = torch.randn(32, 32)
    fisher_dd = root_dd @ root_dd.t()
    ours_K = lost_by_budget(
        hidden_of(layer.ffn, x_Td), layer.matrices()[2], fisher_dd, num_experts=8, roots=2
    )  # fmt: skip
    mass_TE = torch.zeros(len(x_Td), 8)
    for expert in range(8):
        f_Td = expert_output(layer, expert, x_Td)
        for t, deviation_d in enumerate(f_Td - f_Td.mean(0)):
            mass_TE[t, expert] = 0.5 * deviation_d @ fisher_dd @ deviation_d
    assert ours_K.shape == (9,) and ours_K[8] == 0
    for k in range(2, 9):
        least = sum(float(row_E[2:].sort().values[: 8 - k].sum()) for row_E in mass_TE) / len(mass_TE)
        assert float(ours_K[k]) == pytest.approx(least, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_allocation_is_the_best_split(seed):
    layers, num_experts, roots = 3, 5, 1 + seed % 2
    steps_LE = torch.rand(layers, num_experts, generator=torch.Generator().manual_seed(seed)).sort(1, True).values
    lost_LK = torch.cat([steps_LE.flip(1).cumsum(1).flip(1), torch.zeros(layers, 1)], dim=1)
    for top_k in range(roots, num_experts + 1):
        ours = allocate(lost_LK, len(lost_LK) * top_k, roots)
        assert sum(ours) == layers * top_k and all(roots <= k <= num_experts for k in ours)
        best = min(
            sum(float(lost_LK[layer, k]) for layer, k in enumerate(split))
            for split in itertools.product(range(roots, num_experts + 1), repeat=layers)
            if sum(split) == layers * top_k
        )
        assert sum(float(lost_LK[layer, k]) for layer, k in enumerate(ours)) == pytest.approx(best)


def test_budgets_are_kept_when_saved(dense, tmp_path):
    config = SamConfig(num_experts=8, top_k=4, standin_rank=4)
    model = get_sam_model(dense, config, calibration=text(), progress=False)
    budgets = [layer.top_k for layer in model.sam_layers]
    assert sum(budgets) == 8 and budgets == model.budgets(4)
    model.save_pretrained(tmp_path)
    assert [layer.top_k for layer in from_pretrained(tmp_path).sam_layers] == budgets
    with model.active(8):
        assert [layer.top_k for layer in model.sam_layers] == [8, 8]
    assert [layer.top_k for layer in model.sam_layers] == budgets


def test_uniform_budgets(dense, tmp_path):
    config = SamConfig(num_experts=8, top_k=4, standin_rank=4, allocation="uniform")
    model = get_sam_model(dense, config, calibration=text(), progress=False)
    model.save_pretrained(tmp_path)
    for each in (model, from_pretrained(tmp_path)):
        assert [layer.top_k for layer in each.sam_layers] == [4, 4] and each.sam_lost_LK is None


def test_evenly_reads_all_of_an_ordered_text():
    ids_BS = torch.arange(40)[:, None].expand(40, 8)
    assert evenly([ids_BS], 80)[0][:, 0].tolist() == list(range(0, 40, 4))
    assert torch.equal(evenly([ids_BS], 1000)[0], ids_BS)


@pytest.mark.parametrize("sizes", [[1] * 40, [16, 24], [3, 1, 5, 7, 2, 22], [0, 39, 0, 1]])
def test_evenly_does_not_mind_how_the_text_is_cut_into_batches(sizes):
    ids_BS = torch.arange(40)[:, None].expand(40, 8)
    for tokens in (10, 80, 100, 1000):
        parts = evenly(list(ids_BS.split(sizes)), tokens)
        assert all(len(part) for part in parts)
        assert torch.equal(torch.cat(parts), evenly([ids_BS], tokens)[0])
