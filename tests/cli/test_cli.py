"""Tests of the command line: output, exit statuses and error messages."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fixtures.damage import fill_disk
from fixtures.sounds import syllables
from fixtures.terminal import Terminal

import jahubert
from jahubert.cli.feature_files import FeatureFiles
from jahubert.cli.main import main
from jahubert.formats.bundle import load_bundle, save_bundle
from jahubert.inference.confidence import Calibration, WordFeatures
from jahubert.model.hubert import HubertModel
from jahubert.model.precision import quantize_int8


def command(*args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jahubert", *args], capture_output=True, timeout=120, **options
    )


def test_one_file_gives_one_line_of_kana(bundle, folder, capsys):
    assert main(["transcribe", "--model", bundle, "data/a.wav"]) == 0
    out, err = capsys.readouterr()
    expected = jahubert.Transcriber.from_pretrained(bundle).transcribe("data/a.wav").text
    assert out == expected + "\n" and expected and err == ""


def test_several_files_are_named_and_one_failure_does_not_stop_the_others(bundle, folder, capsys):
    Path("bad.wav").write_bytes(b"RIFFnothing")
    Path("empty-folder").mkdir()
    assert main(["transcribe", "--model", bundle, "bad.wav", "data", "empty-folder", "gone.wav"]) == 2
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == ["data/a.wav", "data/sub/日本語 名前.flac"]
    errors = err.splitlines()
    assert len(errors) == 4 and all(line.startswith("jahubert: error: ") for line in errors)
    for name in ("bad.wav", "gone.wav", "empty-folder"):
        assert sum(name in line for line in errors) == 1
    assert "3 of 5" in errors[-1]


def test_builtin_model_is_announced_once(bundle, folder, capsys, monkeypatch):
    monkeypatch.setattr("jahubert.formats.hub.builtin_model", lambda: Path(bundle))
    assert main(["transcribe", "data"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert len(err.splitlines()) == 1 and "built-in model" in err and "--model" in err
    assert main(["transcribe", "--model", bundle, "data"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("bias", "mark"), [(-20.0, "(?)"), (20.0, "")])
def test_uncertain_words_are_marked_on_a_terminal_only(bundle, folder, capsys, monkeypatch, bias, mark):
    calibration = write_calibration(folder / "calibration.json", bias)
    arguments = ["transcribe", "--model", bundle, "--calibration", str(calibration), "data/a.wav"]
    assert main(arguments) == 0
    words = capsys.readouterr().out.split()
    assert words and "(?)" not in "".join(words)
    with (
        Terminal() as terminal,
        open(os.dup(terminal.slave), "w", encoding="utf-8") as stream,
        monkeypatch.context() as patch,
    ):
        patch.setattr(sys, "stdout", stream)
        assert main(arguments) == 0
        assert main([*arguments, "--phonemes"]) == 0
    written = terminal.written.split()
    assert written[: len(words)] == [word + mark for word in words]
    assert "".join(written[len(words) :]).count("(?)") == (len(words) if mark else 0)


def test_json_always_has_confidences(bundle, folder, capsys):
    calibration = write_calibration(folder / "calibration.json", 0.0)
    for options, calibrated in (([], False), (["--calibration", str(calibration)], True)):
        assert main(["transcribe", "--model", bundle, *options, "-f", "json", "data/a.wav"]) == 0
        content = json.loads(capsys.readouterr().out)
        assert content["calibrated"] is calibrated and content["words"]
        for item in (content, *content["words"], *content["segments"][0]["words"]):
            assert 0 <= item["confidence"] <= 1 and (item["confidence"] == 0.5) == calibrated


def test_unusable_calibration_is_reported(bundle, folder, capsys):
    (folder / "calibration.json").write_text('{"bias": 1.0}')
    for name in ("", "missing.json", "calibration.json"):
        assert main(["transcribe", "--model", bundle, "--calibration", name, "data/a.wav"]) == 2
        assert (name or "--calibration") in capsys.readouterr().err


def write_calibration(path: Path, bias: float) -> Path:
    """Write a calibration with which all words have the same confidence."""
    content = Calibration(bias, WordFeatures(*[0.0] * len(WordFeatures._fields))).to_json()
    path.write_text(json.dumps(content))
    return path


def test_unexpected_exception_prints_a_traceback_and_exits_with_1(bundle, folder, capsys, monkeypatch):
    def broken(self, wavs):
        raise RuntimeError("internal failure")

    monkeypatch.setattr("jahubert.inference.transcribe.Transcriber.log_probs", broken)
    assert main(["transcribe", "--model", bundle, "data/a.wav", "gone.wav"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "jahubert: error: data/a.wav: internal failure" in err and "gone.wav" in err


def test_json_and_tsv_are_printed_line_by_line(bundle, folder, capsys):
    assert main(["transcribe", "--model", bundle, "-f", "json", "data"]) == 0
    contents = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [c["audio"] for c in contents] == ["data/a.wav", "data/sub/日本語 名前.flac"]
    assert contents[0]["duration"] == 0.75 and contents[0]["words"]
    assert main(["transcribe", "--model", bundle, "-f", "tsv", "data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("audio\tstart") for line in lines] == [True] + [False] * (len(lines) - 1)


def test_format_all_writes_every_format(bundle, folder, capsys):
    assert main(["transcribe", "--model", bundle, "-f", "all", "-o", "out/deep", "data"]) == 0
    assert capsys.readouterr().out == ""
    names = sorted(str(p.relative_to("out/deep")) for p in Path("out/deep").rglob("*") if p.is_file())
    endings = [".TextGrid", ".json", ".labels.txt", ".srt", ".tsv", ".txt", ".vtt"]
    assert names == sorted(stem + e for stem in ("a", "sub/日本語 名前") for e in endings)


def test_segments_of_a_long_recording_are_lines(bundle, folder, capsys):
    soundfile.write("long.wav", np.tile(syllables(2.0).numpy(), 20), 16_000)
    assert main(["transcribe", "--model", bundle, "long.wav"]) == 0
    lines = capsys.readouterr().out.splitlines()
    segments = jahubert.Transcriber.from_pretrained(bundle).transcribe("long.wav").segments
    assert len(lines) >= 2 and lines == [segment.text for segment in segments]
    assert main(["transcribe", "--model", bundle, "long.wav", "-o", "out.txt"]) == 0
    assert Path("out.txt").read_text(encoding="utf-8").splitlines() == lines
    assert main(["transcribe", "--model", bundle, "data/a.wav", "long.wav", "-f", "txt"]) == 0
    named = capsys.readouterr().out.splitlines()
    assert named[1:] == [f"long.wav\t{line}" for line in lines]


def test_segments_are_printed_before_the_recording_is_complete(bundle, folder, capsys, monkeypatch):
    """Reading fails after four minutes of audio, and the text up to this point is on standard output."""
    from jahubert.inference import transcribe

    wav = torch.from_numpy(np.tile(syllables(2.0).numpy(), 15))  # 30 s

    def broken_stream(*_):
        for _ in range(8):
            yield wav
        raise jahubert.UserError("the connection was lost")

    monkeypatch.setattr(transcribe, "stream_audio", broken_stream)
    assert main(["transcribe", "--model", bundle, "data/a.wav"]) == 2
    out, err = capsys.readouterr()
    assert out.count("\n") >= 2 and "connection was lost" in err


def test_dash_reads_standard_input(bundle, folder, capsys, monkeypatch):
    assert main(["transcribe", "--model", bundle, "data/a.wav"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path("data/a.wav").read_bytes())))
    assert main(["transcribe", "--model", bundle, "-"]) == 0
    assert capsys.readouterr().out == expected


def test_features_writes_one_npy_per_recording(bundle, folder, capsys):
    assert main(["features", "--model", bundle, "--layer", "1", "-o", "out", "data", "gone.wav"]) == 2
    assert "gone.wav" in capsys.readouterr().err
    frames_SD = np.load("out/sub/日本語 名前.npy")
    expected = jahubert.FeatureExtractor.from_pretrained(bundle, layer=1)("data/sub/日本語 名前.flac")
    assert frames_SD.dtype == np.float32
    np.testing.assert_allclose(frames_SD, expected.numpy(), atol=1e-6)
    assert sorted(p.name for p in Path("out").rglob("*.npy")) == ["a.npy", "日本語 名前.npy"]


def test_units_are_printed_or_written(bundle, folder, capsys):
    expected = jahubert.UnitExtractor.from_pretrained(bundle)("data/a.wav")
    assert main(["units", "--model", bundle, "data/a.wav"]) == 0
    assert capsys.readouterr().out == " ".join(map(str, expected.tolist())) + "\n"
    assert main(["units", "--model", bundle, "--unique", "--chunk", "10", "data"]) == 0
    name, line = capsys.readouterr().out.splitlines()[0].split("\t")
    assert name == "data/a.wav" and list(map(int, line.split())) == expected.unique_consecutive().tolist()
    assert main(["units", "--model", bundle, "-o", "out", "data/a.wav"]) == 0
    assert capsys.readouterr().out == ""
    assert np.array_equal(np.load("out/a.npy"), expected.numpy())


@pytest.mark.parametrize(
    "args",
    [
        ["features", "-o", "out"],
        ["features", "-o", "out", "--chunk", "10"],
        ["units"],
        ["units", "-o", "out"],
    ],
)
def test_recording_shorter_than_a_frame_is_named(bundle, folder, caplog, args):
    soundfile.write("short.wav", np.zeros(100, np.float32), 16_000)
    name, *options = args
    assert main([name, "short.wav", "data/a.wav", "--model", bundle, *options]) == 0
    assert [record.args[0] for record in caplog.records] == ["short.wav"]
    if "-o" in args:
        assert len(np.load("out/short.npy")) == 0


def test_units_use_the_builtin_model_by_default(bundle, folder, capsys, monkeypatch):
    monkeypatch.setattr("jahubert.formats.hub.builtin_model", lambda: Path(bundle))
    assert main(["units", "--model", bundle, "data/a.wav"]) == 0
    expected = capsys.readouterr().out
    assert main(["units", "data/a.wav"]) == 0
    assert capsys.readouterr().out == expected
    loaded = load_bundle(bundle)
    save_bundle("plain", ctc=loaded.ctc, phonemes=loaded.phonemes)
    monkeypatch.setattr("jahubert.formats.hub.builtin_model", lambda: Path("plain"))
    assert main(["units", "data/a.wav"]) == 2
    error = capsys.readouterr().err
    assert "centroids" in error and error.count("\n") == 1


def test_info_prints_model_properties(bundle, capsys):
    assert main(["info", bundle]) == 0
    out = capsys.readouterr().out
    assert "layers           2\n" in out and "can transcribe   true\n" in out and "9 of layer 1" in out
    assert main(["info", "--json", bundle]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["config"]["width"] == 16 and len(content["symbols"]) == 42


def test_info_describes_the_builtin_model_by_default(bundle, capsys, monkeypatch):
    monkeypatch.setattr("jahubert.formats.hub.builtin_model", lambda: Path(bundle))
    assert main(["info", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["model"] == "the built-in model" and content["config"]["width"] == 16


def test_status_rejects_a_folder_without_stages(tmp_path, capsys):
    pytest.importorskip("jahubert.train.experiment.provenance")
    assert main(["status", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["transcribe", "data/a.wav", "--model", "no such"], "no such"),
        (["transcribe", "data/a.wav", "--model", "{bundle}", "--beam", "0"], "--beam"),
        (["transcribe", "data/a.wav", "--model", "{bundle}", "--threads", "3000000000"], "--threads"),
        (["transcribe", "data/a.wav", "--model", "{bundle}", "--device", "teapot"], "device=teapot"),
        (["transcribe", "data/a.wav", "--model", "{bundle}", "--device", "meta"], "device=meta"),
        (["transcribe", "data/a.wav", "--model", "{bundle}", "-o", "-"], "-o -"),
        (["features", "data", "--model", "{bundle}", "-o", "-"], "-o -"),
        (
            ["features", "data", "--model", "{bundle}", "-o", "out", "--layer", "1,2", "--weights", "nan,1"],
            "weights",
        ),
        (["transcribe", "data", "--model", "{bundle}", "-f", "srt"], "add -o DIR"),
        (["transcribe", "data/a.wav", "--model", "{bundle}", "-f", "all"], "add -o DIR"),
        (["transcribe", "-", "-", "--model", "{bundle}"], "only once"),
        (
            ["transcribe", "data", "data/a.wav", "--model", "{bundle}", "-o", "out"],
            "would both be written to out/a.txt",
        ),
        (["transcribe", "data", "--model", "{bundle}", "-o", "data/a.wav"], "is a file"),
        (["transcribe", "data", "--model", "{bundle}", "-o", "data/a.wav/out"], "data/a.wav is a file"),
        (["features", "data", "--model", "{bundle}", "-o", "out", "--layer", "3"], "layer 3"),
        (["units", "data", "--model", "{bundle}", "--chunk", "1"], "too short"),
        (["units", "data", "--model", "{bundle}", "--chunk", "nan"], "nan"),
        (["features", "data", "--model", "{bundle}", "-o", "out", "--chunk", "inf"], "inf"),
        (["transcribe", "data", "--model", "{bundle}", "--lm", ""], "--lm is empty"),
        (["transcribe", "data", "--model", "{bundle}", "--lexicon", ""], "--lexicon is empty"),
        (["info", "data"], "config.json"),
    ],
)
def test_invalid_arguments_give_a_one_line_error(bundle, folder, capsys, args, message):
    assert main([arg.format(bundle=bundle) for arg in args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("jahubert: error: ") and message in err and err.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["transcribe", "features", "units"])
def test_missing_builtin_model_is_reported(folder, capsys, monkeypatch, name):
    monkeypatch.setattr("jahubert.formats.hub.builtin_model", lambda: None)
    assert main([name, "data/a.wav", *(["-o", "out"] if name == "features" else [])]) == 2
    assert "--model" in capsys.readouterr().err


def test_interruption_is_quiet(bundle, folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jahubert.inference.transcribe.stream_audio", interrupted)
    assert main(["transcribe", "--model", bundle, "data/a.wav"]) == 130
    assert capsys.readouterr() == ("", "")


def test_units_of_a_folder_are_computed_in_batches(bundle, folder, capsys, monkeypatch):
    """The results equal those of single files, and an error affects only the recording that causes it."""
    single = {}
    for path in ("data/a.wav", "data/sub/日本語 名前.flac"):
        assert main(["units", "--model", bundle, path]) == 0
        single[path] = capsys.readouterr().out
    encode, batches = jahubert.FeatureExtractor.encode, []

    def counted(self, wavs):
        batches.append(len(wavs))
        if len(wavs) > 1 and "fail" in batches:
            raise RuntimeError("out of memory")
        return encode(self, wavs)

    monkeypatch.setattr(jahubert.FeatureExtractor, "encode", counted)
    Path("data/bad.wav").write_bytes(b"RIFFnothing")
    expected = "".join(f"{path}\t{units}" for path, units in single.items())
    for mode, sizes in (("whole", [2]), ("fail", [2, 1, 1])):
        batches[:] = [mode]
        assert main(["units", "--model", bundle, "data"]) == 2
        out, err = capsys.readouterr()
        assert out == expected and "data/bad.wav" in err and "1 of 3 failed" in err
        assert batches == [mode, *sizes]


def test_progress_is_shown_on_a_terminal_only(bundle, folder, capsys, monkeypatch):
    main(["transcribe", "--model", bundle, "data"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(["transcribe", "--model", bundle, "data"])
    out, err = capsys.readouterr()
    assert "[2/2]" in err and "[" not in out


def test_progress_escapes_control_characters_of_file_names(bundle, folder, capsys, monkeypatch):
    name = "a\x1b]0;title\x07\n.wav"
    Path("data", name).write_bytes(Path("data/a.wav").read_bytes())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["units", "--model", bundle, "-o", "out", f"data/{name}"]) == 0
    err = capsys.readouterr().err
    assert "[1/1]" in err and "title" in err
    assert "\x1b]" not in err and "\x07" not in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["transcribe", "features", "units"])
def test_recording_given_twice_is_rejected(bundle, folder, capsys, command):
    twice = "data/a.wav"  # the same object, as for an interned string
    assert main([command, "--model", bundle, "-o", "out", twice, twice]) == 2
    assert "would both be written" in capsys.readouterr().err and not Path("out").exists()


def test_progress_is_updated_within_a_long_recording(bundle, tmp_path, capsys, monkeypatch):
    soundfile.write(tmp_path / "long.wav", syllables(95.0).numpy(), 16_000)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["transcribe", "--model", bundle, "--beam", "1", str(tmp_path / "long.wav")]) == 0
    err = capsys.readouterr().err
    shown = [line for line in err.split("\r") if "of audio" in line]
    assert len(shown) >= 2 and "1:35 of audio" in shown[-1] and "[1/1]" in shown[-1]


def test_glob_patterns_are_expanded(bundle, folder, capsys):
    assert main(["transcribe", "--model", bundle, "data/**/*.flac", "*.mp3"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("data/sub/日本語 名前.flac\t") and out.count("\n") == 1
    assert "*.mp3: no file matches" in err
    Path("odd[1].wav").write_bytes(Path("data/a.wav").read_bytes())
    assert main(["transcribe", "--model", bundle, "odd[1].wav"]) == 0  # the name of a file is not a pattern
    assert "\t" not in capsys.readouterr().out


def test_noise_gives_no_text_unless_vad_is_disabled(bundle, folder, capsys):
    noise = np.random.default_rng(0).normal(0, 0.05, 32_000)
    soundfile.write("noise.wav", noise, 16_000)
    assert main(["transcribe", "--model", bundle, "noise.wav"]) == 0
    assert capsys.readouterr().out == "\n"
    assert main(["transcribe", "--model", bundle, "--no-vad", "noise.wav"]) == 0
    assert capsys.readouterr().out.strip()


def test_conditioning_can_be_disabled(bundle, folder, capsys):
    soundfile.write("quiet.wav", 0.01 * syllables(2.0).numpy() + 0.1, 16_000)
    scores = []
    for options in ([], ["--no-conditioning"]):
        assert main(["transcribe", "--model", bundle, "-f", "json", "quiet.wav", *options]) == 0
        scores.append(json.loads(capsys.readouterr().out)["score"])
    assert scores[0] != scores[1]


def test_phonemes_option_prints_phonemes(bundle, folder, capsys):
    assert main(["transcribe", "--model", bundle, "--phonemes", "data/a.wav"]) == 0
    expected = jahubert.Transcriber.from_pretrained(bundle).transcribe("data/a.wav").phonemes
    assert capsys.readouterr().out == " ".join(expected) + "\n"


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16])
def test_low_precision_is_close(bundle, folder, dtype):
    exact, low_precision = (
        jahubert.Transcriber.from_pretrained(bundle, device="cpu", dtype=d) for d in (torch.float32, dtype)
    )
    wav = syllables(2.0)
    (a,), (b,) = exact.log_probs([wav]), low_precision.log_probs([wav])
    assert b.dtype == torch.float32 and not torch.equal(a, b)
    assert (a.exp() - b.exp()).abs().mean() < 1e-3
    assert ("quantized" in str(type(low_precision.model.lm_head))) == (dtype is torch.int8)


def test_unsupported_dtype_is_rejected(bundle):
    exact = jahubert.Transcriber.from_pretrained(bundle, device="cpu", dtype=torch.float32)
    with pytest.raises(jahubert.UserError, match="int8"):
        quantize_int8(exact.model, torch.device("meta"))
    with pytest.raises(jahubert.UserError, match=r"dtype is torch\.float64; choose"):
        jahubert.Transcriber(exact.model, exact.phonemes, dtype=torch.float64)


def test_status_prints_json(folder, capsys):
    from jahubert.train.experiment.provenance import acquire

    acquire(folder / "exp" / "prepare", {"stage": "prepare", "version": 1, "settings": {}})
    assert main(["status", "exp", "--json"]) == 0
    (state,) = json.loads(capsys.readouterr().out)
    assert (state["stage"], state["state"]) == ("prepare", "stopped")
    assert main(["status", "exp"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["prepare", "stopped"]


def test_parser_does_not_import_torch():
    code = "import sys, jahubert.cli.main as m; m.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_python_m_jahubert_runs_the_command(bundle, folder):
    result = command("transcribe", "--model", bundle, "data", env={"PATH": "", "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0 and result.stderr == b""
    assert "data/sub/日本語 名前.flac\t" in result.stdout.decode("utf-8")
    assert command("no-such-command").returncode == 2
    assert command("--version").stdout.decode().strip() == f"jahubert {jahubert.__version__}"


def test_closed_pipe_is_quiet(bundle, folder):
    line = f"{sys.executable} -m jahubert transcribe --model '{bundle}' -f json " + "data " * 3 + "| true"
    result = subprocess.run(line, shell=True, capture_output=True, timeout=120)
    assert result.stderr == b""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash not found")
def test_head_reads_the_first_line_and_ends_the_command(bundle, folder):
    command = f"'{sys.executable}' -m jahubert transcribe --model '{bundle}' -f tsv {'data ' * 20}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("audio\tstart") and done.stdout.count("\n") == 1
    assert (done.returncode, done.stderr) in [(141, ""), (0, "")]  # 0 if head ended after the last output


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash not found")
def test_closed_pipe_ends_the_command_within_a_long_recording(bundle, folder):
    soundfile.write("long.wav", np.tile(syllables(2.0).numpy(), 20), 16_000)
    command = f"'{sys.executable}' -m jahubert transcribe --model '{bundle}' long.wav"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO])
def test_errors_without_a_file_name_are_not_taken_for_errors_of_standard_output(
    bundle, folder, capsys, monkeypatch, code
):
    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(FeatureFiles, "finish", fail)
    assert main(["features", "--model", bundle, "-o", "all.safetensors", "data/a.wav"]) == 2
    err = capsys.readouterr().err
    assert os.strerror(code) in err and "standard output" not in err and err.count("\n") == 1


def test_public_names_exist():
    for name in jahubert.__all__:
        assert getattr(jahubert, name) is not None and name in dir(jahubert)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = jahubert.Nothing


def test_every_bad_recording_gives_one_line_and_the_rest_is_processed(bundle, folder, capsys):
    Path("empty.wav").touch()
    soundfile.write("no-samples.wav", np.zeros(0, np.float32), 16_000)
    Path("text.wav").write_text("this is not audio")
    whole = Path("data/a.wav").read_bytes()
    Path("cut.wav").write_bytes(whole[: len(whole) // 2])
    Path("empty-folder").mkdir()
    bad = ["gone.wav", "empty.wav", "no-samples.wav", "text.wav", "cut.wav", "empty-folder"]
    for command, extra in (("transcribe", ["-f", "all"]), ("features", []), ("units", [])):
        assert main([command, "--model", bundle, "-o", command, *extra, *bad, "data/a.wav"]) == 2
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert out == "" and len(lines) == len(bad) + 1 and "6 of 7 failed" in lines[-1]
        for name in bad:
            (line,) = (line for line in lines if name in line)
            assert line.startswith("jahubert: error: ") and "Traceback" not in line
        written = {path.name for path in Path(command).iterdir()} - {"features.json", "sources.jsonl"}
        assert {name.partition(".")[0] for name in written} == {"a"}


@pytest.mark.parametrize(
    "name", ["", "x" * 300 + ".wav", "loop.wav", "data/a.wav/b.wav", "a\0.wav", "locked/a.wav"]
)
def test_unusable_names_are_reported_and_the_rest_is_processed(bundle, folder, capsys, monkeypatch, name):
    Path("loop.wav").symlink_to("loop.wav")
    stat = os.stat

    def locked(path, *args, **options):
        if str(path).startswith("locked/"):  # simulated, because root may read every folder
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", locked)
    assert main(["units", "--model", bundle, name, "data/a.wav"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("data/a.wav\t") and len(err.splitlines()) == 2 and "Traceback" not in err


def test_entries_of_folders_are_processed_or_named_or_ignored(bundle, folder, capsys, monkeypatch):
    Path("data/dangling.wav").symlink_to("nowhere")
    Path("data/folder.wav").mkdir()
    os.mkfifo("data/pipe.wav")
    Path("data/locked").mkdir()
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert main(["units", "--model", bundle, "data"]) == 2
    out, err = capsys.readouterr()
    assert [line.partition("\t")[0] for line in out.splitlines()] == [
        "data/a.wav",
        "data/sub/日本語 名前.flac",
    ]
    assert "data/dangling.wav" in err and "data/locked" in err and "2 of 4 failed" in err


@pytest.mark.parametrize("name", ["new\nline.wav", "tab\t.wav", "esc\x1b[31m.wav", "cr\r.wav"])
def test_control_characters_in_names_do_not_break_lines(bundle, folder, capsys, name):
    shutil.copy("data/a.wav", name)
    outputs = [["transcribe", "--vad", "off"], ["transcribe", "--vad", "off", "-f", "tsv"], ["units"]]
    for command, *options in outputs:
        assert main([command, "--model", bundle, *options, name, "gone" + name]) == 2
        out, err = capsys.readouterr()
        lines = [line for line in out.splitlines() if not line.startswith("audio\t")]
        escaped = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in name)
        assert lines and all(line.partition("\t")[0] == escaped for line in lines)
        assert len(err.splitlines()) == 2 and "\x1b" not in err


def test_name_that_is_not_utf8_gives_valid_json(bundle, folder, capsys):
    name = os.fsdecode(b"bad\xff.wav")
    shutil.copy("data/a.wav", name)
    assert main(["transcribe", "--model", bundle, "-f", "json", name]) == 0
    line = capsys.readouterr().out
    assert json.loads(line.encode())["audio"] == name


@pytest.mark.parametrize("command", ["transcribe", "units"])
def test_closed_standard_input_is_reported(bundle, folder, capsys, monkeypatch, command):
    monkeypatch.setattr("sys.stdin", None)
    assert main([command, "--model", bundle, "-", "data/a.wav"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("data/a.wav\t") and "Traceback" not in err and "standard input" in err


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs")
@pytest.mark.parametrize("name", ["transcribe", "units"])
def test_ctrl_c_ends_a_command_that_waits_for_a_fifo(bundle, folder, name):
    os.mkfifo("fifo.wav")
    line = [sys.executable, "-m", "jahubert", name, "--model", bundle, "fifo.wav"]
    # Background jobs of a non-interactive shell ignore SIGINT.
    with subprocess.Popen(line, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        try:
            writer = open_for_writing("fifo.wav", process)
            # If a signal arrives immediately before a blocking read, Python handles it only after the read.
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
            os.close(writer)
        finally:
            process.kill()


def open_for_writing(fifo: str, reader: subprocess.Popen) -> int:
    """Open a FIFO for writing as soon as the reader has opened it."""
    for _ in range(1200):
        assert reader.poll() is None
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            assert error.errno == errno.ENXIO  # the FIFO has no reader yet
            time.sleep(0.05)
    raise TimeoutError(f"{fifo} was not opened for reading")


def test_file_name_that_starts_with_a_dash_is_explained(bundle, folder, capsys):
    shutil.copy("data/a.wav", "-dash.wav")
    assert main(["units", "--model", bundle, "-dash.wav"]) == 2
    assert "./-dash.wav" in capsys.readouterr().err
    assert main(["units", "--model", bundle, "./-dash.wav"]) == 0


def test_output_folder_without_permission_is_rejected(bundle, folder, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # simulated, because root may write everywhere
    assert main(["transcribe", "--model", bundle, "-o", "out", "data"]) == 2
    err = capsys.readouterr().err
    assert "no permission to write" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [("x.srt", ["-f", "all", "-o", "."]), ("x.srt", ["-o", "x.srt"]), ("x.srt", ["-o", "./link.srt"])],
)
def test_transcript_never_overwrites_its_recording(bundle, folder, capsys, name, options):
    shutil.copy("data/a.wav", name)
    os.symlink(name, "link.srt")
    assert main(["transcribe", "--model", bundle, name, *options]) == 2
    assert name in capsys.readouterr().err
    assert Path(name).read_bytes() == Path("data/a.wav").read_bytes()


@pytest.mark.parametrize("command", ["transcribe", "features", "units"])
def test_broken_link_as_output_is_rejected_before_the_work(bundle, folder, capsys, command):
    os.symlink("missing", "out")
    assert main([command, "--model", bundle, "data/a.wav", "-o", "out"]) == 2
    error = capsys.readouterr().err
    assert "-o out" in error and "link" in error and error.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="the current folder cannot be deleted on Windows")
@pytest.mark.parametrize("module", ["jahubert.cli.main", "jahubert.run"])
def test_deleted_current_folder_is_reported(tmp_path, monkeypatch, capsys, module):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert importlib.import_module(module).main(["info", "model"]) == 2
    error = capsys.readouterr().err
    assert "current folder" in error and error.count("\n") == 1


def test_unsuitable_models_are_rejected(bundle, folder, capsys):
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "wav2vec2"}')
    Path("empty").mkdir()
    Path("notes.pt").write_text("not a model")
    save_bundle("encoder", model=HubertModel(load_bundle(bundle).config))
    for model, message in (
        ("other", "wav2vec2"),
        ("empty", "config.json"),
        ("notes.pt", "notes.pt"),
        ("encoder", "no CTC head"),
        ("gone", "gone"),
    ):
        assert main(["transcribe", "--model", model, "data/a.wav"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and message in err and err.startswith("jahubert: error: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full not found")
def test_full_disk_affects_one_recording_only(bundle, folder, capsys, monkeypatch):
    Path("out").mkdir()
    fill_disk(Path("out/a.srt"), monkeypatch)
    assert main(["transcribe", "--model", bundle, "-f", "srt", "-o", "out", "data"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert "No space left on device" in err[0] and "data/a.wav" in err[0] and "1 of 2 failed" in err[1]
    assert [str(p.relative_to("out")) for p in Path("out").rglob("*.srt")] == ["sub/日本語 名前.srt"]


def test_help_takes_less_than_half_a_second():
    """One of five runs must be fast, because other processes may slow down some of the runs."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        assert command("--help").returncode == 0
        seconds.append(time.perf_counter() - started)
        if seconds[-1] < 0.5:
            break
    assert min(seconds) < 0.5


