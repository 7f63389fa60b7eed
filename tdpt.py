"""TDPT: Trajectory Distillation with Phased Targets, and on-policy rollouts.

A consistency model (CM) jumps from a point x_t of a denoising trajectory to the end of the *phase* that t is in, so
that a picture takes as many network calls as there are phases. TDPT trains a CM while it is 4-bit and gives the stages
of the trajectory different targets. [A] distinct objectives per stage, accurate starting points for each. [R] one
training stage; early (high-noise) -> a frozen, untrained, quantized copy of the CM, the "low-bit anchor"; late -> the
full-precision CM; one split point T'. [O] everything else here: which points, which jump, which loss, the rollouts.

Paths.  x_t = alpha_t x0 + sigma_t eps.  A network predicts eps, v = alpha eps - sigma x0 or, on a flow, v = eps - x0.
Whichever it is, moving from t to s while (x0, eps) stay fixed is linear in state and prediction:

    jump(x_t, p, t, s) = alpha_s x0 + sigma_s eps = a(t,s) x_t + b(t,s) p          a(t,t) = 1, b(t,t) = 0

    VP, eps     a = alpha_s / alpha_t                        b = sigma_s - sigma_t alpha_s / alpha_t
    VP, v       a = alpha_s alpha_t + sigma_s sigma_t        b = sigma_s alpha_t - alpha_s sigma_t
    flow, v     a = 1                                        b = s - t

so the boundary condition jump(t -> t) = x_t holds by construction, bit for bit. With the *teacher's* prediction the
same jump is the first-order ODE step (DDIM on VP, Euler on flow): one function is student, solver and sampler.

Time.  Clean data is t = 0.  VP: integers 0..1000; t = 0 is alpha = 1, sigma = 0 exactly, t = k >= 1 is
alphas_cumprod[k-1], where the network's own timestep is k-1.  Flow: t in [0, 1], x_t = (1-t) x0 + t eps.
Networks are callables model(x, t, s, cond) -> prediction on *path* times (their wrapper applies `path.timestep`); s is
where they will be taken, for networks that have an input for it (as in CTM), others ignore it. t and s are 1-D, one per sample,
on the device of the states (path.grid(n, device)).
cond is any dict of tensors with leading batch dimension; nothing here looks inside.

Phases.  edges e_0 = start > e_1 > .. > e_K = 0 cut time into phases (e_k+1, e_k]: an edge belongs to the phase that
*starts* there, since as an end nothing is left to do.  s_phase(t) = the largest edge below t.

Stages.  A coarser cut of the same trajectory: split points T' divide it into stages, each with a network that its targets
come from; a time T' belongs to the earlier stage. The paper has two stages and one T'; here there may be more.

`tdpt_loss`, one step:  t = grid[idx], u = the next grid point, s = s_phase(t):

    x_t    = alpha_t x0 + sigma_t eps
    x_u    = jump(x_t, guided teacher(x_t, t), t, u)
    target = jump(x_u, T(x_u, u), u, s)  without gradient, T the network of the stage that t is in;  x_u itself if u == s
    loss   = pseudo-Huber( jump(x_t, student(x_t, t), t, s) - target )

`rollout_phases` [O]:  student and a reference trajectory z leave one noise, y_0 = z_0; in each phase the student learns
from *its own* state where the reference ends, so that what went wrong before is corrected instead of accumulated:

    loss_k = pseudo-Huber( y_k+1 - z_k+1 ),    y_k+1 = jump(y_k, student(y_k, e_k), e_k, e_k+1),  y_k detached

Dimension key: B batch, K phases, n solver steps, D coordinates, r rank (demo); states are (B, ...) of any shape.
Coefficients float64, states float32 (float64 stays). Left out on purpose: higher-order and stochastic samplers, loss
weights over time, adversarial terms, devices without float64 (MPS).
"""

import itertools
from dataclasses import dataclass

import torch

# ---------------------------------------------------------------------------------------------------------------- paths


