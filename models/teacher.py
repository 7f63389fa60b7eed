"""The embedded teachers, tiny and tiny-flux, from nothing: plain diffusion training, for stage "teacher" of train.py.

    loss = | network(x_t, t, caption) - prediction of (x0, eps) |^2,    x_t = alpha_t x0 + sigma_t eps

10% of the captions are dropped, so that one network answers with and without, as classifier-free guidance asks.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from data import scenes
from models.denoiser import Denoiser
from run.common import local_rows, process_count


def diffusion_losses(cfg, network: Denoiser, pictures, gen: torch.Generator, micro_batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Losses of one update, which add up to the mean squared error of this process' rows of the batch.

    pictures: batch(n, gen) -> pictures (n, 3, H, W), captions. gen: generator of the update. micro_batches: rows, int64."""
    times = network.path.grid(1000)
    x, captions = pictures.batch(cfg.batch, gen)
    dropped = torch.rand(cfg.batch, generator=gen) < 0.1
    captions = [scenes.UNCONDITIONAL if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
    strata = (torch.arange(cfg.batch) + torch.rand(cfg.batch, generator=gen)) / cfg.batch  # one t in every B-th of [0, 1)
    noise = torch.randn(cfg.batch, *network.latent, generator=gen)

    x, captions, strata, noise = (whole[local_rows()] for whole in (x, captions, strata, noise))
    for rows in micro_batches:
        x0, eps = network.encode_pictures(x[rows]).to(cfg.device), noise[rows].to(cfg.device)
        t = times[(1000 * strata[rows]).long()].to(cfg.device)
        cond = network.encode([captions[row] for row in rows])
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            prediction = network(network.path.add_noise(x0, eps, t), t, t, cond)
        share = len(rows) * process_count() / cfg.batch
        yield (prediction.float() - network.path.prediction_of(x0, eps, t)).square().mean() * share
