"""A training loop of one's own around a converted model, under DeepSpeed.

    deepspeed --num_gpus 2 examples/pretrain_deepspeed.py --zero 3
    deepspeed --num_gpus 2 examples/pretrain_deepspeed.py --zero 2 --ep-size 2

`--ep-size` puts the experts into DeepSpeed's MoE layers, each on one of so many ranks; ZeRO-3 shards them instead.
"""

import argparse

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sam_ds import SamConfig, get_sam_model, to_deepspeed_moe, to_views
from sam_ds.data.base_model import embedded_base_model
from sam_ds.data.batches import pack
from sam_ds.data.embedded import embedded_corpus

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder or hub id; a small Llama made here by default")
parser.add_argument("--out", default="runs/pretrained")
parser.add_argument("--zero", type=int, default=2, help="stage")
parser.add_argument("--ep-size", type=int)
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
options = parser.parse_args()
if options.ep_size and options.zero == 3:
    parser.error("DeepSpeed's MoE layers know no ZeRO-3: give --zero 2, or leave out --ep-size, and ZeRO-3 shards all")

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler, and serves only inference
deepspeed.init_distributed()
ranks, rank = deepspeed.comm.get_world_size(), deepspeed.comm.get_rank()
corpus = embedded_corpus()
folder = options.model or embedded_base_model(corpus)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
length = min(128, model.config.max_position_embeddings)
calibration = torch.from_numpy(pack(corpus.public, tokenizer, length, limit_tokens=8192))
config = SamConfig(num_experts=16, top_k=8, routing="top_k")
model = get_sam_model(model, config, calibration=calibration, progress=rank == 0)
if options.ep_size:
    to_deepspeed_moe(model, options.ep_size)

settings = {
    "train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": options.zero},
    # What is clipped by a norm would not be the same for every stage and ep_size.
    "gradient_clipping": 0.0, "steps_per_print": 10**9,
}  # fmt: skip
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
rows = torch.from_numpy(pack(corpus.domains[min(corpus.domains)].train, tokenizer, length))
for step in range(options.steps):
    batch = rows[8 * step : 8 * step + 8].chunk(ranks)[rank].to(engine.device)
    loss = engine(input_ids=batch, labels=batch).loss
    engine.backward(loss)
    engine.step()
    deepspeed.comm.all_reduce(loss := loss.detach() / ranks)
    if rank == 0:
        print(f"step {step} loss {loss.item():.4f}", flush=True)

to_views(model)
# ZeRO-3 has a part of every weight on each rank.
with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=options.zero == 3):
    if rank == 0:
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
# Nobody leaves while another still writes: what a rank holds open for the others goes with it.
deepspeed.comm.barrier()
engine.destroy()
deepspeed.comm.destroy_process_group()
