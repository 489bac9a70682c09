"""Tests of cost estimates (FLOPs, memory, hours, disk space), and of the command that prints them."""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import replace

import pytest
import torch
from fixtures import FIXTURES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from jahubert.cli.main import main
from jahubert.formats.bundle import save_bundle
from jahubert.frames import HUBERT
from jahubert.model import kernels
from jahubert.model.heads import UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.train.pipeline import runner
from jahubert.train.pipeline.jobs import configure_jobs
from jahubert.train.plan import estimate, flops, machine
from jahubert.train.plan.estimate import Corpus
from jahubert.train.plan.machine import Machine
from jahubert.train.plan.memory import kept_bytes, masked_loss, peak_bytes
from jahubert.train.trainer.micro_batch import front_end_bytes, n_parameters
from jahubert.train.trainer.parallel import wrap_blocks

TONES = FIXTURES / "tones"
PAPER = ["recipe=reazonspeech", "stage=all", "data=/c", "iterations=1"]
CORPUS = Corpus(19_000.0, 12_000_000, "a test")
ONE = Machine("test", 1, 1e13, 1e12, True, 80e9, "a test", 1000.0, 1000.0)


@pytest.mark.parametrize("layer", [None, 2])
def test_flops_equal_those_that_torch_counts(layer):
    """The kernels are disabled, because torch counts neither in-place products nor fused attention."""
    config = HubertConfig(conv_dims=(8,) * 7, width=32, layers=4, heads=2, ffn=64, pos_conv_groups=2)
    n_samples = HUBERT.n_samples(128)
    seconds = n_samples / 16_000
    model = HubertModel(config).eval()
    with FlopCounterMode(display=False) as below, kernels.disabled():
        x_BSD = model.feature_projection(model.feature_extractor(torch.zeros(1, n_samples)))
        model.encoder.pos_conv_embed(x_BSD)
    with FlopCounterMode(display=False) as blocks, sdpa_kernel(SDPBackend.MATH):
        for block in model.encoder.layers[:layer]:
            block(x_BSD, None)
    got = flops.forward_flops(config, seconds, layer)
    assert got[0] * seconds == pytest.approx(below.get_total_flops(), rel=0.01)
    assert got[1] * seconds == pytest.approx(blocks.get_total_flops(), rel=0.01)
    assert n_parameters(config) == sum(p.numel() for p in model.parameters())


