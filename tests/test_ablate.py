"""benchmarks/ablate.py: every row is a command that train.py takes, variants do what they say, differences are paired."""

import contextlib
import dataclasses
import math
import re
import shlex

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import QUICK, random_weights
from torch import nn
from torch.nn import functional as F

import evaluate
import hessian
import hgs_lora
import kernels
import layers
import quant
import sample
import scores
import student
import tdpt
import train
from backends import attention, gptq_gpu
from benchmarks import ablate, variants
from models import checkpoint
from models.denoiser import FAST, add_lora, as_cm, as_teacher, draw, float_layers, random_denoiser, start_noise
from models.family import FAMILIES
from models.pretrained import load_embedded_cm
from run import files
from run.common import UserError


@contextlib.contextmanager
def variant(name: str):
    """Inside, the code is patched as by @name."""
    places = (quant, kernels, student, train, checkpoint, gptq_gpu, attention, quant.GridWeight, layers.PackedLayer)
    before, families = [dict(vars(place)) for place in places], dict(FAMILIES)
    try:
        ablate.VARIANTS[name]()
        yield
    finally:
        FAMILIES.update(families)
        for place, attributes in zip(places, before, strict=True):
            for key, value in attributes.items():
                if vars(place)[key] is not value:
                    setattr(place, key, value)


@pytest.mark.parametrize("name", ablate.GROUPS)
def test_every_row_is_a_command_of_its_own(name):
    """Catches a flag that train.py refuses, an unknown variant, and two rows that are one."""
    group, configurations = ablate.GROUPS[name], set()
    for model in ("tiny", "tiny-flux"):
        for flags in group.rows.values():
            for testbed in group.testbeds:
                key = ablate.key_of(model, testbed, flags, group.updates[0], 0).split()
                names = {flag for flag in key if flag.startswith("@")}
                assert names <= ablate.VARIANTS.keys()
                cfg = train.parse([flag for flag in key if flag not in names])
                train.validate(cfg)
                configurations.add((*dataclasses.astuple(cfg), *names))
    assert len(configurations) == 2 * len(group.rows) * len(group.testbeds)


