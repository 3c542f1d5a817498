"""The examples: each learns, and the laws of masks hold where systems are built of layers and cells."""

import math
import re
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import mark_long
from tests.processes import ROOT
from vdrop_cli.layers import LSTM, ModelMasks
from vdrop_cli.sampling import mc_dropout

FOLDER = ROOT / "examples"
RECORDS = ROOT / "outputs" / "record" / "examples"
SYSTEMS = {  # every system that cites the paper, and its examples
    "yaringal/BayesianRNN": ["language_model", "rating"],
    "josephdviviano/lstm-variational-dropout": ["layer"],
    "abdelrahmansaud/vLSTM": ["cell"],
    "bhaddow/dev-nematus": ["translation"],
    "samihadouaj/siyanWork": ["translation"],
    "Waino/hnmt": ["encoder"],
    "HKUST-KnowComp/R-Net": ["span"],
    "magahub/songrnn": ["streaming"],
    "zhangyaoyuan/GAN-Simplification": ["transformer"],
    "SuperKam91/bnn": ["mlp"],
}
FIGURES = {  # example: steps, the figure with dropout, a bound well below that of guessing
    "mlp": (200, "mc", 0.9),  # guessing the mean: 1.4
    "transformer": (80, "mc", 0.58),  # log 2 = 0.69
    "cell": (80, "variational", 0.55),  # 0.95
    "layer": (70, "variational", 2.7),  # log 20 = 3.0
    "rating": (100, "mc", 0.85),  # 1.1
    "language_model": (80, "variational", 20.0),  # 40 words
    "awd_lstm": (120, "awd", 25.0),  # 40 words
    "streaming": (80, "variational", 0.5),  # 1.0: nothing written down
    "span": (50, "variational", 0.5),  # 255 of 256
    "encoder": (110, "variational", 1.8),  # log 30 = 3.4
    "translation": (130, "variational", 0.7),  # 14 of 15
}


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    torch.manual_seed(0)


def example(name: str) -> ModuleType:
    return import_module(name)


LONG = ("encoder", "rating", "translation")  # learn for ten seconds and more


@pytest.mark.parametrize("name", mark_long(FIGURES, FIGURES.keys() - set(LONG)))
def test_an_example_learns(name: str) -> None:
    """With fewer steps than as a program: between the floor and what is clearly better than guessing."""
    steps, figure, bound = FIGURES[name]
    figures = example(name).main(steps)
    assert figures["floor"] < figures[figure] < bound, figures
    assert "none" in figures


@pytest.mark.parametrize("name", LONG)
def test_an_example_runs_to_its_end(name: str) -> None:
    figures = example(name).main(1)
    assert {"floor", "none", FIGURES[name][1]} <= figures.keys()
    assert all(
        math.isfinite(figure) and figure > figures["floor"] > 0
        for figure in figures.values()
        if figure != figures["floor"]
    )


def test_uncertainty_grows_away_from_the_data() -> None:
    figures = example("mlp").main(100)
    assert figures["std far"] > 2 * figures["std near"] > 0


def test_held_steps_are_the_whole_sequence() -> None:
    """One draw of masks, passed to single steps, is what the layer computes with it."""
    cell = example("cell").Forecaster(0.3, 0.4).cell
    layer = LSTM(cell.input_size, cell.hidden_size, dropout=cell.dropout)
    layer.load_state_dict({f"{name}_l0": weight for name, weight in cell.state_dict().items()})
    masks = cell.masks(3)
    x_TBD = torch.randn(5, 3, cell.input_size)
    state = None
    h_TBH = []
    for x_BD in x_TBD:
        state = cell(x_BD, state, masks=masks)
        h_TBH.append(state[0])
    torch.testing.assert_close(torch.stack(h_TBH), layer(x_TBD, masks=masks)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_windows_of_a_stream_are_the_whole(training: bool) -> None:
    """State and masks are carried from window to window; the next song has masks of its own."""
    model, x_TBD = example("streaming").Listener(0.5).train(training), torch.randn(12, 3, 8)

    def heard(window: int) -> Tensor:
        torch.manual_seed(1)
        return model(x_TBD, window)

    for window in (1, 5, 12):
        torch.testing.assert_close(heard(window), heard(4), rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x_TBD), model(x_TBD)) != training


def test_a_row_of_the_beam_has_its_sentences_masks() -> None:
    translation = example("translation")
    model = translation.Translator(0.4, 0.4)
    source_TB, lengths_B, _, _ = translation.sample(3, seed=1)
    sentences, h_BH = model.encode(source_TB, lengths_B)
    word_B, beam = torch.tensor([1, 2, 3]), sentences.repeat(4)
    log_p_BV, next_BH = model.step(word_B, h_BH, sentences)
    rows = (word_B.repeat_interleave(4), h_BH.repeat_interleave(4, 0), beam)
    for result, expected in zip(model.step(*rows), (log_p_BV, next_BH), strict=True):
        torch.testing.assert_close(result, expected.repeat_interleave(4, 0))
    first = torch.tensor([0, 0, 0])
    _, (one_H, other_H, _) = model.step(first, h_BH[first], sentences)
    assert not torch.allclose(one_H, other_H), "sentences differ in their masks"


