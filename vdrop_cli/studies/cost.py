"""How long the parts of a training take on this machine, measured by a few of their steps."""

import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from vdrop_cli.device import choose_mc_batch, synchronize
from vdrop_cli.mc_passes import PassOptions
from vdrop_cli.monte_carlo import MonteCarlo
from vdrop_cli.perplexity import STREAM_STEPS, batched_loss, stream_perplexity
from vdrop_cli.random_streams import Stream
from vdrop_cli.settings.train import Train
from vdrop_cli.tasks import LanguageModelling, Sentiment, Task
from vdrop_cli.tasks.rated_parts import Part, first_texts
from vdrop_cli.training import Run


class Cost:
    """Seconds of an epoch with its validation (`epoch`), and of the evaluation at the end of a run
    (`result`).
    """

    STEPS = 5  # at most; a short text has fewer
    TEXTS = 100  # with ratings, that are read to see how long it takes

    def __init__(self, settings: Train, task: Task) -> None:
        self.task = task
        with TemporaryDirectory() as folder:
            run = Run(settings, self.task, Path(folder))
        self.model = run.model
        slow = run.gradient_step.slow_calls
        steps = list(islice(run.train_epoch(), slow + self.STEPS))
        speed = median(step.words_per_second for step in steps[slow:] or steps)
        run.gradient_step.close()
        words = sum(self.task.words(batch) for batch in self.task.batches(Stream(("cost",))))
        if isinstance(self.task, Sentiment):
            validation, self.result = self.measure_ratings(self.task)
        else:
            assert isinstance(self.task, LanguageModelling)
            validation, self.result = self.measure_language_model(self.task)
        if settings.schedule.average_decay is not None:  # the weights are measured beside their average
            validation, self.result = 2 * validation, 2 * self.result
        self.epoch = words / speed + validation

    def measure_language_model(self, task: LanguageModelling) -> tuple[float, float]:
        """Seconds of a validation, and of the result."""
        chunks = list(islice(task.valid_chunks(), self.STEPS))
        seconds = self.timed(lambda: batched_loss(self.model, chunks, task.batch_size))
        per_chunk = seconds / len(chunks)
        stretch_N = task.streams["test"][: STREAM_STEPS + 1]
        per_word = self.timed(lambda: stream_perplexity(self.model, stretch_N)) / len(stretch_N)
        words = sum(len(task.streams[part]) for part in ("valid", "test"))
        validation = len(list(task.valid_chunks())) * per_chunk
        return validation, task.batches_an_epoch * per_chunk + per_word * words

    def measure_ratings(self, task: Sentiment) -> tuple[float, float]:
        sample = first_texts(task.parts["test"], self.TEXTS)
        self.per_word = self.timed(lambda: task.predict(self.model, sample)) / sum(sample.lengths)
        result = self.reading(task.parts.values()) + self.timed(lambda: task.baselines)
        return self.reading([task.sample(name) for name in task.parts]), result

    def reading(self, parts: Iterable[Part]) -> float:
        return self.per_word * sum(sum(part.lengths) for part in parts)

    def mc(self, samples: int, mc_batch: int | None) -> float:
        """Seconds of an MC evaluation."""
        if isinstance(self.task, Sentiment):
            return samples * self.reading(self.task.sample(name) for name in (self.task.noise_part, "test"))
        assert isinstance(self.task, LanguageModelling)
        together = min(samples, choose_mc_batch(mc_batch, self.task.device, self.model.dropout.p_weight))
        stream_N = self.task.streams["test"]
        options = PassOptions(together, together, seed=1, word_dropout=False)
        passes = MonteCarlo(self.model, stream_N, options).run()
        words: list[int] = []
        seconds = self.timed(lambda: words.extend(islice(passes, self.STEPS)))
        return seconds / sum(words) * samples * len(stream_N)

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds until the device has done it, too."""
        synchronize(self.task.device)
        begun = time.perf_counter()
        work()
        synchronize(self.task.device)
        return time.perf_counter() - begun
