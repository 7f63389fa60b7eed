"""HGS-LoRA: the Hessian-guided split of a weight, W ~ Q + B A, with Q on the INT4 grid and B A of rank r in 16 bits.

For a layer y = W x with H = E[x x^T] = L L^T (hessian.py) an error matrix E costs E||E x||^2 = ||E L||_F^2, its H-norm.
With G = R^T R, the second moments of the gradients at y, the error that reaches the picture is ||R E L||_F^2, its GH-norm.
[A] "Hessian-guided matrix decomposition initialises LoRA"; [R] the closed form with R = 1 is the one of QERA / CLoQ:

    BA-step   BA = R^-1 SVD_r(R (W - Q) L) L^-1     the best rank-r correction of Q; the squared tail of the spectrum remains
    Q-step    Q  = round(W - BA)                    to the INT4 grid, nearest or GPTQ (quant.py)

hgs [O] alternates the two and keeps the best pair by ||R (W - Q - BA) L||_F^2 + ||R Q N^1/2||_F^2 (`split_error`), where
N = E (x - q(x))^2 for each input. The branch reads x unrounded, so what is moved into it escapes the rounding of activations too,
and that is most of the error. The alternation begins with BA = R^-1 SVD_r(R W C^1/2) C^-1/2, C = `grid_cost`, or, where N is
unknown, with W L in place of W C^1/2. All but the last GPTQ_STEPS of the Q-steps round to nearest. The first candidate has the
same Q as qera, so hgs is never worse than qera. The other methods use neither G nor N.

With R (W - Q) L = U S V^T and R = 1 the factors are balanced, B = U S^1/2 and A = S^1/2 V^T L^-1, so that both learn at one rate.
U comes from the smaller Gram side, in float64 (`strongest`). If O <= K no inverse is needed at all, because
S V^T L^-1 = U^T (W - Q); otherwise A is a triangular solve. Components of (relatively) zero strength get a random row in A and a
zero column in B, as in QLoRA: the product does not change, and every rank can learn.

Methods with one signature, chosen by name from METHODS (all on the same grid, with the same rounding):

    zero       QLoRA      Q = round(W), B = 0
    pissa      PiSSA      BA = SVD_r(W), Q = round(W - BA)
    svdquant   SVDQuant   the same split of the smoothed W: W and H are those of the smoothed layer
    principal  [R]        BA = SVD_r(W L) L^-1, Q = round(W - BA): the sensitive directions leave the grid, no alternation
    loftq      LoftQ      Q = round(W - BA) and BA = SVD_r(W - Q) in turn, from BA = 0
    qera       QERA       Q = round(W), BA-step

Dimension key: quant.py (O, I, K, r). A is (r, K), B is (O, r). The layers that carry a split are in layers.py.
Left out on purpose: the correlation of x with its rounding error.
"""

import copy
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

import hessian
import quant

EXACT = 512  # rows of Gram matrices whose eigenvectors are all computed
LEFT = 1e-3  # c of `grid_cost`: what rounding with GPTQ leaves of a squared weight
GPTQ_STEPS = 2  # last Q-steps of hgs that round by GPTQ where that is asked for; the others round to nearest, which is cheaper and
# ends lower than GPTQ throughout (the demo's layer, 8 steps: 0.035% against 0.040%)

# ---------------------------------------------------------------- reference math


