"""student.py on a down block of SDXL, narrow and (slow) at its full width: slices under a budget, shared factors, ranks of 0."""

import copy
import dataclasses
import functools
import json
import re
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import hessian
import hgs_lora
import layers
import qra
import quant
import student
import train
from benchmarks import bench
from models import checkpoint
from models.denoiser import Denoiser, float_layers
from models.family import FAMILIES

SDXL, NARROW = 640, 64  # channels of down_blocks.1
LAYERS = 27  # of them that are quantized
BUDGET_MB = 560  # of the full width: half of it is for the float64 sums of H, the 5,760 wide convolution's alone are 265 MB


class Block(nn.Module):
    """Half of down_blocks.1 of SDXL (a ResNet, 2 transformer layers, downsampler) between two convolutions."""

    config = None  # of a diffusers network

    def __init__(self, width: int):
        super().__init__()
        self.temb, self.text = 2 * width, 2048 if width == SDXL else 96
        block = CrossAttnDownBlock2D(
            width // 2, width, self.temb, num_layers=1, transformer_layers_per_block=2, cross_attention_dim=self.text,
            num_attention_heads=width // 64, use_linear_projection=True, downsample_padding=1,
        )  # fmt: skip
        self.conv_in, self.block, self.conv_out = nn.Conv2d(4, width // 2, 3, padding=1), block, nn.Conv2d(width, 4, 1)
        gen = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=gen) / p[0].numel() ** 0.5 if p.dim() > 1 else torch.full_like(p, 0.5)
        self.eval().requires_grad_(False)

    def forward(self, x, tokens):
        h, _ = self.block(self.conv_in(x), torch.zeros(len(x), self.temb), tokens)
        return self.conv_out(F.interpolate(h, scale_factor=2.0))


class BlockDenoiser(Denoiser):
    def forward(self, x, t, s, cond):
        return self.net(x, cond["tokens"])


def denoiser(width: int = NARROW) -> Denoiser:
    return BlockDenoiser(FAMILIES["sdxl"], Block(width), latent=(4, 8, 8))


def build(flags: str, base: Denoiser | None = None) -> tuple[Denoiser, dict[str, dict]]:
    base = base or denoiser()
    cfg = train.parse(
        f"--model sdxl --sampling-steps 1 --micro 1 --dtype float32 --hessian-mb 4096 --init qera --rounding rtn {flags}".split()
    )
    cond = {"tokens": torch.randn(2, 77, base.net.text, generator=torch.Generator().manual_seed(1))}
    return student.build(cfg, base, cond, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)))


@torch.no_grad()
def distance(packed: Denoiser, width: int) -> float:
    """Of what the packed and the float block predict, relative to the float one."""
    gen, plain = torch.Generator().manual_seed(3), Block(width)
    x, tokens = torch.randn(1, 4, 8, 8, generator=gen), torch.randn(1, 77, plain.text, generator=gen)
    exact = plain(x, tokens)
    return float((packed.net(x, tokens) - exact).square().mean() / exact.var())


FULL = "--rank 2 --hessian kron --ranks qra"


@pytest.fixture(scope="module")
def whole() -> tuple[Denoiser, dict[str, dict]]:
    return build(FULL)


def test_every_layer_is_packed_in_its_own_place(whole):
    """Catches a layer that is left out, and layers that were put in each other's places."""
    packed, table = whole
    assert len(table) == LAYERS and list(table) == [name for name, _ in layers.packed_layers(packed.net)]
    assert not [name for name in float_layers(packed.net) if not re.match("conv_(in|out)", name)]
    assert all(row["shape"] == (layer.out, layer.taps * layer.channels) for row, (_, layer) in
               zip(table.values(), layers.packed_layers(packed.net), strict=True))  # fmt: skip
    assert max(row["error"] for row in table.values()) < 0.02
    assert distance(packed, NARROW) < 0.05


@pytest.mark.parametrize("flags", ["", "--smooth 0 --hessian input"])
def test_slices_change_nothing_but_the_number_of_passes(flags):
    """Catches a layer that is lost or measured on a network that has already changed, and sums that are all held at once."""
    built, passes = [], []
    for budget in (4096, 16 * 576**2 / 2**20 + 1):
        base, calls = denoiser(), []
        forward = base.net.forward
        base.net.forward = lambda *args, calls=calls, forward=forward: calls.append(0) or forward(*args)
        built.append(build(f"{FULL} {flags} --hessian-mb {int(budget)}", base))
        passes.append(len(calls))
    (one, table), (sliced, same) = built
    assert table == same
    assert passes[0] == (1 if "smooth 0" in flags else 4), "what one slice holds is measured once, for ranks and splits"
    assert passes[1] > 2 * passes[0]
    assert all(torch.equal(tensor, sliced.state_dict()[key]) for key, tensor in one.state_dict().items())