@given(st.integers(0, 2**31), st.sampled_from([8, 16]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_multipliers_of_the_variant_are_powers_of_two_and_nothing_is_clipped(seed, group, per_sample):
    """Catches a multiplier below the exact one, whose group would be clipped, and codes that were rounded with another step."""
    x = torch.randn(2, 3, 4, 24, generator=torch.Generator().manual_seed(seed))
    with variant("@powers"):
        codes, m_G, scale = quant.quantize_activation(x, group, per_sample)
    assert set(m_G.unique().tolist()) <= {1, 2, 4, 8, 16}
    step_G = m_G * scale.reshape(scale.shape + (1,) * (m_G.dim() - scale.dim()))
    error = (quant.dequantize_activation(codes, m_G, scale, 24) - x).abs()
    assert (error <= step_G.repeat_interleave(group, -1)[..., :24] * 0.5001).all()


def packed_and_reloaded(kind: str) -> tuple[layers.PackedLayer, layers.PackedLayer, nn.Module]:
    """A smoothed layer with a branch, rotated where activations are rounded; what a checkpoint makes of it; the float layer."""
    gen = torch.Generator().manual_seed(0)
    plain = nn.Conv2d(48, 8, 3, padding=1, stride=2) if kind == "conv" else nn.Linear(96, 8)
    for p in plain.parameters():
        p.data = torch.randn(p.shape, generator=gen) * torch.linspace(0.1, 1, p.shape[-1])
    smooth_I = torch.exp2(torch.randint(-2, 3, (plain.weight.shape[1],), generator=gen).float())
    about = dict(smooth_I=smooth_I, group_x=8, rotated=kind != "w4a16")
    layer = student.Layer("", plain, "w4a16" if kind == "w4a16" else "w4a4", 0, 8, about["rotated"], smooth_I)
    w_OK, taps = layer.weight("cpu").detach(), layer.taps
    rows = torch.randn(512, w_OK.shape[1], generator=gen)
    gw, A_rK, B_Or = hgs_lora.decompose(w_OK, rows.mT @ rows / 512, 2, "qera", 64, taps, generator=gen)
    packed = layers.packed_class(layer.kind, plain).from_float(plain, gw, A_rK, B_Or, **about)
    again = layers.packed_class(layer.kind, plain)(plain, 2, 64, 8, True, rotated=about["rotated"])
    state = {k: checkpoint.stored(f"layer.{k}", v) for k, v in packed.state_dict().items()}
    again.load_state_dict(state | {"scale_O": kernels.unpack_scales(state["scale_O"])})
    return packed, again, plain


def exact_answer(packed: layers.PackedLayer, plain: nn.Module, kind: str, x: torch.Tensor) -> torch.Tensor:
    """W^ z^ + B A x' + bias in float64, z^ the activations as they are rounded now."""
    x1 = (x.movedim(1, -1) if kind == "conv" else x) * packed.inv_smooth
    z = quant.rotate(x1) if packed.rotated else x1
    if kind != "w4a16":
        z = quant.dequantize_activation(*quant.quantize_activation(z, packed.group_x, kind == "conv"), z.shape[-1])

    def times(v: torch.Tensor, w_OK: torch.Tensor) -> torch.Tensor:
        if kind != "conv":
            return v.double() @ w_OK.double().mT
        w_OIhw = quant.unflatten_conv(w_OK, (3, 3)).double()
        return F.conv2d(v.double().movedim(-1, 1), w_OIhw, stride=2, padding=1).movedim(1, -1)

    y = times(z, kernels.dequantize(packed.packed)) + times(x1, packed.lora_B @ packed.lora_A) + plain.bias
    return (y.movedim(-1, 1) if kind == "conv" else y).detach()


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", ["linear", "conv", "w4a16"])
@pytest.mark.parametrize("name", ["@a16", "@w8", "@float-scales", "@row-scales"])
def test_layers_of_a_variant_answer_as_their_format_says_in_training_and_after_a_checkpoint_too(name, kind):
    """Catches a format that holds in one of them alone, codes that a file cuts off, padding and taps in the wrong place."""
    with variant(name):
        packed, again, plain = packed_and_reloaded(kind)
        x = torch.randn((2, 48, 6, 6) if kind == "conv" else (2, 5, 96), generator=torch.Generator().manual_seed(1))
        drawn, trained, loaded = packed(x).detach(), packed(x.clone().requires_grad_()).detach(), again(x).detach()
        exact = exact_answer(packed, plain, kind, x)
    assert torch.equal(drawn, trained)
    assert relative(loaded, drawn) < 0.01  # branch and bias have bfloat16 in a file
    assert all(torch.equal(getattr(packed, key), getattr(again, key)) for key in ("codes_OP", "mult_P", "scale_O"))
    assert relative(drawn, exact) < 1e-5


@torch.no_grad()
def test_activations_that_are_not_rounded_have_no_noise_and_take_no_part_in_the_choice_of_smoothing():
    """Catches statistics that still see 4 bits."""
    gen = torch.Generator().manual_seed(0)
    rows_TI, linear = torch.randn(32, 24, generator=gen), nn.Linear(24, 8)
    linear.weight.data = torch.randn(8, 24, generator=gen)
    assert hessian.rounding_noise(rows_TI.view(2, 4, 4, 24), 8).min() > 0
    lost_OK = linear.weight - quant.dequantize(quant.quantize_weight(linear.weight))
    with variant("@a16"):
        assert hessian.rounding_noise(rows_TI.view(2, 4, 4, 24), 8).max() == 0
        lost = student.loss_on_grid([student.Layer("", linear, "w4a4", 0, 8)], rows_TI, train.parse([]))
    of_weights = (rows_TI @ lost_OK.mT).square().sum() / (rows_TI @ linear.weight.mT).square().sum()
    assert lost == pytest.approx(of_weights.item(), rel=1e-4)


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_weights_in_8_bits_use_all_codes_and_one_step_a_row(rounding):
    """Catches codes of 4 bits, a step that is too coarse or clips, and multipliers that are left."""
    w_OK = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1], [2], [5]])
    with variant("@w8"):
        gw = quant.quantize_weight(w_OK, H_KK=torch.eye(128), rounding=rounding)
        back = quant.dequantize(gw)
    assert (gw.mult_OG == 1).all() and gw.codes_OK.abs().amax(1).min() >= 113  # scales are rounded up by up to an eighth
    assert ((w_OK - back).abs() <= 0.5001 * gw.scale_O[:, None]).all()
    assert (gw.scale_O <= 1.126 * w_OK.abs().amax(1) / 127).all()


