"""A converted model under `transformers.Trainer`: whatever it goes back to, it goes back to as a whole."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import sam_ds
from sam_ds.clients.engine import deepspeed
from sam_ds.errors import InputError
from sam_ds.experts.config import SamConfig
from sam_ds.experts.model import add_assembler

IDS = torch.randint(3, 97, (48, 32), generator=torch.Generator().manual_seed(1))
ROWS = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})


def convert(dense, ids=IDS, **changes):
    """With all that the Trainer trains: weights, gates, the assembler."""
    values = {"num_experts": 8, "top_k": 4, "standin_rank": 4, "density": 0.5, "routing": "top_k"} | changes
    model = sam_ds.get_sam_model(dense, SamConfig(**values), calibration=ids, progress=False)
    add_assembler(model, seed=0)
    model.sam_condition = torch.randn(2, 9, generator=torch.Generator().manual_seed(2))
    return model


def trainer(model, folder, **changes):
    arguments = {
        "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **arguments | changes)
    return Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS)


def same(ours, theirs):
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert torch.equal(ours.sam_affinity_LEE, theirs.sam_affinity_LEE)
    assert torch.equal(ours.sam_lost_LK, theirs.sam_lost_LK)
    assert torch.equal(ours.sam_assembler.prior_LEE, theirs.sam_assembler.prior_LEE)
    assert [layer.top_k for layer in ours.sam_layers] == [layer.top_k for layer in theirs.sam_layers]


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory):
    """A model after four steps, and the folder with the checkpoint after two."""
    folder = tmp_path_factory.mktemp("whole")
    model = convert(tiny_llama())
    start = copy.deepcopy(model)
    trainer(model, folder).train()
    for name in ("model.layers.0.mlp.sam.wg", "sam_assembler.tails", "model.layers.1.mlp.up_proj.weight"):
        assert not torch.equal(model.state_dict()[name], start.state_dict()[name]), name
    return model, folder


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_it_goes_on_from_a_checkpoint(whole, tiny_llama, tmp_path, shard):
    """Converted with other text: other experts, other gates, another graph, until the checkpoint is read."""
    model, folder = whole
    checkpoint = folder / "checkpoint-2"
    if shard != "50GB":
        sam_ds.from_pretrained(checkpoint).save_pretrained(tmp_path / "cut", max_shard_size=shard)
        for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (tmp_path / "cut" / name).write_bytes((checkpoint / name).read_bytes())
        checkpoint = tmp_path / "cut"
        assert not (checkpoint / "model.safetensors").exists()
    again = convert(tiny_llama(), IDS // 2 + 3)
    assert not torch.equal(again.graph(), model.graph())
    assert (again.sam_affinity_LEE - model.sam_affinity_LEE).abs().max() > 0.1
    trainer(again, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    same(again, model)


def test_it_goes_on_from_a_model_loaded_from_the_checkpoint(whole, tmp_path):
    model, folder = whole
    again = sam_ds.from_pretrained(folder / "checkpoint-2")
    again.sam_condition = model.sam_condition
    trainer(again, tmp_path).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    same(again, model)


def test_it_ends_with_the_best_model(whole, tiny_llama, tmp_path):
    """By a measure that falls, so that it is not the last."""
    model = convert(tiny_llama())
    run = trainer(
        model, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, greater_is_better=True
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    best = sam_ds.from_pretrained(tmp_path / "checkpoint-2")
    same(model, best)
    last = sam_ds.from_pretrained(tmp_path / "checkpoint-4")
    assert not torch.equal(last.sam_layers[0].sam.wg, best.sam_layers[0].sam.wg)


def test_a_checkpoint_that_was_converted_otherwise_is_refused(whole, tiny_llama, tmp_path):
    other = convert(tiny_llama(), standin_rank=2)
    before = copy.deepcopy(other)
    with pytest.raises(InputError, match="standin_rank=4.*, the model with .*standin_rank=2.*from_pretrained"):
        trainer(other, tmp_path).train(resume_from_checkpoint=str(whole[1] / "checkpoint-2"))
    same(other, before)


def test_a_plain_model_resumes_as_ever(tiny_llama, tmp_path):
    model = tiny_llama()
    trainer(model, tmp_path).train()
    again = tiny_llama(seed=1)
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_deepspeed_checkpoint_has_all_of_it(one_rank, tiny_llama, tmp_path, stage):
    """What the Trainer does under DeepSpeed, of which nothing is ours."""

    def engine(model):
        settings = {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=one_rank, dist_init_required=False
        )[0]

    def step(run):
        loss = run(input_ids=IDS[:4], labels=IDS[:4], use_cache=False).loss
        run.backward(loss)
        run.step()
        return loss.item()

    ours = engine(convert(tiny_llama()))
    step(ours)
    ours.save_checkpoint(tmp_path)
    then = [step(ours), step(ours)]
    again = engine(convert(tiny_llama(seed=1), IDS.flip(1)))
    again.load_checkpoint(tmp_path)
    assert torch.equal(again.module.graph(), ours.module.graph())
    assert [step(again), step(again)] == pytest.approx(then, rel=1e-6)
    for run in (ours, again):
        run.destroy()
