"""MC dropout whose probabilities are multiplied by a factor, which is chosen on the validation text."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from vdrop_cli.measured import Measured
from vdrop_cli.model import LanguageModel
from vdrop_cli.monte_carlo import MonteCarlo


class ScaledPasses:
    """MC passes over the validation text with each factor, then over the test text with the best one.

    They can stop and resume as those of `MonteCarlo`. Raises ValueError for a factor with which a probability
    is not below 1.
    """

    def __init__(
        self,
        model: LanguageModel,
        valid_N: Tensor,
        test_N: Tensor,
        factors: list[float],
        samples: int,
        batch: int,
        seed: int,
        word_dropout: bool,
    ) -> None:
        self.model, self.factors, self.samples = model, factors, samples
        self.texts = {"valid": valid_N, "test": test_N}
        self.how = (samples, batch, seed, word_dropout)
        self.dropouts = [model.dropout.scaled(factor) for factor in factors]
        self.valid_ppls: list[float] = []  # of the factors so far
        self.passes = self.next_passes()

    def next_passes(self) -> MonteCarlo:
        """Returns those of the next factor, or of the test text."""
        number = len(self.valid_ppls)
        part, dropout = ("valid", number) if number < len(self.factors) else ("test", self.best)
        return MonteCarlo(self.model, self.texts[part], *self.how, dropout=self.dropouts[dropout])

    @property
    def best(self) -> int:
        """The number of the factor with the lowest perplexity of the validation text."""
        return self.valid_ppls.index(min(self.valid_ppls))

    @property
    def words(self) -> int:
        """The number of words read, over all passes."""
        return len(self.valid_ppls) * self.samples * (len(self.texts["valid"]) - 1) + self.passes.words

    @property
    def total(self) -> int:
        """The number of words to read, over all passes."""
        tokens = len(self.factors) * (len(self.texts["valid"]) - 1) + len(self.texts["test"]) - 1
        return self.samples * tokens

    def run(self) -> Iterator[int]:
        """Reads to the end; yields after each segment how many words that was."""
        while len(self.valid_ppls) < len(self.factors):
            yield from self.passes.run()
            self.valid_ppls.append(self.passes.averages.results()[-1].ppl)
            self.passes = self.next_passes()
        yield from self.passes.run()

    def state_dict(self) -> dict[str, Any]:
        return {"factors": self.factors, "valid_ppls": self.valid_ppls, "passes": self.passes.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Raises ValueError, and changes nothing, if `saved` does not fit these passes."""
        values, count = saved.get("valid_ppls"), len(self.factors)
        if saved.get("factors") != self.factors or not isinstance(values, list) or len(values) > count:
            raise ValueError("its factors are others")
        if not all(type(value) is float and value > 0 for value in values):
            raise ValueError("its perplexities are not numbers")
        before = self.valid_ppls, self.passes
        self.valid_ppls = values
        self.passes = self.next_passes()
        try:
            self.passes.load_state_dict(saved["passes"])
        except (KeyError, TypeError, ValueError):
            self.valid_ppls, self.passes = before
            raise ValueError("its passes are not those of its factor") from None

    def results(self) -> Measured:
        """Returns the metrics, the perplexity by number of passes, and that of the validation text by
        factor.
        """
        averages = self.passes.averages.results()
        metrics = {
            "dropout_factor": self.factors[self.best],
            f"valid_ppl_mc{self.samples}_scaled": self.valid_ppls[self.best],
            f"test_ppl_mc{self.samples}_scaled": averages[-1].ppl,
        }
        rows = [
            {"factor": factor, "valid_ppl": value}
            for factor, value in zip(self.factors, self.valid_ppls, strict=True)
        ]
        return Measured(metrics, {"mc": [row._asdict() for row in averages], "factors": rows})
