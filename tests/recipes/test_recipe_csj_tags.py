"""Tags of CSJ with every option, words over several of them, and the joining of segments."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from fixtures.csj_tree import RATE, WORDS

from jahubert.errors import ConfigError
from jahubert.train.experiment.registry import resolve

RECIPE = Path(__file__).parents[2] / "recipes" / "csj" / "prepare.py"
resolve(f"{RECIPE}:prepare", {}, "recipe")  # which loads what stands beside it
speech, tags, transcripts = (sys.modules[f"csj_{name}"] for name in ("speech", "tags", "transcripts"))


# --- tags -------------------------------------------------------------------------------------------------


def words(*said: str, written: str = "", **options) -> str:
    """The words of a segment as one string, `|` between them; or the first problem, or `masked`."""
    segment = transcripts.Segment(
        0, RATE, "L", [transcripts.Word(i + 1, written, s) for i, s in enumerate(said)]
    )
    found = speech.speech_of([segment], Path("a.sdb"), tags.Options(**options))[0]
    return "masked" if found.masked else found.problems[0] if found.problems else show(found.words)


def show(words) -> str:
    return " | ".join(" ".join(word) for word in words)


ACTUAL, NO_FILLERS, NO_FRAGMENTS = {"pron": "actual"}, {"fillers": "drop"}, {"fragments": "drop"}


@pytest.mark.parametrize(
    ("said", "canonical", "others"),
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
        ("ンー", "N", []),
        ("ヴァイ・オリン", "b a i o r i N", []),
    ],
)  # fmt: skip
def test_each_tag_for_each_option(said, canonical, others):
    assert words(said) == canonical
    for options, phones in others:
        assert words(said, **options) == phones


def test_tags_reach_over_words_and_segments():
    assert words("(F エ", "エット)", "ハイ") == "e | e q t o | h a i"
    assert words("(F エ", "エット)", "ハイ", fillers="drop") == "h a i"
    # A piece stays with the word that it stands in.
    assert words("(W コイ", "ショ;コレ", "デショ)", pron="actual") == "k o i | sh o"
    assert words("(W コイ", "ショ;コレ", "デショ)") == "k o r e | d e sh o"
    pieces = [("(R ×", "L"), ("", "L"), ("×)サン", "L"), ("ハイ", "L")]
    segments = [
        transcripts.Segment(i, i + 1, channel, [transcripts.Word(i, "", said)])
        for i, (said, channel) in enumerate(pieces)
    ]
    found = speech.speech_of(segments, Path("a"), tags.Options())
    assert [piece.masked for piece in found] == [True, True, True, False]


def test_a_long_vowel_alone_belongs_to_the_word_before():
    assert words("イコ", "ー") == "i k o:"
    assert words("デショ", "ーネ") == "d e sh o: n e"
    assert words("マ", "ッ") == "m a q"
    assert words("ーノ", "ッ") == "n o q"
    assert words("ッ", "ー", "<笑>") == ""


def test_the_orthography_has_the_written_alternative():
    word = transcripts.Word(1, "(K たち(F えー)ばな;橘)(A シーディー;ＣＤ)(W ぎーつ;技術)", "ア")
    segment = transcripts.Segment(0, 1, "L", [word])
    assert speech.speech_of([segment], Path("a"), tags.Options())[0].text == "橘ＣＤ技術"
    assert speech.speech_of([segment], Path("a"), tags.Options(pron="actual"))[0].text == "橘ＣＤぎーつ"


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (["ア", "(Z イ)"], "a.sdb:2: unknown tag (Z; the known ones are F D"),
        (["<ドア>"], "a.sdb:1: unknown tag <ドア>; the known ones are H VN"),
        (["ア)"], "a.sdb:1: a ) that belongs to no tag"),
        (["ア;イ"], "a.sdb:1: a ; that belongs to no tag"),
        (["ア", "(F イ", "ウ"], "a.sdb:2: the tag (F is never closed"),
        (["漢字"], "a.sdb:1: no reading for '漢'"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(said, says):
    assert words(*said).startswith(says)


# --- joining ----------------------------------------------------------------------------------------------


def pieces(*times: tuple[float, float], masked: tuple[int, ...] = ()):
    return [
        speech.Spoken(round(a * RATE), round(b * RATE), (("a",),), "あ", i in masked, ())
        for i, (a, b) in enumerate(times)
    ]


def joined(found, **options) -> list[tuple[float, float]]:
    return [(p.start / RATE, p.end / RATE) for p in speech.join(found, speech.Joining(**options))]


def test_segments_are_joined_over_short_gaps_up_to_the_longest():
    assert joined(pieces((0, 1), (1.5, 2), (2.501, 3))) == [(0, 2), (2.501, 3)]
    assert joined(pieces((0, 6), (6, 10), (10, 10.1))) == [(0, 10), (10, 10.1)]
    assert joined(pieces((0, 12), (12.1, 13))) == [(0, 12), (12.1, 13)]
    assert joined(pieces((0, 9), (9, 18)), join="kaldi") == [(0, 18)]
    assert joined(pieces((0, 9), (9, 19), (19, 20)), join="kaldi") == [(0, 19), (19, 20)]
    assert joined(pieces((0, 1), (2, 3)), max_gap=1, max_seconds=3) == [(0, 3)]


def test_masked_names_take_only_themselves_unless_asked_otherwise():
    found = pieces((0, 1), (1.2, 2), (2.2, 3), (3.2, 4), masked=(2,))
    assert joined(found) == [(0, 2), (2.2, 3), (3.2, 4)]
    assert [piece.masked for piece in speech.join(found, speech.Joining(join="kaldi"))] == [True]
    with pytest.raises(ConfigError, match="max_seconds above 0"):
        speech.Joining(max_seconds=0)


def test_events_neither_end_nor_bridge_nor_lengthen_an_utterance():
    """Segments without words; the first one has the times of a public sample."""

    def segments(*times: tuple[float, float, str]) -> list[tuple[float, float, str]]:
        spoken = [
            speech.Spoken(round(a * RATE), round(b * RATE), (("a",),) if word else (), word, False, ())
            for a, b, word in times
        ]
        return [(p.start / RATE, p.end / RATE, p.text) for p in speech.join(spoken, speech.Joining())]

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
    """The joining rule written from its description, independently of the recipe; returns lists of indices.

    Only segments with something spoken count. Such a segment starts a new utterance if its distance to the
    end of speech so far exceeds the gap, or if the utterance is too long: with kaldi, before the segment is
    added, otherwise with it. Except with kaldi, masked segments and segments with problems stay alone.
    """
    utterances: list[list[int]] = []
    for i, (start, end, kind) in enumerate(segments):
        if kind == "event":
            continue
        new = True
        if utterances:
            members = [segments[j] for j in utterances[-1]]
            first, reached = members[0][0], max(e for _, e, _ in members)
            new = start - reached > max_gap
            if join == "kaldi":
                new |= reached - first > max_length
            else:
                new |= max(reached, end) - first > max_length
                new |= any(k in ("mask", "problem") for _, _, k in (*members, segments[i]))
        if new:
            utterances.append([])
        utterances[-1].append(i)
    return utterances


@pytest.mark.parametrize("join", ["strict", "kaldi"])
@pytest.mark.parametrize(
    "kinds",
    [("speech",), ("speech", "mask"), ("speech", "event"), ("speech", "speech", "mask", "event", "problem")],
)
def test_joining_matches_its_description_on_random_segments(join, kinds):
    rng = random.Random(f"{join} {kinds}")
    options = speech.Joining(join=join)
    for _ in range(1000):
        now, segments = 0, []
        for _ in range(rng.randint(1, 30)):
            kind, length = rng.choice(kinds), rng.choice((200, 1000, 3000, 11_000))
            inside = kind == "event" and segments and rng.random() < 0.5  # within the segment before
            start = (
                rng.randint(*segments[-1][:2]) if inside else now + rng.choice((0, 100, 499, 500, 501, 900))
            )
            segments.append((start, start + rng.randint(1, length), kind))
            now = max(now, segments[-1][1])
        spoken = [
            speech.Spoken(
                start * 16,
                end * 16,
                ((str(i),),) if kind == "speech" else (),
                str(i),
                kind == "mask",
                ("broken",) if kind == "problem" else (),
            )
            for i, (start, end, kind) in enumerate(segments)
        ]
        found = [u for u in speech.join(spoken, options) if not u.event_only]
        expected = joined_by_description(segments, join, 500, 10_000)
        for utterance, members in zip(found, expected, strict=True):
            assert utterance.start == segments[members[0]][0] * 16
            assert utterance.end == max(segments[i][1] for i in members) * 16
            assert utterance.text == "".join(map(str, members))
            assert utterance.words == tuple((str(i),) for i in members if segments[i][2] == "speech")


def test_the_vocabulary_of_the_tree_is_what_the_recipe_reads():
    for written, said, phones in WORDS:
        assert words(said, written=written) == phones
    # And it has every tag and event that the recipe knows.
    everything = "".join(written + said for written, said, _ in WORDS) + "(R ×)"
    assert all(f"({tag} " in everything for tag in tags.TAGS)
    assert all(f"<{event}>" in everything or f"<{event}:" in everything for event in tags.EVENTS)
