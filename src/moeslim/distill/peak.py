"""How many operations a second a device can do at most, where its maker says so."""

import torch

_TERAFLOPS: tuple[tuple[str, float, float, float], ...] = (
    # Words of the device's name, then dense bf16, TF32 and fp32 as NVIDIA's data sheets have them (which print the
    # sparse figures of tensor cores, twice these). The first line whose words are all in the name counts.
    ("H200 NVL", 835, 418, 60),  # H200 data sheet
    ("H200", 989, 495, 67),
    ("H100 NVL", 835, 418, 60),  # H100 data sheet
    ("H100 PCIe", 756, 378, 51),
    ("H100", 989, 495, 67),  # SXM: "H100 80GB HBM3"
    ("GH200", 989, 495, 67),  # GH200 data sheet
    ("GB200", 2500, 1250, 80),  # GB200 NVL72 data sheet, a 72nd
    ("B200", 2250, 1125, 75),  # HGX B200 data sheet, an 8th
    ("A100", 312, 156, 19.5),  # A100 data sheet, SXM and PCIe alike
    ("L40S", 362, 183, 91.6),  # L40S data sheet
    ("L4", 121, 60, 30.3),  # L4 data sheet
    ("A40", 149.7, 74.8, 37.4),  # A40 data sheet
    ("A10", 125, 62.5, 31.2),  # A10 data sheet
)


def peak_of(name: str, *, bfloat16: bool, tf32: bool = False) -> float | None:
    """Operations per second of the device that calls itself `name`; None for one that is not listed, or a MIG slice.

    Matrix products in bf16, or in fp32 with or without TF32's tensor cores.
    """
    words = set(name.replace("-", " ").split())
    if "MIG" in words:
        return None
    for listed, *teraflops in _TERAFLOPS:
        if set(listed.replace("-", " ").split()) <= words:
            return 1e12 * teraflops[0 if bfloat16 else 1 if tf32 else 2]
    return None


def device_peak(device: str, *, precision: str) -> float | None:
    """`peak_of` the device that is trained on; None on a CPU, whose makers give no such figure."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_of(torch.cuda.get_device_name(device), bfloat16=precision == "bfloat16", tf32=tf32)
