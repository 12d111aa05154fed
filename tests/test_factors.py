"""Frozen low-rank factors from text: they span what varies and what the loss feels, and everybody has the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from in_process import Federation

from sam_ds.data.corpus import load_corpus
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.factors import FACTORS_FILE, fit_factors, load_factors
from sam_ds.experts.units import prepare
from sam_ds.federation.setup import prepare_base

LORA = tuple(f"tiers.{tier}.trains=lora" for tier in ("small", "medium", "large"))


def fitted(tiny, rank=4, attention=3):
    model = from_pretrained(tiny.base, dtype=torch.float32)
    prepare(model, "lora", rank=rank, alpha=4.0, seed=0, attention_rank=attention)
    ids_BS = torch.randint(0, 200, (6, 16), generator=torch.Generator().manual_seed(0))
    return model, ids_BS, fit_factors(model, [ids_BS])


def test_factors_span_the_directions_that_matter(tiny):
    """Against the principal directions of what the hooks of a plain forward and backward pass see."""
    model, ids_BS, factors = fitted(tiny)
    path = next(name for name, module in model.named_modules() if module is model.sam_layers[0])
    seen = {}

    def keep(_, args, output):
        seen["x"] = args[0].detach().flatten(0, -2)
        output.register_hook(lambda gradient: seen.update(g=gradient.flatten(0, -2)))

    handle = model.sam_layers[0].register_forward_hook(keep)
    with model.active(8):
        xs, gs = [], []
        for rows_BS in ids_BS.split(4):
            (model(input_ids=rows_BS, labels=rows_BS).loss * len(rows_BS)).backward()
            xs.append(seen["x"]), gs.append(seen["g"])
    handle.remove()
    x_Td, g_Td = torch.cat(xs), torch.cat(gs)
    for name, rows_Td in (("up_in", x_Td), ("gate_in", x_Td), ("down_out", g_Td)):
        factor = factors[f"{path}.lora.{name}"]
        basis_dR = factor.t() if name == "down_out" else factor
        best_dR = torch.linalg.svd(rows_Td.double(), full_matrices=False).Vh[:4].t()
        torch.testing.assert_close(basis_dR.t() @ basis_dR, torch.eye(4), atol=1e-5, rtol=0)
        captured = (rows_Td @ basis_dR).square().sum() / rows_Td.square().sum()
        most = (rows_Td.double() @ best_dR).square().sum() / rows_Td.double().square().sum()
        assert float(captured) == pytest.approx(float(most), rel=1e-3)
    attention = [name for name in factors if name.endswith("a_iR")]
    assert len(attention) == 2 * 4 and all(factors[name].shape[1] == 3 for name in attention)


def test_a_rank_beyond_the_directions_keeps_what_was_drawn(tiny):
    model, _, factors = fitted(tiny, rank=40, attention=0)
    name = next(name for name in factors if name.endswith("up_in"))
    drawn = dict(model.named_parameters())[name].detach()
    assert torch.equal(factors[name][:, 32:], drawn[:, 32:]) and not torch.equal(factors[name], drawn)


def test_server_and_clients_have_the_same_factors_and_learn(tiny, new_worker, tmp_path):
    config = tiny.config(tmp_path, *LORA, "train.attention_rank=2", "federation.rounds=1")
    base = prepare_base(config, tmp_path, load_corpus(config.data))
    factors = load_factors(base)
    worker = new_worker(*LORA, "train.attention_rank=2", "federation.rounds=1", base=base)
    federation = Federation.of(config, base, worker).start()
    for model in (federation.server.model, *(engine.model for engine in worker._engines.values())):
        parameters = dict(model.named_parameters())
        for name, value in factors.items():
            assert torch.equal(parameters[name].detach(), value) and not parameters[name].requires_grad
    moved = [unit for unit, value in federation.server.state.units.items() if np.any(value) and "lora" in str(unit)]
    assert moved
    drawn = tiny.config(tmp_path / "seed", *LORA, "train.factors=seed")
    assert not (prepare_base(drawn, tmp_path / "seed", load_corpus(drawn.data)) / FACTORS_FILE).exists()