class Path:
    """Shared by both paths; a child has start, alpha_sigma, coefficients, prediction_of, grid and timestep."""

    def add_noise(self, x0, eps, t):
        """x_t = alpha_t x0 + sigma_t eps;  x0, eps (B, ...), t (B,) -> (B, ...)."""
        alpha_B, sigma_B = self.alpha_sigma(t)
        return _combine(alpha_B, x0, sigma_B, eps)

    def jump(self, x, pred, t, s):
        """x_s = a(t,s) x_t + b(t,s) pred: student's jump, solver's and sampler's step. x, pred (B, ...), t, s (B,)."""
        a_B, b_B = self.coefficients(t, s)
        return _combine(a_B, x, b_B, pred)


class VPPath(Path):
    """DDPM / SDXL's variance-preserving path on times 0..len(alphas_cumprod); prediction "epsilon" or "v_prediction".

    ValueError: unknown prediction; a table that does not decrease within [0, 1); eps-prediction where alpha reaches 0
    (x0 = (x - sigma eps) / alpha has no value there: no output of the network could say what the picture is).
    """

    def __init__(self, alphas_cumprod, prediction="v_prediction"):
        bar = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction must be 'epsilon' or 'v_prediction', not {prediction!r}")
        if bar.ndim != 1 or not (len(bar) and bar[0] < 1 and bar[-1] >= 0 and bool((bar.diff() < 0).all())):
            raise ValueError("alphas_cumprod must be one decreasing sequence of values in [0, 1)")
        if prediction == "epsilon" and bar[-1] == 0:
            raise ValueError("eps-prediction is undefined at zero signal-to-noise ratio: use v_prediction there")
        self.prediction, self.start = prediction, len(bar)
        bar = torch.cat([torch.ones(1, dtype=torch.float64), bar])  # index 0 = clean data
        self.table = torch.stack([bar.sqrt(), (1 - bar).sqrt()])  # alpha, sigma: (2, start + 1) float64

    @classmethod
    def from_betas(cls, prediction="v_prediction", zero_terminal_snr=False, betas=(0.00085, 0.012), steps=1000):
        """SDXL's "scaled_linear" schedule, sqrt(beta) linear in time.

        zero_terminal_snr (Lin et al. 2023, algorithm 1): shift and scale sqrt(alphas_cumprod) so that the last value is
        exactly 0 and the first one stays; then training sees pure noise where sampling starts from it.
        """
        beta = torch.linspace(betas[0] ** 0.5, betas[1] ** 0.5, steps, dtype=torch.float64) ** 2
        root = (1 - beta).cumprod(0).sqrt()
        if zero_terminal_snr:
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return cls(root**2, prediction)

    def alpha_sigma(self, t):
        """alpha, sigma (B,) float64 at integer times t (B,)."""
        self.table = self.table.to(t.device)  # copies once
        return self.table[:, t].unbind(0)

    def coefficients(self, t, s):
        """a, b (B,) of the jump t -> s; b is a small difference of products, hence float64 tables."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t), self.alpha_sigma(s)
        if self.prediction == "epsilon":
            return alpha_s / alpha_t, sigma_s - sigma_t * (alpha_s / alpha_t)
        return alpha_s * alpha_t + sigma_s * sigma_t, sigma_s * alpha_t - alpha_s * sigma_t

    def prediction_of(self, x0, eps, t):
        """What a perfect network predicts: eps, or v = alpha eps - sigma x0. The regression target of a teacher."""
        alpha_B, sigma_B = self.alpha_sigma(t)
        return _wide(eps) if self.prediction == "epsilon" else _combine(alpha_B, eps, -sigma_B, x0)

    def grid(self, n, device=None):
        """n + 1 evenly spaced int64 times start..0: diffusers' "trailing" timesteps (its k-1 is our k), then 0."""
        if not 1 <= n <= self.start:
            raise ValueError(f"a solver grid on this path has 1 to {self.start} steps, not {n}")
        return (torch.arange(n, -1, -1, dtype=torch.float64) * self.start / n).round().long().to(device)

    def timestep(self, t):
        """Path time -> the timestep that a diffusers UNet is given, 0..999."""
        return t - 1