def test_ranks_are_given_diagonals_where_one_slice_does_not_hold_all_layers():
    """Catches: all slices of H for the ranks, a layer that is left out, diagonals where the residual's spectrum needs all of H."""
    needed = 16 * 576**2 / 2**20 + 1
    for flags, budget, dims in (("", needed, 1), ("", 4096, 2), ("--hessian input", needed, 2)):
        base = denoiser()
        cfg = train.parse(f"--model sdxl --sampling-steps 1 --micro 1 --hessian-mb {int(budget)} {flags}".split())
        cond = {"tokens": torch.randn(1, 77, base.net.text)}
        calibration = student.Calibration(cfg, base, student.layers_to_quantize(cfg, base), cond, torch.randn(1, 4, 8, 8))
        seen = [(layer.name, layer.white.H_KK.dim()) for layer in calibration.for_ranks()]
        assert len(seen) == len(set(seen)) == LAYERS and {dim for _, dim in seen} == {dims}
        assert {layer.white.H_KK.dim() for layer in calibration} == {2}


@pytest.mark.parametrize("flags,inputs", [("--hessian input", 20), ("--hessian kron --init hgs", 20), ("--smooth 0", 20)])
def test_layers_of_one_input_share_a_whitener_and_none_outlives_its_layer(monkeypatch, flags, inputs):
    """Catches a Cholesky factor for each of q, k and v, and factors that stay until the end of a slice: 24 GB on SDXL where 8 GB
    were asked for. Smoothed layers see different inputs."""
    alive, peak, made = 0, 0, 0

    class Whitener(hgs_lora.Whitener):
        def __init__(self, *args):
            nonlocal alive, peak, made
            super().__init__(*args)
            weakref.finalize(self.L_KK, self.gone)  # the factor, which copies of the Whitener share
            made, alive = made + 1, alive + 1
            peak = max(peak, alive)

        @staticmethod
        def gone():
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(hgs_lora, "Whitener", Whitener)
    build(f"--ranks uniform --rank 2 --iters 1 {flags}")
    assert made == inputs, "q, k, v of a layer share one, and so do the k, v of both cross-attentions"
    assert peak <= 2 and not alive, "the one of the caption waits for the second cross-attention"


