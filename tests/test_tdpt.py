"""TDPT: paths agree with diffusers, phases partition time, targets come from the right network at the right points."""

import copy
import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import example, given
from hypothesis import strategies as st

import tdpt
from tdpt import FlowPath, VPPath

PATHS = {
    "eps": VPPath.from_betas("epsilon"),
    "v": VPPath.from_betas("v_prediction"),
    "v zero snr": VPPath.from_betas("v_prediction", zero_terminal_snr=True),
    "flow": FlowPath(),
    "flow shifted": FlowPath(3.0),
}
paths = st.sampled_from(list(PATHS))
seeds = st.integers(0, 99)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def times(path, *fractions):
    """Path times (one tensor of two samples each) at fractions of the path."""
    scaled = [f * path.start for f in fractions]
    return [torch.full((2,), round(v) if isinstance(path, VPPath) else v) for v in scaled]


fractions = st.one_of(st.sampled_from([0.0, 1.0, 0.001, 0.5]), st.floats(0, 1, width=32))

# ---------------------------------------------------------------------------------------------------------------- paths


@given(paths, fractions, seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@example("v zero snr", 1.0, 0, torch.float32)
def test_jump_to_the_same_time_is_the_identity_bit_for_bit(name, f, seed, dtype):
    """Catches: a boundary condition that holds up to rounding only, s and t swapped in a coefficient, bf16 arithmetic."""
    path, x, pred = PATHS[name], normal(2, 3, 4, seed=seed).to(dtype), normal(2, 3, 4, seed=seed + 1).to(dtype)
    (t,) = times(path, f)
    assert torch.equal(path.jump(x, pred, t, t), x.float())


@given(paths, fractions, fractions, fractions, seeds)
def test_jumps_compose_exactly_on_a_straight_path(name, f, g, h, seed):
    """Catches: wrong signs or times in a(t,s), b(t,s). With (x0, eps) fixed t -> u -> s is t -> s, and ends on the path."""
    path, x0, eps = PATHS[name], normal(2, 5, seed=seed), normal(2, 5, seed=seed + 1)
    t, u, s = times(path, f, g, h)
    x_t = path.add_noise(x0, eps, t)
    x_u = path.jump(x_t, path.prediction_of(x0, eps, t), t, u)
    x_s = path.jump(x_u, path.prediction_of(x0, eps, u), u, s)
    torch.testing.assert_close(x_s, path.jump(x_t, path.prediction_of(x0, eps, t), t, s), rtol=0, atol=1e-12)
    torch.testing.assert_close(x_s, path.add_noise(x0, eps, s), rtol=0, atol=1e-12)


def test_flow_jumps_compose_without_any_rounding_where_times_are_dyadic():
    """Catches: a detour over x0 and eps on the flow path, where x + (s - t) v needs none."""
    path, x, v = FlowPath(), torch.tensor([[3.0, -8.0]]), torch.tensor([[16.0, 5.0]])
    t, u, s = (torch.tensor([v]) for v in (1.0, 0.625, 0.25))
    assert torch.equal(path.jump(path.jump(x, v, t, u), v, u, s), path.jump(x, v, t, s))
    assert torch.equal(path.jump(x, v, t, s), x - 0.75 * v)


@given(st.integers(1, 1000), st.integers(0, 1000), seeds)
def test_eps_and_v_prediction_describe_the_same_point_and_jump_to_the_same_place(t, s, seed):
    """Catches: one parametrisation off the other; both must stand for one (x0, eps)."""
    x, eps = normal(2, 5, seed=seed), normal(2, 5, seed=seed + 1)
    t, s, by_eps, by_v = torch.tensor([t, t]), torch.tensor([s, s]), PATHS["eps"], PATHS["v"]
    x0 = by_eps.jump(x, eps, t, 0 * t)
    v = by_v.prediction_of(x0, eps, t)
    torch.testing.assert_close(by_v.jump(x, v, t, 0 * t), x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(by_v.jump(x, v, t, s), by_eps.jump(x, eps, t, s), rtol=1e-10, atol=1e-10)


def test_time_zero_is_clean_data_and_time_k_is_entry_k_minus_1():
    """Catches: the network's timestep and the path's time off by one, in either direction."""
    table = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    path = VPPath(table)
    alpha, sigma = path.alpha_sigma(torch.tensor([0, 1, 2, 3]))
    assert alpha[0] == 1 and sigma[0] == 0
    torch.testing.assert_close(alpha[1:] ** 2, table)
    assert path.timestep(torch.tensor([1, 3])).tolist() == [0, 2] and path.grid(3).tolist() == [3, 2, 1, 0]
    assert [v.item() for v in FlowPath().alpha_sigma(torch.tensor([0.0]))] == [1, 0]


def test_eps_prediction_at_zero_snr_is_refused_and_v_reads_the_picture_there():
    """Catches: a division by alpha = 0 that trains on inf; the picture is -v at the last time."""
    table = VPPath.from_betas(zero_terminal_snr=True).table[0, 1:] ** 2
    with pytest.raises(ValueError, match="undefined at zero signal-to-noise"):
        VPPath(table, "epsilon")
    path, x, v, t = VPPath(table), normal(2, 5), normal(2, 5, seed=1), torch.tensor([1000, 1000])
    assert torch.equal(path.jump(x, v, t, 0 * t), -v)


@pytest.mark.parametrize("table", [[], [0.5, 0.9], [1.0, 0.5], [0.5, -0.1], [0.9, math.nan], [[0.9, 0.5]]])
def test_a_table_that_does_not_decrease_within_0_and_1_is_refused(table):
    """Catches: betas passed for alphas_cumprod, NaN tables."""
    with pytest.raises(ValueError, match="decreasing"):
        VPPath(torch.tensor(table))


def test_grids_out_of_range_and_unknown_predictions_are_refused():
    """Catches: a grid with a time twice (a step t -> t), a misspelt prediction read as v."""
    for call in (lambda: PATHS["v"].grid(1001), lambda: PATHS["v"].grid(0), lambda: FlowPath().grid(0)):
        with pytest.raises(ValueError, match="solver grid"):
            call()
    with pytest.raises(ValueError, match="'sample'"):
        VPPath.from_betas("sample")
    with pytest.raises(ValueError, match="shift"):
        FlowPath(0)


# ---------------------------------------------------------------------------------------------- agreement with diffusers

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}


@pytest.mark.parametrize(("prediction", "zero"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
@pytest.mark.parametrize("n", [1, 4, 8, 25, 50])
def test_vp_grid_and_jump_are_diffusers_ddim(prediction, zero, n):
    """Catches: timesteps off by one, the wrong final alpha. Both sides in float64, so only the formula can differ."""
    scheduler = DDIMScheduler(
        **SDXL, prediction_type=prediction, rescale_betas_zero_snr=zero, clip_sample=False, set_alpha_to_one=True
    )
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = scheduler.alphas_cumprod.double(), torch.ones(()).double()
    scheduler.set_timesteps(n)
    path = VPPath(scheduler.alphas_cumprod, prediction)
    grid = path.grid(n)
    assert path.timestep(grid[:-1]).tolist() == scheduler.timesteps.tolist()
    x = expected = normal(2, 3, 4)
    for k, timestep in enumerate(scheduler.timesteps):
        pred = normal(2, 3, 4, seed=k)
        expected = scheduler.step(pred, timestep, expected).prev_sample
        x = path.jump(x, pred, grid[k].expand(2), grid[k + 1].expand(2))
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("zero", [False, True])
def test_from_betas_is_sdxl_schedule_with_diffusers_zero_terminal_snr_rescale(zero):
    """Catches: linear for scaled_linear betas, a rescale that moves the first value, a last value that is nearly 0."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bar = (1 - (rescale_zero_terminal_snr(betas) if zero else betas)).cumprod(0)
    table = VPPath.from_betas(zero_terminal_snr=zero).table
    torch.testing.assert_close(table[0, 1:] ** 2, bar, rtol=0, atol=1e-14)
    shipped = DDIMScheduler(**SDXL, rescale_betas_zero_snr=zero).alphas_cumprod
    torch.testing.assert_close((table[0, 1:] ** 2).float(), shipped, rtol=0, atol=1e-6)
    assert (table[0, -1] == 0) == zero


@pytest.mark.parametrize("shift", [1.0, 3.0, math.exp(1.15)])
@pytest.mark.parametrize("n", [1, 4, 28])
def test_flow_grid_and_jump_are_diffusers_flow_match_euler(shift, n):
    """Catches: the shift applied to 1 - t or twice, velocity of the other sign. exp(mu) is FLUX's dynamic shift."""
    dynamic = {"use_dynamic_shifting": True} if shift == math.exp(1.15) else {"shift": shift}
    scheduler = FlowMatchEulerDiscreteScheduler(**dynamic)
    sigmas = torch.linspace(1, 1 / n, n, dtype=torch.float64).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=1.15 if "use_dynamic_shifting" in dynamic else None)
    path = FlowPath(shift)
    grid = path.grid(n)
    torch.testing.assert_close(grid, scheduler.sigmas, rtol=0, atol=2e-7)
    x = expected = normal(2, 3, dtype=torch.float32)
    for k, timestep in enumerate(scheduler.timesteps):
        pred = normal(2, 3, seed=k, dtype=torch.float32)
        expected = scheduler.step(pred, timestep, expected).prev_sample
        x = path.jump(x, pred, grid[k].expand(2), grid[k + 1].expand(2))
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- toy networks


def mixture_teacher(path, mean_MD, std):
    """The exact teacher of a Gaussian mixture, E[prediction | x_t]; its "caption" is cond["prior_BM"], M probabilities.

    With tau^2 = alpha^2 std^2 + sigma^2 and gamma_m ~ prior_m N(x; alpha mean_m, tau^2), summed over m:
    E[x0] = gamma_m (mean_m + alpha std^2/tau^2 (x - alpha mean_m)),   E[eps] = gamma_m sigma/tau^2 (x - alpha mean_m).
    """

    def model(x, t, s, cond):
        alpha_B1, sigma_B1 = (v.to(x.dtype)[:, None] for v in path.alpha_sigma(t))
        tau2_B1 = alpha_B1**2 * std**2 + sigma_B1**2
        away_BMD = x[:, None] - alpha_B1[..., None] * mean_MD
        gamma_BM = (cond["prior_BM"].log() - away_BMD.square().sum(2) / (2 * tau2_B1)).softmax(1)
        away_BD = (gamma_BM[..., None] * away_BMD).sum(1) / tau2_B1
        return path.prediction_of(gamma_BM @ mean_MD + alpha_B1 * std**2 * away_BD, sigma_B1 * away_BD, t)

    return model


class ToyCM(torch.nn.Module):
    """A consistency model of a 2-D mixture: an MLP that is told t, s and the prior."""

    def __init__(self, start, M=4, width=64):
        super().__init__()
        self.start, sizes = start, (2 + M + 10, width, width, width)
        layers = [m for i, o in itertools.pairwise(sizes) for m in (torch.nn.Linear(i, o), torch.nn.SiLU())]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))

    def forward(self, x, t, s, cond):
        ts = torch.stack([t, s], 1).float() / self.start
        waves = [f(k * ts) for k in (1.5, 3.0) for f in (torch.sin, torch.cos)]
        return self.net(torch.cat([x, cond["prior_BM"], ts, *waves], 1))


