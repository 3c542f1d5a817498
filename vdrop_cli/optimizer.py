"""The optimiser: the gradients, their clipping, and the update of the weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vdrop_cli.settings.choices import OptimizerName
from vdrop_cli.settings.train import Schedule

# Weight decay is divided by the learning rate; with a smaller rate the quotient would overflow fp32.
SMALLEST_RATE = 1e-30


class Optimizer:
    """Plain SGD, Adam or AdamW, with a limit on the gradient's global norm.

    Weight decay acts on every parameter:
    - SGD: after the step, the weights are multiplied by 1 - weight_decay; this takes no further pass over
      them;
    - Adam: weight_decay times the weights is added to the gradient. This is the gradient of the authors'
      penalty, weight_decay/2 times the squared weights;
    - AdamW: before the step, the weights are multiplied by 1 - lr · weight_decay.

    With `delayed` (by default on a GPU only), the update does not wait until the processor has read the
    gradient's norm.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, *, delayed: bool | None = None) -> None:
        self.schedule = schedule
        self.parameters: list[Tensor] = list(model.parameters())
        self.delayed = self.parameters[0].is_cuda if delayed is None else delayed
        self.inner: torch.optim.Optimizer
        if schedule.optimiser is OptimizerName.sgd:
            self.inner = torch.optim.SGD(self.parameters, lr=schedule.lr, fused=True)
        else:
            is_coupled = schedule.optimiser is OptimizerName.adam
            self.inner = (torch.optim.Adam if is_coupled else torch.optim.AdamW)(
                self.parameters,
                lr=schedule.lr,
                betas=(schedule.beta1, schedule.beta2),
                weight_decay=schedule.weight_decay,
                fused=True,
            )

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any], steps: int) -> None:
        """Restores the moments after `steps` updates; all hyper-parameters come from the settings.

        Raises ValueError if they do not fit.
        """
        self.require_fitting(state, steps)
        self.inner.load_state_dict(
            {"state": state["state"], "param_groups": self.inner.state_dict()["param_groups"]}
        )

    def require_fitting(self, state: dict[str, Any], steps: int) -> None:
        """Raises ValueError unless `state` can be that of this optimiser after `steps` updates."""
        numbers = list(range(len(self.parameters)))
        groups, moments = state.get("param_groups"), state.get("state")
        is_one_group = isinstance(groups, list) and len(groups) == 1 and isinstance(groups[0], dict)
        params = groups[0].get("params") if is_one_group else None  # type: ignore[index]
        if not (
            isinstance(params, list) and all(type(number) is int for number in params) and params == numbers
        ):
            raise ValueError("its optimiser has other parameters")
        if not isinstance(moments, dict) or not all(isinstance(values, dict) for values in moments.values()):
            raise ValueError("its optimiser has no state")
        if self.schedule.optimiser is OptimizerName.sgd:
            if any(value is not None for values in moments.values() for value in values.values()):
                raise ValueError("its optimiser has a state, and plain SGD has none")
        elif (steps > 0 or moments) and (
            set(moments) != set(numbers)
            or not all(are_moments(moments[n], self.parameters[n]) for n in numbers)
        ):
            raise ValueError("its optimiser lacks the moments of some weights")

    def step(self, loss: Tensor, lr: float) -> "LossAndNorm":
        """Makes one update with the gradient of `loss` at the learning rate `lr`.

        Returns the loss and the gradient's norm before clipping. If the norm is not finite, no weight
        changes.
        """
        return self.descend(self.differentiate(loss), lr)

    def differentiate(self, loss: Tensor, reported: Tensor | None = None) -> Tensor:
        """Computes the gradients; returns the loss that is reported and the gradients' norm, in float64."""
        self.inner.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = global_norm(self.gradients)
        reported = loss if reported is None else reported
        return torch.stack([reported.detach().double(), norm.double()])

    def descend(self, loss_and_norm_2: Tensor, lr: float) -> "LossAndNorm":
        """Updates the weights with the gradients that `differentiate` computed."""
        numbers = LossAndNorm(loss_and_norm_2)
        if self.delayed:
            self.update_without_waiting(loss_and_norm_2[1], lr)
        else:
            self.update(numbers.read()[1], self.gradients, lr)
        return numbers

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def update(self, norm: float, gradients: list[Tensor], lr: float) -> None:
        """Clips the gradients by their norm, and updates the weights."""
        if not math.isfinite(norm):
            return
        scale = min(1.0, self.schedule.max_grad_norm / (norm + 1e-6))
        if scale < 1 and self.schedule.optimiser is not OptimizerName.sgd:
            for gradient in gradients:
                gradient.mul_(scale)
            scale = 1.0
        self.set_rates(lr, scale)
        self.inner.step()

    def update_without_waiting(self, norm: Tensor, lr: float) -> None:
        """Makes the same update with the norm still on the GPU.

        The fused optimiser divides the gradients by `grad_scale`, and skips the step if `found_inf` is not 0.
        """
        inner: Any = self.inner
        inner.grad_scale = ((norm + 1e-6) / self.schedule.max_grad_norm).clamp(min=1).float()
        inner.found_inf = (~norm.isfinite()).float()
        self.set_rates(lr)
        inner.step()

    def set_rates(self, lr: float, scale: float = 1.0) -> None:
        """Sets learning rate and weight decay; `scale` is the factor by which the gradient is clipped."""
        weight_decay = self.schedule.weight_decay
        if self.schedule.optimiser is OptimizerName.sgd:
            # w ← (1 - wd)·(w - lr·g) as the one step that `SGD` makes, w - lr'·(g + wd'·w); clipping scales
            # lr or g.
            lr = max((1 - weight_decay) * lr * scale, SMALLEST_RATE)
            weight_decay = weight_decay / lr
        for group in self.inner.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay


def are_moments(values: dict[str, Any], parameter: Tensor) -> bool:
    """Returns whether `values` is Adam's state of a parameter."""
    if set(values) != {"step", "exp_avg", "exp_avg_sq"} or not all(
        isinstance(value, Tensor) for value in values.values()
    ):
        return False
    step = values["step"]
    mean = values["exp_avg"]
    square = values["exp_avg_sq"]
    fits = (
        mean.shape == square.shape == parameter.shape
        and mean.dtype == square.dtype == parameter.dtype
        and step.numel() == 1
    )
    return (
        fits
        and bool(step.isfinite() & (step >= 1))
        and bool(mean.isfinite().all())
        and bool((square.isfinite() & (square >= 0)).all())
    )


class LossAndNorm:
    """The loss of a step and its gradient's norm; on a GPU they are copied in the background."""

    def __init__(self, numbers_2: Tensor) -> None:
        self.numbers_2 = numbers_2.to("cpu", non_blocking=True)
        self.copied: torch.cuda.Event | None = None
        if numbers_2.is_cuda:
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record(torch.cuda.current_stream(numbers_2.device))

    def read(self) -> tuple[float, float]:
        """Waits for the copy, and returns loss and norm."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, norm = self.numbers_2.tolist()
        return loss, norm


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Returns the norm over all gradients.

    The norm of each row is computed first. On the CPU this is fast and exact to fp32, unlike a single norm
    over millions of numbers.
    """
    norm: Tensor = torch.cat([torch.linalg.vector_norm(g, dim=-1).flatten() for g in gradients]).norm()
    return norm
