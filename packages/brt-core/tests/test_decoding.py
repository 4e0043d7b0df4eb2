"""The examples of decoding with a LoopRouter, against plain Python that writes one sequence.

Legend: N sequences, L positions, V words of the vocabulary.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from core_cases import close
from torch import Tensor

EXAMPLES = Path(__file__).parents[3] / "examples"
sys.path.insert(0, str(EXAMPLES))

from beam_search import BeamSearch  # noqa: E402
from greedy_decoding import EOS, PAD, Decoder, Greedy  # noqa: E402

# torch's compiler uses parts of torch that are deprecated
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def decoder(device: torch.device) -> Decoder:
    torch.manual_seed(34)  # sequences of many lengths, some of which never end
    return Decoder().to(device).eval().requires_grad_(False)


def next_logits(decoder: Decoder, tokens: list[int]) -> Tensor:
    """Logits after a sequence, without a cache: attention over all its tokens."""
    x_LD = decoder.embed(torch.tensor(tokens, device=decoder.head.weight.device))
    share_L = (decoder.key(x_LD) @ decoder.query(x_LD[-1])).softmax(0)
    return decoder.head(x_LD[-1] + share_L @ decoder.value(x_LD))


def plain_greedy(decoder: Decoder, token: int) -> list[int]:
    tokens = [token]
    while len(tokens) < decoder.max_length and (len(tokens) == 1 or tokens[-1] != EOS):
        tokens.append(int(next_logits(decoder, tokens).argmax()))
    return tokens


def plain_beam_search(decoder: Decoder, token: int, num_beams: int) -> tuple[list[int], float]:
    beams: list[tuple[float, list[int]]] = [(0.0, [token])]
    for _ in range(decoder.max_length - 1):
        tried = []
        for score, tokens in beams:
            if len(tokens) > 1 and tokens[-1] == EOS:
                tried.append((score, tokens))
                continue
            gains = next_logits(decoder, tokens).log_softmax(0).tolist()
            tried += [(score + gain, [*tokens, word]) for word, gain in enumerate(gains)]
        beams = sorted(tried, key=lambda beam: -beam[0])[:num_beams]
        if beams[0][1][-1] == EOS:
            break
    return beams[0][1], beams[0][0]


def prompts(device: torch.device) -> Tensor:
    return torch.arange(2, 12, device=device)


def test_greedy_decoding(decoder: Decoder, device: torch.device) -> None:
    wanted = [plain_greedy(decoder, token) for token in prompts(device).tolist()]
    assert len({len(tokens) for tokens in wanted}) > 4
    tokens_NL, length_N = Greedy(decoder)(prompts(device))
    assert length_N.tolist() == [len(tokens) for tokens in wanted]
    for came, want in zip(tokens_NL.tolist(), wanted, strict=True):
        assert came == want + [PAD] * (decoder.max_length - len(want))


def test_sequences_leave_as_they_end(decoder: Decoder, device: torch.device) -> None:
    seen = []
    decoder.head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    _, length_N = Greedy(decoder)(prompts(device))
    assert seen[0] == 10
    assert sum(seen) == int((length_N - 1).sum())


@pytest.mark.parametrize("num_beams", [1, 3, 5])
def test_beam_search(num_beams: int, decoder: Decoder, device: torch.device) -> None:
    wanted = [plain_beam_search(decoder, t, num_beams) for t in prompts(device).tolist()]
    tokens_NL, length_N, score_N = BeamSearch(decoder, num_beams)(prompts(device))
    for n, (tokens, score) in enumerate(wanted):
        assert tokens_NL[n, : int(length_N[n])].tolist() == tokens, f"{num_beams=} {n=}"
        close(score_N[n].cpu().double(), torch.tensor(score, dtype=torch.float64), factor=1e6)
    if num_beams == 1:
        greedy, _ = Greedy(decoder)(prompts(device))
        assert torch.equal(tokens_NL, greedy)


@pytest.mark.parametrize("how", ["greedy", "beams"])
def test_compiled(how: str, decoder: Decoder, device: torch.device) -> None:
    """All sequences carried: ended ones are met again, and must come out as they were."""
    run = Greedy(decoder) if how == "greedy" else BeamSearch(decoder, 3)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for came, wanted in zip(compiled(prompts(device)), run(prompts(device)), strict=True):
        close(came, wanted, factor=10)


@pytest.mark.parametrize("name", ["greedy_decoding", "beam_search"])
def test_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 10