def test_undecodable_m4a_is_reported_and_macos_metadata_is_skipped(bundle, folder, capsys):
    (folder / "data" / "__MACOSX").mkdir()
    for name in ("._a.wav", "__MACOSX/a.wav"):  # these files contain macOS metadata
        (folder / "data" / name).write_bytes(b"\0\x05\x16\x07")
    (folder / "data" / "memo.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    assert main(["transcribe", "--model", bundle, "data"]) == 2
    out, err = capsys.readouterr()
    assert "memo.m4a" in err and "1 of 3 failed" in err and "a.wav" in out


def test_empty_output_name_is_rejected(bundle, folder, capsys):
    assert main(["transcribe", "--model", bundle, "-o", "", "data/a.wav"]) == 2
    assert "-o is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "name", "supported"),
    [
        ("features", "out.npy", ".safetensors"),
        ("units", "out.TXT", "folder"),
        ("units", "out.safetensors", "folder"),
        ("transcribe", "out.doc", ".srt"),
    ],
)
def test_unsupported_output_file_is_rejected(bundle, folder, capsys, command, name, supported):
    run = [command, "--model", bundle, "data/a.wav", "-o", name]
    assert main(run) == 2
    err = capsys.readouterr().err
    assert f"-o {name}" in err and supported in err and err.count("\n") == 1 and not Path(name).exists()
    Path(name).mkdir()
    assert main(run) == 0
    assert any(Path(name).iterdir())


