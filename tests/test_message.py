"""Messages: at gains of 0 the layer without them; at others the formula; what cannot know them says so."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import build, convert
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import Federation, assert_equal_states, task_for
from reference import graphs, moe_output
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sam_ds.clients.tiers import check_tiers
from sam_ds.config import load_config
from sam_ds.errors import InputError
from sam_ds.experts import grouped
from sam_ds.experts.adapter import load_adapter, save_adapter
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.config import SamConfig
from sam_ds.experts.lora import LoraSlices
from sam_ds.experts.message import order_of
from sam_ds.experts.model import add_assembler, inject_layers, wrap_ffns
from sam_ds.experts.nf4 import to_nf4
from sam_ds.experts.slots import to_slots
from sam_ds.experts.surgery import find_ffns
from sam_ds.experts.units import prepare
from sam_ds.federation.judging import evaluate
from sam_ds.federation.state import load_checkpoint
from sam_ds.wire.payload import ExpertUnit

HIDDEN = 16
CONFIG = SamConfig(
    num_experts=8, top_k=4, roots=2, standin_rank=4, density=0.5, routing="top_k", semantics="message"
)  # fmt: skip


def ids(rows=3, seed=0):
    return torch.randint(3, 97, (rows, 17), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi3", "opt", "bloom"])
def dense(request):
    return build(request.param)


@pytest.fixture(scope="module")
def pair(dense):
    """A converted model that sends no messages, and the same with gains of 0."""
    model = convert(dense, CONFIG)
    silent = copy.deepcopy(model)
    for layer in silent.sam_layers:
        layer.semantics = "reach"
    return silent, model


def set_gains(model, seed=0, std=0.3):
    generator = torch.Generator().manual_seed(seed)
    for layer in model.sam_layers:
        torch.nn.init.normal_(layer.sam.gain_SE, std=std, generator=generator)
    return model


def random_layer(model, adjacency_SS, roots, seed, *, lora=False):
    """The only layer of a model, its weights and gains random, over this graph, whose experts it holds all of."""
    torch.manual_seed(seed)
    slots = len(adjacency_SS)
    (ffn,) = find_ffns(model)
    config = SamConfig(
        num_experts=slots, top_k=slots, roots=roots, standin_rank=2, routing="top_k", router="linear",
        semantics="message",
    )  # fmt: skip
    (layer,) = wrap_ffns([ffn], config)
    for value in [*layer.parameters(), *layer.buffers()]:
        if value.is_floating_point():
            torch.nn.init.normal_(value, std=0.25)
    parts = layer.sam
    with torch.no_grad():
        parts.core_SQp[:roots] = 0
        parts.core_all_Qp.copy_(parts.core_SQp.sum(0))
    parts.adjacency_SS.copy_(torch.from_numpy(adjacency_SS))
    if lora:
        layer.lora = LoraSlices(hidden=HIDDEN, neurons=4 * slots, gated=ffn.gate is not None, rank=4, alpha=8.0, seed=0)
        for value in layer.lora.parameters():
            torch.nn.init.normal_(value.requires_grad_(), std=0.3)
    return layer.eval()


@pytest.fixture(scope="session")
def one_layer(tiny_llama, tiny_gpt2):
    """`one_layer(family, experts)` -> a model of one layer, 4 neurons an expert."""

    def of(family, experts):
        if family == "llama":
            return tiny_llama(hidden_size=HIDDEN, num_hidden_layers=1, intermediate_size=4 * experts, mlp_bias=True)
        return tiny_gpt2(n_embd=HIDDEN, n_layer=1, n_inner=4 * experts)

    return of


# ------------------------------------------------------------------ the formula


@given(graph=graphs(), seed=st.integers(0, 2**16), k=st.integers(1, 9), lora=st.booleans(), kernel=st.booleans(),
       family=st.sampled_from(["llama", "gpt2"]), tokens=st.integers(1, 6))  # fmt: skip
@settings(max_examples=40)
def test_the_layer_is_its_formula(one_layer, graph, seed, k, lora, kernel, family, tokens):
    """Outputs and all gradients, over graphs with edges into roots too, routed and with all experts visited."""
    adjacency_SS, roots = graph
    layer = random_layer(one_layer(family, len(adjacency_SS)), adjacency_SS, roots, seed, lora=lora)
    layer.top_k = min(max(k, roots), layer.slots)
    x_Td = torch.randn(tokens, HIDDEN, requires_grad=True)
    weight_Td = torch.randn(tokens, HIDDEN)
    leaves = [x_Td, *layer.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "_worth_grouping", lambda *_: kernel)
        y_Td = layer(x_Td)
        ours = torch.autograd.grad((y_Td * weight_Td).sum(), leaves, materialize_grads=True)
    expected_Td = moe_output(layer, x_Td)
    theirs = torch.autograd.grad((expected_Td * weight_Td).sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(y_Td, expected_Td, atol=1e-4, rtol=1e-4)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("top_k", [4, 8])
def test_every_way_to_store_an_ffn_sends_by_the_formula(pair, top_k):
    """Fused, in the decoder layer itself, given the residual."""
    layer = set_gains(copy.deepcopy(pair[1])).sam_layers[0]
    layer.top_k = top_k
    x_Td, residual_Td = torch.randn(2, 9, 32)
    torch.testing.assert_close(layer(x_Td), moe_output(layer, x_Td), atol=1e-5, rtol=1e-4)
    expected_Td = residual_Td + moe_output(layer, x_Td)
    torch.testing.assert_close(layer(x_Td, residual_Td), expected_Td, atol=1e-5, rtol=1e-4)


def test_the_gradient_of_a_gain_is_the_difference_quotient(one_layer):
    adjacency_SS = np.triu(np.ones((4, 4), dtype=bool), 1)
    layer = random_layer(one_layer("llama", 4), adjacency_SS, 1, 0).double()
    x_Td = torch.randn(5, HIDDEN, dtype=torch.float64)
    gain_SE = layer.sam.gain_SE
    for top_k in (2, 4):
        layer.top_k = top_k
        (ours_SE,) = torch.autograd.grad(layer(x_Td).square().sum(), gain_SE)
        for tail, head in ((0, 1), (0, 3), (2, 3)):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    gain_SE[head, tail] += step
                    values.append(float(layer(x_Td).square().sum()))
                    gain_SE[head, tail] -= step
            assert float(ours_SE[head, tail]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-7)
        assert not ours_SE[~torch.from_numpy(adjacency_SS.T)].any()


@given(graph=graphs())
def test_an_order_runs_every_tail_before_its_heads(graph):
    """In as many levels as the longest path has experts: fewer would put a tail beside its head."""
    adjacency_SS, _ = graph
    order = order_of(torch.from_numpy(adjacency_SS))
    level_of = {slot: level for level, slots in enumerate(order.levels) for slot in slots}
    assert sorted(level_of) == list(range(len(adjacency_SS)))
    assert sorted(order.edges) == list(map(tuple, np.argwhere(adjacency_SS).tolist()))
    assert all(level_of[tail] < level_of[head] for tail, head in order.edges)
    power_SS, longest = np.eye(len(adjacency_SS)), 0
    while (power_SS := power_SS @ adjacency_SS).any():
        longest += 1
    assert len(order.levels) == longest + 1


# ------------------------------------------------------------------ gains of 0


@pytest.mark.parametrize("top_k", [2, 4, 8])
def test_gains_of_0_change_nothing_but_have_a_gradient(pair, top_k):
    outcomes = []
    for model in map(copy.deepcopy, pair):
        with model.active(top_k):
            out = model(input_ids=ids(), labels=ids())
            out.loss.backward()
        outcomes.append((out.logits, {name: p.grad for name, p in model.named_parameters()}))
    (expected, theirs), (logits, ours) = outcomes
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    gains = [ours.pop(name) for name in list(ours) if name.endswith(".gain_SE")]
    for name in [name for name in theirs if name.endswith(".gain_SE")]:
        assert theirs.pop(name) is None
    assert len(gains) == 2
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if gradient is not None or ours[name] is not None:
            torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    for layer, gain in zip(pair[1].sam_layers, gains, strict=True):
        edges_EE = layer.sam.adjacency_SS.t()
        if top_k == 2:
            # Roots alone: no edge leads to one.
            assert gain is None
        else:
            assert gain[edges_EE].any() and not gain[~edges_EE].any() and (top_k == 4 or gain[edges_EE].all())


def conditioned(model, seed=0):
    """With an assembler whose gains are not 0, and something that it knows."""
    add_assembler(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.sam_assembler.gain_heads.normal_(std=0.3, generator=generator)
    return torch.randn(len(model.sam_layers), 9, generator=generator)


def test_a_text_has_gains_of_its_own_beside_those_that_all_share(pair):
    model = set_gains(copy.deepcopy(pair[1]))
    condition, shared = conditioned(model), model(input_ids=ids()).logits
    summed = copy.deepcopy(model)
    with torch.no_grad():
        for layer, own_EE in zip(summed.sam_layers, model.sam_assembler.gains(condition), strict=True):
            layer.sam.gain_SE += own_EE.t()
        with model.over(model.graph(), condition):
            mine = model(input_ids=ids()).logits
        assert torch.allclose(mine, summed(input_ids=ids()).logits, atol=1e-5)
        assert not torch.allclose(mine, shared, atol=1e-3)
        # Nothing of it stays behind, neither in the model nor in its layers.
        assert model.sam_condition is None and all(layer.own_gain_SE is None for layer in model.sam_layers)
        assert torch.equal(model(input_ids=ids()).logits, shared)


def test_a_client_trains_the_gains_of_the_edges_among_what_it_holds(pair):
    model = copy.deepcopy(pair[1])
    model.sam_condition = conditioned(model)
    to_slots(model, 5)
    with torch.no_grad():
        for layer in model.sam_layers:
            # What the slots hold is undefined until it is loaded.
            for weight in layer.ffn.module.parameters():
                weight.normal_(std=0.2)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(layer.own_gain_SE.shape == (5, 8) for layer in model.sam_layers)
    heads_grad = model.sam_assembler.gain_heads.grad.view(8, -1)
    assert heads_grad[2:5].abs().amax(1).min() > 0, "of the experts that something is sent to"
    assert not heads_grad[5:].any(), "of experts that are not there"


def test_with_frozen_gains_ten_steps_are_those_without_messages(pair):
    losses = []
    for model in map(copy.deepcopy, pair):
        trained = [p for name, p in model.named_parameters() if not name.endswith(".gain_SE")]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        losses.append([])
        for step in range(10):
            loss = model(input_ids=ids(seed=step), labels=ids(seed=step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] != losses[0][0]


@torch.no_grad()
def test_all_visited_is_the_dense_model_at_gains_of_0_and_without_messages(dense, pair):
    model, expected = copy.deepcopy(pair[1]), dense(input_ids=ids()).logits
    with model.active(8):
        torch.testing.assert_close(model(input_ids=ids()).logits, expected, atol=1e-4, rtol=1e-4)
    set_gains(model)
    sparse = model(input_ids=ids()).logits
    with model.dense():
        torch.testing.assert_close(model(input_ids=ids()).logits, expected, atol=1e-4, rtol=1e-4)
    with model.active(8):
        assert (model(input_ids=ids()).logits - expected).abs().max() > 1e-2
    assert torch.equal(model(input_ids=ids()).logits, sparse)


# ------------------------------------------------------------------ what is held


@pytest.mark.parametrize("top_k", [3, 5])
def test_a_client_sends_over_the_paths_among_what_it_holds(one_layer, top_k):
    """Slots are the formula over the contracted graph; the gains of tails that it does not hold have no gradient."""
    adjacency_SS = np.triu(np.ones((8, 8), dtype=bool), 1)
    layer = random_layer(one_layer("llama", 5), adjacency_SS[:5, :5], 2, 0)
    layer.held, layer.num_experts, layer.top_k = torch.tensor([0, 1, 3, 4, 7]), 8, top_k
    layer.sam.gain_SE = torch.nn.Parameter(torch.randn(5, 8) * 0.3)
    x_Td = torch.randn(7, HIDDEN)
    weight_Td = torch.randn(7, HIDDEN)
    y_Td, expected_Td = layer(x_Td), moe_output(layer, x_Td)
    torch.testing.assert_close(y_Td, expected_Td, atol=1e-4, rtol=1e-4)
    gradients = [torch.autograd.grad((y * weight_Td).sum(), layer.sam.gain_SE)[0] for y in (y_Td, expected_Td)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    assert gradients[0][:, [0, 1, 3, 4]].any() and not gradients[0][:, [2, 5, 6, 7]].any()


def test_slots_keep_the_gains_of_all_tails(pair):
    model = set_gains(copy.deepcopy(pair[1]))
    before = model.sam_layers[0].sam.gain_SE.detach().clone()
    to_slots(model, 5)
    assert torch.equal(model.sam_layers[0].sam.gain_SE, before[:5])


# ------------------------------------------------------------------ what is kept, and what is refused


@torch.no_grad()
def test_gains_are_saved_and_a_plain_load_leaves_them_out(pair, dense, tmp_path):
    model = set_gains(copy.deepcopy(pair[1]))
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert again.sam_config.semantics == "message"
    torch.testing.assert_close(again(input_ids=ids()).logits, model(input_ids=ids()).logits, atol=1e-6, rtol=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(
        plain(input_ids=ids()).logits, dense(input_ids=ids()).logits, atol=1e-4, rtol=1e-4
    )


def test_adapters_keep_the_gains(pair, tmp_path):
    model = copy.deepcopy(pair[1])
    prepare(model, "lora", rank=4, alpha=4.0, seed=0)
    assert model.sam_layers[0].sam.gain_SE.requires_grad
    save_adapter(set_gains(model), tmp_path)
    other = copy.deepcopy(pair[1])
    load_adapter(other, tmp_path)
    assert torch.equal(other(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_merging_is_refused_while_experts_send_messages(pair):
    model = copy.deepcopy(pair[1])
    tail, head = model.graph()[1].nonzero()[-1].tolist()
    with torch.no_grad():
        model.sam_layers[1].sam.gain_SE[head, tail] = -0.25
    path = model.sam_layers[1].ffn.path
    with pytest.raises(InputError, match=rf"gains up to 0.25 in {path}, .*save_pretrained .*unload\(\)"):
        model.merge_and_unload()
    with torch.no_grad():
        model.sam_layers[1].sam.gain_SE.zero_()[2, 5] = 1.0  # of no edge: nothing is sent
    writes = copy.deepcopy(model)
    conditioned(writes)
    with pytest.raises(InputError, match="in the assembler"):
        writes.merge_and_unload()
    assert not hasattr(model.merge_and_unload(), "sam_layers")


def test_the_other_back_ends_are_refused(pair, one_rank, tiny, tmp_path):
    from sam_ds.experts.deepspeed_moe import to_deepspeed_moe

    for move in (to_nf4, to_deepspeed_moe):
        model = copy.deepcopy(pair[1])
        with pytest.raises(InputError, match="of the torch back end.* semantics='reach', or "):
            move(model)
        assert {layer.backend for layer in model.sam_layers} == {"torch"}
    config = tiny.config(
        tmp_path, "sam.semantics=message", "tiers.small.precision=nf4", "tiers.small.trains=lora",
        "tiers.medium.trains=lora", "tiers.large.trains=lora",
    )  # fmt: skip
    with pytest.raises(InputError, match="tiers.small: .*messages; give precision = 'bf16', or sam.semantics"):
        check_tiers(AutoModelForCausalLM.from_pretrained(tiny.model).to("meta"), config)


# ------------------------------------------------------------------ a federation


@pytest.fixture(scope="module")
def talking(tiny, one_rank, tmp_path_factory):
    """A run of two rounds whose experts send messages."""
    from sam_ds.clients.worker import Worker
    from sam_ds.federation.run import prepare as prepare_run
    from sam_ds.federation.setup import clients_of, corpus_of

    config = tiny.config(tmp_path_factory.mktemp("talking"), "sam.semantics=message", "train.whole=0.5")
    base = prepare_run(config)
    worker = Worker(config, base, clients_of(config, corpus_of(config)), [one_rank])
    yield Federation.of(config, base, worker).start()
    worker.close()


def test_what_is_of_the_merged_model_sends_nothing(talking, one_rank):
    """The steps that visit all experts, and the run's merged figures."""
    from sam_ds.clients.worker import Worker

    server, config = talking.server, talking.server.config
    own = replace(config, train=replace(config.train, whole=1.0))
    worker = Worker(own, talking.run / "base", talking.worker.clients, [one_rank])
    deltas = worker.train(task_for(server, 0)).deltas
    worker.close()
    assert not any(delta.any() for unit, delta in deltas.items() if getattr(unit, "tensor", "") == "gain")
    assert all(delta.any() for unit, delta in deltas.items() if getattr(unit, "tensor", "") == "down")
    before = evaluate(server, "valid", 64)
    set_gains(server.model, std=1.0)
    after = evaluate(server, "valid", 64)
    server.follow_state()
    assert after["merged"] == before["merged"] and after["sparse"] != before["sparse"]


