"""SEA's attention as matrices, to be read and drawn. B batch, T time, H heads, M cells."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.estimated_sparse_attention import stretch_cells, visible


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """One layer's attention, rows queries and columns keys; zeros where a key is not seen."""

    compressed: Tensor  # (B, H, T, M) the estimate over cells
    estimate: Tensor  # (B, H, T, T) the estimate over tokens, rows sum to 1
    mask: Tensor  # bool (B, H, T, T) tokens under the chosen cells
    sparse: Tensor  # (B, H, T, T) softmax on the mask, rows sum to 1 or are empty
    effective: Tensor  # (B, H, T, T) with gates and running mean: the heads' outputs are it times v

    def draw(self, path: str | Path, *, row: int = 0, heads: int = 4) -> None:
        """Write a picture of the first `heads` heads of one row of the batch, a line for each."""
        draw_maps(self, path, row=row, heads=heads)


def attention_maps(
    dense: Tensor,
    scores: Tensor,
    cells: Tensor,
    gates: tuple[Tensor, Tensor],
    segments: Tensor | None,
) -> AttentionMaps:
    """The matrices from what one forward pass has.

    Args:
        dense: (B, H, T, T) q.k, scaled.
        scores: (B, H, T, M), compressed.
        cells: bool (B, H, T, M), those chosen.
        gates: s_prob and s_mix, (B, T, H, 1).
        segments: int (B, T) or None.
    """
    B, _, T, _ = dense.shape
    seen = visible(B, T, T, causal=True, segments=segments, device=dense.device)
    past = seen.numbers()[1][:, None]  # (B, 1, T, T)
    mask = stretch_cells(cells, segments=segments, fill=False)
    stretched = stretch_cells(scores, segments=segments)
    prob, mix = (g.transpose(1, 2) for g in gates)
    sparse = _softmax(dense, mask)
    mean = past.to(dense.dtype) / seen.lengths.clamp(min=1)[:, None, :, None]
    return AttentionMaps(
        scores.softmax(-1),
        _softmax(stretched, past),
        mask,
        sparse,
        mix * prob * sparse + (1 - mix) * mean,
    )


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) * mask


def draw_maps(maps: AttentionMaps, path: str | Path, *, row: int, heads: int) -> None:
    """See `AttentionMaps.draw`."""
    from matplotlib.figure import Figure  # a second to import, for pictures alone

    names = ("compressed", "estimate", "mask", "sparse", "effective")
    heads = min(heads, maps.mask.shape[1])
    figure = Figure(figsize=(3 * len(names), 3 * heads), layout="constrained")
    axes = figure.subplots(heads, len(names), squeeze=False)
    for head, line in enumerate(axes):
        for name, axis in zip(names, line, strict=True):
            axis.imshow(
                getattr(maps, name)[row, head].float().cpu().numpy(),
                aspect="auto",
                interpolation="nearest",
            )
            axis.set_title(f"head {head}: {name}")
            axis.set_xlabel("cell" if name == "compressed" else "key")
            axis.set_ylabel("query")
    figure.savefig(Path(path))