@pytest.mark.parametrize(
    "flags", ["--smooth 0 --no-rotate --group-x 16", "--smooth 0", "--centre --smooth 0.5", "--no-rotate --smooth 0.25"]
)
def test_what_a_layer_is_handed_out_with_belongs_together_and_is_let_go_of(flags):
    """Catches W, H, N, mean or lambda of another smoothing or rotation, a lambda of one of q, k and v alone, or of x that is not
    centred, and statistics and factors that pile up in the list of layers."""
    cfg = train.parse(f"--model sdxl --sampling-steps 1 --micro 1 --hessian-mb 4096 {flags}".split())
    (a,), base, before, inputs = cfg.exponents, denoiser(), None, {}
    chosen = student.layers_to_quantize(cfg, base)
    for layer in chosen:
        layer.module.register_forward_pre_hook(lambda _, args, name=layer.name: inputs.setdefault(name, []).append(args[0]))
    cond = {"tokens": torch.randn(2, 77, base.net.text)}
    readers = {}
    for layer in student.Calibration(cfg, base, chosen, cond, torch.randn(2, 4, 8, 8)):
        assert before is None or before.stats is before.w_OK is before.white is None
        before, w4a4, conv = layer, layer.kind == "w4a4", isinstance(layer.module, nn.Conv2d)
        x_TI = (
            torch.cat([x.movedim(1, -1).flatten(0, -2) if conv else x.flatten(0, -2) for x in inputs[layer.name]]).detach().double()
        )
        lam_I = c_I = None
        if w4a4 and cfg.centre and not conv:
            c_I = x_TI.mean(0)
        if w4a4 and a:
            others = [other for other in chosen if inputs[other.name][0] is inputs[layer.name][0]]
            readers[layer.name] = len(others)
            wmax_I = torch.stack([other.module.weight.abs().movedim(1, -1).flatten(0, -2).amax(0) for other in others]).amax(0)
            lam_I = (x_TI if c_I is None else x_TI - c_I).abs().amax(0) ** a / wmax_I.double() ** (1 - a)
            lam_I = lam_I.log2().round().exp2()
        close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5, check_dtype=False)
        assert (layer.smooth_I is None) == (lam_I is None) and (lam_I is None or torch.equal(layer.smooth_I, lam_I.float()))
        assert (layer.shift_I is None) == (c_I is None)
        z_TI = x_TI if lam_I is None else x_TI / lam_I
        if c_I is not None:
            close(layer.shift_I, c_I if lam_I is None else c_I / lam_I, rtol=0.005)  # it has 8 bits, exactly
            assert torch.equal(layer.shift_I, layer.shift_I.bfloat16().float())
            z_TI = z_TI - layer.shift_I
        W = layer.module.weight.permute(0, 2, 3, 1).flatten(1) if conv else layer.module.weight
        W = W if lam_I is None else W * lam_I.repeat(layer.taps)
        assert layer.rotated == (w4a4 and cfg.rotate)
        close(layer.w_OK, quant.rotate_taps(W.float(), layer.taps) if layer.rotated else W)
        z_TI = quant.rotate(z_TI.float()).double() if layer.rotated else z_TI
        if not conv:
            close(layer.stats.H_KK, z_TI.mT @ z_TI / len(z_TI))
            noise_I = (
                (z_TI - quant.dequantize_activation(*quant.quantize_activation(z_TI, cfg.group_x), len(z_TI[0]))).square().mean(0)
            )
            assert not w4a4 or (layer.white.noise_K - noise_I).norm() < 0.01 * noise_I.norm()  # last bits of lambda move codes
        assert (layer.white.noise_K is None) == (not w4a4)
        assert torch.equal(layer.white.H_KK, hessian.damp(layer.stats.H_KK)) and layer.white.G_OO is not None
    assert not a or max(readers.values()) == 4, "k and v of two cross-attentions"


@pytest.mark.parametrize("kind,rotated", [("linear", False), ("linear", True), ("conv", True)])
def test_loss_on_grid_is_that_of_both_roundings_over_the_output(kind, rotated):
    """Catches a rounding that is left out, taps that cancel each other, weights of layers that are not relative."""
    torch.manual_seed(0)
    module, cfg = nn.Linear(32, 24) if kind == "linear" else nn.Conv2d(32, 24, 3), train.parse(["--group-x", "16"])
    x_TI, lambda_I = torch.randn(40, 32), torch.randint(-2, 3, (32,)).float().exp2()
    group = [student.Layer(name, module, "w4a4", 0, 16, rotated) for name in "ab"]
    group[1].module = copy.deepcopy(module.requires_grad_(False))
    group[1].module.weight.data *= 128  # counts no more than the other
    student.changed_by(group, lambda_I, torch.ones(32) if kind == "linear" else None)
    W, z_TI = module.weight.detach().reshape(24, 32, -1) * lambda_I[:, None], x_TI / lambda_I - float(kind == "linear")
    W, z_TI = (quant.rotate(W.mT).mT, quant.rotate(z_TI)) if rotated else (W, z_TI)
    q_W = quant.dequantize(quant.quantize_weight(W.mT.flatten(1), 64, W.shape[2])).unflatten(1, (-1, 32)).mT
    q_z = quant.dequantize_activation(*quant.quantize_activation(z_TI, 16), 32)
    E_z, E_W, E = (torch.einsum("oik,ti->tok", *pair).square().sum() for pair in ((W, z_TI - q_z), (W - q_W, z_TI), (W, z_TI)))
    assert student.loss_on_grid(group, x_TI, cfg) == pytest.approx(2 * float((E_z + E_W) / E), rel=1e-3)


