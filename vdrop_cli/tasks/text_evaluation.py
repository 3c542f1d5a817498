"""How a language model is evaluated: perplexity, calibration, temperature and MC passes of its test text."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from vdrop_cli.errors import ConfigError
from vdrop_cli.mc_passes import McPasses, PassOptions
from vdrop_cli.measured import Measured
from vdrop_cli.model import LanguageModel
from vdrop_cli.monte_carlo import MonteCarlo
from vdrop_cli.next_word import Groups, NextWordPasses, measure_calibration
from vdrop_cli.perplexity import ensemble_perplexities
from vdrop_cli.scaled_passes import ScaledPasses
from vdrop_cli.settings.commands import Eval
from vdrop_cli.sinks import phase
from vdrop_cli.temperature import best_temperature, tempered_perplexity


class TextEvaluation(ABC):
    """The evaluation of a language model on its texts by `vdrop eval`, as `tasks.EvaluationTask` describes
    it.
    """

    word_dropout = False
    device: torch.device
    streams: dict[str, Tensor]  # ids by part: "test", and "valid" where there is one

    @property
    @abstractmethod
    def test_groups(self) -> Groups:
        """Returns the groups of test tokens by which the measures of the next word are broken down."""

    @abstractmethod
    def evaluate(self, model: LanguageModel) -> Measured:
        """Returns the perplexities by the standard approximation."""

    def require_evaluable(self, settings: Eval, path: Path) -> None:
        if settings.members and settings.mc_samples:
            raise ConfigError(
                f"members must be empty with mc_samples, {path} is a language model, whose members are "
                f"averaged by the standard approximation, got {len(settings.members)}"
            )
        if settings.picture is not None and settings.mc_samples == 0 and not settings.calibration:
            raise ConfigError(
                "picture of a language model needs mc_samples=…, calibration=true or both, got neither"
            )

    def measure_standard(self, models: Iterable[LanguageModel], settings: Eval) -> Measured:
        if settings.members:
            return self.ensemble(models)
        (model,) = models
        return self.tempered(model) if settings.tempered else self.evaluate(model)

    def measure_calibration(self, model: LanguageModel, settings: Eval) -> Measured:
        """Returns how sure the standard approximation is of the next word of the test text, where
        calibration=true asks for it.
        """
        if not settings.calibration:
            return Measured({}, {})
        with phase("measuring how sure the standard approximation is of the next word"):
            return measure_calibration(model, self.streams["test"], self.test_groups)

    def passes(self, models: list[LanguageModel], options: PassOptions) -> McPasses:
        """Returns passes over the test text, which also measure how sure the model is of the next word with
        `calibration`, and which read the validation text first with `factors`.
        """
        (model,) = models  # `require_evaluable` refuses several
        if options.calibration:
            return NextWordPasses(model, self.streams["test"], self.test_groups, options)
        if not options.factors:
            return MonteCarlo(model, self.streams["test"], options)
        try:
            return ScaledPasses(model, self.streams["valid"], self.streams["test"], options)
        except ValueError as error:
            raise ConfigError(f"dropout_factors: {error}; leave out the larger ones") from None

    def tempered(self, model: LanguageModel) -> Measured:
        """Returns perplexities at the temperature of the softmax that is the best on the validation text.
        Raises NoTemperature.
        """
        temperature = best_temperature(model, self.streams["valid"])
        metrics = {
            f"{part}_ppl_tempered": tempered_perplexity(model, self.streams[part], temperature)
            for part in ("valid", "test")
        }
        return Measured({"temperature": temperature} | metrics, {})

    def ensemble(self, models: Iterable[LanguageModel]) -> Measured:
        """Returns the perplexities of the mean of the probabilities that all models give."""
        streams = {f"{part}_ppl": self.streams[part] for part in ("valid", "test") if part in self.streams}
        return Measured(ensemble_perplexities(models, streams), {})
