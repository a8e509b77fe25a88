"""Makes directions.json, the values that tests/plain.rs compares with.

    python tests/golden/make_directions.py > tests/golden/directions.json

The committed file was made with torch 2.15.0 and optax 0.2.8 on a CPU, in float64: PyTorch's AdamW with amsgrad, optax's nadamw
and lion, and AdamW with the cautious mask of Liang and others (2024) written out here without its scale.
"""

import json

import jax
import numpy
import optax
import torch

from plain_numbers import SHAPES, STEPS, numbers, start


def gradient(name, step):
    """Their size changes, so that the largest second moment is not the last."""
    return [x / (1 + step) for x in numbers(SHAPES[name], 10 * step + len(name) + ord(name))]

jax.config.update("jax_enable_x64", True)


def pytorchs(new):
    params = {
        name: torch.nn.Parameter(torch.tensor(start(name), dtype=torch.float64)) for name in SHAPES
    }
    optimizer = new(list(params.values()))
    steps = []
    for step in range(STEPS):
        for name, param in params.items():
            param.grad = torch.tensor(gradient(name, step), dtype=torch.float64)
        optimizer.step()
        steps.append({name: param.tolist() for name, param in params.items()})
    return steps


def optaxs(optimizer):
    params = {name: jax.numpy.array(start(name)) for name in SHAPES}
    state = optimizer.init(params)
    steps = []
    for step in range(STEPS):
        grads = {name: jax.numpy.array(gradient(name, step)) for name in SHAPES}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        steps.append({name: param.tolist() for name, param in params.items()})
    return steps


def cautious(lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    params = {name: numpy.array(start(name)) for name in SHAPES}
    m = {name: 0 for name in SHAPES}
    v = {name: 0 for name in SHAPES}
    steps = []
    for step in range(STEPS):
        for name in SHAPES:
            g = numpy.array(gradient(name, step))
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g * g
            d = m[name] / (1 - beta1 ** (step + 1))
            d = d / (numpy.sqrt(v[name] / (1 - beta2 ** (step + 1))) + eps)
            params[name] = (1 - lr * weight_decay) * params[name] - lr * d * (m[name] * g > 0)
        steps.append({name: param.tolist() for name, param in params.items()})
    return steps


print(
    json.dumps(
        {
            "torch": torch.__version__,
            "optax": optax.__version__,
            "start": {name: start(name) for name in SHAPES},
            "gradients": [{name: gradient(name, step) for name in SHAPES} for step in range(STEPS)],
            "cases": {
                # A short second moment, of which the largest differs by more than f32 rounds.
                "amsgrad": pytorchs(
                    lambda params: torch.optim.AdamW(params, lr=0.01, betas=(0.9, 0.9), amsgrad=True)
                ),
                "nesterov adam": optaxs(optax.nadamw(0.01, weight_decay=0.01)),
                "lion": optaxs(optax.lion(0.01, weight_decay=0.1)),
                "cautious": cautious(0.01),
            },
        },
        indent=1,
    )
)
