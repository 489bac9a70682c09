"""Tests of the output formats: content, subtitle cues, TextGrid tiers, and parsing by other programs."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import pytest

from jahubert.errors import ConfigError
from jahubert.inference import writers
from jahubert.inference.transcribe import Transcript, Word


def word(kana: str, phonemes: str, start: float, step: float = 0.1) -> Word:
    phones = tuple(phonemes.split())
    times = tuple((start + i * step, start + (i + 1) * step) for i in range(len(phones)))
    return Word(kana, phones, times[0][0], times[-1][1], -0.25, times)


TRANSCRIPT = Transcript(
    (word("アサ", "a s a", 0.5), word("ワ", "w a", 0.9), word("キレー", "k i r e:", 3661.0)),
    duration=3662.0,
    score=-7.5,
    audio="朝 の/a.wav",
)
EMPTY = Transcript((), 1.5, 0.0, "quiet.wav")


def test_text_format_is_one_line_of_kana():
    assert writers.render(TRANSCRIPT, "text") == "アサ ワ キレー\n"
    assert " ".join(TRANSCRIPT.phonemes) == "a s a | w a | k i r e:"
    assert writers.render(EMPTY, "text") == "\n"


def test_json_is_one_complete_line():
    line = writers.render(TRANSCRIPT, "json")
    assert line.count("\n") == 1 and "アサ" in line
    content = json.loads(line)
    assert content["audio"] == TRANSCRIPT.audio and content["duration"] == 3662.0 and content["score"] == -7.5
    assert content["phonemes"] == list(TRANSCRIPT.phonemes)
    first = content["words"][0]
    assert (first["kana"], first["start"], first["end"]) == ("アサ", 0.5, 0.8)
    assert first["times"] == [[0.5, 0.6], [0.6, 0.7], [0.7, 0.8]]


def test_text_has_a_line_and_json_an_entry_per_segment():
    transcript = replace(TRANSCRIPT, segment_starts=(0, 2))
    assert writers.render(transcript, "text") == "アサ ワ\nキレー\n"
    assert writers.render(transcript, "text", phonemes=True) == "a s a | w a\nk i r e:\n"
    content = json.loads(writers.render(transcript, "json"))
    assert [(s["start"], s["end"], s["text"]) for s in content["segments"]] == [
        (0.5, 1.1, "アサ ワ"),
        (3661.0, 3661.4, "キレー"),
    ]
    assert [word for s in content["segments"] for word in s["words"]] == content["words"]
    assert json.loads(writers.render(EMPTY, "json"))["segments"] == []


def test_tsv_has_one_row_per_word():
    lines = writers.render(TRANSCRIPT, "tsv").splitlines()
    assert lines[0].split("\t") == ["audio", "start", "end", "kana", "phonemes", "written"]
    assert lines[1].split("\t") == ["朝 の/a.wav", "0.500", "0.800", "アサ", "a s a", ""]
    assert len(lines) == 4
    spelled = replace(TRANSCRIPT, words=(replace(TRANSCRIPT.words[0], written="朝"),))
    assert writers.render(spelled, "tsv").splitlines()[1].split("\t")[3:] == ["アサ", "a s a", "朝"]


def test_cues_do_not_depend_on_the_spelling():
    """Spaces between phones do not count as characters."""
    words = [word("キレーダネ", "k i r e: d a n e", 0.5 * number) for number in range(8)]
    for word_ in words:
        assert len(word_.phonemes) > 4
    transcript = Transcript(tuple(words), 5.0, -1.0, "a.wav")
    kana, phonemes = (writers.render(transcript, "srt", phonemes=flag) for flag in (False, True))
    assert kana.count("-->") == 1 and 1 <= phonemes.count("-->") <= 2


def test_srt_is_rendered():
    assert writers.render(TRANSCRIPT, "srt") == (
        "1\n00:00:00,500 --> 00:00:01,300\nアサ ワ\n\n2\n01:01:01,000 --> 01:01:01,800\nキレー\n"
    )
    assert writers.render(EMPTY, "srt") == ""


def test_vtt_is_rendered():
    lines = writers.render(TRANSCRIPT, "vtt").splitlines()
    assert lines[:4] == ["WEBVTT", "", "00:00:00.500 --> 00:00:01.300", "アサ ワ"]
    assert writers.render(EMPTY, "vtt") == "WEBVTT\n"


def test_vtt_escapes_markup():
    transcript = replace(TRANSCRIPT, words=(replace(TRANSCRIPT.words[0], kana="<unk>&-->"),))
    assert "&lt;unk&gt;&amp;--&gt;" in writers.render(transcript, "vtt").splitlines()[3]


def test_subtitle_cues_are_bounded():
    steady = Transcript(tuple(word("アサ", "a s a", i * 0.5) for i in range(60)), 31.0, 0.0)
    times = re.findall(r"00:00:(\S+) --> 00:00:(\S+)", writers.render(steady, "vtt"))
    assert len(times) > 3
    assert all(float(end) - float(start) <= writers.CUE_LENGTH for start, end in times)


def test_textgrid_tiers_are_gapless():
    grid = writers.render(TRANSCRIPT, "textgrid")
    for tier in grid.split("    item [")[1:]:
        bounds = [float(x) for x in re.findall(r"^            xm(?:in|ax) = (\S+)", tier, re.M)]
        labels = re.findall(r'            text = "(.*)"', tier)
        assert bounds[0] == 0 and bounds[-1] == 3662.0
        assert bounds[1:-1:2] == bounds[2::2] and len(labels) * 2 == len(bounds)
        assert f"intervals: size = {len(labels)}" in tier
        phones = [phone for phone in TRANSCRIPT.phonemes if phone != "|"]
        assert [x for x in labels if x] in (["アサ", "ワ", "キレー"], phones)
    assert 'name = "words"' in grid and 'name = "phones"' in grid
    assert grid.count('text = ""') == 2 * 4
    assert writers.render(EMPTY, "textgrid").count('text = ""') == 2


def test_textgrid_escapes_quotes():
    quoted = Transcript((Word('"', ("a",), 0.0, 0.1, -1.0, ((0.0, 0.1),)),), 1.0, -1.0)
    assert 'text = """"' in writers.render(quoted, "textgrid")


