"""End-to-end tests of errors: exit status, message without a traceback, and results that are kept."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from fixtures import FIXTURES
from fixtures.damage import fill_disk

from jahubert import run
from jahubert.cli import main as cli
from jahubert.errors import DiskFullError
from jahubert.train.data.labels import LabelStore
from jahubert.train.data.manifest import Manifest
from jahubert.train.experiment.resource_errors import report_file_errors

ROUGH = FIXTURES / "rough"


@pytest.fixture(autouse=True)
def warnings(caplog):
    """Capture warnings, regardless of the log level that an earlier test has set."""
    caplog.set_level(logging.WARNING)
    return caplog


def run_stage(capsys, exp: Path, stage: str, *overrides: str) -> tuple[int, str]:
    """Run a stage of the `rough` recipe, and return its exit status and standard error."""
    capsys.readouterr()
    status = run.main([f"recipe={ROUGH}", f"stage={stage}", f"exp={exp}", *overrides])
    return status, capsys.readouterr().err


def rejected(capsys, exp: Path, stage: str, *overrides: str) -> str:
    """Run a stage that must fail with a user error, and return the message."""
    status, printed = run_stage(capsys, exp, stage, *overrides)
    assert status == 2 and "Traceback" not in printed
    assert printed.count("jahubert: error: ") == 1
    return printed.partition("jahubert: error: ")[2].strip()


def succeed(capsys, exp: Path, stage: str, *overrides: str) -> None:
    status, printed = run_stage(capsys, exp, stage, *overrides)
    assert status == 0, printed


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Run all stages without interruption, and return the experiment folder."""
    exp = tmp_path_factory.mktemp("whole") / "exp"
    assert run.main([f"recipe={ROUGH}", "stage=all", f"exp={exp}"]) == 0
    return exp


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "exp"))


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["kmeans.n_cluster=3"], "did you mean kmeans.n_clusters?"),
        (["kmean.n_clusters=3"], "kmean: no such key; did you mean kmeans?"),
        (["kmeans.n_clusters=many"], "kmeans.n_clusters: expected int, found 'many'"),
        (["kmeans.n_clusters=1.5"], "kmeans.n_clusters: expected int, found '1.5'"),
        (["kmeans.n_clusters=" + "9" * 5_000], "kmeans.n_clusters: expected int"),
        (["kmeans.n_clusters=100,200"], "--multirun"),
        (["kmeans.n_clusters=70000", "kmeans.lloyd_frames=100000"], "kmeans.n_clusters"),
        (["decode.tune_lm_weights=[0.5]"], "decode.tune_lm_weights"),
        (["kmeans.n_clusters"], "not a setting; write key=value"),
        (["kmeans={n_clusters: 3"], "without closing }"),
        (["stage=kmean"], "stage=kmean: no such stage; did you mean kmeans?"),
        (["system=second"], "system=second: no such system; choose one of main"),
        (["iteration=7"], "iteration=7: no such iteration; choose one of 1, 2, 3, 4"),
        (["features.layer=2"], "features.layer"),
        (["iterations=two"], "iterations: expected int"),
        (["model=bse"], "model=bse: no such model; did you mean base?"),
        (["recipe=demoo"], "recipe=demoo: no such recipe; did you mean demo?"),
        (["recipe=null"], "recipe=... is missing; choose one of"),
        (["features.sample_frames=0"], "features.sample_frames is 0, but must be at least 1"),
        (["label.shard_size=0"], "label.shard_size is 0, but must be at least 1"),
        (["pretrain.temperature=0"], "pretrain.temperature is 0.0, but must be positive"),
        (["pretrain.crop.max_seconds=0.01"], "pretrain.crop.max_seconds"),
        (
            ["finetune.freeze_conv=true", "finetune.pretrained=null"],
            "finetune.pretrained",
        ),
        (["finetune.train.precision=fp64"], "must be one of auto, fp32, bf16, fp16"),
    ],
)
def test_invalid_setting_is_named_before_anything_runs(capsys, tmp_path, overrides, expected):
    assert expected in rejected(capsys, tmp_path / "exp", "all", *overrides)
    assert not (tmp_path / "exp").exists()


