"""End-to-end tests of the pipeline on a corpus that a model learns in seconds.

The uninterrupted run is the fixture `whole` in conftest.py, which test_docs.py also uses.
"""

import base64
import io
import json
import os
import re
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
from fixtures import FIXTURES
from fixtures.terminal import Terminal

from jahubert.errors import StaleError
from jahubert.train.pipeline import runner

TONES = FIXTURES / "tones"
# Files that the next stage reads. Logs and records contain timestamps and are not compared.
RESULTS = ("*.arrow", "*.npy", "*.safetensors", "units.bin", "*.jsonl", "scores.json", "table.txt")


def command(exp: Path, *overrides: str) -> list[str]:
    return [f"recipe={TONES}", "stage=all", f"exp={exp}", *overrides]


def results(exp: Path) -> dict[str, bytes]:
    """Return the contents of the result files, keyed by relative path, without the times in metrics.jsonl."""
    contents = {}
    for pattern in RESULTS:
        for path in sorted(exp.rglob(pattern)):
            name = str(path.relative_to(exp))
            content = path.read_bytes()
            if path.name == "metrics.jsonl":
                rows = [json.loads(line) for line in content.splitlines()]
                content = repr([{k: v for k, v in row.items() if k != "timing"} for row in rows]).encode()
            contents[name] = content
    return contents


def test_model_learns_the_corpus(whole):
    scores = json.loads((whole / "systems/pretrained/score/scores.json").read_text())["test"]
    assert scores["utterances"] == 10
    assert scores["per"]["rate"] < 0.05 and scores["wer"]["rate"] < 0.1
    assert scores["per"]["low"] <= scores["per"]["rate"] <= scores["per"]["high"]
    summary = json.loads((whole / "report/metrics.json").read_text())
    assert summary["units"]["iter1"]["pnmi"] > 0.9  # each phone has its own chord
    layers = summary["layers"]
    models = layers["models"]
    assert len(models["iter1"]) == len(models["iter2"]) == 3 and layers["mfcc"]["pnmi"] > 0.9
    # For the comparison of layers, layer 2 is clustered into more units than for iteration 2.
    assert models["iter1"][1]["pnmi"] > summary["units"]["iter2"]["pnmi"]
    assert 3 < summary["units"]["iter1"]["entropy"] <= np.log2(12)
    assert [units["pretrained_on"] for units in summary["units"].values()] == [True, True, False]
    assert summary["corpus"]["rejected"] == {"always rejected": 1}


@pytest.fixture(scope="module", params=["en", "ja"])
def page(whole, request) -> Path:
    """Return a copy of the report in one language."""
    runner.run(command(whole, "stage=report", f"report.language={request.param}"))
    copy = whole.parent / f"report-{request.param}.html"
    shutil.copy(whole / "report" / "report.html", copy)
    return copy


def test_report_page_is_complete_and_self_contained(whole, page):
    text = page.read_text(encoding="utf-8")
    language = page.stem[-2:]
    assert f'<html lang="{language}">' in text and "width=device-width" in text
    words = {"en": ("Results", "Highest error rates"), "ja": ("結果", "誤り率の高い発話")}
    assert [all(word in text for word in words[each]) for each in ("en", "ja")].count(True) == 1
    assert all(word in text for word in words[language])
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert {address.partition(":")[0] for address in addresses if not address.startswith("#")} == {"data"}
    links = {address[1:] for address in addresses if address.startswith("#")}
    assert links == set(re.findall(r'<section id="(\w+)"', text)) and len(links) == 5
    for path in whole.rglob("provenance.json"):
        record = json.loads(path.read_text())
        assert record["fingerprint"][:16] in text
    score = json.loads((whole / "systems/pretrained/score/scores.json").read_text())["test"]["per"]
    assert f"{100 * score['rate']:.2f} <small>[{100 * score['low']:.2f}, {100 * score['high']:.2f}]" in text
    assert len(text) < 3_000_000


