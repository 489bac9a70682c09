"""On another device than the CPU: nothing is left behind on the CPU, and the numbers are the CPU's.

The device is one that the CPU plays (`elsewhere`), or a GPU where JAHUBERT_TEST_CUDA names one.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.sounds import syllables
from torch import Tensor, nn
from torch.nn import functional as F

import jahubert
from jahubert.frames import HUBERT
from jahubert.inference.ctc import beam_search, forced_align, greedy
from jahubert.model.heads import HubertForCtc
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.train.clustering import lloyd as lloyd_module
from jahubert.train.clustering.features import HubertLayer, Mfcc
from jahubert.train.clustering.kmeans import assign, fit_kmeans
from jahubert.train.clustering.lloyd import KmeansOptions
from jahubert.train.data.batches import CtcBatch, PretrainBatch, pad
from jahubert.train.data.masking import seeded_rng, span_mask
from jahubert.train.data.sampler import MicroBatch, Sampler
from jahubert.train.stages.finetune import FineTuner
from jahubert.train.stages.pretrain import Pretrainer
from jahubert.train.trainer.optim import TrainConfig
from jahubert.train.trainer.trainer import train

UNITS = 7
STILL = dict.fromkeys(("dropout", "attention_dropout", "input_dropout", "layer_drop"), 0.0)
SMALL = {"conv_dims": (32,) * 7, "width": 64, "layers": 2, "heads": 4, "ffn": 96, "pos_conv_groups": 4}
MODELS = {"base": HubertConfig.base(**SMALL, **STILL), "large": HubertConfig.large(**SMALL, **STILL)}


@pytest.fixture
def device(monkeypatch) -> Iterator[torch.device]:
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield torch.device("cuda", 0)
        return
    fake_device = pytest.importorskip(
        "fixtures.fake_device", reason="this torch has no devices written in Python", exc_type=ImportError
    )
    # Views that are made in inference mode need a tensor of torch's own.
    monkeypatch.setattr(torch, "inference_mode", lambda on=True: torch.no_grad() if on else nullcontext())
    with fake_device.FakeDeviceMode():
        yield fake_device.DEVICE


def wavs() -> list[Tensor]:
    return [syllables(seconds, seed) for seed, seconds in enumerate((1.6, 0.7, 1.1))]


def close(there: Tensor, here: Tensor) -> None:
    torch.testing.assert_close(there.detach().cpu(), here.detach(), rtol=1e-4, atol=1e-5)


def gradients(module: nn.Module, batch: PretrainBatch | CtcBatch) -> tuple[Tensor, dict[str, Tensor]]:
    loss = module(batch, 0)
    loss.total.backward()
    given = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return loss.total, given


def same_step(module: nn.Module, batch: PretrainBatch | CtcBatch, device: torch.device) -> None:
    there = copy.deepcopy(module).to(device)
    loss, want = gradients(module, batch)
    loss_there, got = gradients(there, batch.to(device))
    close(loss_there, loss)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert gradient.device.type == device.type
        scale = float(want[name].abs().max())
        torch.testing.assert_close(gradient.cpu(), want[name], rtol=0, atol=1e-3 * scale + 1e-6, msg=name)


def pretrain_batch(seed: int = 0) -> PretrainBatch:
    masks, units = [], []
    for i, wav_T in enumerate(wavs()):
        rng, n_frames = seeded_rng(seed, i), HUBERT.n_frames(len(wav_T))
        masks.append(torch.from_numpy(span_mask(n_frames, 0.5, 5, rng, 1)))
        units.append(torch.from_numpy(rng.integers(UNITS, size=int(masks[-1].sum()))))
    return PretrainBatch(pad(wavs()), torch.tensor([len(w) for w in wavs()]), pad(masks), torch.cat(units))


@pytest.mark.parametrize("name", MODELS)
def test_pretraining_step_runs_without_synchronization(name, device):
    torch.manual_seed(0)
    module = Pretrainer(MODELS[name], UNITS, unit_dim=8, temperature=0.1, penalty=10.0, seed=3)
    same_step(module.train(), pretrain_batch(), device)


def fine_tuner() -> FineTuner:
    torch.manual_seed(0)
    return FineTuner(HubertForCtc(MODELS["base"], 12), freeze_conv=True, head_only_steps=0, seed=3).train()


def ctc_batch(masked: bool) -> CtcBatch:
    frames = [HUBERT.n_frames(len(wav_T)) for wav_T in wavs()]
    mask_BS = pad([torch.arange(n) % 7 < 2 for n in frames]) if masked else None
    channels_BD = torch.arange(64).expand(3, -1) % 9 == 0 if masked else None
    target_L, n_target_B = torch.tensor([3, 4, 5, 1, 2, 2, 9]), torch.tensor([3, 2, 2])
    lengths = torch.tensor([len(wav_T) for wav_T in wavs()])
    return CtcBatch(pad(wavs()), lengths, mask_BS, channels_BD, target_L, n_target_B)


@pytest.mark.parametrize("masked", [False, True])
def test_fine_tuning_step_runs_without_synchronization(masked, device):
    same_step(fine_tuner(), ctc_batch(masked), device)


def test_fine_tuning_step_synchronizes_in_ctc_loss_only(device, monkeypatch):
    """Lengths are computed on the host before; on CUDA every form of `F.ctc_loss` copies them and waits."""
    module, batch = fine_tuner().to(device), ctc_batch(masked=False)
    here, there = fine_tuner()(batch, 0), batch.to(device)
    if device.type == "cuda":
        ctc_loss = F.ctc_loss

        def unchecked(*args, **kwargs):
            torch.cuda.set_sync_debug_mode("default")
            try:
                return ctc_loss(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        monkeypatch.setattr(F, "ctc_loss", unchecked)
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = module(there, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        from fixtures.fake_device import SYNCS

        SYNCS.clear()
        loss = module(there, 0)
        assert SYNCS == []
    assert {name: float(value) for name, value in loss.sums.items()} == {
        name: float(value) for name, value in here.sums.items()
    }


class Speech:
    """The same micro-batch with other masks each time."""

    def __init__(self) -> None:
        lengths = np.array([len(wav_T) for wav_T in wavs()])
        self.sampler = Sampler(np.arange(3), lengths, micro_seconds=8.0, micro_batches_per_step=1, seed=1)

    def name(self, row: int) -> str:
        return f"row-{row}"

    def load(self, micro: MicroBatch) -> PretrainBatch:
        return pretrain_batch(micro.epoch)


def learn(out: Path, device: torch.device | str) -> dict[str, Tensor]:
    """Weights after a short training; continues what lies in `out`."""
    torch.manual_seed(0)
    module = Pretrainer(MODELS["base"], UNITS, unit_dim=8, temperature=0.1, penalty=10.0, seed=3)
    every = {"save_every": 3, "valid_every": 3, "log_every": 1}
    size = {"max_steps": 6, "batch_seconds": 8.0, "micro_seconds": 8.0}
    config = TrainConfig(**size, **every, precision="fp32", device=str(device))
    out.mkdir(exist_ok=True)
    train(module, Speech(), config, out, validate=lambda: {"loss": -float(module.updates)}, best="loss")
    return {name: value.cpu() for name, value in module.state_dict().items()}


def test_a_training_that_is_validated_stopped_and_continued(device, tmp_path):
    here, there = learn(tmp_path / "here", "cpu"), learn(tmp_path / "there", device)
    for name, value in there.items():
        close(value, here[name])
    shutil.rmtree(tmp_path / "there" / "checkpoints" / "step_0000006")  # as if killed before
    for name, value in learn(tmp_path / "there", device).items():
        close(value, here[name])


@pytest.mark.parametrize("name", MODELS)
def test_features_of_every_kind(name, device):
    torch.manual_seed(0)
    model = HubertModel(MODELS[name]).eval()
    pair = [
        jahubert.FeatureExtractor(copy.deepcopy(model), layer=2, device=where) for where in ("cpu", device)
    ]
    for want, got in zip(*(extractor(wavs(), sample_rate=16_000) for extractor in pair), strict=True):
        close(got, want)
    for want, got in zip(*(extractor.many(wavs(), sample_rate=16_000) for extractor in pair), strict=True):
        close(got, want)
    for kind in (Mfcc, lambda where: HubertLayer(copy.deepcopy(model), 2, where)):
        for want, got in zip(kind("cpu")(wavs()), kind(str(device))(wavs()), strict=True):
            assert got.device.type == device.type
            torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "sklearn"])
def test_clusters_and_labels(backend, device):
    rng = np.random.default_rng(0)
    frames_ND = torch.from_numpy(rng.standard_normal((3000, 6)) + 8 * rng.integers(3, size=(3000, 1))).float()
    here, there = (
        fit_kmeans(frames_ND, KmeansOptions(3, backend=backend, device=where)) for where in ("cpu", device)
    )
    close(there.centroids_KD, here.centroids_KD)
    labels_N = assign(frames_ND.to(device), there.centroids_KD.to(device))
    assert torch.equal(labels_N.cpu(), assign(frames_ND, here.centroids_KD))


class Read:
    """Frames that count how many rows were asked for."""

    ndim = 2

    def __init__(self, frames_ND: np.ndarray):
        self.frames_ND, self.shape, self.rows = frames_ND, frames_ND.shape, 0

    def __len__(self) -> int:
        return len(self.frames_ND)

    def __getitem__(self, index) -> np.ndarray:
        self.rows += len(self.frames_ND[index])
        return self.frames_ND[index]


@pytest.mark.parametrize(("stretches", "rows"), [(12, 3000), (4, 3000 + 3 * 1976), (0, 4 * 3000)])
def test_frames_that_fit_onto_the_device_are_read_once(device, monkeypatch, stretches, rows):
    """Four passes over 12 stretches of 256 frames, of which so many fit."""
    monkeypatch.setattr(lloyd_module, "_block_rows", lambda shape, where: 256)
    monkeypatch.setattr(lloyd_module, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(lloyd_module, "_cache_bytes", lambda where: 4 * 6 * 256 * stretches)
    frames_ND = np.random.default_rng(0).standard_normal((3000, 6)).astype(np.float32)
    start_KD, frames = torch.from_numpy(frames_ND[:9].copy()), Read(frames_ND)
    there = lloyd_module.lloyd(frames, start_KD.to(device), 4, tol=0.0)
    here = lloyd_module.lloyd(torch.from_numpy(frames_ND), start_KD, 4, tol=0.0)
    close(there.statistics.means_KD, here.statistics.means_KD)
    assert len(there.history) == 4 and there.history == pytest.approx(here.history)
    assert frames.rows == rows


def test_answers_from_log_probabilities(device):
    torch.manual_seed(0)
    logp_BSV, n_frames_B = torch.randn(3, 40, 6).log_softmax(-1), torch.tensor([40, 31, 8])
    assert greedy(logp_BSV.to(device), n_frames_B) == greedy(logp_BSV, n_frames_B)
    here, there = beam_search(logp_BSV, n_frames_B), beam_search(logp_BSV.to(device), n_frames_B)
    assert [hyp.labels for hyps in there for hyp in hyps] == [hyp.labels for hyps in here for hyp in hyps]
    assert forced_align(logp_BSV[0].to(device), [1, 2, 3]) == forced_align(logp_BSV[0], [1, 2, 3])


def test_a_transcription(device):
    asr = [
        jahubert.Transcriber.from_pretrained(
            jahubert.inference.transcribe.builtin_model(), device=where, dtype=torch.float32
        )
        for where in ("cpu", device)
    ]
    here, there = (one.transcribe(syllables(4.0), sample_rate=16_000) for one in asr)
    assert there.text == here.text and there.phonemes == here.phonemes
