"""TorchOpt's Neumann kernel on the problem of hypergradient_cost.py.

Run by it in an interpreter that has torch and torchopt:

    python peers/hypergradient_torchopt.py PROBLEM.npz OUTPUT.npz

The product with the Hessian is made in both ways that torch has, and the
faster one counts: "double" goes backward through the graph of one gradient,
"forward" is ``torch.func.jvp`` of a gradient.
"""

import os
import sys
import time

import numpy as np
import torch
import torchopt
from torchopt import linalg


def make_inner(inputs, labels, penalty):
  def inner(theta):
    x = inputs
    for index in range(len(theta) // 2):
      x = x @ theta[2 * index] + theta[2 * index + 1]
      if index + 1 < len(theta) // 2:
        x = torch.tanh(x)
    squares = sum((leaf**2).sum() for leaf in theta)
    loss = torch.nn.functional.cross_entropy(x, labels)
    return loss + 0.5 * penalty * squares

  return inner


def double(inner, theta, v, num_steps, alpha):
  gradient = torch.autograd.grad(inner(theta), theta, create_graph=True)

  def matvec(t):
    return torch.autograd.grad(gradient, theta, t, retain_graph=True)

  return linalg.ns(matvec, v, maxiter=num_steps, alpha=alpha)


def forward(inner, theta, v, num_steps, alpha):
  gradient = torch.func.grad(inner)

  def matvec(t):
    return torch.func.jvp(gradient, (theta,), (t,))[1]

  return linalg.ns(matvec, v, maxiter=num_steps, alpha=alpha)


def main():
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  stored = dict(np.load(sys.argv[1], allow_pickle=False))
  count = int(stored["num_leaves"])
  theta, v = (
    tuple(torch.from_numpy(stored[f"{name}{i}"]) for i in range(count))
    for name in ("theta", "v")
  )
  for leaf in theta:
    leaf.requires_grad_(True)
  inner = make_inner(
    torch.from_numpy(stored["inputs"]),
    torch.from_numpy(stored["labels"]).long(),
    float(stored["penalty"]),
  )
  num_steps, alpha = int(stored["num_steps"]), float(stored["alpha"])
  result = {
    "version": f"TorchOpt {torchopt.__version__} on {torch.__version__}"
  }
  for name, solve in (("double", double), ("forward", forward)):
    times = []
    for _ in range(3 + int(stored["repeats"])):
      start = time.process_time()
      x = solve(inner, theta, v, num_steps, alpha)
      times.append(time.process_time() - start)
    result[name] = np.array(times[3:])
    for index, leaf in enumerate(x):
      result[f"{name}_x{index}"] = leaf.detach().numpy()
  np.savez(sys.argv[2], **result)


if __name__ == "__main__":
  main()