def test_hypotheses_are_reordered_and_masks_are_not() -> None:
    """A beam of one is the greedy search with the same masks; a wider one finds what is more probable."""
    translation = example("translation")
    model = translation.Translator(0.4, 0.4)
    source_TB, lengths_B, _, _ = translation.sample(40, seed=1)
    translations = {}
    for n in (1, 4):
        torch.manual_seed(1)
        translations[n] = model.search(source_TB, lengths_B, n)
    scores = {}
    for n, words_UB in translations.items():
        torch.manual_seed(1)
        log_p_UBV = model(source_TB, lengths_B, words_UB)
        log_p_UB = log_p_UBV.gather(2, words_UB[..., None])[..., 0]
        ended_UB = (words_UB == translation.END).cumsum(0) - (words_UB == translation.END).int() > 0
        scores[n] = log_p_UB.masked_fill(ended_UB, 0.0).sum(0)
        if n == 1:
            greedy_UB = log_p_UBV.argmax(-1)
            assert torch.equal(greedy_UB[~ended_UB], words_UB[~ended_UB])
    assert scores[4].mean() > scores[1].mean() and not torch.equal(translations[1], translations[4])


@torch.no_grad()
def test_padding_is_not_seen_by_layers() -> None:
    """Neither by one with a start state, nor by one whose last state counts."""
    layer, rating = example("layer"), example("rating")
    model, (ids_BT, dialect_B, lengths_B) = layer.Reader(0.3).eval(), layer.sample(6, seed=1)
    word_BT = torch.arange(layer.LONGEST) < lengths_B[:, None]
    one_BT, other_BT = (ids_BT[:, :-1].masked_fill(~word_BT, word) for word in (0, 1))
    results = [model(ids, dialect_B, lengths_B)[word_BT] for ids in (one_BT, other_BT)]
    assert torch.equal(*results)
    model, (ids_BT, _) = rating.Rater(0.3, 0.2).eval(), rating.sample(6, seed=1)
    torch.testing.assert_close(model(ids_BT), model(nn.functional.pad(ids_BT, (0, 5))))


@torch.no_grad()
def test_padding_is_not_seen_by_encoders() -> None:
    """A backward layer begins at each sentence's own last word, and attention leaves padding out."""
    encoder, translation = example("encoder"), example("translation")
    source_TB, target_TB, _, lengths_B = encoder.sample(6, seed=1)
    model = encoder.Translator(0.3, 0.0).eval()
    word_TB = torch.arange(encoder.LONGEST)[:, None] < lengths_B
    sources = [source_TB.masked_fill(~word_TB, word) for word in (0, 1)]
    assert torch.equal(*(model(source, target_TB, lengths_B)[word_TB] for source in sources))
    source_TB, lengths_B, _, _ = translation.sample(6, seed=1)
    model = translation.Translator(0.3, 0.3).eval()
    word_TB = torch.arange(translation.LONGEST)[:, None] < lengths_B
    sources = [source_TB.masked_fill(~word_TB, word) for word in (0, 1)]
    states = [model.encode(source, lengths_B)[0].states_TBJ for source in sources]
    assert torch.equal(*states) and torch.equal(*(model.search(source, lengths_B) for source in sources))


def models() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Every example's model with dropout, and an input."""
    e = {name: example(name) for name in FIGURES}
    ids_TB, (ids_BT, dialect_B, steps_B) = torch.randint(20, (5, 3)), e["layer"].sample(3, seed=1)
    source_TB, target_TB, _, lengths_B = e["encoder"].sample(3, seed=1)
    return {
        "mlp": (e["mlp"].network(0.5), (torch.randn(3, 8),)),
        "transformer": (e["transformer"].Marker(0.5), (ids_TB.T,)),
        "cell": (e["cell"].Forecaster(0.5, 0.5), (torch.randn(5, 3, 6),)),
        "layer": (e["layer"].Reader(0.5), (ids_BT[:, :-1], dialect_B, steps_B)),
        "rating": (e["rating"].Rater(0.5, 0.5), (e["rating"].sample(3, seed=1)[0],)),
        "language_model": (e["language_model"].LanguageModel(0.5, 0.5), (ids_TB,)),
        "awd_lstm": (e["awd_lstm"].AWD(0.5, 0.5, 0.5), (ids_TB,)),
        "streaming": (e["streaming"].Listener(0.5), (torch.randn(12, 3, 8),)),
        "span": (e["span"].Reader(0.5, 0.5), e["span"].sample(3, seed=1)[:2]),
        "encoder": (e["encoder"].Translator(0.5, 0.5), (source_TB, target_TB, lengths_B)),
        "translation": (e["translation"].Translator(0.5, 0.5), e["translation"].sample(3, seed=1)[:3]),
    }


