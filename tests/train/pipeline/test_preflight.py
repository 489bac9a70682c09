"""Tests that the preflight checks report all errors at once, before any stage runs."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures import FIXTURES

from jahubert import run
from jahubert.errors import CheckpointError, ConfigError
from jahubert.train.experiment.provenance import DONE, read_record, write_json
from jahubert.train.pipeline import preflight
from jahubert.train.pipeline.jobs import configure_jobs
from jahubert.train.trainer.optim import TrainConfig

REPO = Path(__file__).parents[3]
ROUGH = FIXTURES / "rough"
SCRATCH = "finetune.pretrained=null"


def rejected(capsys, exp: Path, *overrides: str) -> str:
    """Run a command that must fail without writing anything, and return the message."""
    before = sorted(exp.rglob("*"))
    capsys.readouterr()
    assert run.main([f"recipe={ROUGH}", f"exp={exp}", *overrides]) == 2
    assert sorted(exp.rglob("*")) == before
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Create an experiment folder with a finished `prepare` stage."""
    exp = tmp_path_factory.mktemp("prepared") / "exp"
    assert run.main([f"recipe={ROUGH}", "stage=prepare", f"exp={exp}"]) == 0
    return exp


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "exp"))


# --- the model to fine-tune -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nope", "finetune.pretrained: nope"),
        ("/no/such/model", "finetune.pretrained: /no/such/model"),
        ("rinna/japanese-hubert-bas", "finetune.pretrained: rinna/japanese-hubert-bas: "),
        (str(ROUGH), "not a model folder (config.json is missing)"),
    ],
)
def test_misspelled_model_is_named_before_the_corpus_is_read(capsys, tmp_path, name, expected):
    message = rejected(capsys, tmp_path / "exp", "stage=all", "iterations=0", f"finetune.pretrained={name}")
    assert expected in message and "run stage=" not in message


def test_csj_requires_a_pretrained_model(capsys, tmp_path):
    assert run.main(["recipe=csj", "stage=all", "data=/c", f"exp={tmp_path / 'exp'}"]) == 2
    message = capsys.readouterr().err
    assert "finetune.pretrained" in message and "rinna/japanese-hubert-base" in message