def test_zero_3_trains_gains_as_zero_2(talking, one_rank):
    from sam_ds.clients.worker import Worker

    config, task, found = talking.server.config, task_for(talking.server, 0, seed=1), []
    for stage in ("cpu_zero2.json", "zero3.json"):
        tiers = {name: replace(tier, ds_config=stage) for name, tier in config.tiers.items()}
        own = replace(config, tiers=tiers, train=replace(config.train, whole=0.0))
        worker = Worker(own, talking.run / "base", talking.worker.clients, [one_rank])
        found.append(worker.train(task).deltas)
        worker.close()
    gains = [unit for unit in found[0] if isinstance(unit, ExpertUnit) and unit.tensor == "gain"]
    assert any(found[0][unit].any() for unit in gains)
    for unit, delta in found[0].items():
        np.testing.assert_allclose(found[1][unit], delta, atol=1e-5, err_msg=str(unit))


def test_gains_move_in_a_federation_and_are_saved_with_its_model(talking, tmp_path):
    server = talking.server
    assert all(record["status"] == "ok" for record in talking.records("client"))
    gains = {unit: value for unit, value in server.state.units.items() if isinstance(unit, ExpertUnit)
             and unit.tensor == "gain"}  # fmt: skip
    assert len(gains) == 2 * 8 and all(value.shape == (1, 8) for value in gains.values())
    moved = np.stack([[gains[ExpertUnit(layer, expert, "gain")][0] for expert in range(8)] for layer in range(2)])
    assert moved.any() and not np.triu(moved).any()
    # Those of the clients' own, too: they begin at 0.
    own = {unit.name: value for unit, value in server.state.units.items() if "gain" in getattr(unit, "name", "")}
    assert own.keys() == {"assembler.gain_tails", "assembler.gain_heads"} and own["assembler.gain_heads"].any()
    server.save_model(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "sam.safetensors")
    for layer in range(2):
        torch.testing.assert_close(saved[f"model.layers.{layer}.mlp.sam.gain_SE"], torch.from_numpy(moved[layer]))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad(), server.model.dense():
        torch.testing.assert_close(
            plain(input_ids=ids()).logits, server.model(input_ids=ids()).logits, atol=1e-5, rtol=1e-5
        )


def test_a_checkpoint_holds_the_gains(talking):
    state = talking.server.state
    assert_equal_states(load_checkpoint(talking.run / "checkpoints" / f"round-{state.round:05d}.safetensors"), state)


def test_the_setting_reaches_the_conversion():
    config = load_config(None, ["sam.semantics=message"])
    assert SamConfig.of_run(config).semantics == "message"
    with pytest.raises(InputError, match="semantics must be one of reach, message, got 'gossip'"):
        SamConfig(semantics="gossip")


def test_inject_layers_takes_either(tiny_llama):
    """Without messages nothing of them is in the model."""
    model = tiny_llama()
    ffns = find_ffns(model)
    config = SamConfig(num_experts=8, top_k=4)
    inject_layers(model, config, ffns, wrap_ffns(ffns, config))
    assert not any("gain" in name for name in model.state_dict())
