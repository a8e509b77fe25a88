"""Makes golden.json, the values that tests/golden.rs compares with.

    python tests/golden/make_golden.py

The committed file was made with torch 2.15.0 on a CPU, all in float64.

A network of 5 inputs, 7 tanh units and 3 outputs is trained for 8 steps on one batch, by PyTorch's
autograd and by the rule below, which is written from its formula and from nothing else:

    clip = min(1, max_grad_norm / ||g of all parameters||)
    g   <- clip * g
    H    = sqrt(sum g^4) over the tensor, over all tensors, or g^2 of each element
    phi  = s * lr / (1 + beta * H),  beta as given or gamma * lr
    w   <- (1 - phi * weight_decay) * w - phi * g
"""

import json
import math
from pathlib import Path

import torch

SHAPES = {"w1": (7, 5), "b1": (7,), "w2": (3, 7), "b2": (3,)}
BATCH = 8
STEPS = 8
SCHEDULE = [1.0, 0.75, 0.5, 0.25, 0.125, 0.25, 0.5, 0.75]

# The lr and beta of each case are such that the brake really brakes: beta * H is not small.
# "missing" is a parameter without a gradient on the third step.
DEFAULTS = {
    "scope": "tensor",
    "weight_decay": 0.0,
    "max_grad_norm": None,
    "schedule": [1.0] * STEPS,
    "missing": None,
}
CASES = [
    {"name": "reference", "lr": 1e-3, "beta": 0.1},
    {"name": "steep", "lr": 0.5, "beta": 3.0},
    {
        "name": "global, clipped, decayed",
        "lr": 0.5,
        "beta": 1000.0,
        "scope": "global",
        "weight_decay": 0.1,
        "max_grad_norm": 0.05,
    },
    {
        "name": "element, decayed, scheduled",
        "lr": 0.2,
        "beta": 3.0,
        "scope": "element",
        "weight_decay": 0.1,
        "schedule": SCHEDULE,
    },
    {
        "name": "tied, scheduled",
        "lr": 0.8,
        "gamma": 0.5,
        "schedule": SCHEDULE,
    },
    # Global and decayed, so that it shows whether the missing one counts in H, or decays.
    {
        "name": "gradient missing",
        "lr": 0.3,
        "beta": 0.3,
        "scope": "global",
        "weight_decay": 0.1,
        "missing": "w2",
    },
]


class Srkl(torch.optim.Optimizer):
    """The rule. `self.s` is the schedule's multiplier; `self.phi` and `self.curvature` are lists
    with one entry a parameter: a number, or None where there is none."""

    def __init__(self, params, lr, beta, scope, weight_decay, max_grad_norm):
        defaults = dict(lr=lr, beta=beta, scope=scope, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm
        self.s = 1.0

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        params = group["params"]
        grads = [w.grad for w in params]
        flat = torch.cat([g.flatten() for g in grads if g is not None])
        norm = torch.sqrt((flat**2).sum())
        clip = 1.0
        if self.max_grad_norm is not None and norm > self.max_grad_norm:
            clip = self.max_grad_norm / norm
        h_of_all = torch.sqrt(((clip * flat) ** 4).sum())
        self.phi, self.curvature = [], []
        for w, g in zip(params, grads):
            if g is None:
                self.phi.append(None)
                self.curvature.append(None)
                continue
            g = clip * g
            h = {
                "tensor": torch.sqrt((g**4).sum()),
                "global": h_of_all,
                "element": g**2,
            }[group["scope"]]
            phi = self.s * group["lr"] / (1 + group["beta"] * h)
            w.copy_((1 - phi * group["weight_decay"]) * w - phi * g)
            one_number = group["scope"] != "element"
            self.phi.append(phi.item() if one_number else None)
            self.curvature.append(h.item() if one_number else None)


def wave(shape, scale, speed):
    """Numbers that look irregular, as multiples of 1/256: exact in JSON, in f32 and in f64."""
    n = math.prod(shape)
    values = [round(256 * scale * math.sin(speed * (i + 1))) / 256 for i in range(n)]
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def start():
    return {name: wave(shape, 0.75, 2.0 + i) for i, (name, shape) in enumerate(SHAPES.items())}


INPUT = wave((BATCH, 5), 1.0, 1.7)
TARGET = wave((BATCH, 3), 2.0, 2.3)


def loss_of(p):
    hidden = torch.tanh(INPUT @ p["w1"].T + p["b1"])
    return ((hidden @ p["w2"].T + p["b2"] - TARGET) ** 2).mean()


def run(case):
    case = DEFAULTS | case
    params = {name: w.requires_grad_() for name, w in start().items()}
    beta = case["beta"] if "beta" in case else case["gamma"] * case["lr"]
    settings = {key: case[key] for key in ("lr", "scope", "weight_decay", "max_grad_norm")}
    optimizer = Srkl(params.values(), beta=beta, **settings)
    steps = []
    for number, s in enumerate(case["schedule"], start=1):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(params)
        loss.backward()
        missing = case["missing"] if number == 3 else None
        grad_norms = [w.grad.norm().item() for w in params.values()]
        if missing is not None:
            params[missing].grad = None
        optimizer.s = s
        optimizer.step()
        steps.append(
            {
                "s": s,
                "missing": missing,
                "loss": loss.item(),
                "grad_norms": grad_norms,
                "phi": optimizer.phi,
                "curvature": optimizer.curvature,
                "parameters": [w.detach().flatten().tolist() for w in params.values()],
            }
        )
    settings = {key: value for key, value in case.items() if key not in ("schedule", "missing")}
    return settings | {"steps": steps}


def main():
    torch.set_num_threads(1)
    golden = {
        "torch": torch.__version__,
        "input": INPUT.tolist(),
        "target": TARGET.tolist(),
        "start": [
            {"name": name, "shape": SHAPES[name], "values": w.flatten().tolist()}
            for name, w in start().items()
        ],
        "cases": [run(case) for case in CASES],
    }
    text = json.dumps(golden, allow_nan=False)
    # A line for each step.
    text = text.replace('{"name"', '\n{"name"').replace('{"s":', '\n{"s":')
    Path(__file__).with_name("golden.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
