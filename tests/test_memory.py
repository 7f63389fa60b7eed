"""Properties of the memory planner.

Oracles: a block of SDXL at its real width that is really packed and written to a file; resident memory of a process that runs a
real forward and backward; arithmetic on shapes written here.
"""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import miniature
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import quant
import train
from layers import anchor_state, packed_class, replace_layer, store_8bit
from models import checkpoint, memory, plan
from models.denoiser import float_layers
from models.family import FAMILIES
from run.common import UserError


@pytest.fixture(scope="module")
def tables():
    """Rows of SDXL and FLUX, with and without a branch."""
    return {
        (name, merged): memory.layer_table(FAMILIES[name], FAMILIES[name].build_meta(), rank=0 if merged else 16, **about_x)
        for name, about_x in (("sdxl", {"smooth": True}), ("flux", {"smooth": True, "centre": True}))
        for merged in (False, True)
    }


def pack_really(family, net: nn.Module, rank: int) -> None:
    """Every layer of `net` rounded to nearest, in place, with random factors; W4A4 layers smoothed and, if linear, centred."""
    generator = torch.Generator().manual_seed(0)
    for name, layer in float_layers(net).items():
        if (kind := family.precision(name)) != "16bit":
            w = layer.weight.detach().float()
            w_OK, taps = quant.flatten_conv(w[..., None, None] if w.dim() == 2 else w), w[0, 0].numel()
            r = min(rank, *w_OK.shape)
            A, B = torch.randn(r, w_OK.shape[1], generator=generator), torch.randn(len(w_OK), r, generator=generator)
            gw = quant.quantize_weight(w_OK, 64, taps, search=False)
            ones = torch.ones(layer.weight.shape[1])
            about_x = {"smooth_I": 2 * ones} if kind == "w4a4" else {}
            about_x |= {"shift_I": ones} if kind == "w4a4" and isinstance(layer, nn.Linear) else {}
            packed = packed_class(kind, layer).from_float(layer, gw, A / w_OK.shape[1] ** 0.5, 0.01 * B, **about_x)
            replace_layer(net, name, packed)


# ---------------------------------------------------------------- the packed network


