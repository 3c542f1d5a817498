"""SuperKam91/bnn: feed-forward Bayesian networks for regression.

bnn cites the paper and has no dropout. This is MC dropout of an ordinary network with `nn.Dropout`:
`predict_mc` turns on what drops, takes the mean and the standard deviation of many passes, and leaves every
flag as it was. The standard deviation grows away from the data.

B batch  D inputs
"""

import math

import torch
from torch import Tensor, nn

from vdrop_cli.sampling import predict_mc

INPUTS = 8
HIDDEN = 64
NOISE = 0.5
FAR = 3.0
P = 0.1


def sample(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs [B, D] and measurements [B, 1]: a smooth function with noise of standard deviation NOISE."""
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(count, INPUTS, generator=generator)
    clean_B = x_BD[:, 0] + (2 * x_BD[:, 1]).sin() + x_BD[:, 2] * x_BD[:, 3] / 2
    return x_BD, (clean_B + NOISE * torch.randn(count, generator=generator))[:, None]


def network(p: float) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Dropout(p)),
        *(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Dropout(p)),
        nn.Linear(HIDDEN, 1),
    )


def trained(p: float, steps: int) -> nn.Module:
    """A network that is fitted to few measurements."""
    torch.manual_seed(0)
    model, (x_BD, y_B1) = network(p), sample(400, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x_BD), y_B1).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def main(steps: int = 600) -> dict[str, float]:
    """Errors (root mean square) on new data, and the standard deviations of MC dropout, near and far."""
    x_BD, y_B1 = sample(2000, seed=2)

    def error(predicted_B1: Tensor) -> float:
        return math.sqrt((predicted_B1 - y_B1).square().mean())

    with torch.enable_grad():
        none, dropout = trained(0.0, steps), trained(P, steps)
    near = predict_mc(dropout, x_BD, samples=100, batch=10, dim=0)
    far = predict_mc(dropout, FAR * x_BD, samples=100, batch=10, dim=0)
    figures = {
        "floor": NOISE,
        "none": error(none(x_BD)),
        "dropout": error(dropout(x_BD)),
        "mc": error(near.mean),
    }
    return figures | {"std near": float(near.std.mean()), "std far": float(far.std.mean())}


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name:<10}{figure:8.3f}")
