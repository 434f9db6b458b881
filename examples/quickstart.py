"""Draw 16 digits with a bundled model and 50 steps of DDIM.

python examples/quickstart.py
"""

from __future__ import annotations

from pathlib import Path

import fastddim


def main() -> None:
    model = fastddim.models.load("digits")
    x = fastddim.sample(model, 50, batch_size=16, seed=0)
    out = Path("runs/quickstart.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    fastddim.images.save_png(out, x)
    print(out)


if __name__ == "__main__":
    main()
