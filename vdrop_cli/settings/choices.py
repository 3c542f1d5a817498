"""Settings that are one of a few names."""

from vdrop_cli.policies import Choice


class Size(Choice):
    small = "small"
    medium = "medium"
    large = "large"


class TaskName(Choice):
    language_model = "language_model"
    sentiment = "sentiment"


class SplitProtocol(Choice):
    paper = (
        "paper"  # chunks, 80/20, no validation set: chunks of the text at the border may lie on both sides
    )
    clean = "clean"  # split by text, 70/10/20; the mean over a text's chunks; the best epoch on validation


class OptimizerName(Choice):
    sgd = "sgd"
    adam = "adam"
    adamw = "adamw"  # Adam with decoupled weight decay (Loshchilov & Hutter 2019)


class LrShape(Choice):
    step = "step"  # divided by decay at the end of every epoch after max_epoch
    plateau = "plateau"  # divided by decay after plateau_epochs epochs without a better validation
    cosine = "cosine"  # full until max_epoch, then half a cosine down to lr_end
    linear = "linear"  # full until max_epoch, then a line down to lr_end


class CorpusName(Choice):
    ptb = "ptb"
    pydoc = "pydoc"
    text = "text"
    hub = "hub"
    cornell = "cornell"
    vader = "vader"
    text_regression = "text_regression"


class Backend(Choice):
    auto = "auto"
    reference = "reference"
    fused = "fused"
    native = "native"
    triton = "triton"


class Precision(Choice):
    auto = "auto"  # bf16 where the processor has instructions for it
    fp32 = "fp32"
    bf16 = "bf16"  # all matrix products but the forward logits; states, gates, losses and weights stay fp32


# the schedule that runs of a dropout are trained with, where it has another name
SCHEDULES = {
    **dict.fromkeys(("variational_untied", "variational_no_word", "naive", "naive_word"), "variational"),
    "moon_word": "moon",
}


class BenchSize(Choice):
    small = "small"
    medium = "medium"
    large = "large"
    sentiment = "sentiment"  # the model of ratings


class BenchPart(Choice):
    step = "step"  # a whole training step of the language model
    layer = "layer"  # forward and backward of one layer
    mc = (
        "mc"  # MC evaluation; only cells with dropout. On a GPU latency bounds it, and not the products' rate
    )
    checkpoint = "checkpoint"  # writing one, to the disk of `outputs`; only variational
    ratings = "ratings"  # a whole training step of the model of ratings, of the size `sentiment`
    # forward and backward of a layer of one direction and of a bidirectional one, LSTM and GRU
    directions = "directions"
    # one step of a cell at batch 1, forward, without gradients, in fp32; `sentiment` has 128 units
    cell_step = "cell_step"


class BenchCell(Choice):
    none = "none"
    zaremba = "zaremba"
    naive = "naive"
    variational = "variational"
    variational_untied = "variational_untied"
    fused = "fused"  # variational with backend=fused
    # nothing but the matrix products of a step, at their own shapes: what the rest costs is the difference
    products = "products"
    torch_lstm = "torch_lstm"  # torch.nn.LSTM, without dropout; in `cell_step` its cell
    cell_loop = (
        "cell_loop"  # a loop over nn.LSTMCell, with masks on inputs and recurrence as those of variational
    )
    keras = "keras"  # its LSTM with dropout and recurrent_dropout, in fp32; where it is installed
    bidirectional = "bidirectional"  # a variational LSTM of two directions; only in `directions`
    gru = "gru"  # a variational GRU; only in `directions` and `cell_step`
    bidirectional_gru = "bidirectional_gru"  # the same of two directions; only in `directions`
    torch_gru = "torch_gru"  # torch.nn.GRU in `directions`, its cell in `cell_step`; only there


class StudyName(Choice):
    table1 = "table1"  # perplexities on Penn Treebank
    film_reviews = "film_reviews"  # ratings, section 5.2 of the paper
    baselines = "baselines"  # newer models on Penn Treebank


class LoggerName(Choice):
    tensorboard = "tensorboard"
    wandb = "wandb"
    trackio = "trackio"
    mlflow = "mlflow"
    none = "none"


class Interval(Choice):
    gaussian = "gaussian"  # symmetric, from mean and standard deviation
    quantile = "quantile"  # between quantiles of the passes, each with the observation noise
    conformal = "conformal"  # as wide as the errors on the validation part ask for


class InputFormat(Choice):
    lines = "lines"  # one text a line
    csv = "csv"  # commas between columns
    tsv = "tsv"  # tabs between columns
    jsonl = "jsonl"  # a JSON object a line


class OutputFormat(Choice):
    table = "table"
    json = "json"  # an object a line
    csv = "csv"


class Pictures(Choice):
    png = "png"
    svg = "svg"
    none = "none"
