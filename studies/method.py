"""The figure of the method: what is encoded, what each head sees, and the three losses.

    python -m studies.method        draws results/method.png; needs matplotlib

The molecule is one of data/qm9_demo.h5, flattened onto its own plane.
"""

import numpy as np

from data import Molecules
from harness.errors import cli, need
from studies.runs import ROOT

MOLECULE = 65  # of data/qm9_demo.h5: flat, twelve atoms, four elements
SIGMA, DRAWN_LARGER = 0.04, 6  # angstrom, and how many times larger the noise is drawn: 0.04 would not show
# symbol, covalent radius in angstrom, fill
ELEMENTS = {1: ("", 0.31, "white"), 6: ("C", 0.76, "0.72"), 7: ("N", 0.71, "#8fc0e6"), 8: ("O", 0.66, "#f7b070")}
GREY, ORANGE, BLUE = "#ececec", "#fde4cb", "#d3e6f5"
NOTE = f"Dots: the clean positions.\nε ~ N(0, σ²), σ = {SIGMA} Å,\ndrawn {DRAWN_LARGER} times larger."
NOTE += "\nIf α ≠ 1, the decoder gets\na third copy, pos + α ε."


def flat_molecule():
    """Atomic numbers (n,), clean and noised positions (n, 2), pairs of bonded atoms (b, 2)."""
    molecule = Molecules(ROOT / "data/qm9_demo.h5").read([MOLECULE])
    z, pos = molecule["z"].tolist(), molecule["pos"].double().numpy()
    pos = pos - pos.mean(0)
    plane = np.linalg.svd(pos)[2][:2].T  # (3, 2) the two widest directions
    noise = DRAWN_LARGER * SIGMA * np.random.default_rng(7).standard_normal(pos.shape)
    radius = np.array([ELEMENTS[k][1] for k in z])
    near = np.linalg.norm(pos[:, None] - pos, axis=-1) < 1.25 * (radius[:, None] + radius)  # (n, n)
    return z, pos @ plane, (pos + noise) @ plane, np.argwhere(np.triu(near, 1))


def draw_molecule(ax, z, pos, bonded, centre, clean=None, scale=0.285):
    """Bonds, then atoms as circles; clean: positions to show the displacement of each atom from."""
    at = np.array(centre) + scale * pos
    for pair in bonded:
        ax.plot(*at[pair].T, color="0.35", lw=1.6, zorder=2)
    for k, where in zip(z, at, strict=True):
        symbol, _, fill = ELEMENTS[k]
        ax.plot(*where, "o", ms=13.5 if symbol else 9, mfc=fill, mec="black", mew=0.8, zorder=3)
        if clean is None:
            ax.text(*where, symbol, ha="center", va="center_baseline", fontsize=9, zorder=4)
    for start, end in zip(np.array(centre) + scale * clean, at, strict=True) if clean is not None else ():
        ax.plot(*np.array([start, end]).T, color="black", lw=1.0, zorder=5)
        ax.plot(*start, "o", color="black", ms=2.6, zorder=5)


def box(ax, left, right, centre, height, text, fill="white", **style):
    patches = need("matplotlib.patches", "drawing")
    shape, corner = "round,pad=0,rounding_size=0.06", (left, centre - height / 2)
    ax.add_patch(patches.FancyBboxPatch(corner, right - left, height, shape, fc=fill, ec="black", zorder=3))
    ax.text((left + right) / 2, centre, text, ha="center", va="center", zorder=4, **{"fontsize": 9.5, **style})


def arrow(ax, *points):
    """A line through points whose last stretch has a head."""
    ax.plot(*zip(*points[:-1], strict=True), color="black", lw=1.2, zorder=2, solid_joinstyle="miter")
    tip = dict(arrowstyle="-|>,head_width=0.28,head_length=0.5", color="black", lw=1.2, shrinkA=0, shrinkB=0)
    ax.annotate("", xy=points[-1], xytext=points[-2], arrowprops=tip, zorder=2)


def draw(ax):
    z, clean, noised, bonded = flat_molecule()
    top, middle, bottom = 4.12, 2.68, 1.22  # heights of the three rows
    branch = 4.0  # where noised and clean embeddings turn off to the decoder
    small, bold = {"ha": "center", "fontsize": 9.5}, {"ha": "center", "fontsize": 10.5, "weight": "bold"}

    draw_molecule(ax, z, noised, bonded, (1.03, top - 0.12), clean)
    draw_molecule(ax, z, clean, bonded, (1.03, bottom - 0.08))
    ax.text(1.03, top + 0.66, "noised: pos + ε", **bold)
    ax.text(1.03, bottom + 0.66, "clean: pos", **bold)
    ax.text(1.03, middle - 0.02, NOTE, ha="center", va="center", fontsize=9, linespacing=1.25)

    box(ax, 2.4, 3.4, middle, 4.1, "shared\nencoder", GREY, fontsize=11, weight="bold")
    ax.text(2.9, middle - 0.62, "equivariant\ntransformer", va="center", zorder=4, **small)
    box(ax, 4.65, 5.6, top, 0.72, "denoising\nhead", ORANGE)
    box(ax, 4.65, 5.6, middle, 0.9, "decoder", BLUE, fontsize=10.5)
    box(ax, 4.65, 5.6, bottom, 0.72, "the same\nhead", ORANGE)
    box(ax, branch - 0.42, branch + 0.42, 1.86, 0.42, "mean over\natoms", linespacing=1.0, fontsize=9)
    for height in (top, bottom):
        arrow(ax, (2.08, height), (2.4, height))
        arrow(ax, (3.4, height), (4.65, height))
        ax.plot(branch, height, "o", color="black", ms=4, zorder=3)
        ax.text((3.4 + branch) / 2, height + 0.07, "x, vec", **small)
    arrow(ax, (branch, top), (branch, middle + 0.22), (4.65, middle + 0.22))
    arrow(ax, (branch, bottom), (branch, 1.65))
    arrow(ax, (branch, 2.07), (branch, middle - 0.22), (4.65, middle - 0.22))
    ax.text(branch + 0.3, middle + 0.27, "x, vec", **small)
    ax.text(branch + 0.3, middle - 0.16, "g", **bold)

    losses = {top: "predict the noise\nL_noise = mean (out − ε/σ)²", bottom: "predict zero\nL_clean = mean (out)²"}
    losses[middle] = "predict it again, knowing g\nL_rec = mean (out − α ε/σ)²"
    for height, text in losses.items():
        arrow(ax, (5.6, height), (5.95, height))
        box(ax, 5.95, 7.95, height, 0.72, text, linespacing=1.5)
    ax.text(7.95, 0.32, "L = w_noise L_noise + w_clean L_clean + w_rec L_rec", ha="right", va="center", fontsize=10.5)


def main(arguments):
    plt = need("matplotlib.pyplot", "drawing")
    figure = plt.figure(figsize=(8.0, 4.95), dpi=200)  # inches; 9 point is the smallest text
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, 8.0), ylim=(0, 4.95))
    ax.axis("off")
    draw(ax)
    figure.savefig(ROOT / "results/method.png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    print("wrote results/method.png")


if __name__ == "__main__":
    cli(main, __doc__)
