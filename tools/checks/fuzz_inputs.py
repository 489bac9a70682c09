"""Random damage to model files, text files and settings, for `fuzz.py`."""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LONG = "x" * 70_000
TOKENS = (
    "", "0", "-1", "1", "-0", "1.5", "nan", "inf", "-inf", "1e308", "1e-320", "9" * 30, "9" * 5_000, "0x10",
    "true", "null", "none", "~", "[]", "{}", "[[[", "{a: b}", "'", '"', "\\", "${exp}", "${oc.env:HOME}",
    "${nothing}", "!!python/object:os.system x", "&a *a", "../x", "/dev/zero", "/dev/full", "/proc/self/mem",
    "file.py:attr", "module:attr", "http://x/y", "-", "--help", "a=b", "*", "?", "%s", "{0}", "\0", "\t",
    "\n", "\r", "\x1b[2J", "\u202e", "\ufeff", "\udc80", "\ud800", "e\u0301", "ア", "ー", "ッ", "|", "<pad>",
    "<s>", "</s>", "<unk>", "#", ",", "１", "²", "١", LONG, "[" * 3_000, "1," * 2_000,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "x", "4", "\ud800", LONG, [], {}, [1], [[]], {"a": 1}, [10**9] * 7, [-1] * 7, [0] * 7, ["a"], [None],
)  # fmt: skip
Writer = Callable[[Path, random.Random], list[str]]


# --- generic damage -----------------------------------------------------------------------------------------


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Change, delete, insert or repeat bytes at a random position, or truncate the content there."""
    if not content:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(64)))
    start = rng.randrange(len(content))
    stop = min(len(content), start + rng.choice((1, 4, 64, 1000)))
    part = content[start:stop]
    middle = rng.choice(
        (
            bytes([part[0] ^ 1 << rng.randrange(8)]) + part[1:], b"", bytes(len(part)), part * 3,
            b"\xff" * len(part), rng.randbytes(len(part)), part + rng.randbytes(8), part[::-1],
        )
    )  # fmt: skip
    return content[:start] if rng.random() < 0.1 else content[:start] + middle + content[stop:]


def damaged_tree(tree: Any, rng: random.Random) -> Any:
    """Replace, delete, copy or nest one node of a JSON value."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places:
        return rng.choice(VALUES)
    parent, key = rng.choice(places)
    _, other_key = other = rng.choice(places)
    action = rng.randrange(6)
    if action == 0:
        del parent[key]
    elif action == 1:
        parent[key] = copy.deepcopy(other[0][other_key])
    elif action == 2:
        for _ in range(rng.choice((1, 60, 2_000))):
            parent[key] = [parent[key]]
    elif action == 3 and isinstance(parent, dict):
        parent[rng.choice((*TOKENS, *map(str, parent)))] = parent[key]
    elif action == 4 and isinstance(parent[key], int):
        parent[key] = parent[key] * rng.choice((-1, 0, 2, 1000, 2**40)) + rng.choice((-1, 0, 1))
    else:
        parent[key] = rng.choice(VALUES)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def dumped(tree: Any) -> bytes:
    try:
        return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):
        return b"[" * 100_000


def damaged_text(content: bytes, rng: random.Random) -> bytes:
    """Change bytes, lines, a field, the line ends or the encoding of a text."""
    action = rng.randrange(10)
    if action == 0:
        return damaged_bytes(content, rng)
    if action == 1:
        text = content.decode("utf-8", "replace")
        return text.encode(rng.choice(("utf-16", "cp932", "utf-8-sig", "utf-32")), "replace")
    if action == 2:
        return content.replace(b"\n", rng.choice((b"\r", b"\r\n", b"", b"\n\n", b"\0", b"\x0b")))
    lines = content.split(b"\n")
    index = rng.randrange(len(lines))
    if action == 3:
        lines[index:index] = [lines[rng.randrange(len(lines))]] * rng.choice((1, 2, 500))
    elif action == 4:
        del lines[index : index + rng.choice((1, 2, 5))]
    elif action == 5:
        rng.shuffle(lines)
    else:
        separator = rng.choice(
            [c for c in (b"\t", b" ", b",", b'"', b":", b"=") if c in lines[index]] or [b" "]
        )
        fields = lines[index].split(separator)
        fields[rng.randrange(len(fields))] = rng.choice(TOKENS).encode("utf-8", "surrogatepass")
        lines[index] = separator.join(fields)
    return b"\n".join(lines)