def test_a_group_of_float_scales_follows_its_weights_and_ours_does_not():
    """Catches multipliers that are rounded to whole numbers, and a step that is not the best of sixteen shares."""
    w_Og = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    w_OK = torch.cat([w_Og, w_Og / 64], 1)
    ours = quant.dequantize(quant.quantize_weight(w_OK))
    with variant("@float-scales"):
        gw = quant.quantize_weight(w_OK)
        floats = quant.dequantize(gw)
    assert torch.equal(64 * floats[:, 64:], floats[:, :64]) and relative(64 * ours[:, 64:], ours[:, :64]) > 0.1
    bound_O = quant.step_bound(w_Og[:, None])[:, 0]
    tries = torch.stack([bound_O * k / 16 for k in range(1, 17)])[..., None]
    errors = ((w_Og / tries).round().clamp(-8, 7) * tries - w_Og).square().sum(-1)
    torch.testing.assert_close((floats - w_OK)[:, :64].square().sum(1), errors.amin(0), rtol=1e-2, atol=0)
    torch.testing.assert_close(gw.mult_OG[:, 0].float() * gw.scale_O, tries[errors.argmin(0), range(64), 0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_one_scale_a_row_is_one_multiplier_and_the_best_one(rounding):
    """Catches GPTQ that chooses again for each group, and a search in one group alone."""
    gen = torch.Generator().manual_seed(0)
    w_OK, rows = torch.randn(16, 192, generator=gen) * torch.linspace(0.2, 2, 192), torch.randn(400, 192, generator=gen)
    H_KK = rows.mT @ rows / 400
    assert quant.quantize_weight(w_OK, H_KK=H_KK, rounding=rounding).mult_OG.unique(dim=1).shape[1] == 3
    with variant("@row-scales"):
        gw = quant.quantize_weight(w_OK, H_KK=H_KK, rounding=rounding)
    tries = torch.stack([m * gw.scale_O for m in range(1, 17)])[..., None]
    e = (w_OK / tries).round().clamp(-8, 7) * tries - w_OK
    best_O = (e.square() * H_KK.diagonal()).sum(-1).argmin(0) + 1
    assert torch.equal(gw.mult_OG, best_O.to(torch.uint8)[:, None].expand(-1, 3))


@pytest.mark.parametrize("model,modulation,other", [
    ("tiny", r"time_emb_proj$", "conv_in"), ("tiny-flux", r"norm\w*\.linear$", "context_embedder"),
])  # fmt: skip
def test_modulations_change_their_kind_and_nothing_else_does(model, modulation, other):
    """Catches a text projection that is taken for a modulation, one that is forgotten, and 8-bit weights that are not rounded."""
    base = random_denoiser(model)
    before = {k: layer.weight.detach().clone() for k, layer in float_layers(base.net).items()}
    rule = FAMILIES[model].precision
    chosen = {name for name in before if re.search(modulation, name)}
    assert {rule(name) for name in chosen} == {"w4a16"} and rule(other) != "w4a4"
    for name, kind in (("@modulations-w4a4", "w4a4"), ("@modulations-16bit", "16bit"), ("@modulations-w8a16", "w8a16")):
        with variant(name), torch.no_grad():
            base.family = FAMILIES[model]
            kinds = {layer: base.family.precision(layer) for layer in before}
            assert kinds == {layer: kind if layer in chosen else rule(layer) for layer in before}
            packed = {layer.name for layer in student.layers_to_quantize(train.parse(["--model", model]), base)}
        assert packed == {layer for layer, found in kinds.items() if found in ("w4a4", "w4a16")}
    for layer, module in float_layers(base.net).items():
        w_OK, moved = before[layer], (module.weight - before[layer]).abs()
        assert (moved > 0).any() == (layer in chosen)
        assert (moved <= 0.5001 * w_OK.abs().flatten(1).amax(1).view(-1, *[1] * (w_OK.dim() - 1)) / 127).all()
        assert layer not in chosen or max(len(row.unique()) for row in module.weight) <= 255


def test_the_student_of_the_teacher_itself_starts_as_the_teacher(tmp_path):
    """Catches the consistency model's LoRA in what is quantized, and a student that is told what the teacher never learned."""
    network = random_denoiser("tiny-flux")
    add_lora(network, 2)
    for name, p in network.net.named_parameters():
        p.data = torch.randn_like(p) * 0.1 if "lora_B" in name else p.data
    x, t, cond = start_noise(2, network.latent, 0), torch.full((2,), 0.7), network.encode(["a red ring", "a blue square"])
    with torch.no_grad(), variant("@from-teacher"):
        wanted, cm = as_teacher(network)(x, t, t / 2, cond), as_cm(network)(x, t, t / 2, cond)
        base = train.fuse(network)
        assert torch.equal(base(x, t, t / 2, cond), wanted) and not torch.equal(cm, wanted)
        tensors = {k: v.clone() for k, v in base.state_dict().items()}
        loaded = checkpoint._packed_model("tiny-flux", {}, tensors, tmp_path)
        torch.testing.assert_close(loaded(x, t, t / 2, cond), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name,flags", [
    ("@w8", "--bits-x 8"), ("@modulations-w8a16", ""), ("@attention-8bit", ""),
    ("@from-teacher", "--trajectory teacher --cached 4 --targets teacher,teacher --sampling-steps 4 --rollout 0.5"),
])  # fmt: skip
def test_a_run_of_a_variant_trains_and_draws(name, flags, tmp_path, monkeypatch):
    """Catches a variant that start, training or checkpoint of a run cannot hold."""
    monkeypatch.setattr(evaluate, "closing_report", lambda *args: None)
    monkeypatch.setattr(sample, "closing_pictures", lambda *args: None)
    out = tmp_path / "run"
    with variant(name):
        train.main(f"{QUICK} {random_weights(tmp_path, 'tiny-flux')} --backend eager {flags} --out {out}".split())
        (loaded, _), (start, _) = checkpoint.load_checkpoint(out), checkpoint.load_start(out)
        pairs = list(zip(layers.packed_layers(loaded), layers.packed_layers(start), strict=True))
        assert all(torch.equal(layer.codes_OP, before.codes_OP) for (_, layer), (_, before) in pairs)
        in_a_group = kernels.weight_int8(pairs[0][0][1].packed)[0, :64].unique()
        assert (len(in_a_group) > 16) == (name == "@w8")
        assert loaded.knows_destination == (name != "@from-teacher")
        assert ("transformer_blocks.0.norm1.linear" in dict(layers.packed_layers(loaded.net))) == ("modulations" not in name)
        assert draw(loaded, loaded, ["a red ring", "a blue square"], 1).std() > 0


def test_runs_share_a_start_where_nothing_of_it_differs(tmp_path, monkeypatch):
    """Catches a start that is taken though a flag, variant, file of weights or line of code that it depends on has changed, and one
    that is made again for another objective."""
    made = []

    def initialise(cfg, out):
        made.append(out)
        files.write_tensors(out / "start.safetensors", {"x": torch.tensor([len(made)])}, {}, files.run_digest(out))

    def start_of(flags: str, *names: str) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(train, "initialise_student", initialise)
            ablate.share_starts(tmp_path / "starts", list(names))
            out, cfg = tmp_path / f"{len(made)} {flags} {names}".replace("/", "-"), train.parse(flags.split())
            files.open_run(out, train.stored(cfg), leader=True)
            train.initialise_student(cfg, out)
            return files.read_verified(out / "start.safetensors", "", files.run_digest(out))[0]["x"].item()

    assert start_of("") == 1
    same = ("--lr 1", "--steps 0", "--targets self,self --rollout 0", "--recipe paper", "--deploy merged", "--save-every 3")
    assert [start_of(flags) for flags in same] == [1] * len(same) and start_of("", "@qsched") == 1
    others = ("--rank 3", "--seed 1", "--calibration 5", "--micro 2", "--ranks uniform", "--init zero", "--bits-x 8", "--outliers")
    assert [start_of(flags) for flags in others] == list(range(2, 2 + len(others)))
    assert start_of("", "@w8") == len(others) + 2 and start_of("--rank 3") == 2
    (tmp_path / "cm.safetensors").write_bytes(b"one")
    one = start_of(f"--cm {tmp_path}/cm.safetensors")
    (tmp_path / "cm.safetensors").write_bytes(b"two and more")
    assert start_of(f"--cm {tmp_path}/cm.safetensors") == one + 1 == len(made)
    monkeypatch.setattr(ablate, "code", lambda: "an edit")
    assert start_of("") == len(made) == one + 2


def test_frozen_networks_are_asked_once_and_answer_the_same(tmp_path, monkeypatch):
    """Catches an answer to another question, or by the other role of the network, and one that is computed again."""
    for name in ("as_cm", "as_teacher"):
        monkeypatch.setattr(train, name, getattr(train, name))  # a cell changes these, in a process of its own
    network = load_embedded_cm("tiny-flux").to(FAST)
    gen, t = torch.Generator().manual_seed(0), torch.full((2,), 0.9)
    cond, empty = network.encode(["a red ring", "a blue square"]), network.encode(["", ""])
    x, y = torch.randn(2, 2, *network.latent, generator=gen)
    questions = [(x, t, 0 * t, cond), (x, t, 0 * t, empty), (x, t, t / 2, cond), (x, 1 - t, 0 * t, cond), (y, t, 0 * t, cond)]
    wanted = [role(network)(*asked) for role in (as_cm, as_teacher) for asked in questions]
    for _ in range(2):
        ablate.share_answers(tmp_path / "answers")
        given = [role(network)(*asked) for role in (train.as_cm, train.as_teacher) for asked in questions]
        assert all(map(torch.equal, given, wanted)) and len(wanted) == len(list((tmp_path / "answers").iterdir()))
        monkeypatch.setattr(network.net, "forward", None)  # the second time nothing is computed


def test_fitted_coefficients_undo_a_gain_and_are_those_of_each_step():
    """Catches coefficients of x and p in each other's place, and one pair for all steps."""
    path, gen = tdpt.FlowPath(), torch.Generator().manual_seed(0)
    edges, x = path.grid(4), torch.randn(64, 3, generator=gen)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=gen))[0]

    def fp(x, t, s, cond):
        return x @ turn * (1 + t[:, None])

    def ours(x, t, s, cond):  # less by a factor that depends on the step
        return fp(x, t, s, cond) * (0.7 + 0.2 * t[:, None])

    states = tdpt.rollout_states(fp, path, x, {}, edges)
    repaired = tdpt.rollout_states(variants.fitted(ours, path, states, {}, edges), path, x, {}, edges)
    torch.testing.assert_close(repaired, states, atol=1e-4, rtol=1e-4)
    assert (tdpt.rollout_states(ours, path, x, {}, edges)[-1] - states[-1]).abs().max() > 0.1


