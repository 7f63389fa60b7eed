"""Stage "teacher" of train.py: the embedded teachers, tiny and tiny-flux, from nothing."""

from pathlib import Path

import torch
from tqdm import tqdm

from data import scenes
from models import tiny
from models.denoiser import Denoiser, random_denoiser
from models.pretrained import load_teacher
from run.common import process_count, process_index, step_generator
from run.state import TrainingState


def train(cfg, out: Path, pictures) -> Denoiser:
    """Plain diffusion training: squared error at stratified times, 10% of captions dropped, EMA 0.999. Returns the average."""
    torch.manual_seed(cfg.seed)
    model = load_teacher(cfg.model, cfg.teacher).requires_grad_() if cfg.teacher else random_denoiser(cfg.model)
    params = dict(model.to(cfg.device).named_parameters())
    state = TrainingState(out, params, cfg)
    start, saved = state.load()
    ema = {k: saved[f"ema.{k}"].to(p.device) if saved else p.detach().clone() for k, p in params.items()}
    times, mine = model.path.grid(1000), slice(process_index(), None, process_count())
    with open(out / "metrics.jsonl", "a") as log:
        for step in (bar := tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="teacher")):
            gen = step_generator(cfg.seed, step)
            x, captions = pictures.batch(cfg.batch, gen)
            drop = torch.rand(cfg.batch, generator=gen) < 0.1
            cond = model.encode([scenes.UNCONDITIONAL if d else c for d, c in zip(drop, captions, strict=True)][mine])
            strata = (torch.arange(cfg.batch) + torch.rand(cfg.batch, generator=gen)) / cfg.batch  # one t in every B-th of [0, 1)
            x0, t = tiny.to_latents(x)[mine].to(cfg.device), times[(1000 * strata).long()][mine].to(cfg.device)
            eps = torch.randn(cfg.batch, *model.latent, generator=gen)[mine].to(cfg.device)
            with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
                pred = model(model.path.add_noise(x0, eps, t), t, t, cond)
            loss = (pred.float() - model.path.prediction_of(x0, eps, t)).square().mean()
            loss.backward()
            state.update(step, loss.item(), log)
            decay = min(0.999, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in params.values()], 1 - decay)
            bar.set_postfix_str(f"loss {loss.item():.4f}")
            if state.due(step + 1):
                state.save(step + 1, {f"ema.{k}": v for k, v in ema.items()})
    model.load_state_dict({k: v.half() for k, v in ema.items()})
    return model
