"""Stage "teacher" of train.py: the embedded teachers, tiny and tiny-flux, from nothing; and how 16-bit weights are kept."""

import dataclasses
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import data
import evaluate
import models
from checkpoint import rank, world


def train(cfg, out: Path, pictures) -> None:
    """Plain diffusion training: squared error at stratified times, 10% of captions dropped, EMA 0.999 -> MODEL.safetensors."""
    torch.manual_seed(cfg.seed)
    model = models.load_teacher(cfg.model, cfg.teacher).requires_grad_() if cfg.teacher else models.build(cfg.model)
    params = dict(model.to(cfg.device).named_parameters())
    state = checkpoint.State(out, params, cfg)
    start, saved = state.load()
    ema = {k: saved[f"ema.{k}"].to(p.device) if saved else p.detach().clone() for k, p in params.items()}
    times, mine = model.path.grid(1000), slice(rank(), None, world())
    with open(out / "metrics.jsonl", "a") as log:
        for step in (bar := tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="teacher")):
            gen = data.step_generator(cfg.seed, step)
            x, captions = pictures.batch(cfg.batch, gen)
            drop = torch.rand(cfg.batch, generator=gen) < 0.1
            cond = model.encode([data.UNCONDITIONAL if d else c for d, c in zip(drop, captions, strict=True)][mine])
            strata = (torch.arange(cfg.batch) + torch.rand(cfg.batch, generator=gen)) / cfg.batch  # one t in every B-th of [0, 1)
            x0, t = models.to_latents(x)[mine].to(cfg.device), times[(1000 * strata).long()][mine].to(cfg.device)
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
    if rank() == 0:
        model.load_state_dict({k: v.half() for k, v in ema.items()})
        ship(cfg, out / f"{cfg.model}.safetensors", model.state_dict(), model, cm=False)


def ship(cfg, path: Path, tensors: dict[str, torch.Tensor], network: models.Denoiser, cm: bool) -> None:
    """16-bit weights that other runs start from, as float16, with the command and the scores that go with them."""
    halves = {k: v.half() for k, v in tensors.items()}  # before the network that holds them is cast
    scores = evaluate.network_report(network.eval().to("cpu", models.FAST), dataclasses.asdict(cfg), cm)
    command, what = " ".join(["python train.py", *sys.argv[1:]]), {"seed": cfg.seed, "steps": cfg.steps, "batch": cfg.batch}
    checkpoint.write(path, halves, {"command": command, "scores": scores} | what)
    print(f"weights: {path}")
