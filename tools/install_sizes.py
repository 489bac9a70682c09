"""Disk space of the package and of each extra, measured on the installed distributions.

    python tools/install_sizes.py train onnx

Prints the size of a plain install and what each named extra adds to it, in MB, with the largest packages.
The extras must be installed in the environment that runs this.
"""

from __future__ import annotations

import argparse
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LARGEST = 4


def requirements(name: str, extras: set[str]) -> list[Requirement]:
    """The requirements of a distribution that apply on this machine, with `extras`."""
    found = [Requirement(text) for text in metadata.requires(name) or ()]
    environments = [{"extra": extra} for extra in (*extras, "")]
    return [r for r in found if r.marker is None or any(r.marker.evaluate(e) for e in environments)]


def closure(extras: set[str]) -> set[str]:
    """Names of all distributions that jahubert needs with `extras`, itself included."""
    seen: set[tuple[str, frozenset[str]]] = set()
    pending = [("jahubert", frozenset(extras))]
    while pending:
        name, wanted = pending.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        pending += [(canonicalize_name(r.name), frozenset(r.extras)) for r in requirements(name, set(wanted))]
    return {name for name, _ in seen}


def megabytes(name: str) -> float:
    """Size of a distribution's files on disk."""
    paths = [file.locate() for file in metadata.files(name) or ()]
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6  # type: ignore[attr-defined]


def line(title: str, names: set[str]) -> str:
    sizes = {name: megabytes(name) for name in names}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:LARGEST]
    return f"{title:12} {sum(sizes.values()):7.0f} MB   " + ", ".join(
        f"{name} {sizes[name]:.0f}" for name in largest
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("extras", nargs="*", help="extras that are installed here")
    args = parser.parse_args()
    core = closure(set())
    print(line("(none)", core))
    for extra in args.extras:
        print(line(extra, closure({extra}) - core))


if __name__ == "__main__":
    main()
