"""Japanese phones: inventory, conversion between kana and phones, and symbol sets for CTC heads.

The 40 phones are those of Kaldi's CSJ recipe and of Julius: short and long vowels, the moraic nasal `N`, `q`
for the first half of a geminate, and consonants. A palatalized consonant (`ky`) is a single phone. Long
vowels must be written with `ー`, because `オオ` becomes `o o`. `normalize_kana` converts orthographic
readings such as `せんせい` to pronunciations such as `センセー`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

from jahubert.errors import DataError, quote

VOWELS = ("a", "i", "u", "e", "o")
_CONSONANTS = "w y j my ky dy by gy ny hy ry py p t k ts ch b d g z m n s sh h f r"
PHONES: tuple[str, ...] = (*VOWELS, *(vowel + ":" for vowel in VOWELS), "N", "q", *_CONSONANTS.split())
BOUNDARY = "|"
BLANK = "<blank>"

# Spelling of each consonant before a, i, u, e and o. `phones_to_kana` uses the whole table, so that it can
# spell every output of a recognizer. `kana_to_phones` uses only the entries that are a single kana.
# `_single_kana` replaces the entry of ヂ and adds the kana that are not in the table; `_syllable` handles
# combinations with small kana.
_SPELLING = {
    "": "ア イ ウ エ オ",
    "k": "カ キ ク ケ コ",
    "g": "ガ ギ グ ゲ ゴ",
    "s": "サ スィ ス セ ソ",
    "z": "ザ ズィ ズ ゼ ゾ",
    "t": "タ ティ トゥ テ ト",
    "d": "ダ ディ ドゥ デ ド",
    "n": "ナ ニ ヌ ネ ノ",
    "h": "ハ ヒ ホゥ ヘ ホ",
    "b": "バ ビ ブ ベ ボ",
    "p": "パ ピ プ ペ ポ",
    "m": "マ ミ ム メ モ",
    "y": "ヤ ユィ ユ ユェ ヨ",
    "r": "ラ リ ル レ ロ",
    "w": "ワ ウィ ワゥ ウェ ウォ",
    "f": "ファ フィ フ フェ フォ",
    "sh": "シャ シ シュ シェ ショ",
    "j": "ジャ ジ ジュ ジェ ジョ",
    "ch": "チャ チ チュ チェ チョ",
    "ts": "ツァ ツィ ツ ツェ ツォ",
    "dy": "ヂャ ヂ ヂュ ヂェ ヂョ",
    "ky": "キャ キ キュ キェ キョ",
    "gy": "ギャ ギ ギュ ギェ ギョ",
    "ny": "ニャ ニ ニュ ニェ ニョ",
    "hy": "ヒャ ヒ ヒュ ヒェ ヒョ",
    "by": "ビャ ビ ビュ ビェ ビョ",
    "py": "ピャ ピ ピュ ピェ ピョ",
    "my": "ミャ ミ ミュ ミェ ミョ",
    "ry": "リャ リ リュ リェ リョ",
}
_WRITE = {(c, v): kana for c, row in _SPELLING.items() for v, kana in zip(VOWELS, row.split(), strict=True)}

# All kana that `phones_to_kana` can output.
KANA: tuple[str, ...] = tuple(sorted({*"".join(_WRITE.values()), *"ンッー"}))

_SMALL = {"ァ": "a", "ィ": "i", "ゥ": "u", "ェ": "e", "ォ": "o", "ヮ": "a"}
_SMALL_Y = {"ャ": "a", "ュ": "u", "ョ": "o"}
# Consonant -> its form before a small ャ, ュ or ョ, where that form is not the consonant with an added y.
_BEFORE_Y = {"f": "hy", "s": "sh", "z": "j", "sh": "sh", "j": "j", "ch": "ch", "t": "t", "d": "d", "ts": "ts"}
# Exceptions to the rules in `_syllable`.
_IRREGULAR = {
    "テュ": ("ts", "u"),
    "ヂュ": ("dy", "u"),  # the only kana that produce dy
}


def _single_kana() -> dict[str, tuple[str, ...]]:
    table = {}
    for (consonant, vowel), kana in _WRITE.items():
        if len(kana) == 1:
            table.setdefault(kana, (consonant, vowel) if consonant else (vowel,))
    table |= {"ヂ": ("j", "i"), "ヅ": ("z", "u"), "ヲ": ("o",), "ヰ": ("i",), "ヱ": ("e",), "ヴ": ("b", "u")}
    table |= {"ヷ": ("b", "a"), "ヸ": ("b", "i"), "ヹ": ("b", "e"), "ヺ": ("b", "o")}
    table |= {"ヵ": ("k", "a"), "ヶ": ("k", "e"), "ン": ("N",), "ッ": ("q",)}
    # A small kana without a base kana is read like its full-size form.
    table |= {small: (vowel,) for small, vowel in _SMALL.items()} | {"ヮ": ("w", "a")}
    table |= {small: ("y", vowel) for small, vowel in _SMALL_Y.items()}
    return table


_READ = _single_kana()


def _syllable(base: str, small: str) -> tuple[str, ...]:
    """Return the phones of a kana and the small kana after it, usually one consonant and one vowel."""
    if base + small in _IRREGULAR:
        return _IRREGULAR[base + small]
    phones = _READ[base]
    if len(phones) == 1:  # the base is a vowel; only ウ becomes a consonant (ウィ: w i, but イェ: i e)
        if base == "ウ" and small in "ァィェォ":
            return ("w", _SMALL[small])
        return phones + _READ[small]
    consonant = phones[0]
    if small == "ィ":  # スィ and ズィ are pronounced シ and ジ
        return ({"s": "sh", "z": "j"}.get(consonant, consonant), "i")
    if small in _SMALL:
        return (consonant, _SMALL[small])
    palatal = _BEFORE_Y.get(consonant, consonant + "y")
    return (palatal if palatal in PHONES else consonant, _SMALL_Y[small])


def to_katakana(kana: str) -> str:
    """Apply NFKC, convert hiragana to katakana and expand iteration marks."""
    out: list[str] = []
    for char in unicodedata.normalize("NFKC", kana):
        if "ぁ" <= char <= "ゖ" or char in "ゝゞ":
            char = chr(ord(char) + 0x60)
        if char in "ヽヾ" and out:
            char = out[-1] if char == "ヽ" else unicodedata.normalize("NFC", out[-1] + "\u3099")
        out.append(char)
    return "".join(out)


def kana_to_phones(kana: str) -> list[str]:
    """Convert a pronunciation in hiragana or katakana to phones.

    `ー` lengthens the preceding vowel. It is ignored at the start and after ン, ッ or another `ー`, where
    there is no vowel to lengthen.

    Raises:
        DataError: a character is not kana, or the word consists only of ッ and ー.
    """
    text = to_katakana(kana.strip())
    phones: list[str] = []
    i = 0
    while i < len(text):
        char, following = text[i], text[i + 1 : i + 2]
        if char == "ー":
            if phones and phones[-1] in VOWELS:
                phones[-1] += ":"
            i += 1
        elif char not in _READ:
            raise DataError(
                f"{quote(char)} (character {i + 1} of {quote(kana)}) is not kana: use hiragana or katakana, "
                "or convert text with jahubert.train.text.japanese"
            )
        elif (following in _SMALL or following in _SMALL_Y) and char not in "ンッ" and char not in _SMALL:
            phones += _syllable(char, following)
            i += 2
        else:
            phones += _READ[char]
            i += 1
    if text and all(phone == "q" for phone in phones):
        raise DataError(f"{quote(kana)} is not a word: it has neither a vowel nor ン")
    return phones


def phones_to_kana(phones: Sequence[str]) -> str:
    """Spell phones in katakana, with a space for each `|`.

    Every sequence of phones can be spelled. A consonant without a vowel, which a recognizer may output, is
    spelled as if `u` followed.

    Raises:
        DataError: a symbol is neither a phone nor `|`.
    """
    out: list[str] = []
    consonant = ""
    for phone in phones:
        vowel = phone.removesuffix(":")
        if phone != BOUNDARY and phone not in PHONES:
            raise DataError(f"{quote(phone)} is not a phone; the phones are {' '.join(PHONES)}")
        if vowel in VOWELS:
            out.append(_WRITE[consonant, vowel] + ("ー" if phone.endswith(":") else ""))
            consonant = ""
            continue
        if consonant:
            out.append(_WRITE[consonant, "u"])
            consonant = ""
        if phone in ("N", "q", BOUNDARY):
            out.append({"N": "ン", "q": "ッ", BOUNDARY: " "}[phone])
        else:
            consonant = phone
    if consonant:
        out.append(_WRITE[consonant, "u"])
    return "".join(out)


# --- spelling to pronunciation ------------------------------------------------------------------------

_VOWEL_OF = {kana: phones[-1] for kana, phones in _READ.items() if phones[-1] in VOWELS}
# Pairs of a vowel and a following kana that form a long vowel, unless a morpheme boundary separates them.
_LONG = {("o", "ウ"), ("o", "オ"), ("u", "ウ"), ("e", "イ"), ("e", "エ")}

# Exceptions to `_LONG`, and words that end in the particle ハ. `|` marks a morpheme boundary, which keeps the
# following vowel separate. `ー` marks a long vowel that `_LONG` does not cover, because アア and イイ are
# usually two vowels.
_WORDS = (
    (r"ホノオ", "ホノ|オ"),
    (r"オノオノ", "オノ|オノ"),
    (r"ヨソオ(?=[イウワエッ])", "ヨソ|オ"),
    (r"ジョオウ", "ジョ|オウ"),
    (r"スペイン", "スペ|イン"),
    (r"^ソウル$", "ソ|ウル"),
    (r"マエウリ", "マエ|ウリ"),
    (r"ヤスウリ", "ヤス|ウリ"),
    (r"メイシャ$", "メ|イシャ"),
    (r"ミズウミ", "ミズ|ウミ"),
    (r"^コウマ$", "コ|ウマ"),
    (r"ウケイレ", "ウケ|イレ"),
    (r"^テイレ$", "テ|イレ"),
    (r"^ケイト$", "ケ|イト"),
    (r"([カバマサ])ア(?=サン|サマ|チャン)", r"\1ー"),
    (r"^([アマサナハ])ア$", r"\1ー"),
    (r"([ニジ])イ(?=サン|サマ|チャン)", r"\1ー"),
    (r"チイサ", "チーサ"),
    (r"タマシイ", "タマシー"),
    (r"シイタケ", "シータケ"),
    (r"^ヒイキ", "ヒーキ"),
    (r"^イイ(?=カタ|ワケ|カゲン$|ブン|マワシ|ツケ)", "イー"),
    (r"^コン(バン|ニチ)ハ$", r"コン\1ワ"),
    (r"^(デ|マタ|ソレデ|アルイ)ハ$", r"\1ワ"),
)
# Verbs with readings that no noun has. Other verbs are distinguished from nouns by their surface form: 追う
# from 王, 酔う from 用.
_VERBS = re.compile(
    r"^(?:オモ|マヨ|サソ|アラソ|タダヨ|ウルオ|ニオ|オソ|ツクロ|ノロ|キソイア|トトノ|スク|クル|フル|ヌグ|マト|ツド|ムク)ウ$"
)
# Kanji -> regular expression for the start of its readings, whose first vowel is not merged with a preceding
# vowel.
_KANJI_STARTS = {
    "売": "ウリ|ウル",
    "打": "ウチ|ウツ",
    "上": "ウエ|ウワ",
    "入": "イリ|イレ",
    "置": "オキ|オク",
    "起": "オキ|オコ",
    "押": "オシ|オサ",
    "落": "オチ|オト",
    "折": "オリ|オレ",
    "音": "オト|オン",
    "絵": "エ$",
    "腕": "ウデ",
    "牛": "ウシ",
    "歌": "ウタ",
    "内": "ウチ",
    "梅": "ウメ",
    "裏": "ウラ",
    "魚": "ウオ",
    "海": "ウミ",
    "受": "ウケ",
    "石": "イシ",
    "板": "イタ",
    "色": "イロ",
    "犬": "イヌ",
    "家": "イエ",
    "送": "オク",
    "奥": "オク",
    "親": "オヤ",
    "思": "オモ",
    "男": "オトコ",
    "女": "オンナ",
}
_OKURIGANA_U = re.compile(r"[\u4e00-\u9fff々]う")
_NOT_A_VERB = re.compile(r"(?:難|早|向|目出度|芽出度)う$")


def normalize_kana(reading: str, surface: str | None = None) -> str:
    """Convert an orthographic reading to its pronunciation in katakana: せんせい -> センセー.

    ヂ, ヅ and ヲ become ジ, ズ and オ. Characters other than kana are normalized (NFKC), and `|` is dropped.

    Args:
        reading: reading in kana, as in a dictionary.
        surface: the word as written, which resolves ambiguous readings (おう is オー in 王 but オウ in 追う).
            The final う of a verb, and the first vowel in the readings of some kanji (such as 売 and 音), are
            not merged with a preceding vowel.
    """
    text = to_katakana(reading.strip())
    for pattern, replacement in _WORDS:
        text = re.sub(pattern, replacement, text)
    if surface is None or surface == reading:
        if _VERBS.search(text):
            text = text[:-1] + "|ウ"
    else:
        text = _mark_parts(text, surface)
    out: list[str] = []
    for char in text:
        vowel = _VOWEL_OF.get(out[-1]) if out else None
        out.append("ー" if (vowel, char) in _LONG else char)
    return "".join(out).replace("|", "").translate(str.maketrans("ヂヅヲ", "ジズオ"))


# Particles in a sentence that is spelled in kana, with one word per item -> pronunciation
_PARTICLES = {
    "ハ": "ワ",
    "ヘ": "エ",
    "ニハ": "ニワ",
    "トハ": "トワ",
    "ヘハ": "エワ",
    "ヘモ": "エモ",
    "ヘノ": "エノ",
}


def normalize_kana_words(words: Sequence[str], surface: str | None = None) -> list[str]:
    """Convert the orthographic readings of the words of a sentence to their pronunciations in katakana.

    は and へ are read as particles if they are words of their own after the first word, unless the sentence
    as written has no は or へ: わたし は becomes ワタシ ワ, but むし の は in 虫の歯 becomes ムシ ノ ハ.

    Args:
        surface: the sentence as written. If it has only one word, it also resolves ambiguous readings (see
            `normalize_kana`).
    """
    if len(words) == 1:
        return [normalize_kana(words[0], surface or None)]
    spoken = [normalize_kana(word) for word in words]
    written = to_katakana(surface) if surface else "ハヘ"
    return [
        _PARTICLES.get(word, word) if i and any(kana in word and kana in written for kana in "ハヘ") else word
        for i, word in enumerate(spoken)
    ]


def _mark_parts(text: str, surface: str) -> str:
    """Insert `|` into `text` at morpheme boundaries inferred from the surface form. 言う becomes ユー."""
    if surface in ("言う", "云う", "いう") and text == "イウ":
        return "ユー"
    if "H" in unicodedata.normalize("NFKC", surface).upper():
        text = text.replace("エイチ", "エ|イチ")  # the name of the letter H has no long vowel
    for kanji, starts in _KANJI_STARTS.items():
        if kanji in surface[1:]:
            text = re.sub(f"(?<=.)(?={starts})", "|", text)
    if _OKURIGANA_U.search(surface[-2:]) and text.endswith("ウ") and not _NOT_A_VERB.search(surface):
        text = text[:-1] + "|ウ"
    return text


# --- the label set --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhonemeSet:
    """The symbols of a CTC head in index order, such as blank, word boundary and phones.

    In heads for phones or kana that jahubert trains, the first two symbols are the blank and the word
    boundary. Other CTC models may have these two at any position, may lack a word boundary, and may use
    characters instead of phones.
    """

    symbols: tuple[str, ...]
    _index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if BLANK not in self.symbols or len(set(self.symbols)) != len(self.symbols):
            raise DataError(
                f"a phoneme set must consist of distinct symbols, including {BLANK}; "
                f"found {quote(self.symbols)}"
            )
        object.__setattr__(self, "_index", {symbol: i for i, symbol in enumerate(self.symbols)})

    @classmethod
    def standard(cls) -> PhonemeSet:
        """Create the standard set of 42 symbols: blank, boundary and the 40 phones."""
        return cls((BLANK, BOUNDARY, *PHONES))

    @property
    def blank(self) -> int:
        """Index of the CTC blank."""
        return self._index[BLANK]

    @property
    def boundary(self) -> int:
        """Index of the word boundary, or -1 if the set has none."""
        return self._index.get(BOUNDARY, -1)

    @property
    def are_phones(self) -> bool:
        """Whether every symbol is a phone, the word boundary or a special symbol such as <unk> or [PAD]."""
        special = re.compile(r"<.*>|\[.*\]")
        return all(s in PHONES or s == BOUNDARY or special.fullmatch(s) for s in self.symbols)

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, words: Sequence[Sequence[str]]) -> list[int]:
        """Convert words to labels, with a boundary between words if the set has one, skipping empty words.

        Args:
            words: the symbols (phones or characters) of each word.

        Raises:
            DataError: a symbol is not in the set, or is the blank or the boundary.
        """
        labels: list[int] = []
        for word in words:
            if labels and word and self.boundary >= 0:
                labels.append(self.boundary)
            for phone in word:
                if phone in (BLANK, BOUNDARY) or phone not in self._index:
                    raise DataError(
                        f"{quote(phone)} in the word {quote(' '.join(word))} is not one of the model's "
                        "phones or characters"
                    )
                labels.append(self._index[phone])
        return labels

    def decode(self, labels: Sequence[int]) -> list[tuple[str, ...]]:
        """Convert labels to words (tuples of symbols), dropping blanks and empty words.

        Raises:
            DataError: a label is out of range.
        """
        words: list[list[str]] = [[]]
        for label in labels:
            if not 0 <= label < len(self.symbols):
                raise DataError(f"label {label} is outside the range 0..{len(self.symbols) - 1}")
            if label == self.boundary:
                words.append([])
            elif label != self.blank:
                words[-1].append(self.symbols[label])
        return [tuple(word) for word in words if word]

    def to_json(self) -> dict[str, list[str]]:
        """Convert the set to a JSON-serializable object."""
        return {"symbols": list(self.symbols)}

    @classmethod
    def from_json(cls, data: dict[str, list[str]]) -> PhonemeSet:
        """Create a set from the output of `to_json`.

        Raises:
            DataError: `data` does not have the structure of that output, or its symbols are not a valid set.
        """
        symbols = data.get("symbols") if isinstance(data, dict) else None
        if not isinstance(symbols, list) or not all(isinstance(symbol, str) for symbol in symbols):
            raise DataError(f"expected an object with a list of strings named `symbols`, found {quote(data)}")
        return cls(tuple(symbols))
