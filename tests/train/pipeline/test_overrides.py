"""Tests of command-line overrides, of the commands that show settings, and of sweeps."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml
from fixtures import FIXTURES

from jahubert import run
from jahubert.errors import ConfigError
from jahubert.model.hubert import HubertConfig
from jahubert.train.experiment.config import result_fields
from jahubert.train.pipeline import multirun
from jahubert.train.pipeline.compose import compose
from jahubert.train.pipeline.inspection import settings_yaml
from jahubert.train.pipeline.jobs import configure_jobs
from jahubert.train.pipeline.overrides import Override, expand_sweeps, parse_override

ROUGH = str(FIXTURES / "rough")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("name=1.10", "1.10"),
        ("name=2024_01", "2024_01"),
        ("name=1e5", "1e5"),
        ("name=null", "null"),
        ("name=", ""),
        ("name=true", "true"),
        ("name=' a '", " a "),
        (r"name='it\'s'", "it's"),
        ("data=/corpus/a,b (v2)", "/corpus/a,b (v2)"),
        ("data=[2024] 講演", "[2024] 講演"),
        (r"data=C:\data\new", r"C:\data\new"),
        ("key=[a, 1.10,[b], 'c,d']", ["a", "1.10", ["b"], "c,d"]),
        ("key={a: 1, b: {c: [x,y]}}", {"a": "1", "b": {"c": ["x", "y"]}}),
        ("key=[]", []),
        ("++key=x", "x"),
    ],
)
def test_values_are_kept_as_typed(argument, value):
    assert parse_override(argument).value == value


@pytest.mark.parametrize(
    "argument", ["", "key", "=3", "a b=3", "1=2", "key=[a", "key={a: [}", "key='a", "key={a}"]
)
def test_invalid_override_is_rejected(argument):
    with pytest.raises(ConfigError) as caught:
        parse_override(argument)
    assert argument in str(caught.value)


def test_deletion_returns_a_setting_to_its_default():
    assert parse_override("~a.b") == Override("a.b", None, delete=True)
    (job,) = configure_jobs([f"recipe={ROUGH}", "stage=kmeans", "~kmeans.n_clusters"])
    assert job.config.n_clusters == 100
    with pytest.raises(ConfigError, match=r"~kmeans\.nothing"):
        configure_jobs([f"recipe={ROUGH}", "stage=kmeans", "~kmeans.nothing"])


@pytest.mark.parametrize("name", ["1.10", "2024_01", "1e5", "null", "true", "a,b"])
def test_experiment_name_is_kept_as_typed(name):
    (job,) = configure_jobs([f"recipe={ROUGH}", "stage=prepare", f"name={name}"])
    assert job.out == Path("exp", name, "prepare")


def test_data_folder_may_contain_a_comma():
    (job,) = configure_jobs(["recipe=csj", "stage=prepare", "data=/corpora/CSJ,2004"])
    assert job.config.data == "/corpora/CSJ,2004"


def test_values_are_converted_to_the_declared_type():
    settings = [
        "seed=7",
        "kmeans.n_init=2",
        "finetune.hours=1e-1",
        "finetune.freeze_conv=FALSE",
        "finetune.pretrained=null",
        "decode.splits=[1.10,dev]",
        "score.published={paper: {dev: 1.5}}",
    ]
    jobs = {job.stage: job.config for job in configure_jobs([f"recipe={ROUGH}", "stage=all", *settings])}
    assert jobs["kmeans"].n_init == 2 and jobs["kmeans"].seed == 7
    finetune = jobs["finetune"]
    assert (finetune.hours, finetune.freeze_conv, finetune.pretrained) == (0.1, False, None)
    assert jobs["decode"].splits == ("1.10", "dev")
    assert jobs["score"].published == {"paper": {"dev": 1.5}}


def test_settings_of_one_iteration_or_system_take_effect():
    settings = ["by_iteration.1.kmeans.n_init=5", "systems.second.finetune.fraction=0.5"]
    jobs = configure_jobs(["recipe=demo", "stage=all", *settings])
    kmeans = [job.config.n_init for job in jobs if job.stage == "kmeans"]
    assert kmeans[0] == 5 and 5 not in kmeans[1:]
    fractions = {job.out.parent.name: job.config.fraction for job in jobs if job.stage == "finetune"}
    assert fractions == {"pretrained": 0.3, "scratch": 0.3, "second": 0.5}


@pytest.mark.parametrize("size", ["base", "large", "xlarge"])
def test_sizes_in_conf_are_those_of_the_python_interface(size):
    (job,) = configure_jobs(["recipe=reazonspeech", "data=/c", "stage=pretrain", f"model={size}"])
    assert job.config.model == getattr(HubertConfig, size)()


def test_parameters_of_a_part_that_is_switched_off_are_accepted_if_that_is_typed():
    settings = ["finetune.augment.noise_snr_db=[0,5]", "finetune.augment.noise_prob=0"]
    (job,) = configure_jobs([f"recipe={ROUGH}", "stage=finetune", *settings])
    assert job.config.augment.noise_snr_db == (0, 5)


TYPOS = [
    "", "x", "=", "=3", "==", "~", "~~a", "~kmeans.x", "+", "a..b=3", ".a=3", "a.=3", "[0]=1", "kmeans=3",
    "kmeans=[a]", "kmeans.n_clusters.x=3", "kmeans.n_clusters=", "kmeans.n_clusters=1e3",
    "kmeans.n_clusters=[1]", "systems=[a]", "systems=3", "systems.main=3", "systems.main.finetune=3",
    "by_iteration=3", "by_iteration.1=3", "by_iteration.7.kmeans.n_init=2",
    "by_iteration.two.kmeans.n_init=2", "by_iteration.4.kmeans.n_init=2",
    "~by_iteration.2", "~by_iteration.2.features.layer", "~by_iteration", "by_iteration=null",
    "by_iteration.2=null", "by_iteration.3.pretrain.train.max_steps=9",
    "by_iteration={4: {kmeans: {n_init: 2}}}",
    "iterations=4", "seed=-1", "seed=4294967296", "kmeans.seed=-1",
    "model.conv_strides=[5,2,2,2,2,2,1]", "model.conv_kernels=[10,3,3,3,3,2,3]", "pretrain.mask.prob=0",
    "pretrain.train.hold=0.4", "finetune.augment.noise_snr_db=[0,5]", "pretrain.crop.max_seconds=0.03",
    "finetune.keep_in_memory_hours=-1", "prepare=3", "prepare.options=3", "prepare.options=[a]",
    "model=", "model=3", "model={width: 3}", "model.width=x", "iteration=", "iteration=0",
    "iteration=1.0", "iteration=[1]", "iterations=-1", "iterations=two", "recipe=", "recipe=.",
    "recipe=[1]", "recipe=~no-such-user/x", "recipe=a/../b", "~recipe", "machine=..", "machine=",
    "machine={a: 1}", "name=", "exp=", "exp=~no-such-user/x", "finetuning=9h", "finetuning=[1]", "stage=",
    "stage=[all]", "stage=al", "system=x", "system=[a]", "decoding=a/b", "seed=1e400", "seed=x",
    "processes=0", "processes=1.5", "machines=0", "hang_timeout_minutes=-1", "hang_timeout_minutes=nan",
    "data=${nothing}", "data=${", "name=${name}", "pretrained=~no-such-user", "hydra.job.name=x",
    "hydra/launcher=slurm", "subset={a: 1}", "finetune.mask=3", "finetune.mask.prob=", "decode.splits=3",
    "kmeans={[1]: 2}", "kmeans.n_clusters=\x1b[2J",
    "kmeans.n_clusters=" + 3000 * "[" + 3000 * "]", 30_000 * "[1,", "name=" + 30_000 * "x",
    "score.published=" + 30 * "{a: " + 30 * "}", "--cfg", "--cfg=jb", "--mutlirun", "-x", "--info=3",
]  # fmt: skip


@pytest.mark.parametrize("typo", TYPOS, ids=lambda typo: typo[:60])
def test_typo_gives_one_message_without_a_traceback(typo, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run.main([f"recipe={ROUGH}", "stage=all", "--info", typo]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jahubert: error: ") and error.count("jahubert: ") == 1
    assert "Traceback" not in error and len(error) < 20_000 and "\x1b" not in error


# --- inspection ---------------------------------------------------------------------------------------------


def printed_settings(capsys, *arguments: str) -> dict:
    assert run.main([*arguments]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["--cfg=job"], ["-c", "job"]])
def test_cfg_job_prints_the_settings_that_run(capsys, flag):
    content = printed_settings(capsys, *flag, "recipe=demo", "stage=all", "kmeans.n_init=3", "name=1.10")
    assert content["model"]["width"] == 192 and content["name"] == "1.10" and content["kmeans"]["n_init"] == 3
    jobs = configure_jobs(["recipe=demo", "stage=all", "kmeans.n_init=3", "name=1.10"])
    assert list(content["jobs"]) == [str(job.out) for job in jobs]
    settings = content["jobs"]["exp/1.10/iter2/pretrain"]["pretrain"]
    assert settings["train"]["max_steps"] == 900 and settings["model"]["layers"] == 6
    assert content["jobs"]["exp/1.10/systems/scratch/finetune"]["finetune"]["pretrained"] is None


def test_cfg_job_shows_a_single_stage_with_its_defaults():
    content = yaml.safe_load(settings_yaml(["recipe=demo", "stage=pretrain", "iteration=2"]))
    assert content["pretrain"]["train"]["max_steps"] == 900 and content["pretrain"]["unit_dim"] == 256


def test_cfg_job_rejects_invalid_settings(capsys):
    assert run.main(["--cfg", "job", "recipe=demo", "stage=kmeans", "kmeans.n_cluster=3"]) == 2
    assert "kmeans.n_clusters" in capsys.readouterr().err


def test_info_lists_the_stages_and_their_state(capsys):
    assert run.main(["--info", "recipe=demo", "stage=kmeans", "iteration=2", "exp=/nowhere"]) == 0
    assert capsys.readouterr().out == "/nowhere/iter2/kmeans  not started\n"


def test_help_shows_the_settings_of_the_command(capsys):
    assert run.main(["--help", "recipe=demo", "stage=label"]) == 0
    out = capsys.readouterr().out
    assert "--multirun" in out and "width: 192" in out


# --- pretrained= --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["builtin", "csj", "demo", "fairseq", "reazonspeech", "table", "tofugu"])
def test_pretrained_takes_effect_in_every_recipe(recipe):
    data = [] if recipe == "demo" else ["data=/c"]  # the demo recipe generates its corpus
    jobs = configure_jobs([f"recipe={recipe}", "stage=all", *data, "pretrained=owner/model"])
    finetune = [job.config.pretrained for job in jobs if job.stage == "finetune"]
    assert set(finetune) - {None} == {Path("owner/model")}
    assert not any(job.stage == "pretrain" for job in jobs)  # pretrained= replaces pretraining


def test_pretrained_without_effect_is_rejected():
    for settings in (["system=scratch"], ["finetune.pretrained=other/model"]):
        with pytest.raises(ConfigError, match="pretrained=owner/model has no effect"):
            configure_jobs(["recipe=demo", "stage=finetune", "pretrained=owner/model", *settings])


def test_settings_that_a_kmeans_backend_ignores_are_rejected():
    command = ["recipe=demo", "stage=kmeans", "iteration=1"]
    for backend, names in (("faiss", ["lloyd_frames"]), ("sklearn", ["n_init", "max_iter", "lloyd_frames"])):
        for name in names:
            with pytest.raises(
                ConfigError, match=rf"kmeans\.{name} has no effect with kmeans\.backend={backend}"
            ):
                configure_jobs([*command, f"kmeans.backend={backend}", f"kmeans.{name}=200"])
    for settings in (["kmeans.backend=faiss", "kmeans.max_iter=20"], ["kmeans.lloyd_frames=200"]):
        configure_jobs([*command, *settings])


def test_sizes_of_a_pretrained_model_cannot_be_set():
    command = ["recipe=demo", "stage=finetune", "pretrained=owner/model"]
    for setting in ("model=large", "model.width=96"):
        with pytest.raises(ConfigError, match=r"model.* has no effect"):
            configure_jobs([*command, "system=pretrained", setting])
    configure_jobs([*command, "model=large"])  # takes effect in the system `scratch`
    jobs = [
        configure_jobs(["recipe=demo", "stage=finetune", "system=pretrained", size])[0]
        for size in ("model=base", "model=large")
    ]
    # `model=` sets the sizes for pretraining. Fine-tuning uses the sizes of the pretrained model.
    assert result_fields(jobs[0].config) == result_fields(jobs[1].config)


def test_only_features_of_hubert_depend_on_a_layer():
    layers = [["features.layer=4"], []]
    for kind in ("mfcc", "own.py:Feature"):
        command = ["recipe=demo", "stage=features", "iteration=1", f"features.kind={kind}"]
        jobs = [configure_jobs([*command, *layer]) for layer in layers]
        assert result_fields(jobs[0][0].config) == result_fields(jobs[1][0].config)


def test_without_iterations_a_model_to_fine_tune_is_required():
    with pytest.raises(ConfigError, match=r"pretrained=\.\.\. is missing"):
        configure_jobs(["recipe=demo", "stage=finetune", "iterations=0"])


# --- multirun -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sweep", [["a=range(0,1000000000)"], ["a=range(0,9999)", "b=1,2"], [30_000 * "[1,"]])
def test_excessive_sweep_is_rejected(sweep):
    with pytest.raises(ConfigError):
        expand_sweeps(sweep)


@pytest.mark.parametrize(("sweep", "message"), [("a=range(4,1)", "range is empty"), ("a=1,", "empty value")])
def test_sweep_without_values_is_rejected(sweep, message):
    with pytest.raises(ConfigError, match=message):
        expand_sweeps([sweep])


def test_sweeps_are_expanded_in_order():
    expanded = expand_sweeps(["a=1,2", "b=[x,y]", "c=choice(1.10,'p,q')", "d='u,v'", "e=range(0,4,2)"])
    assert [pair[1] for pair in expanded] == [
        {"a": a, "c": c, "e": e} for a, c, e in itertools.product("12", ("1.10", "'p,q'"), "02")
    ]
    assert expanded[0][0] == ["a=1", "b=[x,y]", "c=1.10", "d='u,v'", "e=0"]


@pytest.mark.parametrize(
    ("sweep", "folders"),
    [
        ("seed=0,1", ["exp/demo-seed=0", "exp/demo-seed=1"]),
        ("machine=1gpu,laptop", ["exp/demo-machine=1gpu", "exp/demo-machine=laptop"]),
        ("model=tiny,base", ["exp/demo-model=tiny", "exp/demo-model=base"]),
        ("name=1.10,1.1", ["exp/1.10", "exp/1.1"]),
        ("iteration=1,2", ["exp/demo", "exp/demo"]),  # two iterations of one experiment
    ],
)
def test_each_run_has_its_own_experiment_folder(sweep, folders):
    runs = multirun.expand(["recipe=demo", "stage=features", sweep])
    assert [compose(run.overrides)["exp"] for run in runs] == folders


def test_swept_path_becomes_a_valid_folder_name():
    runs = multirun.expand(["recipe=demo", "stage=all", "pretrained=a/b,a_b", "exp=x"])
    folders = {compose(run.overrides)["exp"] for run in runs}
    assert len(folders) == 2 and all("/" not in folder for folder in folders)


def test_multirun_runs_every_combination(capsys, tmp_path):
    command = ["-m", f"recipe={ROUGH}", "stage=prepare", f"exp={tmp_path}/exp", "seed=0,1"]
    assert run.main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exp-seed=0", "exp-seed=1"]
    assert all((path / "prepare/provenance.json").exists() for path in tmp_path.iterdir())


def test_multirun_checks_all_settings_first(capsys, tmp_path):
    command = [
        "-m",
        f"recipe={ROUGH}",
        "stage=prepare,kmeans",
        f"exp={tmp_path}/exp",
        "kmeans.n_clusters=4,none",
    ]
    assert run.main(command) == 2
    assert "kmeans.n_clusters" in capsys.readouterr().err and not list(tmp_path.iterdir())
