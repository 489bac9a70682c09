"""Interface to the HTS engine inside pyopenjtalk-plus, with functions that its Python class does not provide.

The extension module exports the C functions of hts_engine API 1.10, which this file calls through ctypes.
They set the interpolation weights of several voices, the all-pass constant (vocal tract length), the pitch
and the speed, and return state durations, which add up to exact phone times. Only documented functions are
used. The struct `HTS_Engine`, whose size the module does not report, is assumed to fit in a fixed buffer.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jahubert.errors import DataError, JahubertError, MissingExtraError

_ENGINE_BYTES = 1 << 14  # size of the buffer for HTS_Engine, whose actual size is below 1 KiB
_VOLUME_DB = -6.0  # headroom, because the engine clips to 16 bits
_HANDLE, _SIZE, _REAL = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_double
_STRINGS = ctypes.POINTER(ctypes.c_char_p)
_FUNCTIONS: dict[str, tuple[type | None, tuple]] = {  # (result type, argument types after the engine)
    "initialize": (None, ()),
    "load": (ctypes.c_bool, (_STRINGS, _SIZE)),
    "clear": (None, ()),
    "refresh": (None, ()),
    "get_sampling_frequency": (_SIZE, ()),
    "get_fperiod": (_SIZE, ()),
    "get_nstate": (_SIZE, ()),
    "get_nstream": (_SIZE, ()),
    "set_volume": (None, (_REAL,)),
    "set_alpha": (None, (_REAL,)),
    "set_speed": (None, (_REAL,)),
    "add_half_tone": (None, (_REAL,)),
    "set_duration_interpolation_weight": (None, (_SIZE, _REAL)),
    "set_parameter_interpolation_weight": (None, (_SIZE, _SIZE, _REAL)),
    "set_gv_interpolation_weight": (None, (_SIZE, _SIZE, _REAL)),
    "generate_state_sequence_from_strings": (ctypes.c_bool, (_STRINGS, _SIZE)),
    "get_state_duration": (_SIZE, (_SIZE,)),
    "generate_parameter_sequence": (ctypes.c_bool, ()),
    "generate_sample_sequence": (ctypes.c_bool, ()),
    "save_generated_speech": (None, (_HANDLE,)),
}


@dataclass(frozen=True)
class Style:
    """A speaking style: mixture of voices, vocal tract length, pitch and speed."""

    weights: tuple[float, ...]  # weights of the voices, which sum to 1
    alpha: float  # all-pass constant; larger values mean a longer vocal tract
    half_tones: float
    speed: float


class HtsEngine:
    """An HTS engine that mixes compatible voices.

    Args:
        voices: voice files with equal headers (`voice_header`).

    Raises:
        DataError: the engine cannot load these voices together.
        MissingExtraError: pyopenjtalk-plus is not installed.
        JahubertError: the installed version does not export the functions of the engine.
    """

    def __init__(self, voices: Sequence[Path]) -> None:
        self._library = _library()
        self._engine = ctypes.create_string_buffer(_ENGINE_BYTES)
        self._n_voices = len(voices)
        self._call("initialize")
        if not self._call("load", _strings([os.fsencode(path) for path in voices]), len(voices)):
            raise DataError(f"the HTS engine cannot load {' and '.join(map(str, voices))}")
        self.sample_rate: int = self._call("get_sampling_frequency")
        self.frame_samples: int = self._call("get_fperiod")

    def durations(self, labels: Sequence[str], style: Style) -> list[int]:
        """Compute the number of frames of each full-context label."""
        self._generate_states(labels, style)
        n_states = self._call("get_nstate")
        states = [self._call("get_state_duration", i) for i in range(n_states * len(labels))]
        self._call("refresh")
        return [sum(states[i : i + n_states]) for i in range(0, len(states), n_states)]

    def synthesize(self, labels: Sequence[str], style: Style) -> np.ndarray:
        """Synthesize full-context labels as float32 (T,) at `sample_rate`, below full scale."""
        self._generate_states(labels, style)
        self._call("add_half_tone", style.half_tones)
        if not self._call("generate_parameter_sequence") or not self._call("generate_sample_sequence"):
            raise JahubertError("the HTS engine failed to generate speech")
        wave_T = self._speech()
        self._call("refresh")
        return wave_T.astype(np.float32) / 32768

    def _generate_states(self, labels: Sequence[str], style: Style) -> None:
        if len(style.weights) != self._n_voices:
            raise JahubertError(
                f"the style needs one weight per HTS voice ({self._n_voices}); found {len(style.weights)}"
            )
        self._call("set_volume", _VOLUME_DB)
        self._call("set_alpha", style.alpha)
        self._call("set_speed", style.speed)
        for voice, weight in enumerate(style.weights):
            self._call("set_duration_interpolation_weight", voice, weight)
            for stream in range(self._call("get_nstream")):
                self._call("set_parameter_interpolation_weight", voice, stream, weight)
                self._call("set_gv_interpolation_weight", voice, stream, weight)
        encoded = _strings([label.encode() for label in labels])
        if not self._call("generate_state_sequence_from_strings", encoded, len(labels)):
            raise JahubertError("the HTS engine rejected the labels")

    def _speech(self) -> np.ndarray:
        """Return the generated samples as int16 (T,). The engine can only write them to a file."""
        libc = ctypes.CDLL(None)
        libc.fopen.restype, libc.fopen.argtypes = _HANDLE, (ctypes.c_char_p, ctypes.c_char_p)
        libc.fclose.argtypes = (_HANDLE,)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "speech.raw"
            file = libc.fopen(os.fsencode(path), b"wb")
            if not file:
                raise JahubertError(f"cannot write {path}")
            self._call("save_generated_speech", file)
            if libc.fclose(file):
                raise JahubertError(f"cannot write {path}: the disk may be full")
            return np.fromfile(path, np.int16)

    def _call(self, name: str, *arguments):
        return getattr(self._library, f"HTS_Engine_{name}")(self._engine, *arguments)

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._call("clear")


def voice_header(content: bytes, path: Path) -> bytes:
    """Return the header in the content of a voice file: streams, sizes and options.

    Voices can be mixed only if their headers are equal.

    Raises:
        DataError: the file is not an HTS voice.
    """
    header, position, _ = content[: 1 << 16].partition(b"[POSITION]")
    if not header.startswith(b"[GLOBAL]") or not position:
        raise DataError(f"{path}: not an HTS voice")
    return header


def package_folder() -> Path:
    """Return the folder of pyopenjtalk-plus without importing it.

    Raises:
        MissingExtraError: pyopenjtalk-plus is not installed.
    """
    spec = importlib.util.find_spec("pyopenjtalk")
    if spec is None or spec.origin is None:
        raise MissingExtraError("pyopenjtalk-plus", "train")
    return Path(spec.origin).parent


def _library() -> ctypes.CDLL:
    try:
        modules = sorted(package_folder().glob("htsengine*.so"))
        if not modules:
            raise OSError("no file htsengine*.so")
        library = ctypes.CDLL(str(modules[0]))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, f"HTS_Engine_{name}")
            function.restype, function.argtypes = result, (_HANDLE, *arguments)
    except (OSError, AttributeError) as error:
        message = f"pyopenjtalk-plus in {package_folder()} does not export the HTS engine ({error})"
        raise JahubertError(f"{message}; the voices recipe needs version 0.4.1 on Linux or macOS") from None
    return library


def _strings(values: Sequence[bytes]) -> ctypes.Array:
    return (ctypes.c_char_p * len(values))(*values)