def test_save_writes_every_format(tmp_path):
    paths = writers.save(TRANSCRIPT, tmp_path / "deep" / "talk.one", writers.FORMATS)
    assert [p.name for p in paths] == [
        f"talk.one{ending}"
        for ending in (".txt", ".json", ".tsv", ".srt", ".vtt", ".TextGrid", ".labels.txt")
    ]
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == sorted(p.name for p in paths)
    assert paths[0].read_text(encoding="utf-8") == "アサ ワ キレー\n"


def test_unknown_format_is_rejected():
    with pytest.raises(ConfigError, match=r"'doc'.*textgrid"):
        writers.render(TRANSCRIPT, "doc")


def test_phonemes_replace_kana():
    assert writers.render(TRANSCRIPT, "text", phonemes=True) == "a s a | w a | k i r e:\n"
    assert "a s a | w a |\n" in writers.render(TRANSCRIPT, "srt", phonemes=True)
    assert writers.render(TRANSCRIPT, "audacity", phonemes=True).splitlines()[1].split("\t")[2] == "w a"
    for format in ("json", "tsv", "textgrid"):  # these formats contain both kana and phonemes
        assert writers.render(TRANSCRIPT, format, phonemes=True) == writers.render(TRANSCRIPT, format)


LONG = Transcript(tuple(word("アサ", "a s a", i * 0.5) for i in range(8000)), 4001.0, -1.0, "long.wav")


