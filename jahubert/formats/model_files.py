"""Files of local models: their names, and which of them the readers use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from jahubert.errors import CheckpointError, quote
from jahubert.formats.typed_fields import read_json, typed, typed_item

# Hugging Face folders, including bundles
SAFE, BIN = "model.safetensors", "pytorch_model.bin"
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
VOCABULARY, ADDED_TOKENS, TOKENIZER = "vocab.json", "added_tokens.json", "tokenizer_config.json"
# bundles only
INFO, CENTROIDS, HEADS = "jahubert.json", "centroids.safetensors", "pretraining_heads.safetensors"
LANGUAGE_MODEL = "language_model.arpa.gz"


def weight_index(folder: Path) -> Path | None:
    """Return the file that lists the weight shards of a Hugging Face folder, or None without shards."""
    if any((folder / name).exists() for name in (SAFE, BIN)):
        return None
    indices = (folder / f"{name}.index.json" for name in (SAFE, BIN))
    return next((index for index in indices if index.exists()), None)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that contain the weights of a Hugging Face folder, one file or all shards.

    Raises:
        CheckpointError: the index of the shards is damaged or refers to another folder.
    """
    if (index := weight_index(folder)) is None:
        return [folder / name for name in (SAFE, BIN) if (folder / name).exists()][:1]
    shards = typed_item(index, read_json(index), "weight_map", dict, {}).values()
    for name in shards:
        if typed(index, "a file in weight_map", name, str) != os.path.basename(name):
            raise CheckpointError(
                f"{index}: weight_map must refer to files in this folder, found {quote(name)}"
            )
    return [folder / name for name in sorted(set(shards))]


def settings_file(path: Path) -> Path:
    """Return the path of the settings of a torchaudio model, which need not exist."""
    return path.with_suffix(".json")


def model_files(path: Path) -> list[Path]:
    """Return the files that are read to open a local model, or [] if `path` is neither a file nor a model.

    Raises:
        CheckpointError: as for `weight_files`.
    """
    if path.is_file():
        return [path, settings_file(path)] if _has_settings(path) else [path]
    folder = next((each for each in (path, path / "bundle") if (each / CONFIG).exists()), None)
    if folder is None:
        return []
    names = [CONFIG, PREPROCESSOR, VOCABULARY, ADDED_TOKENS, TOKENIZER]
    if (folder / INFO).exists():
        names += [INFO, CENTROIDS, HEADS, LANGUAGE_MODEL]
    index = weight_index(folder)
    files = {folder / name for name in names} | set(weight_files(folder)) | ({index} if index else set())
    return sorted(file for file in files if file.is_file())


def _has_settings(path: Path) -> bool:
    """Return whether a file is a torchaudio model with settings in a JSON file next to it."""
    if settings_file(path) == path or not settings_file(path).is_file():
        return False
    from jahubert.formats.state_dict import file_layout, read_tensors, tensor_table

    with suppress(CheckpointError):  # the file is not a model
        return file_layout(path, map(str, tensor_table(read_tensors(path))))[1] == "torchaudio"
    return False