def test_worst_utterances_come_first_with_audio(whole, page):
    from jahubert.train.evaluation.metrics import count_errors

    text = page.read_text(encoding="utf-8")
    lines = map(json.loads, (whole / "systems/pretrained/decode/test.jsonl").read_text().splitlines())
    rates = {}
    for line in lines:
        reference, hypothesis = (" ".join(line[key]).split() for key in ("reference", "hypothesis"))
        rates[line["id"]] = count_errors(reference, hypothesis).rate
    shown = re.findall(r'class="note">(tone-\d+)', text)
    assert len(set(shown)) == 6 and len(re.findall("<audio", text)) == 6
    ranked = sorted(rates.values(), reverse=True)
    assert [rates[name] for name in shown] == pytest.approx([*ranked[:2], *ranked[4:6], *ranked[:-3:-1]])
    sound = re.search(r"data:audio/mpeg;base64,([^\"]+)", text)[1]
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(sound)))
    length = soundfile.info(whole / "prepare/work" / f"{shown[0][-3:]}.wav").frames
    assert rate == 16_000 and abs(len(wave) - length) < 2400


@pytest.mark.slow
def test_report_page_renders_in_a_browser(page):
    """There are no console errors, all images and audio load, and the page fits on a phone."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
    with sync_api.sync_playwright() as driver:
        try:
            system = shutil.which("chromium") or shutil.which("google-chrome")
            browser = driver.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"needs a browser: apt install chromium, or playwright install chromium ({error})")
        for width in (1200, 390):
            tab = browser.new_page(viewport={"width": width, "height": 840})
            errors: list[str] = []
            tab.on("console", lambda message, errors=errors: errors.append(message.text))
            tab.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            tab.on("requestfailed", lambda request, errors=errors: errors.append(request.url[:80]))
            tab.goto(page.as_uri())
            tab.wait_for_function("[...document.querySelectorAll('audio')].every(a => a.readyState > 0)")
            assert errors == []
            assert tab.evaluate("document.images.length") > 20
            assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert tab.evaluate("[...document.querySelectorAll('audio')].every(a => a.duration > 0.5)")
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
            right_edges = tab.evaluate(
                "[...document.querySelectorAll('.scroll')].map(e => e.getBoundingClientRect().right)"
            )
            assert max(right_edges) <= width
        browser.close()


def test_report_is_written_without_the_audio(whole, tmp_path):
    exp = tmp_path / "exp"
    shutil.copytree(whole, exp)
    (exp / "prepare" / "work").rename(exp / "prepare" / "moved")
    runner.run(command(exp, "stage=report"))
    text = (exp / "report" / "report.html").read_text(encoding="utf-8")
    assert "<audio" not in text and "no such audio file" in text


def test_aligned_phone_times_match_the_corpus(whole):
    """Forced alignment assigns the phone of the corpus to most frames."""
    from jahubert.frames import HUBERT
    from jahubert.train.data.manifest import Manifest, Phone
    from jahubert.train.evaluation.metrics import phone_frames

    manifest, same, frames = Manifest(whole / "prepare/manifest.arrow"), 0, 0
    for line in map(
        json.loads, (whole / "systems/pretrained/decode/alignment.jsonl").read_text().splitlines()
    ):
        utterance = manifest[line["row"]]
        n_frames = HUBERT.n_frames(utterance.n_samples)
        aligned = phone_frames([Phone(*phone) for phone in line["phones"]], n_frames, HUBERT)
        expected = phone_frames(utterance.alignment, n_frames, HUBERT)
        same += sum(a == b for a, b in zip(aligned, expected, strict=True))
        frames += n_frames
    assert same / frames > 0.6


def test_bundles_reproduce_the_stored_results(whole):
    import jahubert

    manifest_wav = sorted((whole / "prepare/work").glob("*.wav"))[0]
    transcriber = jahubert.Transcriber.from_pretrained(
        whole / "systems/pretrained/finetune/bundle", dtype=torch.float32
    )
    reference = json.loads((whole / "systems/pretrained/decode/test.jsonl").read_text().splitlines()[0])
    transcript = transcriber.transcribe(whole / "prepare/work" / f"{reference['id'][-3:]}.wav")
    words = [" ".join(word.phonemes) for word in transcript.words]
    assert words == reference["hypothesis"]
    units = jahubert.UnitExtractor.from_pretrained(whole / "iter2/label/bundle")(manifest_wav)
    from jahubert.train.data.labels import LabelStore
    from jahubert.train.data.manifest import Manifest

    ids = Manifest(whole / "prepare/manifest.arrow").ids()
    row = list(ids).index(f"tone-{manifest_wav.stem}")
    assert torch.equal(
        units.cpu().long(), torch.from_numpy(LabelStore(whole / "iter2/label")[row].astype("int64"))
    )


def test_second_run_keeps_every_stage(whole, caplog):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("provenance.json")}
    caplog.set_level("INFO", "jahubert")
    runner.run(command(whole))
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("provenance.json")} == before
    assert sum("kept" in record.getMessage() for record in caplog.records) == len(before)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("kmeans.n_clusters=13", "kmeans.n_clusters was 12, now 13"),
        ("seed=1", "prepare.seed was 0, now 1"),
        ("decode.beam=7", "decode.beam was 20, now 7"),
        ("model.layers=4", "pretrain.model.layers was 3, now 4"),
    ],
)
def test_changed_setting_is_named(whole, override, names):
    with pytest.raises(StaleError) as caught:
        runner.run(command(whole, override))
    assert names in str(caught.value)
    assert "delete the folder" in str(caught.value)


def test_runtime_settings_may_change(whole):
    runner.run(
        command(whole, "label.batch_seconds=3", "pretrain.train.log_every=5", "pretrain.train.keep_last=1")
    )


def test_repeatedly_killed_run_ends_bit_identically(whole, tmp_path):
    exp, started, kills = tmp_path / "exp", time.monotonic(), 0
    for attempt in range(40):
        child = subprocess.Popen(
            [sys.executable, "-m", "jahubert.run", *command(exp)], stderr=subprocess.PIPE, text=True
        )
        try:
            _, stderr = child.communicate(timeout=4 + 1.37 * attempt)
            break
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
            child.communicate()
            kills += 1
        assert time.monotonic() - started < 480
    assert child.returncode == 0, stderr
    assert kills >= 2
    assert results(exp) == results(whole)


def test_progress_bars_do_not_change_the_results(whole, tmp_path):
    """All stages except training and `score` are rerun on a terminal and give the same files and metrics."""
    exp = tmp_path / "exp"
    shutil.copytree(whole, exp)
    again = ("prepare", "features", "kmeans", "label", "targets", "decode", "report")
    for folder in {path for stage in again for path in exp.rglob(stage) if path.is_dir()}:
        for path in folder.iterdir():
            if path.name != "work":  # this folder contains audio generated by the recipe
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    with Terminal() as terminal:
        done = subprocess.run(
            [sys.executable, "-m", "jahubert.run", *command(exp)],
            stdout=subprocess.DEVNULL,
            stderr=terminal.slave,
        )
    assert done.returncode == 0, terminal.screen
    assert results(exp) == results(whole)
    records = {path.relative_to(exp): json.loads(path.read_text()) for path in exp.rglob("provenance.json")}
    assert len(records) == 16
    for path, record in records.items():
        assert record["metrics"] == json.loads((whole / path).read_text())["metrics"]
    bars = (
        "reading the corpus: 0", "features:   0%|", "k-means++:   0%|", "k-means over 2,690 frames:   0%|",
        "labeling:   0%|", "reading text:   0%|", "decoding test:   0%|", "alignment:   0%|",
        "phone times:   0%|", "features of each layer:   0%|", "units of each layer of iter2:   0%|",
        "units of iter3 and phones:   0%|",
    )  # fmt: skip
    assert [bar for bar in bars if bar not in terminal.written] == []
    assert [row for row in terminal.screen if "|" in row or "[00" in row] == []  # no parts of a bar remain


def test_two_processes_give_the_same_units_and_hypotheses(whole, tmp_path):
    """Units and hypotheses are bit-identical, while summed gradients differ by rounding."""
    exp = tmp_path / "exp"
    shorter = ["finetune.train.max_steps=20", "finetune.train.valid_every=20"]
    halves = ["pretrain.train.groups=2", "finetune.train.groups=2"]
    done = subprocess.run(
        [sys.executable, "-m", "jahubert.run", *command(exp, *shorter, *halves, "processes=2")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Recognition on test" in done.stdout
    for name in ("kmeans/centroids.safetensors", "label/units.bin"):
        assert (exp / "iter1" / name).read_bytes() == (whole / "iter1" / name).read_bytes()
    decoded = exp / "systems/pretrained/decode"
    shutil.move(decoded, tmp_path / "two")
    runner.run([*command(exp, *shorter, *halves), "stage=decode"])
    for name in ("test.jsonl", "alignment.jsonl"):
        assert (decoded / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
