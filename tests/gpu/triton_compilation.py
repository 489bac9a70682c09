"""Tests that the Triton kernels compile for GPUs, without a GPU. Run this file in a separate process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from jahubert.model.kernels import triton_kernels


class Target:
    """Driver of a GPU for which kernels are compiled, but on which they cannot run."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.parametrize(
    ("capability", "width", "dtype"),
    [
        (80, 768, torch.bfloat16),
        (90, 768, torch.bfloat16),
        (90, 1920, torch.bfloat16),
        (90, 100, torch.float16),
    ],
)
def test_kernels_compile_with_the_arguments_of_their_launches(
    capability, width, dtype, monkeypatch, tmp_path
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver.set_active(Target(capability))
    run, compiled = JITFunction.run, []

    def compile_only(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    x_ND, weight_D, seed = torch.zeros(3, width, dtype=dtype), torch.zeros(width), torch.zeros(1).long()
    for dropout, grad_ND in ((None, 0.0), x_ND), ((seed, 0.1), None):
        sum_ND, normed_ND, moments_2N = triton_kernels.residual_norm(
            x_ND, x_ND, weight_D, weight_D, 1e-5, *dropout
        )
        triton_kernels.residual_norm_backward(normed_ND, grad_ND, sum_ND, weight_D, moments_2N, *dropout)
    triton_kernels.gelu_backward(x_ND, x_ND)
    triton_kernels.column_sum(x_ND)
    assert {name for name, _ in compiled} == {
        "_residual_norm", "_residual_norm_backward", "_gelu_backward", "_column_sum"
    }  # fmt: skip
    assert all(len(kernel.asm["cubin"]) > 0 for _, kernel in compiled)
