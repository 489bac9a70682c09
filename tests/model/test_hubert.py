"""Tests of the model against Hugging Face's with the same weights, and of batches, configs and heads."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import HubertConfig as HfConfig
from transformers import HubertModel as HfModel

from jahubert.errors import AudioError, ConfigError
from jahubert.frames import HUBERT, MFCC, FrameGrid
from jahubert.model.heads import HubertForCtc, UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel

SMALL = {"conv_dims": (24,) * 7, "width": 48, "layers": 3, "heads": 4, "ffn": 96, "pos_conv_groups": 4}
BASE_LIKE = HubertConfig(**SMALL)
LARGE_LIKE = HubertConfig(**SMALL, conv_norm="layer", pre_norm=True)


def reference_model(config: HubertConfig, source: HubertModel) -> HfModel:
    model = HfModel(
        HfConfig(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.ffn,
            conv_dim=config.conv_dims,
            conv_bias=config.conv_bias,
            num_conv_pos_embedding_groups=config.pos_conv_groups,
            feat_extract_norm=config.conv_norm,
            do_stable_layer_norm=config.pre_norm,
        )
    ).eval()
    model.load_state_dict(source.state_dict())  # loading is strict, because the parameter names are equal
    return model


@pytest.mark.parametrize("config", [BASE_LIKE, LARGE_LIKE], ids=["base", "large"])
@pytest.mark.parametrize("n_samples", [400, 719, 720, 16_000, 40_123, 400_000])
def test_equals_hugging_face(config, n_samples):
    torch.manual_seed(n_samples)
    model = HubertModel(config).eval()
    wav_BT = torch.randn(2, n_samples)
    with torch.no_grad():
        actual = model(wav_BT, keep_layers=range(config.layers + 1))
        expected = reference_model(config, model)(wav_BT, output_hidden_states=True)
    torch.testing.assert_close(actual.hidden_BSD, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    # Hugging Face applies the final norm of pre-norm models to the last hidden state.
    for number in range(config.layers + (not config.pre_norm)):
        layer, expected_layer = actual.layers[number], expected.hidden_states[number]
        torch.testing.assert_close(layer, expected_layer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [BASE_LIKE, LARGE_LIKE], ids=["base", "large"])
def test_masked_frames_equal_hugging_face(config):
    torch.manual_seed(0)
    model = HubertModel(config).eval()
    wav_BT = torch.randn(2, 16_000)
    mask_BS = torch.rand(2, HUBERT.n_frames(16_000)) < 0.5
    with torch.no_grad():
        actual = model(wav_BT, mask_BS=mask_BS).hidden_BSD
        expected = reference_model(config, model)(wav_BT, mask_time_indices=mask_BS).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["masked", "unmasked"])
@pytest.mark.parametrize("config", [BASE_LIKE, LARGE_LIKE], ids=["base", "large"])
def test_padding_options_reproduce_hugging_face(config, padding):
    """The output for padded batches equals Hugging Face's, with and without an attention mask."""
    torch.manual_seed(0)
    model, lengths = HubertModel(config).eval(), [16_000, 400, 9_999, 12_345]
    reference = reference_model(config, model)
    wav_BT = torch.randn(4, 16_000)
    valid_BT = torch.arange(16_000) < torch.tensor(lengths)[:, None]
    mask_BS = torch.rand(4, HUBERT.n_frames(16_000)) < 0.5
    mask_BS[:, 0] = False  # the only frame of the shortest row
    keep = range(config.layers + (not config.pre_norm))  # the hidden state with the final norm is excluded
    with torch.no_grad():
        actual = model(wav_BT, lengths, mask_BS=mask_BS, keep_layers=keep, padding=padding)
        exact = model(wav_BT, lengths, mask_BS=mask_BS)
        expected = reference(
            wav_BT * valid_BT,
            attention_mask=valid_BT.long() if padding == "masked" else None,
            mask_time_indices=mask_BS,
            output_hidden_states=True,
        )
    assert actual.n_frames_B.tolist() == [HUBERT.n_frames(n) for n in lengths]
    for row, n in enumerate(actual.n_frames_B.tolist()):
        pairs = [(actual.hidden_BSD, expected.last_hidden_state)]
        pairs += [(actual.layers[number], expected.hidden_states[number]) for number in keep]
        for output, expected_output in pairs:
            torch.testing.assert_close(output[row, :n], expected_output[row, :n], rtol=1e-5, atol=1e-5)
    if config.conv_norm == "group" or padding == "unmasked":  # in these cases, padding changes the result
        assert float((actual.hidden_BSD[1, 0] - exact.hidden_BSD[1, 0]).abs().max()) > 1e-3
    else:
        torch.testing.assert_close(actual.hidden_BSD, exact.hidden_BSD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("config", [BASE_LIKE, LARGE_LIKE], ids=["base", "large"])
def test_utterance_does_not_depend_on_its_batch(config, normalize):
    torch.manual_seed(1)
    model = HubertModel(HubertConfig(**{**vars(config), "normalize": normalize})).eval()
    lengths = [16_000, 400, 9_999, 25_600]
    wavs = [torch.randn(n) for n in lengths]
    batch_BT = torch.full((4, 30_000), 7.0)  # the samples after each utterance are arbitrary
    for row, wav_T in enumerate(wavs):
        batch_BT[row, : len(wav_T)] = wav_T
    with torch.no_grad():
        together = model(batch_BT, lengths)
        for row, wav_T in enumerate(wavs):
            single = model(wav_T[None])
            n_frames = HUBERT.n_frames(len(wav_T))
            assert together.n_frames_B[row] == n_frames == single.hidden_BSD.shape[1]
            torch.testing.assert_close(
                together.hidden_BSD[row, :n_frames], single.hidden_BSD[0], rtol=1e-5, atol=1e-5
            )
            assert not together.hidden_BSD[row, n_frames:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [2, 4, 16], ids="{} groups".format)
def test_autocast_is_close_to_float32(groups, dtype):
    """The test covers gradients, and groups of 96, 48 and 12 channels in the positional convolution."""
    torch.manual_seed(0)
    sizes = SMALL | {"width": 192, "pos_conv_groups": groups}
    model = HubertModel(HubertConfig(**sizes, pos_conv_kernel=32)).eval()
    wav_BT, results = 0.1 * torch.randn(2, 16_000), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            hidden_BSD = model(wav_BT).hidden_BSD.float()
        model.zero_grad()
        (hidden_BSD * torch.linspace(-1, 1, hidden_BSD.numel()).view_as(hidden_BSD)).sum().backward()
        grad = model.encoder.pos_conv_embed.conv.parametrizations.weight.original1.grad
        results.append((hidden_BSD.detach(), grad.clone()))
    for exact, near in zip(*results, strict=True):
        assert 0 < float((near - exact).norm() / exact.norm()) < 0.05


def test_early_exit_equals_the_kept_layer():
    model = HubertModel(LARGE_LIKE).eval()
    wav_BT = torch.randn(1, 8_000)
    with torch.no_grad():
        torch.testing.assert_close(
            model(wav_BT, last_layer=2).hidden_BSD, model(wav_BT, keep_layers=[2]).layers[2], rtol=0, atol=0
        )


@pytest.mark.parametrize("n_samples", [*range(400, 2000, 7), 250_000, 399_999])
def test_frame_grid_is_the_conv_stack(n_samples):
    length = n_samples
    for kernel, stride in zip(HubertConfig().conv_kernels, HubertConfig().conv_strides, strict=True):
        length = (length - kernel) // stride + 1
    assert HubertConfig().grid == HUBERT
    assert HUBERT.n_frames(n_samples) == length == int(HUBERT.n_frames(torch.tensor(n_samples)))
    assert HUBERT.n_samples(length) <= n_samples < HUBERT.n_samples(length + 1)


def test_every_second_mfcc_frame_is_a_hubert_frame():
    step = HUBERT.hop_ratio(MFCC)
    assert all(HUBERT.start(t) == MFCC.start(step * t) for t in range(50))
    with pytest.raises(ConfigError, match="does not subdivide"):
        HUBERT.hop_ratio(FrameGrid(window=512, hop=160))


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        sizes = {name: HubertModel(getattr(HubertConfig, name)()) for name in ("base", "large", "xlarge")}
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in sizes.items()}
    assert count["base"] == 94_371_712
    assert count["large"] == 315_435_136
    assert 960e6 < count["xlarge"] < 965e6


