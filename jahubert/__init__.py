"""HuBERT self-supervised pretraining and Japanese speech recognition.

    features = jahubert.FeatureExtractor.from_pretrained(layer=4)("audio.wav")       # (frames, dim)
    units = jahubert.UnitExtractor.from_pretrained()("audio.wav")                    # (frames,)
    transcript = jahubert.Transcriber.from_pretrained().transcribe("audio.wav")      # .text, .words
    encoded = jahubert.HubertModel.from_pretrained()(wav_BT, n_samples_B)            # .hidden_BSD

The first argument of `from_pretrained` is a model folder or file, or a Hub name, and by default the built-in
model. `HubertModel` is an `nn.Module`. The public names are imported lazily. Importing jahubert has no side
effects: it starts no threads and configures no logging.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jahubert.audio import AudioSource, audio_length, load_audio
    from jahubert.errors import JahubertError, UserError
    from jahubert.formats.bundle import Bundle, load_bundle, save_bundle
    from jahubert.frames import FrameGrid
    from jahubert.inference.ctc import Hypothesis, Span, beam_search, forced_align, greedy
    from jahubert.inference.features import FeatureExtractor, LayerFeatures, UnitExtractor
    from jahubert.inference.transcribe import Transcriber, Transcript, TranscriptSegment, Word
    from jahubert.model.heads import HubertForCtc, UnitHead
    from jahubert.model.hubert import Encoded, HubertConfig, HubertModel
    from jahubert.phonemes import PhonemeSet, kana_to_phones, phones_to_kana

__all__ = [
    "__version__",
    # using a model
    "FeatureExtractor",
    "LayerFeatures",
    "UnitExtractor",
    "Transcriber",
    "Transcript",
    "TranscriptSegment",
    "Word",
    # building on a model
    "HubertModel",
    "HubertConfig",
    "HubertForCtc",
    "UnitHead",
    "Encoded",
    "FrameGrid",
    "Bundle",
    "load_bundle",
    "save_bundle",
    # components
    "load_audio",
    "audio_length",
    "AudioSource",
    "PhonemeSet",
    "kana_to_phones",
    "phones_to_kana",
    "greedy",
    "beam_search",
    "forced_align",
    "Hypothesis",
    "Span",
    # errors
    "JahubertError",
    "UserError",
]

_EXPORTS = {
    "audio": ("AudioSource", "audio_length", "load_audio"),
    "errors": ("JahubertError", "UserError"),
    "formats.bundle": ("Bundle", "load_bundle", "save_bundle"),
    "frames": ("FrameGrid",),
    "inference.ctc": ("Hypothesis", "Span", "beam_search", "forced_align", "greedy"),
    "inference.features": ("FeatureExtractor", "LayerFeatures", "UnitExtractor"),
    "inference.transcribe": ("Transcriber", "Transcript", "TranscriptSegment", "Word"),
    "model.heads": ("HubertForCtc", "UnitHead"),
    "model.hubert": ("Encoded", "HubertConfig", "HubertModel"),
    "phonemes": ("PhonemeSet", "kana_to_phones", "phones_to_kana"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
