"""Resolution of the tags in CSJ transcripts.

A tag is written `(NAME text)` or `(NAME one;other)`. Tags can be nested, and a tag can be closed in a later
word or segment than the one that opens it. An event is written `<NAME>` or `<NAME:detail>`. Tags and events
are resolved as follows:

| tag                            | pronunciation                         | orthography |
|--------------------------------|---------------------------------------|-------------|
| (F x) filler                   | x, or nothing with fillers=drop       | the same    |
| (D x) (D2 x) fragment, repair  | x, or nothing with fragments=drop     | the same    |
| (W x;y) slip, (B x;y) misread  | y with pron=canonical, x with actual  | the same    |
| (A x;y) Latin and numbers      | x                                     | y           |
| (K x;y) kanji broken by a tag  | x                                     | y           |
| (? x) (? x,y) uncertain        | x; the empty (?) is nothing           | the same    |
| (M x) (M x;y) metalinguistic   | x                                     | x; y if any |
| (O x) (X x) (L x)              | x                                     | the same    |
| (笑 x) (泣 x) (咳 x)           | x                                     | the same    |
| (R x) masked name, and ×       | the utterance is rejected             | the same    |
| <H> lengthened vowel           | nothing; `ー` with pron=actual        | nothing     |
| <VN> hum like うん             | nothing; ウン with actual and in (F)  | nothing     |
| <Q> <FV> <P:..> <笑> and noise | nothing                               | nothing     |

`;` belongs to the innermost enclosing tag W, B, A or K or, if there is none, to the innermost M, and `,` to
the innermost `?`, even inside other nested tags: `(W コ(L デ;ココデ))` is a slip for ココデ. If there is only
one alternative, it is used. The tags are described in the manuals of the corpus (NINJAL). Kaldi and ESPnet
use pron=canonical.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Side = Literal["pronunciation", "orthography"]
KEPT = ("M", "O", "X", "L", "笑", "泣", "咳")
FILLER, FRAGMENTS, MASK, UNCERTAIN, METALINGUISTIC = "F", ("D", "D2"), "R", "?", "M"
SLIPS, SPELLINGS = ("W", "B"), ("A", "K")
TAGS = (FILLER, *FRAGMENTS, MASK, UNCERTAIN, *SLIPS, *SPELLINGS, *KEPT)
SOUNDS = {"H": "ー", "VN": "ウン"}  # events whose sounds are spelled out with pron=actual
# The name of a pause is followed by times, and in dialogues includes the channel: <P:..>, <PL:..>, <PR:..>.
EVENTS = (
    *SOUNDS,
    *("Q", "FV", "P", "PL", "PR", "笑", "咳", "息", "泣", "拍手", "雑音"),
    *("フロア発話", "フロア笑", "デモ", "ベル", "朗読間違い"),
)
# Each separator with the tags whose alternatives it separates, in search order.
_SEPARATES = {";": ((*SLIPS, *SPELLINGS), (METALINGUISTIC,)), ",": ((UNCERTAIN,),)}
_TOKEN = re.compile(
    # A mask may follow its tag without a space: (R×××), (F×××).
    r"\((?P<tag>[^\s()<>;,×]*)\s?|<(?P<event>[^<>()]*)>|(?P<mark>[();,<>])|(?P<text>[^();,<>]+)"
)


@dataclass(frozen=True)
class TagOptions:
    pron: Literal["canonical", "actual"] = "canonical"  # intended or actual pronunciation of slips and events
    fillers: Literal["keep", "drop"] = "keep"
    fragments: Literal["keep", "drop"] = "keep"


@dataclass
class Resolved:
    """Result of resolving tags."""

    texts: list[str]  # the text of each word without tags
    masked: set[int] = field(default_factory=set)  # indices of masked words
    problems: list[tuple[int, str]] = field(default_factory=list)  # (index of the word, description)


def resolve_tags(texts: Sequence[str], segment_N: Sequence[int], options: TagOptions, side: Side) -> Resolved:
    """Resolve the tags on one side of a channel's transcript.

    Args:
        texts: the words with their tags.
        segment_N: the segment of each word. A tag that is never closed affects only the rest of its segment.
        options: options that select between alternatives.
        side: the column of the transcript from which the words come.
    """
    result = Resolved([""] * len(texts))
    start = 0
    while start < len(texts):
        parser = _Parser(options, side)
        for word in range(start, len(texts)):
            parser.feed(word, texts[word])
        end = len(texts)
        if (unclosed := parser.unclosed()) is not None:
            result.problems.append((unclosed.word, f"the tag ({unclosed.name} is never closed"))
            end = next(
                (i for i in range(unclosed.word, end) if segment_N[i] != segment_N[unclosed.word]), end
            )
        for word, text in parser.pieces():
            result.texts[word] += text
        result.masked |= {word for word in parser.masked if word < end}
        result.problems += [problem for problem in parser.problems if problem[0] < end]
        start = end
    return result


@dataclass
class _Tag:
    """An open tag."""

    name: str
    word: int  # index of the word that opens the tag
    # The pieces of text in each alternative so far, as (index of the word, text).
    alternatives: list[list[tuple[int, str]]] = field(default_factory=lambda: [[]])


class _Parser:
    """Incremental parser that assigns each piece of text to its word, even if a later word closes the tag."""

    def __init__(self, options: TagOptions, side: Side):
        self.options, self.side = options, side
        self.masked: set[int] = set()
        self.problems: list[tuple[int, str]] = []
        self._stack = [_Tag("", 0)]

    def unclosed(self) -> _Tag | None:
        """Return the outermost open tag, or None."""
        return self._stack[1] if len(self._stack) > 1 else None

    def pieces(self) -> list[tuple[int, str]]:
        """Return the resolved text outside open tags, as (index of the word, text)."""
        return self._stack[0].alternatives[0]

    def feed(self, word: int, text: str) -> None:
        self._check_mask(word, text)
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

    def _check_mask(self, word: int, text: str) -> None:
        if "×" in text or any(tag.name == MASK for tag in self._stack):
            self.masked.add(word)

    def _add(self, word: int, text: str) -> None:
        self._stack[-1].alternatives[-1].append((word, "".join(text.split())))

    def _open(self, word: int, name: str) -> None:
        content = ""
        if name.startswith(UNCERTAIN):  # (? x) may also be written (?x)
            name, content = UNCERTAIN, name[1:]
        if name not in TAGS:
            self.problems.append((word, f"unknown tag ({name}; known tags: {' '.join(TAGS)}"))
        self._stack.append(_Tag(name, word))
        self._check_mask(word, content)
        self._add(word, content)

    def _mark(self, word: int, mark: str) -> None:
        if mark == ")" and len(self._stack) > 1:
            tag = self._stack.pop()
            self._stack[-1].alternatives[-1] += self._chosen(tag)
        elif not any(self._split(names) for names in _SEPARATES.get(mark, ())):
            self.problems.append((word, f"unexpected {mark} outside of a tag that allows it"))

    def _split(self, names: Sequence[str]) -> bool:
        """Start the next alternative of the innermost open tag in `names`; return False if there is none."""
        depth = next((i for i in range(len(self._stack) - 1, 0, -1) if self._stack[i].name in names), None)
        if depth is None:
            return False
        # The content of nested tags up to this point belongs to the alternative that ends here.
        for i in range(len(self._stack) - 1, depth, -1):
            inner = self._stack[i]
            self._stack[i - 1].alternatives[-1] += self._chosen(inner)
            inner.alternatives = [[]]
        self._stack[depth].alternatives.append([])
        return True

    def _chosen(self, tag: _Tag) -> list[tuple[int, str]]:
        if tag.name == FILLER and self.options.fillers == "drop":
            return []
        if tag.name in FRAGMENTS and self.options.fragments == "drop":
            return []
        if tag.name in SLIPS:
            second = self.options.pron == "canonical"
        else:
            second = tag.name in (*SPELLINGS, METALINGUISTIC) and self.side == "orthography"
        return tag.alternatives[min(int(second), len(tag.alternatives) - 1)]

    def _event(self, word: int, event: str) -> None:
        name = event.partition(":")[0]
        if name not in EVENTS:
            self.problems.append((word, f"unknown event <{event}>; known events: {' '.join(EVENTS)}"))
            return
        # A filler that is pronounced as a hum, (F <VN>) for (F うん), is always spelled out.
        hummed_filler = name == "VN" and any(tag.name == FILLER for tag in self._stack)
        spelled = name in SOUNDS and (self.options.pron == "actual" or hummed_filler)
        if spelled and self.side == "pronunciation":
            self._add(word, SOUNDS[name])