def test_hub_check_downloads_at_most_config_json(tmp_path, monkeypatch):
    """If the model is not cached, the check requests only config.json. Its errors fit on one line."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    from jahubert.formats.hub import check_exists as hub_check

    requests = []

    def answer(error):
        def download(name, file):
            requests.append((name, file))
            raise error

        return download

    def http(kind):
        response = type("Response", (), {"headers": {}, "status_code": 404, "request": None})()
        return kind("404 Client Error\nmuch more", response=response)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: "/cache/config.json")
    hub_check("owner/cached")
    assert not requests
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    for error, expected in (
        (http(RepositoryNotFoundError), "owner/gone"),
        (http(HfHubHTTPError), "owner/gone: .*404"),
    ):
        monkeypatch.setattr(huggingface_hub, "model_info", lambda name, timeout: None)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer(error))
        with pytest.raises(CheckpointError, match=expected) as caught:
            hub_check("owner/gone")
        assert "much more" not in str(caught.value)
    assert requests == [("owner/gone", "config.json")] * 2


def test_unreachable_hub_is_reported_without_retries(monkeypatch):
    """The first request to the Hub is one that is not retried. The error message fits on one line."""
    import huggingface_hub

    from jahubert.formats import hub

    def unreachable(name, timeout):
        assert timeout <= 10
        raise ConnectionError("Name or service not known\nplease check your connection")

    def download(*_, **__):
        raise RuntimeError("an error happened\nmuch more") from ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("this request is retried"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for function in (hub.check_exists, hub.resolve_model):
        with pytest.raises(CheckpointError, match=r"owner/model: .*not known") as caught:
            function("owner/model")
        assert "\n" not in str(caught.value)


# --- processes --------------------------------------------------------------------------------------------


def test_too_many_processes_for_an_update_are_reported_once(tmp_path):
    command = [f"recipe={ROUGH}", "stage=all", f"exp={tmp_path / 'exp'}", "processes=11"]
    done = subprocess.run(
        [sys.executable, "-m", "jahubert.run", *command], capture_output=True, text=True, cwd=REPO
    )
    assert done.returncode == 2 and not (tmp_path / "exp").exists()
    for stage in ("pretrain", "finetune"):
        assert done.stderr.count(f"{stage}.train.batch_seconds: ") == 1


# --- the machine ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["engine=deepspeed"], "error: engine=deepspeed: no such engine; choose one of torch, fair"),
        (["device=gpu"], "error: device=gpu"),
        (["pretrain.train.precision=fp16"], "pretrain.train.precision=fp16 is slower than fp32 on a CPU"),
    ],
)
def test_unsupported_device_or_precision_is_reported_once(capsys, tmp_path, overrides, expected):
    message = rejected(capsys, tmp_path / "exp", "stage=all", *overrides)
    assert expected in message and len(message.splitlines()) == 1


def test_missing_engine_is_reported_before_the_corpus_is_read(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fairseq2", None)
    monkeypatch.delitem(sys.modules, "jahubert.train.trainer.fairseq2", raising=False)
    message = rejected(capsys, tmp_path / "exp", "stage=all", "engine=fairseq2")
    assert "fairseq2 is not installed" in message and len(message.splitlines()) == 1


def test_finished_stages_are_not_checked_against_the_device(tmp_path):
    """An experiment that was trained on a GPU can be scored on a laptop."""
    exp = tmp_path / "exp"
    (exp / "iter1/pretrain").mkdir(parents=True)
    write_json(exp / "iter1/pretrain" / DONE, {})
    configured = configure_jobs([f"recipe={ROUGH}", "stage=all", f"exp={exp}"])
    jobs = [
        job._replace(config=replace(job.config, train=replace(job.config.train, device="gpu")))
        for job in configured
        if job.stage in ("pretrain", "finetune")
    ]
    assert preflight.preflight_errors(jobs[:1], [exp], 1) == []
    (error,) = preflight.preflight_errors(jobs, [exp], 1)
    assert error.startswith("device=gpu")


# --- splits -----------------------------------------------------------------------------------------------


def test_missing_splits_are_reported_all_at_once(capsys, copy):
    wrong = ["pretrain.valid_split=devv", "finetune.dev_splits=[dev,nope]", "decode.align_splits=[tset]"]
    message = rejected(capsys, copy, "stage=all", SCRATCH, *wrong)
    for setting in ("pretrain.valid_split=devv", "finetune.dev_splits=nope", "decode.align_splits=tset"):
        assert (
            f"{setting}: {copy}/prepare/manifest.arrow has no such split; available splits: dev, " in message
        )
    assert "dev_splits=dev:" not in message and len(message.splitlines()) == 3


def test_splits_are_checked_once_a_manifest_exists(prepared, tmp_path):
    wrong = [f"recipe={ROUGH}", "stage=all", "pretrain.valid_split=devv"]
    preflight.check_splits(configure_jobs([*wrong, f"exp={tmp_path / 'exp'}"], check_inputs=True))
    jobs = configure_jobs([*wrong, f"exp={prepared}"])
    with pytest.raises(ConfigError, match=r"pretrain.valid_split=devv: .* has no such split"):
        preflight.check_splits(jobs)


# --- inputs -----------------------------------------------------------------------------------------------


def test_missing_files_are_reported_with_their_settings_all_at_once(capsys, copy):
    message = rejected(
        capsys, copy, "stage=all", "iterations=0", SCRATCH,
        "decode.lexicon=words/lexicn.txt", f"score.baseline={copy}/systems/mian/decode",
        "targets.user_dictionary=names.txt", "kmeans.n_cluster=3",
    )  # fmt: skip
    for expected in (
        "decode.lexicon: words/lexicn.txt",
        f"score.baseline: {copy}/systems/mian/decode",
        "targets.user_dictionary: names.txt",
    ):
        assert expected in message


def test_output_of_an_earlier_stage_of_the_command_may_be_missing(tmp_path):
    jobs = configure_jobs([f"recipe={ROUGH}", "stage=all", f"exp={tmp_path / 'exp'}"], check_inputs=True)
    assert [stage for stage, _, _ in jobs][-1] == "report"
    with pytest.raises(ConfigError, match=r"label.centroids: .*iter1/kmeans.*stage=kmeans"):
        configure_jobs([f"recipe={ROUGH}", "stage=label", f"exp={tmp_path / 'exp'}"], check_inputs=True)


def test_unfinished_stage_of_another_experiment_is_rejected(capsys, copy, tmp_path):
    other = tmp_path / "other/iter1/pretrain"
    other.mkdir(parents=True)
    write_json(other / "started.json", {})
    message = rejected(capsys, copy, "stage=all", "iterations=0", f"finetune.pretrained={other}")
    assert "finetune.pretrained: " in message and "is not finished" in message


# --- relations --------------------------------------------------------------------------------------------


def test_head_only_steps_must_be_less_than_max_steps(capsys, tmp_path):
    command = ["recipe=csj", "stage=all", "pretrained=a/b", f"exp={tmp_path / 'exp'}"]
    assert run.main([*command, "finetune.train.max_steps=5000"]) == 2
    message = capsys.readouterr().err
    assert (
        "finetune.head_only_steps is 10000, but must be at least 0 and less than train.max_steps (5000)"
        in message
    )
    assert "Set it to 0, or to 2000" in message


# --- recipe options ---------------------------------------------------------------------------------------


def test_recipe_options_are_checked(capsys, copy):
    message = rejected(capsys, copy, "stage=prepare", "prepare.options.bda=empty", "prepare.seed=x")
    assert "prepare.options.bda: no such key; did you mean prepare.options.bad?" in message
    assert "prepare.seed: expected int" in message
    assert "prepare.options.n_samples: expected int" in rejected(
        capsys, copy, "stage=all", "prepare.options.n_samples=many"
    )


def test_explicit_default_does_not_change_the_record(capsys, copy):
    command = [f"recipe={ROUGH}", "stage=prepare", f"exp={copy}"]
    before = (copy / "prepare" / DONE).read_bytes()
    assert run.main([*command, "prepare.options.bad=nothing", "prepare.options.n_samples=0"]) == 0
    assert (copy / "prepare" / DONE).read_bytes() == before
    message = rejected(capsys, copy, "stage=prepare", "prepare.options.bad=empty")
    assert "prepare.options.bad was nothing, now empty" in message


def test_record_with_fewer_settings_is_accepted(capsys, copy):
    """A setting that was added to the package after the record was written has its default value."""
    record = read_record(copy / "prepare" / DONE)
    assert record["settings"]["options.n_samples"] == 0
    del record["settings"]["options.n_samples"], record["settings"]["seed"]
    write_json(copy / "prepare" / DONE, record | {"fingerprint": "of another version"})
    before = (copy / "prepare" / DONE).read_bytes()
    assert run.main([f"recipe={ROUGH}", "stage=prepare", f"exp={copy}"]) == 0
    assert (copy / "prepare" / DONE).read_bytes() == before
    assert "prepare.seed was 0, now 1" in rejected(capsys, copy, "stage=prepare", "seed=1")


def test_misspelled_options_of_bundled_recipes_are_rejected(tmp_path):
    for recipe, wrong, expected in (
        ("csj", "filers=drop", "did you mean prepare.options.fillers?"),
        ("builtin", "words.use=3", "did you mean prepare.options.words.uses?"),
    ):
        with pytest.raises(ConfigError) as caught:
            configure_jobs([f"recipe={recipe}", "stage=prepare", f"prepare.options.{wrong}"])
        assert expected in str(caught.value)


def test_only_rank_0_prints_errors(tmp_path):
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "1"}
    command = [sys.executable, "-m", "jahubert.run", f"recipe={ROUGH}", "stage=all", f"exp={tmp_path}/exp"]
    done = subprocess.run(
        [*command, "decode.lexicon=/no"], capture_output=True, text=True, cwd=REPO, env=environment
    )
    assert done.returncode == 2 and done.stderr == ""
    assert not list(tmp_path.iterdir())


def test_compilation_on_a_gpu_requires_a_c_compiler(monkeypatch):
    train = TrainConfig(compile=True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    preflight._check_compiler(train, torch.device("cpu"))
    preflight._check_compiler(replace(train, compile=False), torch.device("cuda"))
    with pytest.raises(ConfigError, match="compile=true"):
        preflight._check_compiler(train, torch.device("cuda"))
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "gcc" else None)
    preflight._check_compiler(train, torch.device("cuda"))