def test_every_input_is_smoothed_as_its_readers_lose_least():
    """Catches an exponent for all inputs, the worst one, the last one that was tried, readers of one tensor that differ."""
    cfg = train.parse("--model sdxl --sampling-steps 1 --micro 1 --hessian-mb 4096 --no-rotate".split())
    base = denoiser()
    block = base.net.get_submodule(next(name for name, _ in base.net.named_modules() if name.endswith("transformer_blocks.0")))
    with torch.no_grad():
        block.norm1.weight[3] = 64.0
        for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            layer.weight[:, 3] /= 64
    found = {}

    class Watched(student.Calibration):
        def centre_and_smooth(self, layers, ranges):
            found.update(ranges)
            super().centre_and_smooth(layers, ranges)

    chosen, cond = student.layers_to_quantize(cfg, base), {"tokens": torch.randn(2, 77, base.net.text)}
    Watched(cfg, base, chosen, cond, torch.randn(2, 4, 8, 8))
    groups, exponents = {}, set()
    for layer in (layer for layer in chosen if layer.kind == "w4a4"):
        groups.setdefault(found[layer.name].first, []).append(layer)
    assert max(map(len, groups.values())) == 4 and found[chosen[1].name].rows_TI.shape[0] == 2
    for first, group in groups.items():
        assert len({None if layer.smooth_I is None else tuple(layer.smooth_I.tolist()) for layer in group}) == 1
        taken = group[0].smooth_I, group[0].shift_I
        found_for_each = student.Calibration.changes_of_input(group, found[first], None, cfg.exponents)
        changes = dict(zip(cfg.exponents, found_for_each, strict=True))
        losses = {a: student.loss_on_grid(student.changed_by(group, *c), found[first].rows_TI, cfg) for a, c in changes.items()}
        best = min(losses, key=losses.get)
        lambda_I, _ = changes[best]
        assert (lambda_I is None) == (taken[0] is None) and (lambda_I is None or torch.equal(lambda_I, taken[0]))
        exponents.add(best)
        if block.attn1.to_q in [layer.module for layer in group]:
            assert best > 0, "an outlier channel is smoothed"
    assert len(exponents) > 1


def test_activations_in_8_bits_are_those_of_w4a4_layers():
    """Catches a table of layers that does not say so, W4A16 layers that are named, noise of the 4-bit grid in the split."""
    flags, kinds = "--ranks uniform --rank 2 --iters 1 --group-x 32", {}
    (eight, table), (four, _) = build(f"{flags} --bits-x 8"), build(flags)
    for name, layer in layers.packed_layers(eight.net):
        kinds.setdefault(table[name]["kind"], set()).add(layer.group_x)
        assert table[name]["group_x"] == layer.group_x
    assert kinds == {"w4a4": {quant.EIGHT_BITS}, "w4a16": {32}}
    assert distance(eight, NARROW) < 0.7 * distance(four, NARROW)
    noise = []
    for bits in (4, 8):
        cfg = train.parse(f"--model sdxl --sampling-steps 1 --micro 1 --hessian-mb 4096 --bits-x {bits}".split())
        base = denoiser()
        cond = {"tokens": torch.randn(1, 77, base.net.text, generator=torch.Generator().manual_seed(1))}
        calibration = student.Calibration(cfg, base, student.layers_to_quantize(cfg, base), cond, torch.ones(1, 4, 8, 8))
        noise.append(torch.cat([layer.white.noise_K for layer in calibration if layer.kind == "w4a4"]))
    assert 0 < noise[1].mean() < 0.1 * noise[0].mean()


def test_the_inputs_that_cost_most_have_8_bits():
    """Catches: readers of one tensor that differ, the cheapest inputs, noise of 4 bits in ranks and split, a cost without gradients
    or without the weight, a table that does not say so."""
    flags = "--model sdxl --sampling-steps 1 --micro 1 --hessian-mb 4096"
    cond = {"tokens": torch.randn(2, 77, denoiser().net.text, generator=torch.Generator().manual_seed(1))}  # those of `build`
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))

    def calibration(more: str) -> tuple[list[student.Layer], student.Calibration]:
        cfg, base = train.parse(f"{flags} {more}".split()), denoiser()
        chosen = student.layers_to_quantize(cfg, base)
        return chosen, student.Calibration(cfg, base, chosen, cond, x_T)

    _, four = calibration("")
    costs, noise = {}, {}
    for layer in four:
        if layer.kind == "w4a4":
            lost = torch.einsum("ok,k,pk,op->", layer.w_OK.double(), layer.white.noise_K, layer.w_OK.double(), layer.white.G_OO)
            first, noise[layer.name] = layer.stats.layers[0], layer.white.noise_K
            costs[first] = costs.get(first, 0) + float(lost)
    most = sorted(costs, key=costs.get, reverse=True)[:17]
    chosen, some = calibration("--inputs-8bit 17")
    eight = {layer.name for layer in chosen if layer.group_x == quant.EIGHT_BITS}
    for layer in some:
        if layer.kind == "w4a4":
            assert (layer.name in eight) == (layer.stats.layers[0] in most)
            ratio = layer.white.noise_K.sum() / noise[layer.name].sum()
            assert ratio < 0.1 if layer.name in eight else ratio == 1
    assert len(eight) > 17, "some of them are read by several layers"
    packed, table = build("--inputs-8bit 17 --init hgs --iters 1")
    assert {name for name, row in table.items() if row["group_x"] == quant.EIGHT_BITS} == eight
    assert {name for name, layer in layers.packed_layers(packed.net) if layer.group_x == quant.EIGHT_BITS} == eight


