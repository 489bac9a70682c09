"""End-to-end tests of the recipes csj and reazonspeech on synthetic corpora."""

import json

import torch
from fixtures.csj_tree import planned, write_talk
from fixtures.reazonspeech_tree import Release

from jahubert import run
from jahubert.formats.bundle import save_bundle
from jahubert.frames import HUBERT
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.train.data.labels import LabelStore
from jahubert.train.data.manifest import Manifest
from jahubert.train.experiment.provenance import read_record

SIZES = {"conv_dims": [8] * 7, "width": 16, "layers": 2, "heads": 2, "ffn": 16, "pos_conv_kernel": 8}
MODEL = [f"model.{name}={value}" for name, value in {**SIZES, "pos_conv_groups": 2}.items()]
QUICK = [
    "max_steps=2",
    "batch_seconds=20",
    "valid_every=1",
    "log_every=1",
    "precision=fp32",
]
SMALL = ["device=cpu", "workers=0", "decode.beam=2", "score.samples=10"]
TALKS = ("A01M0110", "A02M0012", "S00F0019", "A03F0109", "S02F0122", "A01F0055", "S00M0075")


def test_csj_run_ends_with_the_published_table(tmp_path, capsys):
    for name in TALKS:
        write_talk(tmp_path / "CSJ", "usb", planned(name, n_utterances=4), ("sdb",))
    model = HubertModel(HubertConfig(**SIZES | {"conv_dims": (8,) * 7}, pos_conv_groups=2))
    save_bundle(tmp_path / "pretrained", model=model)
    capsys.readouterr()
    command = ["recipe=csj", "stage=all", f"data={tmp_path / 'CSJ'}", f"pretrained={tmp_path / 'pretrained'}"]
    quick = [f"finetune.train.{setting}" for setting in QUICK] + ["finetune.head_only_steps=1"]
    exp = tmp_path / "exp"
    assert run.main([*command, "subset=core", f"exp={exp}", *SMALL, *quick]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    table = (exp / "report/table.txt").read_text()
    assert table in output and "published: rinna/japanese-hubert-base, core (32 h)" in table
    assert [line.split()[-3:] for line in table.splitlines() if "core (32 h)" in line] == [
        ["9.30", "7.07", "6.87"],
        ["13.12", "10.33", "10.66"],
    ]
    folder = exp / "systems/main"
    scores = json.loads((folder / "score/scores.json").read_text())
    wer = [f"{100 * scores[f'eval{i}']['wer']['rate']:.2f}" for i in (1, 2, 3)]
    label = f"here: exp, {tmp_path.name}/pretrained, core, beam 2 "
    rows = [line.split()[-3:] for line in output.splitlines() if label in line]
    assert rows == [wer, wer]  # stage=score and the report each print the row
    assert list(scores["eval1"]["talks"]) == ["A01M0110"] == list(scores["eval1"]["speakers"])
    assert "A01M0110_" in (folder / "score/eval1.txt").read_text()
    settings = read_record(folder / "finetune/provenance.json")["settings"]
    assert settings["mask.channel_prob"] == 0.5 and settings["head_only_steps"] == 1
    # A finished stage prints its table again.
    assert run.main(["recipe=csj", "stage=score", f"data={tmp_path / 'CSJ'}", f"exp={exp}", *SMALL]) == 0
    assert [line.split()[-3:] for line in capsys.readouterr().out.splitlines() if label in line] == [wer]


def test_phone_times_of_the_csj_core_evaluate_units(tmp_path, capsys):
    for name in TALKS:
        write_talk(tmp_path / "CSJ", "usb", planned(name, n_utterances=4), ("sdb", "xml"))
    command = ["recipe=csj", f"data={tmp_path / 'CSJ'}", f"exp={tmp_path / 'exp'}", "device=cpu"]
    small = ["features.sample_frames=400", "kmeans.n_clusters=5", "kmeans.n_init=1"]
    for stage in ("prepare", "features", "kmeans", "label", "report"):
        assert run.main([*command, *small, f"stage={stage}"]) == 0, capsys.readouterr().err
    assert "phone times: corpus" in capsys.readouterr().out
    units = json.loads((tmp_path / "exp/report/metrics.json").read_text())["units"]["iter1"]
    manifest = Manifest(tmp_path / "exp/prepare/manifest.arrow")
    timed = sum(HUBERT.n_frames(manifest[i].n_samples) for i in range(len(manifest)) if manifest[i].alignment)
    assert units["n_units"] == 5 and 0 < units["frames"] <= timed


def test_reazonspeech_run_with_both_iterations_and_fine_tuning(tmp_path, capsys, caplog):
    torch.manual_seed(0)
    data = Release(tmp_path / "corpus", shards=3, rows=8).write()
    command = ["recipe=reazonspeech", "stage=all", f"data={data}", "subset=tiny", f"exp={tmp_path / 'exp'}"]
    options = ["prepare.options.dev=4", "prepare.options.test=4", "features.sample_frames=400"]
    quick = [f"{stage}.train.{setting}" for stage in ("pretrain", "finetune") for setting in QUICK]
    small = ["kmeans.n_clusters=5", "kmeans.n_init=1", "features.layer=2", "finetune.freeze_conv=false"]
    small += ["finetune.head_only_steps=0", "pretrain.unit_dim=8", "pretrain.crop.min_seconds=0"]
    assert run.main([*command, *options, *MODEL, *SMALL, *small, *quick]) == 0, capsys.readouterr().err
    assert "Recognition on test" in capsys.readouterr().out
    # Most of the generated recordings are too short for their captions, and the run reports this.
    scored = json.loads((tmp_path / "exp/systems/main/score/scores.json").read_text())
    for split, score in scored.items():
        missing = 4 - score["utterances"]
        message = f"{split}: utterances that are not decoded because they have no target: {missing} of 4"
        assert (message in caplog.text) == (missing > 0)
    assert min(score["utterances"] for score in scored.values()) < 4
    for iteration in (1, 2, 3):
        assert LabelStore(tmp_path / f"exp/iter{iteration}/label").header.n_units == 5
