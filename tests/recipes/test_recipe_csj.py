"""CSJ from invented trees: layouts, tags, channels, sets, and every mistake with its file and line."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest
import soundfile
from fixtures.csj_tree import RATE, Talk, expected, planned, sdb_lines, write_file_list, write_talk

from jahubert import run
from jahubert.errors import DataError
from jahubert.train.data.manifest import Manifest, Rejected, Utterance
from jahubert.train.data.targets import TargetStore
from jahubert.train.experiment.registry import resolve
from jahubert.train.stages import prepare as stage

RECIPE = Path(__file__).parents[2] / "recipes" / "csj" / "prepare.py"
csj = sys.modules[resolve(f"{RECIPE}:prepare", {}, "recipe").__module__]
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


# --- trees ------------------------------------------------------------------------------------------------


LAYOUTS = [("usb", ("sdb", "xml")), ("usb", ("xml",)), ("dvd", ("sdb",)), ("dvd", ("xml", "trn"))]
LAYOUTS += [("merl", ("sdb",)), ("merl", ("trn",)), ("speech", ("sdb", "trn"))]


@pytest.mark.parametrize(("layout", "kinds"), LAYOUTS)
def test_every_layout_comes_out_as_planned(tmp_path, caplog, layout, kinds):
    caplog.set_level(logging.INFO)
    data, plan = write(tmp_path / "CSJ", layout, kinds), talks()
    config = stage.Config(recipe="csj", data=str(data), options={"subset": "core"})
    (tmp_path / "out").mkdir()
    counts = stage.prepare(config, tmp_path / "out")
    manifest = Manifest(tmp_path / "out" / "manifest.arrow")
    items = [manifest[i] for i in range(len(manifest))]
    wanted = expected([talk for talk in plan if talk.id in SETS])
    assert {item.id: (item.start, item.n_samples, item.words) for item in items} == wanted
    assert all(item.split == SETS[item.speaker] for item in items)
    assert counts["hours"] == pytest.approx(sum(n for _, n, _ in wanted.values()) / RATE / 3600)
    events = 6 * len(SETS)  # two next to each utterance
    assert counts["rejected"] == {"masked name": len(SETS), "no words": events}
    assert {name: split["utterances"] for name, split in counts["splits"].items()} == {
        "dev": 6, "eval1": 3, "eval2": 3, "eval3": 3, "train": 6
    }  # fmt: skip
    n_words = sum(len(words) for id, (_, _, words) in wanted.items() if SETS[id[:8]] == "train")
    assert f"csj train: 2 of 186 talks, 6 utterances, 0.00 h, {n_words} words" in caplog.text
    assert "csj dropped, masked name: 7" in caplog.text
    hours = sum(n for id, (_, n, _) in wanted.items() if SETS[id[:8]] == "train") / RATE / 3600
    assert f"words; the paper: 32 h, here {hours / 32:.1%} of that" in caplog.text
    assert re.search(r"; lhotse: 3,743 utterances, 6.67 h, here 0\.\d% of that", caplog.text)
    assert "髙い" in "".join(item.text for item in items)
    assert "ＩＢＭ" in "".join(item.text for item in items)


def test_the_command_of_the_readme_reads_it(usb, tmp_path, capsys):
    command = ["recipe=csj", f"data={usb}", f"exp={tmp_path}", "device=cpu"]
    assert run.main([*command, "subset=all", "stage=prepare"]) == 0
    assert run.main([*command, "subset=all", "stage=targets"]) == 0
    manifest = Manifest(tmp_path / "prepare" / "manifest.arrow")
    store = TargetStore(tmp_path / "targets")
    for row in store.labeled_rows:
        assert tuple(store.words(row)) == manifest[row].words
    # Of a second each, some are too short for their phones.
    assert len(store.labeled_rows) > 10
    capsys.readouterr()
    assert run.main([*command, "subset=core", "stage=prepare"]) == 2
    assert "prepare.options.subset was all, now core" in capsys.readouterr().err
    assert run.main(["recipe=demo", "stage=prepare", f"exp={tmp_path}/demo", "subset=core"]) == 2
    assert "subset: there is no such key" in capsys.readouterr().err


def test_trn_where_there_is_nothing_better(tmp_path, caplog):
    plan = planned("A01F0055")
    write_talk(tmp_path, "usb", plan, ("trn",))
    items, _ = read(tmp_path, tmp_path)
    assert {item.id: (item.start, item.n_samples, item.words) for item in items} == expected([plan])
    assert "1 talks have only a TRN, whose words are phrases: A01F0055" in caplog.text


def test_all_takes_what_is_not_core_and_a_list_what_it_names(usb, tmp_path):
    def trained(**options):
        return {item.speaker for item in read(usb, tmp_path, **options)[0] if item.split == "train"}

    assert trained() == {"A01F0055", "S00M0075"}
    assert trained(subset="all") == {"A01F0055", "S00M0075", "A01M0999"}
    (tmp_path / "mine.txt").write_text("# one\nA01M0999\n")
    assert trained(subset=str(tmp_path / "mine.txt")) == {"A01M0999"}


def test_the_core_is_found_by_folder_then_file_list_then_list(tmp_path):
    talk = planned("A01M0999", core=False)
    write_talk(tmp_path / "dvd", "dvd", talk)
    assert not files.find_talks(tmp_path / "dvd")["A01M0999"].core
    talk.core = True
    write_file_list(tmp_path / "dvd", [talk, planned("A01M0998")])
    assert files.find_talks(tmp_path / "dvd")["A01M0999"].core
    write_talk(tmp_path / "usb", "usb", talk)
    assert files.find_talks(tmp_path / "usb")["A01M0999"].core


def test_the_cell_of_the_file_list_is_a_word(tmp_path, caplog):
    """An edition without core folders: only what says that it is the core is the core."""
    said = {
        "A01F0055": "コア",
        "A01F0067": "ノンコア",
        "S00M0075": "○",
        "A01M0999": "ノンコア",
        "A01M0998": "1",
    }
    said |= {"A01M0997": "", "A01F0122": "コ゛ア", "A01M0996": "不明"}
    for id in said:
        write_talk(tmp_path, "dvd", planned(id))
    rows = ["講演ID,講演種別,コア", *(f"{id},学会,{cell}" for id, cell in said.items())]
    (tmp_path / "fileList.csv").write_bytes("\r\n".join(rows).encode("cp932"))
    found = files.find_talks(tmp_path)
    assert {id for id, talk in found.items() if talk.core} == {"A01F0055", "S00M0075", "A01M0998", "A01F0122"}
    assert "the column コア of 2 talks says neither コア nor ノンコア, but 'コ゛ア' '不明'" in caplog.text
    assert "by lists/core.txt 1 talks are core, but their folder" in caplog.text
    assert "by lists/core.txt 1 talks are not core, but their folder" in caplog.text


def test_sources_that_disagree_on_the_core_are_named(tmp_path, caplog):
    for id, core in (("A01F0055", True), ("A01F0067", False)):
        write_talk(tmp_path, "usb", planned(id, core=core))
    assert "says otherwise" not in caplog.text
    write_file_list(tmp_path, [planned("A01F0055", core=False), planned("A01F0067", core=False)])
    found = files.find_talks(tmp_path)
    assert [id for id in found if found[id].core] == ["A01F0055"]
    assert re.search(r"by fileList.csv 1 talks are not core, .*says otherwise: A01F0055\n", caplog.text)
    assert re.search(r"by lists/core.txt 1 talks are core, .*says otherwise: A01F0067\n", caplog.text)


def test_training_talks_come_in_a_random_order_that_the_seed_decides(tmp_path):
    sets = {f"A01M{i:04d}": "train" for i in range(20)} | {"A01M0110": "eval1", "A03F0109": "dev"}
    orders = [list(csj._in_order(sets, seed, lambda: True)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert all(order[:2] == ["A01M0110", "A03F0109"] for order in orders)
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(sets)
    asked = iter([False, False, True])
    front = list(csj._in_order(sets, 0, lambda: next(asked)))[2:4]
    assert front == ["A01M0000", "A01M0001"]


def test_kaldi_takes_its_development_set_from_the_front(usb, tmp_path, monkeypatch):
    read_list = files.read_list
    monkeypatch.setattr(csj, "read_list", lambda name: ["4"] if name == "dev-kaldi" else read_list(name))
    items, _ = read(usb, tmp_path, dev="kaldi")
    dev = [item.id for item in items if item.split == "dev"]
    # Without the other list, its talks are training data like any other.
    train = sorted(
        id for id in expected(talks()) if SETS.get(id[:8]) in ("train", "dev") and id[:8] != "S02F0122"
    )
    assert dev == train[:4]
    assert sorted(item.id for item in items if item.split == "train") == train[4:]


def test_the_lists_are_those_of_the_published_recipes():
    core, valid = set(files.read_list("core")), set(files.read_list("dev-lhotse"))
    evals = {id for name in files.EVALS for id in files.read_list(name)}
    excluded = set(files.read_list("excluded"))
    assert (len(core), len(evals), len(excluded), len(valid)) == (201, 30, 6, 39)
    assert len(core - evals - excluded) == 188
    assert core & valid == {"A03F0109", "S00F0014"}
    assert files.read_list("dev-kaldi") == ["4000"]


# --- dialogues --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stereo", [False, True])
def test_the_channels_of_a_dialogue_are_two_speakers(tmp_path, stereo):
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
        both, _ = soundfile.read(tmp_path / "CSJ" / "WAV" / "core" / "D01F0002.wav")
        assert (soundfile.read(work / "D01F0002-R.flac")[0] == both[:, 1]).all()


def test_a_dialogue_without_its_channels_is_left_out(tmp_path):
    write_talk(tmp_path, "usb", planned("D01F0002", channels="LR"))
    wav = tmp_path / "WAV" / "core"
    (wav / "D01F0002-L.wav").rename(wav / "D01F0002.wav")
    (wav / "D01F0002-R.wav").unlink()
    assert [(item.id, item.reason) for item in read(tmp_path, tmp_path)[1]] == [
        ("D01F0002-L", "unusable audio"),
        ("D01F0002-R", "unusable audio"),
    ]


# --- mistakes ---------------------------------------------------------------------------------------------


def broken_sdb(root: Path, change) -> Path:
    """A corpus of one good talk and one whose SDB lines went through `change`."""
    write_talk(root, "usb", planned("A01F0055"))
    write_talk(root, "usb", planned("S00M0075"))
    path = root / "MORPH" / "SDB" / "core" / "S00M0075.sdb"
    lines = [line.encode("cp932") for line in sdb_lines(planned("S00M0075"))]
    path.write_bytes(b"\r\n".join(change(lines)) + b"\r\n")
    return path


@pytest.mark.parametrize(
    ("change", "says", "left"),
    [
        (lambda x: [x[0], x[1].replace(b"-", b"~", 1), *x[2:]], "sdb:2: no time in column 4", 3),
        (lambda x: [x[0], b"a\tb", *x[2:]], "sdb:2: no time in column 4.*found 2 columns", 3),
        (lambda x: [x[0], x[1].split(b"\t")[0] + b"\x81\xff", *x[2:]], r"sdb:2: not Shift_JIS \(CP932\)", 3),
        (lambda x: [b"\t".join(x[0].split(b"\t")[:10]), *x[1:]], "sdb:1: 10 columns.*would be column 11", 5),
        (lambda x: [x[0].replace(x[0].split(b"\t")[10], b"(Z A)"), *x[1:]], r"sdb:1: unknown tag \(Z", 5),
    ],
)
def test_a_broken_transcript_stops_or_is_left_out(tmp_path, change, says, left):
    broken_sdb(tmp_path, change)
    with pytest.raises(DataError, match=says) as error:
        read(tmp_path, tmp_path)
    assert "prepare.options.broken=drop" in str(error.value)
    items, rejected = read(tmp_path, tmp_path, broken="drop")
    assert len(items) == left
    assert [item.reason for item in rejected].count("broken transcript") == 1


def test_broken_transcripts_are_named_before_any_audio_is_read(tmp_path, monkeypatch):
    """Hours of decoding come behind them: the last talk's mistakes are known first, all at once."""
    broken_sdb(tmp_path, lambda x: [x[0], b"a\tb", *x[2:]])
    monkeypatch.setattr(talks_, "_audio", lambda *args: pytest.fail("audio was read"))
    items = csj.prepare(tmp_path, tmp_path, csj.Config(), 0)
    with pytest.raises(
        DataError, match=r"transcripts of 1 talks cannot be read, at 1 places:\n.*S00M0075.sdb:2:"
    ):
        next(items)