def test_gradient_into_the_conv_stack_is_scaled():
    grads = {}
    for scale in (1.0, 0.1):
        torch.manual_seed(0)
        model = HubertModel(HubertConfig(**SMALL, conv_grad_scale=scale, layer_drop=0.0, dropout=0.0)).eval()
        hidden_BSD = model(torch.linspace(-1, 1, 4000)[None]).hidden_BSD
        (hidden_BSD * torch.linspace(-1, 1, hidden_BSD.numel()).view_as(hidden_BSD)).sum().backward()
        grads[scale] = model.feature_extractor.conv_layers[3].conv.weight.grad
    torch.testing.assert_close(grads[0.1], 0.1 * grads[1.0], rtol=1e-3, atol=1e-7)


def test_layer_drop_skips_blocks_in_training_only():
    model = HubertModel(
        HubertConfig(**SMALL, layer_drop=0.999999, dropout=0.0, attention_dropout=0.0, input_dropout=0.0)
    )
    wav_BT = torch.randn(1, 8000)
    kept = model.train()(wav_BT, keep_layers=[0, 3]).layers
    assert torch.equal(kept[0], kept[3])
    kept = model.eval()(wav_BT, keep_layers=[0, 3]).layers
    assert not torch.equal(kept[0], kept[3])


def test_unit_head_is_the_cosine_softmax_of_the_paper():
    torch.manual_seed(0)
    head = UnitHead(width=12, n_units=7, dim=5, temperature=0.1)
    hidden_ND = torch.randn(9, 12)
    projected = head.final_proj(hidden_ND)
    want = torch.cosine_similarity(projected[:, None], head.label_embeddings[None], dim=-1) / 0.1
    torch.testing.assert_close(head(hidden_ND), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cosines_are_float32_under_autocast(dtype):
    torch.manual_seed(0)
    head, hidden_ND = UnitHead(48, 500, dim=256), torch.randn(300, 48)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        logits_NK, projected_ND = head(hidden_ND), head.final_proj(hidden_ND)
    units_KD = F.normalize(head.label_embeddings.detach().double(), dim=-1)
    exact_NK = F.normalize(projected_ND.double(), dim=-1) @ units_KD.T / 0.1
    assert logits_NK.dtype == torch.float32 and projected_ND.dtype == dtype
    torch.testing.assert_close(logits_NK.double(), exact_NK, rtol=0, atol=1e-5)


def test_ctc_log_probabilities_sum_to_one():
    model = HubertForCtc(BASE_LIKE, 42).eval()
    logp_BSV, n_frames_B = model(torch.randn(2, 8000), [8000, 4000])
    assert n_frames_B.tolist() == [HUBERT.n_frames(8000), HUBERT.n_frames(4000)]
    torch.testing.assert_close(logp_BSV.exp().sum(-1), torch.ones(logp_BSV.shape[:2]))


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"width": 100, "heads": 3}, "heads"),
        ({"layers": 0}, "^HubertConfig: layers is 0, but must be positive$"),
        ({"heads": 0}, "heads"),
        ({"pos_conv_groups": -1}, "pos_conv_groups"),
        ({"pos_conv_kernel": 0}, "pos_conv_kernel is 0"),
        ({"conv_strides": (0,) * 7}, "_strides"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0"),
        ({"conv_dims": (8,)}, r"conv_dims, .*\(1, 7, 7\)"),
        ({"dropout": 1.5}, "dropout"),
        ({"conv_norm": "batch"}, "conv_norm"),
    ],
)
def test_invalid_configs_are_rejected(changes, setting):
    with pytest.raises(ConfigError, match=setting):
        HubertConfig(**changes)


