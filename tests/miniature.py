"""Public models in miniature: whole pipelines of diffusers' and transformers' own classes, random weights, in the on-disk format
of the real ones (`save_pretrained`), tokenizers with their vocabulary files included. A picture has 64 x 64 pixels."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from models.family import FAMILIES

WORDS = "a an the and on in of red green blue large small house tree cat river ring left right photo painting".split()
PIXELS = 64


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE: every byte, inside and at the end of a word, and WORDS by merges."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = [*bytes_, *(b + "</w>" for b in bytes_)], []
    for word in WORDS:
        left = word[0]
        for i, letter in enumerate(word[1:], 2):
            right = letter + ("</w>" if i == len(word) else "")
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    vocab = dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=merges, model_max_length=77)


def t5_tokenizer(longest: int = 32) -> T5Tokenizer:
    """SentencePiece's unigrams: WORDS and single letters."""
    pieces = ["▁", *("▁" + word for word in WORDS), *"abcdefghijklmnopqrstuvwxyz,."]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *((piece, -1.0 - len(piece) / 100) for piece in pieces)], model_max_length=longest)


def clip_text(cls, width: int, tokenizer: CLIPTokenizer):
    size, end = len(tokenizer), tokenizer.eos_token_id
    return cls(
        CLIPTextConfig(
            vocab_size=size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2,
            projection_dim=width, bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end,
        )
    ).eval()  # fmt: skip


def vae(channels: int, **config) -> AutoencoderKL:
    """8 times smaller latents, as the real ones."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=(16, 16, 32, 32),
        norm_num_groups=8, layers_per_block=1, latent_channels=channels, sample_size=PIXELS, **config,
    ).eval()  # fmt: skip


def sdxl(prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    tokenizers = clip_tokenizer(), clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=PIXELS // 8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128), layers_per_block=1, attention_head_dim=(1, 2), transformer_layers_per_block=1,
        use_linear_projection=True, cross_attention_dim=96, addition_embed_type="text_time", addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 64,
    ).eval()  # fmt: skip
    return StableDiffusionXLPipeline(
        vae(4, scaling_factor=0.13025, force_upcast=True),
        clip_text(CLIPTextModel, 32, tokenizers[0]), clip_text(CLIPTextModelWithProjection, 64, tokenizers[1]), *tokenizers, unet,
        EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
            timestep_spacing="leading", steps_offset=1,
        ),
    )  # fmt: skip


def sdxl_turbo() -> StableDiffusionXLPipeline:
    """A base that draws in few steps itself, in the formats of SDXL-Turbo."""
    pipe = sdxl()
    pipe.register_modules(scheduler=EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing"))
    return pipe


def flux_schnell() -> FluxPipeline:
    """Another, in those of FLUX.1-schnell: no input for guidance, a grid without a shift, captions of up to 512 tokens."""
    return flux(FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False), guided=False, longest=512)


def flux(scheduler: FlowMatchEulerDiscreteScheduler | None = None, guided: bool = True, longest: int = 32) -> FluxPipeline:
    torch.manual_seed(0)
    clip = clip_tokenizer()
    t5 = t5_tokenizer(longest)
    text = T5EncoderModel(
        T5Config(vocab_size=len(t5), d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    )
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=guided, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    return FluxPipeline(
        scheduler or FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
        ),
        vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        clip_text(CLIPTextModel, 64, clip), clip, text.eval(), t5, transformer,
    )  # fmt: skip


def sd15_unet(down: tuple[str, ...], up: tuple[str, ...], channels: tuple[int, ...]) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=PIXELS // 8, in_channels=4, out_channels=4, down_block_types=down, up_block_types=up,
        block_out_channels=channels, layers_per_block=1, attention_head_dim=2, cross_attention_dim=64,
    ).eval()  # fmt: skip


def sd15(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    unet = sd15_unet(("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D"), (64, 128))
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type, steps_offset=1,
        skip_prk_steps=True, set_alpha_to_one=False,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae(4, scaling_factor=0.18215), clip_text(CLIPTextModel, 64, tokenizer), tokenizer, unet, scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


PIPELINES = {
    "sdxl": sdxl,
    "sdxl-v": lambda: sdxl("v_prediction"),
    "sd15": sd15,
    "flux": flux,
    "sdxl-turbo": sdxl_turbo,
    "flux-schnell": flux_schnell,
}
PUBLIC = [name for name, family in FAMILIES.items() if not family.embedded]
EMBEDDED = [name for name, family in FAMILIES.items() if family.embedded]


def save(name: str, folder: Path) -> Path:
    """The miniature of `name` in `folder`."""
    PIPELINES[name]().save_pretrained(folder)
    return folder


def single_file(unet: UNet2DConditionModel, path: Path) -> Path:
    """An SDXL UNet with one layer a block under the names of its authors' files, as checkpoints for user interfaces are."""
    levels, names = len(unet.config.block_out_channels), {}
    for i in range(levels):
        at = 1 + 2 * i  # input block of the level's ResNet; a downsampler follows
        names |= {f"down_blocks.{i}.resnets.0": f"input_blocks.{at}.0", f"down_blocks.{i}.attentions.0": f"input_blocks.{at}.1"}
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{at + 1}.0.op"
        attends = hasattr(unet.up_blocks[i], "attentions")
        for j in range(2):
            at = 2 * i + j
            names |= {
                f"up_blocks.{i}.resnets.{j}": f"output_blocks.{at}.0",
                f"up_blocks.{i}.attentions.{j}": f"output_blocks.{at}.1",
            }
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{at}.{2 if attends else 1}.conv"
    names |= {f"mid_block.resnets.{j}": f"middle_block.{2 * j}" for j in range(2)} | {"mid_block.attentions.0": "middle_block.1"}
    names |= {f"time_embedding.linear_{j + 1}": f"time_embed.{2 * j}" for j in range(2)}
    names |= {f"add_embedding.linear_{j + 1}": f"label_emb.0.{2 * j}" for j in range(2)}
    names |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
    tensors = {}
    for key, tensor in unet.state_dict().items():
        start = next(name for name in names if key.startswith(name + "."))
        rest = key.removeprefix(start + ".")
        if ".resnets." in start:
            part, _, last = rest.partition(".")
            rest = f"{inside[part]}.{last}"
        tensors[f"model.diffusion_model.{names[start]}.{rest}"] = tensor.contiguous()
    save_file(tensors, path)
    return path
