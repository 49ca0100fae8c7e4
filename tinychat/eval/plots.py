"""A card's curves as PNG files: error by layer, and divergence along the answers. Needs matplotlib (extra `plots`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.errors import TinychatError

if TYPE_CHECKING:
    from tinychat.eval.card import Card, Column

SIZE = (7.0, 3.5)  # inches
LAYERS, ALONG = "quality-layers.png", "quality-divergence.png"
Points = tuple[list[int], list[float]]


def check_matplotlib() -> None:
    """Raises TinychatError where the plots cannot be drawn."""
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError as error:
        remedy = "install the extra: pip install 'tinychat[plots]'"
        raise TinychatError("the plots are drawn by matplotlib, which is not installed", remedy) from error


def draw(card: Card, folder: Path) -> list[Path]:
    """Write the plots that the card has figures for, and return their paths.

    Raises TinychatError without matplotlib, and where the folder cannot be written.
    """
    check_matplotlib()
    made = [_layers(card, folder / LAYERS), _along(card, folder / ALONG)]
    return [path for path in made if path is not None]


def _layers(card: Card, path: Path) -> Path | None:
    return _figure(
        card, path, {"layers' outputs": _outputs, "layers' weights": _weights}, ("decoder layer", "SQNR in dB")
    )


def _along(card: Card, path: Path) -> Path | None:
    return _figure(
        card,
        path,
        {"mean KL divergence, nats": _kl_along, "answers unchanged": _same_along},
        ("token of the answer", ""),
    )


Curve = Callable[["Column"], Points]


def _figure(card: Card, path: Path, panels: Mapping[str, Curve], axes: tuple[str, str]) -> Path | None:
    """A panel a curve, a line a model; None where there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    lines: dict[str, Any] = {}
    for place, (title, curve) in enumerate(panels.items(), 1):
        panel = figure.add_subplot(1, len(panels), place)
        panel.set(title=title, xlabel=axes[0], ylabel=axes[1])
        lines |= _lines(panel, card, curve)
    if not lines:
        return None
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    return _save(figure, path)


def _lines(panel: Any, card: Card, curve: Curve) -> dict[str, Any]:
    """Draw each model's line; the lines by the models' titles."""
    lines = {column.title: curve(column) for name, column in card.columns.items() if name != "base"}
    shown = {title: points for title, points in lines.items() if points[0]}
    colours = {title: f"C{at}" for at, title in enumerate(lines)}
    drawn = {title: panel.plot(*points, marker=".", color=colours[title])[0] for title, points in shown.items()}
    if shown:
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylim(bottom=0)
    return drawn


def _save(figure: Any, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise TinychatError(f"{path} cannot be written: {error.strerror}", "give another folder") from error
    return path


def _finite(values: Mapping[int, float]) -> Points:
    """Places and values; a layer without any error has no point."""
    kept = {place: value for place, value in values.items() if math.isfinite(value)}
    return list(kept), list(kept.values())


def _outputs(column: Column) -> Points:
    return _finite({layer.layer: layer.output.sqnr_db for layer in column.layers})


def _weights(column: Column) -> Points:
    return _finite({layer.layer: layer.weights.sqnr_db for layer in column.layers if layer.weights})


def _kl_along(column: Column) -> Points:
    return _finite(dict(enumerate(column.divergence["all"].kl_along, 1))) if column.divergence else ([], [])


def _same_along(column: Column) -> Points:
    return _finite(dict(enumerate(column.divergence["all"].same_along, 1))) if column.divergence else ([], [])
