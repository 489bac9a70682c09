"""Invented CSJ trees: every layout, tags, dialogues, and a plan that says what must be read out of them.

No line is from the corpus. A talk is planned as utterances of segments of words; gaps inside an utterance
are at most 0.5 s and those between two are longer, so the plan knows what joining must give.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
import soundfile

RATE = 16_000
# As written, as said, as phones; "" is no word. Every tag and event of the corpus is here, some characters
# are in CP932 only. The first ones have no tags.
PLAIN = 6
WORDS = [
    ("今日", "キョー", "ky o:"),
    ("は", "ワ", "w a"),
    ("髙い", "タカイ", "t a k a i"),
    ("①", "イチ", "i ch i"),
    ("切手", "キッテ", "k i q t e"),
    ("本", "ホン", "h o N"),
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
    ("はい<笑><咳><息><泣>", "ハイ<笑><咳><息><泣>", "h a i"),
    ("<拍手><雑音><フロア発話><フロア笑>", "<拍手><雑音><フロア発話><フロア笑>", ""),
    ("<デモ><ベル><朗読間違い>", "<デモ><ベル><朗読間違い>", ""),
]
# The phonemes of the corpus's own XML where they have another name.
XML_NAMES = {"q": "Q", "ts": "c", "ch": "cy", "sh": "sy", "j": "zy", "f": "F"}


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
    known = {
        (written, said): spelled.split() for written, said, spelled in WORDS if spelled and "(" not in said
    }
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f'<Talk TalkID="{talk.id}" SpeakerID="0001">']
    for number, segment in enumerate(talk.segments, 1):
        lines.append(
            f'<IPU IPUID="{number:04d}" IPUStartTime="{segment.start / 1000:.6f}" '
            f'IPUEndTime="{segment.end / 1000:.6f}" Channel="{segment.channel}">'
        )
        step = (segment.end - segment.start) / len(segment.words)
        for index, (written, said) in enumerate(segment.words):
            lines.append(f"<LUW><SUW OrthographicTranscription={quoteattr(written)}")
            lines.append(f"PhoneticTranscription={quoteattr(said)}>")
            mask = ' TagMaskStart="1"' if "×" in said else ""
            lines.append(f"<TransSUW{mask}>")
            if phones and (written, said) in known:
                lines += _phonemes(known[written, said], segment.start + index * step, step)
            lines.append("</TransSUW></SUW></LUW>")
        lines.append("</IPU>")
    return "\n".join([*lines, "</Talk>", ""])


def _phonemes(phones: Sequence[str], start: float, length: float) -> Iterable[str]:
    """A long vowel is a vowel and H; a consonant has two phones."""
    names = [name for phone in phones for name in ([phone[0], "H"] if phone.endswith(":") else [phone])]
    step = length / len(names)
    for number, name in enumerate(names):
        times = [(start + (number + part / 2) * step) / 1000 for part in (0, 1, 2)]
        spans = [(times[0], times[2])] if name in "aiueoHN" else [(times[0], times[1]), (times[1], times[2])]
        yield f'<Phoneme PhonemeEntity="{XML_NAMES.get(name, name)}">'
        for first, last in spans:
            yield f'<Phone PhoneEntity="{name}" PhoneStartTime="{first:.6f}" PhoneEndTime="{last:.6f}"/>'
        yield "</Phoneme>"


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
    rows = ["講演ID,講演種別,コア", *(f"{talk.id},学会,{'○' if talk.core else ''}" for talk in talks)]
    (root / "fileList.csv").write_bytes("\r\n".join(rows).encode("cp932"))