def toy_low_bit(cm):
    """4-bit stand-in: hidden weights rounded per row and frozen; the first and last layer and the biases can train."""
    cm = copy.deepcopy(cm)
    for layer in (cm.net[2], cm.net[4]):
        scale_O1 = layer.weight.detach().abs().amax(1, keepdim=True) / 7
        layer.weight.requires_grad_(False).copy_((layer.weight / scale_O1).round() * scale_O1)
    return cm


def toy(path, n, seed):
    """Guided teacher of 4 Gaussians, n noises, n captions ("one of these two neighbours") -> teacher, x_T, cond."""
    generator = torch.Generator().manual_seed(seed)
    mean_MD = torch.tensor([[1.5, 0.0], [0.0, 1.5], [-1.5, 0.0], [0.0, -1.5]])
    first_BM = torch.eye(4)[torch.randint(4, (n,), generator=generator)]
    prior_BM = 0.5 * (first_BM + first_BM.roll(1, 1)) * (1 - 4e-6) + 1e-6
    teacher = tdpt.guided(mixture_teacher(path, mean_MD, 0.3), 1.5, {"prior_BM": torch.full((1, 4), 0.25)})
    return teacher, torch.randn(n, 2, generator=generator), {"prior_BM": prior_BM}


# --------------------------------------------------------------------------------------------------------------- phases