@pytest.mark.parametrize("transcript", [TRANSCRIPT, EMPTY, LONG], ids=["known", "empty", "long"])
class TestOtherPrograms:
    """Tests that independent parsers can read the written files."""

    def test_srt_is_parsed_by_another_program(self, transcript, tmp_path):
        srt = pytest.importorskip("srt", reason="needs the extra dev")
        (path,) = writers.save(transcript, tmp_path / "a", ["srt"])
        cues = list(srt.parse(path.read_text(encoding="utf-8"), ignore_errors=False))
        parsed = [(c.start.total_seconds(), c.end.total_seconds(), c.content) for c in cues]
        assert parsed == rounded(writers._cues(transcript.words))
        assert [cue.index for cue in cues] == list(range(1, len(cues) + 1))

    def test_vtt_is_parsed_by_another_program(self, transcript, tmp_path):
        webvtt = pytest.importorskip("webvtt", reason="needs the extra dev")
        (path,) = writers.save(transcript, tmp_path / "a", ["vtt"])
        parsed = [(c.start_in_seconds, c.end_in_seconds, c.text) for c in webvtt.read(path)]
        expected = rounded(writers._cues(transcript.words))
        assert [text for *_, text in parsed] == [text for *_, text in expected]
        for one, other in zip(parsed, expected, strict=True):
            assert one[:2] == pytest.approx(other[:2], abs=1.0)  # the parser drops milliseconds

    def test_textgrid_is_parsed_by_another_program(self, transcript, tmp_path):
        praatio = pytest.importorskip("praatio.textgrid", reason="needs the extra dev")
        (path,) = writers.save(transcript, tmp_path / "a", ["textgrid"])
        grid = praatio.openTextgrid(str(path), includeEmptyIntervals=False, reportingMode="error")
        words, phones = (grid.getTier(name).entries for name in ("words", "phones"))
        assert [(e.label, e.start, e.end) for e in words] == [
            (w.kana, pytest.approx(w.start, abs=1e-5), pytest.approx(w.end, abs=1e-5))
            for w in transcript.words
        ]
        assert [e.label for e in phones] == [p for w in transcript.words for p in w.phonemes]
        assert grid.maxTimestamp == pytest.approx(transcript.duration)

    def test_audacity_labels_are_tab_separated(self, transcript, tmp_path):
        """Each line consists of start, end and text."""
        (path,) = writers.save(transcript, tmp_path / "a", ["audacity"])
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        assert [(float(a), float(b), label) for a, b, label in rows] == [
            (pytest.approx(w.start, abs=1e-6), pytest.approx(w.end, abs=1e-6), w.kana)
            for w in transcript.words
        ]


def rounded(cues: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Round the times of cues to milliseconds."""
    return [(round(start, 3), round(end, 3), text) for start, end, text in cues]


def test_short_cues_stay_on_screen_where_the_next_one_allows():
    from types import SimpleNamespace

    words = [
        SimpleNamespace(start=a, end=b, text="あ", kana="ア", phonemes=("a",), written="")
        for a, b in ((0.0, 0.2), (0.9, 1.0), (5.0, 5.1))
    ]
    words.insert(1, SimpleNamespace(start=0.85, end=0.88, text="い", kana="イ", phonemes=("i",), written=""))
    cues = writers._cues(words)
    assert [(round(start, 2), round(end, 2)) for start, end, _ in cues] == [
        (0.0, 0.8),
        (0.85, 1.65),
        (5.0, 5.8),
    ]


def test_text_without_word_boundaries_is_split_into_cues():
    """At pauses, and before a cue becomes too long to read."""
    starts = [0.2 * i for i in range(100)] + [60.0 + 0.05 * i for i in range(50)]
    symbols = tuple("漢字仮名混"[i % 5] for i in range(len(starts)))
    times = tuple((start, start + 0.05) for start in starts)
    word = Word("".join(symbols), symbols, times[0][0], times[-1][1], -0.1, times)
    cues = writers._cues([word])
    assert "".join(text for *_, text in cues) == word.kana
    assert all(
        end - start <= writers.CUE_LENGTH and len(text) <= writers.CUE_CHARACTERS for start, end, text in cues
    )
    paused = Word(
        "漢字仮名", ("漢", "字", "仮", "名"), 0.0, 1.9, -0.1, ((0, 0.1), (0.2, 0.3), (1.0, 1.1), (1.8, 1.9))
    )
    assert [text for *_, text in writers._cues([paused])] == ["漢字", "仮", "名"]
    labels = writers.audacity(Transcript((word,), 70.0, 0.0)).splitlines()
    assert len(labels) == len(cues) > 4
