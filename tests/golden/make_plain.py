"""Makes plain.json, the values that tests/plain.rs compares with.

    python tests/golden/make_plain.py > tests/golden/plain.json

The committed file was made with torch 2.15.0 on a CPU, in float64: PyTorch's SGD and AdamW on two parameters whose
gradients are given, 8 steps each. The second parameter has no gradient on the third step.
"""

import json

import torch

from plain_numbers import SHAPES, STEPS, numbers, start


def gradient(name, step):
    return numbers(SHAPES[name], 10 * step + len(name) + ord(name))


CASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}


def run(new):
    params = {
        name: torch.nn.Parameter(torch.tensor(start(name), dtype=torch.float64)) for name in SHAPES
    }
    optimizer = new(list(params.values()))
    steps = []
    for step in range(STEPS):
        for name, param in params.items():
            missing = name == "b" and step == 2
            param.grad = None if missing else torch.tensor(gradient(name, step), dtype=torch.float64)
        optimizer.step()
        steps.append({name: param.tolist() for name, param in params.items()})
    return steps


print(
    json.dumps(
        {
            "torch": torch.__version__,
            "start": {name: start(name) for name in SHAPES},
            "gradients": [{name: gradient(name, step) for name in SHAPES} for step in range(STEPS)],
            "cases": {name: run(new) for name, new in CASES.items()},
        },
        indent=1,
    )
)