@pytest.mark.parametrize("command", ["features", "units", "transcribe"])
def test_output_folder_may_have_a_suffix(bundle, folder, command):
    assert main([command, "--model", bundle, "data/a.wav", "-o", "out.v2"]) == 0
    assert any(Path("out.v2").iterdir())


@pytest.mark.parametrize("to", ["hf", "fairseq", "torchaudio", "onnx"])
def test_convert_reports_an_unwritable_output(bundle, folder, capsys, monkeypatch, to):
    monkeypatch.setattr(os, "access", lambda *args: False)
    ending = {"hf": "", "onnx": ".onnx"}.get(to, ".pt")
    assert main(["convert", bundle, f"output/model{ending}", "--to", to]) == 2
    assert "no permission to write" in capsys.readouterr().err and not list(Path("output").iterdir())
    (folder / "file").write_text("x")
    assert main(["convert", bundle, f"file/model{ending}", "--to", to]) == 2
    assert capsys.readouterr().err.startswith("jahubert: error: file")


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        (["--output_dir", "out", "--output_format", "SRT", "--language", "ja"], ".srt"),
        (["-o", "out", "-f", "TXT", "--beam_size", "2", "--threads", "1"], ".txt"),
    ],
)
def test_whisper_options_are_accepted(bundle, folder, options, ending):
    assert main(["transcribe", "--model", bundle, "data/a.wav", *options]) == 0
    assert [path.name for path in Path("out").iterdir()] == [f"a{ending}"]


