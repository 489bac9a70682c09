"""The phonemes of the corpus's own XML as phones of the 40.

The labels are those of NINJAL's manual on segments (Maekawa et al., 2011). Which of them the XML of the core
really has is known from its readers: bootphon/abkhazia (corpora/prepare_csj.py) and
labphonlab/forced-alignment-validity-ja-ko (mapping/csj_mfa_map.tsv). A palatal consonant ends in `y` where
kana write it so (キャ is ky a), and in `j` before i (キ is kj i). The phones must be those that the kana of
the mora give, or a talk's alignment would disagree with its words; so some depend on the vowel behind.
"""

from __future__ import annotations

from jahubert.phonemes import VOWELS

LONG = "H"  # lengthens the vowel before it
# No phone: a creak, a hum and a sound that could not be told. The words have nothing there either.
SILENT = ("FV", "VN", "?")
# Parts of a phoneme that are not its sound: pauses, noise, breath and the start of an utterance.
OUTSIDE = ("SpzS", "SNS", "SbS", "#")

_PALATAL = ("k", "g", "n", "h", "b", "p", "m", "r")
PHONES = {label: label for label in (*VOWELS, "N", *_PALATAL, *"sztdyw")}
PHONES |= {label + "y": label + "y" for label in _PALATAL} | {label + "j": label for label in _PALATAL}
PHONES |= {"sj": "sh", "zj": "j", "cj": "ch", "tj": "t", "dj": "d", "Fj": "f"}
PHONES |= {"sy": "sh", "zy": "j", "cy": "ch", "ty": "t", "dy": "d", "Fy": "hy"}
PHONES |= {"c": "ts", "F": "f", "v": "b", "kw": "k", "gw": "g", "Q": "q"}

# Label and the vowel behind it -> phone, where that is another one: スィ, ズィ, テュ, イェ; ニェ is n e.
_BEFORE = {("s", "i"): "sh", ("z", "i"): "j", ("ty", "u"): "ts", ("y", "e"): "i"}
_BEFORE |= {(label + "y", "e"): label for label in _PALATAL}


def phone_of(label: str, vowel: str = "") -> str:
    """The phone of a label of PHONES, before a vowel if one follows."""
    return _BEFORE.get((label, vowel), PHONES[label])
