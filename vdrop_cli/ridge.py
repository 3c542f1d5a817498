"""A baseline for predicted ratings: ridge regression on TF-IDF of the words."""

from importlib.util import find_spec

import torch
from torch import Tensor

Texts = tuple[list[list[int]], Tensor]  # ids of each text, and its rating [R]
ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the penalty; the best on validation, or 1 without that part


def is_available() -> bool:
    """Whether scikit-learn is installed: `pip install 'vdrop[baselines]'`."""
    return find_spec("sklearn") is not None


def ridge(train: Texts, test: Texts, valid: Texts | None = None) -> Tensor:
    """Returns predicted ratings of the test texts, [R]; needs scikit-learn."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    words = TfidfVectorizer(analyzer=list)  # ids serve as words
    x_train = words.fit_transform(train[0])
    mean = train[1].double().mean().item()

    def fit(alpha: float) -> Ridge:
        return Ridge(alpha=alpha, random_state=0).fit(x_train, train[1].double().numpy() - mean)

    def predict(model: Ridge, texts: Texts) -> Tensor:
        return torch.from_numpy(model.predict(words.transform(texts[0]))) + mean

    models = [fit(alpha) for alpha in (ALPHAS if valid is not None else (1.0,))]
    if valid is not None:
        models.sort(key=lambda model: (predict(model, valid) - valid[1].double()).square().mean().item())
    return predict(models[0], test)
