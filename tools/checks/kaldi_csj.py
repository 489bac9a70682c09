"""Comparison of the csj recipe with Kaldi's scripts on synthetic transcripts.

    python tools/checks/kaldi_csj.py /path/to/kaldi

The transcripts are random SDB files in the format of the corpus. Kaldi's scripts (egs/csj/s5) are run
unchanged from the given checkout, which is not part of this repository, and require perl and nkf or iconv. If
the utterances of the csj recipe with `join=kaldi` do not have the same times and phones as Kaldi's, the exit
status is 1. Words to which Kaldi's conventions assign other phones are in a separate row and do not affect
the exit status.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from jahubert.train.data.manifest import Utterance
from jahubert.train.experiment.registry import resolve

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = Path("egs", "csj", "s5", "local", "csj_make_trans")
TALKS, SEGMENTS = 8, 119
# Orthography and pronunciation of words. An underscore stands for a space inside a tag.
PLAIN = """
今日 キョー|は ワ|切手 キッテ|本 ホン|新聞 シンブン|時期 ジキ|人 ヒト|日本 ニホン|三つ ミッツ|義理 ギリ
地図 チズ|指 ユビ|社長 シャチョー|百 ヒャク|ファン ファン|続く ツズク|髙い タカイ"""
TAGGED = """
(F_えー) (F_エー)|(F_んー) (F_ンー)|(D_だ) (D_ダ)|(D2_が) (D2_ガ)|(?_字数) (?_ジスー)|(M_は) (M_ワ)
(O_ザッツ) (O_ザッツ)|(X_あの) (X_アノ)|(A_アイビーエム;ＩＢＭ) アイビーエム|(A_ニジュー;２０) ニジュー
(笑_はい) (笑_ハイ)|(泣_はい) (泣_ハイ)|(咳_はい) (咳_ハイ)|(L_そう) (L_ソー)|それ<Q> ソ<Q>レ|はい <H>ハイ<H>
技術 (W_ギーツ;ギジュツ)|正 (B_ゴ;セイ)|ちゃんと (W_チャト;チャント)<H>|です デ<P:00012.345-00012.678>ス
はい<笑> ハイ<笑><咳><息><泣>|ここで (W_コ(L_デ;ココデ))|そう (W_(笑_ソ;ソー))
(K_たち(F_えー)ばな;橘) タチ(F_エー)バナ"""
# Words to which Kaldi's conventions assign other phones than the csj recipe (see recipes/csj/README.md).
CONVENTIONS = "\n亜 (?_ア,イ)|う ー|クヮ クヮ|(F_うん) (F_<VN>)"
MASKS = "\n(R_××) (R_××)|(R×××××) (R×××××)|(F×××) (F×××)|×さん ×サン"
EVENTS = ["<雑音>", "<拍手>", "<咳>", "<笑>", "<フロア発話>"]
WORDS = {"tags": PLAIN + TAGGED, "other conventions": PLAIN + CONVENTIONS}
KINDS = ("plain", "masks", "events", "events inside speech", "dialogues", *WORDS)


def word_list(text: str) -> list[tuple[str, str]]:
    """Return (orthography, pronunciation) of each word in one of the lists above."""
    words = [word.split() for word in re.split(r"[|\n]", text) if word]
    return [(one.replace("_", " "), other.replace("_", " ")) for one, other in words]


@dataclass(frozen=True)
class Line:
    """A word in a transcript, or an event, which has no part of speech."""

    start: int  # start in milliseconds
    end: int
    channel: str
    orthography: str
    pronunciation: str

    @property
    def is_event(self) -> bool:
        return self.orthography in EVENTS


def random_segments(kind: str, rng: random.Random) -> list[list[Line]]:
    """Draw the segments of a talk, sorted by start."""
    pool, masks = word_list(WORDS.get(kind, PLAIN)), word_list(MASKS)
    segments = []
    for channel in "LR" if kind == "dialogues" else "L":
        now = rng.randint(0, 2000)
        for _ in range(SEGMENTS if kind != "dialogues" else SEGMENTS // 2):
            end = now + rng.randint(150, 5000)
            words = [rng.choice(pool) for _ in range(rng.randint(1, 8))]
            if kind == "masks" and rng.random() < 0.15:
                words.insert(rng.randint(0, len(words)), rng.choice(masks))
            if kind == "events" and rng.random() < 0.3:
                words = [(event, event) for event in rng.sample(EVENTS, rng.randint(1, 2))]
                end = now + rng.choice((60, 500, 7000))
            segments.append([Line(now, end, channel, *word) for word in words])
            if kind == "events inside speech" and rng.random() < 0.4 and end - now > 140:
                first = rng.randint(now + 1, end - 130)
                event = rng.choice(EVENTS)
                segments.append([Line(first, first + rng.randint(20, 120), channel, event, event)])
            now = end + rng.choice((rng.randint(200, 700), rng.randint(200, 3000)))
    return sorted(segments, key=lambda segment: segment[0].start)


def write_sdb(path: Path, segments: list[list[Line]]) -> None:
    rows = []
    for number, segment in enumerate(segments, 1):
        for index, line in enumerate(segment, 1):
            times = f"{line.start / 1000:09.3f}-{line.end / 1000:09.3f}"
            time = f"{number:04d} {times} {line.channel}:-001-{index:03d}"
            # The second orthography column has no tags.
            plain = re.sub(r"\([^ ]* |[^;]*;|[)<>A-Za-z:.0-9-]", "", line.orthography)
            columns = ["0", "0", path.stem, time, "", line.orthography, "", "", "", plain]
            columns += [line.pronunciation, *([""] * 6 if line.is_event else ["名詞", "", "", "", "", ""])]
            rows.append("\t".join(columns) + "\r\n")
    path.write_bytes("".join(rows).encode("cp932"))


Spoken = tuple[float, float, tuple[tuple[str, ...], ...]]  # start and end (seconds), phones of each word


def kaldi_utterances(sdb: Path, scripts: Path, env: dict[str, str]) -> Iterator[Spoken]:
    """Yield the utterances that Kaldi's scripts create from a transcript."""
    lexicon, words, phones = (sdb.with_suffix(suffix) for suffix in (".4lex", ".4trn", ".phones"))

    def perl(script: str, *arguments: object) -> str:
        command = ["perl", str(scripts / script), *map(str, arguments)]
        return subprocess.run(command, env=env, check=True, capture_output=True, encoding="utf-8").stdout

    perl("csj2kaldi4m.pl", sdb, lexicon, words)
    connected = perl("csjconnect.pl", "0.5", "10", words, sdb.stem)
    perl("vocab2dic.pl", "-p", scripts / "kana2phone", "-e", sdb.with_suffix(".error"), "-o", phones, lexicon)
    pronunciations = [line.split("\t")[2].split() for line in phones.read_text("utf-8").splitlines()]
    first_word: dict[str, int] = {}
    for row, line in enumerate(words.read_text("utf-8").splitlines()):
        first_word.setdefault(line.split()[0], row)
    for line in connected.splitlines():
        name, start, end, *tokens = line.split()
        row = first_word[name.rpartition("_")[2]]
        n_words = sum(token not in ("<s>", "<sp>", "</s>") for token in tokens)
        yield float(start), float(end), tuple(map(tuple, pronunciations[row : row + n_words]))