class FlowPath(Path):
    """Rectified flow x_t = (1-t) x0 + t eps (FLUX, SD3). shift bends the grid only: t -> shift t / (1 + (shift-1) t).

    FLUX's resolution-dependent "dynamic shifting" is the same formula with shift = exp(mu).
    """

    prediction, start = "flow", 1.0

    def __init__(self, shift=1.0):
        if not shift > 0:
            raise ValueError(f"shift must be positive, not {shift}")
        self.shift = float(shift)

    def alpha_sigma(self, t):
        """1 - t, t: (B,) float64."""
        return 1 - t.double(), t.double()

    def coefficients(self, t, s):
        """a = 1, b = s - t: (B,) float64."""
        return torch.ones_like(t, dtype=torch.float64), s.double() - t.double()

    def prediction_of(self, x0, eps, t):
        """v = dx/dt = eps - x0. The regression target of a teacher."""
        return _wide(eps) - _wide(x0)

    def grid(self, n, device=None):
        """n + 1 descending float32 times 1..0: the sigmas of diffusers' FlowMatchEulerDiscreteScheduler in FLUX."""
        if n < 1:
            raise ValueError(f"a solver grid has at least 1 step, not {n}")
        t = torch.arange(n, -1, -1, dtype=torch.float64) / n  # correctly rounded: grid(4) lies on grid(24) bit for bit
        return (self.shift * t / (1 + (self.shift - 1) * t)).float().to(device)

    def timestep(self, t):
        """Path time -> the timestep that diffusers' FluxTransformer2DModel is given (it multiplies by 1000 itself)."""
        return t


def _wide(x):
    """bf16 / fp16 -> float32 before arithmetic; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _combine(a_B, x, b_B, y):
    """a x + b y with one coefficient per sample, formed in float64, rounded once to the states' dtype."""
    x, y, shape = _wide(x), _wide(y), (-1,) + (1,) * (x.ndim - 1)
    return a_B.to(x.dtype).view(shape) * x + b_B.to(x.dtype).view(shape) * y


# ------------------------------------------------------------------------------------------ guidance, phases and stages


def guided(teacher, w, null_cond):
    """Classifier-free guidance u + w (c - u): w = 0 unconditional, w = 1 the teacher itself, w > 1 sharper.

    (diffusers' guidance_scale is this w; the LCM paper's w is ours - 1.) One batched call, unconditional half first.
    null_cond: tensors with leading dimension 1; entries of cond that it lacks (sizes, ids) keep the sample's value.
    Not for networks that have guidance as an input (FLUX dev): there the value is `Denoiser.guidance`.
    """
    if w == 1:
        return teacher

    def model(x, t, s, cond):
        if unknown := null_cond.keys() - cond.keys():
            raise ValueError(f"null_cond has entries that cond lacks: {sorted(unknown)}")
        null = {k: null_cond[k].to(v).expand_as(v) if k in null_cond else v for k, v in cond.items()}
        both = {k: torch.cat([null[k], cond[k]]) for k in cond}
        u, c = teacher(torch.cat([x, x]), torch.cat([t, t]), torch.cat([s, s]), both).chunk(2)
        return u + w * (c - u)

    return model