# ---------------------------------------------------------------- rules for ranks


def test_every_statistic_that_a_rule_reads_can_be_measured():
    assert {"whole"}.union(*(rule.reads for rule in qra.METHODS.values())) == set(student.STATISTICS)


def test_a_rule_of_ones_own_with_its_own_statistic_is_one_row_each(monkeypatch):
    """Catches a statistic that is measured without being asked for, or asked for and not measured."""
    measured = []

    def norm(layer, cfg):
        measured.append(layer.name)
        return float(layer.w_OK.norm())

    def gains_norm(shapes, statistics, beta, seed):
        return {name: [statistics[name]["norm"] / i for i in range(1, min(shape) + 1)] for name, shape in shapes.items()}

    def unread(layer, cfg):
        raise AssertionError("no rule asked for it")

    monkeypatch.setitem(qra.METHODS, "norm", qra.Rule(gains_norm, ("norm",)))
    for name in student.STATISTICS:
        monkeypatch.setitem(student.STATISTICS, name, unread)
    monkeypatch.setitem(student.STATISTICS, "norm", norm)
    base = denoiser()
    cfg = train.parse("--model sdxl --sampling-steps 1 --micro 1 --hessian-mb 4096 --init zero --rounding rtn --rank 4".split())
    cfg = dataclasses.replace(cfg, ranks="norm")
    cond = {"tokens": torch.randn(1, 77, base.net.text)}
    _, table = student.build(cfg, base, cond, torch.randn(1, 4, 8, 8))
    assert sorted(measured) == sorted(table) and len({row["rank"] for row in table.values()}) > 1
    build("--ranks uniform")  # asks for none


@pytest.mark.parametrize("flags", ["", "--no-rotate --centre", "--centre", "--smooth 0 --centre"])
def test_rotated_and_centred_layers_compute_the_network_that_they_were_made_of(whole, flags):
    """Catches statistics, split or branch of unlike inputs: the error would be several times that of plain layers."""
    packed, table = build(f"{FULL} {flags}")
    assert any(row["rotated"] for row in table.values()) == ("--no-rotate" not in flags)
    assert any(row["centred"] for row in table.values()) == ("--centre" in flags)
    assert distance(packed, NARROW) < 2 * distance(whole[0], NARROW)


def test_a_small_budget_leaves_layers_without_a_branch(whole):
    """Catches ranks of 0 that are raised, that cut gradients off, or that cannot be placed again from the table of layers."""
    packed, table = whole
    ranks = {name: row["rank"] for name, row in table.items()}
    assert min(ranks.values()) == 0 and max(ranks.values()) > 8
    shapes = {name: row["shape"] for name, row in table.items()}
    assert 0.95 < qra.total(ranks, shapes) / qra.total(dict.fromkeys(shapes, 2), shapes) <= 1
    params = {k: p.requires_grad_() for k, p in packed.net.named_parameters() if "lora_" in k}
    assert len(params) == 2 * sum(r > 0 for r in ranks.values())
    gen = torch.Generator().manual_seed(4)
    packed.net(torch.randn(1, 4, 8, 8, generator=gen), torch.randn(1, 77, packed.net.text, generator=gen)).square().sum().backward()
    assert all(p.grad.any() for k, p in params.items()), "gradients pass through layers of rank 0"
    twin = Block(NARROW)
    checkpoint.place_packed(twin, table)
    twin.load_state_dict(packed.net.state_dict())
    layers.load_anchor_state(twin, layers.anchor_state(packed.net))
    layers.store_8bit(twin)
    assert all(torch.isfinite(v.float()).all() for v in twin.state_dict().values())


