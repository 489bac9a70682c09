"""Data parallelism (DDP or FSDP2), activation checkpointing and torch.compile.

With FSDP2, the parameters of the module are DTensors during training. `Parallel.unshard_parameters` converts
them back to plain parameters.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from jahubert.model import kernels
from jahubert.train.experiment import distributed

_FULL = StateDictOptions(full_state_dict=True)


class Parallel:
    """Wrapper of a module for data-parallel training, with control over when gradients are reduced.

    Args:
        module: a module that is already on its device. Its `blocks` are sharded separately, so that only one
            of them is unsharded at a time.
        sharded: whether to use FSDP2 instead of DDP. All processes must run the same blocks in the same
            order.
    """

    def __init__(self, module: nn.Module, sharded: bool):
        self.module, self.wrapped = module, module
        self.shards: list[Any] = []  # modules sharded by FSDP2, ending with the root module
        if distributed.world() == 1:
            return
        if not sharded:
            self.wrapped = DistributedDataParallel(
                module, find_unused_parameters=finds_unused_parameters(module)
            )
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # By default, FSDP2 uses the GPUs of the machine even if the module is on the CPU.
        mesh = init_device_mesh(next(module.parameters()).device.type, (distributed.world(),))
        for part in [*cast(Any, module.blocks), module]:
            fully_shard(part, mesh=mesh)
            self.shards.append(part)

    def __call__(self, *args: Any) -> Any:
        return self.wrapped(*args)

    def release(self) -> None:
        """Destroy the reducer of DDP, so that the process group does not outlive `destroy_process_group`.

        The reducer keeps the group alive. If the reducer is destroyed last, it joins gloo's thread while
        holding the GIL. That thread may need the GIL to free its last tensors, in which case the process
        deadlocks at exit.
        """
        if isinstance(self.wrapped, DistributedDataParallel):
            self.wrapped = self.module
            gc.collect()  # DDP is part of reference cycles

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Skip gradient synchronization unless this is the last micro-batch of a step.

        With DDP, the last micro-batch makes its own weight copies, because autograd runs the nodes of earlier
        forward passes last. The gradients of earlier copies would reach the weights only at the end of the
        backward pass, too late to be reduced during that pass.
        """
        if isinstance(self.wrapped, DistributedDataParallel):
            if not last:
                with self.wrapped.no_sync():
                    yield
                return
            kernels.discard_weight_copies()
        if self.shards:
            self.shards[-1].set_requires_gradient_sync(last)
        yield

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Keep parameters unsharded during validation, where processes run different numbers of batches."""
        for shard in self.shards:
            shard.set_reshard_after_forward(False, recurse=False)
            shard.unshard()
        yield
        for shard in self.shards:
            shard.reshard()
            shard.set_reshard_after_forward(shard is not self.module, recurse=False)

    def unshard_parameters(self) -> None:
        """Replace DTensors with plain parameters, to save the module. All processes must call this."""
        if not self.shards:
            return
        for name, value in full_state(self.module).items():
            prefix, _, attribute = name.rpartition(".")
            owner = self.module.get_submodule(prefix)
            if attribute in owner._parameters:
                owner._parameters[attribute] = nn.Parameter(value)


def finds_unused_parameters(module: nn.Module) -> bool:
    """Return whether DDP must search each graph for parameters without gradients.

    Without this search, DDP changes its buckets after the first step of a process. With three or more
    processes, the new buckets change the order in which gradients are added. A resumed run on a CPU would
    then not be bit-identical to an uninterrupted one.
    """
    on_cpu = next(module.parameters()).device.type == "cpu"
    return bool(module.has_unused_parameters) or (on_cpu and distributed.world() > 2)


def wrap_blocks(blocks: Sequence[nn.Module], recompute: bool, compiled: bool) -> None:
    """Apply activation checkpointing and torch.compile to blocks in place.

    Parameter names do not change. Compilation changes rounding and, on a GPU, the random numbers of dropout.

    Args:
        recompute: whether to store only the input of a block and recompute the block in the backward pass.
        compiled: whether to compile the blocks. All of them share one graph if batches have equal shapes.
            Otherwise, sizes that have changed become dynamic. With static sizes (`dynamic=False`), the shared
            graph would be the same, but torch.compile would soon give up in float32, where attention is
            computed on padded batches of various sizes.
    """
    if compiled:
        torch.compiler.reset()  # the sizes of earlier runs in this process do not count as changed
        # By default, the graph of a block that is larger than a DDP bucket is split, so that its gradients
        # are reduced during the backward pass. The split is unnecessary if each block has its own graph.
        torch._dynamo.config.optimize_ddp = False
    for block in blocks:
        if recompute:
            # torch.compile does not compile a block that contains a checkpoint.
            forward = torch.compile(block.forward) if compiled else block.forward
            block.forward = partial(checkpoint, forward, use_reentrant=False)
        elif compiled:
            block.compile()


def can_compile(device: torch.device) -> bool:
    """Return whether there is a C compiler, which Triton requires for kernels on a GPU."""
    compilers = (os.environ.get("CC"), "gcc", "clang")
    return device.type != "cuda" or any(name and shutil.which(name) for name in compilers)


def uncompiled(enabled: bool) -> AbstractContextManager[Any]:
    """Run compiled blocks without compilation in the `with` block if `enabled`.

    In validation, precision and shapes differ from those in training, which would require more graphs.
    """
    # set_stance imports torch._dynamo, which takes about a second.
    return torch.compiler.set_stance("force_eager") if enabled else nullcontext()


def compiled_graphs() -> int:
    """Return how often torch.compile has compiled a graph in this process, including recompilations."""
    return _dynamo_counter("stats", "unique_graphs")


def failed_compilations() -> int:
    """Return how often torch.compile has given up on a function in this process, which then runs uncompiled.

    torch.compile gives up if, for example, a function has been recompiled too often.
    """
    return _dynamo_counter("frames", "total") - _dynamo_counter("frames", "ok")


def _dynamo_counter(group: str, name: str) -> int:
    dynamo = sys.modules.get("torch._dynamo.utils")  # importing this module takes a second
    return int(dynamo.counters[group][name]) if dynamo else 0


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with full (unsharded) tensors. This must be called in all processes."""
    return {name: value.detach() for name, value in get_model_state_dict(module, options=_FULL).items()}


def load_full_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Load a state dict of full tensors, which must be identical in all processes."""
    set_model_state_dict(module, state, options=_FULL)


def full_norm(value: Tensor) -> float:
    """Convert a gradient norm, which is a DTensor with FSDP2, to a float."""
    return float(value.full_tensor() if hasattr(value, "full_tensor") else value)
