"""Peak arithmetic of accelerators, for model FLOPs utilization (MFU).

MFU is the share of the peak that goes into the FLOPs of the model, without those of recomputation
(Chowdhery et al. 2022, appendix B, https://arxiv.org/abs/2204.02311).
"""

from __future__ import annotations

import jax

# FLOP/s of one device in bfloat16, dense (no structured sparsity), by a part of its `device_kind`;
# the first match counts. Makers' figures:
#   GPUs: NVIDIA's data sheets of H200, H100 and A100 (half of the figures with sparsity)
#   TPU: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, page of each version
PEAK = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p calls itself so
    "TPU v4": 275e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s of `device` in bfloat16; None where nobody has published one."""
    for part, flops in PEAK.items():
        if part in device.device_kind:
            return flops
    return None