# ---------------------------------------------------------------- layers that stay in 16 bits


@pytest.mark.parametrize("flags", ["--hessian kron", "--hessian input", "--smooth 0", "--hessian-mb 6"])
def test_all_that_the_grid_costs_is_the_norm_of_the_whole_spectrum(flags):
    """Catches a gain of 16 bits in other units than the gains of ranks: without R, without the cost of the grid, not squared; and
    one that needs more of H than its diagonal, which is all that the ranks are given of it with --hessian-mb 6."""
    cfg = train.parse(f"--model sdxl --sampling-steps 1 --micro 1 --hessian-mb 4096 --rank-most 9999 {flags}".split())
    base, seen = denoiser(), 0
    cond = {"tokens": torch.randn(1, 77, base.net.text)}
    calibration = student.Calibration(cfg, base, student.layers_to_quantize(cfg, base), cond, torch.randn(1, 4, 8, 8))
    for layer in calibration.for_ranks():
        sigma_r = student.spectrum(layer, cfg)
        assert len(sigma_r) == min(layer.shape)
        assert student.whole(layer, cfg) == pytest.approx(float(sigma_r.norm()), rel=1e-6)
        seen += 1
    assert seen == LAYERS


def test_ranks_and_16_bits_share_one_budget_of_stored_bits(monkeypatch):
    """Catches a price of 16-bit factors where they are stored in 8, and 16 bits on offer where they were not asked for."""
    asked = []

    def allocate(shapes, statistics, *args, price, **kwargs):
        asked.append(price)
        assert all(("whole" in known) == isinstance(price, functools.partial) for known in statistics.values())
        return original(shapes, statistics, *args, price=price, **kwargs)

    original = qra.allocate
    monkeypatch.setattr(qra, "allocate", allocate)
    for flags in ("", "--keep-16bit", "--keep-16bit --lora-bits 16 --group-w 32"):
        build(f"{FULL} {flags}")
    parameters, bits, bits_16 = asked
    assert parameters is qra.parameters
    assert bits((64, 64), 3) == 3 * (8 * 128 + 64) and bits_16((64, 64), 3) == 3 * 16 * 128
    assert bits((64, 64), None) == (16 - 4 - 4 / 64) * 64**2 - 8 * 64
    assert bits_16((64, 64), None) == (16 - 4 - 4 / 32) * 64**2 - 8 * 64


