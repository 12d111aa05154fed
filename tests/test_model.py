"""Conversion and what it returns: the same function where all experts are visited, folders that load both ways, a
way back to the plain class, and refusals that leave the model as it was."""

import copy
import inspect
import json
from functools import partial

import pytest
import torch
from reference import neurons
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from sam_ds.clients.tier_engine import no_counts
from sam_ds.errors import InputError
from sam_ds.experts import grouped
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import get_sam_model
from sam_ds.experts.model import add_assembler
from sam_ds.experts.surgery import find_ffns
from sam_ds.experts.units import prepare

CONFIG = SamConfig(num_experts=8, top_k=4, roots=2, standin_rank=4)


def tokens(rows=40, columns=32, seed=1):
    return torch.randint(3, 97, (rows, columns), generator=torch.Generator().manual_seed(seed))


def convert(dense, **changes):
    values = {"num_experts": 8, "top_k": 4, "roots": 2, "standin_rank": 4} | changes
    return get_sam_model(
        copy.deepcopy(dense), SamConfig(**values), calibration=tokens(), progress=False
    )


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def dense(request, tiny_llama, tiny_gpt2):
    model = tiny_llama() if request.param == "llama" else tiny_gpt2()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # GPT-2 starts with biases of zero, which any order of neurons leaves in place
            if ".mlp." in name and name.endswith("bias"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def converted(dense):
    return convert(dense)


@pytest.fixture
def model(converted):
    return copy.deepcopy(converted)


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=tokens(3, 17, seed=2) if ids is None else ids).logits


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_tensor_and_an_iterable_of_its_parts_give_the_same_model(dense, converted):
    parts = (part for part in tokens().split(8))
    other = get_sam_model(copy.deepcopy(dense), CONFIG, calibration=parts, progress=False)
    for name, value in converted.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("features", ["weights", "activations", "output", "random"])
@pytest.mark.parametrize("standin", ["none", "mean", "linear"])
def test_all_experts_visited_is_the_original_for_every_choice(dense, features, standin):
    model = convert(dense, features=features, standin=standin)
    with model.active(8):
        close(logits(model), logits(dense))
    assert (logits(model) - logits(dense)).abs().max() > 1e-4


@pytest.mark.parametrize(("top_k", "roots"), [(2, 2), (8, 8), (1, 1)])
def test_the_ends_of_the_range_of_budgets(dense, top_k, roots):
    model = convert(dense, top_k=top_k, roots=roots)
    loss = model(input_ids=tokens(2), labels=tokens(2)).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_the_experts_are_in_order_of_use_and_every_graph_is_legal(converted):
    assert converted.graph().shape == (2, 8, 8)
    converted.set_graph(converted.graph())
    # all 27 edges whose head is not a root
    assert converted.graph().sum(dim=(1, 2)).tolist() == [27, 27]


def test_a_sparser_graph_has_the_share_of_edges_asked_for(dense):
    # of 27
    half, drawn = convert(dense, density=0.5).graph(), convert(dense, density=0.5, graph="random").graph()
    assert half.sum(dim=(1, 2)).tolist() == drawn.sum(dim=(1, 2)).tolist() == [14, 14]
    assert not torch.equal(half, drawn)


def test_conversion_keeps_the_mode(dense):
    for training in (True, False):
        model = convert(copy.deepcopy(dense).train(training))
        assert {module.training for module in model.modules()} == {training}


def test_greedy_generation(dense, model):
    prompt = tokens(2, 6, seed=3)
    arguments = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}
    expected = dense.generate(prompt, **arguments)
    with model.active(8):
        assert torch.equal(model.generate(prompt, **arguments), expected)
    sparse = model.generate(prompt, **arguments)
    assert torch.equal(sparse[:, :6], prompt) and sparse.shape[1] > 6
    without_cache = model.generate(prompt, use_cache=False, **arguments)
    assert torch.equal(sparse, without_cache)


