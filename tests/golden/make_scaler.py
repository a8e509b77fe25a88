"""Makes scaler.json, the values that tests/loss_scale.rs compares with.

    python tests/golden/make_scaler.py > tests/golden/scaler.json

The committed file was made with torch 2.15.0 on a CPU: the scales and growth trackers of torch.amp.GradScaler after each of
some steps, of which those marked 1 have an infinite gradient.
"""

import json
import math

import torch

DEFAULTS = {"init_scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5}
CASES = {
    "powers of two": ({**DEFAULTS, "growth_interval": 3}, [0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1] + 8 * [0]),
    "other factors": (
        {"init_scale": 1000.3, "growth_factor": 1.7, "backoff_factor": 0.3, "growth_interval": 2},
        [0, 1, 0, 0, 0, 0, 0, 1, 1] + 9 * [0],
    ),
    "up to the largest": ({**DEFAULTS, "init_scale": 2.0**125, "growth_interval": 1}, 5 * [0] + [1, 0]),
    "down": ({**DEFAULTS, "growth_interval": 2}, 40 * [1] + [0, 0, 0]),
}


def run(settings, infinite):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", **settings)
    steps = []
    for bad in infinite:
        scaler.scale(torch.zeros(()))  # Makes the scale.
        param.grad = torch.full((3,), math.inf if bad else 1.0)
        scaler.step(optimizer)
        scaler.update()
        steps.append([bad, scaler.get_scale(), scaler._get_growth_tracker()])
    return {**settings, "steps": steps}


print(
    json.dumps(
        {"torch": torch.__version__, "cases": {name: run(*case) for name, case in CASES.items()}},
        indent=1,
    )
)