def test_all_mistakes_are_reported_at_once(capsys, tmp_path):
    message = rejected(capsys, tmp_path, "all", "kmeans.n_cluster=3", "decode.beam=wide", "score.samples=0")
    assert "kmeans.n_cluster:" in message and "decode.beam:" in message and "score.samples" in message
    assert message.count("the configuration has") == 1


@pytest.mark.parametrize(("yaml", "expected"), [("kmeans: { n_clusters: [4", "YAML"), ("- 1", "recipe.yaml")])
def test_broken_recipe_file_is_named(capsys, tmp_path, yaml, expected):
    (tmp_path / "recipe.yaml").write_text(yaml)
    message = rejected(capsys, tmp_path / "exp", "prepare", f"recipe={tmp_path}")
    assert str(tmp_path / "recipe.yaml") in message and expected in message


def test_recipe_may_have_no_systems(capsys, tmp_path):
    succeed(capsys, tmp_path, "prepare", "systems=null")


def test_missing_earlier_stage_is_named(capsys, tmp_path):
    assert "exp/prepare" in rejected(capsys, tmp_path / "exp", "features")
    succeed(capsys, tmp_path / "exp", "prepare")
    message = rejected(capsys, tmp_path / "exp", "label")
    assert f"label.centroids: {tmp_path}/exp/iter1/kmeans" in message and "stage=kmeans" in message


def test_unwritable_experiment_folder_is_named(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file/exp" in rejected(capsys, tmp_path / "file" / "exp", "prepare")


def test_status_of_a_folder_without_stages_is_an_error(capsys, tmp_path):
    for folder in (tmp_path, tmp_path / "none", Path(__file__)):
        assert cli.main(["status", str(folder)]) == 2
        assert f"{folder}: " in capsys.readouterr().err


# --- the corpus -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["csj", "reazonspeech", "tofugu", "fairseq"])
def test_missing_data_does_not_default_to_the_working_directory(capsys, tmp_path, recipe):
    for data in ([], ["data="]):  # an unset shell variable results in the second form
        message = rejected(capsys, tmp_path / "exp", "prepare", f"recipe={recipe}", *data)
        assert message.startswith("data=") and recipe in message


@pytest.mark.parametrize("recipe", ["tofugu", str(ROUGH)])
def test_run_with_a_missing_corpus_can_be_corrected(capsys, tmp_path, recipe):
    """The message names the folder, and the failed run does not bind the experiment to this folder."""
    args = f"recipe={recipe}", "data=/no/such/folder"
    assert "/no/such/folder" in rejected(capsys, tmp_path / "exp", "prepare", *args)
    other = tmp_path / "コーパス (日本語)"  # Hydra's grammar allows neither parentheses nor kana
    if recipe == "tofugu":
        assert "needs data=FOLDER" in rejected(capsys, tmp_path / "exp", "prepare", "recipe=tofugu")
        assert "コーパス" in rejected(capsys, tmp_path / "exp", "prepare", "recipe=tofugu", f"data={other}")
    else:
        other.mkdir()
        succeed(capsys, tmp_path / "exp", "prepare", f"data={other}")
        record = json.loads((tmp_path / "exp/prepare/provenance.json").read_text())
        assert record["settings"]["data"] == str(other)


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        ("empty", "unusable audio", "is empty (0 bytes)"),
        ("silent header", "unusable audio", "contains no audio"),
        ("text", "unusable audio", "is not audio that can be read"),
        ("missing", "unusable audio", "no such audio file"),
        ("truncated", "unusable audio", "is truncated"),
        ("with NaN", "unusable audio", "777"),
        ("short", "shorter than one frame", "300 samples of "),
    ],
)
def test_broken_recording_is_rejected_with_a_reason(capsys, warnings, tmp_path, bad, reason, detail):
    succeed(capsys, tmp_path, "prepare", f"prepare.options.bad={bad}")
    assert f"{reason}: 1" in warnings.text
    assert Manifest(tmp_path / "prepare/manifest.arrow").ids() == [str(number) for number in range(12)]
    line = json.loads((tmp_path / "prepare/rejected.jsonl").read_text())
    assert line["id"] == "bad" and line["reason"] == reason
    assert detail in line["detail"] and "bad.wav" in line["detail"]


