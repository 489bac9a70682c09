"""Check of the wheel built from this checkout, in an environment without any extras.

    python tools/wheel_check.py torch==2.15.0                  # a CUDA build: 6 GB of temporary space
    python tools/wheel_check.py --work DIR torch==2.6.0        # keep the environment in DIR
    python tools/wheel_check.py --python python3.14            # another Python with venv
    python tools/wheel_check.py --work DIR numpy==1.26.4 safetensors==0.4.3 soundfile==0.12.1 soxr==0.5.0

Run the script in the development environment. It builds the sdist, builds the wheel from the sdist, creates
tiny models, a recording and the expected results, and installs the wheel in an empty environment, without
extras but with the given requirements. In this environment, it runs itself (`--inside`) and checks that

- the top-level modules and all public names can be imported and do not import jahubert.train ("ring 2" in
  docs/layout.md), and conf/ and recipes/ are included,
- features, units and a transcript agree with the results of the development environment,
- the commands work, and models converted to other formats give the same results,
- no package of an extra can be imported, and commands that need an extra name it in their error message.

With `--work`, the environment is kept, and later calls install their requirements into it. The exit status is
0 if all checks pass, and otherwise 1.
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

# Other packages are imported in functions, because `--inside` must start in an incomplete environment.

REPO = Path(__file__).resolve().parent.parent
CORE = ("torch", "numpy", "safetensors", "soundfile", "soxr")
# Modules from the extras and from some of their dependencies.
OPTIONAL = (
    "faiss", "fairseq2", "huggingface_hub", "hydra", "jiwer", "librosa", "matplotlib", "omegaconf", "onnx",
    "onnxruntime", "pyarrow", "pyopenjtalk", "pytest", "scipy", "sklearn", "tensorboard", "torchaudio",
    "tqdm", "transformers",
)  # fmt: skip
TOLERANCE = 1e-5
FORMATS = ("flac", "ogg", "mp3")  # audio formats tested in addition to WAV
MODELS = ("base", "large")  # both HuBERT architectures, in tiny sizes


class CheckFailed(Exception):
    """Raised if a check fails."""


def require(condition: object, message: str) -> None:
    """Raise CheckFailed with `message` unless the condition is true."""
    if not condition:
        raise CheckFailed(message)


def run(command: Sequence[str | Path], **options) -> subprocess.CompletedProcess[str]:
    """Run a command in UTF-8 mode without other PYTHON* or VIRTUAL_ENV* variables, and capture its output."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    command = [str(part) for part in command]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env={**env, "PYTHONUTF8": "1"}, **options
    )


def checked_output(result: subprocess.CompletedProcess[str], status: int = 0) -> str:
    """Return the standard output of a command. Raise CheckFailed unless it exited with `status`."""
    require(
        result.returncode == status,
        f"{' '.join(result.args)}\nended with exit status {result.returncode}, expected {status}:\n"
        f"{result.stdout[-2000:]}{result.stderr[-4000:]}",
    )
    return result.stdout


# --- in the development environment ---


def build_wheel(into: Path, source: Path = REPO) -> Path:
    """Build the wheel from this checkout or an sdist into a folder, downloading hatchling if necessary."""
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    options = ["--no-deps", "--disable-pip-version-check", *isolation, "--wheel-dir", into]
    checked_output(run([sys.executable, "-m", "pip", "wheel", *options, source]))
    (wheel,) = into.glob("jahubert-*.whl")
    return wheel


def build_sdist(into: Path) -> Path:
    """Build the sdist from this checkout into a folder, with hatchling installed in a temporary folder."""
    with tempfile.TemporaryDirectory() as tool:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        checked_output(run([*pip, "--target", tool, "hatchling"]))
        code = f"import sys; sys.path.insert(0, {tool!r}); from hatchling.cli import hatchling; hatchling()"
        checked_output(run([sys.executable, "-c", code, "build", "-t", "sdist", "-d", into], cwd=REPO))
    (sdist,) = into.glob("jahubert-*.tar.gz")
    return sdist


