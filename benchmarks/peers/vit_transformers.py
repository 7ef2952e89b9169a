"""A vision transformer of Hugging Face transformers, one call at a time.

Run by ../vit_cost.py in an interpreter that has torch and transformers:

    python peers/vit_transformers.py FOLDER WIDTH DEPTH HEADS PATCH SIDE

Saves a random model to FOLDER as ``save_pretrained`` does, reads
``inputs.npz`` there and prints a line of JSON for every line it is given:
"forward" or "step". Attention is the fused one, AdamW as well.
"""

import json
import os
import pathlib
import sys
import time

import numpy as np
import torch
import transformers


def main():
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  transformers.utils.logging.disable_progress_bar()
  folder = pathlib.Path(sys.argv[1])
  width, depth, heads, patch, side = map(int, sys.argv[2:7])
  stored = dict(np.load(folder / "inputs.npz", allow_pickle=False))
  model = transformers.ViTForImageClassification(
    transformers.ViTConfig(
      hidden_size=width,
      num_hidden_layers=depth,
      num_attention_heads=heads,
      intermediate_size=4 * width,
      patch_size=patch,
      image_size=side,
      num_labels=int(stored["num_classes"]),
      hidden_dropout_prob=0.0,
      attention_probs_dropout_prob=0.0,
      attn_implementation="sdpa",
    )
  )
  model.save_pretrained(folder)
  pixels = (torch.from_numpy(stored["images"]).permute(0, 3, 1, 2) - 0.5) / 0.5
  pixels = pixels.contiguous()
  labels = torch.from_numpy(stored["labels"]).long()
  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=float(stored["lr"]),
    weight_decay=float(stored["weight_decay"]),
    fused=True,
  )

  def forward():
    model.eval()
    with torch.inference_mode():
      return model(pixel_values=pixels).logits.flatten()[:10].tolist()

  def step():
    model.train()
    logits = model(pixel_values=pixels).logits
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [loss.item()]

  say = lambda **line: print(json.dumps(line), flush=True)  # noqa: E731
  say(version=f"transformers {transformers.__version__} on {torch.__version__}")
  for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    value = {"forward": forward, "step": step}[line.strip()]()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    say(wall=wall, cpu=cpu, value=value)


if __name__ == "__main__":
  main()
