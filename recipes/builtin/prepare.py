"""Training and test data for the built-in model: recorded words and sentences, and synthetic voices.

The data come from these sources:

- the words of the `tofugu` recipe, single and joined, and copies at other speeds, which sound like voices
  with another vocal tract length and speaking rate. The lower of the two voices has fewer words, so its
  single words have more copies;
- sentences from Common Voice, read by many speakers;
- recordings in other languages without text, for pretraining;
- sentences in the mixed voices of the `voices` recipe;
- the sentences of the `demo` recipe in its synthetic voices;
- the training words in random order in the same voices, for more distinct phone sequences than the sentence
  patterns of the `demo` recipe contain.

Test splits are the held-out words of each voice, these words joined, sentences by held-out speakers from
Common Voice, copies of these sentences over a simulated telephone line and in noise, synthetic sentences that
do not occur in training, and the recordings in the folder `sentences`, if it is given. Sentences count as
equal if their letters and digits are equal; punctuation and character widths make no difference.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import read_speech
import soundfile

from jahubert.audio import AudioSource
from jahubert.errors import ConfigError, DataError, JahubertError, MissingExtraError
from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.manifest import Rejected, Utterance
from jahubert.train.experiment.config import expand_user
from jahubert.train.experiment.registry import recipe_module
from jahubert.train.text.normalization import recognized_characters

tofugu, demo, voices = map(recipe_module, ("tofugu", "demo", "voices"))
Words, Voices, Speakers = tofugu.Config, demo.Config, voices.Config

# The files do not identify the speaker. One voice has a pitch of about 125 Hz, the other of about 240 Hz.
LOW_VOICE = 175.0  # Hz; words with a lower median pitch belong to the low voice
_FLOOR, _CEILING = 70.0, 400.0  # lower and upper limit of the pitch tracker in Hz
_WINDOW, _STEP = 1024, 256  # window and hop of the pitch tracker in samples
_JOINS = ("、", "、", "と", "の", "は", "が", "を", "に", "も")  # text between synthetic words


@dataclass(frozen=True)
class Config:
    sentences: str | None = None  # folder with transcripts.tsv (columns file, text), for test_real
    # Folder with transcripts.tsv (columns file, text, speaker), or a release of Common Voice
    common_voice: str | None = None
    other_languages: str | None = None  # folder with clips.tsv (columns file, speaker), for pretraining
    clips: read_speech.Config = field(default_factory=read_speech.Config)
    synthetic: bool = True  # whether to add synthetic voices to the recordings
    hts_voices: str | None = None  # folder with HTS voices; null: only the voice of pyopenjtalk-plus
    texts: str | None = None  # file of sentences for the mixed voices, in the format of the voices recipe
    words: Words = field(default_factory=Words)
    voices: Voices = field(default_factory=Voices)
    speakers: Speakers = field(default_factory=Speakers)  # options for the mixed voices
    reading: float = 35.0  # duration of training words in synthetic voices, in minutes
    # Single training words are repeated at each of these speeds, and joined ones at one of them.
    speeds: tuple[float, ...] = (0.87, 1.15)
    low_speeds: tuple[float, ...] = (
        0.8,
        0.93,
        1.07,
        1.25,
    )  # further speeds for single words of the low voice

    def __post_init__(self) -> None:
        for name in ("speeds", "low_speeds"):
            if not all(0.5 <= speed <= 2 for speed in getattr(self, name)):
                raise ConfigError(f"{name} must be between 0.5 and 2; found {getattr(self, name)}")
        if self.reading < 0:
            raise ConfigError(f"reading must be at least 0 minutes; found {self.reading}")


def prepare(data: Path | None, work: Path, config: Config, seed: int) -> Iterator[Utterance | Rejected]:
    """Yield rejected items, and the utterances of train, dev, dev_joined, dev_cv, dev_made and the test sets.

    The test sets are test_low, test_high, test_joined, test_cv, test_cv_phone, test_cv_noise, test_made and
    test_real. Splits of sources that the options leave out are missing. `data` is the corpus of the `tofugu`
    recipe.

    Raises:
        ConfigError: options of the words are inconsistent, or a package for neural voices is not installed.
        DataError: a corpus is not given, not found or unusable.
        MissingExtraError: librosa or, for synthetic voices, pyopenjtalk-plus is not installed.
        JahubertError: the synthesis of speech failed.
    """
    words: list[str] = []
    for number, item in enumerate(tofugu.prepare(data, work / "tofugu", config.words, seed)):
        if isinstance(item, Rejected):
            yield item
            continue
        joined = item.id.startswith("joined")
        if item.split == "test":
            item = replace(item, split=f"test_{_voice(item)}")
        yield item
        if item.split == "train":
            speeds = config.speeds
            if joined:
                speeds = speeds and (speeds[number % len(speeds)],)
            else:
                words.append(item.text)
                if config.low_speeds and _voice(item) == "low":
                    speeds += config.low_speeds
            yield from (read_speech.at_speed(item, speed, work / "speeds") for speed in speeds)
    real = list(_test_recordings(expand_user(config.sentences))) if config.sentences else []
    yield from real
    recorded = {item.text for item in real}
    if config.common_voice:
        folder, held_out = expand_user(config.common_voice), set(recorded)
        for item in read_speech.sentences(folder, work / "common_voice", config.clips, seed, held_out):
            if isinstance(item, Utterance):
                recorded.add(item.text)
            yield item
    if config.other_languages:
        yield from read_speech.other_languages(expand_user(config.other_languages), work / "common_voice")
    if config.synthetic:
        yield from _synthetic(words, recorded, work, config, seed)


def _synthetic(
    words: list[str], recorded: set[str], work: Path, config: Config, seed: int
) -> Iterator[Utterance | Rejected]:
    """Yield sentences and training words in synthetic voices.

    Args:
        words: training words.
        recorded: recorded sentences, which are not synthesized.
    """
    seen = voices.excluded_sentences(config.speakers).union(map(recognized_characters, recorded))
    own = (text for text in demo.sentences(seed) if recognized_characters(text) not in seen)
    for item in demo.synthesize(own, work / "voices", config.voices, seed):
        seen.add(recognized_characters(item.text))
        yield item if item.split == "train" else replace(item, split=f"{item.split}_made")
    # The voices recipe also draws from the sentences of the demo recipe, some of which are in test_made.
    speakers = replace(config.speakers, texts=config.texts)
    folder = expand_user(config.hts_voices) if config.hts_voices else None
    for item in voices.prepare(folder, work / "speakers", speakers, seed, seen):
        if isinstance(item, Rejected) or item.split == "train":
            yield item
        else:
            yield replace(item, split=f"{item.split}_made")
    reading = replace(config.voices, minutes=config.reading, dev_share=0.0, test_share=0.0)
    if config.reading:
        for item in demo.synthesize(_texts(words, seen, seed), work / "reading", reading, seed):
            yield replace(item, id=item.id.replace("demo", "reading"))


def _voice(item: Utterance) -> str:
    """Classify the voice of a word as "low" or "high" by the median pitch of its loud part."""
    try:
        import librosa
    except ImportError as error:
        raise MissingExtraError("librosa", "recipes") from error
    wave_T = soundfile.read(item.audio.path, dtype="float32")[0]
    options = {"frame_length": _WINDOW, "hop_length": _STEP}
    pitch_S = librosa.yin(wave_T, fmin=_FLOOR, fmax=_CEILING, sr=SAMPLE_RATE, **options)
    level_S = librosa.feature.rms(y=wave_T, **options)[0][: len(pitch_S)]
    return "low" if np.median(pitch_S[level_S > 0.3 * level_S.max()]) < LOW_VOICE else "high"


def _texts(words: list[str], seen: set[str], seed: int) -> Iterator[str]:
    """Endlessly yield texts of up to seven random words, excluding words that Open JTalk misreads.

    Texts whose letters and digits are in `seen` are skipped. The letters and digits of yielded texts are
    added to `seen`.
    """
    readable = [word for word in words if _is_readable(word)]
    if not readable:
        raise DataError("pyopenjtalk cannot read any of the training words; check the readings of the corpus")
    rng = random.Random(f"reading {seed}")
    while True:
        deck = rng.sample(readable, len(readable))
        while deck:
            taken = [deck.pop() for _ in range(min(len(deck), rng.randint(3, 7)))]
            text = "".join(word + rng.choice(_JOINS) for word in taken[:-1]) + taken[-1] + "。"
            if (characters := recognized_characters(text)) not in seen and _is_readable(text):
                seen.add(characters)
                yield text


def _is_readable(text: str) -> bool:
    """Return whether the phones of the words in a text agree with those of the synthetic voice."""
    try:
        words, labels = demo._labels(text)
        demo.align(words, labels, [1] * len(labels))
    except JahubertError:
        return False
    return bool(words)


def _test_recordings(folder: Path) -> Iterator[Utterance]:
    """Yield test recordings with their texts."""
    for row in read_speech.read_rows(folder / "transcripts.tsv", ("file", "text")):
        path = folder / row["file"]
        yield Utterance(
            id=f"real-{row['name']}", audio=AudioSource(str(path)), text=row["text"], split="test_real"
        )
