"""Mapping of the phonemes of the corpus's XML to the 40 phones.

The labels are those of NINJAL's manual on segments (Maekawa et al., 2011). Which of them occur in the XML of
the core is known from its public readers: bootphon/abkhazia (corpora/prepare_csj.py) and
labphonlab/forced-alignment-validity-ja-ko (mapping/csj_mfa_map.tsv). A palatal consonant ends in `y` where
kana write it so (キャ is ky a), and in `j` before i (キ is kj i). The phones must equal those of the kana of
the mora, so that alignment and words agree; some therefore depend on the following vowel.
"""

from __future__ import annotations

from jahubert.phonemes import VOWELS

LONG = "H"  # lengthens the vowel before it
# Not phones: vocal fry, a hum and an unidentifiable sound. Transcribed words have no phones for them either.
SILENT = ("FV", "VN", "?")
# Labels inside a phoneme that are not speech: pauses, noise, breath and the start of an utterance.
OUTSIDE = ("SpzS", "SNS", "SbS", "#")

_PALATAL = ("k", "g", "n", "h", "b", "p", "m", "r")
PHONES = {label: label for label in (*VOWELS, "N", *_PALATAL, *"sztdyw")}
PHONES |= {label + "y": label + "y" for label in _PALATAL} | {label + "j": label for label in _PALATAL}
PHONES |= {"sj": "sh", "zj": "j", "cj": "ch", "tj": "t", "dj": "d", "Fj": "f"}
PHONES |= {"sy": "sh", "zy": "j", "cy": "ch", "ty": "t", "dy": "d", "Fy": "hy"}
PHONES |= {"c": "ts", "F": "f", "v": "b", "kw": "k", "gw": "g", "Q": "q"}

# (label, following vowel) -> phone, where the vowel matters: スィ, ズィ, テュ, イェ; ニェ is n e.
_BEFORE = {("s", "i"): "sh", ("z", "i"): "j", ("ty", "u"): "ts", ("y", "e"): "i"}
_BEFORE |= {(label + "y", "e"): label for label in _PALATAL}


def phone_of(label: str, vowel: str = "") -> str:
    """The phone of a label of PHONES, given the vowel that follows it."""
    return _BEFORE.get((label, vowel), PHONES[label])