def test_intervals_are_of_paired_prompts_and_of_seeds():
    """Catches seeds that are taken for further prompts, and an interval that leaves out what a seed changes."""
    each_prompt = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, low, high = ablate.interval(each_prompt.expand(3, 500))
    half = 1.96 * each_prompt.std().item() / 500**0.5
    assert mean == pytest.approx(each_prompt.mean().item())
    assert (low, high) == (pytest.approx(mean - half, abs=0.15 * half), pytest.approx(mean + half, abs=0.15 * half))
    _, low, high = ablate.interval(each_prompt + torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64))
    s = 4.303 / 3**0.5  # Student's t for three seeds whose sd is 1
    assert high - mean == pytest.approx(math.hypot(half, s), rel=0.01) and mean - low == pytest.approx(high - mean)


@pytest.fixture
def add(tmp_path):
    """Adds a row to tmp_path's store."""

    def add(flags: str, seed: int, psnr: float, n: int = 8, model: str = "tiny") -> None:
        each = torch.full((n,), round(100 * psnr)).short() + torch.arange(n).short()
        about = {"x fp": 1 + psnr / 1000, "accuracy": 0.5, "psnr": psnr, "edge errors": [0.0], "n": n, "commit": ""}
        files.write_tensors(tmp_path / "scores.safetensors", {"psnr": each}, about)
        ablate.keep(tmp_path / "store", ablate.key_of(model, "", flags, 0, seed), tmp_path / "scores.safetensors")

    return add


