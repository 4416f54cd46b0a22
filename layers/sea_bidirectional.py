"""SEA for encoders: every query reads its whole document, estimate and attention alike.

B batch, T time, S tokens with those of the past, D model width, H heads, K head width, F random
features, M cells.
"""

from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from kernels.estimated_sparse_attention import (
    Grouping,
    cell_of_token,
    estimated_sparse_attention,
    estimated_sparse_attention_flops,
)
from layers.feature_maps import PerformerFeatureMap
from layers.kv_cache import KVCache, empty_cache, remember
from layers.multihead import MultiHeadMixer
from layers.projection import Dense, Projection, projection_flops
from layers.report import Report
from layers.sea import check_choice
from layers.sea_decoder import keep_own_init
from layers.sea_estimator import Encoder
from layers.sea_losses import sampled_distance, sampled_rows
from layers.segments import place

COLUMNS = 2  # cells per column of the decoder's pictures
CHANNELS = 4  # per head


class BidirectionalDecoder(nn.Module):
    """Compressed scores (B, H, T, M) by convolutions that read rows before and after.

        rows = W_rows e + b                                             4 channels per head
        picture = relu(conv2(relu(conv1(rows))))                        conv1 has every second row
        score = resize(conv3(each row of picture twice), (T, M))        bilinear

    Source: the public code of Lee et al. 2024 (SEA), section 3.2.

    Parameters: rows.weight (4 M/2, 2K), of channel 4h before those of channel 4h + 1; conv1.weight,
    conv2.weight (4H, 4H, 3, 3), conv3.weight (H, 4H, 3, 3), as (out, in, time, column).
    """

    def __init__(self, num_heads: int, head_dim: int, num_cells: int) -> None:
        super().__init__()
        self.num_cells = num_cells
        channels = CHANNELS * num_heads
        self.rows = nn.Linear(2 * head_dim, CHANNELS * num_cells // COLUMNS)
        self.conv1 = nn.Conv2d(channels, channels, 3, stride=(2, 1), padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, num_heads, 3, padding=1)
        keep_own_init(self.rows)

    def forward(self, e: Tensor) -> Tensor:
        """(B, T, H, 2K) -> (B, H, T, M)."""
        B, T, H, _ = e.shape
        x = self.rows(e).view(B, T, H * CHANNELS, -1).transpose(1, 2)  # (B, 4H, T, M/2)
        x = self.conv2(self.conv1(x).relu()).relu().repeat_interleave(2, dim=2)
        return interpolate(self.conv3(x), (T, self.num_cells), mode="bilinear")

    def flops(self, batch_size: int, length: int, num_heads: int) -> int:
        """FLOPs of a forward pass, as FlopCounterMode counts them."""
        columns, half = self.num_cells // COLUMNS, (length + 1) // 2
        taps = sum(conv.weight.numel() for conv in (self.conv1, self.conv2))
        taps += 2 * self.conv3.weight.numel()  # each row twice
        rows = projection_flops(self.rows, batch_size * length * num_heads)
        return rows + 2 * batch_size * half * columns * taps


class BidirectionalSEA(MultiHeadMixer):
    """Sparse attention in both directions on a mask that a small network predicts at linear cost.

        c_t = sum_s phi(q_t).phi(k_s) [P_s ; v_s] / sum_s phi(q_t).phi(k_s)
        e_t, s_prob, s_mix = Encoder([c_t ; v_t]),   p = softmax over M cells of Decoder(e)
        y_t = s_mix s_prob sum_{s in C_t} softmax_{s in C_t}(q_t.k_s / sqrt(K)) v_s
              + (1 - s_mix) sum_s r_s v_s

    over the tokens s of t's document, with C_t the tokens under the largest p_t, r the mean of p
    over queries, stretched from cells to tokens, and P_s the row s/(L-1) (K-1) of the identity,
    interpolated. phi is FAVOR+ with the public code's stabilisers.

    Source: Lee et al. 2024 (SEA: Sparse Linear Attention with Estimated Attention Mask), sections
    3.2 to 3.4, the form of its public code for encoders. LEAKY as a language model: every output
    depends on later tokens, and a call shows it what the call holds; layers.sea.SEA is the causal
    form. The state is the document's inputs, from which a later call computes anew.

    Differs from the paper in rotary positions (`rotary=False` is its form); from its code in
    1/sqrt(K) in every case, and in padding that changes nothing: each document is computed as if
    it were alone, one after another.

    Args:
        num_cells: M, a multiple of 2.
        grouping: "causal_batch" (all heads of a query compete), "query", "head" or "batch", see
            kernels.estimated_sparse_attention.select_cells.
        Others: as of layers.sea.SEA.

    Parameters: those of MultiHeadMixer; encoder as of layers.sea_estimator.Encoder, decoder as of
    BidirectionalDecoder, with torch's own initialisation. Buffer: feature_map.projection (F, K).

    Raises:
        ValueError: sizes that do not fit, or an unknown choice.
    """

    causal = "leaky"
    leak_reason = "every query reads all keys of its document that the call holds"
    bounded_state = False
    state_type = KVCache

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        k_cells: int = 32,
        num_cells: int = 128,
        grouping: Grouping = "causal_batch",
        num_features: int | None = None,
        estimation_rows: int = 32,
        head_dim: int | None = None,
        rotary: bool = True,
        rotary_base: float = 10000.0,
        bias: bool = False,
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            rotary=rotary,
            rotary_base=rotary_base,
            bias=bias,
            projection=projection,
            backend=backend,
        )
        if k_cells < 1 or estimation_rows < 0:
            raise ValueError(
                f"k_cells={k_cells}, estimation_rows={estimation_rows}: expected at least 1 and 0"
            )
        if num_cells < COLUMNS or num_cells % COLUMNS:
            raise ValueError(f"num_cells={num_cells}: expected a positive multiple of {COLUMNS}")
        check_choice("grouping", grouping, get_args(Grouping))
        self.k_cells, self.num_cells, self.estimation_rows = k_cells, num_cells, estimation_rows
        self.grouping: Grouping = grouping
        self.feature_map = PerformerFeatureMap(num_heads, self.key_dim, num_features, kernel="exp")
        self.encoder = Encoder(self.key_dim)
        self.decoder = BidirectionalDecoder(num_heads, self.key_dim, num_cells)

    def forward(
        self,
        x: Tensor,
        state: KVCache | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, KVCache | None]:
        """(B, T, D) -> (B, T, D) under the mixer contract.

        With `segments` a GPU must tell the host where documents are. A report gets the loss of the
        estimate where no row holds padding or a second document.
        """
        self.check_input(x, state, segments)
        where = place(x, state, segments)
        whole, _, tags, after = remember(
            state, x[:, :, None], x[:, :, None, :0], where, segments, want_state
        )
        whole = whole.squeeze(2)
        T, past = x.shape[1], whole.shape[1] - x.shape[1]
        if tags is None:
            return self.attend(whole.to(x.dtype), report)[:, past:], after
        rows = []
        for row, names in zip(whole.to(x.dtype), tags, strict=True):
            y = x.new_zeros(T, self.d_model)
            for name in names[past:].clamp(min=-1).unique().tolist():
                at = (names == name).nonzero().squeeze(1)
                if name >= 0:
                    here = at >= past
                    out = self.attend(row[None, at], None)[0, here]
                    y = y.to(out.dtype).index_copy(0, at[here] - past, out)
            rows.append(y)
        return torch.stack(rows), after

    def attend(self, x: Tensor, report: Report | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D), each row one document."""
        S = x.shape[1]
        q, k, v = self.project(x, torch.arange(S, device=x.device))
        e, gates = self.encoder(torch.cat([self.context(q, k, v), v], -1))
        scores = self.decoder(e)
        probs = scores.softmax(-1)
        attended = estimated_sparse_attention(
            q,
            k,
            v,
            probs,
            k_cells=self.k_cells,
            causal=False,
            grouping=self.grouping,
            backend=self.backend,
        )
        length = torch.tensor(S, device=x.device)
        cells = cell_of_token(torch.arange(S, device=x.device), length, self.num_cells)
        profile = probs.mean(2)[..., cells].mT  # (B, S, H)
        average = (profile[..., None].to(v.dtype) * v).sum(1, keepdim=True)
        if report is not None and self.estimation_rows:
            rows = sampled_rows(S, self.estimation_rows, self.training, x.device)
            found = sampled_distance(
                q.detach(), k.detach(), scores, rows, self.key_dim**-0.5, None, causal=False
            )
            report.loss("estimation", found.loss)
            report.stat("estimate_kl", found.kl)
        return self.merge(gates.mix * (gates.prob * attended) + (1 - gates.mix) * average)

    def context(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Linear attention of all queries to all keys over positions and values, (B, S, H, 2K)."""
        P = positions_as_bins(v.shape[1], self.key_dim, v)[:, None].expand_as(v)
        return favor_context(self.feature_map, q, k, torch.cat([P, v], -1))

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """No inputs; the first append takes memory for `max_len` of them at once."""
        device = self.device if device is None else device
        dtype = self.dtype if dtype is None else dtype
        return empty_cache(batch_size, max_len, 1, self.d_model, device, dtype, value_width=0)

    def state_bytes(self, batch_size: int, length: int) -> int:
        """The inputs, and two integers per row; spare room not counted."""
        return batch_size * (length * self.d_model * self.dtype.itemsize + 16)

    def flops(self, batch_size: int, length: int) -> int:
        """Projections, features, context, estimator, scores and weighted sums."""
        tokens, H = batch_size * length, self.num_heads
        context = 4 * tokens * H * self.feature_map.num_features * 2 * self.key_dim
        sparse = estimated_sparse_attention_flops(
            batch_size,
            length,
            H,
            self.key_dim,
            self.num_cells,
            self.k_cells,
            causal=False,
            grouping=self.grouping,
        )
        estimator = self.encoder.flops(tokens * H) + self.decoder.flops(batch_size, length, H)
        features = 2 * self.feature_map.flops(tokens)
        return self.projection_flops(tokens) + features + context + estimator + sparse


def favor_context(feature_map: PerformerFeatureMap, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sum_s phi(q_t).phi(k_s) v_s / sum_s phi(q_t).phi(k_s) over all s, with stabilised features.

    q, k (B, S, H, K) and v (B, S, H, V) -> (B, S, H, V), computed in float32 at least.
    """
    phi_q = feature_map.stabilised(q, (3,)).transpose(1, 2)  # (B, H, S, F)
    phi_k = feature_map.stabilised(k, (1, 3)).transpose(1, 2)
    with torch.autocast(v.device.type, enabled=False):
        sums = phi_k.mT @ v.transpose(1, 2).to(phi_k.dtype)  # (B, H, F, V)
        total = (phi_q * phi_k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        return ((phi_q @ sums) / total).transpose(1, 2).to(v.dtype)


def positions_as_bins(length: int, bins: int, like: Tensor) -> Tensor:
    """(length, bins): rows of the identity at equal steps from the first to the last.

    A row between two is a mixture of both; weights times these are weights summed into bins.
    """
    at = torch.arange(length, device=like.device, dtype=torch.float64) / max(1, length - 1)
    near = 1 - (at[:, None] * (bins - 1) - torch.arange(bins, device=like.device)).abs()
    return near.clamp(min=0).to(like.dtype)