def several(damage: Callable[[Any, random.Random], Any], content: Any, rng: random.Random) -> Any:
    """Apply a kind of damage once or several times."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        with contextlib.suppress(RecursionError):  # the content is nested too deeply to be copied
            content = damage(content, rng)
    return content


# --- models -------------------------------------------------------------------------------------------------


def model_case(models: list[Path], audio: Path) -> Writer:
    """Return a function that damages a file of a model and then returns a command that opens the model."""

    def write(folder: Path, rng: random.Random) -> list[str]:
        source, target = rng.choice(models), folder / "model"
        if source.is_dir():
            shutil.copytree(source, target)
            path = rng.choice(sorted(target.iterdir()))
        else:
            path = target = Path(shutil.copy(source, folder / source.name))
        damage_model_file(path, rng)
        command = rng.choice(("info", "info", "info", "transcribe", "units", "features", "convert"))
        if command == "info":
            return ["info", str(target)]
        if command == "convert":
            format = rng.choice(("hf", "fairseq", "torchaudio"))
            return ["convert", str(target), str(folder / "converted"), "--to", format]
        output = ["-o", str(folder / "features")] if command == "features" else []
        return [command, str(audio), "--model", str(target), "--device", "cpu", *output]

    return write


def damage_model_file(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.8:
        content = dumped(several(damaged_tree, json.loads(content), rng))
    elif path.suffix == ".safetensors" and rng.random() < 0.8:
        (length,) = struct.unpack("<Q", content[:8])
        header = several(damaged_tree, json.loads(content[8 : 8 + length]), rng)
        new = dumped(header)
        stated = rng.choice((len(new),) * 6 + (0, len(new) - 1, 2**40, 2**64 - 1))
        content = struct.pack("<Q", stated) + new + content[8 + length :]
    elif zipfile.is_zipfile(path) and rng.random() < 0.8:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        pickles = [name for name in members if name.endswith(".pkl")]
        name = rng.choice(pickles if rng.random() < 0.7 else sorted(members))
        members[name] = several(damaged_bytes, members[name], rng)
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
        return
    elif path.suffix == ".gz" and rng.random() < 0.8:
        content = gzip.compress(several(damaged_text, gzip.decompress(content), rng))
    else:
        content = several(damaged_bytes, content, rng)
    path.write_bytes(content)


# --- texts --------------------------------------------------------------------------------------------------


def write_texts(folder: Path, audio: list[Path]) -> dict[str, list[str]]:
    """Write one valid file of each kind below `folder`, and return the command that reads each file, by name.

    In the commands, FILE stands for the file, ROOT for a copy of `folder`, OUT for an output folder, and
    MODEL for a recognizer.
    """
    seconds = 0.5
    files: dict[str, str | list[Any]] = {
        "table.csv": "path,text,id,start,end,speaker\n"
        + "".join(f"{path},青い家,u{i},0,{seconds},s{i % 2}\n" for i, path in enumerate(audio)),
        "table.tsv": "path\tsentence\tsplit\n"
        + "".join(f"{path}\t青い家\t{('train', 'dev', 'test')[i % 3]}\n" for i, path in enumerate(audio)),
        "table.jsonl": [{"audio": str(path), "text": "家", "duration": seconds} for path in audio],
        "cuts.jsonl": [
            {
                "id": f"c{i}", "start": 0.0, "duration": seconds, "channel": 0, "type": "MonoCut",
                "supervisions": [{"id": f"s{i}", "text": "青い家", "speaker": "a", "start": 0.0}],
                "recording": {"id": f"r{i}", "sources": [{"type": "file", "source": str(path)}]},
            }
            for i, path in enumerate(audio)
        ],
        "kaldi/wav.scp": "".join(f"r{i} {path}\n" for i, path in enumerate(audio)),
        "kaldi/segments": "".join(f"u{i} r{i} 0.0 {seconds}\n" for i in range(len(audio))),
        "kaldi/text": "".join(f"u{i} 青い 家\n" for i in range(len(audio))),
        "kaldi/utt2spk": "".join(f"u{i} s{i % 2}\n" for i in range(len(audio))),
        "fairseq/train.tsv": f"{audio[0].parent}\n" + "".join(f"{path.name}\t8000\n" for path in audio),
        "fairseq/valid.tsv": f"{audio[0].parent}\n{audio[0].name}\t8000\n",
        "fairseq/train.km": "".join(f"{' '.join(['0', '1', '2'] * 8)}\n" for _ in audio),
        "fairseq/valid.km": f"{' '.join(['0', '1', '2'] * 8)}\n",
        "fairseq/dict.km.txt": "0 1\n1 1\n2 1\n",
        "words.txt": "愛\ta i\n青\ta o\n家\ti e\n",
        "text.txt": "青い家\n家の愛\n今日は晴れ\n",
        "dictionary.txt": "青井家\tアオイケ\n# comment\n愛\tアイ\n",
        "lm.arpa": "\\data\\\nngram 1=5\nngram 2=2\n\n\\1-grams:\n-0.5\t<s>\t-0.3\n-0.5\t</s>\n"
        "-0.5\t愛\t-0.3\n-0.7\t青\t-0.2\n-0.9\t家\n\n\\2-grams:\n-0.2\t<s> 愛\n-0.2\t愛 家\n\n\\end\\\n",
    }  # fmt: skip
    for name, content in files.items():
        lines = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(lines, encoding="utf-8")
    (folder / "cuts.jsonl.gz").write_bytes(gzip.compress((folder / "cuts.jsonl").read_bytes()))
    (folder / "lm.arpa.gz").write_bytes(gzip.compress((folder / "lm.arpa").read_bytes()))
    prepare = ["run", "recipe=table", "data=FILE", "stage=prepare", "exp=OUT"]
    kaldi_command = [word.replace("FILE", "ROOT/kaldi") for word in prepare]
    fairseq = ["run", "recipe=fairseq", "data=ROOT/fairseq", "stage=prepare", "exp=OUT"]
    label = [*fairseq[:3], "stage=label", "exp=ROOT/exp-fairseq", "device=cpu"]
    targets = ["run", "recipe=table", "data=ROOT/table.csv", "stage=targets", "exp=ROOT/exp-table"]
    decode = ["transcribe", str(audio[0]), "--device", "cpu", "--model", "MODEL", "--lexicon"]
    commands = {name: prepare for name in files if name.startswith(("table", "cuts"))} | {
        "cuts.jsonl.gz": prepare,
        **{name: kaldi_command for name in files if name.startswith("kaldi/")},
        **{name: fairseq for name in files if name.startswith("fairseq/") and name.endswith(".tsv")},
        **{name: label for name in files if name.endswith((".km", ".km.txt"))},
        "words.txt": [*decode, "FILE", "--lm", "ROOT/lm.arpa"],
        "lm.arpa": [*decode, "ROOT/words.txt", "--lm", "FILE"],
        "lm.arpa.gz": ["perplexity", "FILE", "ROOT/text.txt", "--unit", "token"],
        "text.txt": ["ngram", "FILE", "-o", "OUT.arpa", "--order", "2", "--lexicon", "OUT.txt"],
        "dictionary.txt": [*targets, "targets.user_dictionary=FILE"],
    }  # fmt: skip
    return commands


def text_case(source: Path, commands: dict[str, list[str]], model: Path) -> Writer:
    """Return a function that damages a text file and then returns a command that reads the file."""

    def write(folder: Path, rng: random.Random) -> list[str]:
        root = shutil.copytree(source, folder / "root")
        name = rng.choice(sorted(commands))
        path = root / name
        content = path.read_bytes()
        is_gzip = path.suffix == ".gz" and rng.random() < 0.7
        content = gzip.decompress(content) if is_gzip else content
        if (path.suffix == ".jsonl" or (is_gzip and ".jsonl" in name)) and rng.random() < 0.5:
            lines = content.splitlines()
            index = rng.randrange(len(lines)) if lines else 0
            lines[index] = dumped(several(damaged_tree, json.loads(lines[index]), rng))
            content = b"\n".join(lines)
        else:
            content = several(damaged_text, content, rng)
        path.write_bytes(gzip.compress(content) if is_gzip else content)
        names = {"FILE": str(path), "ROOT": str(root), "OUT": str(folder / "out"), "MODEL": str(model)}
        return [_replaced(word, names) for word in commands[name]]

    return write


def _replaced(word: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        word = word.replace(name, value)
    return word


# --- settings -----------------------------------------------------------------------------------------------


def flat_keys(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + str(key)
        if isinstance(value, dict):
            yield from flat_keys(value, f"{prefix}{key}.")


def settings_case(keys: list[str], stages: list[list[str]], commands: list[list[str]], exp: Path) -> Writer:
    """Return a function that returns a command with random settings or options.

    Args:
        keys: names of all settings.
        stages: settings that run each stage of the experiment in folder EXP.
        commands: valid command lines, in which OUT stands for an output folder.
        exp: finished experiment, of which each stage gets a copy without its own output.
    """

    def write(folder: Path, rng: random.Random) -> list[str]:
        kind = rng.random()
        if kind < 0.3:
            words = [word.replace("OUT", str(folder / "out")) for word in rng.choice(commands)]
            for _ in range(rng.choice((1, 1, 2))):
                index = rng.randrange(1, len(words) + 1)
                words[index : index + rng.randrange(2)] = [_argument(rng)]
            return words
        settings = [_setting(rng.choice(keys), rng) for _ in range(rng.choice((1, 1, 2, 3)))]
        if kind < 0.8:
            action = rng.choice((["run", "--info"], ["run", "-c", "job"], ["plan"]))
            stage = rng.choice(("all", "pretrain", "finetune", "decode", "kmeans"))
            return [*action, "recipe=demo", f"stage={stage}", f"exp={folder / 'exp'}", *settings]
        stage_settings = rng.choice(stages)
        name = next(word for word in stage_settings if word.startswith("stage=")).removeprefix("stage=")
        shutil.copytree(exp, folder / "exp")
        for path in (folder / "exp").rglob(name):
            shutil.rmtree(path, ignore_errors=True)
        own = [key for key in keys if key.startswith(f"{name}.")]
        settings = [_setting(rng.choice(own or keys), rng) for _ in range(rng.choice((1, 2)))]
        return ["run", *(word.replace("EXP", str(folder / "exp")) for word in stage_settings), *settings]

    return write


def _argument(rng: random.Random) -> str:
    options = ("--beam", "--chunk", "--layer", "--weights", "--lm-weight", "--word-bonus", "--order")
    option, token = rng.choice(options), rng.choice(TOKENS)
    return rng.choice((option, f"{option}={token}", token))


def _setting(key: str, rng: random.Random) -> str:
    if rng.random() < 0.1:
        key = several(damaged_text, key.encode(), rng).decode("utf-8", "surrogateescape")
    sign = rng.choice(("",) * 5 + ("+", "~", "++"))
    return sign + key + rng.choice(("=",) * 9 + ("", "==")) + rng.choice(TOKENS)
