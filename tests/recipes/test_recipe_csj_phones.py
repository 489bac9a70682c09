"""Tests of CSJ phone times from XML files: alignments, the phoneme mapping, and unreadable times."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from fixtures.csj_tree import LABELS, RATE, Segment, Talk, expected, planned, write_talk, xml_text

from jahubert.errors import DataError
from jahubert.train.data.manifest import Phone, Rejected, Utterance
from jahubert.train.experiment.registry import recipe_module

csj = recipe_module("csj")
speech, talks, transcripts = (sys.modules[f"csj_{name}"] for name in ("speech", "talks", "transcripts"))


def read(data: Path, **options) -> tuple[list[Utterance], list[Rejected]]:
    items = list(csj.prepare(data, data, csj.Config(**options), 0))
    return [i for i in items if isinstance(i, Utterance)], [i for i in items if isinstance(i, Rejected)]


def test_phone_times_of_the_core_become_the_alignment(tmp_path):
    talk = Talk("A01F0055", [Segment(1000, 1700, [("今日", "キョー"), ("切手", "キッテ")])])
    write_talk(tmp_path, "usb", talk, ("sdb", "xml"))
    item = read(tmp_path)[0][0]
    spelled = [("ky", 0, 1867), ("o:", 1867, 5600)]
    spelled += [(p, 5600 + 1120 * i, 6720 + 1120 * i) for i, p in enumerate(("k", "i", "q", "t", "e"))]
    assert item.start == 16_000
    assert item.alignment == tuple(Phone(*phone) for phone in spelled)


def test_alignment_is_clipped_to_the_utterance_without_overlaps():
    times = [
        transcripts.PhoneTime(*t, "L")
        for t in (("a", 0, 50), ("i", 50, 150), ("u", 140, 200), ("e", 200, 300))
    ]
    assert talks._alignment(times, 100, 250) == (
        Phone("i", 0, 50),
        Phone("u", 50, 100),
        Phone("e", 100, 150),
    )
    assert talks._alignment(times, 300, 400) == ()


MORAS = [kana for kana in LABELS if kana not in ("ー", "ッ") and kana[0] not in "<("]
MORAS += ["キー", "ヒッシ", "チャッツ", "ンー", "ニョーゴ"]


@pytest.mark.parametrize("kana", MORAS)
def test_phonemes_of_the_xml_equal_the_phones_of_the_kana(tmp_path, kana):
    """The aligned phones of an utterance equal the phones of its words."""
    (tmp_path / "a.xml").write_text(xml_text(Talk("A01F0055", [Segment(0, 900, [(kana, kana)])])), "utf-8")
    xml = transcripts.read_xml(tmp_path / "a.xml")
    assert not xml.problems
    (word,) = speech.resolve_segments(xml.segments, tmp_path, csj.Config())[0].words
    assert tuple(phone.symbol for phone in xml.phones) == word
    assert (xml.phones[0].start, xml.phones[-1].end) == (0, 900 * 16)


def test_sounds_that_are_not_phones_have_no_time(tmp_path):
    words = [("今日", "キョー"), ("<FV>", "<FV>"), ("<VN>", "<VN>"), ("(?)", "(?)"), ("は", "ワ")]
    text = xml_text(Talk("A01F0055", [Segment(0, 1000, words)]))
    pause = '<Phone PhoneEntity="SpzS" PhoneClass="others" PhoneStartTime="0.200" PhoneEndTime="0.300"/>'
    (tmp_path / "a.xml").write_text(text.replace("</Phoneme>", pause + "</Phoneme>", 1), "utf-8")
    xml = transcripts.read_xml(tmp_path / "a.xml")
    assert [phone.symbol for phone in xml.phones] == ["ky", "o:", "w", "a"] and not xml.problems
    assert xml.phones[0].end < 0.1 * RATE


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace('PhonemeEntity="', 'PhonemeEntity="x', 1), ".*PhonemeEntity 'x"),
        (
            lambda text: text.replace('PhoneStartTime="', 'PhoneStartTime="x', 1),
            "PhoneStartTime",
        ),
        (lambda text: text.replace('PhoneEndTime="', 'PhoneEndTime="9e999" A="', 1), "PhoneEndTime"),
        (lambda text: text.replace("</Talk>", ""), r"not well-formed XML"),
    ],
)
def test_unreadable_phone_times_only_drop_the_alignment(tmp_path, caplog, change, problem):
    plan = planned("A01F0055")
    write_talk(tmp_path, "usb", plan, ("sdb", "xml"))
    path = tmp_path / "XML" / "BaseXML" / "core" / "A01F0055.xml"
    intact, _ = read(tmp_path)
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    items, rejected = read(tmp_path, max_broken=0.0)
    assert {item.id: (item.start, item.n_samples, item.words) for item in items} == expected([plan])
    assert rejected[0].id == "A01F0055.xml" and rejected[0].reason == "broken phone times"
    assert re.search(rf"A01F0055.xml:\d+: {problem}", rejected[0].detail)
    assert "talks with unreadable phone times: 1;" in caplog.text
    first, *others = (item.alignment for item in items)
    assert first == ()
    if "XML" not in problem:
        assert others == [item.alignment for item in intact][1:]


def test_xml_transcript_is_read_despite_unknown_phonemes(tmp_path):
    plan = planned("A01F0055")
    write_talk(tmp_path, "usb", plan, ("xml",))
    path = tmp_path / "XML" / "BaseXML" / "core" / "A01F0055.xml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('PhonemeEntity="', 'PhonemeEntity="x'), encoding="utf-8")
    items, _ = read(tmp_path)
    assert {item.id: (item.start, item.n_samples, item.words) for item in items} == expected([plan])


@pytest.mark.parametrize(
    ("declared", "codec"), [("Shift_JIS", "cp932"), ("EUC-JP", "euc-jp"), ("UTF-8", "utf-8")]
)
def test_xml_is_read_in_its_declared_encoding(tmp_path, declared, codec):
    text = xml_text(Talk("A01F0055", [Segment(0, 900, [("言葉", "コトバ")])]))
    header = re.match(r"<\?xml[^>]*\?>", text)[0] if text.startswith("<?xml") else ""
    text = f'<?xml version="1.0" encoding="{declared}"?>' + text.removeprefix(header)
    (tmp_path / "a.xml").write_bytes(text.encode(codec))
    (segment,) = transcripts.read_xml(tmp_path / "a.xml").segments
    assert segment.words[0].orthography == "言葉"
    (tmp_path / "a.xml").write_bytes(text.encode())  # converted without a change of the declaration
    assert transcripts.read_xml(tmp_path / "a.xml").segments == [segment]
    (tmp_path / "a.xml").write_bytes(text.encode(codec).replace("言葉".encode(codec), b"\x82\xff"))
    with pytest.raises(DataError, match=rf"a\.xml: .*{declared}"):
        transcripts.read_xml(tmp_path / "a.xml")
