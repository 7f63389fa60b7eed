"""Properties of the Hessian-guided split. Oracle: float64 closed forms through the symmetric square root of H (no Cholesky)."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import hessian
import hgs_lora
import quant

SIBLINGS = ["zero", "pissa", "svdquant", "principal", "loftq", "qera"]


def make_H(K: int, kind: str, seed: int, rows: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, K, generator=generator, dtype=torch.float64)
    if kind == "outlier":
        x[:, :: max(1, K // 3)] *= 30
    elif kind == "correlated":
        x = x @ torch.randn(K, K, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, K, dtype=torch.float64)
    elif kind == "few rows":
        x = x[: max(1, K // 3)]
    elif kind == "offset":
        x = x + 5
    elif kind == "zero":
        x = x * 0
    return x.mT @ x / len(x)


def make_W(O: int, K: int, kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    w = torch.randn(O, K, generator=generator)
    if kind == "outlier":
        w[:, :1] *= 20
    return {"zero": w * 0, "constant": torch.full_like(w, 0.1), "tiny": w * 1e-12}.get(kind, w)


H_KINDS = st.sampled_from(["normal", "outlier", "correlated", "few rows", "offset", "zero"])
W_KINDS = st.sampled_from(["normal", "outlier", "zero", "constant", "tiny"])


def h_norm(E: torch.Tensor, H: torch.Tensor) -> float:
    """tr(E H E^T): the H-norm without any factor of H."""
    return float(((E.double() @ H) * E.double()).sum())


def reference(E: torch.Tensor, H: torch.Tensor, rank: int) -> torch.Tensor:
    """The best rank-r approximation of E in the H-norm, through the symmetric square root of H."""
    values, vectors = torch.linalg.eigh(H)
    U, S, Vt = torch.linalg.svd(E.double() @ (vectors * values.sqrt()) @ vectors.mT, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank] @ (vectors / values.sqrt()) @ vectors.mT


# ---------------------------------------------------------------- reference math


@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize("rank", [0, 16])
def test_subspace_iteration_leaves_what_the_exact_eigenvectors_leave(decay, rank):
    """Catches too few iterations or vectors, a basis that is not orthonormal, eigenvalues in another order. Flat spectra, where
    it converges slowest, and falling ones."""
    n = hgs_lora.EXACT + 64
    gen = torch.Generator().manual_seed(0)
    M = torch.randn(n, n, generator=gen, dtype=torch.float64) * torch.arange(1, n + 1) ** -decay
    gram, exact = M @ M.mT, torch.linalg.eigvalsh(M @ M.mT).flip(0)
    energy, basis = hgs_lora.strongest(gram, rank)
    assert energy.shape == (rank,) and torch.equal(energy, energy.sort(descending=True).values)
    assert torch.allclose(basis.mT @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-10)
    left = gram.trace() - (basis.mT @ gram @ basis).trace()
    assert exact[rank:].sum() * (1 - 1e-9) <= left <= 1.001 * exact[rank:].sum()
    M, few = M.float(), min(rank, 8)
    spectrum = hgs_lora.whitened_spectrum(M, torch.eye(n, dtype=torch.float64), rank=rank)
    assert len(spectrum) == rank and torch.allclose(spectrum[:few], exact[:few].sqrt(), rtol=0.01)


@given(st.integers(1, 40), st.integers(1, 40), H_KINDS, H_KINDS, st.floats(1e-8, 1e8), st.integers(0, 99))
def test_a_spectrum_from_float32_products_is_that_of_float64(O, K, kind, g_kind, unit, seed):
    """Catches: eigenvalues in float32 too, and strengths of G for which float32 has no numbers."""
    white = hgs_lora.Whitener(make_H(K, kind, seed)).of_layer(unit * make_H(O, g_kind, seed + 1))
    weighed = make_W(O, K, "normal", seed), hgs_lora.grid_cost(white).sqrt(), white.G_OO
    exact, single = (hgs_lora.whitened_spectrum(*weighed, dtype=dtype).square() for dtype in (torch.float64, torch.float32))
    assert single.dtype == torch.float64 and (single - exact).abs().max() <= 1e-5 * exact[0]


@pytest.mark.parametrize("O", (8, 48))
@pytest.mark.parametrize("on_grid", (False, True))
def test_a_layer_of_zeros_or_on_the_grid_with_a_dead_input_has_a_split(O, on_grid):
    """Catches a cost of 0 that is divided by: a pruned or zero-initialised layer, an input that never fires and costs nothing."""
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    N_K = (x - quant.dequantize_activation(*quant.quantize_activation(x, 16), 24)).square().mean(0)
    white = hgs_lora.Whitener(x.T @ x / len(x)).of_layer(torch.eye(O), N_K)
    W = quant.dequantize(quant.quantize_weight(make_W(O, 24, "normal", 0), 16)) if on_grid else torch.zeros(O, 24)
    gw, A, B = hgs_lora.decompose(W, white, 2, group=16)
    assert torch.isfinite(A).all() and torch.isfinite(B).all()
    assert hgs_lora.relative_error(W, white.L_KK, gw, A, B) < 1e-2
    assert torch.isfinite(hgs_lora.whitened_spectrum(W, hgs_lora.grid_cost(white).sqrt(), white.G_OO, 8)).all()


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 24), H_KINDS, st.integers(0, 999))
@example(O=3, K=9, r=2, kind="correlated", seed=0)
@example(O=9, K=3, r=2, kind="correlated", seed=0)
def test_closed_form_equals_the_float64_reference_on_both_gram_sides(O, K, r, kind, seed):
    """Catches: a transposed Cholesky factor, L where L^-1 belongs, the smallest instead of the largest components."""
    rank, white, E = min(r, O, K), hgs_lora.Whitener(make_H(K, kind, seed)), make_W(O, K, "normal", seed).double()
    A, B = hgs_lora.whitened_svd(E, white.L_KK, rank)
    assert A.shape == (rank, K) and B.shape == (O, rank) and A.dtype == B.dtype == torch.float64
    best = reference(E, white.H_KK, rank)
    assert h_norm(B @ A - best, white.H_KK) <= 1e-10 * h_norm(E, white.H_KK)
    spectrum = hgs_lora.whitened_spectrum(E, white.L_KK)
    assert torch.isclose(
        spectrum[rank:].square().sum(), torch.tensor(h_norm(E - B @ A, white.H_KK)).double(), rtol=1e-6, atol=1e-12
    )
    assert (spectrum.diff() <= 0).all()


def gh_norm(E: torch.Tensor, G: torch.Tensor, H: torch.Tensor) -> float:
    """tr(G E H E^T): the norm of G (x) H without any factor."""
    return float((G.double() @ E.double() @ H * E.double()).sum())


@given(st.integers(1, 16), st.integers(1, 16), H_KINDS, H_KINDS, st.floats(1e-8, 1e8), st.integers(0, 999))
def test_closed_form_with_gradients_is_optimal_in_the_kronecker_norm(O, K, kind, g_kind, unit, seed):
    """Catches: R on the wrong side or transposed, R for R^-1, factors whose balance depends on the unit of G."""
    rank, E = (min(O, K) + 1) // 2, make_W(O, K, "normal", seed).double()
    G = unit * make_H(O, g_kind, seed + 7)
    white = hgs_lora.Whitener(make_H(K, kind, seed)).of_layer(G)
    damped = white.R_OO.mT @ white.R_OO
    assert not G.any() or torch.allclose(damped, hessian.damp(G, 0.01), rtol=1e-9, atol=1e-12 * unit)
    A, B = hgs_lora.whitened_svd(E, white.L_KK, rank, white.R_OO)
    error, spectrum = gh_norm(E - B @ A, damped, white.H_KK), hgs_lora.whitened_spectrum(E, white.L_KK, white.G_OO)
    total = gh_norm(E, damped, white.H_KK)
    assert abs(error - float(spectrum[rank:].square().sum())) <= 1e-7 * total + 1e-300
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        dA, dB = (1e-2 * torch.randn(m.shape, generator=generator).double() * m.abs().mean() for m in (A, B))
        assert gh_norm(E - (B + dB) @ (A + dA), damped, white.H_KK) >= error - 1e-9 * total
    other = hgs_lora.whitened_svd(E, white.L_KK, rank, 1e3 * white.R_OO)
    assert all(torch.isclose(new.norm(), old.norm(), rtol=1e-5) for new, old in zip(other, (A, B), strict=True))


@given(st.integers(2, 12), st.integers(2, 20), H_KINDS, st.integers(0, 999))
def test_split_error_is_the_mean_squared_error_that_reaches_the_picture(O, K, kind, seed):
    """Catches: noise through BA instead of through Q, R forgotten on one of the two parts."""
    W, H, G = make_W(O, K, "normal", seed), make_H(K, kind, seed), make_H(O, "normal", seed + 3)
    noise = torch.rand(K, generator=torch.Generator().manual_seed(seed)).double()
    white = hgs_lora.Whitener(H).of_layer(G, noise)
    gw, A, B = hgs_lora.decompose(W, white, 1, "pissa", group=8)
    Q = quant.dequantize(gw).double()
    damped = white.R_OO.mT @ white.R_OO
    expected = gh_norm(W - Q - B.double() @ A.double(), damped, white.H_KK) + gh_norm(Q, damped, torch.diag(noise))
    assert abs(hgs_lora.split_error(W, white.L_KK, gw, A, B, white.R_OO, noise) - expected) <= 1e-9 * expected + 1e-12


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
@pytest.mark.parametrize("kind", ["normal", "outlier", "correlated"])
def test_hgs_with_gradients_and_noise_beats_every_sibling_in_that_norm(kind, rounding):
    """Catches a search that keeps the best by another error than the one it is asked for."""
    O, K, rank = 24, 32, 4
    W, G = make_W(O, K, "outlier", 1), make_H(O, "correlated", 5)
    H = make_H(K, kind, 1)
    white = hgs_lora.Whitener(H).of_layer(G, 0.01 * H.diagonal())
    error = {
        method: hgs_lora.split_error(W, white.L_KK, *split, white.R_OO, white.noise_K)
        for method in hgs_lora.METHODS
        for split in [hgs_lora.decompose(W, white, rank, method, group=8, rounding=rounding)]
    }
    assert error["hgs"] == min(error.values()) and error["hgs"] < 0.9 * min(error[m] for m in SIBLINGS)


@given(st.integers(1, 20), H_KINDS, st.integers(0, 99))
def test_what_the_grid_costs_needs_no_more_than_diagonals(K, kind, seed):
    """Catches: noise that is forgotten where H is a diagonal, a cost of 0, damping left out."""
    H, noise = make_H(K, kind, seed), torch.rand(K, generator=torch.Generator().manual_seed(seed))
    noise[0] = 0
    expected = hgs_lora.LEFT * hessian.damp(H).diagonal()
    for part in (H, H.diagonal()):
        white = hgs_lora.Whitener(part)
        assert torch.allclose(hgs_lora.grid_cost(white), expected, rtol=1e-12) and (expected > 0).all()
        assert torch.allclose(hgs_lora.grid_cost(white.of_layer(torch.eye(2), noise)), expected + noise.double(), rtol=1e-12)


@pytest.mark.parametrize("kind,quotient", [("normal", 0.93), ("offset", 0.065)])
def test_gptq_leaves_the_share_of_the_error_that_inputs_do_not_explain_of_each_other(kind, quotient):
    """The derivation of c. Catches: a GPTQ that feeds nothing back, conditional variances taken in another order."""
    W, white = make_W(512, 64, "normal", 0), hgs_lora.Whitener(make_H(64, kind, 0))
    H_K, w2_K = white.H_KK.diagonal(), W.double().square().sum(0)
    d_K = torch.linalg.cholesky(white.H_KK.flip(0, 1)).flip(0, 1).diagonal().square()  # given the inputs with larger k
    factor = {"rtn": None, "gptq": white.gptq_factor(64, 1)}
    gw = {how: quant.quantize_weight(W, 64, 1, white.H_KK, how, factor=factor[how]) for how in factor}
    error = {how: hgs_lora.split_error(W, white.L_KK, gw[how]) for how in gw}
    rho = float((W.double() - quant.dequantize(gw["rtn"])).square().sum() / w2_K.sum())
    assert rho == pytest.approx(0.01, rel=0.1) and float(d_K.sum() / H_K.sum()) == pytest.approx(quotient, rel=0.05)
    assert error["rtn"] == pytest.approx(rho * float((w2_K * H_K).sum()), rel=0.05)
    assert error["gptq"] == pytest.approx(rho * float((w2_K * d_K).sum()), rel=0.05)


def test_layers_of_one_input_share_the_factors_of_h_whoever_asks_first():
    """Catches a Cholesky factor for each copy of a Whitener."""
    white = hgs_lora.Whitener(make_H(8, "normal", 0))
    first, second = (white.of_layer(torch.eye(3)) for _ in range(2))
    assert first.L_KK is second.L_KK is white.L_KK and first.gptq_factor(8, 1) is second.gptq_factor(8, 1)


def test_gradients_of_a_layer_without_influence_or_of_another_shape():
    """Catches a Cholesky factor of zero, and a G that belongs to another layer."""
    W, white = make_W(6, 8, "normal", 0), hgs_lora.Whitener(make_H(8, "normal", 0))
    dead = white.of_layer(torch.zeros(6, 6))
    assert hgs_lora.whitened_spectrum(W, dead.L_KK, dead.G_OO).max() < 1e-4 and white.R_OO is None
    assert all(torch.isfinite(part).all() for part in hgs_lora.decompose(W, dead, 2, group=8)[1:])
    with pytest.raises(ValueError, match="gradients must be 6 x 6"):
        hgs_lora.decompose(W, white.of_layer(torch.eye(5)), 2, group=8)
    with pytest.raises(ValueError, match="gradients contain inf"):
        white.of_layer(torch.full((6, 6), torch.inf))


def test_gradients_are_collected_where_something_reads_them():
    """Catches passes that cost four times as much and that nothing uses, and a split or rule that is denied G."""
    assert hgs_lora.wants_gradients("kron", "hgs", ()) and hgs_lora.wants_gradients("kron", "zero", ("spectrum",))
    assert not hgs_lora.wants_gradients("kron", "qera", ()) and not hgs_lora.wants_gradients("kron", "qera", ("variation",))
    assert not hgs_lora.wants_gradients("input", "hgs", ("spectrum",))


@given(st.integers(2, 16), st.integers(2, 16), H_KINDS, st.integers(0, 999))
def test_factors_are_balanced_in_the_h_norm(O, K, kind, seed):
    """Catches: S on one side only, S^1/2 forgotten, unsorted components, strengths of other components."""
    rank, white = (min(O, K) + 1) // 2, hgs_lora.Whitener(make_H(K, kind, seed))
    E = make_W(O, K, "normal", seed)
    A, B = hgs_lora.whitened_svd(E, white.L_KK, rank)
    S = torch.linalg.svdvals(E.double() @ white.L_KK)[:rank]
    assert torch.allclose(B.mT @ B, torch.diag(S), atol=1e-6 * S[0])
    assert torch.allclose(A @ white.H_KK @ A.mT, torch.diag(S), atol=1e-6 * S[0])


@given(H_KINDS, st.integers(1, 20), st.integers(0, 99))
def test_whitener_factors_the_damped_hessian_with_a_lower_triangle(kind, K, seed):
    """Catches: L^T instead of L, damping left out of one of the two."""
    H = make_H(K, kind, seed)
    white = hgs_lora.Whitener(H)
    assert torch.equal(white.L_KK, white.L_KK.tril())
    assert torch.allclose(white.L_KK @ white.L_KK.mT, hessian.damp(H, 0.01), rtol=1e-9)
    assert torch.equal(white.H_KK, hessian.damp(H, 0.01))


@given(st.integers(2, 16), st.integers(2, 16), H_KINDS, st.integers(0, 999))
def test_hgs_correction_beats_50_random_rank_r_alternatives(O, K, kind, seed):
    """Catches: any suboptimal correction. The rivals have the best B for their random A, or are neighbours of the answer."""
    generator = torch.Generator().manual_seed(seed)
    white = hgs_lora.Whitener(make_H(K, kind, seed))
    H, W, rank = white.H_KK, make_W(O, K, "normal", seed).double(), max(1, min(O, K) // 3)
    E = W - quant.dequantize(quant.quantize_weight(W.float(), group=8))
    A, B = hgs_lora.whitened_svd(E, white.L_KK, rank)
    mine = h_norm(E - B @ A, H)
    for i in range(50):
        noise_A = torch.randn(rank, K, generator=generator, dtype=torch.float64)
        rival_A = noise_A if i % 2 else A + 10.0 ** -(i % 5) * A.norm() * noise_A
        rival_B = torch.linalg.lstsq(rival_A @ H @ rival_A.mT, rival_A @ H @ E.mT).solution.mT
        assert mine <= h_norm(E - rival_B @ rival_A, H) * (1 + 1e-9) + 1e-25


# ---------------------------------------------------------------- decomposition


@given(st.integers(4, 20), st.integers(4, 40), H_KINDS, W_KINDS, st.sampled_from(["rtn", "gptq"]), st.integers(0, 99))
def test_hgs_is_never_worse_than_qera_or_zero_on_any_input(O, K, kind, w_kind, rounding, seed):
    """Catches: a missing first candidate, keeping the last instead of the best."""
    W, H, rank = make_W(O, K, w_kind, seed), make_H(K, kind, seed), max(1, min(O, K) // 4)
    white = hgs_lora.Whitener(H)
    errors = {
        method: h_norm(W.double() - quant.dequantize(gw).double() - B.double() @ A.double(), white.H_KK)
        for method in ("hgs", "qera", "zero")
        for gw, A, B in [hgs_lora.decompose(W, white, rank, method, group=8, rounding=rounding)]
    }
    slack = 1e-6 * h_norm(W, white.H_KK)
    assert errors["hgs"] <= errors["qera"] + slack and errors["qera"] <= errors["zero"] + slack


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
@pytest.mark.parametrize("kind", ["normal", "outlier", "correlated", "offset"])
@pytest.mark.parametrize("shape", [(96, 64, 1), (64, 128, 1), (32, 16, 9)])
def test_hgs_keeps_less_error_than_every_sibling_at_equal_rank(shape, kind, rounding):
    """Catches: alternation switched off, the plain norm used for the start, GPTQ missing at the end."""
    O, I, taps = shape
    W, white = make_W(O, I * taps, "normal", 0), hgs_lora.Whitener(make_H(I * taps, kind, 0))
    options = dict(rank=8, group=32, taps=taps, rounding=rounding, generator=torch.Generator().manual_seed(0))
    errors = {
        m: hgs_lora.relative_error(W, white.L_KK, *hgs_lora.decompose(W, white, method=m, **options)) for m in hgs_lora.METHODS
    }
    assert set(errors) == {"hgs", *SIBLINGS}
    assert all(errors["hgs"] < errors[m] for m in SIBLINGS), errors


@given(st.integers(4, 16), st.integers(4, 40), H_KINDS, W_KINDS, st.sampled_from(["rtn", "gptq"]), st.integers(0, 99))
def test_alternation_never_increases_the_error(O, K, kind, w_kind, rounding, seed):
    """Catches: keeping the last candidate, comparing with the wrong sign, storing the error of another candidate."""
    seen, true = [], hgs_lora.split_error

    def spy(*args):
        seen.append(true(*args))
        return seen[-1]

    W, white = make_W(O, K, w_kind, seed), hgs_lora.Whitener(make_H(K, kind, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hgs_lora, "split_error", spy)
        gw, A, B = hgs_lora.decompose(W, white, 3, "hgs", group=8, rounding=rounding, iters=6)
    assert len(seen) == 7
    assert true(W, white.L_KK, gw, A, B) <= min(seen) + 1e-6 * h_norm(W, white.H_KK)


def test_alternation_pays():
    """Catches: a loop that never accepts a candidate."""
    W, white = make_W(64, 64, "normal", 0), hgs_lora.Whitener(make_H(64, "correlated", 0))
    error = {n: hgs_lora.relative_error(W, white.L_KK, *hgs_lora.decompose(W, white, 8, group=32, iters=n)) for n in (0, 2, 8)}
    assert error[8] < error[2] < error[0]


@given(st.sampled_from(["loftq", "pissa", "principal", "zero", "qera"]), H_KINDS, st.integers(0, 99))
def test_closed_form_improves_the_correction_of_every_sibling(method, kind, seed):
    """Catches: a BA-step that is not optimal for the Q it is given."""
    W, white = make_W(24, 16, "normal", seed), hgs_lora.Whitener(make_H(16, kind, seed))
    gw, A, B = hgs_lora.decompose(W, white, 4, method, group=8)
    E = W.double() - quant.dequantize(gw).double()
    best_A, best_B = hgs_lora.whitened_svd(E, white.L_KK, 4)
    assert h_norm(E - best_B @ best_A, white.H_KK) <= h_norm(E - B.double() @ A.double(), white.H_KK) * (1 + 1e-6)


def test_siblings_are_what_their_papers_say():
    """Catches: methods swapped in the table, W - BA rounded where W is meant, B not zero for QLoRA."""
    W, white = make_W(16, 24, "normal", 0), hgs_lora.Whitener(make_H(24, "correlated", 0))

    def split(method, **options):
        gw, A, B = hgs_lora.decompose(W, white, 4, method, group=8, rounding="rtn", **options)
        return quant.dequantize(gw), B @ A

    def low_rank(E):
        U, S, Vt = torch.linalg.svd(E.double(), full_matrices=False)
        return ((U[:, :4] * S[:4]) @ Vt[:4]).float()

    def to_grid(E):
        return quant.dequantize(quant.quantize_weight(E, 8, 1, white.H_KK, "rtn"))

    close = dict(rtol=1e-4, atol=1e-5)
    Q, BA = split("zero")
    assert torch.equal(Q, to_grid(W)) and not BA.any()
    for method in ("pissa", "svdquant"):
        Q, BA = split(method)
        assert torch.allclose(BA, low_rank(W), **close) and (Q - to_grid(W - low_rank(W))).norm() <= 1e-3 * Q.norm()
    Q, BA = split("loftq", iters=1)
    assert torch.equal(Q, to_grid(W)) and torch.allclose(BA, low_rank(W - to_grid(W)), **close)
    Q, BA = split("qera")
    assert torch.equal(Q, to_grid(W)) and torch.allclose(BA, reference(W - Q, white.H_KK, 4).float(), **close)
    Q, BA = split("principal")
    assert torch.allclose(BA, reference(W, white.H_KK, 4).float(), **close)
    assert all(torch.equal(a, b) for a, b in zip(split("hgs", iters=0), split("qera"), strict=True))


@given(st.sampled_from(sorted(hgs_lora.METHODS)), st.sampled_from(["zero", "tiny"]))
def test_no_rank_is_born_dead_and_the_draw_is_reproducible(method, w_kind):
    """Catches: A = 0 and B = 0 together (their gradients vanish for ever), a global random stream."""
    W, H = make_W(8, 16, w_kind, 0), make_H(16, "normal", 0)
    draws = [hgs_lora.decompose(W, H, 4, method, group=8, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(draws[0][1:], draws[1][1:], strict=True))
    _, A, B = draws[0]
    assert A.any(1).all() and A.isfinite().all() and B.isfinite().all()
    if w_kind == "zero":
        assert not (B @ A).any()


def test_layers_that_share_an_input_share_one_factorization(monkeypatch):
    """Catches: a Cholesky per layer (minutes for a whole model), a cached factor of another padding."""
    calls, true = [], quant.inverse_factor
    monkeypatch.setattr(quant, "inverse_factor", lambda *a: calls.append(a[1:]) or true(*a))
    H, W = make_H(24, "correlated", 0), make_W(8, 24, "normal", 0)
    white = hgs_lora.Whitener(H)
    shared = [hgs_lora.decompose(W, white, 2, group=16) for _ in range(3)]
    assert calls == [(16, 1)]
    gw, A, B = hgs_lora.decompose(W, H, 2, group=16)
    assert torch.equal(gw.codes_OK, shared[0][0].codes_OK) and torch.equal(A, shared[0][1]) and torch.equal(B, shared[0][2])
    hgs_lora.decompose(W, white, 2, group=16, taps=2)
    assert calls[-1] == (16, 2)


def test_bad_requests_are_one_clear_sentence():
    """Catches: a silent cap of the rank, NaN factors from a NaN Hessian, a KeyError for an unknown method."""
    W, H = make_W(8, 16, "normal", 0), make_H(16, "normal", 0)
    for bad, message in [
        (dict(rank=9), r"rank 9 is outside 0\.\.8 of a 8 x 16 layer"),
        (dict(rank=-1), "rank -1"),
        (dict(rank=2, method="best"), "init method must be one of zero, pissa"),
        (dict(rank=2, rounding="up"), "rounding must be one of"),
        (dict(rank=2, group=24), "group size"),
    ]:
        with pytest.raises(ValueError, match=message):
            hgs_lora.decompose(W, H, **{"group": 8, **bad})
    with pytest.raises(ValueError, match="the Hessian contains inf or nan"):
        hgs_lora.decompose(W, H * float("nan"), 2, group=8)
    with pytest.raises(ValueError, match="weights contain inf or NaN"):
        hgs_lora.decompose(W / 0, H, 2, group=8)
    with pytest.raises(ValueError, match="must be 16 x 16"):
        hgs_lora.decompose(W, make_H(8, "normal", 0), 2, group=8)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_split_error_is_the_measured_output_error_of_the_calibration_set(kind):
    """Catches: the Hessian, the flattened weight and the convolution disagreeing about the order of K; undamped H here."""
    torch.manual_seed(0)
    layer = nn.Conv2d(20, 12, 3, stride=2, padding=1, bias=False) if kind == "conv" else nn.Linear(20, 12, bias=False)
    x = torch.randn(*((2, 20, 7, 6) if kind == "conv" else (2, 5, 20)))
    (stats,) = next(hessian.collect_passes(layer, [""], lambda set_bin: [layer(half) for half in x.split(1)])).values()
    w_OK, taps = (quant.flatten_conv(layer.weight), 9) if kind == "conv" else (layer.weight, 1)
    gw, A, B = hgs_lora.decompose(w_OK.detach(), stats.H_KK, 4, group=16, taps=taps)
    kept = quant.dequantize(gw) + B @ A
    kept = kept if kind == "linear" else quant.unflatten_conv(kept, (3, 3))
    with torch.no_grad():
        difference = layer(x).double() - (F.linear(x, kept) if kind == "linear" else F.conv2d(x, kept, None, 2, 1)).double()
    measured = difference.square().sum() / stats.count
    values, vectors = torch.linalg.eigh(stats.H_KK.double())
    root = vectors * values.clamp_min(0).sqrt()  # few rows: H is singular, and any square root gives the same norm
    assert hgs_lora.split_error(w_OK.detach(), root, gw, A, B) == pytest.approx(float(measured), rel=1e-3)