def make_material(folder: Path) -> None:
    """Create two tiny models, a 44.1 kHz stereo recording in several formats, and the expected results."""
    import numpy as np
    import soundfile
    import soxr
    import torch

    import jahubert

    sys.path.insert(0, str(REPO / "tests"))
    from fixtures.sounds import syllables

    torch.manual_seed(0)
    sizes = {"conv_dims": (8,) * 7, "width": 16, "layers": 2, "heads": 2, "ffn": 32}
    sizes |= {"pos_conv_kernel": 8, "pos_conv_groups": 2}
    for name in MODELS:
        ctc = jahubert.HubertForCtc(getattr(jahubert.HubertConfig, name)(**sizes), 42)
        torch.nn.init.normal_(ctc.lm_head.weight, std=1.5)  # makes the transcript non-empty
        jahubert.save_bundle(
            folder / name,
            ctc=ctc,
            phonemes=jahubert.PhonemeSet.standard(),
            centroids_KD=torch.randn(9, 16),
            centroid_layer=1,
        )
    left, right = (soxr.resample(syllables(3, seed).numpy(), 16_000, 44_100) for seed in (0, 1))
    soundfile.write(folder / "audio.wav", np.stack([left, right], axis=1), 44_100)
    (folder / "formats").mkdir()
    samples, rate = soundfile.read(folder / "audio.wav", dtype="int16")  # makes lossless copies identical
    for ending in FORMATS:
        soundfile.write(folder / "formats" / f"{ending}.{ending}", samples, rate)
    arrays, texts = results(folder)
    np.savez(folder / "expected.npz", **arrays)
    (folder / "expected.json").write_text(json.dumps(texts), encoding="utf-8")


def results(folder: Path) -> tuple[dict, dict[str, str]]:
    """Compute features, units and transcripts of the recording with the imported jahubert."""
    import torch

    import jahubert

    arrays, texts = {}, {}
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
        options = {"device": "cpu", "dtype": torch.float32}  # supported by all versions of torch
        transcript = jahubert.Transcriber.from_pretrained(source, **options).transcribe(audio)
        require(transcript.words, f"the transcript of the model {name} is empty")
        texts[name] = transcript.text
    return arrays, texts


# --- in the empty environment; test_wheel.py also runs the first two functions in the unpacked wheel ---


def check_package() -> None:
    """Check that top-level modules and public names can be imported, and that data files are included."""
    import jahubert

    home = Path(jahubert.__file__).parent
    require(REPO not in home.parents, f"jahubert is imported from the checkout, {home}")
    for module in pkgutil.iter_modules(jahubert.__path__, "jahubert."):
        if not module.ispkg and module.name != "jahubert.__main__":  # importing __main__ runs the command
            importlib.import_module(module.name)
    for name in jahubert.__all__:
        getattr(jahubert, name)
    require("jahubert.train" not in sys.modules, "importing ring 1 imported ring 2")
    for file in ("_conf/config.yaml", "_conf/model/base.yaml", "_recipes/demo/prepare.py", "py.typed"):
        require((home / file).is_file(), f"{home / file} is missing")


def check_results(folder: Path) -> float:
    """Check features, units and transcripts, and return the largest difference between features."""
    import numpy as np

    arrays, texts = results(folder)
    expected = np.load(folder / "expected.npz")
    largest = 0.0
    for name, array in arrays.items():
        largest = max(largest, compare(name, array, expected[name]))
    expected_texts = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    require(texts == expected_texts, f"the transcripts are {texts}, expected {expected_texts}")
    return largest


def compare(name: str, actual, expected) -> float:
    """Return the largest difference between two arrays. Raise CheckFailed unless they agree."""
    import numpy as np

    for what, a, b in (("type", actual.dtype, expected.dtype), ("shape", actual.shape, expected.shape)):
        require(a == b, f"{name} has {what} {a}, expected {b}")
    difference = float(np.abs(actual - expected).max())
    allowed = TOLERANCE if actual.dtype == np.float32 else 0
    require(difference <= allowed, f"{name} differs by {difference}, more than {allowed}")
    return difference


def check_environment() -> None:
    """Check that no package of an extra is installed."""
    requires = importlib.metadata.requires("jahubert") or []
    extras = {plain(r) for r in requires if "extra ==" in r}
    require(len(extras) > 10, f"the wheel's metadata lists too few packages in extras: {sorted(extras)}")
    here = {plain(d.metadata["Name"]) for d in importlib.metadata.distributions()}
    require(not extras & here, f"installed without any extra: {sorted(extras & here)}")
    importable = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    require(not importable, f"importable without any extra: {importable}")