def test_the_table_has_means_spreads_and_paired_differences(tmp_path, add):
    """Catches a store that forgets rows, and a difference to another seed's run."""
    group, store = ablate.Group({"first": "", "second": "--rank 4"}, updates=(0,), testbeds=("",), seeds=2), tmp_path / "store"
    for seed, psnr in enumerate((40.0, 41.0)):
        add("", seed, psnr)
    add("--rank 4", 0, 42.0)
    lines = ablate.table(group, store)
    assert "| first | `(none)` | 0 | 40.50 +- 0.71 (1.040 +- 0.001, 0.500 +- 0.000) |" in lines
    assert "| second | `--rank 4` | 0 | 42.00 (1.042, 0.500); +2.00 [+2.00, +2.00] |" in lines
    add("", 0, 30.0, model="tiny-flux")
    assert "|  | flags | updates | tiny | tiny-flux |" in ablate.table(group, store)
    with pytest.raises(UserError, match="has rows of 8 pictures: give --n 8, or another --store"):
        add("", 2, 40.0, n=9)


@pytest.fixture
def drawn_rows() -> dict[str, dict]:
    """Of a store: tiny's default before training, two seeds of TDPT after 40 updates, and what is not drawn."""
    paper, rows = ablate.GROUPS["components"].rows["TDPT + HGS + QRA"], {}
    for about, error in (
        (("tiny", "", "", 0, 0), 4.0), (("tiny", "", paper, 40, 0), 1.0), (("tiny", "", paper, 40, 1), 3.0),
        (("tiny", "--outliers", paper, 40, 0), 9.0), (("tiny", "", f"{paper} --split 1", 40, 0), 9.0),
        (("tiny", "", paper, 20, 0), 9.0),
    ):  # fmt: skip
        rows[ablate.key_of(*about)] = {"edge errors": [0.0, error, 2 * error], "n": 2}
    return rows


