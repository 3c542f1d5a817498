"""MC dropout whose probabilities are multiplied by a factor, which is chosen on the validation text."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from vdrop_cli.mc_passes import McPasses, PassOptions
from vdrop_cli.measured import Measured
from vdrop_cli.model import LanguageModel
from vdrop_cli.monte_carlo import MonteCarlo


class ScaledPasses(McPasses):
    """MC passes over the validation text with each factor, then over the test text with the best one.

    They can stop wherever those of `MonteCarlo` can. Raises ValueError where a factor makes a probability 1
    or more.
    """

    def __init__(self, model: LanguageModel, valid_N: Tensor, test_N: Tensor, options: PassOptions) -> None:
        self.model, self.options = model, options
        self.factors, self.samples = list(options.factors), options.samples
        self.texts = {"valid": valid_N, "test": test_N}
        dropout = model.dropout if options.word_dropout else model.dropout.without_words()
        self.dropouts = [dropout.scaled(factor) for factor in self.factors]
        self.valid_ppls: list[float] = []  # of the factors so far
        self.passes = self.passes_after(self.valid_ppls)

    def passes_after(self, valid_ppls: list[float]) -> MonteCarlo:
        """Returns the next passes: with the next factor, or over the test text after the last factor."""
        number = len(valid_ppls)
        part, number = ("valid", number) if number < len(self.factors) else ("test", best(valid_ppls))
        return MonteCarlo(self.model, self.texts[part], self.options, self.dropouts[number])

    @property
    def words(self) -> int:
        return len(self.valid_ppls) * self.samples * (len(self.texts["valid"]) - 1) + self.passes.words

    @property
    def total(self) -> int:
        tokens = len(self.factors) * (len(self.texts["valid"]) - 1) + len(self.texts["test"]) - 1
        return self.samples * tokens

    def run(self) -> Iterator[int]:
        while len(self.valid_ppls) < len(self.factors):
            yield from self.passes.run()
            self.valid_ppls.append(self.passes.averages.ppl)
            self.passes = self.passes_after(self.valid_ppls)
        yield from self.passes.run()

    def state_dict(self) -> dict[str, Any]:
        return {"factors": self.factors, "valid_ppls": self.valid_ppls, "passes": self.passes.state_dict()}

    def require_fitting(self, state: dict[str, Any]) -> None:
        values, count = state.get("valid_ppls"), len(self.factors)
        if state.get("factors") != self.factors or not isinstance(values, list) or len(values) > count:
            raise ValueError("its factors are others")
        if not all(type(value) is float and value > 0 for value in values):
            raise ValueError("its perplexities are not numbers")
        passes, reason = state.get("passes"), "its passes are not those of its factor"
        if not isinstance(passes, dict):
            raise ValueError(reason)
        try:
            self.passes_after(values).require_fitting(passes)
        except ValueError:
            raise ValueError(reason) from None

    def restore(self, state: dict[str, Any]) -> None:
        self.valid_ppls = state["valid_ppls"]
        self.passes = self.passes_after(self.valid_ppls)
        self.passes.restore(state["passes"])

    def results(self) -> Measured:
        """Returns the metrics, and the tables `mc` and `factors`.

        `mc` has the test perplexity by the number of passes, `factors` the validation perplexity by factor.
        """
        averages, number = self.passes.averages, best(self.valid_ppls)
        metrics = {
            "dropout_factor": self.factors[number],
            f"valid_ppl_mc{self.samples}_scaled": self.valid_ppls[number],
            f"test_ppl_mc{self.samples}_scaled": averages.ppl,
        }
        rows = [
            {"factor": factor, "valid_ppl": value}
            for factor, value in zip(self.factors, self.valid_ppls, strict=True)
        ]
        return Measured(metrics, {"mc": averages.rows(), "factors": rows})


def best(valid_ppls: list[float]) -> int:
    """Returns the number of the factor with the lowest perplexity of the validation text."""
    return valid_ppls.index(min(valid_ppls))
