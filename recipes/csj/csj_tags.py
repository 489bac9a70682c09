"""Tags of a CSJ transcript: what each of them means, and the text without them.

A tag is `(NAME text)` or `(NAME one;other)`; tags nest, and may open in one word and close in a later one,
even in a later segment. An event is `<NAME>` or `<NAME:detail>`. What becomes of them:

| tag                            | pronunciation                         | orthography |
|--------------------------------|---------------------------------------|-------------|
| (F x) filler                   | x, or nothing with fillers=drop       | the same    |
| (D x) (D2 x) fragment, repair  | x, or nothing with fragments=drop     | the same    |
| (W x;y) slip, (B x;y) misread  | y with pron=canonical, x with actual  | the same    |
| (A x;y) Latin and numbers      | x                                     | y           |
| (K x;y) kanji broken by a tag  | x                                     | y           |
| (? x) (? x,y) uncertain        | x; the empty (?) is nothing           | the same    |
| (M x) (O x) (X x) (L x)        | x                                     | the same    |
| (笑 x) (泣 x) (咳 x)           | x                                     | the same    |
| (R x) masked name, and ×       | the utterance cannot be used          | the same    |
| <H> a vowel drawn out          | nothing; `ー` with pron=actual        | nothing     |
| <VN> a hum like うん           | nothing; ウン with pron=actual        | nothing     |
| <Q> <FV> <P:..> <笑> and noise | nothing                               | nothing     |

Where an alternative is missing, the one that is there is taken. Source of the tags: the manuals of the
corpus (NINJAL); pron=canonical is what Kaldi and ESPnet train on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

Side = Literal["pronunciation", "orthography"]
KEPT = ("M", "O", "X", "L", "笑", "泣", "咳")
FILLER, FRAGMENTS, MASK, UNCERTAIN = "F", ("D", "D2"), "R", "?"
SLIPS, SPELLINGS = ("W", "B"), ("A", "K")
TAGS = (FILLER, *FRAGMENTS, MASK, UNCERTAIN, *SLIPS, *SPELLINGS, *KEPT)
SOUNDS = {"H": "ー", "VN": "ウン"}  # events that pron=actual spells
# A pause names its times, and in dialogues its channel: <P:..>, <PL:..>, <PR:..>.
EVENTS = (
    *SOUNDS,
    *("Q", "FV", "P", "PL", "PR", "笑", "咳", "息", "泣", "拍手", "雑音"),
    *("フロア発話", "フロア笑", "デモ", "ベル", "朗読間違い"),
)
_TOKEN = re.compile(
    # A mask may follow its tag without a blank: (R×××), (F×××).
    r"\((?P<tag>[^\s()<>;,×]*)\s?|<(?P<event>[^<>()]*)>|(?P<mark>[();,<>])|(?P<text>[^();,<>]+)"
)


@dataclass(frozen=True)
class Options:
    pron: Literal["canonical", "actual"] = "canonical"  # what was meant, or what was said
    fillers: Literal["keep", "drop"] = "keep"
    fragments: Literal["keep", "drop"] = "keep"


@dataclass
class _Open:
    """A tag that is not closed yet: its alternatives, each as pieces of text and the words they belong to."""

    name: str
    word: int
    alternatives: list[list[tuple[int, str]]] = field(default_factory=lambda: [[]])


class Untagged:
    """One side of a talk's transcript, fed word by word; afterwards its text without tags.

    A piece of text stays with the word that it was written in, whichever word closes its tag.
    """

    def __init__(self, options: Options, side: Side):
        self.options, self.side = options, side
        self.masked: set[int] = set()  # words that a masked name reaches into
        self.problems: list[tuple[int, str]] = []  # (word, what is wrong with it)
        self._stack = [_Open("", 0)]
        self._last = -1

    def feed(self, word: int, text: str) -> None:
        """The text of the next word, with its tags; words are numbered upwards from 0."""
        self._last = word
        self._mask(word, text)
        for token in _TOKEN.finditer(text):
            kind = token.lastgroup
            if kind == "tag":
                self._open(word, token["tag"])
            elif kind == "event":
                self._event(word, token["event"])
            elif kind == "mark":
                self._mark(word, token["mark"])
            else:
                self._add(word, token["text"])

    def texts(self) -> list[str]:
        """The text of each word that was fed; call it once, at the end of the talk.

        What an unclosed tag holds is lost: every word from its opening on is a problem.
        """
        if len(self._stack) > 1:
            first = self._stack[1]
            self.problems.append((first.word, f"the tag ({first.name} is never closed"))
            for word in range(first.word + 1, self._last + 1):
                self.problems.append((word, f"inside the tag ({first.name} that is never closed"))
        texts = [""] * (self._last + 1)
        for word, text in self._stack[0].alternatives[0]:
            texts[word] += text
        return texts

    def _mask(self, word: int, text: str) -> None:
        if "×" in text or any(tag.name == MASK for tag in self._stack):
            self.masked.add(word)

    def _add(self, word: int, text: str) -> None:
        self._stack[-1].alternatives[-1].append((word, "".join(text.split())))

    def _open(self, word: int, name: str) -> None:
        content = ""
        if name.startswith(UNCERTAIN):  # the only tag that may stand without a space
            name, content = UNCERTAIN, name[1:]
        if name not in TAGS:
            self.problems.append((word, f"unknown tag ({name}; the known ones are {' '.join(TAGS)}"))
        self._stack.append(_Open(name, word))
        self._mask(word, content)
        self._add(word, content)

    def _mark(self, word: int, mark: str) -> None:
        tag = self._stack[-1]
        if mark == ")" and len(self._stack) > 1:
            self._stack.pop()
            self._stack[-1].alternatives[-1] += self._chosen(tag)
        elif (mark == ";" and tag.name in SLIPS + SPELLINGS) or (mark == "," and tag.name == UNCERTAIN):
            tag.alternatives.append([])
        else:
            self.problems.append((word, f"a {mark} that belongs to no tag"))

    def _chosen(self, tag: _Open) -> list[tuple[int, str]]:
        options = self.options
        if (tag.name == FILLER and options.fillers == "drop") or (
            tag.name in FRAGMENTS and options.fragments == "drop"
        ):
            return []
        second = (tag.name in SLIPS and options.pron == "canonical") or (
            tag.name in SPELLINGS and self.side == "orthography"
        )
        return tag.alternatives[min(int(second), len(tag.alternatives) - 1)]

    def _event(self, word: int, event: str) -> None:
        name = event.partition(":")[0]
        if name not in EVENTS:
            self.problems.append((word, f"unknown tag <{event}>; the known ones are {' '.join(EVENTS)}"))
        elif name in SOUNDS and self.side == "pronunciation" and self.options.pron == "actual":
            self._add(word, SOUNDS[name])