def test_generation_of_a_left_padded_batch_is_the_dense_models(dense, model):
    prompt = tokens(2, 6, seed=4)
    prompt[1, :3] = 0
    mask = (prompt != 0).long()
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    with model.active(8):
        assert torch.equal(model.generate(prompt, **arguments), dense.generate(prompt, **arguments))


def test_the_signature_of_forward_is_the_original_one(dense, model):
    assert inspect.signature(model.forward) == inspect.signature(dense.forward)


def test_the_trainer_takes_it(tiny_llama, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    model = convert(tiny_llama())
    rows = Dataset.from_dict({"input_ids": tokens(16).tolist(), "labels": tokens(16).tolist()})
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1


def test_save_and_load(dense, model, tmp_path):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(dense).__name__]
    loaded = from_pretrained(tmp_path)
    assert loaded.sam_config == model.sam_config
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.sam_affinity_LEE, model.sam_affinity_LEE)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(dense)
    assert torch.equal(logits(plain), logits(model.merge_and_unload()))


def test_the_assembler_is_saved_too(model, tmp_path):
    add_assembler(model, seed=5)
    with torch.no_grad():
        model.sam_assembler.mix_bias.fill_(0.3)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    condition = torch.randn(2, 9)
    assert torch.equal(loaded.sam_assembler(condition), model.sam_assembler(condition))
    # without a client's condition it has no part in a forward pass
    loaded(input_ids=tokens(2), labels=tokens(2)).loss.backward()
    assert all(p.grad is None for p in loaded.sam_assembler.parameters())


def test_merge_and_unload_gives_the_original_class_and_its_neurons(dense, model):
    plain = model.merge_and_unload()
    assert plain is model and type(plain) is type(dense)
    assert {n: p.shape for n, p in plain.state_dict().items()} == {n: p.shape for n, p in dense.state_dict().items()}
    close(logits(plain), logits(dense))
    assert not [name for name in vars(plain) if name.startswith(("sam_", "_sam"))]
    for ours, theirs in zip(find_ffns(plain), find_ffns(dense), strict=True):
        assert type(ours.module) is type(theirs.module)
        assert neurons(ours) == neurons(theirs)
    again = get_sam_model(plain, CONFIG, calibration=tokens(), progress=False)
    with again.active(8):
        close(logits(again), logits(dense))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask[1, 5].__setitem__(3, True), "layer 1 holds the edge 5 -> 3"),
        (lambda mask: mask[1, :, 6].fill_(False), r"experts \[6.* of layer 1 cannot be reached"),
        (lambda mask: mask[0, 4].__setitem__(4, True), "layer 0 holds the edge 4 -> 4"),
    ],
)
def test_a_cyclic_or_unreachable_graph_is_refused_and_nothing_changes(model, change, message):
    before = model.graph()
    mask_LEE = torch.ones(2, 8, 8, dtype=torch.bool).triu(1)
    change(mask_LEE)
    with pytest.raises(InputError, match=message):
        model.set_graph(mask_LEE)
    assert torch.equal(model.graph(), before)


def test_a_graph_of_another_shape_is_refused(model):
    for mask_LEE in (torch.ones(1, 8, 8, dtype=torch.bool).triu(1), torch.ones(2, 16, 16, dtype=torch.bool).triu(1)):
        with pytest.raises(InputError, match=r"must have shape \(2, 8, 8\)"):
            model.set_graph(mask_LEE)


def test_active_is_undone_and_checked(model):
    before = logits(model)
    with pytest.raises(RuntimeError), model.active(8):
        raise RuntimeError
    assert torch.equal(logits(model), before)
    for top_k in (1, 9):
        with pytest.raises(InputError, match="top_k must be from roots=2 to num_experts=8"), model.active(top_k):
            pass