@given(paths, st.integers(1, 60), st.data())
@example("v", 8, None)
def test_phases_partition_the_grid(name, n, data):
    """Catches: `>=` for `>` at an edge (the student would never be trained where sampling starts a phase)."""
    K = 4 if data is None else data.draw(st.integers(1, n))
    grid = PATHS[name].grid(n)
    edges = tdpt.phase_edges(grid, K)
    assert len(edges) == K + 1 and edges[0] == grid[0] and edges[-1] == 0 and bool((edges.diff() < 0).all())
    assert torch.isin(edges, grid).all()
    ends = tdpt.phase_end(grid[:-1], edges)
    for t, end in zip(grid[:-1], ends, strict=True):
        holding = [k for k in range(K) if edges[k + 1] < t <= edges[k]]
        assert len(holding) == 1 and end == edges[holding[0] + 1]
    sizes = torch.stack([(ends == e).sum() for e in edges[1:]])
    assert sizes.sum() == n and sizes.max() - sizes.min() <= 1  # as even as integers allow


def test_an_edge_starts_the_phase_below_it():
    """Catches: the off-by-one edge; pinned on a grid of 8 with 4 phases."""
    grid = PATHS["v"].grid(8)
    edges = tdpt.phase_edges(grid, 4)
    assert edges.tolist() == [1000, 750, 500, 250, 0]
    assert tdpt.phase_end(grid, edges).tolist() == [750, 750, 500, 500, 250, 250, 0, 0, 0]