@pytest.mark.parametrize("n_samples", [16_001, 200])
def test_wrong_length_from_a_recipe_is_rejected(capsys, tmp_path, n_samples):
    succeed(capsys, tmp_path, "prepare", f"prepare.options.n_samples={n_samples}")
    line = json.loads((tmp_path / "prepare/rejected.jsonl").read_text())
    assert line["reason"] == ("shorter than one frame" if n_samples == 200 else "unusable audio")
    assert "bad.wav" in line["detail"]


@pytest.mark.parametrize("bad", ["stereo", "8 kHz"])
def test_other_audio_formats_are_converted(capsys, tmp_path, bad):
    succeed(capsys, tmp_path, "prepare", f"prepare.options.bad={bad}")
    manifest = Manifest(tmp_path / "prepare/manifest.arrow")
    assert manifest[12].id == "bad" and manifest.n_samples[12] == len(manifest.load(12)) == 16_000
    for stage in ("features", "kmeans", "label"):
        succeed(capsys, tmp_path, stage)
    assert len(LabelStore(tmp_path / "iter1/label")[12]) == 49


def test_duplicate_utterance_id_names_both_files(capsys, tmp_path):
    message = rejected(capsys, tmp_path, "prepare", "prepare.options.bad=second 3")
    assert "utterance id '3'" in message and "/3.wav" in message and "/bad.wav" in message
    assert not (tmp_path / "prepare/manifest.arrow").exists()


def test_text_without_a_reading_is_rejected(capsys, tmp_path):
    succeed(capsys, tmp_path, "prepare", "prepare.options.bad=unreadable text")
    succeed(capsys, tmp_path, "targets")
    record = json.loads((tmp_path / "targets/provenance.json").read_text())["metrics"]
    assert record["utterances"] == 12 and record["rejected"] == {"text without a reading": 1}
    assert json.loads((tmp_path / "targets/rejected.jsonl").read_text())["id"] == "bad"


def test_audio_changed_after_prepare_is_named_by_every_stage(capsys, copy):
    """Results are kept, and the same command succeeds after the recording is restored."""
    path = copy / "prepare/work/0.wav"
    original, before = path.read_bytes(), files(copy / "iter1/label")
    for stage, folder in (("label", "iter1/label"), ("pretrain", "iter1/pretrain")):
        shutil.rmtree(copy / folder)
        soundfile.write(path, [0.1] * 9_000, 16_000)
        message = rejected(capsys, copy, stage, "pretrain.crop.keep_in_memory_hours=0")
        assert "utterance '0'" in message and str(path) in message and "9000 samples" in message
        path.write_bytes(original)
        succeed(capsys, copy, stage)
        if stage == "label":
            assert {name: files(copy / folder)[name] for name in ("units.bin", "offsets.npy")} == {
                name: before[name] for name in ("units.bin", "offsets.npy")
            }


# --- finished results -------------------------------------------------------------------------------------


def test_changed_setting_in_a_finished_folder_is_rejected(capsys, copy):
    before = files(copy)
    message = rejected(capsys, copy, "kmeans", "kmeans.n_clusters=5")
    assert "kmeans.n_clusters was 4, now 5" in message and "delete the folder" in message
    assert "pretrain.train.max_steps was 2, now 3" in rejected(
        capsys, copy, "pretrain", "pretrain.train.max_steps=3"
    )
    assert files(copy) == before


