"""Makes compact.json, the values that src/compact.rs compares with.

    python tests/golden/make_compact.py > tests/golden/compact.json

Units of moments, encoded and decoded one element at a time from the formulas, in Python's integers and f64, which hold all of
it exactly: nothing here is a bit trick. Arrays are lists of the bits of f32 numbers. Made with Python 3.11.
"""

import json
import math
import random
import struct

GOLDEN = 0x9E3779B1


def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def bits(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def exponent(x):
    """floor(log2(x)), of a normal number."""
    return math.frexp(x)[1] - 1


def decode_v(code, field):
    e, f = code >> 3, code & 7
    if e == 0:
        return math.ldexp(f, field - 160)
    return math.ldexp(1 + f / 8, field - 31 + e - 127)


def encode_v(v, field, offset):
    """The offset is a fraction of a step, in 2^-20: values are cut off to whole steps after it is added."""
    if v == 0:
        return 0
    if v < math.ldexp(1, field - 30 - 127):
        # Steps of equal size; the number is rounded to 2^-20 of a step first, ties to even.
        code = (round(math.ldexp(v, 180 - field)) + offset) >> 20
    else:
        e = exponent(v)
        steps = math.ldexp(v, 23 - e) - 2**23
        code = ((e + 127 - field + 31) << 3) + ((int(steps) + offset) >> 20)
    return max(1, min(code, 255))


def unit(v, m, base):
    overflows = [math.isinf(x) for x in v]
    # A first moment has no units beside a second one that is infinite, which is the largest code.
    v, of_v = [0.0 if o else x for x, o in zip(v, overflows)], v
    m, of_m = [0.0 if o else x for x, o in zip(m, overflows)], m
    # So that the largest may be rounded up: 1.875 times a power of two is followed by the next power.
    field = max([34] + [exponent(x * 16 / 15) + 127 for x in v if x >= 2.0**-126])
    codes = [encode_v(x, field, ((base + i * GOLDEN) % 2**32) >> 12) for i, x in enumerate(v)]
    codes = [255 if o else code for code, o in zip(codes, overflows)]
    kept = [decode_v(code, field) for code in codes]
    halves = [(exponent(x) + 1) // 2 if x > 0 else 0 for x in kept]
    relative = [math.ldexp(x, -h) if k > 0 else 0.0 for x, h, k in zip(m, halves, kept)]
    most = max(abs(x) for x in relative)
    s = -126
    while s < 126 and most > math.ldexp(127, s):
        s += 1
    # Python rounds to nearest, ties to even.
    q = [round(math.ldexp(x, -s)) for x in relative]
    return {
        "base": base,
        "v": [bits(x) for x in of_v],
        "m": [bits(x) for x in of_m],
        "v_exponent": field,
        "v_codes": codes,
        "kept_v": [bits(x) for x in kept],
        "m_exponent": s,
        "m_codes": q,
        "kept_m": [bits(f32(math.ldexp(x, h + s))) for x, h in zip(q, halves)],
    }


def units():
    rng = random.Random(1)
    for size in (1, 2, 3, 17, 32, 64, 100, 255, 256):
        scale = 10 ** rng.uniform(-14, 8)
        spread = rng.uniform(0, 3)
        g = [rng.gauss(0, 1) * math.exp(rng.gauss(0, spread)) * scale for _ in range(size)]
        v = [0.0 if rng.random() < 0.05 else f32(0.3 * x * x) for x in g]
        m = [f32(x * rng.gauss(0, 1)) for x in g]
        yield unit(v, m, rng.randrange(2**32))
    # All exponents that a unit has below its largest, and all of their fractions.
    v = [math.ldexp(1 + rng.random(), -e) for e in range(34) for _ in range(7)]
    v = [f32(x) for x in v]
    yield unit(v, [f32(math.sqrt(x) * rng.gauss(0, 1)) for x in v], rng.randrange(2**32))
    # The least of all, below the normal numbers too.
    v = [f32(math.ldexp(1 + rng.random(), -e)) for e in range(90, 149)]
    yield unit(v, [0.0] * len(v), rng.randrange(2**32))
    # Some that have overflowed.
    v = [math.inf if i % 5 == 0 else f32(rng.random()) for i in range(40)]
    yield unit(v, [rng.choice([1e19, -3.0, 0.5]) for _ in v], rng.randrange(2**32))
    # Nothing.
    yield unit([0.0] * 5, [1.0] * 5, 7)


print(json.dumps(list(units())))
