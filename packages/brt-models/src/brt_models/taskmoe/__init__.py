"""TaskMoE: a decoder whose feed-forward layers have an expert for each task.

A sentence is a cell. Its task alone says which two experts it takes in every layer, so that nothing
has to be computed to route it, and sentences of a task can be kept where their experts are.

Kudugunta et al. 2021, arXiv:2110.03742; the network that Brainstorm measured (OSDI 2023, section
5.3), a BertGeneration decoder (Rothe et al. 2020, arXiv:1907.12461).
"""

from brt_models.taskmoe.config import TaskMoEConfig
from brt_models.taskmoe.files import load, load_dense, save
from brt_models.taskmoe.network import TaskMoE, sample, small

__all__ = ["TaskMoE", "TaskMoEConfig", "load", "load_dense", "sample", "save", "small"]