@pytest.mark.parametrize("change", ["ffn=32", "heads=1", "pre_norm=true", "normalize=true", "norm_eps=1e-3"])
def test_failed_run_does_not_bind_the_folder_to_its_settings(capsys, copy, change):
    """A run fails because the model differs from that of init_from, but the folder remains usable.

    Most of these settings do not change the shape of any weight.
    """
    other = (copy / "iter1/pretrain/bundle").rename(copy / "other")
    shutil.rmtree(copy / "iter1/pretrain")
    wrong = f"pretrain.init_from={other}", f"model.{change}"
    message = rejected(capsys, copy, "pretrain", *wrong)
    assert "pretrain.init_from" in message and f"{change.partition('=')[0]} is " in message
    succeed(capsys, copy, "pretrain", f"pretrain.init_from={other}")


def test_damaged_record_is_named(capsys, copy):
    (copy / "iter1/kmeans/provenance.json").write_text('{"finger')
    message = rejected(capsys, copy, "label")
    assert "iter1/kmeans/provenance.json" in message and "rerun" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("stage", "folder", "file"),
    [
        ("prepare", "prepare", "draft"),
        ("features", "iter1/features", "tmp_sample.npy"),
        ("features", "iter1/features", "header.json"),
        ("kmeans", "iter1/kmeans", "provenance.json"),
        ("pretrain", "iter1/pretrain", "provenance.json"),
        ("targets", "targets", "symbols.npy"),
        ("decode", "systems/main/decode", "test.jsonl"),
        ("score", "systems/main/score", "provenance.json"),
    ],
)
def test_full_disk_is_reported_and_the_stage_can_be_rerun(capsys, copy, monkeypatch, stage, folder, file):
    before = files(copy / folder)
    shutil.rmtree(copy / folder)
    others = {name: content for name, content in files(copy).items() if not name.startswith(folder)}
    (copy / folder).mkdir()
    path = copy / folder / file
    if file == "tmp_sample.npy":  # the stage writes it under this name
        path.symlink_to("/dev/full")
    else:
        fill_disk(path, monkeypatch)
    status, message = run_stage(capsys, copy, stage)
    assert status == 1 and "Traceback" not in message and message.count("jahubert: error: ") == 1
    assert "the disk is full" in message and folder in message
    assert {name: content for name, content in files(copy).items() if name in others} == others
    if path.is_symlink():
        path.unlink()
    monkeypatch.undo()
    succeed(capsys, copy, stage)
    after = files(copy / folder)
    names = [[name for name in made if not name.startswith("tensorboard/")] for made in (after, before)]
    assert names[0] == names[1]
    for name in before:  # other files may contain timestamps
        if name.endswith((".arrow", ".npy", ".safetensors", "scores.json", "test.jsonl")):
            assert after[name] == before[name], name


def test_full_disk_errors_of_torch_and_safetensors_are_recognized(tmp_path):
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException

    inner = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    inner.__context__ = OSError(28, "No space left on device")
    for error in (
        CheckpointException("write", {0: (inner, [])}),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("117000 requested and 64480 written"),
    ):
        with pytest.raises(DiskFullError, match="the disk is full"), report_file_errors(tmp_path):
            raise error
    with pytest.raises(KeyError), report_file_errors(tmp_path):
        raise KeyError("something else")


def test_limit_on_file_sizes_is_not_reported_as_a_full_disk(tmp_path):
    error = OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(tmp_path / "a"))
    with pytest.raises(DiskFullError, match="ulimit") as caught, report_file_errors(tmp_path):
        raise error
    assert str(tmp_path) in str(caught.value) and caught.value.exit_status == 1


def test_full_disk_is_recognized_in_the_language_of_the_system(tmp_path, monkeypatch):
    message = "デバイスに空き領域がありません"
    monkeypatch.setattr(os, "strerror", lambda code: message if code == errno.ENOSPC else f"error {code}")
    with pytest.raises(DiskFullError), report_file_errors(tmp_path):
        raise RuntimeError(f"a.flac: {message}")