def test_print_trainable_parameters(model, capsys):
    prepare(model, "lora", rank=2, alpha=2.0, seed=0)
    model.print_trainable_parameters()
    train = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert model.get_nb_trainable_parameters() == (train, total) and 0 < train < total
    expected = f"trainable params: {train:,} || all params: {total:,} || trainable%: {100 * train / total:.4f}\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("changes", "calibration", "message"),
    [
        ({"num_experts": 6}, tokens(), "num_experts=6 does not divide the 64 neurons .*: 2, 4, 8, 16, 32, 64"),
        ({"standin_rank": 33}, tokens(), "standin_rank=33 exceeds the model's hidden size 32"),
        ({}, tokens(3, 50), "calibration has 150 tokens; fitting 8 experts needs 160"),
        ({}, [], "calibration has 0 tokens"),
        ({}, [tokens(), torch.full((1, 4), 97)], "token id 97, the model's vocabulary ends at 96"),
        ({}, [tokens(), torch.full((1, 4), -100)], "token id -100"),
    ],
)
def test_a_refused_conversion_leaves_the_model_alone(dense, changes, calibration, message):
    config = SamConfig(**{"num_experts": 8, "top_k": 4, "standin_rank": 4} | changes)
    model = copy.deepcopy(dense).train()
    with pytest.raises(InputError, match=message):
        get_sam_model(model, config, calibration=calibration, progress=False)
    assert type(model) is type(dense) and model.training
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in dense.state_dict().items())
    assert [type(ffn.module) for ffn in find_ffns(model)] == [type(ffn.module) for ffn in find_ffns(dense)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(dense, value):
    model = copy.deepcopy(dense)
    name = [name for name, _ in model.named_parameters()][-1]
    with torch.no_grad():
        model.get_parameter(name).view(-1)[7] = value
    with pytest.raises(InputError, match=f"^{name} of the model holds values that are not finite"):
        get_sam_model(model, CONFIG, calibration=tokens(), progress=False)
    assert type(model) is type(dense)


def test_a_converted_model_is_not_converted_again(model):
    before = logits(model)
    with pytest.raises(InputError, match="converted already"):
        get_sam_model(model, CONFIG, calibration=tokens(), progress=False)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\]"),
        ({"density": 1.5}, r"density must be in \(0, 1\]"),
        ({"num_experts": 8, "top_k": 9}, "top_k=9 exceeds num_experts=8"),
        ({"roots": 0}, "roots must be from 1"),
        ({"top_k": 3, "roots": 4}, "roots must be from 1 to top_k=3"),
        ({"num_experts": 1}, "num_experts must be at least 2"),
        ({"standin": "median"}, "standin must be one of none, mean, linear"),
        ({"features": "names"}, "features must be one of weights, activations, output"),
        ({"standin_rank": 0}, "standin_rank must be at least 1"),
    ],
)
def test_a_config_out_of_range_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        SamConfig(**values)


def test_from_pretrained_refuses_what_is_not_its_own(dense, model, tmp_path):
    dense.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="not a converted model"):
        from_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "ours")
    file = tmp_path / "ours" / "sam.safetensors"
    kept = load_file(file)
    lost = next(name for name in kept if name.endswith("sam.wg"))
    save_file({name: value for name, value in kept.items() if name != lost}, file)
    with pytest.raises(InputError, match="lacks"):
        from_pretrained(tmp_path / "ours")
    save_file(kept | {"model.odd.sam.wg": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="model.odd.sam.wg"):
        from_pretrained(tmp_path / "ours")
    save_file(kept, file)
    record = json.loads((tmp_path / "ours" / "sam_config.json").read_text())
    for change, message in (({"version": 2}, "version 2"), ({"sam": {"top_n": 3}}, "unknown key 'top_n'")):
        (tmp_path / "ours" / "sam_config.json").write_text(json.dumps(record | change))
        with pytest.raises(InputError, match=message):
            from_pretrained(tmp_path / "ours")


def with_updates(model):
    """Low-rank updates that are not zero."""
    prepare(model, "lora", rank=4, alpha=8.0, seed=0, attention_rank=2)
    for name, parameter in model.named_parameters():
        if name.endswith(("_rows", ".lora.b_Ro")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_unfolded_updates_are_not_lost(dense, model, tmp_path):
    with_updates(model)
    with pytest.raises(InputError, match="fold_lora"):
        model.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    with model.active(8):
        trained = logits(model)
        assert (trained - logits(dense)).abs().max() > 1e-3
        model.fold_lora()
        close(logits(model), trained)
    model.save_pretrained(tmp_path)
    assert all(layer.lora is None for layer in model.sam_layers)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), trained)


