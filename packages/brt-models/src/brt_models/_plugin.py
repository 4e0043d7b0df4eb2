"""What brt-models offers to brt."""

from __future__ import annotations

from collections.abc import Iterable

import brt
from brt_models import (
    classsr,
    dynamic_routing,
    livesr,
    loaders,
    msdnet,
    patch_sr,
    ranet,
    swin_moe,
    taskmoe,
)
from brt_models.adapters import ADAPTERS
from brt_models.language_models import MODELS, PROTOCOLS, WORKLOADS
from brt_models.trained import DEMOS, TRAINED
from brt_models.workloads import classsr as classsr_workloads
from brt_models.workloads import drift as drift_workloads
from brt_models.workloads import dynamic_routing as dynamic_routing_workloads
from brt_models.workloads import livesr as livesr_workloads
from brt_models.workloads import msdnet as msdnet_workloads
from brt_models.workloads import patch_sr as patch_sr_workloads
from brt_models.workloads import preload as preload_workloads
from brt_models.workloads import ranet as ranet_workloads
from brt_models.workloads import swin_moe as swin_moe_workloads
from brt_models.workloads import swinv2_moe as swinv2_moe_workloads
from brt_models.workloads import taskmoe as taskmoe_workloads


@brt.hookimpl
def brt_models() -> Iterable[brt.ModelSpec]:
    yield brt.ModelSpec(
        name="patch-sr",
        summary="super-resolution of photos; easy patches take smaller networks",
        factory=lambda: patch_sr.PatchSR().eval(),
        sample=patch_sr.sample,
        title="Patch super-resolution",
        cells="a 32x32 patch",
        paper="ClassSR (CVPR 2021); LiveSR in Brainstorm (OSDI 2023)",
        checkpoints=("safetensors",),
        pretrained=patch_sr.pretrained,
        load=patch_sr.load,
    )
    yield brt.ModelSpec(
        name="livesr",
        summary="ten equal branches of 80 residual blocks on patches of a video frame",
        factory=livesr.livesr,
        sample=livesr.sample,
        title="LiveSR",
        cells="a 32x32 patch",
        paper="LiveSR in Brainstorm (OSDI 2023), branches of NAS (OSDI 2018)",
        checkpoints=("nas-state-dicts", "torchvision-resnet18", "kmeans-npz"),
        load=livesr.load,
    )
    yield brt.ModelSpec(
        name="classsr",
        summary="easy, middling and hard patches take FSRCNN, CARN, SRResNet or RCAN branches",
        factory=classsr.small,
        sample=classsr.sample,
        title="ClassSR",
        cells="a 32x32 patch",
        paper="Kong et al. (CVPR 2021)",
        checkpoints=("classsr-state-dict",),
        load=loaders.load_classsr,
    )
    yield brt.ModelSpec(
        name="msdnet",
        summary="image classifier with early exits; sure images skip the later blocks",
        factory=msdnet.small,
        sample=msdnet.sample,
        title="MSDNet",
        cells="an image",
        paper="Huang et al. (ICLR 2018)",
        checkpoints=("msdnet-state-dict",),
        load=loaders.load_msdnet,
    )
    yield brt.ModelSpec(
        name="dynamic-routing",
        summary="segmentation; each image finds its own way through layers and scales",
        factory=dynamic_routing.small,
        sample=dynamic_routing.sample,
        title="Dynamic Routing",
        cells="an image",
        paper="Li et al. (CVPR 2020)",
        checkpoints=("detectron2",),
        load=loaders.load_dynamic_routing,
    )
    yield brt.ModelSpec(
        name="ranet",
        summary="image classifier; easy images are recognised at a low resolution",
        factory=ranet.small,
        sample=ranet.sample,
        title="RANet",
        cells="an image",
        paper="Yang et al. (CVPR 2020)",
        checkpoints=("ranet-state-dict",),
        load=loaders.load_ranet,
    )
    yield brt.ModelSpec(
        name="taskmoe",
        summary="decoder with an expert for each task; a sentence takes the two of its task",
        factory=taskmoe.small,
        sample=taskmoe.sample,
        title="TaskMoE",
        cells="a sentence",
        paper="Kudugunta et al. (EMNLP 2021)",
        checkpoints=("huggingface",),
        load=taskmoe.load,
    )
    yield brt.ModelSpec(
        name="swin-moe",
        summary="windowed vision transformer with mixtures of experts",
        factory=swin_moe.small,
        sample=swin_moe.sample,
        title="Swin-MoE",
        cells="a token",
        paper="Hwang et al., Tutel (MLSys 2023); Liu et al. (ICCV 2021)",
        checkpoints=("tutel-ranks",),
        load=loaders.load_swin_moe,
    )
    yield brt.ModelSpec(
        name="swinv2-moe",
        summary="Swin V2 with mixtures of experts: attention by cosines, layers normalised last",
        factory=swin_moe.small_v2,
        sample=swin_moe.sample,
        title="SwinV2-MoE",
        cells="a token",
        paper="Hwang et al., Tutel (MLSys 2023); Liu et al. (CVPR 2022)",
        checkpoints=("tutel-ranks",),
        load=loaders.load_swin_moe,
    )
    yield from MODELS
    yield from TRAINED


@brt.hookimpl
def brt_protocols() -> Iterable[brt.ProtocolSpec]:
    yield from PROTOCOLS


@brt.hookimpl
def brt_adapters() -> Iterable[brt.AdapterSpec]:
    yield from ADAPTERS


@brt.hookimpl
def brt_demos() -> Iterable[brt.DemoSpec]:
    yield from DEMOS


@brt.hookimpl
def brt_workloads() -> Iterable[brt.WorkloadSpec]:
    yield brt.WorkloadSpec(
        name="patch-sr",
        summary="the demo: the trained patch network upscales a photo",
        factory=patch_sr_workloads.demo_photo,
    )
    yield brt.WorkloadSpec(
        name="livesr",
        summary="LiveSR, classifier included, on one frame with its published loads",
        factory=livesr_workloads.frame,
    )
    yield brt.WorkloadSpec(
        name="drift",
        summary="branches of LiveSR, planned for 4 and 27 patches, get 8",
        factory=drift_workloads.drift,
    )
    yield brt.WorkloadSpec(
        name="classsr",
        summary="a photo whose patches are as easy and hard as in published frames",
        factory=classsr_workloads.enlarge,
    )
    yield brt.WorkloadSpec(
        name="msdnet",
        summary="images leave MSDNet at the exits of a published mix",
        factory=msdnet_workloads.early_exit,
    )
    yield brt.WorkloadSpec(
        name="dynamic-routing",
        summary="street scenes of noise through a segmentation network of random gates",
        factory=dynamic_routing_workloads.segment,
    )
    yield brt.WorkloadSpec(
        name="ranet",
        summary="images leave RANet at the exits of a mix",
        factory=ranet_workloads.early_exit,
    )
    yield brt.WorkloadSpec(
        name="taskmoe",
        summary="sentences of random tasks through TaskMoE",
        factory=taskmoe_workloads.sentences,
    )
    yield brt.WorkloadSpec(
        name="swin-moe",
        summary="one mixture of Swin-MoE's third stage",
        factory=swin_moe_workloads.mixture,
    )
    yield brt.WorkloadSpec(
        name="swinv2-moe",
        summary="images through a whole SwinV2-MoE",
        factory=swinv2_moe_workloads.network,
    )
    yield brt.WorkloadSpec(
        name="preload",
        summary="experts of four times the memory given, loaded when needed or ahead",
        factory=preload_workloads.chain,
    )
    yield from WORKLOADS
