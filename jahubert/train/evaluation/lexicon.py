"""Lexicon-constrained beam search with an optional word n-gram, based on flashlight-text.

Each line of a lexicon is a word and its symbols, separated by spaces (`カワ k a w a`). A word with several
pronunciations has several lines. The n-gram is a language model of the words in the lexicon, in ARPA format
or in KenLM's binary format.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from jahubert.errors import ConfigError, DataError, MissingExtraError
from jahubert.inference.ctc import Hypothesis
from jahubert.phonemes import PhonemeSet

_LOG_ZERO = -1e4  # flashlight requires finite log-probabilities
_UNKNOWN = "<unk>"


@dataclass(frozen=True)
class LexiconConfig:
    words: Path  # file with a word and its symbols on each line
    ngram: Path | None = None  # word n-gram in ARPA or KenLM's binary format
    ngram_weight: float = 1.0  # factor for the log-probability of the n-gram
    word_score: float = 0.0  # added per word; a positive value favors more words, a negative value fewer

    def __post_init__(self) -> None:
        if self.ngram is None and self.ngram_weight != 1.0:
            raise ConfigError("ngram_weight has no effect without ngram; set ngram or remove ngram_weight")


def read_lexicon(path: Path, symbols: PhonemeSet) -> list[tuple[str, tuple[str, ...]]]:
    """Read the (word, symbols) entry of each line.

    Raises:
        DataError: the file cannot be read or has no words, or a line has no symbols or symbols outside the
            vocabulary.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the word list ({error})") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        word, *spelling = line.split()
        if not spelling:
            raise DataError(
                f"{path}:{number}: {word!r} has no symbols; add them after the word, separated by spaces"
            )
        try:
            symbols.encode([spelling])
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        entries.append((word, tuple(spelling)))
    if not entries:
        raise DataError(f"{path}: the word list is empty")
    return entries


class LexiconSearch:
    """Beam search that is restricted to the words of a lexicon.

    The score of a hypothesis is its log-probability over the paths in the beam, plus the weighted n-gram
    log-probability (natural logarithm) and `word_score` per word.
    """

    def __init__(self, config: LexiconConfig, symbols: PhonemeSet, beam: int, n_best: int):
        try:
            from flashlight.lib.text import decoder
            from flashlight.lib.text.dictionary import Dictionary
        except ImportError as error:
            raise MissingExtraError("flashlight-text", "lm") from error
        if symbols.boundary < 0:
            raise ConfigError("decode.lexicon needs a vocabulary with word boundaries: phones or kana")
        self.symbols = symbols
        self.n_best = n_best
        lexicon = read_lexicon(config.words, symbols)
        words = Dictionary()
        for word in dict.fromkeys([_UNKNOWN, *(word for word, _ in lexicon)]):
            words.add_entry(word)
        model = _ngram(config.ngram, words) if config.ngram else decoder.ZeroLM()
        trie = decoder.Trie(len(symbols), symbols.boundary)
        start = model.start(False)
        for word, spelling in lexicon:
            index = words.get_index(word)
            _, score = model.score(start, index)
            trie.insert([*symbols.encode([spelling]), symbols.boundary], index, score)
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
        """Search each row independently; returns hypotheses of every row, best first.

        Args:
            logp_BSV: log-probabilities (B, S, V).
            n_frames_B: number of valid frames of each row.
        """
        rows = zip(logp_BSV, (int(n) for n in n_frames_B), strict=True)
        return [self._search(logp_SV[:n].float().cpu().numpy()) for logp_SV, n in rows]

    def _search(self, logp_SV: np.ndarray) -> list[Hypothesis]:
        # Words end with a boundary, so a boundary frame is appended for the last word.
        padded_SV = np.full((len(logp_SV) + 1, len(self.symbols)), _LOG_ZERO, np.float32)
        padded_SV[:-1] = np.maximum(logp_SV, _LOG_ZERO)
        padded_SV[-1, self.symbols.boundary] = 0.0
        results = self.decoder.decode(padded_SV.ctypes.data, *padded_SV.shape)
        best: dict[tuple[int, ...], float] = {}  # homophones share one hypothesis
        for result in results:
            labels = self._labels(result.tokens)
            best[labels] = max(best.get(labels, -np.inf), result.score)
        ranked = sorted(best.items(), key=lambda item: -item[1])
        return [Hypothesis(labels, score) for labels, score in ranked[: self.n_best]]

    def _labels(self, path: Sequence[int]) -> tuple[int, ...]:
        """Convert a frame-wise path to labels: merge repeats, remove blanks and outer boundaries."""
        merged = [label for label, _ in itertools.groupby(path)]
        labels = [label for label in merged if label != self.symbols.blank]
        return tuple(self.symbols.encode(self.symbols.decode(labels)))


def _ngram(path: Path, words: Any) -> Any:
    from flashlight.lib.text.decoder.kenlm import KenLM

    try:
        return KenLM(str(path), words)
    except Exception as error:  # the C++ library raises no specific exception type
        raise DataError(f"{path}: KenLM cannot read this n-gram ({error})") from error
