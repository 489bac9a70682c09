"""Beam search over the words of a list, with an n-gram of them where there is one, by flashlight-text.

A lexicon has one pronunciation a line: a word, then its symbols, with spaces between (`カワ k a w a`); a word
with several has several lines. The n-gram is over those words: an ARPA file, or a binary one of KenLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from jahubert.errors import ConfigError, DataError, MissingExtraError
from jahubert.inference.ctc import Hypothesis
from jahubert.phonemes import PhonemeSet

_NEVER = -1e4  # log-probability of what cannot be; flashlight wants finite ones
_UNKNOWN = "<unk>"


@dataclass(frozen=True)
class LexiconConfig:
    words: Path
    ngram: Path | None = None
    ngram_weight: float = 1.0
    word_score: float = 0.0  # added for each word: above 0 more words, below 0 fewer

    def __post_init__(self) -> None:
        if self.ngram is None and self.ngram_weight != 1.0:
            raise ConfigError("ngram_weight without an ngram changes nothing; name one, or leave it out")


def read_lexicon(path: Path, symbols: PhonemeSet) -> list[tuple[str, tuple[str, ...]]]:
    """(word, its symbols) of each line.

    Raises:
        DataError: no such file, no words, or a line that is no word with known symbols, by its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no word list that can be read ({error})") from error
    found = []
    for number, line in enumerate(lines, 1):
        word, *spelled = line.split() or [""]
        if not word:
            continue
        if not spelled:
            raise DataError(f"{path}:{number}: {word!r} has no symbols; write them behind it, with spaces")
        try:
            symbols.encode([spelled])
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        found.append((word, tuple(spelled)))
    if not found:
        raise DataError(f"{path}: a word list without words")
    return found


class LexiconSearch:
    """Beam search whose answers are words of a lexicon; rows are searched one by one, whatever the batch.

    The score of a hypothesis is its log-probability as far as the beam saw it, plus the weighted one of the
    n-gram (natural log) and `word_score` for each word.
    """

    def __init__(self, config: LexiconConfig, symbols: PhonemeSet, beam: int, n_best: int):
        try:
            from flashlight.lib.text import decoder
            from flashlight.lib.text.dictionary import Dictionary
        except ImportError as error:
            raise MissingExtraError("flashlight-text", "lm") from error
        if symbols.boundary < 0:
            raise ConfigError("a lexicon needs a vocabulary with word boundaries: phones or kana")
        self.symbols, self.n_best = symbols, n_best
        lexicon = read_lexicon(config.words, symbols)
        words = Dictionary()
        for word in dict.fromkeys([_UNKNOWN, *(word for word, _ in lexicon)]):
            words.add_entry(word)
        model = _ngram(config.ngram, words) if config.ngram else decoder.ZeroLM()
        trie, start = decoder.Trie(len(symbols), symbols.boundary), model.start(False)
        for word, spelled in lexicon:
            number = words.get_index(word)
            _, score = model.score(start, number)
            trie.insert([*symbols.encode([spelled]), symbols.boundary], number, score)
        trie.smear(decoder.SmearingMode.MAX)
        options = decoder.LexiconDecoderOptions(
            beam_size=beam,
            beam_size_token=len(symbols),
            beam_threshold=100.0,
            lm_weight=config.ngram_weight,
            word_score=config.word_score,
            unk_score=-np.inf,
            sil_score=0.0,
            log_add=True,
            criterion_type=decoder.CriterionType.CTC,
        )
        self.decoder = decoder.LexiconDecoder(
            options, trie, model, symbols.boundary, symbols.blank, words.get_index(_UNKNOWN), [], False
        )

    def __call__(self, logp_BSV: Tensor, n_frames_B: Sequence[int] | Tensor) -> list[list[Hypothesis]]:
        rows = zip(logp_BSV, (int(n) for n in n_frames_B), strict=True)
        return [self._row(logp_SV[:n].float().cpu().numpy()) for logp_SV, n in rows]

    def _row(self, logp_SV: np.ndarray) -> list[Hypothesis]:
        # A word ends with its boundary; one more frame says that of the last word.
        padded_SV = np.full((len(logp_SV) + 1, len(self.symbols)), _NEVER, np.float32)
        padded_SV[:-1] = np.maximum(logp_SV, _NEVER)
        padded_SV[-1, self.symbols.boundary] = 0.0
        found = self.decoder.decode(padded_SV.ctypes.data, *padded_SV.shape)
        best: dict[tuple[int, ...], float] = {}  # words that sound alike are one answer
        for answer in found:
            labels = self._labels(answer.tokens)
            best[labels] = max(best.get(labels, -np.inf), answer.score)
        ranked = sorted(best.items(), key=lambda item: -item[1])
        return [Hypothesis(labels, score) for labels, score in ranked[: self.n_best]]

    def _labels(self, path: Sequence[int]) -> tuple[int, ...]:
        """The labels of a path over frames: repeats merged, blanks and outer boundaries dropped."""
        merged = [label for before, label in zip([-1, *path], path, strict=False) if label != before]
        labels = [label for label in merged if label != self.symbols.blank]
        return tuple(self.symbols.encode(self.symbols.decode(labels)))


def _ngram(path: Path, words: Any) -> Any:
    from flashlight.lib.text.decoder.kenlm import KenLM

    try:
        return KenLM(str(path), words)
    except Exception as error:  # whatever the C++ library throws
        raise DataError(f"{path}: no n-gram that KenLM can read ({error})") from error
