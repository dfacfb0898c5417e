"""Draws docs/rooms.png, the rooms of the house and what they import, from the files and their import statements.

python benchmarks/rooms.py
"""

import ast
import sys
import textwrap
from collections import Counter
from pathlib import Path

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)  # this folder has names that packages have

from cli.picture import picture

PICTURE = ROOT / "docs" / "rooms.png"
ROOMS = {  # from the top down: each may import from those below it
    "train": ("#f3dde6", "everything between a TOML file and a model"),
    "infer": ("#dff0dc", "text out of a model"),
    "convert": ("#fbe8cf", "every foreign format, in and out"),
    "cli": ("#ececec", "what the commands share"),
    "model": ("#dce9f5", "what a LLaMA is: pure functions over trees of arrays"),
}
WIDTH, CHARACTERS = 7.0, 100  # of a box in inches, and of a line of names in it
LINE, GAP = 0.17, 0.35


def imports() -> Counter[tuple[str, str]]:
    """How many files of a room import from another: (room, other) -> files."""
    found: Counter[tuple[str, str]] = Counter()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            found.update(
                (room, other) for other in {module.split(".")[0] for module in modules} & (ROOMS.keys() - {room})
            )
    return found


def contents(room: str) -> list[str]:
    """The names of a room's files and then its folders, as lines."""
    folder = ROOT / room
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))
    names += sorted(f"{path.name}/" for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py")))
    return textwrap.wrap("  ".join(names), CHARACTERS, break_on_hyphens=False)


def draw(path: Path) -> None:
    """Writes the picture: the boxes of the rooms, and an arrow for each pair of which one imports from the other."""
    heights = {room: 0.62 + LINE * len(contents(room)) for room in ROOMS}
    total = sum(heights.values()) + GAP * (len(ROOMS) + 1)
    with picture(path, WIDTH + 2.2, total) as figure:
        axes = figure.subplots()
        axes.set(xlim=(0.2, WIDTH + 2.2), ylim=(GAP / 2, total - GAP / 2))
        axes.axis("off")
        middle, top = {}, total - GAP
        for room, (colour, about) in ROOMS.items():
            bottom = top - heights[room]
            box = FancyBboxPatch(
                (0.3, bottom), WIDTH, heights[room], "round,pad=0,rounding_size=0.1", fc=colour, ec="#999999"
            )
            axes.add_patch(box)
            axes.text(0.45, top - 0.11, f"{room}/", va="top", size=13, weight="bold")
            axes.text(1.55, top - 0.14, about, va="top", size=10)
            files = "\n".join(contents(room))
            style = {"size": 7.5, "family": "DejaVu Sans Mono", "color": "#444444", "linespacing": 1.35}
            axes.text(0.45, top - 0.47, files, va="top", **style)
            middle[room], top = bottom + heights[room] / 2, bottom - GAP
        order = list(ROOMS)
        for (room, other), count in sorted(imports().items()):
            apart = order.index(other) - order.index(room)
            start, end = (WIDTH + 0.3, middle[room] - 0.06 * apart), (WIDTH + 0.3, middle[other] + 0.06 * apart)
            reach = 0.35 + 0.42 * (apart - 1)
            bend = f"arc3,rad={-2 * reach / (start[1] - end[1])}"
            style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": "#555555", "lw": 0.6 + count / 25}
            axes.add_patch(FancyArrowPatch(start, end, connectionstyle=bend, shrinkA=0, shrinkB=0, **style))
            place = (WIDTH + 0.3 + reach, (start[1] + end[1]) / 2)
            axes.text(
                *place, str(count), size=8, ha="center", va="center", bbox={"fc": "white", "ec": "none", "pad": 1.5}
            )


if __name__ == "__main__":
    draw(PICTURE)
    print(PICTURE.relative_to(ROOT))
