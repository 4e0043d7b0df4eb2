"""Benchmarks of the decoders whose tokens or sequences skip layers.

Legend: B sequences, S tokens of one, N tokens, R routed tokens, D features, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

import brt
from brt.bench import Variant, Workload
from brt.bench.workload import Kind
from brt_models.decoder_layer import DecoderLayer, drawn_ids, positions
from brt_models.early_exit_decoder import EarlyExitConfig, EarlyExitDecoder, Stage
from brt_models.mixture_of_depths import MixtureOfDepths, MixtureOfDepthsConfig, RoutedLayer

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
NUM_WORDS = 1024


def mixture_of_depths(
    device: torch.device,
    dtype: torch.dtype,
    *,
    dim: int = 256,
    num_layers: int = 6,
    share: float = 0.125,
    batch: int = 1,
    tokens: int = 256,
) -> Workload:
    """Evaluation of a decoder, random weights; predictors that let ``share`` of the tokens in."""
    torch.manual_seed(0)
    config = MixtureOfDepthsConfig(
        num_words=NUM_WORDS, dim=dim, hidden=2 * dim, num_layers=num_layers, capacity=share
    )
    model = MixtureOfDepths(config).to(device, dtype).eval()
    sets = [(drawn_ids(NUM_WORDS, (batch, tokens), seed).to(device),) for seed in range(3)]
    _let_in(model, sets[0][0], share)
    options = {
        "dim": dim, "num_layers": num_layers, "share": share, "batch": batch, "tokens": tokens,
    }  # fmt: skip
    return _workload("mixture-of-depths", model, TokenLoop(model), sets, options)


def early_exit_decoder(
    device: torch.device,
    dtype: torch.dtype,
    *,
    dim: int = 256,
    num_layers: int = 8,
    batch: int = 32,
    tokens: int = 32,
) -> Workload:
    """Next words, random weights; about half of the sequences are sure at the first exit."""
    torch.manual_seed(0)
    config = EarlyExitConfig(
        num_words=NUM_WORDS, dim=dim, hidden=2 * dim, num_layers=num_layers, threshold=0.0
    )
    model = EarlyExitDecoder(config).to(device, dtype).eval()
    sets = [(drawn_ids(NUM_WORDS, (batch, tokens), seed).to(device),) for seed in range(3)]
    with torch.no_grad():
        sure_B = model(sets[0][0]).float().softmax(1).amax(1)
    model.set_threshold(float(sure_B.quantile(0.5)))
    options = {"dim": dim, "num_layers": num_layers, "batch": batch, "tokens": tokens}
    return _workload("early-exit-decoder", model, SequenceLoop(model), sets, options)


class TokenLoop(nn.Module):
    """Mixture-of-Depths as people write it: masks and index_select, layer by layer."""

    def __init__(self, model: MixtureOfDepths) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BS: Tensor) -> Tensor:
        """``[B, S]`` -> logits ``[B, S, V]``, as in evaluation."""
        x_BSD, position_1S = self.model.embed(ids_BS), positions(ids_BS)
        for layer in self.model.layers:
            if isinstance(layer, DecoderLayer):
                x_BSD = layer(x_BSD, position_1S)
                continue
            assert isinstance(layer, RoutedLayer)
            out_BSD = x_BSD.clone()
            for sequence, x_SD in enumerate(x_BSD):
                index = (layer.predictor(x_SD)[:, 0] > 0).nonzero()[:, 0]
                if len(index):
                    rows_RD, position_R = x_SD[index], position_1S[0, index]
                    update_RD = layer.layer.update(rows_RD[None], position_R[None])[0]
                    out_BSD[sequence, index] += update_RD * layer.gate(rows_RD)
            x_BSD = out_BSD
        logits_BSV: Tensor = self.model.head(self.model.norm(x_BSD))
        return logits_BSV


class SequenceLoop(nn.Module):
    """Early exit as people write it: after each stage, index the sequences that stay."""

    def __init__(self, model: EarlyExitDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BS: Tensor) -> Tensor:
        """``[B, S]`` -> logits ``[B, V]``."""
        model = self.model
        x_BSD = model.embed(ids_BS)
        index_B = torch.arange(len(ids_BS), device=ids_BS.device)
        out_BV = x_BSD.new_zeros(len(ids_BS), model.config.num_words)
        for number, stage in enumerate(model.stages):
            assert isinstance(stage, Stage)
            x_BSD = stage(x_BSD)
            logits_BV = model.head(x_BSD)
            sure_B = logits_BV.float().softmax(1).amax(1) >= model.threshold
            if number == len(model.stages) - 1:
                sure_B = torch.ones_like(sure_B)
            out_BV[index_B[sure_B]] = logits_BV[sure_B]
            x_BSD, index_B = x_BSD[~sure_B], index_B[~sure_B]
            if not len(index_B):
                break
        return out_BV


def _workload(
    name: str,
    model: nn.Module,
    loop: nn.Module,
    sets: Sequence[tuple[Tensor]],
    options: Mapping[str, object],
) -> Workload:
    dtype = next(model.parameters()).dtype

    def optimised() -> Callable[[Tensor], Tensor]:
        return brt.optimize(model, brt.profile(model, sets), sample=sets[0])

    def row(kind: Kind, name: str, make: Callable[[], Callable[[Tensor], Tensor]]) -> Variant:
        return Variant(kind=kind, name=name, make=make)

    return Workload(
        name=name,
        shapes=" ".join(f"{key}={value}" for key, value in options.items()),
        device=sets[0][0].device,
        dtype=dtype,
        sets=sets,
        # In the same dtype: in another one, cells near a threshold decide otherwise
        reference=loop,
        tolerance=TOLERANCE.get(dtype, 3e-2),
        options=options,
        variants=[
            row("eager", "torch index loop", lambda: loop),
            row("brt", "brt eager", lambda: model),
            row("brt", "brt optimised", optimised),
        ],
    )


@torch.no_grad()
def _let_in(model: MixtureOfDepths, ids_BS: Tensor, share: float) -> None:
    """Move the predictors so that they take about this share of the tokens."""
    x_BSD, position_1S = model.embed(ids_BS), positions(ids_BS)
    for layer in model.layers:
        if isinstance(layer, RoutedLayer):
            score_N = layer.predictor(x_BSD).float().flatten()
            last = layer.predictor[-1]
            assert isinstance(last, nn.Linear)
            last.bias.sub_(score_N.quantile(1 - share))
        x_BSD = layer(x_BSD, position_1S)
