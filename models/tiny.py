"""The embedded models, tiny (SDXL's UNet class) and tiny-flux (FLUX's transformer class): networks of diffusers' own classes, their
text encoder, and how 32x32 pictures become latents.

Key: B batch, C, H, W latent shape, L caption tokens, D text width.
"""

import re
import zlib

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from data import scenes

TOKENS, WIDTH, BUCKETS = 24, 128, 1024  # of the text encoder
TIME_IDS = [[scenes.SIDE, scenes.SIDE, 0, 0, scenes.SIDE, scenes.SIDE]]
LATENT = (12, 16, 16)  # 32x32 pictures, pixel-unshuffled
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


def tiny_unet() -> UNet2DConditionModel:
    """SDXL's architecture, 6.9 M parameters: conv level first, cross-attention below, text_time conditioning."""
    net = UNet2DConditionModel(
        sample_size=16, in_channels=12, out_channels=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 128), layers_per_block=1, attention_head_dim=(1, 2, 2),  # heads, as in SDXL's config
        transformer_layers_per_block=1, use_linear_projection=True, cross_attention_dim=WIDTH,
        addition_embed_type="text_time", addition_time_embed_dim=16, projection_class_embeddings_input_dim=6 * 16 + WIDTH,
        time_cond_proj_dim=64,
    )  # fmt: skip
    net.set_attn_processor(AttnProcessor())  # at 64 tokens the plain product beats the CPU's flash attention
    nn.init.zeros_(net.time_embedding.cond_proj.weight)  # so that a consistency model starts from the teacher's function
    return net


def tiny_flux() -> FluxTransformer2DModel:
    """FLUX's architecture, 5.2 M parameters: 2 double and 4 single blocks, 3 heads of 64, RoPE, guidance embedding."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4 * LATENT[0], num_layers=2, num_single_layers=4, attention_head_dim=64, num_attention_heads=3,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip


def to_latents(pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, 32, 32) in [-1, 1] -> (B, 12, 16, 16), about unit variance."""
    return F.pixel_unshuffle(pictures, 2) * LATENT_SCALE


def to_pictures(latents: torch.Tensor) -> torch.Tensor:
    """(B, 12, 16, 16) -> (B, 3, 32, 32), clamped to [-1, 1]."""
    return F.pixel_shuffle(latents.float() / LATENT_SCALE, 2).clamp(-1, 1)