def test_the_plot_has_the_mean_error_of_the_seeds_at_each_edge(drawn_rows):
    """Catches rows of other flags, testbeds or updates, and errors that are summed over seeds or averaged over edges."""
    default = "TDPT and rollouts + HGS + QRA (default)"
    wanted = {(default, 0): [0.0, 4.0, 8.0], ("TDPT + HGS + QRA", 40): [0.0, 2.0, 4.0]}
    assert ablate.edge_errors(drawn_rows) == {"tiny": wanted}


def test_a_store_without_rows_to_draw_names_the_command_that_makes_them(drawn_rows, tmp_path):
    """Catches an empty figure, a traceback, and a command that this benchmark does not take."""
    others = {key: row for key, row in drawn_rows.items() if "--split 1" in key}
    for rows in ({}, others):
        with pytest.raises(UserError, match="the store has no rows to draw: make them with") as refused:
            ablate.edge_errors(rows)
    with pytest.raises(UserError, match="no rows to draw"):
        ablate.main(["plot", "--store", str(tmp_path / "none")])
    command = shlex.split(re.search("`(.*)`", str(refused.value))[1])
    assert command[:4] == ["python", "-m", "benchmarks.ablate", "components"]
    labels = command[command.index("--only") + 1 :]
    assert labels == list(ablate.DRAWN) and ablate.GROUPS["components"].rows.keys() >= {*labels}
    assert command[command.index("--updates") + 1 : command.index("--only")] == ["0", "40", "200"]


