"""What a newcomer does wrong, through the real doors: one sentence, exit status 2, and nothing is lost."""

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

from jahubert import run
from jahubert.cli import main as cli
from jahubert.errors import DiskFullError
from jahubert.formats import atomic
from jahubert.formats.atomic import temporary_path
from jahubert.train.data.labels import LabelStore
from jahubert.train.data.manifest import Manifest
from jahubert.train.experiment.resource_errors import report_disk_full

ROUGH = FIXTURES / "rough"


@pytest.fixture(autouse=True)
def said(caplog):
    """What is logged is seen wherever the handlers of an earlier test lead."""
    caplog.set_level(logging.WARNING)
    return caplog


def jahubert(capsys, exp: Path, stage: str, *overrides: str) -> tuple[int, str]:
    """Exit status of a stage of the rough recipe, and what it printed on stderr."""
    capsys.readouterr()
    status = run.main([f"recipe={ROUGH}", f"stage={stage}", f"exp={exp}", *overrides])
    return status, capsys.readouterr().err


def refused(capsys, exp: Path, stage: str, *overrides: str) -> str:
    """The message of a run that must fail in the way that a user can mend."""
    status, printed = jahubert(capsys, exp, stage, *overrides)
    assert status == 2 and "Traceback" not in printed
    assert printed.count("jahubert: error: ") == 1
    return printed.partition("jahubert: error: ")[2].strip()


