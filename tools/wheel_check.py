"""Does a wheel of this checkout work where nothing but ring 1 is installed?

    python tools/wheel_check.py torch==2.15.0                  # a build with CUDA: 6 GB for a while
    python tools/wheel_check.py --work DIR torch==2.6.0        # the same, kept in DIR
    python tools/wheel_check.py --python python3.14            # another Python, which has venv
    python tools/wheel_check.py --work DIR numpy==1.26.4 safetensors==0.4.3 soundfile==0.12.1 soxr==0.5.0

Run it in the development environment. It builds the sdist and the wheel from that, makes tiny models and a
recording and computes what is expected of them, makes an empty environment, and installs there the wheel
without extras and the requirements given. Then it runs itself in that environment (`--inside`): every module
of ring 1 is imported, conf/ and recipes/ are there, features, units and a transcript are those of the
development environment, the commands work, models go into each format of others and say the same from there,
nothing that only an extra brings can be imported, and what needs an extra says so.

With `--work` the environment stays, and a second call installs its requirements over those of the first.
Exit status: 0 all is well, 1 something is not.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# Only the standard library here: `--inside` starts where nothing is certain to be installed.

REPO = Path(__file__).resolve().parent.parent
CORE = ("torch", "numpy", "safetensors", "soundfile", "soxr")
# What the extras bring, and some of what those bring, by the names of modules.
OPTIONAL = (
    "faiss", "fairseq2", "huggingface_hub", "hydra", "jiwer", "librosa", "matplotlib", "omegaconf", "onnx",
    "onnxruntime", "pyarrow", "pyopenjtalk", "pytest", "scipy", "sklearn", "tensorboard", "torchaudio",
    "tqdm", "transformers",
)  # fmt: skip
TOLERANCE = 1e-5
FORMATS = ("flac", "ogg", "mp3")  # of the recording, beside WAV
MODELS = ("base", "large")  # the two shapes of HuBERT, both tiny


class Broken(Exception):
    """What is not as it should be."""


def need(condition: object, message: str) -> None:
    if not condition:
        raise Broken(message)


def run(command: Sequence[str | Path], **options) -> subprocess.CompletedProcess[str]:
    """Run a command and catch what it says; nothing of this environment's Python leads into another one."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    command = [str(part) for part in command]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env={**env, "PYTHONUTF8": "1"}, **options
    )


def done(result: subprocess.CompletedProcess[str], status: int = 0) -> str:
    """What a command printed; Broken if it ended otherwise than expected."""
    need(
        result.returncode == status,
        f"{' '.join(result.args)}\nended with {result.returncode}, not {status}:\n"
        f"{result.stdout[-2000:]}{result.stderr[-4000:]}",
    )
    return result.stdout


# In the development environment.


def build_wheel(into: Path, source: Path = REPO) -> Path:
    """The wheel of this checkout or of an sdist, in `into`. hatchling is downloaded unless it is here."""
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    options = ["--no-deps", "--disable-pip-version-check", *isolation, "--wheel-dir", into]
    done(run([sys.executable, "-m", "pip", "wheel", *options, source]))
    (wheel,) = into.glob("jahubert-*.whl")
    return wheel


def build_sdist(into: Path) -> Path:
    """The sdist of this checkout, in `into`, by hatchling in a folder of its own."""
    with tempfile.TemporaryDirectory() as tool:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done(run([*pip, "--target", tool, "hatchling"]))
        code = f"import sys; sys.path.insert(0, {tool!r}); from hatchling.cli import hatchling; hatchling()"
        done(run([sys.executable, "-c", code, "build", "-t", "sdist", "-d", into], cwd=REPO))
    (sdist,) = into.glob("jahubert-*.tar.gz")
    return sdist


def make_material(folder: Path) -> None:
    """Two tiny models, a recording (44.1 kHz, stereo) and what this environment makes of them."""
    import numpy as np
    import soundfile
    import torch

    import jahubert

    torch.manual_seed(0)
    sizes = {"conv_dims": (8,) * 7, "width": 16, "layers": 2, "heads": 2, "ffn": 32}
    sizes |= {"pos_conv_kernel": 8, "pos_conv_groups": 2}
    for name in MODELS:
        ctc = jahubert.HubertForCtc(getattr(jahubert.HubertConfig, name)(**sizes), 42)
        torch.nn.init.normal_(ctc.lm_head.weight, std=1.5)  # so that it says something
        jahubert.save_bundle(
            folder / name,
            ctc=ctc,
            phonemes=jahubert.PhonemeSet.standard(),
            centroids_KD=torch.randn(9, 16),
            centroid_layer=1,
        )
    t_T = np.arange(3 * 44_100) / 44_100
    syllable = np.clip(2 * np.sin(2 * np.pi * 4 * t_T), 0, 1)  # silence would say nothing
    left = 0.3 * np.sin(2 * np.pi * (200 + 150 * t_T) * t_T) * syllable
    right = np.random.default_rng(0).normal(0, 0.1, len(t_T)) * syllable
    soundfile.write(folder / "audio.wav", np.stack([left, right], axis=1), 44_100)
    (folder / "formats").mkdir()
    for ending in FORMATS:
        soundfile.write(folder / "formats" / f"{ending}.{ending}", np.stack([left, right], axis=1), 44_100)
    arrays, says = results(folder)
    np.savez(folder / "expected.npz", **arrays)
    (folder / "expected.json").write_text(json.dumps(says), encoding="utf-8")


