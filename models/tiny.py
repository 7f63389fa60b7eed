"""The embedded models, tiny and small (SDXL's UNet class) and tiny-flux (FLUX's transformer class): their text encoder, and how
pictures become latents.

Key: B batch, C, H, W latent shape, L caption tokens, D text width.
"""

import math
import re
import zlib

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

TOKENS, WIDTH, BUCKETS = 24, 128, 1024  # of the text encoder
LATENT = (12, 16, 16)  # 32x32 pictures, pixel-unshuffled
SMALL_LATENT = (48, 16, 16)  # 64x64 pictures
LATENT_SCALE = 2.0  # procedural pictures have a standard deviation near 0.5


def tokenize(captions: list[str]) -> torch.Tensor:
    """Captions -> (B, L, 2) int64: [word bucket, clause]; bucket 0 is padding.

    Words are hashed, so any caption can be encoded without a vocabulary file (crc32: the same on every machine). "and" and
    "," start a new clause: with the clause beside the word, order inside a clause need not be learned. Filler words are dropped.
    """
    ids = torch.zeros(len(captions), TOKENS, 2, dtype=torch.int64)
    for b, caption in enumerate(captions):
        clause, n = 0, 0
        for word in re.findall(r"[^\W_]+|,", caption.lower()):
            if word in ("and", ","):
                clause = min(clause + 1, 3)
            elif word not in ("a", "an", "the", "on", "at", "in", "of", "background") and n < TOKENS:
                ids[b, n] = torch.tensor([1 + zlib.crc32(word.encode()) % (BUCKETS - 1), clause])
                n += 1
    return ids


class TinyText(nn.Module):
    """One transformer layer over (word + clause) embeddings: tokens (B, L, D) and pooled (B, D)."""

    def __init__(self):
        super().__init__()
        self.word, self.clause = nn.Embedding(BUCKETS, WIDTH), nn.Embedding(4, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids_BL2):
        h_BLD = self.norm(self.layer(self.word(ids_BL2[..., 0]) + self.clause(ids_BL2[..., 1])))
        return h_BLD, h_BLD.mean(1)


def prepare_unet(net: UNet2DConditionModel) -> None:
    """What a new UNet needs beside its configuration."""
    net.set_attn_processor(AttnProcessor())  # at 64 tokens the plain product beats the CPU's flash attention
    nn.init.zeros_(net.time_embedding.cond_proj.weight)  # so that a consistency model starts from the teacher's function


def patch(channels: int) -> int:
    """Pixels along a side of the square that is one latent position: 3 patch^2 = channels."""
    return math.isqrt(channels // 3)


def to_latents(pictures: torch.Tensor, channels: int) -> torch.Tensor:
    """(B, 3, p H, p W) in [-1, 1] -> (B, channels, H, W), p = patch(channels), about unit variance."""
    return F.pixel_unshuffle(pictures, patch(channels)) * LATENT_SCALE


def to_pictures(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, 3, p H, p W), clamped to [-1, 1]."""
    return F.pixel_shuffle(latents.float() / LATENT_SCALE, patch(latents.shape[1])).clamp(-1, 1)
