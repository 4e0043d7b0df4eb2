"""The demo of experts: a language model writes on, each byte coloured by its expert.

Legend: B sequences, S bytes of one, N bytes, P experts, L sparse layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

import brt
from brt.errors import BrtError
from brt.files import atomic_write
from brt_models import english, profiles, switch_text, weight_files
from brt_models.demo import parts
from brt_models.demo.parts import step
from brt_models.demo.passages import COLOURS, Passage, letters
from brt_models.demo.text_page import page
from brt_models.demo.timing import alternate
from brt_models.switch_text import SwitchText
from brt_models.switch_text.files import WEIGHTS

PROMPT = "The following methods are called when"
MEASURED = 8192  # bytes of the held-out text whose prediction is measured
QUOTED = 900  # bytes of it that are coloured
BATCH, LENGTH = 8, 256  # of what is timed


def run(
    prompt: str | None = None,
    out: Path = Path("demo-out"),
    *,
    compiled: bool = True,
    seconds: float = 8.0,
    num_bytes: int = 240,
    console: Console | None = None,
) -> Mapping[str, Any]:
    """Go on from a prompt, show which expert took which byte; return the figures.

    Written into ``out``: the text and a piece of the held-out text as a page, each byte coloured by
    its expert, and the report of the optimisation.
    """
    console = console or Console()
    prompt = PROMPT if prompt is None else prompt
    if not prompt:
        raise BrtError("demo text: the prompt must have a letter; without one it is the demo's")
    model = switch_text.pretrained()
    held_out_S = english.ids("held-out")
    x_BS = held_out_S[: BATCH * LENGTH].view(BATCH, LENGTH)
    with step(console, "profiling on validation text"):
        profile = profiles.text_experts(model)
    with step(console, "optimising"):
        fast = brt.optimize(model, profile, sample=x_BS)
    variants: dict[str, Callable[[Tensor], Tensor]] = {"eager": model, "optimised": fast}
    if compiled:
        with step(console, "torch.compile, for comparison"):
            variants |= parts.compiled(model, x_BS, console)
    with step(console, "timing all of them in turns"):
        milliseconds = alternate(variants, x_BS, seconds)
    with step(console, f"predicting {MEASURED} bytes of held-out text"):
        bits = switch_text.bits_per_byte(model, held_out_S[:MEASURED])
    with step(console, f"writing {num_bytes} bytes"):
        given_1S = english.encoded(prompt)[None]
        generator = torch.Generator().manual_seed(0)
        written_1S = model.generate(given_1S, num_bytes, generator=generator)
        passages = (
            passage(
                model, "the prompt, and what the model wrote", written_1S[0], given_1S.shape[1]
            ),
            passage(model, "held-out text", held_out_S[:QUOTED], QUOTED),
        )
        with torch.inference_mode():
            difference = float((fast(x_BS) - model(x_BS)).abs().max())
    figures = {
        "prompt": prompt,
        "text": english.decoded(written_1S[0]),
        "held_out_bits_per_byte": bits,
        "experts": habits(model, held_out_S[:MEASURED]),
        "threads": torch.get_num_threads(),
        "batch": [BATCH, LENGTH],
        "milliseconds": milliseconds,
        **parts.told(fast),
        "difference_from_eager": difference,
        "files": [str(out / file) for file in ("experts.html", "report.html")],
    }
    with atomic_write(out / "experts.html") as beside:
        beside.write_text(page(passages, figures["experts"]), encoding="utf-8")
    with atomic_write(out / "report.html") as beside:
        fast.report.to_html(beside)
    _show(figures, passages, console)
    return figures


def passage(model: SwitchText, title: str, ids_S: Tensor, num_given: int) -> Passage:
    """A text with the expert of each byte."""
    expert_LN = tuple(tuple(layer_N.tolist()) for layer_N in experts(model, ids_S))
    return Passage(title, bytes(ids_S.tolist()), expert_LN, num_given)


@torch.inference_mode()
def experts(model: SwitchText, ids_S: Tensor) -> Tensor:
    """The expert [L, N] that each byte takes in each sparse layer, window by window."""
    found = []
    for piece_S in ids_S.split(LENGTH):
        _, scores = model.with_scores(piece_S[None])
        found.append(torch.stack([scores_BSP[0].argmax(-1) for scores_BSP in scores]))
    return torch.cat(found, 1)


def habits(model: SwitchText, ids_S: Tensor) -> list[list[dict[str, Any]]]:
    """For each sparse layer and expert: its share of a text, and the bytes typical of it."""
    raw = ids_S.tolist()
    everywhere = Counter(raw)
    layers = []
    for layer_N in experts(model, ids_S).tolist():
        rows = []
        for path in range(model.config.num_experts):
            here = Counter(
                byte for byte, expert in zip(raw, layer_N, strict=True) if expert == path
            )
            # Much more frequent here than elsewhere, and not only once
            typical = sorted(here, key=lambda b: here[b] ** 1.5 / everywhere[b], reverse=True)[:8]
            rows.append({
                "expert": path,
                "share": sum(here.values()) / len(raw),
                "typical": [shown(byte) for byte in typical],
            })  # fmt: skip
        layers.append(rows)
    return layers


def shown(byte: int) -> str:
    """A byte as one visible character, or two."""
    names = {10: "\\n", 32: "\u2423", 9: "\\t"}
    return names.get(byte) or (chr(byte) if 32 < byte < 127 else f"x{byte:02x}")


def _show(figures: Mapping[str, Any], passages: Sequence[Passage], console: Console) -> None:
    last = len(figures["experts"]) - 1
    for found in passages:
        console.print(f"\n[bold]{found.title}[/], bytes coloured by expert:", highlight=False)
        text = Text()
        for letter, place in letters(found):
            colour = COLOURS[found.expert_LN[last][place] % len(COLOURS)]
            bold = " bold" if place >= found.num_given else ""
            if letter == "\n":
                text.append("\n")
            else:
                text.append(letter, style=f"black on {colour}{bold}")
        console.print(text, soft_wrap=False)
    table = Table("expert", "share", "typical bytes", box=None, header_style="dim")
    for row in figures["experts"][last]:
        name = Text(f" {row['expert']} ", style=f"black on {COLOURS[row['expert'] % len(COLOURS)]}")
        table.add_row(name, f"{row['share']:.0%}", escape(" ".join(row["typical"])))
    console.print("\nlast sparse layer, held-out text:", highlight=False)
    console.print(table)
    quality = weight_files.record_of(weight_files.shipped(WEIGHTS))["quality"]
    console.print(
        f"held-out text: {figures['held_out_bits_per_byte']:.2f} bits a byte in its first "
        f"{MEASURED}; all of it, when it was trained: "
        + ", ".join(f"{k} {v['held_out_bits_per_byte']:.2f}" for k, v in quality.items()),
        highlight=False,
    )
    rows, length = figures["batch"]
    console.print(f"{rows} texts of {length} bytes, {figures['threads']} threads:", highlight=False)
    parts.show_times(figures["milliseconds"], console)
    parts.show_rest(figures, console)