def results(folder: Path) -> tuple[dict, dict[str, str]]:
    """Arrays and texts that the models make of the recording, by name, with the jahubert that is imported."""
    import torch

    import jahubert

    arrays, says = {}, {}
    for name in MODELS:
        source, audio = folder / name, folder / "audio.wav"
        for layer in (1, None):
            extractor = jahubert.FeatureExtractor.from_pretrained(source, layer, device="cpu")
            arrays[f"{name}.features.{layer or 'last'}"] = extractor(audio).numpy()
        options = {"weights": (0.2, 0.3, 0.5), "device": "cpu", "chunk_seconds": 8}
        extractor = jahubert.FeatureExtractor.from_pretrained(source, "all", **options)
        arrays[f"{name}.stream"] = next(extractor.stream(audio)).numpy()
        arrays[f"{name}.many"] = next(extractor.many([audio])).numpy()  # type: ignore[union-attr]
        arrays[f"{name}.units"] = jahubert.UnitExtractor.from_pretrained(source, device="cpu")(audio).numpy()
        options = {"device": "cpu", "dtype": torch.float32}  # what another torch computes as well
        transcript = jahubert.Transcriber.from_pretrained(source, **options).transcribe(audio)
        need(transcript.words, f"the model {name} says nothing, which would prove nothing")
        says[name] = transcript.text
    return arrays, says


# In the other environment. The first two run in the unpacked wheel as well (tests/repository/test_wheel.py).


def check_package() -> None:
    """Every module of ring 1 and every public name can be had, and what is not code came along."""
    import jahubert

    home = Path(jahubert.__file__).parent
    need(REPO not in home.parents, f"jahubert is imported from the checkout, {home}")
    for module in pkgutil.iter_modules(jahubert.__path__, "jahubert."):
        if not module.ispkg and module.name != "jahubert.__main__":  # which is a program
            importlib.import_module(module.name)
    for name in jahubert.__all__:
        getattr(jahubert, name)
    need("jahubert.train" not in sys.modules, "importing ring 1 imported ring 2")
    for file in ("_conf/config.yaml", "_conf/model/base.yaml", "_recipes/demo/prepare.py", "py.typed"):
        need((home / file).is_file(), f"{home / file} is missing")


def check_results(folder: Path) -> float:
    """Features, units and transcripts are the expected ones; returns the largest difference of a feature."""
    import numpy as np

    arrays, says = results(folder)
    expected = np.load(folder / "expected.npz")
    largest = 0.0
    for name, array in arrays.items():
        largest = max(largest, compare(name, array, expected[name]))
    wanted = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    need(says == wanted, f"the transcripts are {says}, expected {wanted}")
    return largest


def compare(name: str, found, wanted) -> float:
    """Largest difference of two arrays; Broken where it is too large, for units (integers) above 0."""
    import numpy as np

    for what, a, b in (("type", found.dtype, wanted.dtype), ("shape", found.shape, wanted.shape)):
        need(a == b, f"{name} has {what} {a}, expected {b}")
    difference = float(np.abs(found - wanted).max())
    allowed = TOLERANCE if found.dtype == np.float32 else 0
    need(difference <= allowed, f"{name} differs by {difference}, allowed is {allowed}")
    return difference


def check_environment() -> None:
    """Nothing is here that only an extra asks for."""
    requires = importlib.metadata.requires("jahubert") or []
    extras = {plain(r) for r in requires if "extra ==" in r}
    need(len(extras) > 10, f"the metadata of the wheel names only these in extras: {sorted(extras)}")
    here = {plain(d.metadata["Name"]) for d in importlib.metadata.distributions()}
    need(not extras & here, f"installed although no extra was asked for: {sorted(extras & here)}")
    found = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    need(not found, f"can be imported although no extra was asked for: {found}")


