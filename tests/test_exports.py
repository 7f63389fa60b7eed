"""models/exports.py: layouts by formulas of their own, arithmetic by the packed layer, files by the libraries that load them."""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import miniature
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import kernels
import quant
import train
from layers import PackedLayer, W4A4Conv2d, W4A16Linear, packed_class, packed_layers
from models import checkpoint, exports, pipeline
from models.denoiser import float_layers, from_blueprint
from models.family import FAMILIES
from run import files
from run.common import UserError


def pack(
    layer: nn.Module, kind: str, rank: int = 0, group: int = 64, smooth=None, shift=None, rotated=False, group_x=64
) -> PackedLayer:
    """`layer` rounded to nearest, with a branch whose factors bfloat16 holds."""
    gen = torch.Generator().manual_seed(rank)
    (O, K), taps = (len(layer.weight), layer.weight[0].numel()), layer.weight[0, 0].numel()
    w_OK = quant.flatten_conv(layer.weight[..., None, None] if layer.weight.dim() == 2 else layer.weight).detach()
    w_OK = w_OK if smooth is None else w_OK * smooth.repeat(taps)
    gw = quant.quantize_weight(quant.rotate_taps(w_OK, taps) if rotated else w_OK, group, taps)
    A, B = torch.randn(rank, K, generator=gen) / K**0.5, 0.1 * torch.randn(O, rank, generator=gen)
    if rotated:
        A = quant.rotate_taps(A.bfloat16().float(), taps)  # from_float rotates it back
    factors = (A if rotated else A.bfloat16().float(), B.bfloat16().float()) if rank else (None, None)
    return packed_class(kind, layer).from_float(layer, gw, *factors, smooth, group_x, rotated, shift).eval()


