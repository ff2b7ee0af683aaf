"""What a GPU can do and hold, where its maker says so: operations a second, and memory."""

import time
from typing import NamedTuple


class Gpu(NamedTuple):
    """Dense TFLOP/s of matrix products in bf16, TF32 and fp32, and GB of memory."""

    name: str
    bf16: float
    tf32: float
    fp32: float
    memory: int


GPUS = (
    # NVIDIA's data sheets, which print the sparse figures of tensor cores, twice these. Of several memories the larger
    # A100's and the smaller GH200's.
    Gpu("H200 NVL", 835, 418, 60, 141),
    Gpu("H200", 989, 495, 67, 141),
    Gpu("H100 NVL", 835, 418, 60, 94),
    Gpu("H100 PCIe", 756, 378, 51, 80),
    Gpu("H100", 989, 495, 67, 80),  # SXM: "H100 80GB HBM3"
    Gpu("GH200", 989, 495, 67, 96),
    Gpu("GB200", 2500, 1250, 80, 186),  # a 72nd of the GB200 NVL72
    Gpu("B200", 2250, 1125, 75, 180),  # an 8th of the HGX B200
    Gpu("A100", 312, 156, 19.5, 80),  # SXM and PCIe alike
    Gpu("L40S", 362, 183, 91.6, 48),
    Gpu("L4", 121, 60, 30.3, 24),
    Gpu("A40", 149.7, 74.8, 37.4, 48),
    Gpu("A10", 125, 62.5, 31.2, 24),
)
"""A device is the first of them whose name, part by part, is in its own."""


def peak_of(name: str, *, bfloat16: bool, tf32: bool = False) -> float | None:
    """Operations per second of the device that calls itself `name`; None for one that is not listed, or a MIG slice.

    Matrix products in bf16, or in fp32 with or without TF32's tensor cores.
    """
    parts = set(name.replace("-", " ").split())
    if "MIG" in parts:
        return None
    for gpu in GPUS:
        if set(gpu.name.split()) <= parts:
            return 1e12 * (gpu.bf16 if bfloat16 else gpu.tf32 if tf32 else gpu.fp32)
    return None


def device_peak(device: str, *, precision: str) -> float | None:
    """`peak_of` the device that is trained on; None on a CPU, whose makers give no such figure."""
    import torch  # a plan is priced without it

    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_of(torch.cuda.get_device_name(device), bfloat16=precision == "bfloat16", tf32=tf32)


def measured_rate(device: str, *, precision: str) -> float:
    """Operations per second of a product of two square matrices on `device`, the best of five, as busy as it is now."""
    import torch

    size = 8192 if device.startswith("cuda") else 1024
    x = torch.ones(size, size, dtype=getattr(torch, precision), device=device)
    seconds = []
    for _ in range(6):  # the first is not counted
        start = time.perf_counter()
        float((x @ x)[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])
