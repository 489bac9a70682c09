"""Tests of reading other projects' models: synthetic files, parity with transformers, and the Hub cache."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
import transformers
from fixtures.foreign import (
    FAIRSEQ_EPS,
    KINDS,
    UNITS,
    dictionary_class,
    expected,
    fairseq_settings,
    fairseq_state,
    model_of,
    same_state,
    torchaudio_state,
)
from omegaconf import OmegaConf

from jahubert.formats.bundle import load_bundle, save_bundle
from jahubert.formats.convert import convert
from jahubert.inference.ctc import greedy
from jahubert.inference.features import FeatureExtractor
from jahubert.inference.transcribe import Transcriber
from jahubert.model.heads import HubertForCtc, UnitHead
from jahubert.model.hubert import HubertConfig
from jahubert.phonemes import BLANK, PhonemeSet


@pytest.fixture
def dictionary(monkeypatch):
    return dictionary_class(monkeypatch)


@pytest.fixture(params=KINDS, ids=list(KINDS))
def kind(request):
    return request.param


@pytest.mark.parametrize("style", ["dict", "omegaconf", "namespace", "s3prl"])
def test_pretrained_fairseq_model_is_read(tmp_path, kind, style, dictionary):
    model = model_of(KINDS[kind])
    state, head, special = fairseq_state(model)
    settings, task = fairseq_settings(model.config)
    content = {
        "model": state,
        "args": None,
        "task_state": {"dictionaries": [dictionary(map(str, range(UNITS)))]},
    }
    content["last_optimizer_state"] = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    if style == "namespace":
        content["args"] = argparse.Namespace(**settings | task | {"_name": None, "arch": "hubert"})
    elif style == "s3prl":
        symbols = [["<s>", "<pad>", "</s>", "<unk>", *map(str, range(UNITS))]]
        content = {
            "task_cfg": task,
            "model_cfg": settings,
            "model_weight": state,
            "dictionaries_symbols": symbols,
        }
    else:
        cfg = {"_name": None, "model": settings, "task": task}
        content["cfg"] = OmegaConf.create(cfg) if style == "omegaconf" else cfg
    torch.save(content, tmp_path / "model.pt")
    bundle = load_bundle(tmp_path / "model.pt")
    assert bundle.config == expected(model.config)
    assert same_state(bundle.model, model) and same_state(bundle.unit_head, head)
    assert bundle.special_rows.equal(special)
    assert bundle.ctc is None and not bundle.model.training


def test_codebook_rows_follow_the_dictionary(tmp_path, dictionary):
    """Row 4 + j of the codebook belongs to line j of dict.km.txt, which may be sorted by frequency."""
    model = model_of(KINDS["base"])
    state, head, _ = fairseq_state(model)
    settings, task = fairseq_settings(model.config)
    order = [3, 1, 0, 2, *range(4, UNITS)]
    state["label_embs_concat"][4:] = head.label_embeddings.data[order]
    content = {"cfg": {"model": settings, "task": task}, "model": state}
    content["task_state"] = {"dictionaries": [dictionary(map(str, order))]}
    torch.save(content, tmp_path / "model.pt")
    bundle = load_bundle(tmp_path / "model.pt")
    assert same_state(bundle.unit_head, head)
    assert any("unit number" in note for note in bundle.notes)


@pytest.mark.parametrize("style", ["dict", "namespace"])
def test_fine_tuned_fairseq_model_is_read(tmp_path, kind, style, dictionary):
    model = model_of(KINDS[kind])
    state, *_ = fairseq_state(model)
    settings, task = fairseq_settings(model.config)
    inner = {"_name": None, "model": settings, "task": task}
    if style == "namespace":
        inner = argparse.Namespace(**settings | task | {"_name": None, "arch": "hubert"})
    tuned = {
        "_name": "hubert_ctc",
        "w2v_args": inner,
        "dropout": 0.0,
        "layerdrop": 0.1,
        "attention_dropout": 0.0,
    }
    symbols = ["|", "k", "a", "N"]
    content = {
        "cfg": {"model": tuned | {"dropout_input": 0.0, "feature_grad_mult": 0.0}, "task": task},
        "model": {f"w2v_encoder.w2v_model.{key}": t for key, t in state.items() if "final_proj" not in key},
        "task_state": {"target_dictionary": dictionary(symbols)},
    }
    proj = torch.nn.Linear(model.config.width, 8)
    content["model"] |= {"w2v_encoder.proj.weight": proj.weight.data, "w2v_encoder.proj.bias": proj.bias.data}
    torch.save(content, tmp_path / "tuned.pt")
    bundle = load_bundle(tmp_path / "tuned.pt")
    assert same_state(bundle.model, model) and same_state(bundle.ctc.lm_head, proj)
    assert bundle.phonemes.symbols == (BLANK, "<pad>", "</s>", "<unk>", *symbols)
    assert (bundle.phonemes.blank, bundle.phonemes.boundary) == (0, 4)
    assert (bundle.config.dropout, bundle.config.layer_drop, bundle.config.conv_grad_scale) == (0.0, 0.1, 0.0)
    assert bundle.config.normalize == model.config.normalize and bundle.unit_head is None
    assert any("codebook" in note for note in bundle.notes)
    Transcriber.from_pretrained(tmp_path / "tuned.pt", device="cpu").transcribe(torch.randn(8000) * 0.1)


@pytest.mark.parametrize("form", ["plain", "aux", "pretraining", "lightning"])
def test_torchaudio_state_dict_is_read(tmp_path, kind, form):
    # A bare state dict implies heads of width 64 and the published strides.
    model = model_of(replace(KINDS[kind], width=128, heads=2, normalize_eps=FAIRSEQ_EPS))
    state = torchaudio_state(model)
    head = UnitHead(128, UNITS, 8)
    if form == "aux":
        state |= {"aux.weight": torch.ones(5, 128), "aux.bias": torch.zeros(5)}
    elif form != "plain":
        state = {f"wav2vec2.{name}": value for name, value in state.items()}
        state["mask_generator.mask_embedding"] = model.masked_spec_embed.data
        state["logit_generator.label_embeddings"] = head.label_embeddings.data
        state |= {f"logit_generator.final_proj.{n}": t for n, t in head.final_proj.state_dict().items()}
    if form == "lightning":
        state = {"state_dict": {f"model.{name}": value for name, value in state.items()}, "epoch": 3}
    torch.save(state, tmp_path / "model.pt")
    bundle = load_bundle(tmp_path / "model.pt")
    if form in ("plain", "aux"):
        assert any(note.startswith("mask embedding") for note in bundle.notes)
        bundle.model.masked_spec_embed.data = model.masked_spec_embed.data
    assert bundle.config == model.config and same_state(bundle.model, model)
    assert (bundle.unit_head is not None) == (form in ("pretraining", "lightning"))
    if bundle.unit_head is not None:
        assert same_state(bundle.unit_head, head)
    assert (bundle.ctc is not None) == (form == "aux")


# --- transformers -----------------------------------------------------------------------------------------


def hf_config(config: HubertConfig, **more) -> transformers.HubertConfig:
    return transformers.HubertConfig(
        hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
        intermediate_size=config.ffn, conv_dim=config.conv_dims, conv_bias=config.conv_bias,
        num_conv_pos_embedding_groups=config.pos_conv_groups, num_conv_pos_embeddings=config.pos_conv_kernel,
        feat_extract_norm=config.conv_norm, do_stable_layer_norm=config.pre_norm, **more,
    )  # fmt: skip


def save_hf(
    model, folder, safe: bool, normalize: bool, old_names: bool = False, shards: bool = False
) -> None:
    """Save a model as current versions of transformers do, or to pytorch_model.bin as older versions did."""
    model.save_pretrained(folder, **({"max_shard_size": "50KB"} if shards else {}))
    transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(folder)
    if not safe:
        (folder / "model.safetensors").unlink()
        state = model.state_dict()
        if old_names:
            short = {
                "parametrizations.weight.original0": "weight_g",
                "parametrizations.weight.original1": "weight_v",
            }
            for long, name in short.items():
                state = {key.replace(long, name): value for key, value in state.items()}
        torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize("files", ["safetensors", "shards", "bin", "old bin"])
def test_hugging_face_model_equals_transformers(tmp_path, kind, files):
    torch.manual_seed(0)
    reference = transformers.HubertModel(hf_config(KINDS[kind])).eval()
    safe = files in ("safetensors", "shards")
    save_hf(reference, tmp_path / "hf", safe, kind == "large", files == "old bin", files == "shards")
    assert (files == "shards") == ((tmp_path / "hf/model.safetensors.index.json").exists())
    bundle = load_bundle(tmp_path / "hf")
    assert bundle.config.normalize == (kind == "large") and bundle.notes == []
    processor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "hf")
    for n_samples in (400, 16_123):
        wav_T = 0.1 * torch.randn(n_samples)
        inputs = processor(wav_T.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
        with torch.no_grad():
            expected = reference(inputs, output_hidden_states=True).hidden_states
        # In the large model, transformers applies the final norm to the last hidden state.
        for layer in range(KINDS[kind].layers + (kind == "base")):
            hidden_SD = FeatureExtractor(bundle.model, layer, device="cpu")(wav_T)
            torch.testing.assert_close(hidden_SD, expected[layer][0], rtol=1e-5, atol=1e-5)


VOCABULARIES = {
    # The fine-tuning tutorial of transformers places the delimiter in the middle, and [UNK] and [PAD] at the
    # end.
    "hiragana": (["あ", "い", "|", "か", "きゃ", "ー", "[UNK]", "[PAD]"], 7),
    "fairseq": (["<pad>", "<s>", "</s>", "<unk>", "|", "E", "T", "A"], 0),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_hugging_face_ctc_model_transcribes_as_transformers(tmp_path, name):
    symbols, blank = VOCABULARIES[name]
    torch.manual_seed(5)
    config = hf_config(KINDS["base"], vocab_size=len(symbols), pad_token_id=blank)
    reference = transformers.HubertForCTC(config).eval()
    reference.lm_head.weight.data *= 40  # makes the transcript non-empty
    save_hf(reference, tmp_path / "hf", True, False)
    vocabulary = {symbol: row for row, symbol in enumerate(symbols)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    names = {"pad_token": symbols[blank], "unk_token": "[UNK]" if "[UNK]" in symbols else "<unk>"}
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), **names)
    tokenizer.save_pretrained(tmp_path / "hf")
    asr = Transcriber.from_pretrained(tmp_path / "hf", device="cpu", dtype=torch.float32)
    assert (asr.phonemes.blank, asr.phonemes.symbols[asr.phonemes.boundary]) == (blank, "|")
    wav_T = 0.1 * torch.randn(24_000)
    with torch.no_grad():
        expected = reference(wav_T[None]).logits.log_softmax(-1)
    (logp_SV,) = asr.log_probs([wav_T])
    torch.testing.assert_close(logp_SV, expected[0], rtol=1e-5, atol=1e-4)
    text = tokenizer.decode(expected[0].argmax(-1))
    labels = greedy(logp_SV[None], [len(logp_SV)], blank=blank)[0].labels
    assert " ".join("".join(word) for word in asr.phonemes.decode(labels)) == text.strip() != ""
    transcript = asr.transcribe(wav_T)
    assert not transcript.text or set(transcript.text) <= set("".join(symbols) + " ")

    # The bundle must give the same result in transformers.
    convert(tmp_path / "hf", tmp_path / "ours", "hf")
    again = transformers.HubertForCTC.from_pretrained(tmp_path / "ours").eval()
    assert same_state(again, reference) and again.config.pad_token_id == blank
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert back.decode(expected[0].argmax(-1)) == text
    assert load_bundle(tmp_path / "ours").phonemes == asr.phonemes


def test_bundle_opens_in_transformers(tmp_path, kind):
    phonemes = PhonemeSet.standard()
    ctc = HubertForCtc(KINDS[kind], len(phonemes), model_of(KINDS[kind])).eval()
    save_bundle(tmp_path / "b", ctc=ctc, phonemes=phonemes, unit_head=UnitHead(48, UNITS))
    reference = transformers.HubertForCTC.from_pretrained(tmp_path / "b").eval()
    assert same_state(reference, ctc)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "b")
    assert processor.tokenizer.pad_token_id == 0
    words = [("ky", "o:"), ("sh", "i")]
    assert processor.tokenizer.decode(phonemes.encode(words)) == "ky o: | sh i"
    wav_T = 0.1 * torch.randn(9_000)
    inputs = processor(wav_T.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        expected, (actual, _) = reference(inputs).logits.log_softmax(-1), ctc(wav_T[None])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- Hugging Face Hub -------------------------------------------------------------------------------------

# The config.json of rinna/japanese-hubert-base, with smaller sizes.
RINNA = {
    "activation_dropout": 0.1, "architectures": ["HubertModel"], "attention_dropout": 0.1, "bos_token_id": 1,
    "conv_bias": False, "conv_dim": [24] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2], "ctc_loss_reduction": "sum", "ctc_zero_infinity": False,
    "do_stable_layer_norm": False, "eos_token_id": 2, "feat_extract_activation": "gelu",
    "feat_extract_dropout": 0.0, "feat_extract_norm": "group", "feat_proj_dropout": 0.1,
    "feat_proj_layer_norm": True, "final_dropout": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu",
    "hidden_dropout": 0.1, "hidden_dropout_prob": 0.1, "hidden_size": 48, "initializer_range": 0.02,
    "intermediate_size": 96, "layer_norm_eps": 1e-05, "layerdrop": 0.1, "mask_feature_length": 10,
    "mask_feature_prob": 0.0, "mask_time_length": 10, "mask_time_prob": 0.05, "model_type": "hubert",
    "num_attention_heads": 4, "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 16,
    "num_feat_extract_layers": 7, "num_hidden_layers": 2, "pad_token_id": 0,
    "tokenizer_class": "Wav2Vec2CTCTokenizer", "torch_dtype": "float32", "vocab_size": 32,
}  # fmt: skip


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_hub_name_opens_from_the_cache_offline(tmp_path, weights):
    model = transformers.HubertModel(hf_config(KINDS["base"])).eval()
    save_hf(model, tmp_path / "made", weights == "model.safetensors", False)
    hub = tmp_path / "hub" / "models--rinna--japanese-hubert-base"
    snapshot = hub / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(snapshot.name)
    for name in (weights, "preprocessor_config.json"):
        shutil.copy(tmp_path / "made" / name, snapshot)
    (snapshot / "config.json").write_text(json.dumps(RINNA))
    program = """
        import sys, jahubert, torch
        name = "rinna/japanese-hubert-base"
        features = jahubert.FeatureExtractor.from_pretrained(name, layer=1, device="cpu")
        torch.save(features(torch.linspace(-1, 1, 8000)), sys.argv[1])
        assert "transformers" not in sys.modules
    """
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "out.pt")],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(torch.linspace(-1, 1, 8000)[None], output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, rtol=1e-5, atol=1e-5)
