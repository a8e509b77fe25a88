"""Makes muon.json, the values that tests/muon.rs compares with.

    python tests/golden/make_muon.py > tests/golden/muon.json

The committed file was made with torch 2.15.0 on a CPU: PyTorch's Muon on three matrices whose gradients are given, 8 steps
each. It computes its products in bfloat16, which is replaced by float64 here.
"""

import json
import math

import torch

torch.bfloat16 = torch.float64

STEPS = 8
SHAPES = {"wide": (3, 7), "tall": (6, 2), "square": (4, 4)}


def numbers(shape, salt):
    rows, cols = shape
    return [math.sin(1.7 * i + 0.9 * salt) for i in range(rows * cols)]


def start(name):
    """Eighths, which every dtype holds."""
    return [round(8 * x) / 8 for x in numbers(SHAPES[name], ord(name[0]))]


def gradient(name, step):
    return numbers(SHAPES[name], 10 * step + len(name) + ord(name[0]))


SHARED = {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"}
CASES = {
    "default": {},
    "plain": {"nesterov": False, "weight_decay": 0.0},
    "other": {"momentum": 0.8, "ns_steps": 3, "weight_decay": 0.3},
}


def run(settings):
    params = {
        name: torch.nn.Parameter(torch.tensor(start(name), dtype=torch.float64).reshape(shape))
        for name, shape in SHAPES.items()
    }
    optimizer = torch.optim.Muon(list(params.values()), **SHARED, **settings)
    steps = []
    for step in range(STEPS):
        for name, param in params.items():
            missing = name == "tall" and step == 2
            grad = torch.tensor(gradient(name, step), dtype=torch.float64).reshape(param.shape)
            param.grad = None if missing else grad
        optimizer.step()
        steps.append({name: param.flatten().tolist() for name, param in params.items()})
    return steps


print(
    json.dumps(
        {
            "torch": torch.__version__,
            "start": {name: start(name) for name in SHAPES},
            "gradients": [{name: gradient(name, step) for name in SHAPES} for step in range(STEPS)],
            "cases": {name: run(settings) for name, settings in CASES.items()},
        }
    )
)
