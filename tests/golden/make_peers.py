"""Makes peers.json, the values that tests/peers.rs compares with.

    pip install torch prodigyopt schedulefree
    python tests/golden/make_peers.py > tests/golden/peers.json

The committed file was made with torch 2.15.0, prodigyopt 1.1.2 and schedulefree 1.4.1 on a CPU, in float64: 20 steps of
two parameters whose gradients are given. Their mean is not 0, so that Prodigy's estimate grows. The second parameter
starts at 0 and has no gradient on the third step; of AdamW it has one, since candle's counts the steps of all parameters
together and PyTorch's those of each. "params" are the parameters after each step, "averages" those that Schedule-Free
evaluates at, "d" Prodigy's estimate.
"""

import json
import math
from importlib.metadata import version

import torch
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

STEPS = 20
WARM_UP = 4
SHAPES = {"a": 4, "b": 2}


def numbers(n, salt):
    return [math.sin(1.7 * i + 0.9 * salt) for i in range(n)]


def start(name):
    """Eighths, which every dtype holds."""
    return [0.0 if name == "b" else round(8 * x) / 8 for x in numbers(SHAPES[name], ord(name))]


def gradient(name, step):
    return [1.5 + x for x in numbers(SHAPES[name], 10 * step + len(name) + ord(name))]


def cosine(optimizer):
    return CosineAnnealingLR(optimizer, STEPS)


def warm_up_and_cosine(optimizer):
    """A warm-up over a fifth of the steps."""
    warm_up = LinearLR(optimizer, start_factor=1 / WARM_UP, total_iters=WARM_UP - 1)
    return SequentialLR(optimizer, [warm_up, CosineAnnealingLR(optimizer, STEPS - WARM_UP)], [WARM_UP])


def prodigy(params, lr):
    return Prodigy(params, lr=lr, safeguard_warmup=True, use_bias_correction=True)


def schedule_free(params, lr, warm_up=0):
    return AdamWScheduleFree(params, lr=lr, warmup_steps=warm_up)


# Of each case an optimizer, and a scheduler where it has one.
CASES = {
    "prodigy 1": (lambda params: prodigy(params, 1.0), None),
    "prodigy 4": (lambda params: prodigy(params, 4.0), None),
    "prodigy 4, cosine": (lambda params: prodigy(params, 4.0), cosine),
    "prodigy 4, warm-up and cosine": (lambda params: prodigy(params, 4.0), warm_up_and_cosine),
    "schedule-free 0.0025": (lambda params: schedule_free(params, 0.0025), None),
    "schedule-free 0.3": (lambda params: schedule_free(params, 0.3), None),
    "schedule-free 0.3, warm-up": (lambda params: schedule_free(params, 0.3, warm_up=WARM_UP), None),
    "adamw 0.01, warm-up and cosine": (
        lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0),
        warm_up_and_cosine,
    ),
}


def run(new, new_scheduler):
    params = {
        name: torch.nn.Parameter(torch.tensor(start(name), dtype=torch.float64)) for name in SHAPES
    }
    optimizer = new(list(params.values()))
    scheduler = new_scheduler(optimizer) if new_scheduler else None
    is_schedule_free = isinstance(optimizer, AdamWScheduleFree)
    if is_schedule_free:
        optimizer.train()
    steps = []
    for step in range(STEPS):
        for name, param in params.items():
            missing = name == "b" and step == 2 and not isinstance(optimizer, torch.optim.AdamW)
            param.grad = None if missing else torch.tensor(gradient(name, step), dtype=torch.float64)
        optimizer.step()
        if scheduler:
            scheduler.step()
        values = {"params": {name: param.tolist() for name, param in params.items()}}
        if isinstance(optimizer, Prodigy):
            values["d"] = optimizer.param_groups[0]["d"]
        if is_schedule_free:
            optimizer.eval()
            values["averages"] = {name: param.tolist() for name, param in params.items()}
            optimizer.train()
        steps.append(values)
    return steps


print(
    json.dumps(
        {
            "versions": {name: version(name) for name in ["torch", "prodigyopt", "schedulefree"]},
            "start": {name: start(name) for name in SHAPES},
            "gradients": [{name: gradient(name, step) for name in SHAPES} for step in range(STEPS)],
            "cases": {name: run(*case) for name, case in CASES.items()},
        },
        indent=1,
    )
)
