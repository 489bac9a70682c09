"""Tests that damaged stage outputs are detected before another stage reads them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from fixtures.damage import flip_bit
from fixtures.unit_stages import make_corpus, stages

from jahubert.errors import CheckpointError, DataError, UserError
from jahubert.formats.bundle import load_bundle
from jahubert.formats.model_files import INFO
from jahubert.train.data.manifest import Manifest
from jahubert.train.experiment import checksums
from jahubert.train.experiment.provenance import DONE
from jahubert.train.pipeline.runner import run_stage, verify_inputs


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """Create an experiment folder with a corpus and the finished stages features, kmeans and label."""
    exp = tmp_path_factory.mktemp("experiment")
    make_corpus(exp)
    for stage, config in stages(exp, exp).items():
        run_stage(stage, config, exp / stage)
    return exp


def flip(path: Path, rng: random.Random) -> None:
    path.write_bytes(flip_bit(path.read_bytes(), rng))


def zero(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    position = rng.randrange(len(content))
    while not content[position]:
        position = (position + 1) % len(content)
    content[position : position + 512] = bytes(len(content[position : position + 512]))
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes().rstrip(b"\n")  # a lost final newline is harmless
    path.write_bytes(content[: rng.randrange(len(content))])


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, zero, cut, remove])
@pytest.mark.parametrize(
    ("reader", "name"),
    [
        ("kmeans", "features/sample.npy"),
        ("kmeans", "features/header.json"),
        ("kmeans", f"features/{DONE}"),
        ("label", "kmeans/centroids.safetensors"),
    ],
)
def test_damaged_input_is_named(experiment, tmp_path, reader, name, damage):
    if damage is remove and name.endswith(DONE):
        pytest.skip("a missing input is reported by preflight")
    exp = tmp_path / "exp"
    shutil.copytree(experiment, exp)
    config, rng = stages(exp, exp)[reader], random.Random(0)
    verify_inputs(config)
    for trial in range(10):
        shutil.copyfile(experiment / name, exp / name)
        damage(exp / name, rng)
        if (exp / name).exists() and (exp / name).read_bytes() == (experiment / name).read_bytes():
            continue
        with pytest.raises(UserError) as caught:
            run_stage(reader, config, tmp_path / f"out-{trial}")
        assert Path(name).name in str(caught.value)
        assert not list((tmp_path / f"out-{trial}").rglob("*.json"))


def test_swapped_files_of_another_run_are_noticed(experiment, tmp_path):
    exp = tmp_path / "exp"
    shutil.copytree(experiment, exp)
    shutil.copyfile(exp / "label" / "header.json", exp / "features" / "header.json")
    with pytest.raises(DataError, match=r"header\.json"):
        verify_inputs(stages(exp, exp)["kmeans"])


def test_large_files_can_be_compared_by_size_only(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "LARGE", 10_000)
    exp = tmp_path / "exp"
    shutil.copytree(experiment, exp)
    flip(exp / "features" / "sample.npy", random.Random(0))
    config = stages(exp, exp)["kmeans"]
    verify_inputs(config, large=False)
    with pytest.raises(DataError, match=r"sample\.npy"):
        verify_inputs(config)
    flip(exp / "features" / "header.json", random.Random(0))
    with pytest.raises(DataError, match=r"header\.json"):
        verify_inputs(config, large=False)


def test_reading_a_damaged_manifest_without_a_record_never_crashes(experiment, tmp_path):
    path, original = tmp_path / "manifest.arrow", (experiment / "manifest.arrow").read_bytes()
    rows, rng, detected = [*map(str, Manifest(experiment / "manifest.arrow"))], random.Random(1), 0
    for number in range(300):
        shutil.copyfile(experiment / "manifest.arrow", path)
        (flip, zero, cut)[number % 3](path, rng)
        if path.read_bytes() == original:
            continue
        try:
            manifest = Manifest(path)
            manifest.validate()
        except DataError as error:
            assert "manifest.arrow" in str(error)
            detected += 1
        else:  # the damage is in padding or in a part of the file that is not read
            read = [*map(str, manifest)]
            assert [row.replace(str(tmp_path), str(experiment)) for row in read] == rows
    assert detected > 200


def test_record_without_its_checksum_is_rejected(experiment, tmp_path):
    """Damage to the key of the checksum must not disable the verification."""
    exp = tmp_path / "exp"
    shutil.copytree(experiment, exp)
    record = exp / "features" / DONE
    record.write_text(record.read_text().replace("record_crc32", "record_crc33"))
    with pytest.raises(DataError, match=DONE):
        verify_inputs(stages(exp, exp)["kmeans"])
    info = experiment / "model" / INFO
    (exp / "model" / INFO).write_text(info.read_text().replace('"checksum"', '"checksun"'))
    with pytest.raises(CheckpointError, match=INFO):
        load_bundle(exp / "model")
