"""abdelrahmansaud/vLSTM: a single-step LSTM cell with a mask for each gate.

vLSTM draws one mask vector, only once, for the whole batch, and its class raises an error when it is
constructed. Here `cell.masks(batch)` draws masks for each sequence of a new batch, and they are held over all
steps of the sequence. A training step without masks is an error. In evaluation mode the masks are their
means.

T time  B batch  D sensors  H hidden size
"""

import torch
from torch import Tensor, nn

from vdrop_cli.cells import LSTMCell
from vdrop_cli.layers import Dropout

SENSORS = 6
SIZE = 64
TIME = 20
NOISE = 0.3
P_X, P_H = 0.05, 0.4
TURN_DD = torch.linalg.qr(torch.randn(SENSORS, SENSORS, generator=torch.Generator().manual_seed(0)))[0]


def sample(sequences: int, seed: int) -> Tensor:
    """Readings [T + 1, B, D]: each is a function of the last one, with noise of standard deviation NOISE."""
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(sequences, SENSORS, generator=generator)]
    for _ in range(TIME):
        noise_BD = NOISE * torch.randn(sequences, SENSORS, generator=generator)
        x.append((1.5 * x[-1] @ TURN_DD).tanh() + noise_BD)
    return torch.stack(x)


class Forecaster(nn.Module):
    def __init__(self, p_x: float, p_h: float) -> None:
        super().__init__()
        self.cell = LSTMCell(SENSORS, SIZE, dropout=Dropout("variational", tie="none", p_x=p_x, p_h=p_h))
        self.head = nn.Linear(SIZE, SENSORS)

    def forward(self, x_TBD: Tensor) -> Tensor:
        """The forecast of the next reading after each step, [T, B, D]."""
        masks = self.cell.masks(x_TBD.shape[1])
        state = None
        h_TBH = []
        for x_BD in x_TBD:
            state = self.cell(x_BD, state, masks=masks)
            h_TBH.append(state[0])
        return self.head(torch.stack(h_TBH))


def error(model: nn.Module, x_TBD: Tensor) -> Tensor:
    """Root mean square."""
    return nn.functional.mse_loss(model(x_TBD[:-1]), x_TBD[1:]).sqrt()


def trained(p_x: float, p_h: float, steps: int) -> Forecaster:
    torch.manual_seed(0)
    model, x_TBD = Forecaster(p_x, p_h), sample(16, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        error(model, x_TBD).backward()
        optimizer.step()
    return model.eval()


def main(steps: int = 110) -> dict[str, float]:
    """Errors of forecasts of new sequences; the floor is the noise."""
    x_TBD = sample(500, seed=2)
    models = {"none": trained(0.0, 0.0, steps), "variational": trained(P_X, P_H, steps)}
    with torch.no_grad():
        return {"floor": NOISE} | {name: float(error(model, x_TBD)) for name, model in models.items()}


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name:<12}{figure:8.3f}")
