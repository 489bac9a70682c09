"""Lookup of models in the package, in folders, in files and on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from jahubert.errors import CheckpointError, MissingExtraError

# Files in a model folder that the readers use. The .bin files are not needed if there are safetensors files.
_FILES = ("*.json", "*.safetensors", "*.arpa.gz")
_BIN_FILES = ("*.json", "pytorch_model*.bin")
_TIMEOUT = 10.0  # seconds to wait for the Hub before it is considered unreachable


def builtin_model() -> Path | None:
    """Return the folder of the model in the package, or None if the package does not contain one."""
    configs = sorted((Path(__file__).parents[1] / "assets").glob("*/config.json"))
    return configs[0].parent if configs else None


def model_name(source: str | os.PathLike[str] | None) -> str:
    """Return the name of a model for messages."""
    return "the built-in model" if source is None else os.fspath(source)


def resolve_model(source: str | os.PathLike[str] | None) -> Path:
    """Return the file or folder of a model, looking up a Hub name in the cache and on the Hub.

    Args:
        source: a file, a folder or a Hub name; None is the built-in model.

    Raises:
        CheckpointError: the file, folder or name does not exist, the model is not in the cache and the Hub
            cannot be reached, or the package does not contain a built-in model.
        MissingExtraError: a Hub name is given, but huggingface_hub is not installed.
    """
    if source is None:
        path = builtin_model()
        if path is None:
            raise CheckpointError(
                "this installation has no built-in model; give a model (on the command line: --model): a "
                "folder, a file or a Hub name"
            )
        return path
    path = _local_path(source)
    if path is not None:
        return path
    name = str(source)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub") from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_FILES)))
        if not list(folder.glob("*.safetensors")):  # .bin files are large, and only needed in this case
            folder = Path(snapshot_download(name, allow_patterns=list(_BIN_FILES)))
        return folder
    except Exception as error:  # Hub errors have no common base class
        raise _unavailable(name, error) from error


def check_exists(source: str | os.PathLike[str]) -> None:
    """Check that `resolve_model` can find a model, without reading or downloading weights.

    For a Hub name that is not in the cache, config.json is downloaded, which shows whether the name exists
    and is accessible.

    Raises:
        CheckpointError: `resolve_model` would raise this error, or the folder is not a model.
        MissingExtraError: as for `resolve_model`.
    """
    path = _local_path(source)
    if path is not None:
        if path.is_dir() and not (path / "config.json").exists():
            raise CheckpointError(f"{path}: not a model folder (config.json is missing)")
        return
    name = str(source)
    try:
        import huggingface_hub
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub") from None
    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            huggingface_hub.model_info(name, timeout=_TIMEOUT)  # a download would retry for up to a minute
            huggingface_hub.hf_hub_download(name, "config.json")
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such folder or file, and no accessible model of that name on the Hub"
        ) from error
    except Exception as error:
        raise _unavailable(name, error) from error


def _unavailable(name: str, error: Exception) -> CheckpointError:
    """Return a one-line error that states the root cause, which messages of huggingface_hub may hide."""
    reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
    return CheckpointError(
        f"{name}: no such file or folder, and not available on the Hub ({reason}); without internet access, "
        "give the folder of a downloaded model"
    )


def _local_path(source: str | os.PathLike[str]) -> Path | None:
    """Return the file or folder named `source`, or None if it can only be a name on the Hub.

    Raises:
        CheckpointError: `source` is neither an existing file or folder nor a valid Hub name.
    """
    path, name = Path(source), str(source)
    if path.is_dir():
        inner = path / "bundle"  # the output folder of a training stage contains a bundle
        return path if (path / "config.json").exists() or not (inner / "config.json").exists() else inner
    if path.is_file():
        return path
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise CheckpointError(
            f"{name}: no such model folder or file; give a folder, a file or a Hub name (owner/model)"
        )
    return None
