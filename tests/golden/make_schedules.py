"""Makes schedules.json, the values that tests/schedules.rs compares with.

    python tests/golden/make_schedules.py > tests/golden/schedules.json

The committed file was made with torch 2.15.0: the learning rates, base 1, of PyTorch's schedulers in each step of a loop, and
of a LambdaLR where PyTorch has none.
"""

import json
import math
import warnings

import torch
from torch.optim import lr_scheduler as s

warnings.simplefilter("ignore")


def stable_decay(step):
    """A warm-up over 4 steps that begins at 1/5, 1 up to step 10, then a line to 0.1 at step 20."""
    if step < 4:
        return (step + 1) / 5
    return 1 if step < 10 else 0.1 + 0.9 * max(0, 20 - step) / 10


def cosine_with_warmup(step):
    """As the package transformers has it: the first step is 0."""
    if step < 5:
        return step / 5
    return 0.5 * (1 + math.cos(math.pi * min(1, (step - 5) / 15)))


CASES = {
    "constant": (6, lambda o: s.LambdaLR(o, lambda _: 1)),
    "linear": (12, lambda o: s.LinearLR(o, start_factor=1 / 3, end_factor=0.8, total_iters=7)),
    "warmup": (8, lambda o: s.LinearLR(o, start_factor=1 / 6, total_iters=5)),
    "linear_decay": (14, lambda o: s.LinearLR(o, start_factor=1, end_factor=0.05, total_iters=10)),
    # PyTorch's rises again behind T_max.
    "cosine": (14, lambda o: s.CosineAnnealingLR(o, T_max=13, eta_min=0.07)),
    "step": (20, lambda o: s.StepLR(o, step_size=3, gamma=0.3)),
    "exponential": (20, lambda o: s.ExponentialLR(o, gamma=0.9)),
    "multi_step": (12, lambda o: s.MultiStepLR(o, milestones=[3, 8], gamma=0.1)),
    "constant_lr": (8, lambda o: s.ConstantLR(o, factor=1 / 3, total_iters=5)),
    "one_cycle": (20, lambda o: s.OneCycleLR(o, max_lr=1, total_steps=20, pct_start=0.3)),
    "one_cycle_set": (
        40,
        lambda o: s.OneCycleLR(
            o, max_lr=1, total_steps=40, pct_start=0.25, div_factor=10, final_div_factor=100
        ),
    ),
    "sequence": (
        20,
        lambda o: s.SequentialLR(
            o,
            [
                s.LinearLR(o, start_factor=0.25, total_iters=4),
                s.CosineAnnealingLR(o, T_max=8, eta_min=0.1),
                s.StepLR(o, step_size=2, gamma=0.5),
            ],
            milestones=[4, 12],
        ),
    ),
    "product": (
        12,
        lambda o: s.ChainedScheduler(
            [s.LinearLR(o, start_factor=0.5, total_iters=4), s.StepLR(o, step_size=3, gamma=0.5)]
        ),
    ),
    "stable_decay": (25, lambda o: s.LambdaLR(o, stable_decay)),
    "cosine_with_warmup": (25, lambda o: s.LambdaLR(o, cosine_with_warmup)),
}


def run(steps, new):
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = new(optimizer)
    factors = []
    for step in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < steps:
            scheduler.step()
    return factors


print(json.dumps({name: run(*case) for name, case in CASES.items()}, indent=1))