def linear(O: int, I: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(O + I)
    return nn.Linear(I, O, bias)


def powers_of_two(n: int) -> torch.Tensor:
    return torch.randint(-2, 3, (n,), generator=torch.Generator().manual_seed(n)).float().exp2()


# ---------------------------------------------------------------------------------------------------------------------
# layouts: where each element is, written out


def nibble(packed: torch.Tensor, n: int) -> int:
    return int(packed.flatten().view(torch.uint8)[n // 2]) >> 4 * (n % 2) & 15


@given(st.sampled_from((1, 3)), st.sampled_from((16, 32, 64, 96, 128, 200)), st.sampled_from((32, 64, 128)), st.booleans())
@torch.no_grad()
def test_sdnq_has_our_codes_and_scales_of_every_element(side, channels, group, conv):
    """Catches nibbles, taps or channels in another order, a group that reaches over the padding or over two taps, a scale that
    bfloat16 rounds, and an axis of groups where there is one."""
    torch.manual_seed(channels)
    float_layer = nn.Conv2d(channels, 4, side, padding=side // 2) if conv else nn.Linear(channels, 4)
    layer = pack(float_layer, "w4a4", group=group)
    stored, shape = exports.SDNQLayer(layer), tuple(float_layer.weight.shape)
    codes_OK, gw = kernels.unpack(layer.packed).codes_OK, kernels.unpack(layer.packed)
    groups, kernel = channels // exports.sdnq_group(layer), shape[2:]
    assert stored.scale.dtype == torch.bfloat16 and stored.weight.shape == (float_layer.weight.numel() // 2,)
    assert stored.scale.shape == ((4, groups, 1, *kernel) if groups > 1 else (4, 1, *kernel))
    padded = codes_OK.shape[1] // gw.taps
    for o in range(4):
        for i in range(channels):
            for t in range(gw.taps):
                n, k = (o * channels + i) * gw.taps + t, t * padded + i
                step = float(gw.scale_O[o]) * int(gw.mult_OG[o, k // group])
                assert nibble(stored.weight, n) - 8 == codes_OK[o, k]
                assert float(stored.scale.reshape(4, groups, gw.taps)[o, i * groups // channels, t]) == step
    assert torch.equal(stored.dequantized(), layer.weight.values())


def test_nunchaku_has_codes_where_the_matrix_instruction_reads_them():
    """Catches a permutation that loses its way: B of mma.m16n8k64 is read by lane 4 i + j, which holds row i and the columns
    8 j .. 8 j + 7 of two halves; a lane reads the two halves of rows and of columns of a tile of 16 x 64 at once."""
    layer = pack(linear(256, 128), "w4a4")
    stored, codes_OI = exports.SVDQLayer(layer, 16).qweight, kernels.unpack(layer.packed).codes_OK
    for o in range(256):
        for i in range(128):
            lane = 4 * (o % 8) + i % 32 // 8
            tile = (o // 128 * 2 + i // 64) * 8 + o % 128 // 16  # two tiles of columns, eight of rows in 128
            n = ((tile * 32 + lane) * 2 + o % 16 // 8) * 16 + i % 64 // 32 * 8 + i % 8
            assert nibble(stored, n) == codes_OI[o, i] % 16


def test_nunchaku_has_scales_and_factors_where_lanes_hold_their_sums():
    """Catches scales in the order of codes, A in the order of B, and a branch whose zeros are not the last ranks."""
    layer = pack(linear(256, 384), "w4a4", rank=5, smooth=powers_of_two(384))
    stored, gw = exports.SVDQLayer(layer, 32), kernels.unpack(layer.packed)
    row_of = torch.tensor([n // 128 * 128 + n % 128 // 16 * 16 + n % 4 // 2 * 8 + n % 16 // 4 * 2 + n % 2 for n in range(384)])
    step_OG = gw.scale_O[:, None] * gw.mult_OG
    for a in range(2):
        for g in range(6):  # each 128 rows have all of their groups, one after the other
            place = (a * 6 + g) * 128
            at = stored.wscales.flatten()[place : place + 128].float()
            assert torch.equal(at, step_OG[128 * a + row_of[:128], g])
    assert torch.equal(stored.smooth_factor.float(), powers_of_two(384)[row_of])
    assert torch.equal(stored.bias.float(), layer.bias.bfloat16().float()[row_of[:256]])
    A_rI, B_Or = layer.for_input(layer.lora_A.detach()), layer.lora_B.detach()
    for c in range(384 // 16):
        for r in range(2):
            for n in range(256):  # of a tile of 16 x 16: lane n // 8, four pairs of neighbours
                row, column = n % 8 // 4 * 8 + n // 32, n % 4 // 2 * 8 + n // 8 % 4 * 2 + n % 2
                rank, place = 16 * r + row, (c * 2 + r) * 256 + n
                down = A_rI[rank, 16 * c + column] if rank < 5 else 0
                assert float(stored.proj_down.flatten()[place]) == down
                if c < 256 // 16:
                    up = B_Or[16 * c + row, 16 * r + column] if 16 * r + column < 5 else 0
                    assert float(stored.proj_up.flatten()[place]) == up


def test_awq_has_codes_in_its_interleaved_order():
    """Catches channels of a word in order, rows that do not lie together in fours, and a zero point of another sign."""
    layer = pack(linear(8, 192), "w4a16")
    stored, gw = exports.AWQLayer(layer), kernels.unpack(layer.packed)
    assert stored.qweight.shape == (2, 96) and stored.qweight.dtype == torch.int32
    words = stored.qweight.view(2, 3, 4, 8)  # four rows, groups of 64, row, word
    for o in range(8):
        for i in range(192):
            word, place = i % 64 // 32 * 4 + i % 8 // 2, i % 32 // 8 + 4 * (i % 2)
            assert int(words[o // 4, i // 64, o % 4, word]) >> 4 * place & 15 == gw.codes_OK[o, i] + 8
    step_GO = (gw.scale_O[:, None] * gw.mult_OG).t()
    assert torch.equal(stored.wscales.float(), step_GO) and torch.equal(stored.wzeros.float(), -8 * step_GO)


def test_deepcompressor_packs_our_dequantized_weights_to_our_bytes():
    """Catches an order, a padding or a sign that is not that of the library whose checkpoints nunchaku's kernels were made for."""
    theirs = pytest.importorskip("deepcompressor.backend.nunchaku.utils")  # pip install --no-deps deepcompressor-toolkit==0.1.0
    layer = pack(linear(256, 384), "w4a4", rank=16, smooth=powers_of_two(384))
    ours, gw = exports.SVDQLayer(layer, 16), kernels.unpack(layer.packed)
    scale, A_rI = (gw.scale_O[:, None] * gw.mult_OG)[:, None, :, None], layer.for_input(layer.lora_A.detach())
    operands = layer.bias, powers_of_two(384), (A_rI.bfloat16(), layer.lora_B.detach().bfloat16())
    weight, scale, bias, smooth, (down, up), _ = theirs.convert_to_nunchaku_w4x4y16_linear_weight(
        kernels.dequantize(layer.packed).bfloat16(), scale, *operands
    )
    for name, tensor in {"qweight": weight, "wscales": scale, "bias": bias, "smooth_factor": smooth}.items():
        assert torch.equal(getattr(ours, name), tensor), name
    assert torch.equal(ours.proj_down, down) and torch.equal(ours.proj_up, up)
    layer = pack(linear(8, 192), "w4a16")
    ours, gw = exports.AWQLayer(layer), kernels.unpack(layer.packed)
    scale = (gw.scale_O[:, None] * gw.mult_OG)[:, None, :, None]
    weight, scale, zero, _ = theirs.convert_to_nunchaku_w4x16_linear_weight(
        kernels.dequantize(layer.packed).bfloat16(), scale, torch.full_like(scale, 8.0)
    )
    assert torch.equal(ours.qweight, weight) and torch.equal(ours.wscales, scale[:3]) and torch.equal(ours.wzeros, zero[:3])


# ---------------------------------------------------------------------------------------------------------------------
# arithmetic: what the stored tensors compute


@torch.no_grad()
def test_sdnq_layers_compute_q_plus_ba_of_the_input():
    """Catches a branch with taps in another order, factors that read the smoothed input, and a mean that is in the bias twice."""
    torch.manual_seed(0)
    conv = nn.Conv2d(96, 8, 3, stride=2, padding=1)
    layer, x = pack(conv, "w4a4", rank=3), torch.randn(2, 96, 9, 9)
    expected = F.conv2d(x, layer.weight.values(), layer.bias.bfloat16().float(), 2, 1)
    assert torch.allclose(exports.SDNQLayer(layer)(x), expected, atol=1e-5)
    layer, x = pack(linear(32, 96), "w4a4", rank=3, shift=torch.randn(96)), torch.randn(5, 96)
    W, (A, B) = kernels.dequantize(layer.packed), (layer.lora_A, layer.lora_B)
    expected = (x - layer.shift) @ W.t() + x @ A.t() @ B.t() + layer.bias
    assert torch.allclose(exports.SDNQLayer(layer)(x), expected, atol=0.02)  # the bias is rounded to bfloat16
    assert (exports.SDNQLayer(layer)(x) - expected).mean(0).abs().max() > 1e-6


@torch.no_grad()
def test_w4a16_layers_without_a_branch_are_awqs_bit_for_bit():
    """Catches a zero point that is not exact."""
    layer = pack(linear(8, 192), "w4a16")
    layer.bias.copy_(layer.bias.bfloat16())
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 192).to(dtype)
        assert torch.equal(exports.AWQLayer(layer)(x), layer(x))


@torch.no_grad()
def test_nunchaku_rounds_what_smoothing_makes_of_the_input_and_nothing_else():
    """Catches x times the factor, a branch of the smoothed input, steps of another range, and a mean that is in the bias twice."""
    layer = pack(linear(128, 256), "w4a4", rank=5, smooth=powers_of_two(256), shift=torch.randn(256))
    x, z_hat = torch.randn(3, 256), torch.zeros(3, 256)
    for t in range(3):
        for g in range(4):
            z = x[t, 64 * g : 64 * g + 64] / powers_of_two(256)[64 * g : 64 * g + 64]
            step = z.abs().max() / 7
            z_hat[t, 64 * g : 64 * g + 64] = (z / step).round() * step.bfloat16().float()
    W, x1 = kernels.dequantize(layer.packed).double(), x.double() * layer.inv_smooth.double()
    y = z_hat.double() @ W.t() + x1 @ layer.lora_A.t().double() @ layer.lora_B.t().double()
    bias = layer.bias.double() - W @ layer.shift.double()
    found = exports.SVDQLayer(layer, 16)(x).double() - y
    assert torch.allclose(found, bias.float().bfloat16().double().expand(3, -1), atol=1e-3)
    assert exports.SVDQLayer(layer, 16)(torch.zeros(1, 256)).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# whole pipelines


def write_run(folder: Path, name: str, base: Path, **options) -> Path:
    """What train.py would leave with --no-rotate --smooth 0, ranks from 0 to 5, FLUX's linear layers centred; options are those of
    the first W4A4 layer. For nunchaku each third W4A4 layer is smoothed."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    net, table, first = getattr(pipe, FAMILIES[name].part), {}, options
    plan = {"model": name, "base": str(base), "class": type(net).__name__, "scheduler": dict(pipe.scheduler.config)}
    plan |= {"latent": [*FAMILIES[name].latent[:1], 8, 8], "config": {k: v for k, v in net.config.items() if k != "_name_or_path"}}
    for i, (key, layer) in enumerate(float_layers(net).items()):
        if (kind := FAMILIES[name].precision(key)) == "16bit":
            continue
        about = {"rank": (2, 3, 0, 5)[i % 4], "group_x": 64 if name == "flux" else 8}
        if name == "flux" and kind == "w4a4":
            about["shift"] = torch.randn(layer.in_features, generator=torch.Generator().manual_seed(i)) if i % 4 else None
        about, first = about | (first if kind == "w4a4" else {}), first if kind != "w4a4" else {}
        twin = pack(layer, kind, **about)
        net.set_submodule(key, twin)
        table[key] = {"kind": kind, "shape": [len(layer.weight), layer.weight[0].numel()], "rank": twin.rank, "group_w": twin.group}
        table[key] |= {"group_x": twin.group_x, "smooth": twin.inv_smooth is not None, "rotated": twin.rotated}
        table[key] |= {"centred": twin.shift is not None}
    denoiser = from_blueprint(plan)
    denoiser.net = net
    folder.mkdir(parents=True)
    config = dataclasses.asdict(train.Config()) | {"backend": "eager"}
    files.write_json(folder / "config.json", {"format": files.FORMAT, "config": config})
    checkpoint.save_start(folder, denoiser, table)
    checkpoint.save_checkpoint(folder, denoiser, table, merged=False)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: miniature.save(name, root / name) for name in ("sd15", "sdxl", "flux")}


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: write_run(root / name, name, base) for name, base in bases.items()}


def export(run: Path, kind: str, out: Path) -> tuple[Path, dict]:
    """(the folder, its quantization_config)."""
    pipeline.main(["--checkpoint", str(run), "--export", kind, "--out", str(out)])
    part = next(out / part for part in ("unet", "transformer") if (out / part).is_dir())
    return out, json.loads((part / "config.json").read_text())["quantization_config"]


def packed_of(run: Path) -> dict[str, PackedLayer]:
    return dict(packed_layers(pipeline.load_denoiser(run, torch.float32).net))


def check_card(folder: Path, capsys, *words: str) -> None:
    card = (folder / "README.md").read_text()
    distance = re.search(r"([\d.]+) dB \(PSNR\)", card)[1]
    assert 15 < float(distance) < 90 and f"{distance} dB from those of the packed one" in capsys.readouterr().out
    assert all(word in card for word in words) and "{" not in card.partition("## Use")[0].partition("---\n\n")[2]


@pytest.mark.parametrize("name", ("sd15", pytest.param("sdxl", marks=pytest.mark.slow), "flux"))
def test_sdnq_loads_the_folder_and_dequantizes_to_our_weights(runs, tmp_path, monkeypatch, capsys, name):
    """Catches names, shapes and settings of a layer that are not SDNQ's, a 16-bit layer that it takes for one of its own, weights
    that differ by a bit, other biases, and a picture that its layers do not draw. Without the package: a tensor that is missing."""
    monkeypatch.setattr(kernels, "_has_native", lambda device: False)
    folder, config = export(runs[name], "sdnq", tmp_path / "out")
    check_card(folder, capsys, "pip install sdnq")
    packed, part = packed_of(runs[name]), FAMILIES[name].part
    stored = load_file(folder / part / "diffusion_pytorch_model.safetensors")
    assert {key.removesuffix(".scale") for key in stored if key.endswith(".scale")} == packed.keys()
    assert {key.removesuffix(".svd_up") for key in stored if key.endswith(".svd_up")} == {k for k, v in packed.items() if v.rank}
    assert any(isinstance(layer, W4A4Conv2d) for layer in packed.values()) == (name != "flux")
    assert not {f"{key}.weight" for key in packed} & {*config["modules_to_not_convert"]}

    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")  # read when it is imported: compiling takes minutes
    pytest.importorskip("sdnq")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    net = getattr(pipe, part)
    exact = 0
    for key, layer in net.named_modules():
        if key not in packed:
            assert not hasattr(layer, "sdnq_dequantizer"), key
            continue
        names = ("weight", "scale", "zero_point", "svd_up", "svd_down")
        tensors = {name: getattr(layer, name, None) for name in names}
        ours, found = packed[key].float_weight(), {}
        for non_svd in (False, True):
            w = layer.sdnq_dequantizer(**tensors, non_svd=non_svd, dtype=torch.float32, skip_compile=True)
            found[non_svd] = quant.flatten_conv(w) if w.dim() == 4 else w
        assert torch.equal(found[True], kernels.dequantize(packed[key].packed)), key  # not smoothed, not rotated
        assert torch.allclose(found[False], ours, atol=1e-6), key
        exact += torch.equal(found[False], ours)
        if layer.bias is not None:
            assert torch.equal(layer.bias, packed[key].float_bias().bfloat16()), key
    assert exact >= sum(layer.rank == 0 for layer in packed.values())
    pipe.set_progress_bar_config(disable=True)
    pipe.default_sample_size = 8
    drawn = pipeline.draw_with_pipeline(pipe, ["a large red house"], 2, guidance=FAMILIES[name].few_step_guidance(3.5))
    ours = pipeline.load_pipeline(runs[name], dtype=torch.bfloat16)
    exports.replace(pipeline.denoiser_of(ours), exports.as_sdnq(pipeline.denoiser_of(ours)))
    expected = pipeline.draw_with_pipeline(ours, ["a large red house"], 2, guidance=FAMILIES[name].few_step_guidance(3.5))
    assert (drawn - expected).abs().mean() < 0.01


class Ops:
    """nunchaku's two operators of W4A4 layers and AWQ's, in plain PyTorch by the formulas of this file: what a layer of diffusers
    asks of them is computed from the tensors that it loaded. What goes from the first to the second is in an order of its own."""

    @staticmethod
    def quantize_w4a4_act_fuse_lora(x, codes, scales, down, low, smooth, fuse_glu, fp4):
        T, I = x.shape
        row_of = torch.tensor([n // 128 * 128 + n % 128 // 16 * 16 + n % 4 // 2 * 8 + n % 16 // 4 * 2 + n % 2 for n in range(I)])
        z_Gg = (x / torch.empty_like(smooth).index_copy_(0, row_of, smooth)).float().unflatten(1, (-1, 64))
        scale = z_Gg.abs().amax(2, keepdim=True) / 7
        q = (z_Gg / scale).round().clamp(-8, 7).to(torch.int8).flatten(1) + 8
        codes[:T] = (q[:, 0::2] | q[:, 1::2] << 4).to(torch.uint8)
        scales[:, :T] = scale[..., 0].t().to(scales.dtype)
        tiles = down.view(I // 16, -1, 8, 4, 2, 2, 2).permute(1, 4, 2, 0, 5, 3, 6).reshape(-1, I)
        low[:T] = x.float() @ tiles.float().t()

    @staticmethod
    def gemm_w4a4(act, wgt, out, *rest):
        _, ascales, wscales, _, _, low, up, *_ = rest
        bias, (T, O), I = rest[12], out.shape, 2 * wgt.shape[1]
        u = torch.stack([wgt.view(torch.uint8) & 15, wgt.view(torch.uint8) >> 4], -1).flatten().to(torch.int16)
        q_OI = (u - 16 * (u > 7)).view(O // 128, I // 64, 8, 8, 4, 2, 2, 8).permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(O, I)
        scale_OG = wscales.view(O // 128, I // 64, 8, 4, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(O, -1)
        x = torch.stack([act[:T] & 15, act[:T] >> 4], -1).flatten(1).float() - 8
        x = x * ascales[:, :T].t().float().repeat_interleave(64, 1)
        B_Or = up.view(O // 16, -1, 8, 4, 2, 2, 2).permute(0, 4, 2, 1, 5, 3, 6).reshape(O, -1)
        y = x @ (q_OI * scale_OG.float().repeat_interleave(64, 1)).t() + low[:T] @ B_Or.float().t()
        row_of = torch.tensor([n // 128 * 128 + n % 128 // 16 * 16 + n % 4 // 2 * 8 + n % 16 // 4 * 2 + n % 2 for n in range(O)])
        out.copy_(y if bias is None else y + torch.empty_like(bias).index_copy_(0, row_of, bias).float())

    @staticmethod
    def awq_gemm_w4a16_g64_int32(x, kernel, scales, zeros):
        G, O = scales.shape
        nibbles = torch.stack([kernel.view(torch.uint8) & 15, kernel.view(torch.uint8) >> 4], -1).view(O // 4, G, 4, 2, 4, 2, 4)
        u_OGg = nibbles.permute(0, 2, 1, 3, 6, 4, 5).reshape(O, G, 64)
        w = torch.addcmul(zeros.t()[..., None].float(), u_OGg.float(), scales.t()[..., None].float())
        return x @ w.flatten(1).to(x.dtype).t()

    @classmethod
    def gemv_awq(cls, x, kernel, scales, zeros, m, n, k, group_size):
        return cls.awq_gemm_w4a16_g64_int32(x, kernel, scales, zeros)


def test_diffusers_loads_the_nunchaku_folder_and_its_layers_compute_what_ours_do(runs, tmp_path, monkeypatch, capsys):
    """Catches a name, shape or dtype that is not that of diffusers' layers, a target without its tensors, a rank that is not one
    for all, a layer with a branch that AWQ cannot have, and operands that diffusers gives to the wrong place of a kernel."""
    monkeypatch.setattr(kernels, "_has_native", lambda device: False)
    folder, config = export(runs["flux"], "nunchaku", tmp_path / "out")
    packed = packed_of(runs["flux"])
    w4a16 = {key: layer for key, layer in packed.items() if isinstance(layer, W4A16Linear)}
    assert {*config["svdq_w4a4"]["targets"]} == packed.keys() - w4a16.keys() and config["svdq_w4a4"]["rank"] == 16
    assert {*config["awq_w4a16"]["targets"]} == {key for key, layer in w4a16.items() if not layer.rank} != w4a16.keys()
    check_card(folder, capsys, f"{len(packed) - len(w4a16)} layers are W4A4 of rank 16, ", "groups of 64. On", "were not run")

    pytest.importorskip("diffusers.quantizers.nunchaku")  # of diffusers 0.42
    from diffusers.quantizers.nunchaku import nunchaku_quantizer
    from diffusers.utils import constants, import_utils

    # diffusers' own layers, with operators that run here in the place of those that it would download
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=lambda *a, **k: SimpleNamespace(ops=Ops)))
    monkeypatch.setattr(import_utils, "_kernels_available", True)
    monkeypatch.setattr(constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    monkeypatch.setattr("diffusers.utils.is_kernels_version", lambda *a: False)
    monkeypatch.setattr(nunchaku_quantizer.NunchakuLiteQuantizer, "validate_environment", lambda self, *a, **k: None)
    monkeypatch.delitem(sys.modules, "diffusers.quantizers.nunchaku.utils", raising=False)
    net = diffusers.FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.bfloat16)
    monkeypatch.undo()
    utils = importlib.import_module(type(net.get_submodule(config["svdq_w4a4"]["targets"][0])).__module__)
    assert sum(isinstance(m, utils.SVDQW4A4Linear) for m in net.modules()) == len(config["svdq_w4a4"]["targets"])
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, stored[key]) for key, tensor in net.state_dict().items())

    monkeypatch.setattr(kernels, "_has_native", lambda device: False)
    ours = pipeline.denoiser_of(pipeline.load_pipeline(runs["flux"], dtype=torch.bfloat16))
    exports.replace(ours, exports.as_nunchaku(ours))
    gen = torch.Generator().manual_seed(0)
    for key, layer in ours.named_modules():
        if isinstance(layer, exports.ExportedLayer):
            x = torch.randn(20, layer.weight_shape[1], generator=gen).bfloat16()
            with torch.no_grad():
                expected, found = layer(x).float(), net.get_submodule(key)(x).float()
            assert (found - expected).norm() < 0.01 * expected.norm(), key


# ---------------------------------------------------------------------------------------------------------------------
# refusals

REFUSED = {
    "rotation": ("flux", ("sdnq", "nunchaku"), {"rotated": True}, "--no-rotate"),
    "smoothing": ("flux", ("sdnq",), {"smooth": "powers"}, "--smooth 0"),
    "factors that bfloat16 does not divide by": ("flux", ("nunchaku",), {"smooth": "thirds"}, "--smooth 0"),
    "8-bit activations": ("flux", ("nunchaku",), {"group_x": quant.EIGHT_BITS}, "--bits-x 4 --inputs-8bit 0"),
    "groups of weights": ("flux", ("nunchaku",), {"group": 32}, "--group-w 64"),
    "all at once": ("flux", ("nunchaku",), {"rotated": True, "group": 32}, "--no-rotate --group-w 64"),
    "convolutions": ("sd15", ("nunchaku",), {}, "--export sdnq"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_drawn(bases, tmp_path, monkeypatch, what):
    """Catches a model that is written though it is another one, flags that a second training would have to find, and an error that
    comes after minutes of drawing."""
    name, kinds, options, flags = REFUSED[what]
    monkeypatch.setattr(pipeline, "draw_with_pipeline", lambda *a, **k: pytest.fail("drawn"))
    if "smooth" in options:
        options = {"smooth": powers_of_two(128) if options["smooth"] == "powers" else torch.full((128,), 3.0)}
    run = write_run(tmp_path / "run", name, bases[name], **options)
    for kind in kinds:
        with pytest.raises(UserError, match=rf"{kind} .*{flags}$"):
            export(run, kind, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_mean_that_no_bias_can_take_is_refused(bases, tmp_path):
    """Catches a layer whose bias the other library does not load, since the float layer has none."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(bases["sd15"])
    key = next(key for key, layer in float_layers(pipe.unet).items() if key.endswith("attn1.to_q"))
    layer = pipe.unet.get_submodule(key)
    pipe.unet.set_submodule(key, pack(layer, "w4a4", shift=torch.randn(layer.in_features)))
    with pytest.raises(UserError, match=rf"cannot hold 1 layers as they are, {key} first: train with --no-centre$"):
        exports.as_sdnq(pipe.unet)
    key = key.replace("to_q", "to_out.0")  # has a bias
    layer = pipe.unet.get_submodule(key)
    pipe = diffusers.DiffusionPipeline.from_pretrained(bases["sd15"])
    pipe.unet.set_submodule(key, pack(layer, "w4a4", shift=torch.randn(layer.in_features)))
    assert [*exports.as_sdnq(pipe.unet).layers] == [key]


def test_sizes_that_nunchaku_pads_are_refused():
    """Catches a layer that diffusers would build smaller than its packed tensors."""
    net = nn.Sequential(pack(linear(128, 192), "w4a4"))
    with pytest.raises(UserError, match="multiples of 128 channels, unlike 0"):
        exports.as_nunchaku(net)
