# SPDX-License-Identifier: Apache-2.0
"""The tables of `opendino eval fairness`: images, their classes and their groups; and Dollar Street as it lies on disk.

Dollar Street (Gaviria Rojas et al. 2022): images_v2_imagenet_test.csv beside assets/, with the columns imageRelPath,
imagenet_sysnet_id ("[892, 721]", places among the sorted ImageNet classes), imagenet_synonyms, topics, region.id,
country.name, income (US dollars per month), …
"""

from __future__ import annotations

import ast
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opendino.errors import ConfigError, DataError

DOLLAR_STREET_FILES = ("images_v2_imagenet_test.csv", "images_v2.csv")
DOLLAR_STREET_IMAGE, DOLLAR_STREET_LABEL = "imageRelPath", "imagenet_sysnet_id"
REGIONS = {"af": "Africa", "am": "the Americas", "as": "Asia", "eu": "Europe"}
REGION_ORDER = tuple(REGIONS.values())
MANY_GROUPS = 30


@dataclass(frozen=True)
class Table:
    """The rows of a table that have a label.

    Attributes:
        path: of the table.
        folder: that image paths count from.
        images: paths as the table has them.
        labels: names of the right classes of each image, or their places as text for Dollar Street's.
        groups: column → group of each image.
        orders: column → its groups in their order, for buckets.
        predictions: predicted classes of each image, best first, where the table has them.
        without_label: rows that are not here.
        dollar_street: the table is of that data set.
        by_index: labels are places among the sorted classes.
    """

    path: Path
    folder: Path
    images: list[str]
    labels: list[list[str]]
    groups: dict[str, list[str]]
    orders: dict[str, list[str]] = field(default_factory=dict)
    predictions: list[list[str]] | None = None
    without_label: int = 0
    dollar_street: bool = False
    by_index: bool = False


def read_table(path: Path, label: str, groups: Sequence[str], bins: Sequence[str]) -> Table:
    """Read a table, or the table in Dollar Street's folder.

    Raises:
        DataError: for a table without the columns, or none of whose images has a label.
        ConfigError: for a group column that the table lacks, or that needs buckets.
    """
    path = _table_in(path)
    rows, columns = _rows(path)
    dollar_street = DOLLAR_STREET_IMAGE in columns and DOLLAR_STREET_LABEL in columns
    if dollar_street:
        label = DOLLAR_STREET_LABEL if label == "label" else label
        groups = groups or ("region.id", "income")
        bins = bins if any(b.startswith("income=") for b in bins) or "income" not in groups else (*bins, "income=3")
    image = next((c for c in ("image", "path", DOLLAR_STREET_IMAGE) if c in columns), None)
    if label not in columns or (image is None and "prediction" not in columns):
        raise DataError(
            f"{path} has the columns {', '.join(columns)}; it needs {label!r} and 'image' (or 'path'), and the columns "
            "that --groups names."
        )
    missing = [g for g in groups if g not in columns]
    if not groups or missing:
        raise ConfigError(
            f"--groups names {', '.join(missing) or 'no column'}; {path} has the columns {', '.join(columns)}."
        )
    named = [row for row in rows if split_cell(row[label])]
    if not named:
        raise DataError(f"No row of {path} has a value in the column {label!r}.")
    values, orders = _grouped(named, groups, bins)
    predictions = [split_cell(row["prediction"]) for row in named] if "prediction" in columns else None
    return Table(
        path, path.parent, [row[image] if image else "" for row in named], [split_cell(row[label]) for row in named],
        values, orders, predictions, len(rows) - len(named), dollar_street, label == DOLLAR_STREET_LABEL,
    )  # fmt: skip