class Whitener:
    """The norm in which an error of one layer is measured: damped H = L L^T (L lower) and GPTQ's factor of it, and what `of_layer`
    adds, damped G = R^T R (R upper) and N. Factors are computed where they are first asked for. Everything is float64.

    Layers that share their input (q, k, v) can share those of H: build one for each `Stats`, pass it to each `decompose`.
    H may be its diagonal (K,) alone, which is enough for `grid_cost`. ValueError for inf or nan."""

    def __init__(self, H_KK: Tensor):
        if not torch.isfinite(H_KK).all():
            raise ValueError("the Hessian contains inf or nan")
        self.H_KK = hessian.damp(H_KK)
        self.G_OO: Tensor | None = None
        self.noise_K: Tensor | None = None
        self._factors: dict = {}  # of H, shared by the layers that read one input
        self._R_OO: Tensor | None = None

    @property
    def L_KK(self) -> Tensor:
        if "L" not in self._factors:
            self._factors["L"] = torch.linalg.cholesky(self.H_KK)
        return self._factors["L"]

    def of_layer(self, G_OO: Tensor, noise_K: Tensor | None = None) -> "Whitener":
        """The same H with what belongs to one of the layers that read it: the second moments G_OO of the gradients at its output,
        and noise_K, the mean squared rounding error of each input. ValueError for inf or nan."""
        if not torch.isfinite(G_OO).all():
            raise ValueError("the second moments of the gradients contain inf or nan")
        new = copy.copy(self)
        new.G_OO = hessian.damp(G_OO) if G_OO.any() else 1e-12 * torch.eye(len(G_OO), dtype=torch.float64, device=G_OO.device)
        new.noise_K, new._R_OO = None if noise_K is None else noise_K.double(), None
        return new

    @property
    def R_OO(self) -> Tensor | None:
        if self._R_OO is None and self.G_OO is not None:
            self._R_OO = torch.linalg.cholesky(self.G_OO).mT
        return self._R_OO

    def gptq_factor(self, group: int, taps: int) -> tuple[Tensor, Tensor]:
        if (group, taps) not in self._factors:
            self._factors[group, taps] = quant.inverse_factor(self.H_KK, group, taps)
        return self._factors[group, taps]


def _times(E_OK: Tensor, L: Tensor) -> Tensor:
    """E L, for L (K, K) or the diagonal (K,) of a diagonal matrix."""
    return E_OK * L if L.dim() == 1 else E_OK @ L


