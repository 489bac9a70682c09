"""Invented CSJ trees: every layout, tags, dialogues, and a plan that says what must be read out of them.

No line is from the corpus. A talk is planned as utterances of segments of words; gaps inside an utterance
are at most 0.5 s and those between two are longer, so the plan knows what joining must give.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
import soundfile

RATE = 16_000
# As written, as said, as phones; "" is no word. Every tag and event of the corpus is here, some characters
# are in CP932 only. The first ones have no tags.
PLAIN = 14
WORDS = [
    ("今日", "キョー", "ky o:"),
    ("は", "ワ", "w a"),
    ("髙い", "タカイ", "t a k a i"),
    ("①", "イチ", "i ch i"),
    ("切手", "キッテ", "k i q t e"),
    ("本", "ホン", "h o N"),
    ("新聞", "シンブン", "sh i N b u N"),
    ("時期", "ジキ", "j i k i"),
    ("人", "ヒト", "h i t o"),
    ("日本", "ニホン", "n i h o N"),
    ("三つ", "ミッツ", "m i q ts u"),
    ("義理", "ギリ", "g i r i"),
    ("地図", "チズ", "ch i z u"),
    ("指", "ユビ", "y u b i"),
    ("(F えー)", "(F エー)", "e:"),
    ("(A アイビーエム;ＩＢＭ)", "アイビーエム", "a i b i: e m u"),
    ("ちゃんと", "(W チャント;チャント)<H>", "ch a N t o"),
    ("です", "デス", "d e s u"),
    ("(D だ)", "(D ダ)", "d a"),
    ("(D2 が)", "(D2 ガ)", "g a"),
    ("(? 字数)", "(? ジスー)", "j i s u:"),
    ("(? 亜,伊)", "(? ア,イ)", "a"),
    ("(?)", "(?)", ""),
    ("(M は)", "(M ワ)", "w a"),
    ("(O ザッツ)", "(O ザッツ)", "z a q ts u"),
    ("(X あの)", "(X アノ)", "a n o"),
    ("(K たち(F えー)ばな;橘)", "(K タチ(F エー)バナ;タチバナ)", "t a ch i e: b a n a"),
    ("(B 正;政)", "(B ゴ;セイ)", "s e i"),
    ("(笑 はい)", "(笑 ハイ)", "h a i"),
    ("(泣 はい)", "(泣 ハイ)", "h a i"),
    ("(咳 はい)", "(咳 ハイ)", "h a i"),
    ("(L そう)", "(L ソー)", "s o:"),
    ("それ<Q>", "ソ<Q>レ", "s o r e"),
    ("<FV>", "<FV>", ""),
    ("<VN>", "<VN>", ""),
    ("で<P:00012.345-00012.678>す", "デ<P:00012.345-00012.678>ス", "d e s u"),
    ("ま<PL:00013.100-00013.250>す", "マ<PL:00013.100-00013.250>ス<PR:00013.300-00013.400>", "m a s u"),
    ("はい<笑><咳><息><泣>", "ハイ<笑><咳><息><泣>", "h a i"),
    ("<拍手><雑音><フロア発話><フロア笑>", "<拍手><雑音><フロア発話><フロア笑>", ""),
    ("<デモ><ベル><朗読間違い>", "<デモ><ベル><朗読間違い>", ""),
]
# The phonemes that the XML of the core has for a mora: labels as in the manual on segments, and as public
# readers of the XML list them.
_PLAIN_ROWS = {
    **{"k": "カキクケコ", "g": "ガギグゲゴ", "s": "サシスセソ", "z": "ザジズゼゾ", "t": "タチツテト"},
    **{"n": "ナニヌネノ", "h": "ハヒフヘホ", "b": "バビブベボ", "p": "パピプペポ", "m": "マミムメモ"},
    **{"r": "ラリルレロ"},
}
_PALATAL_ROWS = {"k": "キ", "g": "ギ", "s": "シ", "z": "ジ", "c": "チ", "n": "ニ", "h": "ヒ", "b": "ビ"}
_PALATAL_ROWS |= {"p": "ピ", "m": "ミ", "r": "リ"}
LABELS = {
    kana: [label + "j" * (vowel == "i"), vowel]
    for label, row in _PLAIN_ROWS.items()
    for kana, vowel in zip(row, "aiueo", strict=True)
}
LABELS |= {
    kana + small: [label + "y", vowel]
    for label, kana in _PALATAL_ROWS.items()
    for small, vowel in (("ャ", "a"), ("ュ", "u"), ("ョ", "o"), ("ェ", "e"))
}
LABELS |= {kana: [vowel] for kana, vowel in zip("アイウエオ", "aiueo", strict=True)}
LABELS |= {
    kana: labels.split()
    for kana, labels in (
        *(("チ", "cj i"), ("ツ", "c u"), ("フ", "F u"), ("ダ", "d a"), ("デ", "d e"), ("ド", "d o")),
        *(("ヤ", "y a"), ("ユ", "y u"), ("ヨ", "y o"), ("ワ", "w a"), ("ン", "N"), ("ッ", "Q"), ("ー", "H")),
        *(
            ("ティ", "t i"),
            ("ディ", "d i"),
            ("トゥ", "t u"),
            ("ドゥ", "d u"),
            ("テュ", "ty u"),
            ("デュ", "dy u"),
        ),
        *(("ファ", "F a"), ("フィ", "F i"), ("フェ", "F e"), ("フォ", "F o"), ("フュ", "Fy u")),
        *(
            ("ツァ", "c a"),
            ("スィ", "s i"),
            ("ズィ", "z i"),
            ("イェ", "y e"),
            ("クヮ", "kw a"),
            ("グヮ", "gw a"),
        ),
        *(("ウィ", "w i"), ("ウェ", "w e"), ("ウォ", "w o"), ("ヴ", "v u"), ("ヴァ", "v a")),
        *(("<FV>", "FV"), ("<VN>", "VN"), ("(?)", "?")),
    )
}
_MORA = re.compile("|".join(sorted(map(re.escape, LABELS), key=len, reverse=True)))
_STOPS = ("k", "g", "t", "d", "b", "p", "c", "z")  # a closure, SclS, comes before their own phone


@dataclass
class Segment:
    start: int  # milliseconds
    end: int
    words: list[tuple[str, str]]  # written, said
    channel: str = "L"


@dataclass
class Utterance:
    """What must come out: milliseconds and words as phones, or the reason for leaving it out."""

    start: int
    end: int
    words: tuple[tuple[str, ...], ...]
    reason: str = ""
    channel: str = "L"


@dataclass
class Talk:
    id: str
    segments: list[Segment] = field(default_factory=list)
    utterances: list[Utterance] = field(default_factory=list)
    core: bool = True

    @property
    def seconds(self) -> float:
        return max(segment.end for segment in self.segments) / 1000 + 0.25


def planned(id: str, n_utterances: int = 3, core: bool = True, channels: str = "L") -> Talk:
    """A talk that depends on its id only; the last utterance of each channel has a masked name in it."""
    talk = Talk(id, core=core)
    for channel in channels:
        rng = random.Random(f"{id} {channel}")
        now = rng.randint(100, 900)
        for number in range(n_utterances):
            first, said = now, []
            for _ in range(rng.randint(1, 3)):
                words = [rng.choice(WORDS[:PLAIN]), *(rng.choice(WORDS) for _ in range(rng.randint(1, 4)))]
                end = now + 350 * len(words)
                talk.segments.append(Segment(now, end, [word[:2] for word in words], channel))
                said += [tuple(phones.split()) for _, _, phones in words if phones]
                now = end + rng.randint(200, 500)
            talk.utterances.append(Utterance(first, end, tuple(said), channel=channel))
            if number == n_utterances - 1:
                masked = Segment(end + 100, end + 600, [("(R ××)", "(R ××)"), ("さん", "サン")], channel)
                talk.segments.append(masked)
                talk.utterances.append(
                    Utterance(masked.start, masked.end, (), reason="masked name", channel=channel)
                )
            now = end + rng.randint(700, 1500)
    # One line for both channels of a dialogue, as in the corpus.
    talk.segments.sort(key=lambda segment: segment.start)
    return talk


def expected(plan: list[Talk]) -> dict[str, tuple]:
    """id -> start and length in samples, and words, of what must be usable."""
    found = {}
    for talk in plan:
        for item in talk.utterances:
            speaker = f"{talk.id}-{item.channel}" if talk.id.startswith("D") else talk.id
            if not item.reason:
                name = f"{speaker}_{item.start:07d}_{item.end:07d}"
                found[name] = (item.start * 16, (item.end - item.start) * 16, item.words)
    return found


# --- transcripts ------------------------------------------------------------------------------------------


def sdb_lines(talk: Talk) -> list[str]:
    lines = []
    for number, segment in enumerate(talk.segments, 1):
        times = f"{number:04d} {segment.start / 1000:09.3f}-{segment.end / 1000:09.3f}"
        for word, (written, said) in enumerate(segment.words, 1):
            columns = ["0", "0", talk.id, f"{times} {segment.channel}:-001-{word:03d}", "", written]
            columns += ["", "", "", written, said, "名詞"]
            # What stands behind the part of speech is often not there.
            lines.append("\t".join(columns + ["", "", "", "", ""] * (word % 2)))
    return lines


def trn_lines(talk: Talk) -> list[str]:
    lines = [f"%講演ID:{talk.id}", "%<SOT>"]
    for number, segment in enumerate(talk.segments, 1):
        times = f"{number:04d} {segment.start / 1000:09.3f}-{segment.end / 1000:09.3f}"
        lines.append(f"{times} {segment.channel}:" + "<雑音>" * (number % 2))
        lines += [f"{written} & {said}" for written, said in segment.words]
    return [*lines, "%<EOT>"]


def xml_text(talk: Talk, phones: bool = True) -> str:
    """XML; with `phones`, a time for every phone of words without tags, spread evenly over the segment."""
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f'<Talk TalkID="{talk.id}" SpeakerID="0001">']
    lines.append("<TalkComment/>")
    for number, segment in enumerate(talk.segments, 1):
        lines.append(
            f'<IPU IPUID="{number:04d}" IPUStartTime="{segment.start / 1000:.6f}" '
            f'IPUEndTime="{segment.end / 1000:.6f}" Channel="{segment.channel}">'
        )
        step = (segment.end - segment.start) / len(segment.words)
        for index, (written, said) in enumerate(segment.words):
            lines.append(f"<LUW><LineComment/><SUW OrthographicTranscription={quoteattr(written)}")
            lines.append(f"PhoneticTranscription={quoteattr(said)}>")
            mask = ' TagMaskStart="1"' if "×" in said else ""
            lines.append(f"<TransSUW{mask}>")
            if phones and _MORA.sub("", said) == "":
                lines += _moras(_MORA.findall(said), segment.start + index * step, step)
            else:
                lines.append('<NonLinguisticSound/><Mora MoraEntity="φ"/>')
            lines.append("</TransSUW></SUW><Noise/></LUW>")
        lines.append("</IPU>")
    return "\n".join([*lines, "</Talk>", ""])


def _moras(kana: Sequence[str], start: float, length: float) -> Iterable[str]:
    step = length / sum(len(LABELS[mora]) for mora in kana)
    for mora in kana:
        yield f"<Mora MoraEntity={quoteattr(mora)}>"
        for label in LABELS[mora]:
            yield f'<Phoneme PhonemeEntity="{label}">'
            if label[0] in _STOPS:
                yield _phone("SclS", "others", start, step / 2)
                yield _phone(label, "consonant", start + step / 2, step / 2)
            elif label == "?":
                yield _phone("S?S", "others", start, step)
            else:
                yield _phone(label, "vowel" if label in "aiueo" else "consonant", start, step)
            yield "</Phoneme>"
            start += step
        yield "</Mora>"


def _phone(entity: str, kind: str, start: float, length: float) -> str:
    times = f'PhoneStartTime="{start / 1000:.6f}" PhoneEndTime="{(start + length) / 1000:.6f}"'
    return f'<Phone PhoneEntity="{entity}" PhoneClass="{kind}" {times}/>'


# --- trees ------------------------------------------------------------------------------------------------


def places(root: Path, layout: str, talk: Talk) -> dict[str, Path]:
    """The folder of each kind of file in a layout: usb, dvd, merl, or merl's other form, speech."""
    side = "core" if talk.core else "noncore"
    if layout == "usb":
        return {
            "sdb": root / "MORPH" / "SDB" / side,
            "wav": root / "WAV" / side,
            "xml": root / "XML" / "BaseXML" / side,
            "trn": root / "TRN" / "Form1" / side,
        }
    if layout == "speech":
        return dict.fromkeys(("sdb", "wav", "xml", "trn"), root / "CSJ2004" / "SPEECH" / talk.id)
    if layout == "dvd":
        return dict.fromkeys(("sdb", "wav", "xml", "trn"), root / f"dvd{3 + len(talk.id) % 5}" / talk.id)
    return {
        kind: root / "CSJ2004" / (kind if kind == "sdb" else kind.upper())
        for kind in ("sdb", "wav", "xml", "trn")
    }


