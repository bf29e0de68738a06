"""Writes the tables of measured figures in README.md and docs/results.md, from the files in benchmarks/results.

    python benchmarks/tables.py

What is between a line ``<!-- table: NAME -->`` and the next ``<!-- end -->`` is made here. NAME is "summary" or that of
a processor in the files' names.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fused_preact.bench import report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "README.md", ROOT / "docs" / "results.md"
SUMMARY = "xeon-amx"  # the processor of the summary, and what it shows
ROWS = {
    "ResNet-1001 bottleneck": ("64x32x32, N=16, ", "128x16x16, N=16, ", "256x8x8, N=16, "),
    "PreActResNet-18 block": ("64x32x32, N=16, fp32", "256x8x8, N=16, fp32"),
    "DenseNet-121 layer": ("160x32x32, N=16, fp32",),
    "Training step": ("ResNet-110, ", "PreActResNet-18, ", "ResNet-1001, N=8, ", "ResNet-1001, N=64, "),
    "Host cost": ("",),
}
FUSED = ("fused channels_last", "fused lean channels_last", "fused min channels_last")
Key = tuple[str, str, str]  # group, label and contender
Rows = dict[str, dict[str, Any]]  # by quantity


def files(processor: str) -> list[Path]:
    """The result files of a processor, the general one first."""
    return sorted(RESULTS.glob(f"????-??-??-{processor}*.json"), key=lambda path: (len(path.name), path.name))


def measured(processor: str, malloc: str) -> dict[Key, tuple[dict[str, Any], Rows]]:
    """The case and the rows of each fused contender; of a case in several files, those of the one with fewest."""
    documents = [report.read(path) for path in files(processor)]
    found: dict[Key, tuple[dict[str, Any], Rows]] = {}
    for document in sorted(documents, key=lambda document: -len(document["cases"])):
        if document["malloc"]["setting"] == malloc:
            for case in document["cases"]:
                rows = report.by_contender(case)
                found |= {(case["group"], case["label"], name): (case, rows[name]) for name in FUSED if name in rows}
    return found


def ordered(found: Iterable[Key]) -> list[Key]:
    """Group by group, each as it first came."""
    groups = [*dict.fromkeys(group for group, _, _ in found)]
    return sorted(found, key=lambda key: groups.index(key[0]))


def table(heads: list[str], rows: Iterator[list[str]]) -> str:
    """Markdown, the first column to the left."""
    lines = [["", *heads], ["---", *["---:"] * len(heads)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def name_of(key: Key) -> str:
    """A row's name: its case, and its memory mode where that is not the default."""
    group, label, contender = key
    mode = contender.removeprefix("fused ").removesuffix("channels_last").strip()
    return f"{group}, {label}" + (f', `memory="{mode}"`' if mode else "")


def kept(case: dict[str, Any], row: dict[str, Any]) -> str:
    """MiB kept for backward by eager and by a contender."""
    amounts = (size / 2**20 for size in report.compared(case, row))
    return f"{' to '.join(f'{mib:.0f}' if mib > 100 else f'{mib:.1f}' for mib in amounts)} MiB"


def ratio(row: dict[str, Any]) -> str:
    """Median, quantiles and goal of a row."""
    found = row["ratio"]
    goal = "" if row["goal"] is None else f"; goal {row['goal']:.3g}"
    return f"{found['median']:.2f}x ({found['low']:.2f}-{found['high']:.2f}{goal})"


def total(rows: Rows) -> str:
    """The cell of forward and backward; of a memory mode, also its time against that of the mode "fast"."""
    cell = ratio(rows["total"])
    if "against_fast" not in rows:
        return cell
    of_fast = rows["against_fast"]
    goal = "" if of_fast["goal"] is None else f" (goal {1 / of_fast['goal']:.2f})"
    return f"{cell}; {1 / of_fast['ratio']['median']:.2f} of fast's time{goal}"


def whole(processor: str) -> str:
    """All that was measured on a processor."""
    plain, tuned = (measured(processor, malloc) for malloc in ("default", "tuned"))

    def rows() -> Iterator[list[str]]:
        for key in ordered(plain):
            case, found = plain[key]
            cells = [ratio(found["forward"]), total(found)]
            cells += [total(tuned[key][1])] if key in tuned else [""] if tuned else []
            yield [name_of(key), *cells, kept(case, found["saved_bytes"])]

    heads = ["forward", "forward + backward", *(["the same, malloc tuned"] if tuned else []), "kept for backward"]
    documents = [report.read(path) for path in files(processor)]
    machine, _, _ = report.headline(documents[0]).partition("; malloc")
    links = []
    for path, document in zip(files(processor), documents, strict=True):
        commit = "" if document["commit"] == documents[0]["commit"] else f" ({document['commit']['hash'][:12]})"
        links.append(f"[{path.stem}](../benchmarks/results/{path.name}){commit}")
    return f"{machine}.\n\nFiles: {', '.join(links)}\n\n{table(heads, rows())}"


def summary() -> str:
    """What ROWS names of one processor, with medians alone."""
    found = measured(SUMMARY, "default")
    wanted = [key for key in ordered(found) if key[1].startswith(ROWS.get(key[0], ()))]

    def rows() -> Iterator[list[str]]:
        for key in wanted:
            case, by_quantity = found[key]
            ratios = [f"{by_quantity[quantity]['ratio']['median']:.2f}x" for quantity in ("forward", "total")]
            yield [name_of(key), *ratios, kept(case, by_quantity["saved_bytes"])]

    return table(["forward", "forward + backward", "kept for backward"], rows())


def filled(text: str) -> str:
    """A page with its tables as the result files have them."""

    def fill(match: re.Match[str]) -> str:
        made = summary() if match[2] == "summary" else whole(match[2])
        return f"{match[1]}\n{made}\n{match[3]}"

    return re.sub(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
