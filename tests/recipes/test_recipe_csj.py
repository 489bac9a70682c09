"""Tests of the csj recipe on synthetic corpora: layouts, channels, sets, and malformed transcripts."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest
import soundfile
from fixtures.csj_tree import RATE, Talk, expected, planned, sdb_lines, write_file_list, write_talk

from jahubert import run
from jahubert.errors import ConfigError, DataError
from jahubert.train.data.manifest import Manifest, Rejected, Utterance
from jahubert.train.data.targets import TargetStore
from jahubert.train.experiment.registry import recipe_module
from jahubert.train.stages import prepare as stage

csj = recipe_module("csj")
files, summary, talks_, transcripts = (
    sys.modules[f"csj_{name}"] for name in ("files", "summary", "talks", "transcripts")
)
EVALS = {"A01M0110": "eval1", "A02M0012": "eval2", "S00F0019": "eval3"}
SETS = {**EVALS, "A03F0109": "dev", "S02F0122": "dev", "A01F0055": "train", "S00M0075": "train"}
OUTSIDE = {"A01M0999": "noncore", "D03M0017": "excluded"}


def talks() -> list[Talk]:
    core = set(files.read_list("core"))
    return [planned(id, core=id in core) for id in {**SETS, **OUTSIDE}]


def write(root: Path, layout: str = "usb", kinds=("sdb",)) -> Path:
    for talk in talks():
        write_talk(root, layout, talk, kinds)
    return root


@pytest.fixture(scope="module")
def usb(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("usb"))


def read(data: Path | None, work: Path, seed: int = 0, **options) -> tuple[list[Utterance], list[Rejected]]:
    items = list(csj.prepare(data, work, csj.Config(**options), seed))
    return [i for i in items if isinstance(i, Utterance)], [i for i in items if isinstance(i, Rejected)]


# --- corpus folders ---------------------------------------------------------------------------------------


LAYOUTS = [("usb", ("sdb", "xml")), ("usb", ("xml",)), ("dvd", ("sdb",)), ("dvd", ("xml", "trn"))]
LAYOUTS += [("merl", ("sdb",)), ("merl", ("trn",)), ("speech", ("sdb", "trn"))]


@pytest.mark.parametrize(("layout", "kinds"), LAYOUTS)
def test_every_layout_is_read_as_planned(tmp_path, caplog, layout, kinds):
    caplog.set_level(logging.INFO)
    data, plan = write(tmp_path / "CSJ", layout, kinds), talks()
    config = stage.Config(recipe="csj", data=str(data), options={"subset": "core"})
    (tmp_path / "out").mkdir()
    counts = stage.prepare(config, tmp_path / "out")
    manifest = Manifest(tmp_path / "out" / "manifest.arrow")
    items = [manifest[i] for i in range(len(manifest))]
    expected_items = expected([talk for talk in plan if talk.id in SETS])
    assert {item.id: (item.start, item.n_samples, item.words) for item in items} == expected_items
    assert all(item.split == SETS[item.speaker] for item in items)
    assert counts["hours"] == pytest.approx(sum(n for _, n, _ in expected_items.values()) / RATE / 3600)
    events = 6 * len(SETS)  # each utterance has two events
    assert counts["rejected"] == {"masked name": len(SETS), "no words": events}
    assert {name: split["utterances"] for name, split in counts["splits"].items()} == {
        "dev": 6, "eval1": 3, "eval2": 3, "eval3": 3, "train": 6
    }  # fmt: skip
    n_words = sum(len(words) for id, (_, _, words) in expected_items.items() if SETS[id[:8]] == "train")
    assert f"csj train: talks: 2 of 186, utterances: 6, 0.00 h, words: {n_words}" in caplog.text
    assert "csj rejected, masked name: 7" in caplog.text
    hours = sum(n for id, (_, n, _) in expected_items.items() if SETS[id[:8]] == "train") / RATE / 3600
    assert f"; the paper: 32 h (this split: {hours / 32:.1%} of these hours)" in caplog.text
    assert re.search(r"; lhotse: 3,743 utterances, 6.67 h \(this split: 0\.\d% of these hours\)", caplog.text)
    assert "髙い" in "".join(item.text for item in items)
    assert "ＩＢＭ" in "".join(item.text for item in items)


def test_command_of_the_readme_prepares_targets(usb, tmp_path, capsys):
    command = ["recipe=csj", f"data={usb}", f"exp={tmp_path}", "device=cpu"]
    assert run.main([*command, "subset=all", "stage=prepare"]) == 0
    assert run.main([*command, "subset=all", "stage=targets"]) == 0
    manifest = Manifest(tmp_path / "prepare" / "manifest.arrow")
    store = TargetStore(tmp_path / "targets")
    for row in store.labeled_rows:
        assert tuple(store.words(row)) == manifest[row].words
    # Some utterances may be too short for the phones of their words.
    assert len(store.labeled_rows) > 10
    capsys.readouterr()
    assert run.main([*command, "subset=core", "stage=prepare"]) == 2
    assert "prepare.options.subset" in capsys.readouterr().err
    assert run.main(["recipe=demo", "stage=prepare", f"exp={tmp_path}/demo", "subset=core"]) == 2
    assert "subset" in capsys.readouterr().err


def test_trn_is_read_without_a_better_transcript(tmp_path, caplog):
    plan = planned("A01F0055")
    write_talk(tmp_path, "usb", plan, ("trn",))
    items, _ = read(tmp_path, tmp_path)
    assert {item.id: (item.start, item.n_samples, item.words) for item in items} == expected([plan])
    assert "only a TRN" in caplog.text and "A01F0055" in caplog.text


def test_subset_is_all_talks_or_those_of_a_list(usb, tmp_path):
    def training_talks(**options):
        return {item.speaker for item in read(usb, tmp_path, **options)[0] if item.split == "train"}

    assert training_talks() == {"A01F0055", "S00M0075"}
    assert training_talks(subset="all") == {"A01F0055", "S00M0075", "A01M0999"}
    (tmp_path / "talks.txt").write_text("# comment\nA01M0999\n")
    assert training_talks(subset=str(tmp_path / "talks.txt")) == {"A01M0999"}


def test_core_talks_come_from_the_folder_or_file_list_or_list(tmp_path):
    talk = planned("A01M0999", core=False)
    write_talk(tmp_path / "dvd", "dvd", talk)
    assert not files.find_talks(tmp_path / "dvd")["A01M0999"].core
    talk.core = True
    write_file_list(tmp_path / "dvd", [talk, planned("A01M0998")])
    assert files.find_talks(tmp_path / "dvd")["A01M0999"].core
    write_talk(tmp_path / "usb", "usb", talk)
    assert files.find_talks(tmp_path / "usb")["A01M0999"].core


def test_core_column_of_the_file_list_is_parsed(tmp_path, caplog):
    cells = {
        "A01F0055": "コア",
        "A01F0067": "ノンコア",
        "S00M0075": "○",
        "A01M0999": "ノンコア",
        "A01M0998": "1",
    }
    cells |= {"A01M0997": "", "A01F0122": "コ゛ア", "A01M0996": "不明"}
    for id in cells:
        write_talk(tmp_path, "dvd", planned(id))
    rows = ["講演ID,講演種別,コア", *(f"{id},学会,{cell}" for id, cell in cells.items())]
    (tmp_path / "fileList.csv").write_bytes("\r\n".join(rows).encode("cp932"))
    talks = files.find_talks(tmp_path)
    assert {id for id, talk in talks.items() if talk.core} == {"A01F0055", "S00M0075", "A01M0998", "A01F0122"}
    assert re.search(r"column コア: 'コ゛ア' '不明' .*\(2\)", caplog.text)
    assert re.search(r"lists/core.txt, these talks are core, .* \(1\): A01F0067\n", caplog.text)
    assert re.search(r"lists/core.txt, these talks are not core, .* \(1\): A01M0998\n", caplog.text)


def test_sources_that_disagree_on_the_core_are_reported(tmp_path, caplog):
    for id, core in (("A01F0055", True), ("A01F0067", False)):
        write_talk(tmp_path, "usb", planned(id, core=core))
    assert "precedence" not in caplog.text
    write_file_list(tmp_path, [planned("A01F0055", core=False), planned("A01F0067", core=False)])
    talks = files.find_talks(tmp_path)
    assert [id for id in talks if talks[id].core] == ["A01F0055"]
    assert re.search(r"fileList.csv, these talks are not core, .* \(1\): A01F0055\n", caplog.text)
    assert re.search(r"lists/core.txt, these talks are core, .* \(1\): A01F0067\n", caplog.text)


def test_order_of_training_talks_depends_on_the_seed(tmp_path):
    sets = {f"A01M{i:04d}": "train" for i in range(20)} | {"A01M0110": "eval1", "A03F0109": "dev"}
    orders = [list(csj._ordered_talks(sets, seed, lambda: True)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert all(order[:2] == ["A01M0110", "A03F0109"] for order in orders)
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(sets)
    answers = iter([False, False, True])
    front = list(csj._ordered_talks(sets, 0, lambda: next(answers)))[2:4]
    assert front == ["A01M0000", "A01M0001"]


def test_dev_kaldi_is_the_first_part_of_the_training_data(usb, tmp_path, monkeypatch):
    read_list = files.read_list
    monkeypatch.setattr(csj, "read_list", lambda name: ["4"] if name == "dev-kaldi" else read_list(name))
    items, _ = read(usb, tmp_path, dev="kaldi")
    dev = [item.id for item in items if item.split == "dev"]
    # Without lhotse's list, the talks in it are training data.
    train = sorted(
        id for id in expected(talks()) if SETS.get(id[:8]) in ("train", "dev") and id[:8] != "S02F0122"
    )
    assert dev == train[:4]
    assert sorted(item.id for item in items if item.split == "train") == train[4:]


def test_lists_match_the_published_recipes():
    core, valid = set(files.read_list("core")), set(files.read_list("dev-lhotse"))
    evals = {id for name in files.EVALS for id in files.read_list(name)}
    excluded = set(files.read_list("excluded"))
    assert (len(core), len(evals), len(excluded), len(valid)) == (201, 30, 6, 39)
    assert len(core - evals - excluded) == 188
    assert core & valid == {"A03F0109", "S00F0014"}
    assert files.read_list("dev-kaldi") == ["4000"]


# --- dialogues --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stereo", [False, True])
def test_channels_of_a_dialogue_are_two_speakers(tmp_path, stereo):
    plan = planned("D01F0002", channels="LR")
    write_talk(tmp_path / "CSJ", "usb", plan, stereo=stereo)
    work = tmp_path / "work"
    work.mkdir()
    items, rejected = read(tmp_path / "CSJ", work)
    assert {item.id: (item.start, item.n_samples, item.words) for item in items} == expected([plan])
    assert {item.speaker for item in items} == {"D01F0002-L", "D01F0002-R"}
    assert [item.reason for item in rejected if item.reason != "no words"] == ["masked name"] * 2
    for item in items:
        assert Path(item.audio.path).parent == (work if stereo else tmp_path / "CSJ" / "WAV" / "core")
        assert Path(item.audio.path).stem == item.speaker
    if stereo:
        stereo_wav, _ = soundfile.read(tmp_path / "CSJ" / "WAV" / "core" / "D01F0002.wav")
        assert (soundfile.read(work / "D01F0002-R.flac")[0] == stereo_wav[:, 1]).all()


def test_dialogue_with_one_channel_missing_is_rejected(tmp_path):
    write_talk(tmp_path, "usb", planned("D01F0002", channels="LR"))
    wav = tmp_path / "WAV" / "core"
    (wav / "D01F0002-L.wav").rename(wav / "D01F0002.wav")
    (wav / "D01F0002-R.wav").unlink()
    assert [(item.id, item.reason) for item in read(tmp_path, tmp_path)[1]] == [
        ("D01F0002-L", "unusable audio"),
        ("D01F0002-R", "unusable audio"),
    ]


# --- malformed input --------------------------------------------------------------------------------------


def broken_sdb(root: Path, change) -> Path:
    """Write an intact talk, and one whose SDB lines are modified by `change`."""
    write_talk(root, "usb", planned("A01F0055"))
    write_talk(root, "usb", planned("S00M0075"))
    path = root / "MORPH" / "SDB" / "core" / "S00M0075.sdb"
    lines = [line.encode("cp932") for line in sdb_lines(planned("S00M0075"))]
    path.write_bytes(b"\r\n".join(change(lines)) + b"\r\n")
    return path


@pytest.mark.parametrize(
    ("change", "location", "n_lost"),
    [
        (lambda x: [x[0], x[1].replace(b"-", b"~", 1), *x[2:]], "sdb:2: .*a time in column 4", 1),
        (
            lambda x: [x[0], x[1].replace(b".", b"9" * 400 + b".", 1), *x[2:]],
            "sdb:2: .*a time in column 4",
            1,
        ),
        (lambda x: [x[0], b"a\tb", *x[2:]], "sdb:2: .*a time in column 4.*no column 4", 1),
        (lambda x: [x[0] + b"\x81\xff", *x[1:]], "", 0),
        (lambda x: [_with_column(x[0], 10, b"\x81\xff"), *x[1:]], "sdb:1: not Shift_JIS", 1),
        (lambda x: [_with_column(x[0], 5, b"\x81\xff"), *x[1:]], "", 0),
        (lambda x: [b"\t".join(x[0].split(b"\t")[:10]), *x[1:]], "sdb:1: found 10 columns.*column 11", 1),
        (lambda x: [_with_column(x[0], 10, b"(Z A)"), *x[1:]], r"sdb:1: unknown tag \(Z", 1),
        (lambda x: [_with_column(x[0], 5, b"(Z A)"), *x[1:]], "", 0),
        (lambda x: [_with_column(x[0], 10, b"(F A"), *x[1:]], r"sdb:1: the tag \(F", 1),
    ],
)
def test_malformed_lines_reject_their_utterance_only(tmp_path, change, location, n_lost):
    broken_sdb(tmp_path, change)
    items, rejected = read(tmp_path, tmp_path)
    broken = [item for item in rejected if item.reason == "broken transcript"]
    assert len(broken) == n_lost and 6 - n_lost <= len(items) <= 6
    assert all(re.search(location, item.detail) for item in broken)
    if n_lost:
        with pytest.raises(DataError, match=location):
            read(tmp_path, tmp_path, max_broken=0.0)


def _with_column(line: bytes, column: int, content: bytes) -> bytes:
    columns = line.split(b"\t")
    columns[column] = content
    return b"\t".join(columns)


def test_too_many_malformed_segments_end_the_run_before_audio_is_read(tmp_path, monkeypatch):
    for id in ("A01F0055", "S00M0075", "A01F0067"):
        write_talk(tmp_path, "usb", planned(id))
        path = tmp_path / "MORPH" / "SDB" / "core" / f"{id}.sdb"
        if id != "A01F0055":
            lines = [_with_column(line, 10, b"(Z A)") for line in path.read_bytes().split(b"\r\n")[:-1]]
            path.write_bytes(b"\r\n".join(lines))
    monkeypatch.setattr(talks_, "_channel_audio", lambda *args: pytest.fail("audio was read"))
    items = csj.prepare(tmp_path, tmp_path, csj.Config(), 0)
    with pytest.raises(DataError, match=r"S00M0075.sdb:1: (.|\n)*max_broken"):
        next(items)
    with pytest.raises(ConfigError, match="max_broken"):
        csj.Config(max_broken=1.5)


def test_unreadable_talk_is_rejected(tmp_path):
    broken_sdb(tmp_path, lambda x: [b"a\tb" for _ in x])
    items, rejected = read(tmp_path, tmp_path)
    assert {item.speaker for item in items} == {"A01F0055"}
    assert [item.id for item in rejected if item.reason == "broken transcript"] == ["S00M0075"]
    with pytest.raises(DataError, match=r"S00M0075.sdb:1: "):
        read(tmp_path, tmp_path, max_broken=0.0)


def test_event_needs_no_pronunciation(tmp_path):
    """Trailing columns and empty attributes may be missing."""
    line = b"\t".join(sdb_lines(planned("S00M0075"))[0].encode("cp932").split(b"\t")[:5])
    broken_sdb(tmp_path, lambda x: [line + "\t<笑>".encode("cp932"), *x])
    assert len(read(tmp_path, tmp_path)[0]) == 6
    (tmp_path / "a.xml").write_text(
        '<Talk><IPU IPUStartTime="0" IPUEndTime="1"><SUW OrthographicTranscription="&lt;笑&gt;"/><SUW/>'
        '<SUW OrthographicTranscription="はい"/></IPU></Talk>',
        "utf-8",
    )
    words = transcripts.read_xml(tmp_path / "a.xml").segments[0].words
    assert [bool(word.problem) for word in words] == [False, False, True]


def test_segments_with_invalid_times_have_a_problem(tmp_path):
    sdb = "0\t0\tA\t0001 00002.000-00001.000 L:-001-001\t\t本\t\t\t\t本\tホン\t名詞\n"
    sdb += sdb.replace("0001 ", "0002 ").replace("00001.000", "00003.000")
    (tmp_path / "a.sdb").write_bytes(sdb.encode("cp932"))
    xml = '<Talk><IPU IPUStartTime="x" IPUEndTime="1"/><IPU IPUStartTime="1" IPUEndTime="2"/></Talk>'
    (tmp_path / "a.xml").write_text(xml, "utf-8")
    trn = "0001 00000.000 L:\n本 & ホン\n0002 00001.000-00002.000 L:\n本 & ホン\n"
    (tmp_path / "a.trn").write_bytes(trn.encode("cp932"))
    segments = transcripts.read_sdb(tmp_path / "a.sdb")
    assert "starts at 2.000 s" in segments[0].words[0].problem and not segments[1].words[0].problem
    segments = transcripts.read_xml(tmp_path / "a.xml").segments
    assert "IPUStartTime" in segments[0].words[0].problem and not segments[1].words
    segments = transcripts.read_trn(tmp_path / "a.trn")
    assert "time" in segments[0].words[0].problem and not segments[1].words[0].problem
    for name in ("sdb", "trn"):
        (tmp_path / f"b.{name}").write_text("x\n")
        with pytest.raises(DataError, match=rf"b.{name}"):
            getattr(transcripts, f"read_{name}")(tmp_path / f"b.{name}")


def test_held_out_talks_in_a_training_list_are_rejected(usb, tmp_path):
    path = tmp_path / "talks.txt"
    path.write_text("A01F0055\nA01M0110\nD03M0017\nA03F0109\n")
    held = r"A01M0110 \(eval1\), A03F0109 \(dev\), D03M0017 \(excluded\)"
    with pytest.raises(DataError, match=f"talks.txt.*{held}"):
        read(usb, tmp_path, subset=str(path))
    path.write_text("A01F0055\nA01F0056\n")
    with pytest.raises(DataError, match="A01F0056"):
        read(usb, tmp_path, subset=str(path))
    path.write_text("A01F0055\nA01F0055\n")
    with pytest.raises(DataError, match=r"duplicate.* A01F0055"):
        read(usb, tmp_path, subset=str(path))
    with pytest.raises(DataError, match=r"subset=croe.*did you mean core"):
        read(usb, tmp_path, subset="croe")


def test_talk_in_two_sets_is_reported(monkeypatch):
    read_list = files.read_list
    monkeypatch.setattr(
        files, "read_list", lambda name: read_list("eval1") if name == "dev-lhotse" else read_list(name)
    )
    with pytest.raises(DataError, match=r"A01M0110 is in two sets, eval1 and dev"):
        files.assign_sets({}, "core", "lhotse")


def test_missing_files_are_reported(usb, tmp_path):
    for data in (None, tmp_path):
        with pytest.raises(DataError, match=r"data=FOLDER|no CSJ talks"):
            read(data, tmp_path)
    for id in ("A01F0055", "S00M0075", "A01F0067"):
        write_talk(tmp_path, "usb", planned(id))
    (tmp_path / "WAV" / "core" / "A01F0055.wav").unlink()
    (tmp_path / "MORPH" / "SDB" / "core" / "S00M0075.sdb").unlink()
    rejected = {(item.id, item.reason) for item in read(tmp_path, tmp_path, max_broken=0.7)[1]}
    assert {("A01F0055", "no audio"), ("S00M0075", "no transcript")} <= rejected
    with pytest.raises(
        DataError, match=r"damaged talks \(2 of 3\)(.|\n)*A01F0055: no audio(.|\n)*max_broken"
    ):
        read(tmp_path, tmp_path)


def test_summary_compares_with_figures_of_other_recipes():
    hour = 3600 * RATE

    def compared(name: str, utterances: int, hours: float, **options) -> str:
        count = summary.SplitCount(utterances=utterances, n_samples=round(hours * hour))
        return summary.comparison(name, count, csj.Config(**options))

    hours = 2 + 2 / 60 + 7 / 3600
    icefall = "; icefall: 2.04 h (this split: 100.0% of these hours)"
    assert compared("eval2", 1292, hours, join="kaldi") == (
        "; Kaldi: 1,292 utterances (this split: 100.0% of these utterances)" + icefall
    )
    assert compared("eval2", 1292, hours) == icefall
    assert compared("train", 9, 276, subset="all") == "; the paper: 552 h (this split: 50.0% of these hours)"
    assert compared("train", 9, 276, subset="talks.txt") == ""
    assert (
        compared("dev", 4000, 6.5, dev="kaldi")
        == "; Kaldi: 4,000 utterances, 6.52 h (this split: 99.7% of these hours)"
    )


def test_talks_of_every_set_are_counted_and_missing_ones_reported(usb, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    expected_talks = summary.expected_talks
    evals = {"eval1": 10, "eval2": 10, "eval3": 10}
    assert expected_talks("core", "lhotse") == {**evals, "dev": 39, "train": 186}
    assert expected_talks("core", "kaldi") == {**evals, "train": 188}
    assert expected_talks("all", "lhotse") == {**evals, "dev": 39, "train": 3302 - 30 - 6 - 39}
    assert expected_talks("talks.txt", "lhotse") == {**evals, "dev": 39}
    read(usb, tmp_path, subset="all")
    assert "csj eval1: talks: 1 of 10, utterances: 3, 0.00 h" in caplog.text
    assert "csj dev: talks: 2 of 39" in caplog.text
    assert "csj train: talks: 3 of 3,227" in caplog.text
    assert "talks of eval1 not found (9 of 10): A01M0097 A01M0137 A03M0106" in caplog.text
    assert "talks found: 9 of the 3302" in caplog.text
    read(usb, tmp_path, subset="core")
    assert "talks of core not found (197 of 201): A01F0067" in caplog.text
