"""Procedural scenes: captioned pictures without end, for the embedded models.

A scene is one or two objects on a textured background, 32x32 pixels, or the same drawn at a larger size:

    a large striped red ring on the left and a small blue square on the right, wavy gray background
      size  pattern colour shape     place                                     texture background

Words for the defaults (plain pattern, smooth texture) are left out of captions. What a caption does not say, the picture draws
at random: exact place, radius, angle, hue, lighting, grain, phases of stripes, dots and waves. A few-step solver blurs it.
All randomness comes from the generator that is given: what a training step sees depends on (seed, step) and nothing else, so no
iterator state has to be saved to resume exactly, and R processes that each keep every R-th sample see together what one sees alone.
"""

import torch
import torch.nn.functional as F

SIDE = 32  # pixels; the unit of all lengths here
SHAPES = ("circle", "ring", "square", "triangle", "cross")
COLORS = ("red", "yellow", "green", "blue", "purple", "white")
SIZES = ("small", "large")
PATTERNS = ("plain", "striped", "dotted")
PLACES = ("left", "right", "top", "bottom", "center")
BACKGROUNDS = ("gray", "black", "tan")
TEXTURES = ("smooth", "wavy", "grainy")
UNCONDITIONAL = ""  # the caption of classifier-free guidance's unconditional branch
RGB = torch.tensor([[0.90, 0.12, 0.12], [0.95, 0.85, 0.10], [0.10, 0.70, 0.20],
                    [0.15, 0.30, 0.95], [0.62, 0.15, 0.75], [0.96, 0.96, 0.96]])  # fmt: skip
BACKGROUND_RGB = torch.tensor([[0.50, 0.50, 0.50], [0.10, 0.10, 0.10], [0.78, 0.64, 0.44]])
CENTER = torch.tensor([[8.5, 16.0], [23.5, 16.0], [16.0, 8.5], [16.0, 23.5], [16.0, 16.0]])  # (x, y) of each place, pixels
RADIUS = torch.tensor([5.8, 8.4])  # small, large, pixels


def random_scenes(n: int, gen: torch.Generator) -> dict[str, torch.Tensor]:
    """Attributes of n scenes, int64: count (n,), background (n,), texture (n,), and shape, color, size, pattern, place (n, 2).

    Two objects stand left and right or top and bottom, in either order; slot 1 is drawn over slot 0. One object stands anywhere.
    """

    def pick(k, *shape):
        return torch.randint(k, shape, generator=gen)

    scene = {
        "count": 1 + (torch.rand(n, generator=gen) < 0.6).long(),
        "background": pick(len(BACKGROUNDS), n),
        "texture": pick(len(TEXTURES), n),
        "shape": pick(len(SHAPES), n, 2),
        "color": pick(len(COLORS), n, 2),
        "size": pick(len(SIZES), n, 2),
        "pattern": (pick(4, n, 2) - 1).clamp_min(0),  # half of all objects are plain
    }
    axis, flip, alone = 2 * pick(2, n), pick(2, n), pick(len(PLACES), n)
    pair = torch.stack([axis + flip, axis + 1 - flip], 1)
    scene["place"] = torch.where(scene["count"][:, None] == 2, pair, torch.stack([alone, alone], 1))
    return scene


def caption_of(scene: dict[str, torch.Tensor], i: int) -> str:
    """The caption of scene i."""

    def words(*parts):
        return " ".join(part for part in parts if part not in ("plain", "smooth"))

    objects = [
        words("a", SIZES[scene["size"][i, s]], PATTERNS[scene["pattern"][i, s]], COLORS[scene["color"][i, s]],
              SHAPES[scene["shape"][i, s]], "on the", PLACES[scene["place"][i, s]])
        for s in range(int(scene["count"][i]))
    ]  # fmt: skip
    background = words(TEXTURES[scene["texture"][i]], BACKGROUNDS[scene["background"][i]], "background")
    return " and ".join(objects) + ", " + background


