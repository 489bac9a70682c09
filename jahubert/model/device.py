"""Selection of the compute device."""

from __future__ import annotations

import torch

from jahubert.errors import ConfigError


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return the requested device, or for None and "auto" the first of cuda, mps and cpu that is available.

    Raises:
        ConfigError: the device is unknown or unavailable.
    """
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device={device}: unknown device; use auto, cpu, cuda, cuda:N or mps") from None
    if picked.type == "meta":  # its tensors have no values
        raise ConfigError(f"device={device} cannot compute; use auto, cpu, cuda, cuda:N or mps")
    if picked.type == "cuda":
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (picked.index or 0) >= n_gpus:
            found = "1 GPU" if n_gpus == 1 else f"{n_gpus} GPUs"
            raise ConfigError(f"device={device} is not available: torch sees {found}; use auto or cpu")
        return picked
    if picked.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError(f"device={device} is not available: torch sees no Apple GPU; use auto or cpu")
        return picked
    try:
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={device} is not available ({reason}); use auto or cpu") from error
    return picked