def our_utterances(sdb: Path, audio: Path) -> Iterator[Spoken]:
    """Yield the utterances that the csj recipe creates from a transcript."""
    resolve(f"{REPO / 'recipes' / 'csj' / 'prepare.py'}:prepare", {}, "recipe")
    files, talks = sys.modules["csj_files"], sys.modules["csj_talks"]
    channels = dict.fromkeys("LR" if sdb.stem.startswith("D") else ("",), audio)
    talk: Any = files.Talk(sdb.stem, channels, {"sdb": sdb})
    for item in talks.read_talk(talk, sdb.parent, talks.TalkOptions(join="kaldi")):
        if isinstance(item, Utterance):
            yield item.start / 16_000, (item.start + item.n_samples) / 16_000, item.words


def compare(kind: str, scripts: Path, folder: Path, env: dict[str, str]) -> tuple[Counter[str], list[str]]:
    """Count the utterances of Kaldi and of the csj recipe and those that agree, and list the differences."""
    counts: Counter[str] = Counter()
    differences = []
    for number in range(TALKS):
        rng = random.Random(f"{kind} {number}")
        segments = random_segments(kind, rng)
        sdb = folder / f"{'D' if kind == 'dialogues' else 'A'}01F{number:04d}.sdb"
        write_sdb(sdb, segments)
        audio = folder / "silence.flac"
        soundfile.write(audio, np.zeros((segments[-1][0].end + 20_000) * 16, np.int16), 16_000)
        theirs = sorted(kaldi_utterances(sdb, scripts, env))
        ours = sorted(our_utterances(sdb, audio))
        equal = set(theirs) & set(ours)
        counts.update(kaldi=len(theirs), jahubert=len(ours), equal=len(equal))
        times = {item[:2] for item in theirs} & {item[:2] for item in ours}
        counts["times"] += len(times)
        differences += [
            f"{sdb.stem}: Kaldi {one}, jahubert {other}"
            for one, other in zip_longest(
                (item for item in theirs if item not in equal), (item for item in ours if item not in equal)
            )
        ]
    return counts, differences


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kaldi", type=Path, help="a checkout of Kaldi")
    parser.add_argument("--differences", type=int, default=0, help="number of differences to print per kind")
    args = parser.parse_args()
    scripts = args.kaldi / SCRIPTS
    if not (scripts / "csjconnect.pl").is_file():
        parser.error(f"{scripts}: no csjconnect.pl; give the path of a checkout of Kaldi")
    n_different = 0
    print("| segments | Kaldi | jahubert | same times | same times and phones |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        env = dict(os.environ)
        if shutil.which("nkf") is None:  # it is replaced by a script that runs iconv
            nkf = Path(name, "nkf")
            nkf.write_text('#!/bin/sh\niconv -f CP932 -t UTF-8 "$3" | tr -d "\\r"\n')
            nkf.chmod(0o755)
            env["PATH"] = f"{name}:{env['PATH']}"
        for kind in KINDS:
            folder = Path(name, kind.replace(" ", "-"))
            folder.mkdir()
            counts, differences = compare(kind, scripts, folder, env)
            figures = " | ".join(str(counts[name]) for name in ("kaldi", "jahubert", "times", "equal"))
            print(f"| {kind} | {figures} |")
            n_different += len(differences) * (kind != "other conventions")
            for difference in differences[: args.differences]:
                print(difference)
    return int(n_different > 0)


if __name__ == "__main__":
    sys.exit(main())
