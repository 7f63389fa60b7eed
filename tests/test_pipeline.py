"""pipeline.py and sample.py on SDXL and FLUX in miniature: run folders, diffusers' own loading and saving, LoRAs, model card."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import miniature
import pytest
import torch
from diffusers.quantizers import auto
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import checkpoint
import hgs_lora
import kernels
import models
import pipeline
import quant
import sample
import tdpt
import train
from models import UserError

ROOT = Path(__file__).parent.parent
STEPS = {"sdxl": {"guidance_scale": 1.0}, "flux": {"guidance_scale": 3.5}}
PROMPT = "a large red house on the left"


def write_run(folder: Path, name: str, base: Path) -> Path:
    """What train.py would leave: the miniature's layers rounded to nearest, random A, B, ranks 2 to 5, every third layer smoothed."""
    gen = torch.Generator().manual_seed(0)
    pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    net, table = pipe.unet if name == "sdxl" else pipe.transformer, {}
    for i, (key, layer) in enumerate(models.float_layers(net).items()):
        if (kind := models.precision(key)) == "16bit":
            continue
        w_OK = quant.flatten_conv(layer.weight[..., None, None] if layer.weight.dim() == 2 else layer.weight).detach()
        (O, K), taps, rank = w_OK.shape, layer.weight[0, 0].numel(), 2 + i % 4
        lam = torch.rand(K // taps, generator=gen) + 0.5 if i % 3 == 0 else None
        gw = quant.quantize_weight(w_OK if lam is None else w_OK * lam.repeat(taps), 64, taps)
        A, B = torch.randn(rank, K, generator=gen) / K**0.5, 0.1 * torch.randn(O, rank, generator=gen)
        net.set_submodule(key, checkpoint.packed_class(kind, layer).from_float(layer, gw, A, B, lam, 16))
        table[key] = {"kind": kind, "shape": [O, K], "rank": rank, "smooth": lam is not None, "group_w": 64, "group_x": 16}
    denoiser = models.wrap(name, net)
    denoiser.latent = (4, 8, 8) if name == "sdxl" else (16, 8, 8)
    folder.mkdir()
    plan = models.blueprint(denoiser, str(base), pipe.scheduler.config)
    config = dataclasses.asdict(train.Config()) | {"backend": "eager"}
    checkpoint.write_config(folder, {"format": checkpoint.FORMAT, "config": config, "network": plan})
    checkpoint.save_checkpoint(folder, denoiser, table, merged=False)
    return folder