@pytest.mark.parametrize("name", PATHS)
def test_coarse_edges_lie_among_fine_ones_and_are_the_samplers_grid(name):
    """Catches: float times that miss each other by an ulp, so that cached states cannot serve 1, 2, 4 and 8 steps."""
    path = PATHS[name]
    for n in (8, 24, 48):
        for K in (1, 2, 4, 8):
            edges = tdpt.phase_edges(path.grid(n), K)
            assert torch.equal(edges, path.grid(K))
            assert torch.equal(edges, tdpt.phase_edges(tdpt.phase_edges(path.grid(n), 8), K))


@given(st.integers(2, 60), st.data())
def test_edges_for_k_phases_lie_among_those_for_2k(n, data):
    """Catches: rounding that depends on K."""
    K = data.draw(st.integers(1, n // 2))
    grid = torch.arange(n, -1, -1)
    assert torch.isin(tdpt.phase_edges(grid, K), tdpt.phase_edges(grid, 2 * K)).all()


def test_more_phases_than_steps_and_splits_out_of_range_are_refused():
    """Catches: edges that repeat; a percentage for a fraction."""
    with pytest.raises(ValueError, match="8 solver steps cannot be cut into 9"):
        tdpt.phase_edges(PATHS["v"].grid(8), 9)
    with pytest.raises(ValueError, match="split"):
        tdpt.split_time(PATHS["v"].grid(8), 50)


@pytest.mark.parametrize("name", PATHS)
def test_split_runs_from_clean_data_to_pure_noise(name):
    """Catches: the split measured from the noisy end."""
    grid = PATHS[name].grid(8)
    assert tdpt.split_time(grid, 1.0) == grid[0] and tdpt.split_time(grid, 0.0) == 0
    assert tdpt.split_time(grid, 0.75) == grid[2]


# -------------------------------------------------------------------------------------------------------------- targets


class Const(torch.nn.Module):
    """A network that predicts one number everywhere and remembers what it was asked."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value, self.calls = torch.nn.Parameter(torch.tensor(float(value))), []

    def forward(self, x, t, s, cond):
        self.calls.append((x.detach().clone(), t, s, cond))
        return self.value.expand_as(x)


def never(x, t, s, cond):
    raise AssertionError("this network is not needed")


def schedule(path, targets=("anchor", "fp"), split=(0.5,), n=8, K=4, edges=None):
    grid = path.grid(n)
    return tdpt.Schedule(path, grid, tdpt.phase_edges(grid, K) if edges is None else edges, targets, split)


def step(student, idx, phased, c=1e-3, **networks):
    """loss_B of one tdpt_loss on data of shape (B, 3) with cond = row numbers; networks that are not given must not be called."""
    x0, noise = normal(len(idx), 3, dtype=torch.float32), normal(len(idx), 3, seed=1, dtype=torch.float32)
    networks = {"self": student, "teacher": Const(0.3), "anchor": never, "fp": never} | networks
    return tdpt.tdpt_loss(networks, phased, x0, {"row": torch.arange(len(idx))}, noise, torch.tensor(idx), c)


@pytest.mark.parametrize("name", PATHS)
def test_the_target_next_to_an_edge_is_the_solver_point(name):
    """Catches: a target network called at u == s_phase (u = 0 is no timestep of a network); the wrong next grid point."""
    phased = schedule(PATHS[name])
    assert (step(Const(0.3), [1, 3, 5, 7], phased) == 0).all()
    assert (step(Const(0.4), [1, 3, 5, 7], phased) > 0).all()


def test_the_target_is_the_networks_jump_from_the_teachers_solver_point():
    """Catches: the jump made from x_t, from t, or to u; the teacher's step made to s; early and late exchanged."""
    path, teacher = PATHS["v"], Const(0.3)
    anchor, fp, student = Const(0.5), Const(-0.5), Const(0.1)
    grid = path.grid(8)
    loss_B = step(student, [0, 6], schedule(path), c=0.01, anchor=anchor, fp=fp, teacher=teacher)
    x0, noise = normal(2, 3, dtype=torch.float32), normal(2, 3, seed=1, dtype=torch.float32)
    t, u, s = grid[[0, 6]], grid[[1, 7]], grid[[2, 8]]
    value = torch.tensor([[0.5], [-0.5]]).expand(2, 3)
    x_t = path.add_noise(x0, noise, t)
    x_u = path.jump(x_t, torch.full((2, 3), 0.3), t, u)
    target, got = path.jump(x_u, value, u, s), path.jump(x_t, torch.full((2, 3), 0.1), t, s)
    torch.testing.assert_close(loss_B, tdpt.pseudo_huber(got, target, 0.01))
    for network, row in ((anchor, 0), (fp, 1)):  # each network saw its own row only, at u, on its way to s
        ((x, at, to, cond),) = network.calls
        assert torch.equal(x, x_u[row : row + 1]) and cond["row"].tolist() == [row]
        assert at.tolist() == [u[row]] and to.tolist() == [s[row]]
    ((_, at, to, _),) = student.calls
    assert torch.equal(at, t) and torch.equal(to, s)
    ((_, at, to, _),) = teacher.calls
    assert torch.equal(at, t) and torch.equal(to, u)


@pytest.mark.parametrize("name", PATHS)
def test_a_time_at_the_split_belongs_to_the_earlier_stage(name):
    """Catches: `>` for `>=` at T', and split points that must be given in an order."""
    grid = PATHS[name].grid(8)
    for split, stages in (
        ((0.5,), [0, 0, 0, 0, 0, 1, 1, 1, 1]),  # T' = grid[4]
        ((1.0,), [0, 1, 1, 1, 1, 1, 1, 1, 1]),
        ((0.0,), [0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ((0.25, 0.75), [0, 0, 0, 1, 1, 1, 1, 2, 2]),
        ((0.75, 0.25), [0, 0, 0, 1, 1, 1, 1, 2, 2]),
        ((), [0] * 9),
    ):
        targets = ("anchor", "fp", "self")[: len(split) + 1]
        assert schedule(PATHS[name], targets, split).stage(grid).tolist() == stages


def test_as_many_split_points_as_borders_between_stages():
    """Catches: a third stage that never gets a sample."""
    with pytest.raises(ValueError, match="3 stages have 2 split points, not 1"):
        schedule(PATHS["v"], ("anchor", "fp", "fp"))


def test_three_stages_take_their_targets_from_three_networks():
    """Catches: two stages in the code where the configuration has three."""
    networks = {name: Const(value) for name, value in (("anchor", 1.0), ("fp", 2.0), ("ema", 5.0))}
    phased = schedule(PATHS["flow"], ("anchor", "ema", "fp"), (0.25, 0.75), n=8, K=2)
    loss_B = step(Const(0.3), [0, 1, 2, 4, 5, 6], phased, c=0.0, **networks)
    values = torch.tensor([1.0, 1.0, 1.0, 5.0, 5.0, 5.0])
    steps = torch.tensor([4, 3, 2, 4, 3, 2])  # of 1/8 to the end of the phase, the first of them by the teacher
    torch.testing.assert_close(loss_B, ((steps - 1) * values + 0.3 - steps * 0.3).abs() / 8)
    assert torch.cat([t for _, t, _, _ in networks["ema"].calls]).tolist() == [3 / 8, 2 / 8, 1 / 8]
    phased = schedule(PATHS["flow"], ("anchor", "ema", "fp"), (0.3, 0.5), n=48, K=1)
    step(Const(0.3), [0, 30, 40], phased, **networks)
    assert [len(networks[name].calls) for name in ("anchor", "ema", "fp")] == [2, 2, 1]


@pytest.mark.parametrize("early", ["anchor", "fp", "self", "teacher"])
@pytest.mark.parametrize("late", ["anchor", "fp", "self", "teacher"])
def test_each_stage_gets_its_target_and_only_needed_networks_are_called(early, late):
    """Catches: a name wired to another network, stages exchanged, networks evaluated and then masked away."""
    networks = {"anchor": Const(1.0), "fp": Const(2.0), "self": Const(3.0), "teacher": Const(4.0)}
    loss_B = step(networks["self"], [0, 6], schedule(PATHS["flow"], (early, late)), c=0.0, **networks)
    values = torch.tensor([networks[name].value.item() for name in (early, late)])
    # t -> u by the teacher (4) and u -> s by the target against t -> s by the student (3); each step is 1/8
    torch.testing.assert_close(loss_B, ((4 + values - 2 * 3) / 8).abs())
    always = {"self": 1, "teacher": 1}
    for name, network in networks.items():
        assert len(network.calls) == always.get(name, 0) + (name in (early, late))


def test_a_target_without_a_network_is_refused():
    """Catches: a misspelt target failing deep inside a step."""
    with pytest.raises(ValueError, match=r"no network for targets \['fq'\]: there are"):
        step(Const(), [0], schedule(PATHS["v"], ("anchor", "fq")))


def test_processes_that_share_a_network_all_call_it():
    """Catches: a process without a late sample that leaves the others waiting, and a target that its call changes."""
    anchor, fp, losses = Const(1.0), Const(2.0), []
    x0, noise, idx = normal(2, 3, dtype=torch.float32), normal(2, 3, seed=1, dtype=torch.float32), torch.tensor([0, 1])
    networks = {"self": Const(0.1), "teacher": Const(0.3), "anchor": anchor, "fp": fp}
    for always in (False, True):
        losses.append(tdpt.tdpt_loss(networks, schedule(PATHS["flow"]), x0, {}, noise, idx, always=always))
    assert torch.equal(*losses) and len(anchor.calls) == 2 and len(fp.calls) == 1


def test_no_gradient_flows_through_the_target():
    """Catches: a self target that is trained towards the student instead of the other way round."""
    path, student = PATHS["flow"], Const(0.2)
    step(student, [0, 2], schedule(path, ("self", "self"))).mean().backward()
    frozen, reference = copy.deepcopy(student), Const(0.2)
    step(reference, [0, 2], schedule(path, ("fp", "fp")), fp=frozen).mean().backward()
    assert student.value.grad == reference.value.grad != 0


def test_a_solver_step_does_not_leave_its_phase_when_an_edge_is_no_grid_point():
    """Catches: a target beyond the end of the phase, reached by jumping back up in time."""
    path, teacher = PATHS["flow"], Const(0.3)
    edges = torch.tensor([1.0, 0.9, 0.0])
    loss_B = step(Const(0.3), [0], schedule(path, edges=edges), teacher=teacher)  # u = s = 0.9, not 0.875
    assert loss_B == 0 and teacher.calls[0][2].tolist() == [edges[1]]


def test_pseudo_huber_is_lcms_per_sample():
    """Catches: the norm over all elements, a forgotten - c, a mean over the batch, bf16 arithmetic."""
    a, zero = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2)
    torch.testing.assert_close(tdpt.pseudo_huber(a, zero, 4.0), torch.tensor([0.5, 0.0]))  # (sqrt(9+16)-4)/2
    tiny = torch.full((1, 4), 1e-3, dtype=torch.bfloat16)
    torch.testing.assert_close(tdpt.pseudo_huber(tiny, 0 * tiny, 1.0), torch.tensor([5e-7]), rtol=0.3, atol=0)


# ------------------------------------------------------------------------------------------------------------- guidance


def test_guidance_is_u_plus_w_times_c_minus_u_in_one_call():
    """Catches: the LCM convention (w - 1), halves exchanged, two calls, a null condition of one row not spread."""
    calls = []

    def teacher(x, t, s, cond):
        calls.append((x, t, s, cond))
        return x * cond["scale"][:, None] + cond["size"][:, None]

    x, t = torch.ones(2, 3), torch.tensor([5, 6])
    cond = {"scale": torch.tensor([3.0, 4.0]), "size": torch.tensor([0.5, 0.0])}
    null = {"scale": torch.tensor([1.0])}  # size is not in null: it keeps the sample's value
    for w, expected in ((0.0, [1.5, 1.0]), (2.0, [5.5, 7.0]), (7.5, [16.5, 23.5])):
        got = tdpt.guided(teacher, w, null)(x, t, t - 1, cond)
        torch.testing.assert_close(got, torch.tensor(expected)[:, None].expand(2, 3))
    assert len(calls) == 3 and all(c[0].shape == (4, 3) and c[1].tolist() == [5, 6, 5, 6] for c in calls)
    assert calls[0][2].tolist() == [4, 5, 4, 5] and calls[0][3]["scale"].tolist() == [1, 1, 3, 4]
    assert tdpt.guided(teacher, 1.0, null) is teacher
    with pytest.raises(ValueError, match="typo"):
        tdpt.guided(teacher, 2.0, {"typo": null["scale"]})(x, t, t, cond)


# ------------------------------------------------------------------------------------------------------------- rollouts


class PerPhase(torch.nn.Module):
    """A student with one parameter per destination, so that gradients show which phase they come from."""

    def __init__(self, edges):
        super().__init__()
        self.edges, self.value, self.calls = edges, torch.nn.Parameter(torch.linspace(0.1, 0.4, len(edges) - 1)), []

    def forward(self, x, t, s, cond):
        self.calls.append((x.detach(), t, s))
        return (self.edges[1:] == s[0]).float() @ self.value * x


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_rollouts_start_each_phase_from_own_or_reference_states(on_policy, K):
    """Catches: on and off policy exchanged, the reference of the wrong phase, a student not told its destination."""
    path, x_T = FlowPath(), normal(3, 2, dtype=torch.float32)
    edges = path.grid(K)
    states = torch.stack([x_T * (1 + k) for k in range(K + 1)])
    student = PerPhase(edges)
    losses = list(tdpt.rollout_phases(student, path, states, {}, edges, on_policy, c=0.1))
    own = tdpt.rollout_states(PerPhase(edges), path, x_T, {}, edges)
    for k, (x, t, s) in enumerate(student.calls):
        start = own[k] if on_policy else states[k]
        assert torch.equal(x, start) and t.tolist() == [edges[k]] * 3 and s.tolist() == [edges[k + 1]] * 3
        end = path.jump(start, student.value[k] * start, t, s)
        torch.testing.assert_close(losses[k], tdpt.pseudo_huber(end, states[k + 1], 0.1).mean())
    assert len(student.calls) == len(losses) == K


def test_a_phase_is_not_trained_for_the_errors_of_the_next():
    """Catches: own states that are not detached (gradients through the whole rollout, memory times K)."""
    path, edges = FlowPath(), FlowPath().grid(4)
    student, states = PerPhase(edges), normal(5, 3, 2, dtype=torch.float32)
    for k, loss in enumerate(tdpt.rollout_phases(student, path, states, {}, edges)):
        (grad,) = torch.autograd.grad(loss, student.value)
        assert grad[k] != 0 and grad.abs().sum() == grad[k].abs()


@pytest.mark.parametrize("name", PATHS)
def test_a_student_equal_to_its_reference_has_no_loss(name):
    """Catches: states one phase late, a rollout that differs from the sampler it trains for."""
    path, edges = PATHS[name], PATHS[name].grid(4)
    model = ToyCM(path.start)
    x_T, cond = normal(5, 2, dtype=torch.float32), {"prior_BM": torch.full((5, 4), 0.25)}
    states = tdpt.rollout_states(model, path, x_T, cond, edges)
    assert torch.equal(states[0], x_T) and torch.equal(states[-1], tdpt.sample(model, path, x_T, cond, 4))
    for on_policy in (True, False):
        assert list(tdpt.rollout_phases(model, path, states, cond, edges, on_policy)) == [0, 0, 0, 0]


def test_cached_states_are_selected_by_time_and_missing_ones_named():
    """Catches: states taken by position, the nearest time in place of the asked one."""
    times_ = FlowPath().grid(8)
    states = times_[:, None, None].expand(9, 2, 3)
    assert tdpt.states_at(states, times_, FlowPath().grid(2))[:, 0, 0].tolist() == [1, 0.5, 0]
    with pytest.raises(ValueError, match=r"no cached state at times \[0.33"):
        tdpt.states_at(states, times_, torch.tensor([1.0, 0.33, 0.0]))
    with pytest.raises(ValueError, match="9 reference states for 3 edges"):
        next(tdpt.rollout_phases(Const(), FlowPath(), states, {}, FlowPath().grid(2)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["v zero snr", "flow shifted"])
def test_losses_on_a_gpu_equal_those_on_the_cpu(name):
    """Catches: a table, an index or a coefficient left on the other device."""
    path, found = PATHS[name], []
    x, noise, idx = normal(8, 3, dtype=torch.float32), normal(8, 3, seed=1, dtype=torch.float32), torch.arange(8)
    for device in ("cpu", "cuda"):
        networks = {name: Const(v).to(device) for name, v in (("self", 0.1), ("anchor", 0.5), ("fp", -0.5), ("teacher", -0.5))}
        grid, cond = path.grid(8, device), {"row": idx.to(device)}
        edges = tdpt.phase_edges(grid, 4)
        states = tdpt.states_at(tdpt.rollout_states(networks["fp"], path, noise.to(device), cond, grid), grid, edges)
        loss_B = tdpt.tdpt_loss(networks, tdpt.Schedule(path, grid, edges), x.to(device), cond, noise.to(device), idx.to(device))
        losses = torch.stack([*tdpt.rollout_phases(networks["self"], path, states, cond, edges)])
        found.append((loss_B.cpu(), states.cpu(), losses.cpu()))
    torch.testing.assert_close(found[0], found[1])


# ------------------------------------------------------------------------------------ against ODEs that can be integrated


def gaussian_end(path, x_T, mean, std):
    """Where the ODE of one Gaussian ends: (x - alpha mean) / sqrt(alpha^2 std^2 + sigma^2) is constant along it."""
    alpha, sigma = (v.double() for v in path.alpha_sigma(torch.tensor([path.start])))
    return mean + std * (x_T - alpha * mean) / (alpha**2 * std**2 + sigma**2).sqrt()


@pytest.mark.parametrize("name", PATHS)
def test_the_solver_converges_to_the_closed_form_at_first_order(name):
    """Catches: wrong predictions of the exact teacher, a solver of order 0, a grid that does not end at clean data."""
    path, x_T, mean = PATHS[name], normal(64, 2), torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    cond, exact = {"prior_BM": torch.ones(64, 1, dtype=torch.float64)}, gaussian_end(path, x_T, mean, 0.5)
    teacher = mixture_teacher(path, mean, 0.5)
    coarse, fine = ((tdpt.sample(teacher, path, x_T, cond, n) - exact).abs().mean() for n in (50, 200))
    assert fine < 0.02 and fine < 0.35 * coarse


def fit(model, loss_of, steps, lr):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, 2 - 2 * i / steps)
        optimizer.zero_grad()
        loss_of(i).backward()
        optimizer.step()


@pytest.mark.parametrize("name", [pytest.param("v zero snr", marks=pytest.mark.slow), "flow"])
def test_distilled_gaussian_mixture_lands_on_the_end_points_of_the_integrated_ode(name):
    """Catches: an error of sign, time or target that keeps the pieces consistent with each other but not with the ODE."""
    torch.manual_seed(0)
    path = PATHS[name]
    times_, grid = path.grid(8), path.grid(48)
    teacher, x_T, cond = toy(path, 2048, seed=0)
    cached = tdpt.states_at(tdpt.rollout_states(teacher, path, x_T, cond, grid), grid, times_)
    _, test_T, test_cond = toy(path, 512, seed=1)
    end = tdpt.sample(teacher, path, test_T, test_cond, 200)

    def distance(model):
        ends = torch.stack([tdpt.sample(model, path, test_T, test_cond, K) for K in (1, 2, 4)])
        return (ends - end).norm(dim=2).mean(1)

    def batch(i):
        rows, edges = torch.randint(2048, (256,)), tdpt.phase_edges(times_, (1, 2, 4)[i % 3])
        return tdpt.states_at(cached, times_, edges)[:, rows], {k: v[rows] for k, v in cond.items()}, edges

    def rollout(model):
        return lambda i: torch.stack([*tdpt.rollout_phases(model, path, *batch(i))]).mean()

    def phased(model, *targets):
        def loss(i):
            states, c, edges = batch(i)
            noise, idx = torch.randn_like(states[0]), torch.randint(48, (256,))
            networks = {"self": model, "teacher": teacher, "anchor": anchor, "fp": fp}
            return tdpt.tdpt_loss(networks, tdpt.Schedule(path, grid, edges, targets), states[-1], c, noise, idx).mean()

        return loss

    fp = ToyCM(path.start)
    fit(fp, rollout(fp), 500, 1e-2)
    solver, full = distance(teacher), distance(fp)
    assert bool((full < 0.15).all()) and bool((full < 0.5 * solver).all()), (solver, full)

    anchor = toy_low_bit(fp)
    low = distance(anchor)
    for make, K in ((lambda m: phased(m, "fp", "fp"), 0), (lambda m: phased(m, "anchor", "fp"), 2), (rollout, 0)):
        student = copy.deepcopy(anchor)
        fit(student, make(student), 100, 1e-3)
        assert bool((distance(student)[K:] < 0.95 * low[K:]).all()), (low, distance(student))


def test_calibration_runs_make_the_samplers_jumps():
    """Catches: a bin set after the call, a jump that starts from elsewhere, gradients that flow from one jump into the last."""
    path = VPPath.from_betas(zero_terminal_snr=True)
    x_T, cond, seen = torch.randn(5, 2, 4, 4), {"c": torch.arange(5.0)[:, None, None, None]}, []
    scale = torch.ones((), requires_grad=True)

    def model(x, t, s, cond):
        seen.append((x.detach(), float(t[0]), float(s[0])))
        return scale * (x.tanh() + 0.1 * cond["c"])

    forward, backward = tdpt.calibration(model, path, x_T, cond, [1, 4], bins=4, micro=2)
    bins = []
    with torch.no_grad():
        forward(lambda b: bins.append((b, len(seen))))
    times = [float(t) for K in (1, 4) for t in path.grid(K)[:-1]]
    assert [t for _, t, _ in seen] == times and [s for *_, s in seen] == [0.0, *[float(s) for s in path.grid(4)[1:]]]
    assert bins == [(min(3, int(4 * t / path.start)), i) for i, t in enumerate(times)]
    states = tdpt.rollout_states(model, path, x_T, cond, path.grid(4))
    assert all(torch.equal(x, z) for (x, _, _), z in zip(seen[1:5], states, strict=False))
    seen.clear()
    assert backward() == 5 * 5 and len(seen) == 3 * 5 and [len(x) for x, _, _ in seen[::5]] == [2, 2, 1]
    first = scale.grad.clone()
    scale.grad = None
    backward()
    assert torch.equal(scale.grad, first), "every pass sends the same directions"