def test_invalid_batches_and_layers_are_rejected():
    model = HubertModel(BASE_LIKE).eval()
    with pytest.raises(AudioError, match=r"utterance 1 .* 399,"):
        model(torch.zeros(2, 800), [800, 399])
    with pytest.raises(AudioError, match="lengths"):
        model(torch.zeros(2, 800), [800, 801])
    with pytest.raises(AudioError, match="lengths"):
        model(torch.zeros(2, 800), [800])
    with pytest.raises(AudioError, match="shape"):
        model(torch.zeros(800))
    with pytest.raises(AudioError, match="is 399,"):
        model(torch.zeros(1, 399))
    with pytest.raises(ConfigError, match="last_layer"):
        model(torch.zeros(1, 800), last_layer=4)
    with pytest.raises(ConfigError, match="keep_layers"):
        model(torch.zeros(1, 800), last_layer=2, keep_layers=[1, 3])


def test_conv_penalty_is_the_mean_square_of_valid_features():
    model = HubertModel(BASE_LIKE).train()
    wav_BT, n_samples = torch.randn(2, 6400), [6400, 4000]
    penalty_B = model(wav_BT, n_samples).conv_penalty_B
    for penalty, wav_T, n in zip(penalty_B, wav_BT, n_samples, strict=True):
        features_BSC = model.feature_extractor(wav_T[None, :n])
        assert math.isclose(penalty.item(), features_BSC.pow(2).mean().item(), rel_tol=1e-5)
