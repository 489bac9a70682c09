"""Script that builds the built-in model, from the corpora to the folder that the wheel contains.

    python recipes/builtin/build.py data=... common_voice=... hts_voices=... texts=... --lm-texts FILE
    python recipes/builtin/build.py --pack exp/builtin   # pack a finished run, possibly from another machine

Unless `pretrained=` names a model, the script pretrains one on recordings alone (exp/builtin-pretraining). It
fine-tunes the model on recordings and synthetic voices (exp/builtin). Finished stages are kept and
interrupted stages are resumed, so the command can be repeated until it succeeds. The script then writes
the recognizer in float16, with a model card that contains the results of the `score` stage. The folder must
not exceed 15 MB.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from by_group import group_scores, table
from language_model import read_sentences, write_language_model

import jahubert
from jahubert import run
from jahubert.errors import ConfigError, DataError, UserError
from jahubert.formats.atomic import atomic_folder
from jahubert.formats.bundle import CALIBRATION_KEY, LanguageModel, load_bundle, save_bundle
from jahubert.formats.model_files import LANGUAGE_MODEL
from jahubert.train.clustering.streaming import load_centroids
from jahubert.train.data.manifest import Manifest
from jahubert.train.evaluation.scoring import display_text, read_hypotheses
from jahubert.train.experiment.config import expand_user
from jahubert.train.experiment.provenance import DONE, read_record, verify_files
from jahubert.train.pipeline.compose import compose
from jahubert.train.pipeline.jobs import PER_ITERATION
from jahubert.train.stages import features, kmeans

NAME = "japanese-small"
LIMIT = 15_000_000  # bytes
UNIT_FRAMES = 200_000  # number of frames to which the units are fitted
LICENSE = "CC-BY-SA-4.0"
ATTRIBUTION = (
    "Trained on recordings by Tofugu and WaniKani "
    "(https://github.com/tofugu/japanese-vocabulary-pronunciation-audio, CC BY-SA 4.0, "
    "https://creativecommons.org/licenses/by-sa/4.0/), joined, resampled and mixed with noise; on "
    "recordings of Common Voice (CC0); and on speech made from the sentences of ROHAN4600 (CC0) with the HTS "
    'voices "Mei" and "Takumi" (MMDAgent Project Team, Nagoya Institute of Technology, CC BY 3.0, '
    "https://creativecommons.org/licenses/by/3.0/), nitech_jp_atr503_m001 (HTS Working Group, Nagoya "
    "Institute of Technology, CC BY 3.0) and tohoku-f01 (Tohoku University, CC BY 4.0, "
    "https://creativecommons.org/licenses/by/4.0/). The n-gram was also estimated from sentences of the "
    "Tanaka Corpus (compiled by Yasuhito Tanaka, Hyogo University, and now part of Tatoeba, "
    "https://www.edrdg.org/wiki/index.php/Tanaka_Corpus, CC BY 2.0 FR)"
)
SETS = {
    "test_low": "held-out words, lower of the two recorded voices",
    "test_high": "held-out words, higher of the two recorded voices",
    "test_joined": "held-out words of both voices, joined into utterances of 2 to 12 s",
    "test_cv": "Common Voice sentences by 12 held-out speakers",
    "test_cv_phone": "the same sentences, band-limited and coded as on a telephone",
    "test_cv_noise": "the same sentences, with pink noise at 10 dB",
    "test_made": "new sentences in synthetic voices that occur in training",
    "test_real": "sentences by other speakers (8 recordings)",
}
NGRAM = "ngram"  # name of the decoding with the n-gram
PRETRAINING = "builtin-pretraining"  # name of the pretraining experiment
# Folders of the stages whose outputs are needed for packing.
FINISHED = (
    "prepare",
    *(f"systems/main/{stage}" for stage in ("finetune", f"decode-{NGRAM}", f"score-{NGRAM}")),
)
UNITS, UNIT_LAYER = 100, 4  # number of units for `jahubert units`, and the layer that is clustered
CARD = Path(__file__).with_name("card.md")
CALIBRATED = (
    "The confidences of words were calibrated on the development sets with the n-gram; with `--no-lm`,\n"
    "they are not calibrated."
)
NOT_CALIBRATED = "The confidences of words are not calibrated."
CORPORA = ("data", "common_voice", "other_languages", "sentences", "hts_voices", "texts")
SHOWN = ("pretrained", *CORPORA)  # settings with paths, which the model card shows as "..."
SHARED = (*CORPORA, "seed", "processes", "device", "workers")  # settings that are also passed to pretraining


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pack", metavar="EXP", help="only pack the finished experiment in this folder")
    parser.add_argument(
        "--to",
        metavar="DIR",
        type=Path,
        default=Path(jahubert.__file__).parent / "assets" / NAME,
        help="folder to write (default: the folder of the built-in model in the package)",
    )
    parser.add_argument(
        "--lm-texts",
        metavar="FILE",
        type=Path,
        help="further sentences for the n-gram, in one of the formats that the voices recipe reads",
    )
    parser.add_argument("settings", nargs="*", help="data=..., common_voice=... and any other setting")
    args = parser.parse_args(argv)
    given = dict(setting.partition("=")[::2] for setting in args.settings)
    settings = [f"{name}=..." for name in SHOWN if name in given]
    settings += [setting for setting in args.settings if setting.partition("=")[0] not in (*SHOWN, "exp")]
    settings += ["--lm-texts ..."] if args.lm_texts else []
    command = " ".join(["python recipes/builtin/build.py", *settings])
    overrides = ["recipe=builtin"]
    try:
        if "sentences" not in given:
            splits = [name for name in compose(overrides)["decode"]["splits"] if name != "test_real"]
            overrides.append(f"decode.splits=[{','.join(splits)}]")
        overrides += args.settings
        if args.lm_texts:
            if args.pack is not None:
                raise ConfigError("--lm-texts has no effect with --pack, which uses the existing n-gram")
            args.lm_texts = expand_user(args.lm_texts)
            read_sentences(args.lm_texts)  # to report an unreadable file before the training
        if args.pack is None:
            if "data" not in given or "common_voice" not in given:
                raise ConfigError("data= and common_voice= are required; see recipes/builtin/README.md")
            status, source = pretrained(args.settings)
            overrides.append(f"pretrained={source}")
            status = (
                status or run.main([*overrides, "stage=all"]) or decode_with_ngram(overrides, args.lm_texts)
            )
            if status:
                return status
        exp = Path(args.pack or compose(overrides)["exp"])
        check_finished(exp)
        common_voice = expand_user(given["common_voice"]) if "common_voice" in given else None
        size = pack(exp, args.to, command, cluster_units(exp), common_voice)
    except UserError as error:
        print(f"build.py: error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{args.to}: {size / 1e6:.1f} MB")
    return 0


def pretrained(settings: list[str]) -> tuple[int, str]:
    """Run pretraining unless `pretrained=` is given, and return the exit status and the pretrained model."""
    given = dict(setting.partition("=")[::2] for setting in settings)
    if "pretrained" in given:
        return 0, given["pretrained"]
    shared = [f"{name}={given[name]}" for name in SHARED if name in given]
    overrides = ["recipe=builtin", f"name={PRETRAINING}", "prepare.options.synthetic=false", *shared]
    tree = compose(overrides)
    each = [f"iteration={n + 1}" for n in range(tree["iterations"])]
    jobs = [["stage=prepare"], *([f"stage={stage}", number] for number in each for stage in PER_ITERATION)]
    status = next((failed for job in jobs if (failed := run.main([*overrides, *job]))), 0)
    return status, str(Path(tree["exp"], f"iter{tree['iterations']}", "pretrain"))


def decode_with_ngram(overrides: list[str], lm_texts: Path | None) -> int:
    """Estimate the n-gram, tune its weight, decode with it, score the result, and return the exit status."""
    tree = compose(overrides)
    exp = Path(tree["exp"])
    texts = [expand_user(tree["texts"])] if tree["texts"] else []
    texts += [lm_texts] if lm_texts else []
    write_language_model(exp, texts, exp / LANGUAGE_MODEL)  # repeated each time, because it takes a minute
    decode = [
        f"decode.lm={exp / LANGUAGE_MODEL}",
        f"decode.tune_splits=[{','.join(tree['finetune']['dev_splits'])}]",
    ]
    score = [f"score.baseline={exp}/systems/main/decode"]
    common = [*overrides, "system=main", f"decoding={NGRAM}"]
    jobs = ([*common, "stage=decode", *decode], [*common, "stage=score", *score])
    return next((status for job in jobs if (status := run.main(job))), 0)


def check_finished(exp: Path) -> None:
    """Raise DataError if a stage in `FINISHED` is not finished or one of its files is damaged."""
    for stage in FINISHED:
        if not (exp / stage / DONE).exists():
            raise DataError(
                f"{exp / stage}: not finished; build the model with recipes/builtin/build.py first"
            )
        verify_files(exp / stage)


def cluster_units(exp: Path) -> tuple[torch.Tensor, int]:
    """Cluster a layer of the recognizer in `exp` on training data, and return the centroids and the layer."""
    with tempfile.TemporaryDirectory() as folder:
        sample, clusters = Path(folder, "features"), Path(folder, "kmeans")
        for out in (sample, clusters):
            out.mkdir()
        features.run(
            features.Config(
                exp / "prepare" / "manifest.arrow",
                kind="hubert",
                model=exp / "systems" / "main" / "finetune",
                layer=UNIT_LAYER,
                sample_frames=UNIT_FRAMES,
            ),
            sample,
        )
        kmeans.run(kmeans.Config(sample, n_clusters=UNITS), clusters)
        return load_centroids(clusters / "centroids.safetensors")[0], UNIT_LAYER


def pack(
    exp: Path,
    target: Path,
    command: str,
    units: tuple[torch.Tensor, int] | None = None,
    common_voice: Path | None = None,
) -> int:
    """Write the recognizer in `exp` with a model card, and return the size in bytes.

    Args:
        exp: folder of a finished experiment (`check_finished`).
        target: folder to write.
        command: command line to show in the model card.
        units: centroids (K, D) and the layer to which they belong, for `jahubert units`.
        common_voice: corpus that states the gender and age of speakers, for a table in the model card.

    Raises:
        DataError: the folder would be too large, or `common_voice` has no readable table.
        ConfigError: the recognizer has no CTC head.
    """
    system = exp / "systems" / "main"
    score, decode = (system / f"{stage}-{NGRAM}" for stage in ("score", "decode"))
    scores = json.loads((score / "scores.json").read_text(encoding="utf-8"))
    tuned = read_record(decode / DONE)["metrics"]
    ngram = LanguageModel(exp / LANGUAGE_MODEL, tuned["lm_weight"], tuned["word_bonus"])
    record = read_record(system / "finetune" / DONE)
    bundle = load_bundle(system / "finetune")
    if bundle.ctc is None:
        raise ConfigError(f"{system}: the fine-tuned model has no CTC head")
    info = {"name": NAME, "license": LICENSE, "attribution": ATTRIBUTION, "run": record["fingerprint"]}
    calibration = score / "calibration.json"
    if calibration.is_file():
        info[CALIBRATION_KEY] = json.loads(calibration.read_text(encoding="utf-8"))
    info["per"] = {name: round(scores[name]["per"]["rate"], 4) for name in SETS if name in scores}
    with atomic_folder(target) as folder:
        centroids_KD, layer = units or (None, None)
        save_bundle(
            folder, ctc=bundle.ctc, phonemes=bundle.phonemes, info=info, dtype=torch.float16,
            centroids_KD=centroids_KD, centroid_layer=layer, language_model=ngram,
        )  # fmt: skip
        page = card(
            bundle, scores, record, groups(exp, common_voice), examples(exp), command,
            is_calibrated=CALIBRATION_KEY in info,
        )  # fmt: skip
        (folder / "README.md").write_text(page, encoding="utf-8")
        size = sum(path.stat().st_size for path in folder.iterdir())
        if size > LIMIT:
            raise DataError(f"{target} would take {size / 1e6:.1f} MB, but the limit is {LIMIT / 1e6:.0f} MB")
    return size


def examples(exp: Path, split: str = "test_cv", count: int = 10) -> str:
    """Return a table of evenly spaced texts and transcripts from a test set, or "" if it was not decoded."""
    path = exp / "systems" / "main" / f"decode-{NGRAM}" / f"{split}.jsonl"
    if not path.exists():
        return ""
    hypotheses = [json.loads(line) for line in path.read_bytes().splitlines()]
    hypotheses.sort(key=lambda item: item["id"])
    manifest = Manifest(exp / "prepare" / "manifest.arrow")
    text_of = {item.id: item.text for item in map(manifest.__getitem__, manifest.indices(split=split))}
    rows = [
        f"| {text_of[item['id']]} | {' '.join(display_text(word, True) for word in item['hypothesis'])} |"
        for item in hypotheses[:: -(-len(hypotheses) // count)]
    ]
    title = (
        "These transcripts of held-out speakers are evenly spaced in the test set, not selected by quality:"
    )
    return "\n".join([title, "", "| text | transcript |", "|---|---|", *rows, "", ""])


def groups(exp: Path, common_voice: Path | None, split: str = "test_cv") -> str:
    """Return a table of the PER by gender and age, or "" without the corpus or if `split` was not decoded."""
    path = exp / "systems" / "main" / f"decode-{NGRAM}" / f"{split}.jsonl"
    if common_voice is None or not path.exists():
        return ""
    title = (
        "The following table shows the PER on the Common Voice sentences with the n-gram, by gender and age\n"
        "where the corpus states them. The interval in the second row is over speakers instead of\n"
        "utterances. Rows with one or two speakers do not show an effect of gender or age."
    )
    return f"{title}\n\n{table(group_scores(list(read_hypotheses(path)), common_voice), 1)}\n\n"


def confidence_cells(measured: dict[str, Any]) -> str:
    """Format the reliability of confidences as the cells of a table."""
    shares = (measured[name] for name in ("accuracy", "confidence", "calibration_error"))
    auc = "" if measured["auc"] is None else f"{measured['auc']:.3f}"
    return " | ".join([str(measured["words"]), *(f"{100 * share:.1f}" for share in shares), auc])


def card(
    bundle: Any,
    scores: dict[str, Any],
    record: dict[str, Any],
    by_group: str,
    transcripts: str,
    command: str,
    *,
    is_calibrated: bool,
) -> str:
    def cell(score: dict[str, float]) -> str:
        return f"{100 * score['rate']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"

    rows = [
        f"| {SETS[name]} | {score['utterances']} | "
        + " | ".join(cell(score[measure]) for measure in ("per", "wer", "kana_cer"))
        + f" | {100 * score['against']['per']['baseline']:.1f} |"
        for name, score in ((name, scores[name]) for name in SETS if name in scores)
    ]
    return CARD.read_text(encoding="utf-8").format(
        confidence_rows="\n".join(
            f"| {SETS[name]} | {confidence_cells(scores[name]['confidence'])} |"
            for name in SETS
            if "confidence" in scores.get(name, {})
        ),
        calibration=CALIBRATED if is_calibrated else NOT_CALIBRATED,
        name=NAME,
        layers=bundle.config.layers,
        width=bundle.config.width,
        millions=sum(p.numel() for p in bundle.ctc.parameters()) / 1e6,
        rows="\n".join(rows),
        groups=by_group,
        examples=transcripts,
        command=command,
        fingerprint=record["fingerprint"],
        hours=record["metrics"]["hours"],
        attribution=ATTRIBUTION,
        license=LICENSE,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