def test_merging_folds(model):
    with_updates(model)
    with model.active(8):
        trained = logits(model)
    close(logits(model.merge_and_unload()), trained)


def test_unloading_drops_the_updates(dense, model):
    plain = with_updates(model).unload()
    assert plain is model and type(plain) is type(dense)
    close(logits(plain), logits(dense))


def test_a_safe_merge_changes_nothing_where_a_weight_would_overflow(dense):
    model = with_updates(convert(copy.deepcopy(dense).to(torch.float16)))
    rows = model.sam_layers[1].lora.down_rows.data
    # finite itself, and too large for the precision of the weights
    rows[3] = 1e6
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = model.sam_layers[1].ffn.path
    with pytest.raises(InputError, match=f"^{path}: its low-rank update makes weights .* not finite in torch.float16"):
        model.merge_and_unload(safe_merge=True)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    rows[3] = 0.0
    plain = model.merge_and_unload(safe_merge=True, progressbar=True)
    assert type(plain) is type(dense) and all(torch.isfinite(p).all() for p in plain.parameters())


def test_bf16_converts_runs_trains_and_loads(dense, tmp_path):
    half = copy.deepcopy(dense).to(torch.bfloat16)
    model = convert(half)
    assert all(layer.sam.wg.dtype == torch.float32 for layer in model.sam_layers)
    with model.active(8):
        torch.testing.assert_close(logits(model), logits(half), atol=2e-2, rtol=2e-2)
    out = model(input_ids=tokens(4), labels=tokens(4))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and torch.isfinite(out.logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    for name, value in model.state_dict().items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kernel", [False, True])
def test_autocast(dense, lora, kernel, monkeypatch):
    """As `transformers.Trainer` does with bf16=True; a rank of 8 suits the grouped kernel too."""
    # A layer with no choice has no pairs.
    monkeypatch.setattr(grouped, "_worth_grouping", lambda _, rows, experts: kernel and rows > 0)
    model = convert(dense, standin_rank=8)
    if lora:
        prepare(with_updates(model), "lora", rank=8, alpha=8.0, seed=0, attention_rank=8)
    exact = logits(model, tokens(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=tokens(8), labels=tokens(8))
        out.loss.backward()
    torch.testing.assert_close(out.logits.float(), exact, atol=3e-2, rtol=3e-2)


def test_gradient_checkpointing_changes_neither_gradients_nor_counts(model):
    add_assembler(model, seed=0)
    model.sam_condition = torch.randn(2, 9)
    prepare(model, "full", rank=1, alpha=1.0, seed=0)

    def step():
        model.zero_grad()
        for layer in model.sam_layers:
            layer.counters = no_counts(8)
        model.train()
        # the same dropout masks in both passes (GPT-2)
        torch.manual_seed(0)
        model(input_ids=tokens(4), labels=tokens(4), use_cache=False).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return gradients, [layer.counters for layer in model.sam_layers]

    gradients, counters = step()
    for layer in model.sam_layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    gradients_again, counters_again = step()
    assert gradients["sam_assembler.tails"].abs().max() > 0
    for name, value in gradients.items():
        torch.testing.assert_close(gradients_again[name], value, msg=name)
    for ours, theirs in zip(counters_again, counters, strict=True):
        assert torch.equal(ours.used_SS, theirs.used_SS) and torch.equal(ours.offered_SS, theirs.offered_SS)
    assert sum(int(ours.used_SS.sum()) for ours in counters_again) > 0


def test_a_copy_is_on_its_own(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.sam_layers[0].sam.wg.zero_()
        other.sam_layers[0].get_submodule(other.sam_layers[0].ffn_names[0]).weight.zero_()
    assert model.sam_layers[0].sam.wg.abs().max() > 0
    assert other.get_submodule(next(iter(other._sam_original))) is other.sam_layers[0]
    assert (logits(other) - logits(model)).abs().max() > 0