@pytest.mark.parametrize("name", ["out.srt", "deep/out.vtt", "out.labels.txt", "out.json"])
def test_output_may_be_a_file(bundle, folder, name):
    assert main(["transcribe", "--model", bundle, "data/a.wav", "-o", name]) == 0
    assert Path(name).is_file() and Path(name).stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data/a.wav", "--fromat", "srt"], "--format"),
        (["data/a.wav", "--beam", "100000"], "beam"),
        (["data/a.wav", "-o", "out.srt", "-f", "vtt"], "out.srt"),
        (["data", "-o", "out.srt"], "out.srt"),
        (["https://example.com/a.wav"], "https://example.com/a.wav"),
        (["no-such-folder/"], "no such folder"),
    ],
)
def test_invalid_transcribe_arguments_give_a_one_line_error(bundle, folder, capsys, arguments, message):
    assert main(["transcribe", "--model", bundle, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("jahubert: error: ") and error.count("\n") == 1


@pytest.mark.parametrize("package", ["hydra", "omegaconf", "pyarrow", "tqdm"])
def test_plan_names_the_missing_extra(package):
    code = f"import sys; sys.modules['{package}'] = None; from jahubert.cli.main import main; "
    code += "sys.exit(main(['plan', 'recipe=demo', 'gpu=H100']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and ".[train]" in result.stderr and "Traceback" not in result.stderr


def test_results_of_two_recordings_never_have_the_same_name(bundle, folder, capsys):
    shutil.copy("data/a.wav", "data/a.labels.wav")
    assert main(["transcribe", "data", "--model", bundle, "-f", "all", "-o", "out"]) == 2
    assert "a.labels.txt" in capsys.readouterr().err and not Path("out").exists()


def test_files_next_to_recordings_are_not_replaced(bundle, folder, capsys):
    """They may be hand-written transcripts, in the layout that recipe=table reads."""
    Path("data/a.txt").write_text("人手の書き起こし")
    assert main(["transcribe", "data/a.wav", "--model", bundle, "-o", "data/a.txt"]) == 2
    assert "data/a.txt" in capsys.readouterr().err
    assert main(["transcribe", "data", "--model", bundle, "-o", "data"]) == 2
    assert "data/a.txt" in capsys.readouterr().err
    assert Path("data/a.txt").read_text() == "人手の書き起こし" and not list(Path("data/sub").glob("*.txt"))
    assert main(["transcribe", "data", "--model", bundle, "-o", "data", "--overwrite"]) == 0
    assert Path("data/a.txt").read_text() != "人手の書き起こし"
    for _ in range(2):  # in another folder, the results of an earlier call are replaced
        assert main(["transcribe", "data", "--model", bundle, "-o", "out"]) == 0
    assert main(["transcribe", "data/a.wav", "--model", bundle, "-o", "data", "-f", "json"]) == 0
    for _ in range(2):  # features continue with the files of an earlier call
        assert main(["features", "data", "--model", bundle, "-o", "data", "--layer", "1"]) == 0