def strongest(gram_nn: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues of a Gram matrix, descending, and their eigenvectors (n, rank), float64.

    They are exact for n up to EXACT, beyond they come from subspace iteration (Halko et al. 2011) with 2 r + 16 vectors, four times
    V <- orth(gram gram V). What that leaves is less than 0.1% above the exact remainder for Gaussian matrices and falling spectra,
    and 0.7% above it in the worst case that was found (64 equal eigenvalues, then 209 of 0.9 times their size)."""
    n, width = len(gram_nn), 2 * rank + 16
    if n <= max(EXACT, 4 * width):
        energy, basis = torch.linalg.eigh(gram_nn)
        return energy[n - rank :].flip(0), basis[:, n - rank :].flip(1)
    V = torch.randn(n, width, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(gram_nn)
    for _ in range(4):
        V = torch.linalg.qr(gram_nn @ (gram_nn @ V))[0]
    energy, mix = torch.linalg.eigh(V.mT @ (gram_nn @ V))
    return energy[width - rank :].flip(0), V @ mix[:, width - rank :].flip(1)


def whitened_svd(E_OK: Tensor, L_KK: Tensor | None, rank: int, R_OO: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The BA-step: (A_rK, B_Or), float64, that minimise ||R (E - B A) L||_F. None stands for the identity; L may be the diagonal
    (K,) of a diagonal matrix."""
    if R_OO is not None:
        R_OO = R_OO / R_OO.square().sum().div(len(R_OO)).sqrt()  # the units of G must not unbalance A and B
        A_rK, B_Or = whitened_svd(R_OO @ E_OK.double(), L_KK, rank)
        return A_rK, torch.linalg.solve_triangular(R_OO, B_Or, upper=True)
    E_OK = E_OK.double()
    M_OK = E_OK if L_KK is None else _times(E_OK, L_KK)
    wide = M_OK.shape[0] <= M_OK.shape[1]
    energy, basis = strongest(M_OK @ M_OK.mT if wide else M_OK.mT @ M_OK, rank)  # wide: U_Or, else: V_Kr
    S_r = energy.clamp_min(0).sqrt()
    strong = S_r > 1e-6 * S_r[:1]
    up = torch.where(strong, S_r, 0.0).sqrt()
    down = torch.where(strong, S_r.rsqrt(), 0.0)
    if wide:
        return down[:, None] * (basis.mT @ E_OK), basis * up
    Vt_rK = basis.mT
    if L_KK is not None:
        Vt_rK = Vt_rK / L_KK if L_KK.dim() == 1 else torch.linalg.solve_triangular(L_KK, Vt_rK, upper=False, left=False)
    return up[:, None] * Vt_rK, (M_OK @ basis) * down


def whitened_gram(E_OK: Tensor, L_KK: Tensor, G_OO: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """M M^T of M = R E L (O, K), or M^T M = (E L)^T G (E L) if O > K, where a Cholesky factor of G would be most of the work. L is
    as in whitened_svd. dtype: of the products, which take most of the time; what is returned is float64."""
    M = _times(E_OK.to(dtype), L_KK.to(dtype))
    if len(E_OK) > E_OK.shape[1]:
        return (M.mT @ (M if G_OO is None else G_OO.to(dtype) @ M)).double()
    M = M if G_OO is None else torch.linalg.cholesky(G_OO).mT.to(dtype) @ M
    return (M @ M.mT).double()


def whitened_spectrum(
    E_OK: Tensor, L_KK: Tensor, G_OO: Tensor | None = None, rank: int | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Singular values of R E L, the first `rank` (at most min(O, K)) or all of them, descending, float64: what QRA weighs, with
    E = W or the residual W - Q. Arguments are as in whitened_gram, where float32 moves the 256 strongest of 3,072 values by
    less than 2e-7."""
    gram = whitened_gram(E_OK, L_KK, G_OO, dtype)
    return strongest(gram, len(gram) if rank is None else min(rank, len(gram)))[0].clamp_min(0).sqrt()


def split_error(w_OK: Tensor, L_KK: Tensor, gw: quant.GridWeight, A_rK=None, B_Or=None, R_OO=None, noise_K=None) -> float:
    """||R (W - Q - BA) L||_F^2 + ||R Q N^1/2||_F^2: without R and N the mean squared error of the layer's output that is due to its
    weight."""
    Q_OK = quant.dequantize(gw).double()
    E_OK = w_OK.double() - Q_OK
    if A_rK is not None:
        E_OK = E_OK - B_Or.double() @ A_rK.double()
    parts = [E_OK @ L_KK] + ([] if noise_K is None else [Q_OK * noise_K.sqrt()])
    return sum(float((part if R_OO is None else R_OO @ part).square().sum()) for part in parts)


def relative_error(w_OK: Tensor, L_KK: Tensor, gw: quant.GridWeight, A_rK=None, B_Or=None) -> float:
    """split_error / ||W L||_F^2 without R and N, for tables; without A and B it is the error before the correction."""
    energy = float((w_OK.double() @ L_KK).square().sum())
    return split_error(w_OK, L_KK, gw, A_rK, B_Or) / energy if energy > 0 else 0.0


# ---------------------------------------------------------------- methods: each returns (GridWeight, A_rK, B_Or), float64


def _random_rows(rows: int, K: int, like: Tensor, generator) -> Tensor:
    """Uniform in +-1/sqrt(K), drawn on the CPU so that the device does not change the numbers."""
    return ((2 * torch.rand(rows, K, generator=generator, dtype=torch.float64) - 1) / K**0.5).to(like)


def zero(w_OK, white, rank, round_to_grid, iters, generator):
    A_rK = _random_rows(rank, w_OK.shape[1], w_OK, generator)
    return round_to_grid(w_OK), A_rK, w_OK.new_zeros(len(w_OK), rank)


def pissa(w_OK, white, rank, round_to_grid, iters, generator):
    A_rK, B_Or = whitened_svd(w_OK, None, rank)
    return round_to_grid(w_OK - B_Or @ A_rK), A_rK, B_Or


def principal(w_OK, white, rank, round_to_grid, iters, generator):
    A_rK, B_Or = whitened_svd(w_OK, white.L_KK, rank)
    return round_to_grid(w_OK - B_Or @ A_rK), A_rK, B_Or


def loftq(w_OK, white, rank, round_to_grid, iters, generator):
    BA_OK = torch.zeros_like(w_OK)
    for _ in range(max(1, iters)):
        gw = round_to_grid(w_OK - BA_OK)
        A_rK, B_Or = whitened_svd(w_OK - quant.dequantize(gw), None, rank)
        BA_OK = B_Or @ A_rK
    return gw, A_rK, B_Or


def qera(w_OK, white, rank, round_to_grid, iters, generator):
    gw = round_to_grid(w_OK)
    return gw, *whitened_svd(w_OK - quant.dequantize(gw), white.L_KK, rank)


#     E e_k^2 = rho w_k^2                    a weight that is rounded to nearest: rho = 0.01 for Gaussian weights in groups of 64
#     E ||E L||^2 = rho sum_k w_k^2 H_kk    of errors that are independent of each other: c = rho
#     E ||E L||^2 = rho sum_k w_k^2 d_k     with GPTQ: d_k is the variance of input k that those rounded after it do not explain
#     c = rho sum_k d_k / sum_k H_kk        so that, for weights of one size, both cost the same
# The quotient of the sums is about 0.1 (median of the layers 0.11 on tiny, 0.12 on tiny-flux), so that c = 0.01 * 0.1. The other
# cost, N_k of activations in 4 bits and groups of 16, is 0.008 H_kk there, eight times as large; so c need not be exact, and it is
# a constant here, LEFT. Then `grid_cost` reads no more of H than its diagonal.


def grid_cost(white: Whitener) -> Tensor:
    """(K,) what a squared weight of each input costs while it is on the grid: N_k for the rounding of x, c H_kk for the rounding of
    the weight itself."""
    H_K = hessian.diagonal(white.H_KK)
    return LEFT * H_K + (0 if white.noise_K is None else white.noise_K)  # never 0: H is damped, N of a dead input is not


def hgs(w_OK, white, rank, round_to_grid, iters, generator):
    L_KK, R_OO, noise_K = white.L_KK, white.R_OO, white.noise_K
    gw = round_to_grid(w_OK)
    best = gw, *whitened_svd(w_OK - quant.dequantize(gw), L_KK, rank, R_OO)
    least = split_error(w_OK, L_KK, *best, R_OO, noise_K)
    A_rK, B_Or = whitened_svd(w_OK, L_KK if noise_K is None else grid_cost(white).sqrt(), rank, R_OO)
    for i in range(iters):
        gw = round_to_grid(w_OK - B_Or @ A_rK, nearest=i < iters - GPTQ_STEPS)
        A_rK, B_Or = whitened_svd(w_OK - quant.dequantize(gw), L_KK, rank, R_OO)
        error = split_error(w_OK, L_KK, gw, A_rK, B_Or, R_OO, noise_K)
        if error < least:
            best, least = (gw, A_rK, B_Or), error
    return best


class Method(NamedTuple):
    split: Callable  # (w_OK, white, rank, round_to_grid, iters, generator) -> (GridWeight, A_rK, B_Or)
    reads_G: bool = False  # whether it uses white.R_OO and white.noise_K, which cost passes over the calibration set


METHODS = {
    "zero": Method(zero),
    "pissa": Method(pissa),
    "svdquant": Method(pissa),
    "principal": Method(principal),
    "loftq": Method(loftq),
    "qera": Method(qera),
    "hgs": Method(hgs, reads_G=True),
}  # change this to try yours


def wants_gradients(hessian: str, init: str, rank_statistics: Collection[str]) -> bool:
    """Whether G has to be collected: `hessian` asks for the Kronecker product (kron, not input), and there is a use for it in the
    method `init` or in what a rule for ranks reads (qra.METHODS)."""
    return hessian == "kron" and (METHODS[init].reads_G or not {"spectrum", "energy"}.isdisjoint(rank_statistics))


def decompose(
    w_OK: Tensor,
    H_KK: Tensor | Whitener,
    rank: int,
    method: str = "hgs",
    group: int = 64,
    taps: int = 1,
    rounding: str = "gptq",
    iters: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[quant.GridWeight, Tensor, Tensor]:
    """W (O, K) ~ Q + B A: (GridWeight, A_rK float32, B_Or float32).

    w_OK: any floating dtype, not padded, already smoothed if the layer is. H_KK: undamped second moments (K, K), or a Whitener,
    which may carry R and N. rank: 0 to min(O, K). group, taps, rounding: of the grid (quant.quantize_weight). iters: Q-steps of
    hgs and loftq. generator: of the random rows of A.
    Raises ValueError for an unknown method or rounding, a rank above min(O, K), a bad group or shape, a non-finite W or H.
    """
    white, (O, K) = H_KK if isinstance(H_KK, Whitener) else Whitener(H_KK), w_OK.shape
    if method not in METHODS:
        raise ValueError(f"init method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 0 <= rank <= min(O, K):
        raise ValueError(f"rank {rank} is outside 0..{min(O, K)} of a {O} x {K} layer")
    if not torch.isfinite(w_OK).all():
        raise ValueError("weights contain inf or NaN")
    if len(white.H_KK) != K:
        raise ValueError(f"the Hessian must be {K} x {K} for this weight, got {tuple(white.H_KK.shape)}")
    if white.G_OO is not None and len(white.G_OO) != O:
        raise ValueError(f"the second moments of the gradients must be {O} x {O}, got {tuple(white.G_OO.shape)}")
    factor = None if rounding == "rtn" else white.gptq_factor(group, taps)

    def round_to_grid(target_OK: Tensor, nearest: bool = False) -> quant.GridWeight:
        how = "rtn" if nearest else rounding
        return quant.quantize_weight(target_OK.float(), group, taps, white.H_KK, how, factor=factor)

    gw, A_rK, B_Or = METHODS[method].split(w_OK.detach().double(), white, rank, round_to_grid, iters, generator)
    dead = ~A_rK.any(1)
    A_rK[dead] = _random_rows(int(dead.sum()), K, A_rK, generator)
    return gw, A_rK.float(), B_Or.float()


def factor_bytes(O: int, K: int, rounding: str = "gptq") -> int:
    """Bytes that Whitener and `decompose` hold at most for a layer, all of it float64: H, L and what GPTQ's factor is made of
    (K, K), G, R and a copy (O, O), W and its products (O, K). rounding="": of a Whitener of the diagonal of H, for the ranks."""
    return 8 * ({"": 0, "rtn": 3}.get(rounding, 6) * K**2 + 3 * O**2 + 5 * O * K)


# ---------------------------------------------------------------- demo


def main() -> None:
    """What each method leaves of a layer that has a few strong directions, with 4 outlier channels in a correlated input."""
    gen = torch.Generator().manual_seed(0)
    w_OK = torch.randn(256, 256, generator=gen) + 0.2 * torch.randn(256, 12, generator=gen) @ torch.randn(12, 256, generator=gen)
    x_TK = torch.randn(4096, 256, generator=gen) * torch.logspace(0, -1.5, 256) @ torch.randn(256, 256, generator=gen)
    x_TK[:, ::64] *= 15
    w_OK, H_KK = w_OK / w_OK.norm(dim=1, keepdim=True), x_TK.mT @ x_TK / len(x_TK)
    lam = quant.smoothing_factors(x_TK.abs().amax(0), w_OK.abs().amax(0), 0.5)
    plain, smoothed = (w_OK, Whitener(H_KK)), (w_OK * lam, Whitener(H_KK / lam / lam[:, None]))
    columns = {"rtn": (*plain, "rtn"), "gptq": (*plain, "gptq"), "smoothed gptq": (*smoothed, "gptq")}
    print("||(W - Q - BA) L||^2 / ||W L||^2 in percent, rank 16, groups of 64; smoothed: W * lambda, x / lambda")
    print(f"{'linear 256 x 256':20s}" + "".join(f"{column:>15s}" for column in columns))
    table = {}
    for method in METHODS:
        for column, (w, white, rounding) in columns.items():
            split = decompose(w, white, 16, method, rounding=rounding, generator=gen)
            table[method, column] = 100 * relative_error(w, white.L_KK, *split)
        print(f"{method:20s}" + "".join(f"{table[method, column]:15.4f}" for column in columns))
    assert all(table["hgs", column] == min(table[method, column] for method in METHODS) for column in columns)
    print("SVDQuant is the row svdquant in the last column. Invariant: hgs has the least error of every column.")


if __name__ == "__main__":
    main()
