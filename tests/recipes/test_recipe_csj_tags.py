"""Tests of CSJ transcripts: tags with every option, nested tags, and joining of segments."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from fixtures.csj_tree import RATE, WORDS

from jahubert.errors import ConfigError
from jahubert.train.experiment.registry import recipe_module

recipe_module("csj")  # also loads the modules next to prepare.py
speech, tags, transcripts = (sys.modules[f"csj_{name}"] for name in ("speech", "tags", "transcripts"))


# --- tags -------------------------------------------------------------------------------------------------


def segment_of(*pronunciations: str, orthography: str = "", start: int = 0, channel: str = "L"):
    words = [transcripts.Word(i + 1, orthography, p) for i, p in enumerate(pronunciations)]
    return transcripts.Segment(start, start + RATE, channel, words)


def resolved(*segments, **options):
    return speech.resolve_segments(segments, Path("a.sdb"), tags.TagOptions(**options))


def words(*pronunciations: str, orthography: str = "", **options) -> str:
    """Return the words of a segment separated by `|`, its first problem, or `masked`."""
    segment = resolved(segment_of(*pronunciations, orthography=orthography), **options)[0]
    if segment.masked:
        return "masked"
    return segment.problems[0] if segment.problems else " | ".join(" ".join(word) for word in segment.words)


ACTUAL, NO_FILLERS, NO_FRAGMENTS = {"pron": "actual"}, {"fillers": "drop"}, {"fragments": "drop"}


@pytest.mark.parametrize(
    ("pronunciation", "canonical", "others"),
    [
        ("(F エー)", "e:", [(NO_FILLERS, "")]),
        ("(D ダ)", "d a", [(NO_FRAGMENTS, ""), (NO_FILLERS, "d a")]),
        ("(D2 ガ)", "g a", [(NO_FRAGMENTS, "")]),
        ("(W ギーツ;ギジュツ)", "g i j u ts u", [(ACTUAL, "g i: ts u")]),
        ("(B ゴ;セイ)", "s e i", [(ACTUAL, "g o")]),
        ("(W ギーツ)", "g i: ts u", [(ACTUAL, "g i: ts u")]),
        ("(A シーディー;ＣＤ)", "sh i: d i:", [(ACTUAL, "sh i: d i:")]),
        ("(K タチ(F エー)バナ;タチバナ)", "t a ch i e: b a n a", [(NO_FILLERS, "t a ch i b a n a")]),
        ("(? ジスー)", "j i s u:", []),
        ("(? ア,イ)", "a", [(ACTUAL, "a")]),
        ("(?)", "", []),
        ("(?ア)", "a", []),
        ("(M ワ)", "w a", []),
        ("(O ザッツ)", "z a q ts u", []),
        ("(X アノ)", "a n o", []),
        ("(L ソー)", "s o:", []),
        ("(笑 ハイ)", "h a i", []),
        ("(泣 ハイ)", "h a i", []),
        ("(咳 ハイ)", "h a i", []),
        ("(R タナカ)", "masked", [(ACTUAL, "masked")]),
        ("××サン", "masked", []),
        ("(R×××××)", "masked", [(ACTUAL, "masked")]),
        ("(R (F×××)サン)", "masked", []),
        ("ソレ<H>", "s o r e", [(ACTUAL, "s o r e:")]),
        ("ソ<Q>レ", "s o r e", [(ACTUAL, "s o r e")]),
        ("<VN>", "", [(ACTUAL, "u N")]),
        ("<FV>", "", [(ACTUAL, "")]),
        ("デ<P:00012.345-00012.678>ス", "d e s u", []),
        ("デ<PL:00012.345-00012.678>ス", "d e s u", []),
        ("ハイ<笑><咳><息><泣><拍手><雑音>", "h a i", [(ACTUAL, "h a i")]),
        ("<フロア発話><フロア笑>ハイ<デモ><ベル><朗読間違い>", "h a i", [(ACTUAL, "h a i")]),
        ("(F (W エト;エート))", "e: t o", [(ACTUAL, "e t o"), (NO_FILLERS, "")]),
        ("(笑 (W (D ギ)ツ;ギジュ))", "g i j u", [(ACTUAL, "g i ts u"), (ACTUAL | NO_FRAGMENTS, "ts u")]),
        ("(W コ(L デ;ココデ))", "k o k o d e", [(ACTUAL, "k o d e")]),
        ("(W (笑 ソ;ソー))", "s o:", [(ACTUAL, "s o")]),
        ("(W イ;ー)", "", []),
        ("(? (F アノ,エノ))", "a n o", [(NO_FILLERS, "")]),
        ("(F (? アノ,エノ))", "a n o", [(NO_FILLERS, "")]),
        ("(? ジスー, ジッスー)", "j i s u:", []),
        ("(M エス;Ｓ)", "e s u", [(ACTUAL, "e s u")]),
        ("(M (A エス;Ｓ)(A エヌ;Ｎ))", "e s u e n u", []),
        ("(W ア(D イ)ウ(F エ;オ)カ)", "o k a", [(ACTUAL, "a i u e"), (ACTUAL | NO_FILLERS, "a i u")]),
        ("(F <VN>)", "u N", [(ACTUAL, "u N"), (NO_FILLERS, "")]),
        ("ンー", "N", []),
        ("ヴァイ・オリン", "b a i o r i N", []),
    ],
)  # fmt: skip
def test_tags_are_handled_according_to_the_options(pronunciation, canonical, others):
    assert words(pronunciation) == canonical
    for options, phones in others:
        assert words(pronunciation, **options) == phones


def test_tags_span_words_and_segments():
    assert words("(F エ", "エット)", "ハイ") == "e | e q t o | h a i"
    assert words("(F エ", "エット)", "ハイ", fillers="drop") == "h a i"
    # Text inside a tag belongs to the word in which it is written.
    assert words("(W コイ", "ショ;コレ", "デショ)", pron="actual") == "k o i | sh o"
    assert words("(W コイ", "ショ;コレ", "デショ)") == "k o r e | d e sh o"
    pieces = [("(R ×", "L"), ("", "L"), ("×)サン", "L"), ("ハイ", "L")]
    segments = [segment_of(pronunciation, channel=channel) for pronunciation, channel in pieces]
    assert [segment.masked for segment in resolved(*segments)] == [True, True, True, False]
    # An unclosed tag affects only its own segment.
    unclosed = resolved(segment_of("ア", "(F イ", "ウ"), segment_of("エ"), segment_of("(笑 オ", "カ)"))
    assert [bool(segment.problems) for segment in unclosed] == [True, False, False]
    assert [segment.words for segment in unclosed[1:]] == [(("e",),), (("o",), ("k", "a"))]


def test_dependent_words_are_merged_into_the_preceding_word():
    assert words("イコ", "ー") == "i k o:"
    assert words("デショ", "ーネ") == "d e sh o: n e"
    assert words("マ", "ッ") == "m a q"
    assert words("ーノ", "ッ") == "n o q"
    assert words("ッ", "ー", "<笑>") == ""


def test_orthography_takes_the_written_alternative():
    orthography = "(K たち(F えー)ばな;橘)(A シーディー;ＣＤ)(W ぎーつ;技術)(M エス;Ｓ)"
    segment = segment_of("ア", orthography=orthography)
    assert resolved(segment)[0].text == "橘ＣＤ技術Ｓ"
    assert resolved(segment, pron="actual")[0].text == "橘ＣＤぎーつＳ"


def test_problems_of_the_orthography_are_not_fatal():
    segment = resolved(segment_of("ア", orthography="(Z 亜"))[0]
    assert segment.words == (("a",),) and not segment.problems
    assert all("a.sdb:1" in problem for problem in segment.text_problems) and segment.text_problems


@pytest.mark.parametrize(
    ("pronunciations", "location"),
    [
        (["ア", "(Z イ)"], "a.sdb:2: unknown tag (Z"),
        (["<ドア>"], "a.sdb:1: unknown event <ドア>"),
        (["ア)"], "a.sdb:1: unexpected ) outside"),
        (["ア;イ"], "a.sdb:1: unexpected ; outside"),
        (["ア", "(F イ", "ウ"], "a.sdb:2: the tag (F is never closed"),
        (["漢字"], "a.sdb:1: '漢'"),
    ],
)
def test_problems_name_file_and_line(pronunciations, location):
    assert words(*pronunciations).startswith(location)


# --- joining ----------------------------------------------------------------------------------------------


def spoken(*times: tuple[float, float], masked: tuple[int, ...] = (), channels: str = ""):
    return [
        speech.SpokenSegment(
            round(a * RATE),
            round(b * RATE),
            (("a",),),
            "あ",
            i in masked,
            (),
            channel=(channels or "L" * 99)[i],
        )
        for i, (a, b) in enumerate(times)
    ]


def joined(segments, **options) -> list[tuple[float, float]]:
    utterances = speech.join_segments(segments, speech.JoinOptions(**options))
    return [(u.start / RATE, u.end / RATE) for u in utterances]


def test_segments_are_joined_over_short_gaps_up_to_a_length():
    assert joined(spoken((0, 1), (1.5, 2), (2.501, 3))) == [(0, 2), (2.501, 3)]
    assert joined(spoken((0, 6), (6, 10), (10, 10.1))) == [(0, 10), (10, 10.1)]
    assert joined(spoken((0, 12), (12.1, 13))) == [(0, 12), (12.1, 13)]
    assert joined(spoken((0, 9), (9, 18)), join="kaldi") == [(0, 18)]
    assert joined(spoken((0, 9), (9, 19), (19, 20)), join="kaldi") == [(0, 19), (19, 20)]
    assert joined(spoken((0, 1), (2, 3)), max_gap=1, max_seconds=3) == [(0, 3)]


def test_masked_names_are_not_joined_except_with_kaldi():
    segments = spoken((0, 1), (1.2, 2), (2.2, 3), (3.2, 4), masked=(2,))
    assert joined(segments) == [(0, 2), (2.2, 3), (3.2, 4)]
    kaldi = speech.join_segments(segments, speech.JoinOptions(join="kaldi"))
    assert [utterance.masked for utterance in kaldi] == [True]
    with pytest.raises(ConfigError, match="max_seconds"):
        speech.JoinOptions(max_seconds=0)


def test_kaldi_does_not_join_across_the_other_channel():
    segments = spoken((0, 1), (0.5, 1.2), (1.1, 2), (2.1, 3), channels="LRLL")
    assert joined(segments) == [(0, 3), (0.5, 1.2)]
    assert joined(segments, join="kaldi") == [(0, 1), (0.5, 1.2), (1.1, 3)]


def test_events_neither_end_nor_bridge_nor_lengthen_an_utterance():
    """Segments without words are ignored. The first case has the times of a public sample."""

    def segments(*times: tuple[float, float, str]) -> list[tuple[float, float, str]]:
        spoken = [
            speech.SpokenSegment(round(a * RATE), round(b * RATE), (("a",),) if word else (), word, False, ())
            for a, b, word in times
        ]
        utterances = speech.join_segments(spoken, speech.JoinOptions())
        return [(u.start / RATE, u.end / RATE, u.text) for u in utterances]

    assert segments((665.796, 668.979, "x"), (665.817, 665.957, "")) == [
        (665.796, 668.979, "x"),
        (665.817, 665.957, ""),
    ]
    assert segments((0, 3, "x"), (1, 2, ""), (3.2, 4, "y")) == [(0, 4, "xy"), (1, 2, "")]
    assert segments((0, 1, "x"), (1.3, 1.6, ""), (1.9, 3, "y")) == [
        (0, 1, "x"),
        (1.3, 1.6, ""),
        (1.9, 3, "y"),
    ]
    assert segments((0, 1, "x"), (1.1, 1.3, ""), (1.4, 2, "y")) == [(0, 2, "xy"), (1.1, 1.3, "")]
    assert segments((0, 7, ""), (7.1, 12, "x"), (12.1, 15, "y")) == [(0, 7, ""), (7.1, 15, "xy")]


def joined_by_description(segments, join: str, max_gap: int, max_length: int):
    """Join segments with a reference implementation, and return the segment indices of each utterance.

    Segments without speech are ignored. A segment starts a new utterance if the gap after the previous speech
    of its channel is too long. With `kaldi`, it also does so if the utterance is already too long, or after
    speech in the other channel. With `strict`, it also does so if the utterance would become too long, or if
    the segment or the utterance is masked or has a problem.
    """
    utterances: list[list[int]] = []
    for i, (start, end, kind, channel) in enumerate(segments):
        if kind == "event":
            continue
        new = True
        candidates = utterances[-1:] if join == "kaldi" else utterances
        candidates = [candidate for candidate in candidates if segments[candidate[0]][3] == channel]
        if candidates:
            members = [segments[j] for j in candidates[-1]]
            first, reached = members[0][0], max(e for _, e, _, _ in members)
            new = start - reached > max_gap
            if join == "kaldi":
                new |= reached - first > max_length
            else:
                new |= max(reached, end) - first > max_length
                new |= any(k in ("mask", "problem") for _, _, k, _ in (*members, segments[i]))
        if new:
            utterances.append([i])
        else:
            candidates[-1].append(i)
    return utterances


def random_segments(rng: random.Random, kinds: tuple[str, ...], channels: str):
    """Draw (start, end, kind, channel) of segments, in milliseconds and sorted by start."""
    segments = []
    for channel in channels:
        now = 0
        for _ in range(rng.randint(1, 30)):
            kind, length = rng.choice(kinds), rng.choice((200, 1000, 3000, 11_000))
            inside = kind == "event" and now and rng.random() < 0.5  # in the previous segment
            start = (
                rng.randint(*segments[-1][:2]) if inside else now + rng.choice((0, 100, 499, 500, 501, 900))
            )
            segments.append((start, start + rng.randint(1, length), kind, channel))
            now = max(now, segments[-1][1])
    return sorted(segments, key=lambda segment: segment[0]) if len(channels) > 1 else segments


@pytest.mark.parametrize("join", ["strict", "kaldi"])
@pytest.mark.parametrize("channels", ["L", "LR"])
@pytest.mark.parametrize(
    "kinds",
    [("speech",), ("speech", "mask"), ("speech", "event"), ("speech", "speech", "mask", "event", "problem")],
)
def test_joining_matches_its_description_on_random_segments(join, channels, kinds):
    rng = random.Random(f"{join} {kinds}")
    options = speech.JoinOptions(join=join)
    for _ in range(1000 if channels == "L" else 300):
        segments = random_segments(rng, kinds, channels)
        spoken = [
            speech.SpokenSegment(
                start * 16,
                end * 16,
                ((str(i),),) if kind == "speech" else (),
                str(i),
                kind == "mask",
                ("broken",) if kind == "problem" else (),
                channel=channel,
            )
            for i, (start, end, kind, channel) in enumerate(segments)
        ]
        utterances = [u for u in speech.join_segments(spoken, options) if not u.event_only]
        expected = joined_by_description(segments, join, 500, 10_000)
        for utterance, members in zip(utterances, expected, strict=True):
            assert utterance.start == segments[members[0]][0] * 16
            assert utterance.end == max(segments[i][1] for i in members) * 16
            assert utterance.text == "".join(map(str, members))
            assert utterance.words == tuple((str(i),) for i in members if segments[i][2] == "speech")


def test_synthetic_words_contain_all_tags_and_events():
    for orthography, pronunciation, phones in WORDS:
        assert words(pronunciation, orthography=orthography) == phones
    everything = "".join(orthography + pronunciation for orthography, pronunciation, _ in WORDS) + "(R ×)"
    assert all(f"({tag} " in everything for tag in tags.TAGS)
    assert all(f"<{event}>" in everything or f"<{event}:" in everything for event in tags.EVENTS)
