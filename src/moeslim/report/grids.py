"""Pictures of a cut: layers x experts, and the hidden channels, kept or dropped and in which stage."""

from collections.abc import Sequence
from html import escape

from moeslim.families import is_mtp
from moeslim.report.cuts import CutFacts, LayerCut

_LABEL = 40
_ROW = 15


def expert_grid(cut: CutFacts) -> str:
    """A row per source layer, a cell per routed expert; a layer that was dropped is one band."""
    experts = len(cut.layers[0].experts)
    cell = max(2.0, min(11.0, 640 / max(experts, 1)))
    width, height = _LABEL + cell * experts, len(cut.layers) * _ROW + 18
    body = [
        f'<text class="tick end" x="{_LABEL - 8}" y="10">layer</text>',
        f'<text class="tick" x="{_LABEL}" y="10">expert 0</text>',
        f'<text class="tick end" x="{width:.0f}" y="10">{experts - 1}</text>',
    ]
    for index, layer in enumerate(cut.layers):
        body.append(_layer_row(layer, y=16 + index * _ROW, cell=cell))
    name = f"Routed experts kept and dropped in {len(cut.layers)} layers"
    return f'<div class="pan" tabindex="0">{_svg(body, (width, height), name=name, least=0.8)}</div>'


def channel_grid(channels: Sequence[int]) -> str:
    """All hidden channels in rows of 64 (128 above 1024), in the model's order, left to right and down."""
    per_row = 64 if len(channels) <= 1024 else 128
    cell = 640 / per_row
    body = []
    for start in range(0, len(channels), per_row):
        y = start // per_row * (cell + 2)
        for x, length, lost in _runs(channels[start : start + per_row]):
            title = f"channels {start + x} to {start + x + length - 1}: {_lost_text(lost)}"
            body.append(
                f'<rect class="{_tone(lost)}" x="{x * cell:.1f}" y="{y:.1f}" width="{length * cell - 1:.1f}" '
                f'height="{cell:.1f}"><title>{escape(title)}</title></rect>'
            )
    rows = -(-len(channels) // per_row)
    return _svg(body, (640, rows * (cell + 2)), name=f"{len(channels)} hidden channels, kept and dropped")


def _layer_row(layer: LayerCut, *, y: int, cell: float) -> str:
    parts = [_label(layer, y)]
    if layer.lost:
        title = f"layer {layer.key}: {_lost_text(layer.lost)}, with its {len(layer.experts)} experts"
        wide = cell * len(layer.experts) - 1
        parts.append(
            f'<rect class="{_tone(layer.lost)} whole" x="{_LABEL}" y="{y}" width="{wide:.1f}" height="{_ROW - 3}" '
            f'rx="2"><title>{escape(title)}</title></rect>'
        )
        return "".join(parts)
    runs = _runs(layer.experts) if cell < 5 else [(e, 1, lost) for e, lost in enumerate(layer.experts)]
    gap = 1.5 if cell >= 5 else 0.0
    for e, length, lost in runs:
        which = f"expert {e}" if length == 1 else f"experts {e} to {e + length - 1}"
        parts.append(
            f'<rect class="{_tone(lost)}" x="{_LABEL + e * cell:.1f}" y="{y}" width="{length * cell - gap:.1f}" '
            f'height="{_ROW - 3}" rx="{1.5 if gap else 0:g}"><title>'
            f"{escape(f'layer {layer.key}, {which}: {_lost_text(lost)}')}</title></rect>"
        )
    return "".join(parts)


def _label(layer: LayerCut, y: int) -> str:
    lost = " off" if layer.lost else ""
    label = "MTP" if is_mtp(layer.key) else layer.key
    return f'<text class="label{lost}" x="{_LABEL - 8}" y="{y + 10}" text-anchor="end">{escape(label)}</text>'


def _runs(lost: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, length, value) of equal neighbours."""
    runs: list[tuple[int, int, int]] = []
    for index, value in enumerate(lost):
        if runs and runs[-1][2] == value:
            start, length, _ = runs[-1]
            runs[-1] = (start, length + 1, value)
        else:
            runs.append((index, 1, value))
    return runs


def _tone(lost: int) -> str:
    return "kept" if not lost else f"lost lost-{min(lost, 3)}"


def _lost_text(lost: int) -> str:
    return f"dropped in stage {lost}" if lost else "kept"


def _svg(body: Sequence[str], size: tuple[float, float], *, name: str, least: float = 0.0) -> str:
    """A picture that shrinks to `least` of its natural size on a narrow screen, so that its text can be read."""
    width, height = size
    style = f'style="--natural:{width:.0f}px;--least:{least * width:.0f}px"'
    head = (
        f'<svg class="grid-svg" {style} viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(name)}">'
    )
    return head + "".join(body) + "</svg>"
