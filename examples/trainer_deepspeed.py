"""A converted model under `transformers.Trainer`, with or without DeepSpeed.

    python examples/trainer_deepspeed.py
    deepspeed --num_gpus 2 examples/trainer_deepspeed.py --deepspeed ds_configs/zero3.json

The batch is the same on any number of ranks, and so are the losses. Without a GPU the ranks speak over gloo.
"""

import argparse
import json
import os
from pathlib import Path

import deepspeed
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from sam_ds import SamConfig, get_sam_model
from sam_ds.data.base_model import embedded_base_model
from sam_ds.data.batches import pack
from sam_ds.data.embedded import embedded_corpus

# On a CPU DeepSpeed would compile an op for tensor-parallel inference when the ranks meet.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder or hub id; a small Llama made here by default")
parser.add_argument("--out", default="runs/trainer")
parser.add_argument("--deepspeed", metavar="JSON")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--batch", type=int, default=8, help="rows a step, of all ranks together")
parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
options = parser.parse_args()

corpus = embedded_corpus()
folder = options.model or embedded_base_model(corpus)
tokenizer = AutoTokenizer.from_pretrained(folder)

# Convert before TrainingArguments exist: from then on ZeRO-3 cuts what is loaded into shards, which have no neurons.
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
length = min(128, model.config.max_position_embeddings)
calibration = torch.from_numpy(pack(corpus.public, tokenizer, length, limit_tokens=8192))
# A fixed number of experts a token: gates that train leave the thresholds that calibration finds.
config = SamConfig(num_experts=16, top_k=12, routing="top_k")
model = get_sam_model(model, config, calibration=calibration, progress=False)

# The shards come together in `save_model`, so that what is saved is a folder like any other.
settings = json.loads(Path(options.deepspeed).read_text()) if options.deepspeed else None
if settings and settings["zero_optimization"]["stage"] == 3:
    settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
ranks = int(os.environ.get("WORLD_SIZE", "1"))
on_cpu = not torch.cuda.is_available()
arguments = TrainingArguments(
    options.out, deepspeed=settings, max_steps=options.steps, seed=0, learning_rate=1e-3, logging_steps=1,
    per_device_train_batch_size=options.batch // ranks, save_strategy="no", report_to=[],
    # Without use_cpu every rank of a machine without GPU believes it is alone and trains on the same rows.
    use_cpu=on_cpu, dataloader_pin_memory=not on_cpu,
)  # fmt: skip
rows = pack(corpus.domains[min(corpus.domains)].train, tokenizer, length).tolist()
trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}))
trainer.train()
trainer.save_model()
if trainer.is_world_process_zero():
    tokenizer.save_pretrained(options.out)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    stage = trainer.deepspeed.zero_optimization_stage() if trainer.deepspeed else None
    facts = {"ranks": arguments.world_size, "zero_stage": stage, "losses": losses}
    (Path(options.out) / "losses.json").write_text(json.dumps(facts))
    print(facts)
if trainer.deepspeed:
    # Nobody leaves while another still writes: what a rank holds open for the others goes with it.
    torch.distributed.barrier()
    trainer.deepspeed.destroy()
    torch.distributed.destroy_process_group()
