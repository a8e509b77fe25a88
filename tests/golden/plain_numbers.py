"""The parameters that make_plain.py and make_directions.py step."""

import math

STEPS = 8
SHAPES = {"a": 5, "b": 3}


def numbers(n, salt):
    return [math.sin(1.7 * i + 0.9 * salt) for i in range(n)]


def start(name):
    """Eighths, which every dtype holds."""
    return [round(8 * x) / 8 for x in numbers(SHAPES[name], ord(name))]