def write_talk(
    root: Path, layout: str, talk: Talk, kinds: Sequence[str] = ("sdb",), stereo: bool = False
) -> None:
    """A talk's transcripts of the given kinds, and its audio: noise, one file a channel unless `stereo`."""
    folders = places(root, layout, talk)
    for kind in (*kinds, "wav"):
        folders[kind].mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        path = folders[kind] / f"{talk.id}.{kind}"
        if kind == "xml":
            path.write_text(xml_text(talk, phones=talk.core), encoding="utf-8")
        else:
            lines = sdb_lines(talk) if kind == "sdb" else trn_lines(talk)
            path.write_bytes("".join(line + "\r\n" for line in lines).encode("cp932"))
    channels = sorted({segment.channel for segment in talk.segments})
    rng = np.random.default_rng(len(talk.segments))
    noise = (rng.standard_normal((round(talk.seconds * RATE), len(channels))) * 1000).astype(np.int16)
    if len(channels) == 1 or stereo:
        soundfile.write(folders["wav"] / f"{talk.id}.wav", noise, RATE)
    else:
        for number, channel in enumerate(channels):
            soundfile.write(folders["wav"] / f"{talk.id}-{channel}.wav", noise[:, number], RATE)


def write_file_list(root: Path, talks: Iterable[Talk]) -> None:
    rows = [
        "講演ID,講演種別,コア",
        *(f"{talk.id},学会,{'コア' if talk.core else 'ノンコア'}" for talk in talks),
    ]
    (root / "fileList.csv").write_bytes("\r\n".join(rows).encode("cp932"))