def test_ctrl_c_saves_a_checkpoint(tmp_path):
    """Training saves a checkpoint after SIGINT and exits with status 130."""
    command = [sys.executable, "-m", "jahubert.run", f"recipe={ROUGH}", "stage=all", f"exp={tmp_path}"]
    command.append("pretrain.train.max_steps=100000")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROUGH.parent.parent)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(2)
    rest = process.stderr.read()
    assert process.wait() == 130 and "Traceback" not in rest
    assert "SIGINT" in rest
    assert any((tmp_path / "iter1/pretrain/checkpoints").glob("step_*"))


OUT_OF_MEMORY = {
    "pretrain": ("torch.Tensor.backward", "train.micro_seconds", ["pretrain.train.micro_seconds=5"]),
    "label": (
        "jahubert.train.stages.label.make_feature",
        "label.batch_seconds below 80",
        ["label.batch_seconds=5"],
    ),
    "kmeans": ("jahubert.train.stages.kmeans.fit_kmeans", "set kmeans.device=cpu", []),
}


@pytest.mark.parametrize("stage", OUT_OF_MEMORY)
def test_out_of_memory_error_names_a_setting(capsys, copy, monkeypatch, stage):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB. 1.00 GiB is free. Of ...")

    function, advice, smaller = OUT_OF_MEMORY[stage]
    shutil.rmtree(copy / "iter1" / stage)
    with monkeypatch.context() as patch:
        patch.setattr(function, full)
        message = rejected(capsys, copy, stage)
    assert message.startswith(f"{stage}: CUDA out of memory. Tried 2 GiB. 1.00 GiB is free. ")
    assert advice in message
    succeed(capsys, copy, stage, *smaller)  # the folder remains usable


def test_error_in_one_process_is_printed_once(whole, tmp_path):
    """Only the failing process prints the error. The other one exits without a traceback."""
    exp = Path(shutil.copytree(whole, tmp_path / "exp"))
    shutil.rmtree(exp / "iter1/label")
    (exp / "prepare/work/4.wav").unlink()  # this recording is in the second of four shards
    command = [sys.executable, "-m", "jahubert.run", f"recipe={ROUGH}", "stage=label", f"exp={exp}"]
    command += ["processes=2", "label.shard_size=3"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROUGH.parent.parent, timeout=300)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.count("jahubert: error: utterance '4': no such audio file") == 1


# --- transcription ------------------------------------------------------------------------------------------


def test_transcribe_reports_files_that_are_not_audio(capsys, whole, tmp_path):
    model = str(whole / "systems/main/finetune")
    good, text = str(whole / "prepare/work/0.wav"), tmp_path / "notes.txt"
    text.write_text("hello")
    (tmp_path / "folder").mkdir()
    for path, expected in (
        (text, "is not audio that can be read"),
        (tmp_path / "folder", "no audio file"),
        (tmp_path / "none.wav", "no such audio file"),
    ):
        assert cli.main(["transcribe", "--model", model, str(path), good]) == 2
        printed = capsys.readouterr()
        assert str(path) in printed.err and expected in printed.err and "Traceback" not in printed.err
        assert good in printed.out  # the other files are transcribed
    assert cli.main(["transcribe", "--model", str(tmp_path), good]) == 2
    assert "not a model folder (config.json is missing)" in capsys.readouterr().err
    assert cli.main(["transcribe", "--model", str(whole / "iter1/pretrain"), good]) == 2
    assert "has no CTC head" in capsys.readouterr().err


def test_help_is_printed_and_missing_arguments_are_an_error(capsys):
    assert run.main(["--help"]) == 0
    assert "stage=STAGE" in capsys.readouterr().out
    assert run.main([]) == 2
    assert "recipe=... is missing" in capsys.readouterr().err
    assert os.environ.get("RANK") is None
