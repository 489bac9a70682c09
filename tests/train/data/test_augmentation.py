"""Tests of data augmentation: reproducible choices, predicted lengths, and individual effects."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import soundfile
import torch
from fixtures.small_training import CONFIG

from jahubert.audio import AudioSource
from jahubert.errors import ConfigError
from jahubert.frames import HUBERT
from jahubert.phonemes import PhonemeSet
from jahubert.train.data import augmentation
from jahubert.train.data.augmentation import EFFECTS, AugmentConfig, Augmenter
from jahubert.train.data.batches import CropConfig, CtcData, MaskConfig, PretrainData
from jahubert.train.data.labels import LabelHeader, LabelStore, LabelWriter
from jahubert.train.data.manifest import Manifest, Utterance, write_manifest
from jahubert.train.data.sampler import BatchSizes, MicroBatch
from jahubert.train.data.targets import TargetStore, write_targets
from jahubert.train.trainer.loader import micro_batches

ALL = AugmentConfig(**{f"{effect}_prob": 0.7 for effect in EFFECTS})
LENGTHS = 16_000 + 1_111 * np.arange(12)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Manifest, TargetStore, LabelStore]:
    folder = tmp_path_factory.mktemp("corpus")
    items = []
    for number, length in enumerate(LENGTHS.tolist()):
        wave = 0.1 * np.random.default_rng(number).standard_normal(length)
        soundfile.write(folder / f"{number}.wav", wave, 16_000)
        items.append(Utterance(str(number), AudioSource(str(folder / f"{number}.wav")), n_samples=length))
    write_manifest(folder / "manifest.arrow", items)
    manifest, phonemes = Manifest(folder / "manifest.arrow"), PhonemeSet.standard()
    write_targets(folder, [phonemes.encode([("k", "a")])] * len(items), phonemes, manifest)
    n_frames = HUBERT.n_frames(LENGTHS)
    header = LabelHeader(200, "mfcc", None, "c", None, manifest.fingerprint, False)
    writer = LabelWriter(folder / "labels", header, n_frames)
    writer.write(0, [np.arange(n) % 200 for n in n_frames])
    writer.finish()
    return manifest, TargetStore(folder), LabelStore(folder / "labels")


def ctc(corpus, augment: AugmentConfig | None = ALL, **changes) -> CtcData:
    manifest, targets, _ = corpus
    settings = {"mask": MaskConfig(channel_prob=0.5), "width": 16, "sizes": BatchSizes(8.0), "seed": 1}
    settings["keep_in_memory_hours"] = 4.0
    rows = np.arange(len(manifest))
    return CtcData(manifest, targets, rows, augment=augment, **{**settings, **changes})


def augmenter(config: AugmentConfig, waves: list[np.ndarray], seed: int = 0) -> Augmenter:
    def read(row: int, start: int, n_samples: int) -> torch.Tensor:
        return torch.from_numpy(waves[row][start : start + n_samples])

    return Augmenter(config, seed, np.arange(len(waves)), np.array([len(wave) for wave in waves]), read)


def tone(hertz: float, n_samples: int = 16_000) -> np.ndarray:
    return (0.1 * np.sin(2 * np.pi * hertz * np.arange(n_samples) / 16_000)).astype(np.float32)


def db(wave: np.ndarray, reference: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(wave**2) / np.mean(reference**2)))


def test_augmentation_is_off_by_default(corpus):
    plain, default = ctc(corpus, None), ctc(corpus, AugmentConfig())
    for micro in islice(plain.sampler.stream(0, 0), 4):
        assert torch.equal(plain.load(micro).wav_BT, default.load(micro).wav_BT)


def test_augmentation_depends_only_on_seed_epoch_and_row(corpus):
    together, alone = ctc(corpus).load(MicroBatch(3, 0, (2, 5))), ctc(corpus).load(MicroBatch(3, 9, (5,)))
    n_samples = int(alone.n_samples_B[0])
    assert torch.equal(together.wav_BT[1, :n_samples], alone.wav_BT[0])
    assert int(together.n_samples_B[1]) == n_samples
    for other in (ctc(corpus).load(MicroBatch(4, 0, (5,))), ctc(corpus, seed=2).load(MicroBatch(3, 0, (5,)))):
        assert other.wav_BT.shape != alone.wav_BT.shape or not torch.equal(other.wav_BT, alone.wav_BT)


def test_caching_waveforms_does_not_change_the_result(corpus):
    cached, uncached, plain = ctc(corpus), ctc(corpus, keep_in_memory_hours=0.0), ctc(corpus, None)
    for micro in islice(cached.sampler.stream(0, 0), 6):
        assert torch.equal(cached.load(micro).wav_BT, uncached.load(micro).wav_BT)
    for row, wave in cached.cache.waveforms.items():
        assert np.array_equal(wave, plain.load(MicroBatch(0, 0, (row,))).wav_BT[0].numpy())


def test_workers_and_resuming_do_not_change_the_batches(corpus):
    def batches(workers: int, skip: int = 0) -> list[tuple[MicroBatch, torch.Tensor]]:
        data, cpu = ctc(corpus), torch.device("cpu")
        stream = micro_batches(data, replace(CONFIG, workers=workers), cpu, epoch=0, cursor=skip)
        result = [(micro, batch.wav_BT.clone()) for micro, batch in islice(stream, 8 - skip)]
        stream.close()
        return result

    expected = batches(0)
    assert {micro.epoch for micro, _ in expected} >= {0, 1}
    for workers, skip in ((2, 0), (0, 2)):
        for (micro, wav_BT), (expected_micro, expected_BT) in zip(
            batches(workers, skip), expected[skip:], strict=True
        ):
            assert micro == expected_micro
            assert torch.equal(wav_BT, expected_BT)


def test_lengths_at_other_speeds_are_predicted(corpus):
    data = ctc(corpus)
    assert data.augmenter is not None
    seen = set()
    for epoch in range(4):
        lengths = data.augmenter.lengths(epoch, np.arange(12))
        shortest, longest = data.augmenter.length_bounds(np.arange(12))
        assert (shortest <= lengths).all() and (lengths <= longest).all()
        for micro in data.sampler.epoch(epoch):
            batch = data.load(micro)
            assert batch.n_samples_B.tolist() == lengths[list(micro.rows)].tolist()
            assert batch.wav_BT.numel() <= data.sampler.capacity
            assert batch.mask_BS.shape[1] == HUBERT.n_frames(int(batch.n_samples_B.max()))
        seen |= set((lengths / LENGTHS).round(2).tolist())
    assert len(seen) > 10 and min(seen) >= 0.9 and max(seen) <= 1.12


def test_slowed_utterance_longer_than_a_micro_batch_is_rejected(corpus):
    longest = LENGTHS.max() / 16_000
    ctc(corpus, None, sizes=BatchSizes(longest + 0.01))
    with pytest.raises(ConfigError, match="batch_seconds"):
        ctc(corpus, AugmentConfig(speed_prob=0.1, speed=(0.5, 1.0)), sizes=BatchSizes(longest + 0.01))


def test_speeds_have_the_configured_share_and_range():
    config = AugmentConfig(speed_prob=0.3, speed=(0.8, 1.25))
    effects = augmenter(config, [tone(100)] * 20_000)
    speeds = effects.speeds(0, np.arange(20_000))
    changed = speeds[speeds != 1]
    assert 0.28 < len(changed) / len(speeds) < 0.32
    assert changed.min() >= 0.8 and changed.max() <= 1.25
    assert abs(changed.mean() - 1.025) < 0.01
    assert effects.speeds(0, 777) == speeds[777]


def test_speed_leaves_the_frames_that_the_target_needs(tmp_path):
    lengths, items = [400, 420, 450, 8_000, 8_000, 8_000], []
    for number, length in enumerate(lengths):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, tone(440, length), 16_000)
        items.append(Utterance(str(number), AudioSource(str(path)), n_samples=length))
    write_manifest(tmp_path / "manifest.arrow", items)
    manifest, phonemes = Manifest(tmp_path / "manifest.arrow"), PhonemeSet.standard()
    # The last three utterances have 24 frames. Their targets need 23 (with blanks), 24 and 2 of them.
    symbols = [["a"], ["a"], ["a"], ["a"] * 12, ["a", "i"] * 12, ["a", "i"]]
    needed = np.array([1, 1, 1, 23, 24, 2])
    write_targets(tmp_path, [phonemes.encode([row]) for row in symbols], phonemes, manifest)
    rows, config = np.arange(len(lengths)), AugmentConfig(speed_prob=1.0)
    data = CtcData(
        manifest,
        TargetStore(tmp_path),
        rows,
        mask=None,
        width=1,
        sizes=BatchSizes(8.0),
        seed=1,
        keep_in_memory_hours=4.0,
        augment=config,
    )
    unlimited = augmenter(config, [tone(440)] * len(rows), seed=1)
    assert data.augmenter is not None
    shortest, longest = data.augmenter.length_bounds(rows)
    drawn = []
    for epoch in range(20):
        n_samples = data.load(MicroBatch(epoch, 0, tuple(rows.tolist()))).n_samples_B.numpy()
        assert (HUBERT.n_frames(n_samples) >= needed).all()
        assert (shortest <= n_samples).all() and (n_samples <= longest).all()
        speeds, unchanged = data.augmenter.speeds(epoch, rows), unlimited.speeds(epoch, rows)
        assert ((speeds == unchanged) | ((speeds >= 1) & (speeds < unchanged))).all()
        assert speeds[-1] == unchanged[-1]
        drawn.append(speeds)
    assert (np.min(drawn, axis=0) < 0.95).all()
    assert np.max(drawn, axis=0)[[0, 1, 3, 4]].tolist() == [1.0, 1.05, 1.07, 1.03]


def test_pretraining_keeps_the_length_and_the_units(corpus):
    manifest, _, labels = corpus
    settings = {
        "split": "train",
        "crop": CropConfig(min_seconds=0.5, max_seconds=1.5),
        "mask": MaskConfig(),
        "sizes": BatchSizes(8.0),
        "seed": 1,
    }
    plain = PretrainData(manifest, labels, **settings)
    augmented = PretrainData(manifest, labels, **settings, augment=replace(ALL, speed_prob=0.0))
    for micro in islice(plain.sampler.stream(0, 0), 4):
        one, other = plain.load(micro), augmented.load(micro)
        assert torch.equal(one.unit_N, other.unit_N) and torch.equal(one.mask_BS, other.mask_BS)
        assert torch.equal(one.n_samples_B, other.n_samples_B)
        assert not torch.equal(one.wav_BT, other.wav_BT)


def test_speed_changes_length_and_pitch():
    fast = augmentation.change_speed(tone(440), 1.1)
    assert len(fast) == round(16_000 / 1.1)
    assert np.argmax(np.abs(np.fft.rfft(fast, 16_000))) == pytest.approx(484, abs=1)


@pytest.mark.parametrize("n_samples", [1, 399, 16_001])
@pytest.mark.parametrize("speed", [0.25, 0.87, 1.13, 4.0])
def test_length_is_exact_at_any_speed(n_samples, speed):
    wave = augmentation.change_speed(tone(100, n_samples), speed)
    assert len(wave) == np.rint(n_samples / speed)


def test_reverberation_is_aligned_and_keeps_the_power():
    wave = np.zeros(16_000, np.float32)
    wave[8_000:8_400] = tone(1_000, 400)
    response = augmentation.room_response(0.5, 6.0, np.random.default_rng(0))
    assert np.sum(response[1:] ** 2) == pytest.approx(10**-0.6, rel=1e-3)
    wet = augmentation.filter_with(wave, response)
    assert np.abs(wet[:7_999]).max() < 1e-6  # there is silence before the direct sound
    assert db(wet, wave) == pytest.approx(0, abs=0.01)
    reference = np.convolve(wave, response)[:16_000]
    assert np.allclose(wet / np.linalg.norm(wet), reference / np.linalg.norm(reference), atol=1e-5)
    decay = augmentation.room_response(1.0, 0.0, np.random.default_rng(1))
    assert db(decay[12_000:13_000], decay[4_000:5_000]) == pytest.approx(-30, abs=2)  # 60 dB per second


def test_noise_and_other_speech_have_the_given_ratio():
    speech = tone(200)
    noise = augmentation.colored_noise(16_000, 1.0, np.random.default_rng(0))
    assert db(augmentation.add_at(speech, noise, 10.0) - speech, speech) == pytest.approx(-10, abs=0.01)
    assert augmentation.add_at(speech, np.zeros_like(speech), 10.0) is speech
    power = np.abs(np.fft.rfft(noise)) ** 2
    assert 10 * np.log10(power[2_000:4_000].mean() / power[200:400].mean()) == pytest.approx(-10, abs=1)
    mixed = augmenter(AugmentConfig(mix_prob=1.0, mix_snr_db=(5, 5)), [tone(200), tone(1_000)])
    result = mixed(torch.from_numpy(tone(200)), 2, 0).numpy()
    others = [mixed(torch.from_numpy(tone(200)), epoch, 0).numpy() - tone(200) for epoch in range(9)]
    ratios = [db(other, tone(200)) for other in others if np.abs(other).max() > 0]
    assert ratios and ratios == pytest.approx([-5] * len(ratios), abs=0.01)
    assert len(result) == 16_000


def test_band_limits_and_codec_change_the_spectrum():
    wave = tone(100) + tone(1_000) + tone(6_000)
    limited = augmentation.limit_band(wave, 300, 3400)
    level = np.abs(np.fft.rfft(limited)) / np.abs(np.fft.rfft(wave)).max()
    assert level[1_000] > 0.95 and level[100] < 0.02 and level[6_000] < 0.02
    for bits, ratio in ((8, -35), (5, -18)):
        coded = augmentation.quantize_mu_law(tone(333), bits)
        assert len(np.unique(coded)) <= 2**bits + 1
        assert ratio - 6 < db(coded - tone(333), tone(333)) < ratio + 6
    silence = np.zeros(100, np.float32)
    assert not augmentation.quantize_mu_law(silence, 5).any()


def test_gain_is_clipped_at_full_scale():
    loud = augmenter(AugmentConfig(gain_prob=1.0, gain_db=(30, 30)), [tone(200)])
    assert np.abs(loud(torch.from_numpy(tone(200)), 0, 0).numpy()).max() == 1.0


def test_silence_stays_finite():
    silence = [np.zeros(16_000, np.float32)] * 2
    everything = AugmentConfig(**{f"{effect}_prob": 1.0 for effect in EFFECTS})
    assert np.isfinite(augmenter(everything, silence)(torch.zeros(16_000), 0, 0).numpy()).all()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"noise_prob": 1.5}, "noise_prob"),
        ({"speed": (1.1, 0.9)}, "speed"),
        ({"speed": (1.1,)}, "speed"),
        ({"codec_bits": (0, 8)}, "codec_bits"),
        ({"band_low_hz": (100.0, 4000.0)}, "band_low_hz"),
    ],
)
def test_invalid_settings_are_rejected(changes, name):
    with pytest.raises(ConfigError, match=name):
        AugmentConfig(**changes)