def test_a_word_that_is_only_an_event_needs_no_pronunciation(tmp_path):
    """Columns at the end of a line may be missing, and attributes that would be empty."""
    line = b"\t".join(sdb_lines(planned("S00M0075"))[0].encode("cp932").split(b"\t")[:5])
    broken_sdb(tmp_path, lambda x: [line + "\t<笑>".encode("cp932"), *x])
    assert len(read(tmp_path, tmp_path)[0]) == 6
    (tmp_path / "a.xml").write_text(
        '<Talk><IPU IPUStartTime="0" IPUEndTime="1"><SUW OrthographicTranscription="&lt;笑&gt;"/><SUW/>'
        '<SUW OrthographicTranscription="はい"/></IPU></Talk>',
        "utf-8",
    )
    words = transcripts.read_xml(tmp_path / "a.xml").segments[0].words
    assert [word.problem for word in words] == ["", "", "a SUW without a PhoneticTranscription"]


def test_a_segment_that_ends_before_it_starts():
    with pytest.raises(DataError, match=r"a.sdb:7: a segment from 2.000 to 1.000 s"):
        transcripts._segment("a.sdb:7", 2 * RATE, RATE, "L")


def test_a_held_out_talk_in_training_is_refused(usb, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("A01F0055\nA01M0110\nD03M0017\nA03F0109\n")
    held = r"A01M0110 \(eval1\), A03F0109 \(dev\), D03M0017 \(excluded\)"
    with pytest.raises(DataError, match=f"mine.txt: held out, and so not to be trained on: {held}"):
        read(usb, tmp_path, subset=str(path))
    path.write_text("A01F0055\nA01F0056\n")
    with pytest.raises(DataError, match="no such talks in the corpus: A01F0056"):
        read(usb, tmp_path, subset=str(path))
    path.write_text("A01F0055\nA01F0055\n")
    with pytest.raises(DataError, match="listed twice: A01F0055"):
        read(usb, tmp_path, subset=str(path))
    says = "subset=croe: neither core nor all, nor a file with the talks to train on; did you mean core?"
    with pytest.raises(DataError, match=re.escape(says)):
        read(usb, tmp_path, subset="croe")


def test_a_talk_in_two_subsets_is_refused(tmp_path, monkeypatch):
    write_talk(tmp_path / "a", "usb", planned("A01F0055"))
    noncore = tmp_path / "a" / "WAV" / "noncore"
    noncore.mkdir()
    (tmp_path / "a" / "WAV" / "core" / "A01F0055.wav").rename(noncore / "A01F0055.wav")
    with pytest.raises(
        DataError, match=r"A01F0055 is in two subsets: .*core.A01F0055.sdb and .*noncore.A01F0055.wav"
    ):
        read(tmp_path / "a", tmp_path)
    for layout in ("usb", "dvd"):
        write_talk(tmp_path / "b", layout, planned("A01F0055"))
    with pytest.raises(DataError, match="A01F0055 is there twice"):
        read(tmp_path / "b", tmp_path)
    read_list = files.read_list
    monkeypatch.setattr(
        files, "read_list", lambda name: read_list("eval1") if name == "dev-lhotse" else read_list(name)
    )
    with pytest.raises(DataError, match=r"A01M0110 is in two sets, eval1 and dev"):
        files.sets_of({}, "core", "lhotse")


def test_missing_files_are_named(usb, tmp_path):
    for data in (None, tmp_path):
        with pytest.raises(DataError, match=r"Corpus of Spontaneous Japanese|no talk of CSJ here"):
            read(data, tmp_path)
    write_talk(tmp_path, "usb", planned("A01F0055"))
    write_talk(tmp_path, "usb", planned("S00M0075"))
    (tmp_path / "WAV" / "core" / "A01F0055.wav").unlink()
    (tmp_path / "MORPH" / "SDB" / "core" / "S00M0075.sdb").unlink()
    found = {(item.id, item.reason) for item in read(tmp_path, tmp_path)[1]}
    assert found == {("A01F0055", "no audio"), ("S00M0075", "no transcript")}


def test_the_summary_compares_with_the_figures_of_other_recipes():
    """A split that is as large as the known one is all of it, by what can be compared."""
    hour = 3600 * RATE

    def beside(name: str, utterances: int, hours: float, **options) -> str:
        count = summary.Count(utterances=utterances, n_samples=round(hours * hour))
        return summary.beside(name, count, csj.Config(**options))

    hours = 2 + 2 / 60 + 7 / 3600
    icefall = "; icefall: 2.04 h, here 100.0% of that"
    assert beside("eval2", 1292, hours, join="kaldi") == (
        "; Kaldi: 1,292 utterances, here 100.0% of that" + icefall
    )
    assert beside("eval2", 1292, hours) == icefall
    assert beside("train", 9, 276, subset="all") == "; the paper: 552 h, here 50.0% of that"
    assert beside("train", 9, 276, subset="mine.txt") == ""
    assert beside("dev", 4000, 6.5, dev="kaldi") == "; Kaldi: 4,000 utterances, 6.52 h, here 99.7% of that"


def test_the_talks_of_every_set_are_counted_and_the_missing_ones_named(usb, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    expected_talks = summary.expected_talks
    evals = {"eval1": 10, "eval2": 10, "eval3": 10}
    assert expected_talks("core", "lhotse") == {**evals, "dev": 39, "train": 186}
    assert expected_talks("core", "kaldi") == {**evals, "train": 188}
    assert expected_talks("all", "lhotse") == {**evals, "dev": 39, "train": 3302 - 30 - 6 - 39}
    assert expected_talks("mine.txt", "lhotse") == {**evals, "dev": 39}
    read(usb, tmp_path, subset="all")
    assert "csj eval1: 1 of 10 talks, 3 utterances, 0.00 h" in caplog.text
    assert "csj dev: 2 of 39 talks" in caplog.text
    assert "csj train: 3 of 3,227 talks" in caplog.text
    assert "9 of the 10 talks of eval1 are not there: A01M0097 A01M0137 A03M0106" in caplog.text
    assert "csj: 9 talks are here, of the 3302 of the corpus" in caplog.text
    read(usb, tmp_path, subset="core")
    assert "197 of the 201 talks of core are not there: A01F0067" in caplog.text
