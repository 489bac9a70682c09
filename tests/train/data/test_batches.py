"""Tests of training batches: alignment of labels with crops, padding, and reproducible randomness."""

import logging

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from jahubert.audio import AudioSource
from jahubert.errors import DataError
from jahubert.frames import HUBERT
from jahubert.phonemes import PhonemeSet
from jahubert.train.data.batches import CropConfig, CtcData, MaskConfig, PretrainBatch, PretrainData
from jahubert.train.data.labels import LabelHeader, LabelStore, LabelWriter
from jahubert.train.data.manifest import Manifest, Utterance, write_manifest
from jahubert.train.data.sampler import BatchSizes, MicroBatch
from jahubert.train.data.targets import TargetStore, write_targets

LENGTHS = (20_000, 47_777, 33_333, 64_001, 300)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Write ramp signals, in which sample t is about t / 100000 and the unit of frame s is s % 200."""
    folder = tmp_path_factory.mktemp("corpus")
    items = []
    for number, length in enumerate(LENGTHS):
        wav = (np.arange(length) / 100_000).astype(np.float32)
        soundfile.write(folder / f"{number}.wav", wav, 16_000, subtype="FLOAT")
        items.append(
            Utterance(id=str(number), audio=AudioSource(str(folder / f"{number}.wav")), n_samples=length)
        )
    write_manifest(folder / "manifest.arrow", items)
    manifest = Manifest(folder / "manifest.arrow")
    n_frames = HUBERT.n_frames(np.asarray(manifest.n_samples))
    header = LabelHeader(200, "mfcc", None, "c", None, manifest.fingerprint, False)
    writer = LabelWriter(folder / "labels", header, n_frames)
    writer.write(0, [np.arange(n) % 200 for n in n_frames])
    writer.finish()
    return manifest, LabelStore(folder / "labels")


def pretraining(corpus, **changes):
    manifest, labels = corpus
    settings = {"split": "train", "crop": CropConfig(min_seconds=0.5, max_seconds=1.5), "mask": MaskConfig()}
    return PretrainData(manifest, labels, sizes=BatchSizes(8.0), seed=1, **{**settings, **changes})


def test_longest_crop_is_rounded_to_samples(corpus):
    """The product 4.02 * 16,000 is slightly below 64,320 samples."""
    data = pretraining(corpus, crop=CropConfig(min_seconds=0.5, max_seconds=4.02))
    assert int(4.02 * 16_000) == 64_319 and data.max_samples == 64_320


def test_units_match_the_cropped_frames(corpus):
    data = pretraining(corpus)
    for epoch in range(5):
        batch = data.load(MicroBatch(epoch, 0, (0, 1, 2, 3)))
        units = iter(batch.unit_N.tolist())
        for wav_T, n_samples, mask_S in zip(batch.wav_BT, batch.n_samples_B, batch.mask_BS, strict=True):
            first = round(wav_T[0].item() * 100_000)  # position of the crop in the utterance
            assert first % HUBERT.hop == 0
            assert n_samples <= 24_000 and not wav_T[n_samples:].any()
            for frame in mask_S.nonzero()[:, 0].tolist():
                assert next(units) == (first // HUBERT.hop + frame) % 200
        assert next(units, None) is None


def test_crop_and_mask_depend_only_on_seed_epoch_and_utterance(corpus):
    data = pretraining(corpus)
    together = data.load(MicroBatch(3, 0, (1, 3)))
    single = data.load(MicroBatch(3, 9, (3,)))
    assert torch.equal(together.wav_BT[1], single.wav_BT[0])
    assert torch.equal(together.mask_BS[1], single.mask_BS[0])
    other = data.load(MicroBatch(4, 0, (3,)))
    assert not torch.equal(other.mask_BS, single.mask_BS)


def test_short_utterances_are_skipped_and_counted(corpus, caplog):
    caplog.set_level(logging.INFO)
    assert sorted(pretraining(corpus).sampler.rows.tolist()) == [0, 1, 2, 3]
    assert "min_seconds=0.5: 1 of 5" in caplog.text
    with pytest.raises(DataError, match=r"min_seconds is 10.*split train lasts 4.00 s"):
        pretraining(corpus, crop=CropConfig(min_seconds=10.0))


def test_cached_and_uncached_waveforms_are_equal(corpus):
    crop = CropConfig(min_seconds=0.5, max_seconds=1.5, keep_in_memory_hours=0.0)
    micro = MicroBatch(0, 0, (1, 2))
    assert torch.equal(
        pretraining(corpus, crop=crop).load(micro).wav_BT, pretraining(corpus).load(micro).wav_BT
    )


def test_labels_of_another_manifest_are_rejected(corpus, tmp_path):
    manifest, _ = corpus
    n_frames = HUBERT.n_frames(np.asarray(manifest.n_samples))
    writer = LabelWriter(
        tmp_path / "other", LabelHeader(200, "mfcc", None, "c", None, "other", False), n_frames
    )
    writer.write(0, [np.zeros(n, int) for n in n_frames])
    writer.finish()
    with pytest.raises(DataError, match="manifest"):
        pretraining((manifest, LabelStore(tmp_path / "other")))


def test_inconsistent_batch_is_rejected():
    with pytest.raises(DataError, match=r"unit per masked frame \(2\), found 3"):
        PretrainBatch(torch.zeros(1, 800), torch.tensor([800]), torch.tensor([[True, True]]), torch.zeros(3))


def test_pinning_leaves_lengths_unchanged(monkeypatch):
    """Because pinning requires a GPU, a fake pin_memory changes the values instead."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = PretrainBatch(torch.zeros(1, 800), torch.tensor([800]), torch.tensor([[True]]), torch.zeros(1))
    micro, pinned = pin_memory((MicroBatch(0, 0, (3, 1)), batch))
    assert micro == MicroBatch(0, 0, (3, 1)) and type(pinned) is PretrainBatch
    assert pinned.wav_BT.min() == 1 and pinned.unit_N.item() == 1 and pinned.n_samples_B.item() == 800
    assert batch.wav_BT.max() == 0