def right_classes(table: Table, classes: Sequence[str], known_only: bool) -> tuple[dict[int, tuple[int, ...]], int]:
    """Give for each row the classifier's classes that are right, and how many rows have none (`known_only`).

    Raises:
        DataError: for a row without a known class unless `known_only`; for places beyond the classes.
    """
    from opendino.evaluate.datasets.robustness_sets import sorted_places

    if table.by_index:
        order = sorted_places(classes)
        highest = max(int(label) for labels in table.labels for label in labels)
        if highest >= len(order):
            raise DataError(
                f"{table.path} counts ImageNet's 1000 classes, up to {highest} here, and the classifier has "
                f"{len(classes)}. Give one of all of them, or --label topics with a classifier of topics."
            )
        number = {str(i): order[i] for i in range(len(order))}
    else:
        number = {name: i for i, name in enumerate(classes)}
    found = {i: tuple(number[c] for c in row if c in number) for i, row in enumerate(table.labels)}
    unknown = [i for i, known in found.items() if not known]
    if unknown and (not known_only or len(unknown) == len(found)):
        names = sorted({c for i in unknown for c in table.labels[i]})
        raise DataError(
            f"{len(unknown)} of {len(found)} images of {table.path} have no class that the classifier knows: "
            f"{', '.join(names[:5])}. Its classes are called {', '.join(list(classes)[:3])}, …; name them alike, or "
            "leave such images out with --known-only."
        )
    return {i: known for i, known in found.items() if known}, len(unknown)


def split_cell(text: str | None) -> list[str]:
    """Read the classes of a cell: a name, several with | between them, or a list in brackets."""
    text = (text or "").strip()
    if text.startswith("["):
        try:
            values = ast.literal_eval(text)  # reads literals only
        except (ValueError, SyntaxError) as error:
            raise DataError(f"A cell begins with [ but is no list: {text[:60]!r}.") from error
        return [str(v) for v in values]
    return [part.strip() for part in text.split("|") if part.strip()]


def _table_in(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in DOLLAR_STREET_FILES if (path / name).is_file()), None)
        if found is None:
            raise DataError(f"{path} holds no {' or '.join(DOLLAR_STREET_FILES)}. Give the table itself.")
        return found
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give a .csv table with the columns image, label and groups.")
    return path


def _rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    header = text.split("\n", 1)[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    rows = list(reader)
    if not rows:
        raise DataError(f"{path} has no rows below its header.")
    if any(None in row for row in rows):
        raise DataError(f"{path} has rows with more cells than its header names. Put texts with commas in quotes.")
    return rows, list(reader.fieldnames or [])


def _grouped(
    rows: list[dict[str, str]], groups: Sequence[str], bins: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    from opendino.evaluate.fairness import bucket

    edges = dict(_edges(text) for text in bins)
    stray = sorted(set(edges) - set(groups))
    if stray:
        raise ConfigError(f"--bins names {', '.join(stray)}, which --groups does not.")
    values: dict[str, list[str]] = {}
    orders: dict[str, list[str]] = {}
    for name in groups:
        cells = [(row[name] or "").strip() for row in rows]
        if name in edges:
            cells, orders[name] = bucket(cells, edges[name], name)
        elif name == "region.id" and set(cells) <= set(REGIONS) | {""}:
            cells, orders[name] = [REGIONS.get(c, "") for c in cells], list(REGION_ORDER)
        if len(set(cells)) > MANY_GROUPS and _all_numbers(cells):
            raise ConfigError(
                f"The group column {name!r} holds {len(set(cells))} different numbers. Put them in buckets: --bins "
                f"{name}=3 for three of about as many images each, or --bins {name}=200,2000 for edges of your own."
            )
        values[name] = cells
    return values, orders


def _edges(text: str) -> tuple[str, list[float] | int]:
    name, _, given = text.partition("=")
    try:
        if "," not in given and given.isdecimal() and int(given) < MANY_GROUPS:
            return name, int(given)
        return name, [float(part) for part in given.rstrip(",").split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--bins is {text!r}; give COLUMN=3 for three buckets, or their edges: COLUMN=200,2000."
        ) from error


def _all_numbers(cells: list[str]) -> bool:
    try:
        [float(c) for c in cells if c]
    except ValueError:
        return False
    return True
