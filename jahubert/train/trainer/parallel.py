"""One module over all processes: whole copies of it (DDP), or a shard in each (FSDP2).

The module stays the caller's object. Sharded, its parameters are DTensors while it trains; `gather` makes
plain ones of them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from jahubert.train.experiment import distributed

_WHOLE = StateDictOptions(full_state_dict=True)


class Parallel:
    """Calls the module and decides when its gradients are summed over the processes.

    Args:
        module: already on its device. Its `blocks` are sharded one by one, so that only one of them is
            whole at a time.
        sharded: FSDP2 instead of DDP. Every process must run the same blocks in the same order.
    """

    def __init__(self, module: nn.Module, sharded: bool):
        self.module, self.call = module, module
        self.blocks: list[Any] = []  # in FSDP2's hands, the module itself last
        if distributed.world() == 1:
            return
        if not sharded:
            # Layer drop leaves blocks out of a backward pass, and frozen phases leave more.
            self.call = DistributedDataParallel(
                module, find_unused_parameters=bool(module.has_unused_parameters)
            )
            return
        from torch.distributed.fsdp import fully_shard

        for part in [*cast(Any, module.blocks), module]:
            fully_shard(part)
            self.blocks.append(part)

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Only behind the last micro-batch of a step are gradients summed over the processes."""
        if isinstance(self.call, DistributedDataParallel) and not last:
            with self.call.no_sync():
                yield
            return
        if self.blocks:
            self.blocks[-1].set_requires_gradient_sync(last)
        yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Parameters are whole inside: for validation, where processes see different numbers of batches."""
        for block in self.blocks:
            block.set_reshard_after_forward(False, recurse=False)
            block.unshard()
        yield
        for block in self.blocks:
            block.reshard()
            block.set_reshard_after_forward(block is not self.module, recurse=False)

    def gather(self) -> None:
        """Plain, whole parameters again, for whoever saves the module; all processes call it together."""
        if not self.blocks:
            return
        for name, value in full_state(self.module).items():
            owner, _, attribute = name.rpartition(".")
            own = self.module.get_submodule(owner)
            if attribute in own._parameters:
                own._parameters[attribute] = nn.Parameter(value)


def wrap_blocks(blocks: Sequence[nn.Module], recompute: bool, compiled: bool) -> None:
    """Let blocks of a module save memory or time; neither changes names nor, but for rounding, results.

    Args:
        recompute: keep only what goes into a block, and compute the block again when gradients are due.
        compiled: torch.compile each block. Lengths differ from batch to batch, so sizes are left open.
    """
    for block in blocks:
        if recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        if compiled:
            block.compile(dynamic=True)


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors, sharded or not; all processes call it together."""
    return {name: value.detach() for name, value in get_model_state_dict(module, options=_WHOLE).items()}


def load_full_state(module: nn.Module, state: dict[str, Any]) -> None:
    """The way back; the state is the same in every process."""
    set_model_state_dict(module, state, options=_WHOLE)


def full_norm(value: Tensor) -> float:
    """A norm that FSDP2 leaves in shares, as one number."""
    return float(value.full_tensor() if hasattr(value, "full_tensor") else value)