def plain(requirement: str) -> str:
    """The name in a requirement, as indexes write it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def check_commands(folder: Path, out: Path) -> None:
    """The command `jahubert`, and the messages of what needs an extra."""
    import numpy as np

    from jahubert.inference.transcribe import builtin_model

    found = shutil.which("jahubert", path=str(Path(sys.executable).parent))
    need(found, "the wheel installed no command `jahubert`")
    command, audio = str(found), folder / "audio.wav"
    transcribe: list[str | Path] = [command, "transcribe", "--device", "cpu", "--dtype", "float32"]
    expected = np.load(folder / "expected.npz")
    says = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    for name in MODELS:
        options = ["--device", "cpu", "--model", folder / name]
        said = done(run([*transcribe, "--model", folder / name, audio], cwd=out))
        need(said == says[name] + "\n", f"jahubert transcribe said {said!r}, expected {says[name]!r}")
        done(run([command, "features", *options, "-o", out / name, audio], cwd=out))
        compare("jahubert features", np.load(out / name / "audio.npy"), expected[f"{name}.features.last"])
        units = done(run([command, "units", *options, audio], cwd=out)).split()
        need(units == [str(u) for u in expected[f"{name}.units"]], f"jahubert units said {units}")
        for to, target in (("fairseq", "f.pt"), ("torchaudio", "t.pt"), ("hf", "h")):
            target = out / f"{name}.{target}"
            done(run([command, "convert", folder / name, target, "--to", to], cwd=out))
            said = done(run([*transcribe, "--model", target, audio], cwd=out))
            need(said == says[name] + "\n", f"through {to} the model {name} says {said!r}")
    options = ["--model", folder / "base", "-f", "all", "-o", out / "all"]
    done(run([*transcribe, *options, folder / "formats"], cwd=out))
    written = {(path.name.partition(".")[0], path.name.partition(".")[2]) for path in (out / "all").iterdir()}
    need(len(written) == 7 * len(FORMATS), f"jahubert transcribe -f all wrote {sorted(written)}")
    said = (out / "all" / "flac.txt").read_text(encoding="utf-8")
    need(said == says["base"] + "\n", f"jahubert transcribe said {said!r} of the FLAC")
    done(run([command, "info", folder / "base"], cwd=out))
    if builtin_model() is not None:
        check_speed([command, "transcribe", "--device", "cpu"], folder / "formats", out)
    for needs in (
        [sys.executable, "-m", "jahubert.run", "recipe=demo", "stage=prepare"],
        [command, "transcribe", "--model", "owner/model", audio],
    ):
        result = run(needs, cwd=out)
        done(result, status=2)
        message = "jahubert[train]" in result.stderr and "Traceback" not in result.stderr
        need(message, f"{' '.join(map(str, needs))} does not say which extra it needs:\n{result.stderr}")


def check_speed(transcribe: list[str], formats: Path, out: Path) -> None:
    """The built-in model on a folder of 44.1 kHz stereo files, and on ten minutes, within half a minute."""
    import soundfile

    done(run([*transcribe, formats], cwd=out))
    wav, rate = soundfile.read(formats / "flac.flac", always_2d=True)
    with soundfile.SoundFile(out / "long.wav", "w", rate, 1) as file:
        for _ in range(600 * rate // len(wav) + 1):
            file.write(wav[:, 0])
    started = time.monotonic()
    done(run([*transcribe, out / "long.wav"], cwd=out))
    took = time.monotonic() - started
    need(took < 30, f"jahubert transcribe took {took:.0f} s for ten minutes")


def inside(folder: Path) -> dict[str, str]:
    """All checks, in the environment that runs this; returns the versions and the largest difference."""
    check_environment()
    check_package()
    largest = check_results(folder)
    with tempfile.TemporaryDirectory() as out:
        check_commands(folder, Path(out))
    versions = {name: importlib.metadata.version(name) for name in ("jahubert", *CORE)}
    return {"python": platform.python_version(), **versions, "largest difference": f"{largest:.1e}"}


def outside(requirements: Sequence[str], work: Path, interpreter: str) -> str:
    """Make everything below `work` and run the checks in the environment there; returns what they report."""
    for name in ("wheel", "material"):
        shutil.rmtree(work / name, ignore_errors=True)
        (work / name).mkdir(parents=True)
    wheel = build_wheel(work / "wheel", build_sdist(work / "wheel"))
    make_material(work / "material")
    folder = work / "env"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        done(run([interpreter, "-m", "venv", folder]))
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done(run([*pip, *requirements, wheel]))
    done(run([*pip, "--force-reinstall", "--no-deps", wheel]))  # one of the same version may have been there
    return done(run([python, "-I", Path(__file__).resolve(), "--inside", work / "material"], cwd=work))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("requirements", nargs="*", help="what pip installs beside the wheel: torch==2.13.0")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep the environment there and use it again"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="makes the environment (default: this Python)"
    )
    parser.add_argument("--inside", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        if args.inside:
            report = "".join(f"{key:20}{value}\n" for key, value in inside(args.inside).items())
        elif args.work:
            report = outside(args.requirements, args.work.resolve(), args.python)
        else:
            with tempfile.TemporaryDirectory(prefix="jahubert-wheel-") as work:
                report = outside(args.requirements, Path(work), args.python)
    except Broken as error:
        print(f"wheel_check: {error}", file=sys.stderr)
        return 1
    print(report, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
