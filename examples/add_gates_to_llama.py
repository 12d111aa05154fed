"""Put gates on a model, train them alone, take them off: `python examples/add_gates_to_llama.py [MODEL] [OUT]`.

MODEL: a folder or hub id; by default a small Llama that is made here, without network, in about a minute.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sam_ds import SamConfig, from_pretrained, get_sam_model
from sam_ds.data.base_model import embedded_base_model
from sam_ds.data.embedded import embedded_corpus

corpus = embedded_corpus()
folder = sys.argv[1] if len(sys.argv) > 1 else embedded_base_model(corpus)
out = sys.argv[2] if len(sys.argv) > 2 else "runs/gates"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

# Text like the model's own, in rows: 8192 tokens, of which no row is longer than the model can read.
ids = tokenizer("\n".join(corpus.public), verbose=False)["input_ids"][:8192]
ids = torch.tensor(ids).view(-1, min(256, model.config.max_position_embeddings))
# A fixed number of experts a token: gates that train leave the thresholds that calibration finds.
model = get_sam_model(model, SamConfig(num_experts=16, top_k=12, routing="top_k"), calibration=ids)

for name, parameter in model.named_parameters():
    parameter.requires_grad = name.endswith(".sam.wg")
model.print_trainable_parameters()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for rows in ids[:32].split(8):
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.4f}")

prompt = tokenizer("The", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.eval().generate(**prompt, max_new_tokens=24, do_sample=False)[0]))

model.save_pretrained(out)
tokenizer.save_pretrained(out)
again = from_pretrained(out)
assert torch.allclose(again(ids[:2]).logits, model(ids[:2]).logits, atol=1e-4)
plain = again.merge_and_unload()
print(f"{out} holds the graph of experts; without it, it is a {type(plain).__name__} as before")
