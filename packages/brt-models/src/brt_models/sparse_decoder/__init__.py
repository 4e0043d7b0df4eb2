"""The sparse feed-forward blocks of today's decoder language models.

Each is a gate, whose rule is a protocol, and experts of which every token takes a few: Mixtral
(arXiv:2401.04088), Qwen3-MoE (arXiv:2505.09388), DeepSeek-V2 (arXiv:2405.04434) and V3
(arXiv:2412.19437) with shared experts and groups, gpt-oss (arXiv:2508.10925).
"""

from brt_models.sparse_decoder.block import SparseBlock, sample
from brt_models.sparse_decoder.config import SparseBlockConfig
from brt_models.sparse_decoder.files import load
from brt_models.sparse_decoder.protocols import GroupLimitedTopK

__all__ = ["GroupLimitedTopK", "SparseBlock", "SparseBlockConfig", "load", "sample"]
