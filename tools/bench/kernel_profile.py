"""Device time of a training step by kernel and by group of kernels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType

# Kernels of torch.compile, whose names list the operators they consist of: elementwise operations and
# reductions, but not matrix products (`triton_tem`, for template).
FUSED = re.compile(r"^triton_(?!tem_)")
# The first pattern that occurs in the name of another kernel determines its group.
GROUPS = {
    "attention": re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE),
    "products": re.compile(
        r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|conv|addmm|\bmm\b|bmm|matmul|triton_tem_", re.IGNORECASE
    ),
}
BETWEEN = "between products"  # all other kernels, which are bound by memory
STEPS = 3  # number of profiled steps


def profile_steps(step: Callable[[], Any], on_gpu: bool) -> dict[str, float]:
    """Return the mean time per step of each kernel in ms, or of each operator on a CPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(STEPS):
            step()
    return {name: ms / STEPS for name, ms in kernel_times(profile.key_averages(), on_gpu).items()}


def kernel_times(events: Iterable[Any], on_gpu: bool) -> dict[str, float]:
    """Sum the time of profiler events in ms by name, for the kernels of a GPU or the operators of a CPU.

    Ranges that a program marks, such as `Optimizer.step`, also appear on a GPU. They contain kernels, and are
    therefore excluded.
    """
    times: dict[str, float] = {}
    for event in events:
        # Compare by value: the profiler's device types equal the members of the enum, but are other objects.
        is_range = getattr(event, "is_user_annotation", False)  # missing in old versions of torch
        if is_range or event.device_type != (DeviceType.CUDA if on_gpu else DeviceType.CPU):
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[event.key] = times.get(event.key, 0.0) + microseconds / 1e3
    return times


def by_group(times: dict[str, float]) -> dict[str, float]:
    """Return the total time of each group of kernels."""
    groups = dict.fromkeys(("products", "attention", BETWEEN), 0.0)
    for name, milliseconds in times.items():
        groups[group_of(name)] += milliseconds
    return groups


def group_of(name: str) -> str:
    """Return the group of a kernel of a GPU, or of an operator on a CPU."""
    if FUSED.search(name):
        return BETWEEN
    return next((group for group, pattern in GROUPS.items() if pattern.search(name)), BETWEEN)
