"""Tests of the stages features, kmeans and label: equal output after kills and with several processes."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.unit_stages import PART, SHARD, N, make_corpus, stages

from jahubert.errors import ConfigError, DataError, DiskFullError, StaleError
from jahubert.formats.bundle import load_bundle, save_bundle
from jahubert.frames import MFCC
from jahubert.model.hubert import HubertModel
from jahubert.train.clustering import lloyd as lloyd_module
from jahubert.train.clustering.features import HubertLayer, Mfcc
from jahubert.train.clustering.streaming import (
    feature_header,
    load_centroids,
    save_centroids,
    stream_features,
)
from jahubert.train.data.labels import LabelStore, LabelWriter
from jahubert.train.data.manifest import Manifest, Phone
from jahubert.train.evaluation import layer_quality
from jahubert.train.evaluation.layer_quality import PhoneFrames
from jahubert.train.experiment.provenance import read_record
from jahubert.train.pipeline import runner
from jahubert.train.stages import features, label

RESULTS = ("sample.npy", "header.json", "centroids.safetensors", "units.bin", "offsets.npy")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(features, "_PART_SIZE", PART)
    monkeypatch.setattr(lloyd_module, "_COARSE_MIN", 100)
    monkeypatch.setattr(lloyd_module, "_COARSE_FRAMES", 10)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder


def run_to(exp: Path, corpus: Path, last: str) -> None:
    for name, config in stages(corpus, exp).items():
        runner.run_stage(name, config, exp / name)
        if name == last:
            return


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS if (folder / name).exists()}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    exp = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_PART_SIZE", PART)
        patch.setattr(lloyd_module, "_COARSE_MIN", 100)
        patch.setattr(lloyd_module, "_COARSE_FRAMES", 10)
        run_to(exp, corpus, "label")
    return exp


def test_sample_contains_the_drawn_frames(corpus, whole):
    manifest = Manifest(corpus / "manifest.arrow")
    config = stages(corpus, whole)["features"]
    every = [f_SD.numpy() for _, f_SD in stream_features(manifest, Mfcc(), [range(N)], 80.0)]
    sample = features.draw_sample(manifest, Mfcc(), config)
    rows = np.repeat(sample.rows, np.diff(sample.bounds))
    assert len(set(zip(rows.tolist(), sample.frames.tolist(), strict=True))) == 300
    stored = np.load(whole / "features/sample.npy")
    assert stored.dtype == np.float32 and stored.shape == (300, 39)
    assert np.array_equal(stored, [every[r][f] for r, f in zip(rows, sample.frames, strict=True)])
    everything = replace(config, sample_frames=10**6)
    taken = features.draw_sample(manifest, Mfcc(), everything)
    assert np.array_equal(taken.frames, np.concatenate([np.arange(len(frames)) for frames in every]))


def test_sample_is_uniform_over_frames(corpus):
    manifest = Manifest(corpus / "manifest.arrow")
    n_frames, seen = MFCC.n_frames(manifest.n_samples), np.zeros(N)
    for seed in range(200):
        sample = features.draw_sample(
            manifest, Mfcc(), features.Config(corpus / "manifest.arrow", sample_frames=40, seed=seed)
        )
        seen[sample.rows] += np.diff(sample.bounds)
    expected = 200 * 40 * n_frames / n_frames.sum()
    assert np.abs(seen - expected).max() < 5 * np.sqrt(expected.max())
    assert seen[5] == 0  # this utterance is shorter than a frame


def killed_before_step(work: Callable[[], None], moment: int) -> bool:
    """Run `work` in a child process that is killed before call `moment` of certain functions.

    Returns:
        Whether the child process was killed.
    """
    child = os.fork()
    if child == 0:
        left = iter(range(moment))

        def counted(real):
            def call(*args, **kwargs):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for owner, name in (
            (os, "fsync"),
            (Path, "replace"),
            (Path, "mkdir"),
            (Path, "touch"),
            (Path, "unlink"),
            (Path, "read_bytes"),
            (shutil, "rmtree"),
            (Manifest, "load"),
            (lloyd_module, "assign_pass"),
        ):
            setattr(owner, name, counted(getattr(owner, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(("stage", "at_least"), [("features", 25), ("kmeans", 10), ("label", 35)])
def test_stage_killed_at_any_moment_is_resumed(corpus, whole, tmp_path, stage, at_least):
    moment, killed = 0, True
    while killed:
        exp = tmp_path / str(moment)
        exp.mkdir()
        for before in ("features", "kmeans"):
            if before == stage:
                break
            (exp / before).symlink_to(whole / before)
        config = stages(corpus, exp)[stage]
        killed = killed_before_step(lambda c=config, e=exp: runner.run_stage(stage, c, e / stage), moment)
        runner.run_stage(stage, config, exp / stage)
        assert results(exp / stage) == results(whole / stage)
        # A process that is killed at the end does not delete .running.
        records = {"started.json", "provenance.json", ".running"}
        assert {path.name for path in (exp / stage).iterdir()} - records == set(results(whole / stage))
        moment += 1
    assert moment > at_least


def test_finished_parts_are_not_computed_again(corpus, whole, tmp_path, monkeypatch):
    loads: list[int] = []
    real = Manifest.load
    monkeypatch.setattr(Manifest, "load", lambda self, i, *rest: loads.append(i) or real(self, i, *rest))
    for stage, size in (("features", PART), ("label", SHARD)):
        exp = tmp_path / stage
        exp.mkdir()
        (exp / "kmeans").symlink_to(whole / "kmeans")
        config = stages(corpus, exp)[stage]
        with monkeypatch.context() as patch:
            calls = iter(range(N))
            sync, stop = os.fsync, 3  # the first one or two calls write records

            def full(descriptor, calls=calls, sync=sync, stop=stop):
                if next(calls) >= stop:
                    raise OSError(errno.ENOSPC, "No space left on device")
                sync(descriptor)

            patch.setattr(os, "fsync", full)
            with pytest.raises(DiskFullError, match="disk"):
                runner.run_stage(stage, config, exp / stage)
        finished = {"features": "parts/*", "label": "shards/*.bin"}[stage]
        n_finished = len(list((exp / stage).glob(finished)))
        loads.clear()
        runner.run_stage(stage, config, exp / stage)
        assert results(exp / stage) == results(whole / stage)
        assert n_finished and 0 < len(set(loads)) <= N - n_finished * size
        loads.clear()


@pytest.mark.parametrize(
    ("stage", "limit"),
    [("features", 30_000), ("label", 120)],
)
def test_full_disk_keeps_finished_parts(corpus, whole, tmp_path, stage, limit):
    """The full disk is simulated by a file size limit, which the output for the long recording exceeds."""
    (tmp_path / "kmeans").symlink_to(whole / "kmeans")
    config, load = stages(corpus, tmp_path)[stage], Manifest.load
    child = os.fork()
    if child == 0:

        def limited(self, row):  # sets the limit late, because the records before may be larger
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return load(self, row)

        Manifest.load = limited  # type: ignore[method-assign]
        try:
            runner.run_stage(stage, config, tmp_path / stage)
        except DiskFullError as error:
            os._exit(3 if str(tmp_path / stage) in str(error) else 4)
        finally:
            os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    kept = sorted(path.name for path in (tmp_path / stage).glob("*/0*"))
    assert kept == {"features": ["000000"], "label": ["000000.bin", "000001.bin"]}[stage]
    runner.run_stage(stage, config, tmp_path / stage)
    assert results(tmp_path / stage) == results(whole / stage)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 10_000)])
def test_damaged_part_of_a_sample_is_computed_again(corpus, whole, tmp_path, monkeypatch, damage):
    (config, real) = stages(corpus, tmp_path)["features"], features._write_part

    def stop_in_second_part(path, start, *rest):
        if (tmp_path / "features/parts/000000").exists():
            raise DiskFullError("stop")
        return real(path, start, *rest)

    with monkeypatch.context() as patch, pytest.raises(DiskFullError):
        patch.setattr(features, "_write_part", stop_in_second_part)
        runner.run_stage("features", config, tmp_path / "features")
    damage(tmp_path / "features/tmp_sample.npy")
    runner.run_stage("features", config, tmp_path / "features")
    assert results(tmp_path / "features") == results(whole / "features")


def test_centroids_store_their_feature_header(corpus, whole, tmp_path):
    centroids_KD, header = load_centroids(whole / "kmeans/centroids.safetensors")
    assert centroids_KD.shape == (6, 39) and header == read_record(whole / "features/header.json")
    torch.save({"centroids_KD": centroids_KD}, tmp_path / "centroids.safetensors")
    with pytest.raises(DataError, match=r"centroids\.safetensors"):
        load_centroids(tmp_path / "centroids.safetensors")


@pytest.fixture(scope="module")
def layer_centroids(corpus, tmp_path_factory) -> Path:
    """Fit centroids to layer 1 of the model."""
    exp = tmp_path_factory.mktemp("layer")
    config = stages(corpus, exp)["features"]
    config = replace(config, kind="hubert", model=corpus / "model", layer=1, sample_frames=100)
    runner.run_stage("features", config, exp / "features")
    runner.run_stage("kmeans", stages(corpus, exp)["kmeans"], exp / "kmeans")
    return exp


def test_mismatched_centroids_are_rejected(corpus, layer_centroids, tmp_path):
    config = replace(stages(corpus, layer_centroids)["label"], model=corpus / "model", layer=1)
    with pytest.raises(DataError, match=r"layer 1.*features.layer is 2"):
        label.run(replace(config, layer=2), tmp_path / "a")
    torch.manual_seed(1)
    save_bundle(tmp_path / "other", model=HubertModel(HubertModel.from_pretrained(corpus / "model").config))
    with pytest.raises(DataError, match=r"label.model=\S+other yields: model is '"):
        label.run(replace(config, model=tmp_path / "other"), tmp_path / "b")
    centroids_KD, header = load_centroids(layer_centroids / "kmeans/centroids.safetensors")
    (tmp_path / "k").mkdir()
    save_centroids(tmp_path / "k/centroids.safetensors", centroids_KD, header | {"normalize": True})
    with pytest.raises(DataError, match="normalize is False, expected True"):
        label.run(replace(config, centroids=tmp_path / "k"), tmp_path / "c")


@pytest.fixture(scope="module")
def bf16_centroids(corpus, tmp_path_factory) -> Path:
    """Fit centroids to layer 1 of the model, computed in bfloat16."""
    exp = tmp_path_factory.mktemp("bf16")
    config = stages(corpus, exp)["features"]
    config = replace(
        config, kind="hubert", model=corpus / "model", layer=1, sample_frames=100, precision="bf16"
    )
    runner.run_stage("features", config, exp / "features")
    runner.run_stage("kmeans", stages(corpus, exp)["kmeans"], exp / "kmeans")
    with pytest.raises(StaleError, match=r"features\.precision was (')?bf16"):
        runner.run_stage("features", replace(config, precision="fp32"), exp / "features")
    return exp


def test_units_in_bfloat16_nearly_equal_those_in_float32(corpus, layer_centroids, bf16_centroids, tmp_path):
    """The same centroids are used with features in both precisions."""
    _, header = load_centroids(bf16_centroids / "kmeans/centroids.safetensors")
    assert header["precision"] == "bf16" and header["layer"] == 1
    centroids_KD, plain = load_centroids(layer_centroids / "kmeans/centroids.safetensors")
    assert plain == {key: value for key, value in header.items() if key != "precision"}
    stores = []
    for precision, description in (("fp32", plain), ("bf16", header)):
        (tmp_path / precision).mkdir()
        save_centroids(tmp_path / precision / "centroids.safetensors", centroids_KD, description)
        config = replace(
            stages(corpus, tmp_path)["label"],
            centroids=tmp_path / precision,
            model=corpus / "model",
            layer=1,
            precision=precision,
        )
        label.run(config, tmp_path / f"label-{precision}")
        stores.append(LabelStore(tmp_path / f"label-{precision}"))
    assert [store.header.precision for store in stores] == ["fp32", "bf16"]
    same = stores[0].unit_N == stores[1].unit_N
    assert len(same) > 200 and same.mean() > 0.97, same.mean()
    info = load_bundle(tmp_path / "label-bf16/bundle").info
    assert info["units"]["precision"] == "bf16"


def test_precision_of_features_and_labels_must_agree(corpus, layer_centroids, bf16_centroids, tmp_path):
    for exp, other in ((layer_centroids, "bf16"), (bf16_centroids, "fp32")):
        config = replace(stages(corpus, exp)["label"], model=corpus / "model", layer=1, precision=other)
        with pytest.raises(DataError, match=rf"features\.precision is {other}"):
            label.run(config, tmp_path / other)


def test_precision_of_other_features_is_refused(corpus, whole, tmp_path):
    for kind in ("mfcc", "custom.py:Feature"):
        with pytest.raises(ConfigError, match=r"precision is bf16.*kind is"):
            replace(stages(corpus, tmp_path)["features"], kind=kind, precision="bf16")
    # The default of the `features` stage is passed to `label` in every iteration.
    label.run(replace(stages(corpus, whole)["label"], precision="fp32"), tmp_path / "label")
    assert LabelStore(tmp_path / "label").header.precision == "fp32"


def test_centroids_cannot_choose_code_to_import(corpus, whole, tmp_path):
    """A custom feature is imported only if the configuration names it."""
    custom = tmp_path / "custom.py"
    custom.write_text(
        "from pathlib import Path\n"
        "from jahubert.train.clustering.features import Mfcc\n"
        f"Path({str(tmp_path)!r}, 'ran').touch()\n"
        "class Feature(Mfcc): pass\n"
    )
    centroids_KD, header = load_centroids(whole / "kmeans/centroids.safetensors")
    name = f"{custom}:Feature"
    save_centroids(tmp_path / "centroids.safetensors", centroids_KD, header | {"feature": name})
    config = replace(stages(corpus, tmp_path)["label"], centroids=tmp_path)
    for feature in (None, "mfcc", "other:Feature"):
        with pytest.raises(DataError, match=r"features\.kind"):
            label.run(replace(config, feature=feature), tmp_path / "label")
    assert not (tmp_path / "ran").exists()
    label.run(replace(config, feature=name), tmp_path / "label")
    assert (tmp_path / "ran").exists()


def test_centroids_of_a_custom_feature_that_was_edited_are_rejected(corpus, whole, tmp_path):
    custom = tmp_path / "edited.py"
    custom.write_text("from jahubert.train.clustering.features import Mfcc\nclass Feature(Mfcc): pass\n")
    name = f"{custom}:Feature"
    header = feature_header(Mfcc(), name, None)
    centroids_KD, plain = load_centroids(whole / "kmeans/centroids.safetensors")
    assert {key: header[key] for key in plain} == plain | {"feature": name}
    save_centroids(tmp_path / "centroids.safetensors", centroids_KD, header)
    config = replace(stages(corpus, tmp_path)["label"], centroids=tmp_path, feature=name)
    label.run(config, tmp_path / "label")
    custom.write_text(custom.read_text() + "# edited\n")
    with pytest.raises(DataError, match="code is"):
        label.run(config, tmp_path / "other")


@pytest.mark.parametrize(
    "change",
    [
        {"feature": None},
        {"layer": 1.5},
        {"normalize": "no"},
        {"dim": "39"},
        {"more": 1},
        {"precision": "fp8"},
    ],
)
def test_malformed_centroid_headers_are_rejected(whole, tmp_path, change):
    centroids_KD, header = load_centroids(whole / "kmeans/centroids.safetensors")
    save_centroids(tmp_path / "a.safetensors", centroids_KD, header | change)
    with pytest.raises(DataError, match=r"a\.safetensors"):
        load_centroids(tmp_path / "a.safetensors")
    save_centroids(tmp_path / "a.safetensors", centroids_KD[:0], header)
    with pytest.raises(DataError, match=r"a\.safetensors"):
        load_centroids(tmp_path / "a.safetensors")


def test_units_are_copied_to_the_dtype_of_the_store_at_once(corpus, whole, tmp_path, monkeypatch):
    """Otherwise, a shard would consist of 64-bit integers, from a GPU in page-locked memory."""
    shards, write = [], LabelWriter.write

    def recorded(self, shard, units):
        shards.append(units)
        write(self, shard, units)

    monkeypatch.setattr(LabelWriter, "write", recorded)
    label.run(stages(corpus, whole)["label"], tmp_path / "label")
    assert len(shards) == -(-N // SHARD)
    assert all(unit_S.dtype == np.uint8 and unit_S.flags.owndata for units in shards for unit_S in units)


def test_label_store_is_compared_with_another(corpus, whole, tmp_path, caplog):
    config = stages(corpus, whole)["label"]
    label.run(replace(config, compare_with=whole / "label", on_bad_units="warn"), tmp_path / "same")
    assert "differ" not in caplog.text
    centroids_KD, header = load_centroids(whole / "kmeans/centroids.safetensors")
    (tmp_path / "kmeans").mkdir()
    save_centroids(tmp_path / "kmeans/centroids.safetensors", centroids_KD.flip(0), header)
    other = replace(config, centroids=tmp_path / "kmeans", compare_with=whole / "label")
    label.run(replace(other, on_bad_units="warn"), tmp_path / "warned")
    assert "differ in" in caplog.text and "centroids '" in caplog.text
    with pytest.raises(DataError, match=r"differ in .*on_bad_units=warn"):
        label.run(replace(other, on_bad_units="error"), tmp_path / "stopped")


def test_feature_with_wrong_frame_count_is_rejected(corpus):
    class Short(Mfcc):
        name = "short"

        def __call__(self, wavs):
            return [frames[: len(frames) - (len(frames) == 248)] for frames in super().__call__(wavs)]

    manifest = Manifest(corpus / "manifest.arrow")
    with pytest.raises(DataError, match=r"'u8'.*short.*247"):
        list(stream_features(manifest, Short(), [range(N)], 80.0))


def test_layer_quality_distinguishes_phones_from_noise(corpus, monkeypatch):
    """Features that encode the phone have a PNMI of 1, and random features have a low PNMI."""
    manifest = Manifest(corpus / "manifest.arrow")
    times = {
        row: tuple(
            Phone("aiueo"[i % 5], 1600 * i, 1600 * (i + 1)) for i in range(manifest[row].n_samples // 1600)
        )
        for row in (2, 5, 7, 8, 11)
    }
    frames = PhoneFrames(manifest, times, n_frames=10_000)
    n_known = sum(len(known) for known in frames.frames_of_row.values())
    assert len(frames) == n_known > 120 and frames.phones == list("aeiou")
    assert len(PhoneFrames(manifest, times, n_frames=50)) == 50
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(frames.phone_N), 5).float()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(frames), 5, generator=generator)
    # There are fewer units than requested, because there are few frames.
    assert frames.quality(one_hot, n_clusters=100)["n_units"] == len(frames) // 50
    monkeypatch.setattr(layer_quality, "_FRAMES_PER_CLUSTER", 10)
    got = frames.quality(one_hot + 0.01 * noise, n_clusters=10)
    assert got == pytest.approx({"n_units": 10, "phone_purity": 1, "pnmi": 1, "cluster_purity": 0.5}, abs=0.2)
    assert got["phone_purity"] == pytest.approx(1) and got["pnmi"] == pytest.approx(1)
    assert frames.quality(noise, n_clusters=10)["pnmi"] < 0.3
    model = HubertModel.from_pretrained(corpus / "model")
    layers = frames.layers(model, torch.device("cpu"))
    expected = torch.cat(
        [HubertLayer(model, 2)([manifest.load(row)])[0][at] for row, at in frames.frames_of_row.items()]
    )
    torch.testing.assert_close(layers[1], expected, atol=1e-5, rtol=1e-5)
    assert frames.mfcc().shape == (len(frames), 39)


WORKERS = """
import sys
from dataclasses import replace
from pathlib import Path
from jahubert import run
from jahubert.train.experiment import distributed
from jahubert.train.clustering import lloyd as lloyd_module
from jahubert.train.stages import features
from fixtures.unit_stages import PART, stages
features._PART_SIZE, lloyd_module._COARSE_MIN, lloyd_module._COARSE_FRAMES = PART, 100, 10
corpus, exp = Path(sys.argv[1]), Path(sys.argv[2])
with distributed.process_group():
    for kind in ("mfcc", "hubert"):
        for name, config in stages(corpus, exp / kind).items():
            if kind == "hubert" and name == "features":
                config = replace(config, kind=kind, layer=2, model=corpus / "model", sample_frames=200)
            if kind == "hubert" and name == "label":
                config = replace(config, layer=2, model=corpus / "model")
            runner.run_stage(name, config, exp / kind / name)
"""


@pytest.mark.slow
def test_output_does_not_depend_on_the_number_of_processes(corpus, whole, tmp_path):
    from jahubert.train.experiment.distributed import launch

    made = {}
    for world in (1, 2, 8):
        exp = tmp_path / str(world)
        command = [sys.executable, "-c", WORKERS, str(corpus), str(exp)]
        assert launch(command, world) == 0
        made[world] = {
            f"{kind}/{stage}": results(exp / kind / stage)
            for kind in ("mfcc", "hubert")
            for stage in ("features", "kmeans", "label")
        }
    assert made[1] == made[2] == made[8]
    assert made[1]["mfcc/label"] == results(whole / "label")
    assert len(LabelStore(tmp_path / "8/hubert/label")) == N


@pytest.mark.slow
def test_error_in_all_processes_is_reported_once(corpus, whole, tmp_path):
    command = [
        sys.executable, "-m", "jahubert.run", "recipe=demo", "stage=kmeans", f"exp={tmp_path}", "processes=2",
        f"kmeans.features={whole}/features", "kmeans.n_clusters=1000", "device=cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("jahubert: error:") == 1 and "1000 clusters" in done.stderr