def plain(requirement: str) -> str:
    """Return the normalized name of the package in a requirement."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def check_commands(folder: Path, out: Path) -> None:
    """Check the `jahubert` command, including its messages about missing extras."""
    import numpy as np

    from jahubert.formats.hub import builtin_model

    executable = shutil.which("jahubert", path=str(Path(sys.executable).parent))
    require(executable, "the wheel did not install the `jahubert` command")
    command, audio = str(executable), folder / "audio.wav"
    transcribe: list[str | Path] = [command, "transcribe", "--device", "cpu", "--dtype", "float32"]
    expected = np.load(folder / "expected.npz")
    texts = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    for name in MODELS:
        options = ["--device", "cpu", "--model", folder / name]
        printed = checked_output(run([*transcribe, "--model", folder / name, audio], cwd=out))
        require(
            printed == texts[name] + "\n",
            f"jahubert transcribe printed {printed!r}, expected {texts[name]!r}",
        )
        checked_output(run([command, "features", *options, "-o", out / name, audio], cwd=out))
        compare("jahubert features", np.load(out / name / "audio.npy"), expected[f"{name}.features.last"])
        units = checked_output(run([command, "units", *options, audio], cwd=out)).split()
        require(units == [str(u) for u in expected[f"{name}.units"]], f"jahubert units printed {units}")
        for to, target in (("fairseq", "f.pt"), ("torchaudio", "t.pt"), ("hf", "h")):
            target = out / f"{name}.{target}"
            checked_output(run([command, "convert", folder / name, target, "--to", to], cwd=out))
            printed = checked_output(run([*transcribe, "--model", target, audio], cwd=out))
            require(printed == texts[name] + "\n", f"converted to {to}, the model {name} gives {printed!r}")
    options = ["--model", folder / "base", "-f", "all", "-o", out / "all"]
    checked_output(run([*transcribe, *options, folder / "formats"], cwd=out))
    written = {(path.name.partition(".")[0], path.name.partition(".")[2]) for path in (out / "all").iterdir()}
    require(len(written) == 7 * len(FORMATS), f"jahubert transcribe -f all wrote {sorted(written)}")
    printed = (out / "all" / "flac.txt").read_text(encoding="utf-8")
    require(printed == texts["base"] + "\n", f"jahubert transcribe printed {printed!r} for the FLAC file")
    checked_output(run([command, "info", folder / "base"], cwd=out))
    if builtin_model() is not None:
        check_speed([command, "transcribe", "--device", "cpu"], folder / "formats", out)
    for extra, needs in (
        ("train", [sys.executable, "-m", "jahubert.run", "recipe=demo", "stage=prepare"]),
        ("hub", [command, "transcribe", "--model", "owner/model", audio]),
    ):
        result = run(needs, cwd=out)
        checked_output(result, status=2)
        message = f"[{extra}]" in result.stderr and "Traceback" not in result.stderr
        require(message, f"{' '.join(map(str, needs))} does not name the missing extra:\n{result.stderr}")


def check_speed(transcribe: list[str], formats: Path, out: Path) -> None:
    """Check that the built-in model transcribes a folder, and a ten-minute recording in less than 30 s.

    The time is the elapsed or the processor time, whichever is shorter, so the check also passes on a busy
    machine.
    """
    import soundfile

    checked_output(run([*transcribe, formats], cwd=out))
    wav, rate = soundfile.read(formats / "flac.flac", always_2d=True)
    with soundfile.SoundFile(out / "long.wav", "w", rate, 1) as file:
        for _ in range(600 * rate // len(wav) + 1):
            file.write(wav[:, 0])
    started, before = time.monotonic(), os.times()
    checked_output(run([*transcribe, out / "long.wav"], cwd=out))
    took, after = time.monotonic() - started, os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    if processor:  # always 0 on Windows
        took = min(took, processor)
    require(took < 30, f"jahubert transcribe took {took:.0f} s for ten minutes")


def inside(folder: Path) -> dict[str, str]:
    """Run all checks in the current environment, and return versions and the largest difference."""
    check_environment()
    check_package()
    largest = check_results(folder)
    with tempfile.TemporaryDirectory() as out:
        check_commands(folder, Path(out))
    versions = {name: importlib.metadata.version(name) for name in ("jahubert", *CORE)}
    return {"python": platform.python_version(), **versions, "largest difference": f"{largest:.1e}"}


def outside(requirements: Sequence[str], work: Path, interpreter: str) -> str:
    """Create an environment in `work`, run the checks in it, and return their report."""
    for name in ("wheel", "material"):
        shutil.rmtree(work / name, ignore_errors=True)
        (work / name).mkdir(parents=True)
    wheel = build_wheel(work / "wheel", build_sdist(work / "wheel"))
    make_material(work / "material")
    folder = work / "env"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        checked_output(run([interpreter, "-m", "venv", folder]))
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    checked_output(run([*pip, *requirements, wheel]))
    # This replaces an older wheel with the same version.
    checked_output(run([*pip, "--force-reinstall", "--no-deps", wheel]))
    return checked_output(
        run([python, "-I", Path(__file__).resolve(), "--inside", work / "material"], cwd=work)
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "requirements", nargs="*", help="requirements to install with the wheel, such as torch==2.13.0"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep and reuse the environment in this folder"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="Python of the environment (default: the running one)"
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
    except CheckFailed as error:
        print(f"wheel_check: {error}", file=sys.stderr)
        return 1
    print(report, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
