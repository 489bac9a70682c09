"""Tests of the sanity checks of unit usage, label stores and masked accuracy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jahubert.audio import AudioSource
from jahubert.errors import DataError
from jahubert.frames import HUBERT
from jahubert.train.data.labels import LabelHeader, LabelStore, LabelWriter
from jahubert.train.data.manifest import Manifest, Utterance, write_manifest
from jahubert.train.evaluation import unit_checks
from jahubert.train.evaluation.unit_checks import (
    accuracy_problem,
    check_label_difference,
    check_units,
    label_difference,
    usage_problem,
    usage_statistics,
)
from jahubert.train.stages.pretrain import Config, check_accuracy


def test_usage_statistics_match_values_computed_by_hand():
    assert usage_statistics(np.array([2, 2, 0, 0])) == pytest.approx(
        {"used": 2, "entropy": 1, "perplexity": 2, "largest_share": 0.5}
    )
    assert usage_statistics(np.full(100, 7))["perplexity"] == pytest.approx(100)
    assert usage_statistics(np.zeros(5, int))["used"] == 0


def test_normal_usage_has_no_problem():
    rng = np.random.default_rng(0)
    for n_units in (4, 12, 100, 500):
        assert usage_problem(rng.integers(50, 150, n_units)) is None
    silence = np.full(100, 80)
    silence[3] = 1000  # this unit has about one ninth of the frames
    assert usage_problem(silence) is None


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.r_[np.full(400, 9), np.zeros(100, int)], "400 of 500 .*n_clusters"),
        (np.r_[np.full(15, 1000), np.full(85, 1)], "100 of 100 .*perplexity 16"),
        (np.r_[np.full(99, 10), 600], "unit 99 .*38%"),
        (np.array([50, 0, 0, 0, 0]), "unit 0 .*100%"),
        (np.zeros(5, int), "0 of 5"),
    ],
)
def test_poor_usage_is_reported(counts, message, caplog):
    check_units(counts, "exp/label", "warn")
    assert caplog.records[0].levelname == "WARNING" and "exp/label: " in caplog.text
    with pytest.raises(DataError, match=rf"exp/label: .*{message}.*on_bad_units=warn"):
        check_units(counts, "exp/label", "error")


def test_accuracy_is_compared_with_chance_and_published_values():
    assert accuracy_problem(0.06, 0.02, 900) is None
    assert "0.020" in (accuracy_problem(0.021, 0.020, 900) or "")
    assert accuracy_problem(0.2, 0.02, 249_999, "mfcc", 100) is None  # published values start at 250,000
    assert "0.365" in (accuracy_problem(0.2, 0.02, 399_999, "mfcc", 100) or "")
    assert "0.417" in (accuracy_problem(0.2, 0.02, 400_000, "hubert", 500) or "")
    assert accuracy_problem(0.35, 0.02, 400_000, "hubert", 500) is None
    assert accuracy_problem(0.2, 0.02, 400_000, "hubert", 100) is None


def test_pretraining_warns_only_after_the_warmup(tmp_path, caplog):
    manifest = made_manifest(tmp_path)
    labels = made_store(tmp_path / "a", manifest)
    config = Config(tmp_path, tmp_path)
    warm = round(config.train.warmup * config.train.max_steps)
    check_accuracy(config, labels, {"accuracy": 0.0}, warm)
    check_accuracy(config, labels, {"accuracy": 0.9}, warm + 1)
    check_accuracy(config, labels, {}, warm + 1)
    assert not caplog.records
    check_accuracy(config, labels, {"accuracy": 0.0}, warm + 1)
    assert "accuracy on masked frames" in caplog.text


def made_manifest(folder):
    lengths = [HUBERT.n_samples(n) for n in (40, 0, 70, 90)]
    items = [Utterance(f"u{i}", AudioSource(f"/c/{i}.wav"), 0, max(n, 100)) for i, n in enumerate(lengths)]
    write_manifest(folder / "m.arrow", items)
    return Manifest(folder / "m.arrow")


def made_store(folder, manifest, change=lambda unit_N: unit_N, **header):
    start = LabelHeader(100, "mfcc", None, "c" * 64, None, manifest.fingerprint, False)
    n_frames = HUBERT.n_frames(manifest.n_samples)
    unit_N = change(np.random.default_rng(0).integers(0, 100, n_frames.sum()))
    writer = LabelWriter(folder, replace(start, **header), n_frames)
    writer.write(0, np.split(unit_N, np.cumsum(n_frames)[:-1]))
    writer.finish()
    return LabelStore(folder)


def test_label_stores_are_compared(tmp_path, caplog, monkeypatch):
    manifest = made_manifest(tmp_path)
    one = made_store(tmp_path / "one", manifest)

    def message(name, change, **header):
        other = made_store(tmp_path / name, manifest, change, **header)
        difference = label_difference(one, other, manifest)
        return difference.message if difference else ""

    def changed(*frames):
        def change(unit_N):
            unit_N[list(frames)] += 1 - 2 * (unit_N[list(frames)] == 99)
            return unit_N

        return change

    assert message("same", lambda unit_N: unit_N) == ""
    assert message("same units of other centroids", lambda unit_N: unit_N, centroids="d" * 64) == ""
    three = message("three", changed(50, 51, 150))
    assert "1.50% of all frames (3) and in 2 of 4 utterances, first in 'u2'" in three
    assert "headers agree" in three
    assert "1 frame late" in message("late", lambda unit_N: np.roll(unit_N, 1))
    assert "2 frames early" in message("early", lambda unit_N: np.roll(unit_N, -2))
    assert "centroids 'ccc" in message("other", lambda unit_N: 99 - unit_N, centroids="d" * 64)
    stores = {name: LabelStore(tmp_path / name) for name in ("same", "three", "late")}
    check_label_difference(one, stores["same"], manifest, "error")
    assert not caplog.records
    check_label_difference(one, stores["late"], manifest, "warn")
    assert "1 frame late" in caplog.text
    with pytest.raises(DataError, match="on_bad_units=warn"):
        check_label_difference(one, stores["three"], manifest, "error")
    monkeypatch.setattr(unit_checks, "_ROUNDING", 0.05)
    check_label_difference(one, stores["three"], manifest, "error")
    assert "harmless" in caplog.text
    (tmp_path / "n").mkdir()
    write_manifest(tmp_path / "n" / "m.arrow", [Utterance("x", AudioSource("/c/x.wav"), 0, 1000)])
    with pytest.raises(DataError, match="different manifest"):
        label_difference(one, one, Manifest(tmp_path / "n" / "m.arrow"))
