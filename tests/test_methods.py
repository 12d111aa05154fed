"""The controls: each does what its paper says, in the same loop as `sam`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from in_process import Federation, assert_equal_states

from sam_ds.data.corpus import load_corpus
from sam_ds.errors import InputError
from sam_ds.experts.saliency import saliency
from sam_ds.experts.surgery import find_ffns
from sam_ds.federation.methods.registry import METHODS, configured
from sam_ds.federation.setup import prepare_base
from sam_ds.federation.state import checkpoints, load_checkpoint
from sam_ds.wire.payload import ExpertUnit


@pytest.fixture
def federate(tiny, new_worker, tmp_path):
    """A federation of this method that has run two rounds, on its own conversion where it asks for another."""

    def run(method, *overrides):
        config = configured(tiny.config(tmp_path / method, f"method={method}", "evaluation.every=2", *overrides))
        base = tiny.base
        if config.sam.root_choice == "saliency":
            base = prepare_base(config, tmp_path / method, load_corpus(config.data))
        worker = new_worker(f"method={method}", *overrides, base=base)
        return Federation.of(config, base, worker).start()

    return run


def test_the_registry_and_the_configuration_agree(tiny, tmp_path):
    for name, method in METHODS.items():
        config = configured(tiny.config(tmp_path, f"method={name}"))
        assert config.subsets == method.sparse
        assert configured(config) == config  # a resumed run is configured already


@pytest.mark.parametrize(("method", "wrong", "words"), [
    ("local", "federation.robust=median", "federation.robust = 'median' is of an average"),
    ("local", "federation.server_optimizer=momentum", "server_optimizer = 'momentum' is of an average"),
    ("central", "federation.robust=norm_clip", "federation.robust = 'norm_clip' is of several clients"),
    ("central", "federation.shift_round=2", "federation.shift_round = 2 is of several clients"),
    ("static_mask", "sam.semantics=message", "sam.semantics = 'message' needs edges"),
    ("fedit", "train.redraw_every=2", "train.redraw_every = 2 is of low-rank slices"),
    ("fedavg", "train.attention_rank=4", "train.attention_rank = 4 is of low-rank updates"),
])  # fmt: skip
def test_what_a_method_has_no_use_for_is_refused(tiny, tmp_path, method, wrong, words):
    with pytest.raises(InputError, match=words):
        configured(tiny.config(tmp_path, f"method={method}", wrong))


def test_static_mask_holds_the_same_experts_everywhere_and_moves_nothing_else(federate):
    run = federate("static_mask")
    top_k = run.config.sam.top_k
    assert all(layer.top_k == layer.roots == top_k for layer in run.server.model.sam_layers)
    before = Federation.of(replace(run.config, out=f"{run.config.out}-2"), run.server.base).server.state
    moved = set()
    for unit, value in run.server.state.units.items():
        if isinstance(unit, ExpertUnit) and not np.array_equal(value, before.units[unit]):
            moved.add(unit.expert)
    assert moved == set(range(top_k))
    assert np.array_equal(run.server.state.graph, before.graph)
    for record in run.records("round")[1:]:
        assert record["largest_weight"] == 1.0 and record["edits"] == []


def test_the_mask_is_of_the_neurons_that_the_loss_feels(tiny):
    """|w g| of a down-projection's rows, against the gradient that autograd puts on the weight itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()
    ids_BS = torch.arange(6 * 16).view(6, 16) % 200
    ffns = find_ffns(model)
    found = saliency(model, ffns, [ids_BS])
    loss = sum(model(input_ids=row, labels=row).loss * len(row) for row in ids_BS.split(4))
    loss.backward()
    for ffn, saliency_m in zip(ffns, found, strict=True):
        down = ffn.module.get_submodule(ffn.down).weight
        torch.testing.assert_close(saliency_m, (down * down.grad).abs().sum(0), rtol=1e-4, atol=1e-9)


def test_local_clients_keep_their_own_and_send_nothing_that_counts(federate, tiny, tmp_path):
    run = federate("local", "federation.clients_per_round=6")
    state = run.server.state
    assert set(state.personal) == set(range(6))
    assert all(not value.any() for unit, value in state.units.items() if unit.name.endswith("_rows"))
    one, other = state.personal[0], state.personal[1]
    assert any(not np.array_equal(value, other[unit]) for unit, value in one.items())
    for record in run.records("client"):
        assert record["bytes_up"]["raw"] == record["bytes_up"]["encoded"] == 0
        assert record["status"] == "ok" and record["loss_last"] > 0
    first, last = (run.records("round")[i]["merged"]["headline"] for i in (0, -1))
    assert last < first
    assert_equal_states(load_checkpoint(checkpoints(run.run / "checkpoints")[-1]), state)
    # A second round goes on from where the client stopped, not from the model that all began with.
    losses = [r["loss_first"] for r in run.records("client") if r["client"] == 0]
    assert losses[1] < losses[0]


def test_central_training_is_one_client_with_everything(federate):
    run = federate("central")
    assert run.server.state.examples.shape == (1,)
    (first, *_) = run.records("client")
    assert first["tokens"] == 3 * 2 * 4 * 16  # three clients' steps of a round
    whole = sum(len(splits.train) for splits in run.server.corpus.domains.values())
    assert len(run.worker.clients) == 1 and run.worker.clients[0].examples == whole
    assert run.records("round")[-1]["merged"]["headline"] < run.records("round")[0]["merged"]["headline"]


def test_after_the_shift_a_client_has_the_next_ones_documents(new_worker):
    worker = new_worker("federation.shift_round=3")
    for client in range(6):
        np.testing.assert_array_equal(worker.rows(client, 2), worker.rows(client))
        np.testing.assert_array_equal(worker.rows(client, 3), worker.rows((client + 1) % 6))
