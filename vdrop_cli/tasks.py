"""What a batch and a loss are.

T time steps of a chunk  B columns of the batch  N tokens of the stream
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vdrop_cli.config import ConfigError, Task
from vdrop_cli.corpora import Corpus
from vdrop_cli.dropout import ModelMasks
from vdrop_cli.layers import State
from vdrop_cli.model import LanguageModel


class Chunk(NamedTuple):
    """`number` counts the chunks of an epoch from 0."""

    number: int
    ids_TB: Tensor
    targets_TB: Tensor


def columns(stream_N: Tensor, batch: int) -> Tensor:
    """The stream as `batch` columns, [N // batch, batch]; column i starts at i·N/batch, halves rounded up (Zaremba et al. 2014, code)."""
    total, length = len(stream_N), len(stream_N) // batch
    starts = [(2 * i * total + batch) // (2 * batch) for i in range(batch)]
    return torch.stack([stream_N[start : start + length] for start in starts], 1)


def chunks(columns_NB: Tensor, bptt: int) -> Iterator[Chunk]:
    """Successive chunks of `bptt` steps, each word with the next one as its target; what does not fill a chunk is left out."""
    for number in range((len(columns_NB) - 1) // bptt):
        here = slice(number * bptt, (number + 1) * bptt)
        yield Chunk(number, columns_NB[here], columns_NB[1:][here])


class LanguageModelling:
    """The next word of one long text, read in columns; the state is carried from chunk to chunk."""

    def __init__(self, task: Task, corpus: Corpus, device: torch.device) -> None:
        self.task, self.corpus, self.device = task, corpus, device
        self.streams = {part: stream_N.to(device) for part, stream_N in corpus.parts.items()}
        for part in ("train", "valid"):
            length = len(self.streams[part]) // task.batch_size
            if (length - 1) // task.bptt < 1:
                raise ConfigError(
                    f"task.batch_size={task.batch_size} × task.bptt={task.bptt} does not fit the {part} part of {corpus.origin}, "
                    f"{len(self.streams[part])} tokens; make them smaller or take a longer text"
                )
        if len(self.streams["test"]) < 2:
            raise ConfigError(f"data.test: the test part of {corpus.origin} has no second word to predict; take a longer text")
        self.train_columns, self.valid_columns = (columns(self.streams[part], task.batch_size) for part in ("train", "valid"))

    @property
    def chunks_an_epoch(self) -> int:
        return (len(self.train_columns) - 1) // self.task.bptt

    @property
    def words_a_chunk(self) -> int:
        return self.task.batch_size * self.task.bptt

    def train_chunks(self) -> Iterator[Chunk]:
        return chunks(self.train_columns, self.task.bptt)

    def valid_chunks(self) -> Iterator[Chunk]:
        return chunks(self.valid_columns, self.task.bptt)

    def loss(self, model: LanguageModel, chunk: Chunk, state: State, masks: ModelMasks) -> tuple[Tensor, State]:
        """Nats, averaged over the batch and summed over the time steps, so that lr = 1 and the clip are on their published scale."""
        nll_TB, state = model.nll(chunk.ids_TB, chunk.targets_TB, state, masks)
        return nll_TB.sum() / self.task.batch_size, tuple(part.detach() for part in state)
