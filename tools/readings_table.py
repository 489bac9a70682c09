"""Accuracy of the text front end and of plain pyopenjtalk-plus on hand-checked readings.

    python tools/readings_table.py [tests/fixtures/readings.tsv]

The script prints a Markdown table with one row per class of rules, and the texts that jahubert misreads. Long
vowels (エイ and エー, オウ and オー), ヲ and ユウ are normalized before the comparison.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

from jahubert.errors import DataError
from jahubert.train.text.japanese import openjtalk, text_to_words

READINGS = Path(__file__).parents[1] / "tests" / "fixtures" / "readings.tsv"
E_ROW = "エケセテネヘメレゲゼデベペェ"
O_ROW = "オコソトノホモヨロゴゾドボポョォ"


def unify(kana: str) -> str:
    """Normalize different kana spellings of the same pronunciation."""
    kana = "".join(re.findall("[ァ-ヺー]", kana)).replace("ヲ", "オ")
    kana = re.sub(f"([{E_ROW}])イ", r"\1ー", kana)
    kana = re.sub(f"([{O_ROW}])ウ", r"\1ー", kana)
    return re.sub("([ユュ])ウ", r"\1ー", kana)


def front_end(text: str) -> str:
    try:
        return "".join(word.kana for word in text_to_words(text))
    except DataError:
        return ""


def analyzer_alone(text: str) -> str:
    return "".join(feature["pron"] for feature in openjtalk().run_frontend(text))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("readings", type=Path, nargs="?", default=READINGS)
    lines = parser.parse_args().readings.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    total, correct, plain = Counter[str](), Counter[str](), Counter[str]()
    errors = []
    for name, text, reading in rows:
        words = front_end(text)
        total[name] += 1
        correct[name] += unify(words) == unify(reading)
        plain[name] += unify(analyzer_alone(text)) == unify(reading)
        if unify(words) != unify(reading):
            errors.append(f"{name}: {text}: expected {reading}, found {words}")
    print("| class | sentences | jahubert | pyopenjtalk-plus alone |\n|---|---|---|---|")
    for name, n in total.items():
        print(f"| {name} | {n} | {correct[name]} | {plain[name]} |")
    print(f"| **all** | {total.total()} | {correct.total()} | {plain.total()} |")
    print(*errors, sep="\n")


if __name__ == "__main__":
    main()