def _inside(shape_B, u_BHW, v_BHW):
    """1 where a point (u, v), in units of the radius, lies inside the shape; (B, H, W) float."""
    rho = (u_BHW**2 + v_BHW**2).sqrt()
    au, av = u_BHW.abs(), v_BHW.abs()
    cross = ((au < 0.34) & (av < 0.95)) | ((av < 0.34) & (au < 0.95))
    triangle = (v_BHW < 0.72) & (v_BHW > 1.73 * au - 1.0)
    options = (rho < 0.92, (rho < 1.0) & (rho > 0.45), torch.maximum(au, av) < 0.80, triangle, cross)
    return torch.stack(options, 1)[torch.arange(len(shape_B)), shape_B].float()


def render(scene: dict[str, torch.Tensor], gen: torch.Generator, side: int = SIDE) -> torch.Tensor:
    """Draws the scenes: (n, 3, side, side) float32 in [-1, 1], 2x2 supersampled; the same scenes at any multiple of 32 pixels."""
    n = len(scene["count"])

    def rand(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=gen)

    fine = 2 * side // SIDE  # samples along a pixel of 32
    axis = (torch.arange(2 * side) + 0.5) / fine
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    # background: a lighting gradient, and, where the caption says so, upright waves of random length and phase, or faint grain,
    # which a solver loses in few steps: what is fainter than the noise of its last step comes out as its mean
    lighting = rand(0, 2 * torch.pi, 1, 1)
    ramp = ((x - 16) * lighting.cos() + (y - 16) * lighting.sin()) / 16
    wave = torch.sin(2 * torch.pi * (x / rand(5, 8, 1, 1) + rand(0, 1, 1, 1)))
    grain = torch.randn(n, SIDE, SIDE, generator=gen).repeat_interleave(fine, 1).repeat_interleave(fine, 2)
    kind = scene["texture"][:, None, None]
    shade = 0.06 * ramp + 0.09 * wave * (kind == 1) + 0.08 * grain * (kind == 2)
    image = BACKGROUND_RGB[scene["background"]][:, :, None, None] + rand(-0.03, 0.03, 3, 1, 1) + shade[:, None]

    for s in range(2):
        center = CENTER[scene["place"][:, s]] + rand(-1.5, 1.5, 2)
        radius = RADIUS[scene["size"][:, s]] * rand(0.94, 1.06)
        dx, dy, turn = x - center[:, 0, None, None], y - center[:, 1, None, None], rand(-0.3, 0.3, 1, 1)
        u = (dx * turn.cos() + dy * turn.sin()) / radius[:, None, None]
        v = (dy * turn.cos() - dx * turn.sin()) / radius[:, None, None]
        # patterns, period 4 pixels, random phase: level stripes in a darker shade, a lattice of dots in the complementary colour
        p, q = x / 4 + rand(0, 1, 1, 1), y / 4 + rand(0, 1, 1, 1)
        stripes, dots = (q % 1) < 0.45, ((p % 1) - 0.5) ** 2 + ((q % 1) - 0.5) ** 2 < 0.32**2
        kind = scene["pattern"][:, s, None, None]
        color = (RGB[scene["color"][:, s]][:, :, None, None] + rand(-0.04, 0.04, 3, 1, 1)).expand(n, 3, *x.shape)
        surface = torch.where((stripes & (kind == 1))[:, None], 0.4 * color, color)
        surface = torch.where((dots & (kind == 2))[:, None], 1 - color, surface) * (1 + 0.1 * (dx + dy) / 16)[:, None]
        mask = _inside(scene["shape"][:, s], u, v) * (s < scene["count"])[:, None, None]
        image = torch.where(mask[:, None] > 0, surface, image)

    return F.avg_pool2d(image.clamp(0, 1), 2) * 2 - 1


class Scenes:
    """The procedural source: unlimited, deterministic. side: of its pictures, in pixels."""

    def __init__(self, side: int = SIDE):
        self.side = side

    def batch(self, n: int, gen: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        """n pictures (n, 3, side, side) in [-1, 1] and their captions."""
        scene = random_scenes(n, gen)
        return render(scene, gen, self.side), [caption_of(scene, i) for i in range(n)]

    def captions(self, n: int, gen: torch.Generator) -> list[str]:
        scene = random_scenes(n, gen)
        return [caption_of(scene, i) for i in range(n)]