def output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@torch.no_grad()
def test_evaluation_is_deterministic_and_mc_dropout_leaves_every_flag_as_it_was() -> None:
    built = models()
    assert list(built) == list(FIGURES)
    for name, (model, x) in built.items():
        assert not torch.equal(output(model(*x)), output(model(*x))), f"{name} drops in training"
        model.eval()
        plain = output(model(*x))
        assert torch.equal(output(model(*x)), plain), name
        with mc_dropout(model):
            assert not torch.equal(output(model(*x)), output(model(*x))), name
        assert not any(module.training for module in model.modules()), name
        assert torch.equal(output(model(*x)), plain), name


def test_directions_differ_in_their_masks_and_passage_and_question_agree() -> None:
    span = example("span")
    encoder = span.Reader(0.5, 0.5).encoder
    masks = encoder.masks(16, 3)
    for forward, backward in zip(masks.layers[::2], masks.layers[1::2], strict=True):
        assert not torch.equal(forward.x, backward.x) and not torch.equal(forward.h, backward.h)
    model, drawn = span.Reader(0.5, 0.5), []

    def record(_: nn.Module, __: object, options: dict[str, ModelMasks]) -> None:
        drawn.append(options["masks"])

    model.encoder.register_forward_pre_hook(record, with_kwargs=True)
    model(*span.sample(3, seed=1)[:2])
    passage, question = drawn
    assert passage is question and passage is not None


def test_gates_share_a_mask_and_the_proposal_has_its_own() -> None:
    for cell in example("translation").Translator(0.5, 0.5).cells:
        mask = cell.masks(4).layers[0].h
        assert torch.equal(mask[:, 0], mask[:, 1]) and not torch.equal(mask[:, 0], mask[:, 2])


def table() -> list[tuple[str, list[str]]]:
    """The systems of the page's table, each with its files."""
    page = (ROOT / "docs" / "examples.md").read_text()
    rows = [line.split("|") for line in page.partition("\n## ")[0].splitlines() if line.startswith("| [")]
    systems = [re.findall(r"\[([\w/-]+)\]", row[1])[0] for row in rows]
    files = [re.findall(r"`(\w+)\.py`", row[2]) for row in rows]
    return list(zip(systems, files, strict=True))


def test_the_page_has_the_ten_systems_and_the_files_that_are_here() -> None:
    assert table() == [*SYSTEMS.items(), ("AWD-LSTM", ["awd_lstm"])] and len(SYSTEMS) == 10
    files = {path.stem for path in FOLDER.glob("*.py")} - {"early_stopping"}
    assert files == set(FIGURES) == {name for _, names in table() for name in names}
    page = (ROOT / "docs" / "examples.md").read_text()
    headings = [f"[{name}](https://github.com/{name})" for name in SYSTEMS]
    assert re.findall(r"^## (.*)", page, re.MULTILINE) == [
        "The figures",
        *headings,
        "AWD-LSTM, beside the ten",
    ]
    assert set(re.findall(r"\$ python examples/(\w+)\.py", page)) == files
    assert "(docs/examples.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", FIGURES)
def test_the_page_has_figures_of_each_example(name: str) -> None:
    """And its first line says of which system it is."""
    page = (ROOT / "docs" / "examples.md").read_text()
    block = page.partition(f"$ python examples/{name}.py\n")[2].partition("```")[0]
    assert block == (RECORDS / f"{name}.txt").read_text()
    first = (FOLDER / f"{name}.py").read_text().partition("\n")[0]
    systems = [system for system, names in SYSTEMS.items() if name in names] or ["AWD-LSTM"]
    assert all(system in first for system in systems)


def test_the_page_has_the_figures_of_early_stopping_and_those_with_dropout_are_lower() -> None:
    recorded = dict(line.split() for line in (RECORDS / "early_stopping.txt").read_text().splitlines())
    assert list(recorded) == list(example("early_stopping").EXAMPLES) and set(recorded) == set(FIGURES)
    page = (ROOT / "docs" / "examples.md").read_text()
    names, _, values = page[page.index("| `language_model` | `rating`") :].splitlines()[:3]
    shown = zip(re.findall(r"`(\w+)`", names), values.strip("| ").split(" | "), strict=True)
    for name, value in shown:
        digits = len(value.partition(".")[2])
        assert value == f"{float(recorded[name]):.{digits}f}"
        for line in (RECORDS / f"{name}.txt").read_text().splitlines():
            figure, with_dropout = line.rsplit(None, 1)
            if figure.strip() in ("variational", "dropout", "awd", "mc"):
                assert float(with_dropout) < float(recorded[name]), (name, figure)


def test_the_best_of_several_numbers_of_steps_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    early_stopping = example("early_stopping")

    def main(steps: int = 80) -> dict[str, float]:
        return {"none": abs(steps - 33.0), "variational": 0.0}

    monkeypatch.setattr(early_stopping, "import_module", lambda name: SimpleNamespace(main=main))
    assert early_stopping.best_without_dropout("any") == 3.0  # after 30 of 80 steps