def phase_edges(times, K):
    """K + 1 of the n + 1 descending times, both ends included, as even in index as integers allow: index k n / K.

    `times` is a solver grid or finer edges; the edges for K lie among those for 2K, so cached states serve both. With
    n a multiple of K they are path.grid(K), which `sample` uses: prefer 48 points to 50, grid(48) holds 1, 2, 4 and 8.
    """
    n = len(times) - 1
    if not 1 <= K <= n:
        raise ValueError(f"{n} solver steps cannot be cut into {K} phases")
    return times[torch.tensor([(2 * k * n + K) // (2 * K) for k in range(K + 1)], device=times.device)]


def phase_end(t, edges):
    """s_phase(t), (B,): the largest edge strictly below t; 0 for t = 0."""
    at_or_above_B = (edges >= t[:, None]).sum(1)  # edges descend, so this count is the index of the first one below t
    return edges[at_or_above_B.clamp(max=len(edges) - 1)]


def split_time(grid, split):
    """T' = the grid point at fraction `split` in [0, 1] of the way up from clean data (0) to pure noise (1).

    A grid point, so that t >= T' compares exact values, and a share of solver steps whatever the schedule's shift.
    """
    if not 0 <= split <= 1:
        raise ValueError(f"split must lie in [0, 1], not {split}")
    return grid[round((1 - split) * (len(grid) - 1))]


@dataclass(frozen=True)
class Schedule:
    """How TDPT cuts a trajectory: grid (n+1,) into solver steps, edges (K+1,) into phases, split into stages.

    grid, edges: descending path times. targets: names of the networks that the stages' targets come from, the noisiest stage
    first: (anchor, fp) is the paper's choice, (self, self) PCM / LCM-style, (fp, fp) plain distillation. split: the points T'
    between stages, one fewer than targets, in any order, each as `split_time` takes it. ValueError: another number of them.
    """

    path: Path
    grid: torch.Tensor
    edges: torch.Tensor
    targets: tuple[str, ...] = ("anchor", "fp")
    split: tuple[float, ...] = (0.5,)

    def __post_init__(self):
        if len(self.split) != len(self.targets) - 1:
            raise ValueError(f"{len(self.targets)} stages have {len(self.targets) - 1} split points, not {len(self.split)}")

    def stage(self, t):
        """The stage of each time t (B,), int64: 0 for the noisiest; a time T' belongs to the noisier stage of the two."""
        stage_B = torch.zeros_like(t, dtype=torch.int64)
        for fraction in self.split:
            stage_B += t < split_time(self.grid, fraction)
        return stage_B


# --------------------------------------------------------------------------------------------------------------- losses


def pseudo_huber(a, b, c):
    """mean over elements of sqrt((a-b)^2 + c^2) - c, per sample (B,). LCM's form (per element), not iCT's norm."""
    return ((_wide(a) - _wide(b)).square() + c * c).sqrt().sub(c).flatten(1).mean(1)


@torch.no_grad()
def phased_target(networks, schedule, x_u, t, u, s, cond, always=False):
    """jump(x_u, T(x_u, u), u, s), T the network of the stage that each t (B,) is in -> (B, ...).

    Rows with u == s are the solver point itself. A network sees only the rows that need it; without any, no call, unless
    `always`: the call of a network that processes share between them (FSDP) must be made by all of them.
    """
    target, stage_B = x_u.clone(), schedule.stage(t)
    for name in dict.fromkeys(schedule.targets):  # (fp, fp) is one call
        stages = stage_B.new_tensor([i for i, of_stage in enumerate(schedule.targets) if of_stage == name])
        rows = (torch.isin(stage_B, stages) & (u > s)).nonzero().squeeze(1)
        if len(rows) or always:
            called = rows if len(rows) else torch.zeros(1, dtype=torch.int64, device=u.device)
            x_r, u_r, s_r, cond_r = x_u[called], u[called], s[called], {k: v[called] for k, v in cond.items()}
            jumped = schedule.path.jump(x_r, networks[name](x_r, u_r, s_r, cond_r), u_r, s_r)
            target[rows] = jumped[: len(rows)]
    return target


def tdpt_loss(networks, schedule, x0, cond, noise, idx, c=1e-3, always=False):
    """One TDPT step -> loss of each sample (B,), equations at the top.

    networks: {"self": student, "teacher": guided teacher, and what else schedule.targets names}. x0, noise (B, ...);
    idx (B,) int64 in 0..n-1, the grid point that each sample starts at. c: pseudo_huber's. always: see phased_target.
    ValueError for a target without a network.
    """
    if missing := [name for name in schedule.targets if name not in networks]:
        raise ValueError(f"no network for targets {missing}: there are {list(networks)}")
    path, t = schedule.path, schedule.grid[idx]
    s = phase_end(t, schedule.edges)
    u = torch.maximum(schedule.grid[idx + 1], s)  # a step stays in its phase even if the phase's edge is no grid point
    x_t = path.add_noise(x0, noise, t)
    with torch.no_grad():
        x_u = path.jump(x_t, networks["teacher"](x_t, t, u, cond), t, u)
    target = phased_target(networks, schedule, x_u, t, u, s, cond, always)
    return pseudo_huber(path.jump(x_t, networks["self"](x_t, t, s, cond), t, s), target, c)


def rollout_phases(student, path, states, cond, edges, on_policy=True, c=1e-3):
    """Yield loss_k of each phase in turn; with backward on each as it comes, memory is that of one network call.

    states (K+1, B, ...): the reference z at `edges` (K+1,). on_policy False starts phase k from z_k, not from y_k.
    """
    if len(states) != len(edges):
        raise ValueError(f"{len(states)} reference states for {len(edges)} edges: select them with states_at")
    y = states[0]
    for k in range(len(edges) - 1):
        t, s = edges[k].expand(len(y)), edges[k + 1].expand(len(y))
        y_end = path.jump(y, student(y, t, s, cond), t, s)
        yield pseudo_huber(y_end, states[k + 1], c).mean()
        y = y_end.detach() if on_policy else states[k + 1]


# ------------------------------------------------------------------------------------------------- solvers and samplers


def jumps(model, path, x, cond, edges):
    """Yield the state (B, ...) after each jump of `model` along `edges`; the next one begins there, without its gradient."""
    x = _wide(x)
    for t, s in itertools.pairwise(edges):
        t, s = t.expand(len(x)), s.expand(len(x))
        y = path.jump(x, model(x, t, s, cond), t, s)
        yield y
        x = y.detach()


@torch.no_grad()
def rollout_states(model, path, x_T, cond, edges):
    """States (K+1, B, ...) of `model` from x_T, one jump per phase; a guided teacher over path.grid(n): DDIM, Euler."""
    return torch.stack([_wide(x_T), *jumps(model, path, x_T, cond, edges)])


def sample(model, path, x_T, cond, steps=4):
    """Deterministic few-step sampler: where the rollout over path.grid(steps) ends. x_T ~ N(0, 1)."""
    return rollout_states(model, path, x_T, cond, path.grid(steps, x_T.device))[-1]


def calibration(model, path, x_T, cond, sampling_steps, bins=4, micro=16):
    """The two runs that hessian.py collects in, over every jump of samplers with K steps, K in `sampling_steps`, from x_T (B, ...).

    forward(set_bin) makes the jumps, 4 `micro` samples at a time, in `bins` equal parts of the path's time. backward() sends
    v ~ N(0, 1) back from where each jump arrives, `micro` samples at a time, and returns how many samples it sent.
    """

    def samplers(model, part):
        for rows in torch.arange(len(x_T)).split(part):
            for K in sampling_steps:
                yield from jumps(model, path, x_T[rows], {k: v[rows] for k, v in cond.items()}, path.grid(K, x_T.device))

    def forward(set_bin):
        def in_bins(x, t, s, cond):
            set_bin(min(bins - 1, int(bins * float(t[0]) / path.start)))
            return model(x, t, s, cond)

        for _ in samplers(in_bins, 4 * micro):
            pass

    def backward():
        generator, samples = torch.Generator().manual_seed(0), 0
        for y in samplers(model, micro):
            (torch.randn(y.shape, generator=generator).to(y) * y).sum().backward()
            samples += len(y)
        return samples

    return forward, backward


def states_at(states, times, edges):
    """Select from states (E, B, ...) at `times` (E,) those at `edges`, e.g. 2 phases of the 8 that were cached."""
    found = edges[:, None] == times
    if not bool(found.any(1).all()):
        raise ValueError(f"no cached state at times {edges[~found.any(1)].tolist()}")
    return states[found.int().argmax(1)]


# ----------------------------------------------------------------------------------------------------------------- demo


def main():
    """The CM of a Gaussian at full precision, with weights in 4 bits, and after 60 updates of a LoRA beside these.

    On a flow the exact networks of N(0, U diag(v) U^T) are U^T, a factor for each coordinate that t and s decide, and U: with
    tau_t^2 = (1-t)^2 v + t^2 the ODE scales a coordinate by tau_s / tau_t, and E[eps - x0 | x] = (t - (1-t) v) / tau_t^2 x."""
    torch.manual_seed(0)
    path, D, rank = FlowPath(), 32, 4
    grid, x_T, v_D, U_DD = path.grid(48), torch.randn(512, D), torch.logspace(0, -2, D), torch.linalg.qr(torch.randn(D, D))[0]
    weight_2DD = torch.stack([U_DD.T, U_DD])
    scale_2D1 = weight_2DD.abs().amax(2, keepdim=True) / 7
    low_bit_2DD = (weight_2DD / scale_2D1).round() * scale_2D1

    def network(factor, weight_2DD):
        return lambda x, t, s, cond: x @ weight_2DD[0].T * factor(t[:, None], s[:, None]) @ weight_2DD[1].T

    def tau(t):
        return ((1 - t) ** 2 * v_D + t**2).sqrt()

    def of_cm(t, s):
        return (tau(s) / tau(t) - 1) / (s - t)

    def fit(targets):
        A, B = (torch.randn(2, rank, D) / D**0.5).requires_grad_(), torch.zeros(2, D, rank, requires_grad=True)
        optimizer = torch.optim.AdamW([A, B], lr=1e-2, weight_decay=0)
        for step in range(60):
            networks["self"], edges = network(of_cm, low_bit_2DD + B @ A), phase_edges(grid, (1, 2, 4)[step % 3])
            states = rollout_states(networks["fp"], path, torch.randn(128, D), {}, edges)
            if targets:
                schedule, noise, idx = Schedule(path, grid, edges, targets), torch.randn(128, D), torch.randint(48, (128,))
                loss = tdpt_loss(networks, schedule, states[-1], {}, noise, idx).mean()
            else:
                loss = torch.stack([*rollout_phases(networks["self"], path, states, {}, edges)]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return network(of_cm, (low_bit_2DD + B @ A).detach())

    def report(name, model):
        error = [float((sample(model, path, x_T, {}, K) - end).norm() / end.norm()) for K in (1, 2, 4)]
        print(f"{name:40s}" + "".join(f"{e:8.1%}" for e in error))
        return error

    networks = {"teacher": network(lambda t, s: (t - (1 - t) * v_D) / tau(t) ** 2, weight_2DD)}
    networks |= {"fp": network(of_cm, weight_2DD), "anchor": network(of_cm, low_bit_2DD)}
    end = sample(networks["fp"], path, x_T, {}, 1)  # of the ODE
    print(f"{'distance to where the ODE ends, steps:':40s}" + "".join(f"{K:8d}" for K in (1, 2, 4)))
    report("the teacher's own solver", networks["teacher"])
    before = report("4-bit copy of the CM, the anchor", networks["anchor"])
    for targets in (("self", "self"), ("anchor", "fp"), ("fp", "fp")):
        report(f"  TDPT, targets ({', '.join(targets)})", fit(targets))
    after = report("  on-policy rollouts", fit(()))
    assert all(a < b for a, b in zip(after, before, strict=True)), "on-policy rollouts must repair the 4-bit copy"


if __name__ == "__main__":
    main()