def test_memory_equals_that_of_a_real_step():
    """The memory of four additional utterances is the same for fake and real tensors."""
    config = HubertConfig(conv_dims=(8,) * 7, width=32, layers=4, heads=2, ffn=64, layer_drop=0.0)
    for recompute in (False, True):
        torch.manual_seed(0)
        model, head, real = HubertModel(config), UnitHead(32, 500), []
        wrap_blocks(model.encoder.layers, recompute, False)
        weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *head.parameters())}
        for rows in (4, 8):
            stored = {}

            def store(tensor, stored=stored):
                stored[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
                masked_loss(model, head, torch.randn(rows, 32_000))
            real.append(sum(t.untyped_storage().nbytes() for at, t in stored.items() if at not in weights))
        counted = kept_bytes(config, 2.0, recompute, torch.float32, gpu=False)
        assert counted == pytest.approx((real[1] - real[0]) / 8, rel=0.02)


def test_gpu_memory_matches_the_measured_value():
    """The expected value, in MB per second of audio, was measured with fake CUDA tensors (LOG.md)."""
    counted = kept_bytes(HubertConfig.base(), 5.7, False, torch.float32, gpu=True)
    assert counted / 1e6 == pytest.approx(33.24, rel=0.01)


@pytest.mark.parametrize(
    ("config", "recompute", "megabytes"),
    [
        (HubertConfig.base(), False, 17.55),
        (HubertConfig.base(), True, 5.44),
        (HubertConfig.large(), False, 46.75),
        (HubertConfig.large(), True, 16.93),
    ],
)
def test_gpu_memory_in_bfloat16_equals_the_documented_values(config, recompute, megabytes):
    counted = kept_bytes(config, 5.7, recompute, torch.bfloat16, gpu=True)
    assert counted / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_front_end_memory_equals_peak_of_backward(monkeypatch):
    """The test uses fake tensors, a wide front end and a narrow Transformer."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # The kernels are used as on a GPU: all rows at once, and without oneDNN.
    monkeypatch.setattr("jahubert.model.kernels.conv_frontend.CACHED", 2**60)
    monkeypatch.setattr("jahubert.model.kernels.products.onednn_is_faster", lambda: False)
    for norm in ("group", "layer"):
        config = HubertConfig(
            conv_dims=(64,) * 7, conv_norm=norm, width=32, layers=1, heads=2, ffn=32, pos_conv_groups=2
        )
        peaks = []
        for rows in (8, 16):
            with FakeTensorMode(), PeakMemory() as memory:
                model, head = HubertModel(replace(config, layer_drop=0.0)), UnitHead(32, 500)
                model.encoder.training = False
                masked_loss(model, head, torch.zeros(rows, 64_000)).backward()
            peaks.append(memory.peak)
        predicted = front_end_bytes(config, torch.float32)
        assert predicted == pytest.approx((peaks[1] - peaks[0]) / 8 / 4, rel=0.1)
        assert peak_bytes(config, 4.0, False, torch.float32, gpu=True) == predicted


class PeakMemory(TorchDispatchMode):
    """Mode that records the peak number of bytes in tensor storages."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def planned(settings, corpus=CORPUS, machine=ONE):
    return {row.stage: row for row in estimate.estimate_stages(configure_jobs(settings), corpus, machine)}


def test_estimates_match_values_computed_by_hand():
    """The expected values follow from the model and corpus sizes of `PAPER` and from the machine `ONE`."""
    rows = planned(PAPER)
    assert rows["iter1/features"].disk_bytes == 5e6 * 39 * 4
    assert rows["iter1/label"].disk_bytes == 19_000 * 3600 * 50 + 8 * 12_000_000
    assert rows["iter2/label"].disk_bytes == 2 * 19_000 * 3600 * 50 + 8 * 12_000_000
    # The frame rate is 3,200 Hz after the first convolution (kernel 10), 1,600 to 200 Hz after those with
    # kernel 3, and 100 and 50 Hz after those with kernel 2. Each weight costs two operations per frame.
    convolutions = 2 * 512 * (3200 * 10 + 512 * (3 * (1600 + 800 + 400 + 200) + 2 * (100 + 50)))
    front_end = convolutions + 2 * 50 * (512 * 768 + 768 * 48 * 128)  # projection, positional convolution
    block = 2 * 50 * (4 * 768**2 + 2 * 768 * 3072 + 2 * 285 * 768)  # 5.7 s have 285 frames at 50 Hz
    step = 3 * (front_end + 12 * block)  # a backward pass costs two forward passes
    parameters = 94.4e6
    pretrain = rows["iter1/pretrain"]
    assert pretrain.hours == pytest.approx(250_000 * 2800 * step / 1e13 / 3600, rel=0.01)
    # Memory of saved activations, the GELU of the last block with its gradient, and weights (see
    # docs/scale.md). Two groups of 350 s are merged.
    activations = 17.55e6 + 2 * 50 * 3072 * 2
    assert pretrain.memory_bytes == pytest.approx((16 + 2) * parameters + 700 * activations, rel=0.01)
    assert "micro-batches of 700 s" in pretrain.note
    assert pretrain.disk_bytes == pytest.approx((2 * 12 + 4) * parameters, rel=0.01)
    finetune = rows["main/finetune"]  # 10,000 of the 25,000 updates train only the head
    assert finetune.hours == pytest.approx(step * 1600 * (15_000 + 10_000 / 3) / 1e13 / 3600, rel=0.01)
    assert rows["report"].hours is None
    # Labels are computed in float32, at one tenth of the assumed 16-bit rate.
    label = 19_000 * (front_end + 6 * block) / 1e12
    assert rows["iter2/label"].hours == pytest.approx(label, rel=0.01)
    fast = planned(PAPER, machine=replace(ONE, flops_fp32=1e15))
    # Decoding in the recipe's six workers limits the speed.
    assert fast["iter2/label"].hours == pytest.approx(19_000 / 1000 / 6)
    eight = planned(PAPER, machine=replace(ONE, n_devices=8))
    for stage in ("iter1/label", "iter1/pretrain", "main/finetune"):
        assert eight[stage].hours == pytest.approx(rows[stage].hours / 8)
    # The total includes the gradient buckets of DDP. Each process computes one group.
    assert eight["iter1/pretrain"].memory_bytes == pytest.approx(
        (16 + 2 + 4) * parameters + 350 * activations, rel=0.01
    )


def test_model_larger_than_gpu_memory_is_reported():
    settings = [*PAPER[:1], "stage=pretrain", "model=xlarge"]
    small = replace(ONE, memory_bytes=16e9, n_devices=4)
    assert "does not fit" in planned(settings, machine=small)["iter1/pretrain"].note
    light = [*settings, "pretrain.train.recompute=true", "pretrain.train.sharded=true"]
    assert "does not fit" not in planned(light, machine=small)["iter1/pretrain"].note


def test_no_hours_if_an_update_cannot_be_shared_by_the_devices(capsys):
    row = planned([*PAPER[:1], "stage=pretrain"], machine=replace(ONE, n_devices=512))["iter1/pretrain"]
    assert row.hours is None and "train.batch_seconds" in row.note
    assert main(["plan", "recipe=reazonspeech", "gpus=512", "gpu=H100"]) == 0
    assert "excludes the hours of iter1/pretrain, iter2/pretrain" in capsys.readouterr().out


def test_hours_depend_on_precision():
    """The machine `ONE` is ten times slower in float32 than in 16-bit precision."""
    pretrain = [*PAPER[:1], "stage=pretrain"]
    hours = planned(pretrain)["iter1/pretrain"].hours
    whole = planned([*pretrain, "pretrain.train.precision=fp32"])["iter1/pretrain"]
    assert whole.hours == pytest.approx(10 * hours) and "fp16" not in whole.note
    old = planned(pretrain, machine=replace(ONE, has_bfloat16=False))["iter1/pretrain"]
    assert old.hours == pytest.approx(10 * hours)
    assert "train.precision=fp16" in old.note
    cpu = replace(ONE, has_bfloat16=False, memory_bytes=None)
    assert planned(pretrain, machine=cpu)["iter1/pretrain"].hours == pytest.approx(10 * hours)
    lower = planned([*pretrain, "pretrain.train.precision=bf16"], machine=cpu)["iter1/pretrain"]
    assert lower.hours == pytest.approx(hours)
    half = [*pretrain, "pretrain.train.precision=fp16"]
    row = planned(half, machine=replace(ONE, has_bfloat16=False))["iter1/pretrain"]
    assert row.hours == pytest.approx(hours) and "float32" not in row.note


def test_hours_of_features_depend_on_their_precision():
    """An H200 extracts features at 3,482 and 5,313 audio-seconds per second (docs/performance.md)."""
    h200 = replace(machine.from_table("H200", 1, None), decode_speed=1e6)
    settings = [*PAPER[:1], "stage=features", "iteration=2"]
    fp32 = planned(settings, machine=h200)["iter2/features"].hours
    bf16 = planned([*settings, "features.precision=bf16"], machine=h200)["iter2/features"].hours
    assert fp32 / bf16 == pytest.approx(5313 / 3482)
    emulated = planned([*settings, "features.precision=bf16"], machine=replace(h200, has_bfloat16=False))[
        "iter2/features"
    ]
    assert emulated.hours == pytest.approx(fp32)


def test_fine_tuning_has_the_sizes_of_the_pretrained_model(tmp_path):
    def row(*settings):
        return planned(["recipe=csj", "stage=finetune", "subset=core", *settings])["main/finetune"]

    base, large = row("pretrained=rinna/japanese-hubert-base"), row("pretrained=facebook/hubert-large-ll60k")
    assert large.hours > 2 * base.hours and large.memory_bytes > base.memory_bytes
    assert "sizes of base" in base.note and "sizes of large" in large.note
    torch.manual_seed(0)
    small = HubertConfig(conv_dims=(8,) * 7, width=32, layers=2, heads=2, ffn=64, pos_conv_groups=2)
    save_bundle(tmp_path / "large", model=HubertModel(small))
    unfinished = tmp_path / "unfinished-base"
    unfinished.mkdir()
    assert row(f"pretrained={unfinished}").hours == base.hours
    known = row(f"pretrained={tmp_path / 'large'}")
    assert known.hours < base.hours / 10 and "assuming" not in known.note


def test_kmeans_initializations_do_not_multiply_the_passes():
    """They are computed on a small sample, and Lloyd's algorithm on at most `lloyd_frames` frames."""
    hours = [
        planned([*PAPER, *more])["iter1/kmeans"].hours
        for more in ([], ["kmeans.n_init=9"], ["kmeans.lloyd_frames=1000"])
    ]
    assert hours[0] == hours[1] > 20 * hours[2]


def hours_of(capsys, *settings):
    assert main(["plan", *settings, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    return made["machine"], {row["stage"]: row["hours"] for row in made["stages"]}


def test_single_stage_has_same_estimate_as_within_all(capsys):
    # At this utilization, computation is the bottleneck.
    settings = ["recipe=tofugu", "hours=100", "gpu=H100", "utilization=1e-6"]
    _, among = hours_of(capsys, *settings)
    for stage in ("features", "kmeans", "label"):
        _, single = hours_of(capsys, *settings, f"stage={stage}", "iteration=2")
        assert single == {f"iter2/{stage}": pytest.approx(among[f"iter2/{stage}"])}


@pytest.mark.parametrize(("preset", "n"), [("8gpu", 8), ("32gpu", 32)])
def test_machine_preset_sets_device_count(capsys, preset, n):
    machine, _ = hours_of(capsys, "recipe=reazonspeech", f"machine={preset}", "gpu=H100", "stage=label")
    assert machine["n_devices"] == n


def test_gpu_speed_comes_from_the_table(capsys):
    settings = ["recipe=reazonspeech", "stage=pretrain", "iteration=2", "gpus=8", "gpu=h100"]
    assert main(["plan", *settings, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["machine"]["flops_16bit"] == pytest.approx(0.2 * 989e12) and made["machine"]["n_devices"] == 8
    assert made["machine"]["flops_fp32"] == pytest.approx(0.3 * 67e12)
    assert "assumed, not measured" in made["machine"]["source"] and made["corpus"]["hours"] == 19_000
    # The HuBERT paper reports 9.5 hours for 100,000 updates on 32 GPUs. The estimate may differ by 34 %.
    paper = ["recipe=reazonspeech", "stage=pretrain", "machine=32gpu", "gpu=V100"]
    _, hours = hours_of(capsys, *paper, "pretrain.train.precision=fp16")
    assert hours["iter1/pretrain"] / 2.5 == pytest.approx(9.5, rel=0.34)


def test_measured_rates_are_preferred_to_estimates(capsys):
    settings = ["recipe=reazonspeech", "stage=pretrain", "iteration=2", "gpu=H200"]
    assert main(["plan", *settings]) == 0
    printed = capsys.readouterr().out
    assert "measured on one H200" in printed and "rate estimated" not in printed
    made, hours = hours_of(capsys, *settings)
    audio = 400_000 * 2800 / 3600  # hours; the rate of 5,702 is for longer utterances
    assert hours["iter2/pretrain"] == pytest.approx(audio / 5702, rel=0.04)
    assert main(["plan", *settings, "model=large"]) == 0
    assert "rate estimated" in capsys.readouterr().out
    slower, _ = hours_of(capsys, *settings, "utilization=0.1")
    assert (
        slower["flops_16bit"] == pytest.approx(0.1 * 989e12) and slower["flops_16bit"] < made["flops_16bit"]
    )


def test_rates_are_interpolated_between_measured_sizes():
    points = ((100.0, 1e13), (200.0, 1.6e13), (400.0, 2e13))
    measured = replace(ONE, measured_model=HubertConfig.base(), measured_sizes=points)
    for seconds, expected in (*points, (800.0, 2e13), (50.0, 0.5e13)):
        assert measured.training_flops(seconds) == pytest.approx(expected)
    # The time per micro-batch is linear: 100 / 1e13 and 200 / 1.6e13 are 10 and 12.5 ps per FLOP/s.
    assert measured.training_flops(150.0) == pytest.approx(150 / 11.25e-12)
    bases = [measured.rate_basis(seconds) for seconds in (50.0, 100.0, 101.0, 150.0, 400.0, 700.0)]
    assert bases == ["extrapolated", "measured", "measured", "interpolated", "measured", "extrapolated"]
    assert ONE.training_flops(50.0) == ONE.flops_16bit


def test_days_are_printed_for_several_numbers_of_gpus(capsys):
    settings = ["plan", "recipe=reazonspeech", "stage=pretrain", "gpu=H200"]
    assert main([*settings, "--json"]) == 0
    days = json.loads(capsys.readouterr().out)["days"]
    # With 1, 8 and 32 GPUs, the micro-batches have 700, 350 and 87.5 s.
    for n, speed, basis in ((1, 5702, "extrapolated"), (8, 5466, "interpolated"), (32, 2121, "measured")):
        expected = 250_000 * 2800 / speed / n / 86_400
        assert days[str(n)]["days"] == pytest.approx(expected, rel=0.04)
        assert days[str(n)]["training_rates"] == [basis]
    assert main([*settings, "model=large", "pretrain.train.precision=fp32"]) == 0
    assert capsys.readouterr().out.count("(training rates: estimated)") == 3


def test_fp32_is_never_faster_than_16_bit(monkeypatch):
    monkeypatch.setattr(machine, "_reading_speeds", lambda: (1.0, 1.0))
    for gpu in machine.GPUS:
        assumed = machine.from_table(gpu, 1, None)
        assert 0 < assumed.flops_fp32 <= assumed.flops_16bit


@pytest.mark.parametrize(("subset", "hours"), [("core", 32), ("all", 552)])
def test_hours_come_from_recipe_by_subset(capsys, tmp_path, subset, hours):
    settings = ["recipe=csj", f"subset={subset}", "pretrained=a/b", "gpu=H100", f"exp={tmp_path}", "--json"]
    assert main(["plan", *settings]) == 0
    assert json.loads(capsys.readouterr().out)["corpus"]["hours"] == hours


def test_speed_is_measured_on_this_machine(capsys, tmp_path):
    runner.run([f"recipe={TONES}", "stage=prepare", f"exp={tmp_path}"])
    assert main(["plan", f"recipe={TONES}", f"exp={tmp_path}", "gpus=2", "iterations=1"]) == 0
    printed = capsys.readouterr().out
    assert "2 x this machine's CPU: measured on this machine" in printed and "60 utterances" in printed
    assert str(tmp_path / "prepare/manifest.arrow") in printed and "gpu=NAME: V100, " in printed
    assert {"iter1/pretrain", "iter2/label", "pretrained/finetune"} <= {
        line.split()[0] for line in printed.splitlines() if line
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["gpu=H101"], "gpu=H101.*H100"),
        (["exp=/no/such", "recipe=demo", "gpu=H100"], "/no/such.*hours="),
        (["gpus=many"], "gpus=many"),
        (["gpus=2.7"], "gpus=2.7"),
        (["gpus=0.5"], "gpus=0.5"),
        (["gpu=H100", "hours=0"], "hours=0"),
        (["gpu=H100", "hours=nan"], "hours=nan"),
        (["gpu=H100", "utilization=5"], "utilization=5"),
        (["gpu=H100", "processes=0"], "processes"),
        (["gpu=H100", "subset=medium"], "subset=medium.*hours="),
        (["stage=label"], "gpu=NAME"),
        (["kmeans.n_cluster=3"], "kmeans.n_clusters"),
    ],
)
def test_invalid_settings_are_rejected(capsys, settings, message):
    assert main(["plan", "recipe=reazonspeech", *settings]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_hours_are_formatted():
    assert [estimate._hours(hours) for hours in (None, 1e-6, 0.25, 3.14159, 1234.5)] == [
        "", "0.01", "0.25", "3.1", "1,234"
    ]  # fmt: skip