@pytest.fixture(scope="module")
def mixed():
    """Every fifth layer stays in 16 bits, every third has no branch."""
    ranks = [None if i % 5 == 0 else 0 if i % 3 == 0 else 3 for i in range(LAYERS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qra, "allocate", lambda shapes, *args, **kwargs: dict(zip(shapes, ranks, strict=True)))
        return build("--ranks uniform --rank 2")


def test_a_layer_that_stays_in_16_bits_is_the_float_layer(mixed):
    """Catches one that is packed all the same, that is missing in the table, or that cannot be placed again."""
    packed, table = mixed
    kept = [name for name, row in table.items() if row["kind"] == "16bit"]
    floats, before = float_layers(packed.net), float_layers(Block(NARROW))
    assert len(table) == LAYERS and kept == list(table)[::5] and set(floats) == {"conv_in", "conv_out", *kept}
    assert all(torch.equal(floats[name].weight, before[name].weight) for name in kept)
    assert all(table[name]["shape"] == tuple(before[name].weight.flatten(1).shape) and table[name]["rank"] == 0 for name in kept)
    twin = Block(NARROW)
    checkpoint.place_packed(twin, table)
    twin.load_state_dict(packed.net.state_dict())
    layers.load_anchor_state(twin, layers.anchor_state(packed.net))
    assert set(float_layers(twin)) == set(floats)


@torch.no_grad()
def test_shares_of_the_closing_lines_are_those_of_torch_and_of_the_table(mixed):
    """Catches 4-bit weights with 16-bit activations counted as W4A4, rows of a convolution before its stride, branches that are not
    counted or counted twice, and hooks that stay."""
    packed, table = mixed
    x, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 77, packed.net.text)
    plain = Block(NARROW)
    with FlopCounterMode(display=False) as counter:
        plain(x, tokens)
    exact = {name: sum(counter.flop_counts[f"Block.{name}"].values()) // 2 for name in float_layers(plain)}
    with evaluate.watched(packed.net) as (rows, _):
        packed.net(x, tokens)
    assert not any(module._forward_hooks for module in packed.net.modules())
    found = checkpoint.composition(packed, rows)
    kinds = {"conv_in": "16bit", "conv_out": "16bit"} | {name: row["kind"] for name, row in table.items()}
    assert set(kinds.values()) == {"16bit", "w4a16", "w4a4"}
    in_4_bits = [name for name, kind in kinds.items() if kind == "w4a4"]
    branches = {name: row["rank"] * sum(row["shape"]) for name, row in table.items()}
    products = sum(exact.values()) + sum(rows[name] * size for name, size in branches.items())
    weights = {name: layer.weight.numel() for name, layer in float_layers(plain).items()}
    parameters = sum(p.numel() for p in plain.parameters())
    packed_rows = [row for row in table.values() if row["kind"] != "16bit"]
    assert all(rows[name] * weights[name] == exact[name] for name in weights)
    assert found == {
        "w4a4_products": pytest.approx(sum(exact[name] for name in in_4_bits) / products),
        "w4a4_parameters": pytest.approx(sum(weights[name] for name in in_4_bits) / parameters),
        "branch_parameters": pytest.approx(sum(branches.values()) / parameters),
        "layers_without_branch": pytest.approx(sum(row["rank"] == 0 for row in packed_rows) / len(packed_rows)),
    }


@pytest.mark.slow
def test_a_run_with_ranks_of_0_and_a_layer_in_16_bits_trains_packs_and_draws(tmp_path, monkeypatch, capsys):
    """Catches a layer without a branch, or one that stays in 16 bits, in the whole of a run: start, updates, 8-bit form, reloading,
    pictures, the closing lines and their memory."""
    original, kept = qra.allocate, "up_blocks.0.resnets.0.conv1"
    monkeypatch.setattr(qra, "allocate", lambda *args, **kwargs: original(*args, **kwargs) | {kept: None})
    flags = "--rank 2 --keep-16bit --init qera --rounding rtn --calibration 4 --steps 2 --batch 4 --eval-n 8 --lora-bits 8"
    train.main([*flags.split(), "--rollout", "0.5", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    loaded, about = checkpoint.load_checkpoint(tmp_path / "run")
    assert about["layers"][kept]["kind"] == "16bit" and isinstance(loaded.net.get_submodule(kept), nn.Conv2d)
    ranks = {f"net.{name}": row["rank"] for name, row in about["layers"].items()}
    assert 0 in {layer.rank for _, layer in layers.packed_layers(loaded)}
    assert all(layer.rank == ranks[name] for name, layer in layers.packed_layers(loaded))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert f"{report['w4a4_parameters']:.1%} of the parameters, {report['w4a4_products']:.1%} of the products" in said
    assert f"branches add {report['branch_parameters']:.2%} to the parameters" in said


# ---------------------------------------------------------------- full width


@pytest.fixture(scope="module")
def wide():
    """(network, table, passes over the calibration set, bytes by which resident memory grew at most, or None)"""
    base, calls = denoiser(SDXL), []
    forward = base.net.forward
    base.net.forward = lambda *args: calls.append(0) or forward(*args)
    if marks := Path("/proc/self/clear_refs").exists():  # elsewhere than on Linux: not measured
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = bench.resident("VmRSS")
    packed, table = build(f"--ranks uniform --rank 16 --hessian input --hessian-mb {BUDGET_MB}", base)
    return packed, table, len(calls), 1e6 * (bench.resident("VmHWM") - before) if marks else None


@pytest.mark.slow
def test_a_block_of_full_width_is_packed_in_slices(wide):
    """Catches sums that are all held at once."""
    packed, table, passes, _ = wide
    assert len(table) == LAYERS and {row["rank"] for row in table.values()} == {16}
    assert passes == 4  # of which one is for ranges; two would do without a budget
    assert max(row["error"] for row in table.values()) < 0.01
    assert distance(packed, SDXL) < 0.05


@pytest.mark.slow
def test_memory_stays_within_what_the_budget_and_one_layer_need(wide):
    """Catches factors of several layers of full width in memory at a time."""
    if wide[3] is None:
        pytest.skip("resident memory is read from Linux's /proc")
    widest = 8 * 5760**2  # a float64 matrix of it
    assert wide[3] < (BUDGET_MB << 20) / 4 + 4 * widest  # all H of a slice in float32; H, its factor, two copies
