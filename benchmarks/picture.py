"""Turn a figure of the demo's report into the picture of the README.

python benchmarks/picture.py runs/demo/report.html docs/run.svg
"""

import argparse
import re
from pathlib import Path

ALONE = "svg { background: var(--paper); min-width: 0; }"


def main() -> None:
    """Write one figure as an SVG file of its own, with the page's style sheet in it."""
    parser = argparse.ArgumentParser(description="Turn a figure of a report into a picture.")
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--figure", type=int, default=1, help="its number on the page, from 1")
    options = parser.parse_args()
    page = options.report.read_text(encoding="utf-8")
    style = re.findall(r"<style>.*?</style>", page, flags=re.DOTALL)[0]
    drawing = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)[options.figure - 1]
    head, body = drawing.split(">", 1)
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    style = style.replace("</style>", f"{ALONE}</style>")
    options.picture.write_text(f"{head}>{style}{body}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
