"""Times PyTorch's fused optimizers, on the lists of parameters of benches/cpu_step.rs and cuda_step.rs.

    python benches/peers/torch_step.py [--device cuda] [--list NAME] [--threads N]

On a CUDA device a step is timed by events on its stream, as in cuda_step.rs. --list takes the lists whose name has NAME in it. A step is optimizer.step() alone: the gradients
are there before. The bandwidth counts the bytes that the step cannot avoid moving, for numbers of
b bytes:

    SGD (no momentum): 3 b a parameter (read w and g, write w): 12 in f32, 6 in bf16
    AdamW:             7 b a parameter (read w, g, m, v, write w, m, v): 28 in f32, 14 in bf16

In bf16 PyTorch steps the bf16 parameters themselves, without f32 master weights, and AdamW's
state is bf16 too.

On a machine that is doing something else as well, the least time is nearer to the truth than the
median.
"""

import argparse
import statistics
import sys
import time

try:
    import torch
except ImportError:
    sys.exit("This benchmark needs PyTorch: pip install torch")

WARM_UP_STEPS = 3
MIN_STEPS = 21
MIN_SECONDS = 3.0


def gpt2_small():
    """The shapes of GPT-2 small: 124 million parameters in 148 tensors."""
    d = 768
    layer = [[d], [d], [d, 3 * d], [3 * d], [d, d], [d]]
    layer += [[d], [d], [d, 4 * d], [4 * d], [4 * d, d], [d]]
    return [[50257, d], [1024, d], *(12 * layer), [d], [d]]


def layers(count, d):
    """Hidden layers of a transformer."""
    attention = [[d], [3 * d, d], [3 * d], [d, d], [d]]
    return count * [*attention, [d], [4 * d, d], [4 * d], [d, 4 * d], [d]]


LISTS = {
    "16M f32": (torch.float32, [[1 << 24]]),
    "16M bf16": (torch.bfloat16, [[1 << 24]]),
    "GPT-2 small f32": (torch.float32, gpt2_small()),
    "GPT-2 small bf16": (torch.bfloat16, gpt2_small()),
    "4 layers of 256 f32": (torch.float32, layers(4, 256)),
    "10000 x 64 f32": (torch.float32, 10_000 * [[64]]),
}

# Name, constructor, numbers moved a parameter.
OPTIMIZERS = [
    ("SGD", lambda params: torch.optim.SGD(params, lr=1e-3, fused=True), 3),
    ("AdamW", lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True), 7),
]


# It is not fused, and takes matrices alone.
MUON = ("Muon", lambda params: torch.optim.Muon([p for p in params if p.dim() == 2], lr=1e-3), 5)


def parameters(dtype, shapes, device):
    params = []
    for shape in shapes:
        param = torch.nn.Parameter((0.02 * torch.randn(shape, device=device)).to(dtype))
        param.grad = (0.01 * torch.randn(shape, device=device)).to(dtype)
        params.append(param)
    return params


def cpu_seconds(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def cuda_seconds(step):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def seconds(step, one):
    """The median and the least time of a step, which `one` takes and times."""
    for _ in range(WARM_UP_STEPS):
        step()
    times = []
    while len(times) < MIN_STEPS or sum(times) < MIN_SECONDS:
        times.append(one(step))
    return statistics.median(times), min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", default="", metavar="NAME", help="lists with NAME in their name")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, metavar="N", help="default: PyTorch's own choice")
    args = parser.parse_args()
    lists = {name: entry for name, entry in LISTS.items() if args.list in name}
    if not lists:
        parser.error(f"no list has {args.list!r} in its name; there are: {', '.join(LISTS)}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    cuda = args.device == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"threads: {torch.get_num_threads()}"
    print(f"torch {torch.__version__}, {where}\n")
    print("| list | fused optimizer | ms (median) | ms (least) | bytes a parameter | GB/s (median) |")
    print("|---|---|---|---|---|---|")
    for name, (dtype, shapes) in lists.items():
        params = parameters(dtype, shapes, args.device)
        rows = [*OPTIMIZERS, MUON] if "layers" in name else OPTIMIZERS
        for optimizer, new, numbers in rows:
            median, least = seconds(new(params).step, cuda_seconds if cuda else cpu_seconds)
            size = numbers * dtype.itemsize
            rate = size * sum(param.numel() for param in params) / median / 1e9
            times = f"{1e3 * median:.3f} | {1e3 * least:.3f}"
            print(f"| {name} | {optimizer} | {times} | {size} | {rate:.1f} |", flush=True)


if __name__ == "__main__":
    main()