def test_fine_tuning_batches_are_padded_and_never_cropped(corpus, tmp_path):
    manifest, _ = corpus
    phonemes = PhonemeSet.standard()
    words = [[("k", "a")], [("a:",), ("s", "u")], [("i",)], [("N", "o"), ("e",)], []]
    write_targets(tmp_path, [phonemes.encode(row) for row in words], phonemes, manifest)
    targets = TargetStore(tmp_path)
    assert targets.labeled_rows.tolist() == [0, 1, 2, 3]
    assert targets.words(3) == [("N", "o"), ("e",)]
    data = CtcData(
        manifest,
        targets,
        targets.labeled_rows,
        mask=MaskConfig(channel_prob=0.5, channel_length=4),
        width=24,
        sizes=BatchSizes(20.0),
        seed=0,
        keep_in_memory_hours=4.0,
    )
    batch = data.load(MicroBatch(0, 0, (3, 0)))
    assert batch.n_samples_B.tolist() == [64_001, 20_000] and batch.wav_BT.shape == (2, 64_001)
    assert batch.n_target_B.tolist() == [4, 2]
    assert phonemes.decode(batch.target_L[:4].tolist()) == [("N", "o"), ("e",)]
    assert batch.mask_BS.shape == (2, HUBERT.n_frames(64_001))
    assert batch.channel_mask_BD.shape == (2, 24) and batch.channel_mask_BD.any()
    assert not batch.mask_BS[1, HUBERT.n_frames(20_000) :].any()
    assert data.load(MicroBatch(0, 0, (3, 0))).to(torch.device("cpu")).seconds == pytest.approx(
        84_001 / 16_000
    )


def test_targets_for_another_manifest_are_rejected(corpus, tmp_path):
    manifest, _ = corpus
    (tmp_path / "other").mkdir()
    write_manifest(
        tmp_path / "other" / "manifest.arrow", [manifest[row] for row in reversed(range(len(manifest)))]
    )
    other = Manifest(tmp_path / "other" / "manifest.arrow")
    write_targets(tmp_path, [[2]] * len(manifest), PhonemeSet.standard(), manifest)
    targets = TargetStore(tmp_path)
    targets.check(manifest)
    with pytest.raises(DataError, match=r"different manifest.*stage=targets"):
        targets.check(other)
    write_targets(tmp_path, [[2]] * 2, PhonemeSet.standard(), manifest)
    with pytest.raises(DataError, match="different manifest"):
        TargetStore(tmp_path).check(manifest)


def test_empty_target_file_is_rejected(corpus, tmp_path):
    write_targets(tmp_path, [[1]], PhonemeSet.standard(), corpus[0])
    (tmp_path / "symbols.npy").write_bytes(b"")
    with pytest.raises(DataError, match="stage=targets"):
        TargetStore(tmp_path)
