"""Mapping from the phoneme labels in the XML files to the 40 phones.

The labels are described in NINJAL's manual on segments (Maekawa et al., 2011). Two public readers show which
labels occur in the XML files of the core: bootphon/abkhazia (corpora/prepare_csj.py) and
labphonlab/forced-alignment-validity-ja-ko (mapping/csj_mfa_map.tsv). The label of a palatalized consonant
ends in `y` if the kana show palatalization (キャ is ky a), and in `j` before i (キ is kj i). A label must be
mapped to the phones of the kana that spell its mora, so that alignments and words agree. Some phones
therefore depend on the following vowel.
"""

from __future__ import annotations

from jahubert.phonemes import VOWELS

LONG = "H"  # lengthens the preceding vowel
# Labels of vocal fry, a hum and an unidentifiable sound, which are not mapped to phones.
SILENT = ("FV", "VN", "?")
# Phone labels that are not speech: pauses, noise, breath and the start of an utterance.
OUTSIDE = ("SpzS", "SNS", "SbS", "#")

_PALATAL = ("k", "g", "n", "h", "b", "p", "m", "r")
PHONES = {label: label for label in (*VOWELS, "N", *_PALATAL, *"sztdyw")}
PHONES |= {label + "y": label + "y" for label in _PALATAL} | {label + "j": label for label in _PALATAL}
PHONES |= {"sj": "sh", "zj": "j", "cj": "ch", "tj": "t", "dj": "d", "Fj": "f"}
PHONES |= {"sy": "sh", "zy": "j", "cy": "ch", "ty": "t", "dy": "d", "Fy": "hy"}
PHONES |= {"c": "ts", "F": "f", "v": "b", "kw": "k", "gw": "g", "Q": "q"}

# (label, following vowel) -> phone, for phones that depend on the vowel: スィ, ズィ, テュ, イェ, ニェ (n e).
_BEFORE = {("s", "i"): "sh", ("z", "i"): "j", ("ty", "u"): "ts", ("y", "e"): "i"}
_BEFORE |= {(label + "y", "e"): label for label in _PALATAL}


def phone_of(label: str, vowel: str = "") -> str:
    """Return the phone for a label, given the label of the following vowel."""
    return _BEFORE.get((label, vowel), PHONES[label])
