"""Where a model lies: a folder, a file, or a name on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from jahubert.errors import CheckpointError, MissingExtraError


def resolve_model(source: str | os.PathLike) -> Path:
    """The file or folder meant; a Hub name is looked up in the cache and, unless offline, on the Hub.

    Raises:
        CheckpointError: no such file or folder, and no such name, or none that can be had now.
    """
    if (path := _here(source)) is not None:
        return path
    name = str(source)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError("huggingface_hub", "train") from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):  # only then: it is as large again
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "pytorch_model*.bin"]))
        return folder
    except Exception as error:  # the Hub's errors share no base class
        raise CheckpointError(
            f"{name}: no such file or folder, and the Hub did not give it either: {error}"
        ) from error


def check_exists(source: str | os.PathLike) -> None:
    """Say early, and without reading or fetching weights, what `resolve_model` would say later.

    Of a Hub name that is not in the cache, config.json is fetched: it tells whether the name is right and
    open to us, and the Hub within reach.

    Raises:
        CheckpointError: as `resolve_model`; or a folder that is no model.
    """
    if (path := _here(source)) is not None:
        if path.is_dir() and not (path / "config.json").exists():
            raise CheckpointError(f"{path}: not a model folder, config.json is missing")
        return
    name = str(source)
    try:
        import huggingface_hub
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError:
        raise MissingExtraError("huggingface_hub", "train") from None
    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            huggingface_hub.hf_hub_download(name, "config.json")
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such folder or file, and no model of that name on the Hub that is open to you"
        ) from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name}: not on this machine, and the Hub does not give it: {reason}"
        ) from error


def _here(source: str | os.PathLike) -> Path | None:
    """The file or folder of that name; None for what can only be a name on the Hub."""
    path, name = Path(source), str(source)
    if path.is_dir():
        inner = path / "bundle"  # in the output folder of a training stage
        return path if (path / "config.json").exists() or not (inner / "config.json").exists() else inner
    if path.is_file():
        return path
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise CheckpointError(
            f"{name}: no such model folder or file; give a bundle, a model file or a Hub name (owner/model)"
        )
    return None