def test_a_full_width_block_of_sdxl_has_in_memory_and_on_disk_the_bytes_of_its_table(tmp_path):
    """Catches: a tensor that the table forgets (scales, biases, norms), padding, factors that are not int8, a kind of layer."""
    block = FAMILIES["sdxl"].build_meta().down_blocks[1]  # 320 -> 640 channels, 60 M parameters: convolutions and attention
    rows = memory.layer_table(FAMILIES["sdxl"], block, rank=16, smooth=True, centre=True)
    torch.manual_seed(0)
    block.to_empty(device="cpu")
    for p in block.parameters():
        nn.init.normal_(p, std=0.02)
    pack_really(FAMILIES["sdxl"], block, 16)
    store_8bit(block)
    state = {
        key: checkpoint.stored(key, t) if key.endswith((".inv_smooth", ".shift")) else t for key, t in block.state_dict().items()
    }
    assert {row.kind for row in rows} == {"w4a4", "w4a16", "16bit"}  # 16bit: norms
    for row in rows[:-1]:
        mine = {key.rsplit(".", 1)[1]: t.nbytes for key, t in state.items() if key.startswith(row.name + ".")}
        scales = sum(mine.pop(key, 0) for key in ("mult_P", "scale_O", "inv_smooth", "shift"))
        assert mine.pop("codes_OP") == row.codes and scales == row.scales, row.name
        assert sum(mine.pop(key) for key in ("lora_A", "lora_B", "lora_scale")) == row.lora > 0 and row.rank == 16, row.name
        assert sum(mine.values()) == row.other, row.name
    total = sum(row.bytes for row in rows)
    assert total == sum(t.nbytes for t in state.values())
    save_file({key: t.contiguous() for key, t in state.items()}, tmp_path / "block.safetensors")
    with open(tmp_path / "block.safetensors", "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    assert (tmp_path / "block.safetensors").stat().st_size == 8 + header + total


def test_sdxl_and_flux_have_the_parameters_of_their_cards(tables):
    """Catches: a layer that is counted twice or not at all, a config that is not the public one."""
    for name, billions, linears, convs in (("sdxl", 2.5674637, 743, 51), ("flux", 11.9014083, 504, 0)):
        rows = tables[name, False]
        assert sum(row.bf16 for row in rows) / 2e9 == pytest.approx(billions, abs=1e-7)
        assert sum(len(row.shape) == 2 for row in rows) == linears and sum(len(row.shape) == 4 for row in rows) == convs


def test_sdxl_and_merged_networks_stay_within_their_share_of_bf16(tables):
    """Catches: factors in 16 bits (27.6%), float scales in a file, a larger share of 16-bit layers."""
    assert memory.ratio(tables["sdxl", False]) <= 0.270
    assert memory.ratio(tables["sdxl", True]) <= 0.258 and memory.ratio(tables["flux", True]) <= 0.258
    assert memory.ratio(memory.layer_table(FAMILIES["sdxl"], FAMILIES["sdxl"].build_meta(), lora_bits=16)) > 0.275


def test_flux_stays_within_its_share_of_bf16(tables):
    """Catches: factors in 16 bits (26.4%), float scales, smoothing in 32 bits (26.1%), a text projection of 16 bits."""
    assert memory.ratio(tables["flux", False]) <= 0.2603


def test_the_printed_table_names_every_kind_and_counts_every_layer(tables):
    """Catches: a total that is not the sum of its parts."""
    text = memory.format_table(tables["flux", False])
    assert all(kind in text for kind in ("w4a4", "w4a16", "16bit", "11.901 B parameters"))
    counts = [int(line.split()[0]) for line in text.splitlines() if line[:5].strip().isdigit()]
    assert sum(counts) == 505  # 504 layers and the rest


@pytest.mark.slow
def test_a_dry_run_ends_with_the_ratio(capsys):
    """Catches: a last line that a script cannot read, or that is another table's."""
    plan.dry_run(train.parse("--model tiny-flux --lora-bits 8 --micro 1 --batch 1 --rank 16 --keep-16bit".split()))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny-flux, rank 16 (layers that the run leaves in 16 bits are paid with ranks), groups of 64"
    rows = memory.layer_table(FAMILIES["tiny-flux"], FAMILIES["tiny-flux"].build_meta(), smooth=True, centre=True)
    assert lines[-1] == f"memory_ratio: {memory.ratio(rows):.3f}"
    assert any(line.startswith("merged, without a branch") for line in lines)


# ---------------------------------------------------------------- training

MEASURE = """
import re, sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import test_memory
from models import memory
from models.family import FAMILIES
name, batch, checkpointing = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
def field(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.manual_seed(0)
net = FAMILIES[name].build()
test_memory.pack_really(FAMILIES[name], net, 16)
for key, p in net.named_parameters():
    p.requires_grad_("lora_" in key)
    p.grad = torch.zeros_like(p) if p.requires_grad else None
net.train()
if checkpointing:
    net.enable_gradient_checkpointing()
def given(n):
    return memory.example_inputs(net, FAMILIES[name].latent, FAMILIES[name].tokens, n, torch.float32)
def run(given):
    net(**given, return_dict=False)[0].square().mean().backward()
run(given(2))
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again
many, before = given(batch), field("VmRSS")
run(many)
print(field("VmHWM") - before)
print(max(memory.step(net, many, True)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.slow
@pytest.mark.parametrize("name,batch,checkpointing", [("tiny", 12, False), ("tiny-flux", 24, True)])
def test_planned_activations_are_within_15_percent_of_resident_memory(name, batch, checkpointing):
    """Catches: storages that the simulation forgets or never frees, a batch that is extrapolated wrongly, checkpointing ignored."""
    root = Path(memory.__file__).parents[1]
    large_blocks_go_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    code = MEASURE.format(root=str(root), tests=str(root / "tests"))
    command = [sys.executable, "-c", code, name, str(batch), str(checkpointing)]
    out = subprocess.run(command, env=os.environ | large_blocks_go_back, capture_output=True, text=True, check=True).stdout
    resident, tracked = map(int, out.split())
    fp = memory.Footprint(
        lambda: float_network(name), FAMILIES[name].latent, FAMILIES[name].tokens, 16, cm_rank=0, dtype=torch.float32,
        smooth=True, centre=True,
    )  # fmt: skip
    planned = fp.activations("checkpointed" if checkpointing else "trained", batch)
    assert planned == pytest.approx(resident, rel=0.15), tracked
    assert planned == pytest.approx(tracked, rel=0.001)  # real tensors, the same operations


def float_network(name: str) -> nn.Module:
    with torch.device("meta"):
        return FAMILIES[name].build()


@pytest.fixture(scope="module")
def footprint():
    """Of tiny-flux, with activations that are given instead of simulated: bytes in all and for each sample."""
    fp = memory.Footprint(
        lambda: FAMILIES["tiny-flux"].build_meta(),
        FAMILIES["tiny-flux"].latent,
        FAMILIES["tiny-flux"].tokens,
        16,
        smooth=True,
        centre=True,
    )
    given = {"teacher": (0, 580_000), "trained": (1_150_000, 5_200_000), "checkpointed": (1_100_000, 1_600_000)}
    fp.curves = {what: (torch.tensor([0, fixed]), torch.tensor([0, each])) for what, (fixed, each) in given.items()}
    return fp


@pytest.mark.slow
def test_layers_that_are_simulated_once_leave_the_peaks_as_they_are():
    """Catches layers that are taken for alike and are not: another shape, geometry, rank or gradient."""
    with torch.device("meta"):
        unet = miniature.sd15_unet(("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",), (32,))
    once, each = (memory.Footprint(lambda: copy.deepcopy(unet), (4, 8, 8), 77) for _ in range(2))
    each.seen = None
    assert [once.activations("checkpointed", n) for n in (1, 7)] == [each.activations("checkpointed", n) for n in (1, 7)]
    assert len(once.seen) < 3 * len(once.layers)  # 4: a forward and a backward, of two samples and of three


@pytest.mark.slow
def test_what_stays_is_the_size_of_the_real_student_and_teacher(footprint):
    """Catches: Adam's moments or the anchor forgotten, the teacher's LoRA left in float32, a student in deployed form."""
    net = FAMILIES["tiny-flux"].build().to(torch.bfloat16)
    teacher = sum(p.nbytes for p in net.parameters())
    layers = float_layers(net).values()
    cm = sum(2 * min(64, *layer.weight.shape) * sum(layer.weight.shape) for layer in layers)
    pack_really(FAMILIES["tiny-flux"], net, 16)
    params = [p.requires_grad_() for key, p in net.named_parameters() if "lora_" in key]
    optimizer = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    anchor = sum(t.nbytes for t in anchor_state(net).values())
    held = sum(t.nbytes for t in net.state_dict().values()) + anchor + moments + sum(p.grad.nbytes for p in params)
    planned = plan.plan(footprint, 8, 4, checkpointing=False)
    inside = {k: v for k, v in planned.parts.items() if k not in ("inputs and states", "activations", "teacher and its LoRA")}
    assert sum(inside.values()) == held and planned.parts["teacher and its LoRA"] == teacher + cm == footprint.network
    assert planned.peak == sum(planned.parts.values()) and planned.moment == "train"


@pytest.mark.slow
def test_every_measure_that_saves_memory_does(footprint):
    """Catches: arguments that are ignored or swapped."""
    footprint = copy.copy(footprint)
    footprint.curves = {}  # simulated ones

    def peak(*args, **kwargs):
        return plan.plan(footprint, 64, *args, **kwargs).peak

    assert peak(16, True) < peak(16, False) and peak(8, False) < peak(16, False)
    assert peak(16, False, "offloaded", world=2) < peak(16, False, "sharded", world=2) < peak(16, False, "resident", world=2)
    assert peak(16, False, world=2) < peak(16, False)  # half of the batch's inputs
    assert plan.plan(footprint, 64, 1, True, "offloaded").moment == "teach"
    sharded = [plan.plan(footprint, 64, 16, False, "sharded", world).parts["teacher and its LoRA"] for world in (2, 4)]
    assert sharded == [-(-footprint.network // 2), -(-footprint.network // 4)]


def test_choose_gives_the_fastest_way_that_fits_and_says_what_is_missing(footprint):
    """Catches: a plan above its limit, a smaller micro-batch than fits, checkpointing or offload where there is room."""
    roomy = plan.choose(10**12, footprint, 48)
    assert (roomy.micro_batch, roomy.checkpointing, roomy.teacher) == (16, False, "resident")  # 32 does not divide 48
    limit = plan.plan(footprint, 48, 4, False).peak
    fits = plan.choose(limit, footprint, 48)
    assert (fits.micro_batch, fits.checkpointing, fits.teacher, fits.peak) == (4, False, "resident", limit)
    below = plan.plan(footprint, 48, 1, False).peak - 1
    tight = plan.choose(below, footprint, 48)
    assert tight.checkpointing and tight.teacher == "resident" and tight.peak <= below
    tighter = plan.choose(plan.plan(footprint, 48, 1, True).peak - 1, footprint, 48)
    assert tighter.teacher == "offloaded" and not tighter.checkpointing
    assert plan.choose(10**12, footprint, 48, world=2, teacher="sharded").teacher == "sharded"
    with pytest.raises(
        UserError, match=r"needs 0\.0\d GB \(micro-batch 1 with gradient checkpointing, teacher offloaded, reached in `teach`\)"
    ) as error:
        plan.choose(10**6, footprint, 48)
    assert "limit is 0.00 GB" in str(error.value) and "--rank" in str(error.value) and str(error.value).count("\n") == 0
    with pytest.raises(UserError, match=r"`start`\).*: use a GPU with more memory, --device cpu,"):
        plan.choose(10**6, footprint, 48, statistics=[10**9])


def test_the_start_is_planned_with_what_statistics_may_hold(footprint):
    """Catches: statistics forgotten (24 GB on SDXL where 8 were planned), too few for the widest layer, an unused limit."""
    some = 2 * max(footprint.sums) - 2  # not room for all layers at once
    alone, roomy = plan.plan(footprint, 48, 1, True), plan.plan(footprint, 48, 1, True, statistics=some)
    assert alone.moment != "start" and roomy.moment == "start" and roomy.parts["statistics and factors"] == some
    flags = "--model tiny-flux --hessian-mb 0 --batch 48 --memory-limit".split()
    cfg, chosen = plan.choices(train.parse([*flags, "100MB"]), footprint)
    rest = sum(plan.start_of(footprint, chosen.micro_batch, chosen.checkpointing).values())
    assert chosen.peak == 10**8 and chosen.statistics == 10**8 - rest < footprint.most
    assert (cfg.micro, cfg.hessian_mb) == (chosen.micro_batch, chosen.statistics >> 20)
    assert plan.choices(train.parse([*flags, "10GB"]), footprint)[1].statistics == footprint.most  # all of them at once
    all_H, all_G = footprint.sums
    assert max(all_H, all_H // 2 + all_G) <= footprint.held(footprint.most) < footprint.most  # which halves for each would come to
    room = footprint.held(footprint.most)
    assert (footprint.budget(room), footprint.budget(room - 1)) == (footprint.most, room - 1)
    assert footprint.most % (1 << 20) == 0  # a budget in MiB can say it: one layer that does not fit costs all passes again
    net = FAMILIES["tiny-flux"].build_meta()
    sides = {
        max(w.weight.shape[0], w.weight[0].numel())
        for n, w in float_layers(net).items()
        if FAMILIES["tiny-flux"].precision(n) != "16bit"
    }
    assert footprint.least == 16 * max(sides) ** 2  # H or G of the widest
    roomy = plan.plan(footprint, 48, 1, True, statistics=10**9)
    small, cpu, large, both = (plan.main_memory(footprint, roomy, n, on_cpu) for n in (10**6, 10**9) for on_cpu in (False, True))
    assert small == footprint.packed + 2 * footprint.factors and large == small + 10**9
    rest = small + sum(plan.start_of(footprint, 1, True).values())
    assert (cpu, both) == (rest + max(footprint.held(10**9), 10**9 // 4 + 10**6), rest + 10**9 // 4 + 10**9)


def test_a_hessian_waits_in_main_memory_only_where_it_must(footprint):
    """Catches: a micro-batch that takes the room of statistics, main memory that is planned without the sum that waits there."""
    fp = copy.copy(footprint)
    fp.least, fp.widest, fp.roomy = 10**6, 4096, 16 * 4096**2
    fp.layers, fp.sums = [*fp.layers, *3 * [(64, fp.widest)]], (fp.sums[0] + 3 * 8 * fp.widest**2, fp.sums[1])
    fp.most = 2 * max(fp.sums)
    rest = sum(plan.start_of(fp, 1, True).values())
    cfg = train.parse("--model tiny-flux --hessian-mb 0 --batch 48".split())
    for limit, held in ((rest + fp.roomy, 0), (rest + fp.roomy - 1, 4 * fp.widest**2)):
        limited = dataclasses.replace(cfg, memory_limit=str(limit))
        chosen = plan.choices(limited, fp)[1]
        assert chosen.peak <= limit and fp.in_main_memory(chosen.statistics) == held
        if held:
            assert chosen.micro_batch > 1, "what is not needed for the widest layer is there for pictures"
        assert plan.main_memory(fp, chosen, 10**9, False) == fp.packed + 2 * fp.factors + 10**9 + held


def test_amounts_of_memory_are_decimal_unless_they_say_otherwise():
    """Catches: 24GB read as 24 GiB, a unit that is ignored."""
    cases = {"24GB": 24e9, "24 gb": 24e9, "24G": 24e9, "24GiB": 24 * 2**30, "1.5TB": 1.5e12, "800MB": 8e8, "4096": 4096}
    assert {text: plan.parse_bytes(text) for text in cases} == cases
    for bad in ("", "much", "-1GB", "24 apples", "GB", "1e3GB"):
        with pytest.raises(UserError, match="write it as 24GB"):
            plan.parse_bytes(bad)


class Views(nn.Module):
    """As a network looks at what it is given: by a view, from which it makes something new."""

    def forward(self, x, return_dict):
        return (x.view(10, 100) + 1,)


def test_inputs_are_no_activations():
    """Catches what is given counted twice, as inputs of the batch and as activations."""
    assert max(memory.step(Views(), {"x": torch.zeros(1000)}, False)) == 4000


def test_live_follows_storages_not_tensors():
    """Catches: views and in-place results counted again, freed memory that stays, parameters that count."""
    layer = nn.Linear(256, 256)
    with memory.AliveStorages(memory.tensors_of(layer)) as live, torch.no_grad():
        a = torch.zeros(1000)
        b = a.view(10, 100)[1:]
        a.add_(1)
        assert live.now == 4000
        weight = layer.weight.t()
        assert live.now == 4000
        c = a + 1
        del a
        assert live.now == 8000, "b still holds the storage of a"
        del b, weight
        assert live.now == 4000
        del c
    assert live.now == 0 and max(live.curve) == 8000
