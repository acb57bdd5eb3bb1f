# SPDX-License-Identifier: Apache-2.0
"""`opendino visualize pca` and `opendino visualize attention`: pictures of what a model sees."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console
from rich.progress import track

from opendino.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

    from opendino.models.vit import VisionTransformer

EXAMPLE = """Draw what a model sees.

Examples:
  opendino visualize pca photos/*.jpg --model vits14 --out pictures --foreground
  opendino visualize attention cat.jpg --model runs/first --out pictures"""
PCA_EXAMPLE = """Colour patches by the first three principal components of their features, fitted over all images.

Example:
  opendino visualize pca photos/ --model vits14 --out pictures --foreground --basis cats.npz"""
ATTENTION_EXAMPLE = """Show where the cls token looks in the last block: NAME_mean.png, NAME_head0.png, …

Example:
  opendino visualize attention cat.jpg --model runs/first --out pictures"""
T = TypeVar("T")


@dataclass(frozen=True)
class PcaArgs:
    """Arguments of `opendino visualize pca`."""

    input: tyro.conf.Positional[tuple[Path, ...]]
    """Images, folders of images, or .txt or .csv lists of them."""
    model: str
    """Model name, weight file, transformers folder or run folder."""
    out: Path
    """Folder for NAME.png, as large as the image."""
    size: int = 448
    """Shorter side given to the model, pixels."""
    foreground: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Find the background along the first component, paint it black, fit the colours on the rest."""
    rule: Literal["otsu", "zero"] = "otsu"
    """Where --foreground cuts the first component: at Otsu's threshold or at its mean; the side that touches the
    images' borders less is the object."""
    basis: Path | None = None
    """File of a PCA basis: reused when it exists (then --foreground is as it was fitted), else written."""
    max_errors: int | None = None
    """Fail when more images than this cannot be read; default: never."""
    weights: str | None = None
    """Weight file for a model given by name; 'random' draws them from seed 0."""


@dataclass(frozen=True)
class AttentionArgs:
    """Arguments of `opendino visualize attention`."""

    input: tyro.conf.Positional[tuple[Path, ...]]
    """Images, folders of images, or .txt or .csv lists of them."""
    model: str
    """Model name, weight file, transformers folder or run folder."""
    out: Path
    """Folder for NAME_mean.png and NAME_head0.png, …, as large as the image."""
    size: int = 448
    """Shorter side given to the model, pixels."""
    max_errors: int | None = None
    """Fail when more images than this cannot be read; default: never."""
    weights: str | None = None
    """Weight file for a model given by name; 'random' draws them from seed 0."""


def main(argv: list[str]) -> int:
    """Draw pictures and print the folder."""
    commands = (
        Annotated[PcaArgs, tyro.conf.subcommand("pca", description=PCA_EXAMPLE)]
        | Annotated[AttentionArgs, tyro.conf.subcommand("attention", description=ATTENTION_EXAMPLE)]
    )
    args: Any = tyro.cli(commands, args=argv, prog="opendino visualize", description=EXAMPLE)
    model = load_model(args.model, args.weights)
    paths = find_images(args.input)
    written = draw_pca(model, paths, args) if isinstance(args, PcaArgs) else draw_attention(model, paths, args)
    print(f"{written} pictures in {args.out}")
    return 0


def load_model(name: str, weights: str | None) -> VisionTransformer:
    """Load a model as the command line names it, in eval mode."""
    import torch

    from opendino.models.weights import load

    if weights == "random":
        torch.manual_seed(0)
    return load(name, weights=weights)


def find_images(inputs: Sequence[Path]) -> list[str]:
    """List the images of files, folders and lists, each once, in the order given."""
    from opendino.images.sources import open_source

    found: list[str] = []
    for path in inputs:
        is_source = path.is_dir() or path.suffix.lower() in (".txt", ".csv")
        found += [item.path for item in open_source(path).items] if is_source else [str(path)]
    if not found:
        raise DataError("No image was given. Name image files, folders of images, or .txt or .csv lists of them.")
    return list(dict.fromkeys(found))


def draw_pca(model: VisionTransformer, paths: list[str], args: PcaArgs) -> int:
    """Write one picture per image and the basis when it is asked for; give the number of pictures."""
    from opendino.views.pca import PCABasis, draw, fit_basis, patch_tokens

    reuse = args.basis is not None and args.basis.exists()
    basis = PCABasis.load(args.basis) if args.basis is not None and reuse else None
    seen = list(readable(paths, lambda path: patch_tokens(model, path, args.size), args.max_errors))
    if basis is None:
        rule = args.rule if args.foreground else None
        basis = fit_basis([tokens for _, (tokens, _, _) in seen], [grid for _, (_, grid, _) in seen], rule)
        if args.basis is not None:
            basis.save(args.basis)
    for name, one in seen:
        save_png(draw(basis, *one), args.out / f"{name}.png")
    return len(seen)


def draw_attention(model: VisionTransformer, paths: list[str], args: AttentionArgs) -> int:
    """Write the mean and every head of each image; give the number of pictures."""
    from opendino.views.attention import head_pictures

    written = 0
    for name, pictures in readable(paths, lambda path: head_pictures(model, path, args.size), args.max_errors):
        for i, picture in enumerate(pictures):
            save_png(picture, args.out / f"{name}_{f'head{i - 1}' if i else 'mean'}.png")
        written += len(pictures)
    return written


def readable(paths: list[str], compute: Callable[[str], T], max_errors: int | None = None) -> Iterator[tuple[str, T]]:
    """Iterate over (name to write under, result) of the images; unreadable ones are named on standard error.

    Raises:
        DataError: when no image could be read, or more than `max_errors` could not.
    """
    console = Console(stderr=True)
    done: set[str] = set()
    errors = 0
    for path in track(paths, "images", console=console, disable=not sys.stderr.isatty()):
        try:
            result = compute(path)
        except DataError as error:
            console.print(f"Left out: {error}", highlight=False, markup=False)
            errors += 1
            if max_errors is not None and errors > max_errors:
                raise DataError(f"{errors} images cannot be read, more than --max-errors {max_errors}.") from error
            continue
        name = unused_name(Path(path).stem, done)
        done.add(name)
        yield name, result
    if not done:
        raise DataError(f"None of the {len(paths)} images could be read; the reasons are above.")
    if errors:
        console.print(f"{errors} of {len(paths)} images could not be read.", highlight=False)


def unused_name(stem: str, used: set[str]) -> str:
    """Give `stem`, or stem-2, stem-3, … when images of several folders share it."""
    name, number = stem, 1
    while name in used:
        number += 1
        name = f"{stem}-{number}"
    return name


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG aside and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    picture.save(aside, format="png")
    aside.replace(path)