def done(capsys, exp: Path, stage: str, *overrides: str) -> None:
    status, printed = jahubert(capsys, exp, stage, *overrides)
    assert status == 0, printed


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An unbroken run of all stages."""
    exp = tmp_path_factory.mktemp("whole") / "exp"
    assert run.main([f"recipe={ROUGH}", "stage=all", f"exp={exp}"]) == 0
    return exp


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "exp"))


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["kmeans.n_cluster=3"], "did you mean kmeans.n_clusters?"),
        (["kmean.n_clusters=3"], "kmean: no such key; did you mean kmeans?"),
        (["kmeans.n_clusters=many"], "kmeans.n_clusters: expected int, found 'many'"),
        (["kmeans.n_clusters=1.5"], "kmeans.n_clusters: expected int, found '1.5'"),
        (["kmeans.n_clusters=100,200"], "several values need --multirun"),
        (["kmeans.n_clusters"], "not a setting; write key=value"),
        (["kmeans={n_clusters: 3"], "cannot be read"),
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
def test_invalid_setting_is_named_before_anything_runs(capsys, tmp_path, overrides, says):
    assert says in refused(capsys, tmp_path / "exp", "all", *overrides)
    assert not (tmp_path / "exp").exists()


def test_all_mistakes_are_reported_at_once(capsys, tmp_path):
    message = refused(capsys, tmp_path, "all", "kmeans.n_cluster=3", "decode.beam=wide", "score.samples=0")
    assert "kmeans.n_cluster:" in message and "decode.beam:" in message and "score.samples" in message


@pytest.mark.parametrize(("yaml", "says"), [("kmeans: { n_clusters: [4", "YAML"), ("- 1", "recipe.yaml")])
def test_broken_recipe_file_is_named(capsys, tmp_path, yaml, says):
    (tmp_path / "recipe.yaml").write_text(yaml)
    message = refused(capsys, tmp_path / "exp", "prepare", f"recipe={tmp_path}")
    assert str(tmp_path / "recipe.yaml") in message and says in message


def test_recipe_may_have_no_systems_and_no_iterations(capsys, tmp_path):
    done(capsys, tmp_path, "prepare", "systems=null", "by_iteration=null")


def test_missing_earlier_stage_is_named(capsys, tmp_path):
    assert "exp/prepare" in refused(capsys, tmp_path / "exp", "features")
    done(capsys, tmp_path / "exp", "prepare")
    message = refused(capsys, tmp_path / "exp", "label")
    assert f"label.centroids: {tmp_path}/exp/iter1/kmeans" in message and "stage=kmeans" in message


def test_unwritable_experiment_folder_is_named(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file/exp" in refused(capsys, tmp_path / "file" / "exp", "prepare")


def test_status_of_a_folder_without_stages_is_an_error(capsys, tmp_path):
    for folder in (tmp_path, tmp_path / "none", Path(__file__)):
        assert cli.main(["status", str(folder)]) == 2
        assert f"{folder}: " in capsys.readouterr().err


# --- the corpus -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["csj", "reazonspeech", "tofugu", "fairseq"])
def test_missing_data_does_not_default_to_the_working_directory(capsys, tmp_path, recipe):
    for data in ([], ["data="]):  # a variable of the shell that is empty gives the second
        says = refused(capsys, tmp_path / "exp", "prepare", f"recipe={recipe}", *data)
        assert says.startswith("data=") and recipe in says


@pytest.mark.parametrize("recipe", ["tofugu", str(ROUGH)])
def test_run_with_a_missing_corpus_can_be_corrected(capsys, tmp_path, recipe):
    """The folder is named, and the next try with the right one is not held against the first."""
    args = f"recipe={recipe}", "data=/no/such/folder"
    assert "/no/such/folder" in refused(capsys, tmp_path / "exp", "prepare", *args)
    other = tmp_path / "コーパス (日本語)"  # brackets and kana are not in Hydra's grammar
    if recipe == "tofugu":
        assert "needs data=FOLDER" in refused(capsys, tmp_path / "exp", "prepare", "recipe=tofugu")
        assert "コーパス" in refused(capsys, tmp_path / "exp", "prepare", "recipe=tofugu", f"data={other}")
    else:
        other.mkdir()
        done(capsys, tmp_path / "exp", "prepare", f"data={other}")
        record = json.loads((tmp_path / "exp/prepare/provenance.json").read_text())
        assert record["settings"]["data"] == str(other)


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        ("empty", "unusable audio", "is empty (0 bytes)"),
        ("silent header", "unusable audio", "holds no audio"),
        ("text", "unusable audio", "is not audio that can be read"),
        ("missing", "unusable audio", "no such audio file"),
        ("truncated", "unusable audio", "is truncated"),
        ("with NaN", "unusable audio", "777"),
        ("short", "shorter than one frame", "300 samples of "),
    ],
)
def test_broken_recording_is_rejected_with_a_reason(capsys, said, tmp_path, bad, reason, detail):
    done(capsys, tmp_path, "prepare", f"prepare.options.bad={bad}")
    assert f"{reason}: 1" in said.text
    assert Manifest(tmp_path / "prepare/manifest.arrow").ids() == [str(number) for number in range(12)]
    line = json.loads((tmp_path / "prepare/rejected.jsonl").read_text())
    assert line["id"] == "bad" and line["reason"] == reason
    assert detail in line["detail"] and "bad.wav" in line["detail"]


@pytest.mark.parametrize("n_samples", [16_001, 200])
def test_wrong_length_from_a_recipe_is_rejected(capsys, tmp_path, n_samples):
    done(capsys, tmp_path, "prepare", f"prepare.options.n_samples={n_samples}")
    line = json.loads((tmp_path / "prepare/rejected.jsonl").read_text())
    assert line["reason"] == ("shorter than one frame" if n_samples == 200 else "unusable audio")
    assert "bad.wav" in line["detail"]


@pytest.mark.parametrize("bad", ["stereo", "8 kHz"])
def test_other_audio_formats_are_converted(capsys, tmp_path, bad):
    done(capsys, tmp_path, "prepare", f"prepare.options.bad={bad}")
    manifest = Manifest(tmp_path / "prepare/manifest.arrow")
    assert manifest[12].id == "bad" and manifest.n_samples[12] == len(manifest.load(12)) == 16_000
    for stage in ("features", "kmeans", "label"):
        done(capsys, tmp_path, stage)
    assert len(LabelStore(tmp_path / "iter1/label")[12]) == 49


def test_duplicate_utterance_id_names_both_files(capsys, tmp_path):
    message = refused(capsys, tmp_path, "prepare", "prepare.options.bad=second 3")
    assert "utterance id '3'" in message and "/3.wav" in message and "/bad.wav" in message
    assert not (tmp_path / "prepare/manifest.arrow").exists()


def test_text_without_a_reading_is_rejected(capsys, tmp_path):
    done(capsys, tmp_path, "prepare", "prepare.options.bad=unreadable text")
    done(capsys, tmp_path, "targets")
    record = json.loads((tmp_path / "targets/provenance.json").read_text())["metrics"]
    assert record["utterances"] == 12 and record["rejected"] == {"text without a reading": 1}
    assert json.loads((tmp_path / "targets/rejected.jsonl").read_text())["id"] == "bad"


def test_audio_changed_after_prepare_is_named_by_every_stage(capsys, copy):
    """Nothing made is touched, and with the recording put back the same command goes on."""
    path = copy / "prepare/work/0.wav"
    sound, before = path.read_bytes(), files(copy / "iter1/label")
    for stage, folder in (("label", "iter1/label"), ("pretrain", "iter1/pretrain")):
        shutil.rmtree(copy / folder)
        soundfile.write(path, [0.1] * 9_000, 16_000)
        message = refused(capsys, copy, stage, "pretrain.crop.keep_in_memory_hours=0")
        assert "utterance '0'" in message and str(path) in message and "9000 samples" in message
        path.write_bytes(sound)
        done(capsys, copy, stage)
        if stage == "label":
            assert {name: files(copy / folder)[name] for name in ("units.bin", "offsets.npy")} == {
                name: before[name] for name in ("units.bin", "offsets.npy")
            }


# --- what was made stays -----------------------------------------------------------------------------------


def test_changed_setting_in_a_finished_folder_is_rejected(capsys, copy):
    before = files(copy)
    message = refused(capsys, copy, "kmeans", "kmeans.n_clusters=5")
    assert "kmeans.n_clusters was 4, now 5" in message and "delete the folder" in message
    assert "pretrain.train.max_steps was 2, now 3" in refused(
        capsys, copy, "pretrain", "pretrain.train.max_steps=3"
    )
    assert files(copy) == before


def test_failed_run_does_not_bind_the_folder_to_its_settings(capsys, copy):
    """The sizes are those of another model: that is no reason to have to delete anything."""
    other = (copy / "iter1/pretrain/bundle").rename(copy / "other")
    shutil.rmtree(copy / "iter1/pretrain")
    wrong = f"pretrain.init_from={other}", "model.ffn=32"
    assert "pretrain.init_from" in refused(capsys, copy, "pretrain", *wrong)
    done(capsys, copy, "pretrain")


def test_damaged_record_is_named(capsys, copy):
    (copy / "iter1/kmeans/provenance.json").write_text('{"finger')
    message = refused(capsys, copy, "label")
    assert "iter1/kmeans/provenance.json" in message and "rerun" in message


def no_room(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let writing to `path` fail with a full disk; returns the link to remove afterwards."""
    monkeypatch.setattr(atomic, "remove_leftovers", lambda folder: None)  # it would remove the link
    path.parent.mkdir(parents=True, exist_ok=True)
    link = path if path.name == "tmp_sample.npy" else temporary_path(path)
    link.symlink_to("/dev/full")
    return link


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("stage", "folder", "file"),
    [
        ("prepare", "prepare", "draft"),
        ("prepare", "prepare", "manifest.arrow"),
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
    elsewhere = {name: content for name, content in files(copy).items() if not name.startswith(folder)}
    link = no_room(copy / folder / file, monkeypatch)
    status, message = jahubert(capsys, copy, stage)
    assert status == 1 and "Traceback" not in message and message.count("jahubert: error: ") == 1
    assert "the disk is full" in message and folder in message
    assert {name: content for name, content in files(copy).items() if name in elsewhere} == elsewhere
    link.unlink(missing_ok=True)
    monkeypatch.undo()
    done(capsys, copy, stage)
    after = files(copy / folder)
    made = [[name for name in names if not name.startswith("tensorboard/")] for names in (after, before)]
    assert made[0] == made[1]
    for name in before:  # records and curves hold times of day
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
        with pytest.raises(DiskFullError, match="the disk is full"), report_disk_full(tmp_path):
            raise error
    with pytest.raises(KeyError), report_disk_full(tmp_path):
        raise KeyError("something else")


def test_ctrl_c_saves_a_checkpoint(tmp_path):
    """A stage that trains saves and leaves; all leave with 130, and the same command goes on."""
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


TOO_SMALL = {
    "pretrain": ("torch.Tensor.backward", "train.micro_seconds below 10", ["pretrain.train.micro_seconds=5"]),
    "label": (
        "jahubert.train.stages.label.make_feature",
        "label.batch_seconds below 80",
        ["label.batch_seconds=5"],
    ),
    "kmeans": ("jahubert.train.stages.kmeans.fit_kmeans", "set kmeans.device=cpu", []),
}


@pytest.mark.parametrize("stage", TOO_SMALL)
def test_out_of_memory_error_names_a_setting(capsys, copy, monkeypatch, stage):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB. 1.00 GiB is free. Of ...")

    place, says, less = TOO_SMALL[stage]
    shutil.rmtree(copy / "iter1" / stage)
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        message = refused(capsys, copy, stage)
    assert message.startswith(f"{stage}: CUDA out of memory. Tried 2 GiB. 1.00 GiB is free. ")
    assert says in message
    done(capsys, copy, stage, *less)  # in the same folder


def test_error_in_one_process_is_printed_once(whole, tmp_path):
    """It alone says what is wrong; the other one ends without a traceback, and nothing waits for ever."""
    exp = Path(shutil.copytree(whole, tmp_path / "exp"))
    shutil.rmtree(exp / "iter1/label")
    (exp / "prepare/work/4.wav").unlink()  # in the second of four shards
    command = [sys.executable, "-m", "jahubert.run", f"recipe={ROUGH}", "stage=label", f"exp={exp}"]
    command += ["processes=2", "label.shard_size=3"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROUGH.parent.parent, timeout=300)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.count("jahubert: error: utterance '4': no such audio file") == 1


# --- the command that uses a model --------------------------------------------------------------------------


def test_transcribe_reports_files_that_are_not_audio(capsys, whole, tmp_path):
    model = str(whole / "systems/main/finetune")
    good, text = str(whole / "prepare/work/0.wav"), tmp_path / "notes.txt"
    text.write_text("hello")
    (tmp_path / "folder").mkdir()
    for given, says in (
        (text, "is not audio that can be read"),
        (tmp_path / "folder", "no audio file"),
        (tmp_path / "none.wav", "no such audio file"),
    ):
        assert cli.main(["transcribe", "--model", model, str(given), good]) == 2
        printed = capsys.readouterr()
        assert str(given) in printed.err and says in printed.err and "Traceback" not in printed.err
        assert good in printed.out  # the others are still done
    assert cli.main(["transcribe", "--model", str(tmp_path), good]) == 2
    assert "not a model folder, config.json is missing" in capsys.readouterr().err
    assert cli.main(["transcribe", "--model", str(whole / "iter1/pretrain"), good]) == 2
    assert "has no CTC head" in capsys.readouterr().err


def test_help_and_no_arguments(capsys):
    assert run.main(["--help"]) == 0
    assert "stage=STAGE" in capsys.readouterr().out
    assert run.main([]) == 2
    assert "recipe=... is missing" in capsys.readouterr().err
    assert os.environ.get("RANK") is None