def test_the_figure_is_one_svg_and_always_the_same(drawn_rows, tmp_path):
    """Catches a date or random names in the file, by which it would differ each time, and a curve without a name."""
    files.write_tensors(tmp_path / "store", {"psnr": torch.zeros(2)}, {"rows": drawn_rows})
    for name in ("a.svg", "b.svg"):
        ablate.plot(tmp_path / "store", tmp_path / "plots" / name)
    first, second = ((tmp_path / "plots" / name).read_text() for name in ("a.svg", "b.svg"))
    assert first == second and first.count("<svg ") == 1
    assert "before training" in first and "TDPT, 40 updates" in first and "targets of the student itself" not in first


@pytest.mark.slow
def test_a_cell_is_trained_scored_and_kept_once(tmp_path, monkeypatch):
    """Catches a ratio upside down, pictures of other prompts, a cell that is made again, and one that fails and ends the others."""
    nearest = f"{ablate.NO_BRANCH} --rounding rtn"
    rows = {"bad": "--rank 0", "nearest": nearest, "the same start": f"{nearest} {ablate.PAPER}"}
    monkeypatch.setattr(ablate, "GROUPS", {"trial": ablate.Group(rows, updates=(0,), testbeds=("",), seeds=1)})
    monkeypatch.setattr(ablate, "write_table", lambda name, lines, show: written.append(lines))
    written, calls, built, build = [], [], [], train.student.build
    changed = ((train, "initialise_student"), (train, "as_cm"), (train, "as_teacher"))
    for place, attribute in (*changed, (train.sample, "closing_pictures"), (evaluate, "closing_report")):
        monkeypatch.setattr(place, attribute, getattr(place, attribute))  # a cell changes these, in a process of its own
    monkeypatch.setattr(train.student, "build", lambda *args: built.append(args) or build(*args))

    def each(function, items, jobs):
        def call(*command):
            calls.append(command)
            if "--rank-least" not in command and len(command) > 6:
                raise SystemExit("failed")
            ablate.main(list(command[2:]))

        return [function(item, call) for item in items]

    monkeypatch.setattr(ablate, "each", each)
    monkeypatch.setattr(ablate, "STORE", tmp_path / "store")
    command = f"trial --models tiny-flux --n 6 --out {tmp_path}/runs --store {tmp_path}/store".split()
    ablate.main(command)
    assert len(calls) == 4  # fp, and three rows
    ablate.main(command)
    assert len(calls) == 5 and len(built) == 1  # the one that failed, again; no start twice
    row, same = ablate.read_store(tmp_path / "store")[1].values()
    assert row == same
    judge, network = evaluate.Judge(6, ablate.SEED), load_embedded_cm("tiny-flux").to(FAST)
    folder, other = sorted(path.parent for path in (tmp_path / "runs").rglob("model.safetensors"))
    assert not [*folder.glob("st*"), *other.glob("st*")]
    student, _ = checkpoint.load_checkpoint(folder)
    fp, ours = judge.draw("", as_cm(network), network, 4), judge.draw("", student, student, 4)
    assert row["psnr"] == pytest.approx(scores.psnr(ours, fp), abs=1e-3)
    assert row["x fp"] == pytest.approx(judge.score(ours)["frechet"] / judge.score(fp)["frechet"], rel=1e-6)
    assert len(row["edge errors"]) == 5 and row["edge errors"][0] == 0 < row["edge errors"][4] < 1
    assert f"{row['psnr']:.2f}" in written[-1][2] and len(written[-1]) == 5
