"""The pages of docs/study/: each study's table as it stands in its folder, and a figure of what differs.

    python benchmarks/study_figures.py runs/study-*      # after `moeslim study recipes/study-NAME.yaml runs/study-NAME`

A panel per figure, a row per variant: the difference to the baseline, paired by seed, with its 95 % interval. Nothing
is computed here; the last line is one JSON object with the seeds, subjects and failures of each study.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from moeslim.artifacts.commit import read_json, write_bytes
from moeslim.report.study import markdown

DOCS = Path(__file__).parents[1] / "docs" / "study"
PANELS = {  # what fits beside each other, of what a study may measure
    "bits_per_byte": "bits per byte",
    "kl": "KL from the teacher, nats/token",
    "acc_1": "two drafts accepted, points",
    "accepted_length": "mean accepted length",
}


def write_page(record: dict[str, Any], out: Path) -> None:
    """OUT/<title>.md: how it was made, the figure, and the table of `moeslim study`."""
    title = record["title"]
    head, body = markdown(record).split("\n", maxsplit=1)
    lines = [
        head,
        "",
        f"    moeslim study recipes/{title}.yaml runs/{title}",
        f"    python benchmarks/study_figures.py runs/{title}",
        "",
        f"![differences to the baseline with 95 % intervals]({title}.svg)",
    ]
    write_bytes(out / f"{title}.md", ("\n".join(lines) + "\n" + body).encode("utf-8"))


def write_figure(record: dict[str, Any], path: Path) -> None:
    """The differences to the baseline, drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "moeslim", "font.size": 9, "svg.fonttype": "none"})
    others = [subject for subject in record["subjects"] if not subject["baseline"]]
    size = (2.4 * len(PANELS) + 1.6, 0.3 * len(others) + 1.1)
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=size, sharey=True, squeeze=False)
    for panel, (metric, name) in zip(panels[0], PANELS.items(), strict=True):
        panel.axvline(0, color="0.5", linestyle="--", linewidth=1)
        for place, subject in enumerate(others):
            found = subject["differences"].get(metric, {}).get("")
            if found is None:
                continue
            factor = 100 if name.endswith("points") else 1
            bar = factor * (found["half_width"] or 0)
            tone = "C0" if abs(found["value"]) > (found["half_width"] or 0) else "0.55"
            panel.errorbar(factor * found["value"], place, xerr=bar, fmt="o", markersize=4, color=tone, capsize=2)
        panel.grid(axis="x", color="0.92")
        panel.set_axisbelow(True)
        panel.set_xlabel(name)
    panels[0][0].set_yticks(range(len(others)), [subject["name"] for subject in others])
    panels[0][0].set_ylim(len(others) - 0.5, -0.5)
    figure.suptitle(f"minus {record['baseline']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Write the pages of the studies that are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, help="folders that `moeslim study` wrote")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    told = {}
    for folder in args.studies:
        record = read_json(folder / "study.json")
        write_page(record, args.out)
        write_figure(record, args.out / f"{record['title']}.svg")
        names = [subject["name"] for subject in record["subjects"]]
        told[record["title"]] = {"seeds": record["seeds"], "failed": record["failed"], "subjects": names}
        print(f"{record['title']}: {len(names)} models, {args.out / record['title']}.md")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
