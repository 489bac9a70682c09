"""Model card of a bundle, a README.md with a YAML header for the Hugging Face Hub."""

from __future__ import annotations

import json
from typing import Any

from jahubert.model.hubert import HubertModel
from jahubert.phonemes import PhonemeSet

_METRICS = ("wer", "per")  # fine-tuning metrics on the development set


def model_card(name: str, model: HubertModel, info: dict[str, Any], has_ctc: bool) -> str:
    """Render the model card of a model.

    Args:
        name: title of the card and name of the model in the results; "bundle" is replaced by "HuBERT".
        info: content of jahubert.json.
        has_ctc: whether the model has a CTC head.
    """
    name = "HuBERT" if name == "bundle" else name
    config = model.config
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    task = "fine-tuned with CTC for speech recognition" if has_ctc else "pretrained by masked unit prediction"
    scale = "normalized to zero mean and unit variance" if config.normalize else "not normalized"
    example = [
        "import jahubert",
        f'features = jahubert.FeatureExtractor.from_pretrained("{name}")("audio.wav")',
    ]
    if has_ctc:
        example[1] = f'transcript = jahubert.Transcriber.from_pretrained("{name}").transcribe("audio.wav")'
    details = {key: value for key, value in info.items() if key not in ("phonemes", "config")}
    return "\n".join(
        [
            _yaml_header(name, info, has_ctc),
            f"# {name}",
            "",
            f"HuBERT with {config.layers} blocks of width {config.width} ({n_parameters / 1e6:.1f} M "
            f"parameters), {task}. Input: 16 kHz mono waveforms, {scale}.",
            "",
            "```python",
            *example,
            "```",
            "",
            "`transformers` can also open this folder. Before publishing, set `license` above; it depends on "
            "the training data.",
            "",
            "```json",
            json.dumps(details, indent=2, ensure_ascii=False),
            "```",
            "",
        ]
    )


def _yaml_header(name: str, info: dict[str, Any], has_ctc: bool) -> str:
    lines = ["---"]
    if _is_japanese(info.get("phonemes")):
        lines.append("language: ja")
    lines += ["license: other", "license_name: unspecified", "library_name: transformers"]
    lines.append(f"pipeline_tag: {'automatic-speech-recognition' if has_ctc else 'feature-extraction'}")
    lines += ["tags:", "- hubert", "- speech", "- jahubert"]
    finetuning = info.get("finetuning", {})
    if base_model := finetuning.get("base_model"):
        lines.append(f"base_model: {json.dumps(base_model)}")
    values = {key: finetuning.get("metrics", {}).get(key) for key in _METRICS}
    if "|" not in json.dumps(info.get("phonemes")):  # without word boundaries, both metrics are the CER
        values = {"cer": values["per"]}
    measured = {kind: value for kind, value in values.items() if isinstance(value, (int, float))}
    if measured:
        lines += ["metrics:", *(f"- {kind}" for kind in measured)]
        lines += [
            "model-index:",
            f"- name: {json.dumps(name, ensure_ascii=False)}",
            "  results:",
            "  - task:",
            "      type: automatic-speech-recognition",
            "    dataset:",
            "      name: development set of the fine-tuning, greedy search",
            "      type: development",
            "    metrics:",
        ]
        for kind, value in measured.items():
            lines += [f"    - type: {kind}", f"      value: {value:.4f}"]
    return "\n".join([*lines, "---", ""])


def _is_japanese(symbols: Any) -> bool:
    """Return whether a CTC vocabulary consists of Japanese phones or contains kana."""
    if not symbols:
        return False
    if symbols == PhonemeSet.standard().to_json():
        return True
    return any("\u3041" <= char <= "\u30ff" for char in json.dumps(symbols, ensure_ascii=False))
