"""Voice activity detection with silero-vad, a small neural network (extra `vad`, MIT license)."""

from __future__ import annotations

import threading
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from jahubert.errors import MissingExtraError
from jahubert.frames import SAMPLE_RATE, FrameGrid
from jahubert.inference.vad import MARGIN

_lock = threading.Lock()  # required because the network is shared and has internal state


def check_silero() -> None:
    """Raise MissingExtraError if silero-vad is not installed."""
    _load()


def silero_speech_frames(wav_T: Tensor, grid: FrameGrid) -> Tensor:
    """Return a mask (S,) of the frames of a 16 kHz waveform (T,) that are in or next to speech.

    The network expects speech at a normal level. `conditioning.prepare_speech` therefore passes conditioned
    audio.

    Raises:
        MissingExtraError: silero-vad is not installed.
    """
    get_timestamps, model = _load()
    speech_S = torch.zeros(int(grid.n_frames(len(wav_T))), device=wav_T.device)
    with _lock, torch.inference_mode():
        timestamps = get_timestamps(wav_T.float().cpu(), model, sampling_rate=SAMPLE_RATE)
    for interval in timestamps:
        speech_S[interval["start"] // grid.hop : interval["end"] // grid.hop + 1] = 1
    if not len(speech_S):
        return speech_S > 0
    return F.max_pool1d(speech_S[None], 2 * MARGIN + 1, 1, MARGIN)[0] > 0


@lru_cache
def _load() -> tuple[Any, Any]:
    """Load silero-vad, and return the speech detection function and the network."""
    n_threads = torch.get_num_threads()
    try:
        import silero_vad
    except ModuleNotFoundError:
        raise MissingExtraError("silero-vad", "vad") from None
    finally:
        torch.set_num_threads(n_threads)  # importing silero-vad sets the number of threads to one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        return silero_vad.get_speech_timestamps, silero_vad.load_silero_vad()
