"""What is easily had in predicting ratings, to be printed beside what was trained: ridge regression on TF-IDF
of the words.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

Texts = tuple[list[list[int]], Tensor]  # ids of each text, and its rating [R]
STRENGTHS = (
    0.1,
    0.3,
    1.0,
    3.0,
    10.0,
)  # of the penalty; the best on validation is taken, 1 where there is none


def is_there() -> bool:
    """Whether scikit-learn is: `pip install 'vdrop[baselines]'`."""
    return find_spec("sklearn") is not None


def ridge(train: Texts, test: Texts, valid: Texts | None = None) -> Tensor:
    """Predicted ratings of the test texts [R]. Needs scikit-learn."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    words = TfidfVectorizer(analyzer=list)  # ids are words enough
    x_train = words.fit_transform(train[0])
    mean = train[1].double().mean().item()

    def fitted(strength: float) -> Ridge:
        return Ridge(alpha=strength, random_state=0).fit(x_train, train[1].double().numpy() - mean)

    def predicted(model: Ridge, texts: Texts) -> Tensor:
        return torch.from_numpy(model.predict(words.transform(texts[0]))) + mean

    strengths = STRENGTHS if valid is not None else (1.0,)
    models = [fitted(strength) for strength in strengths]
    if valid is not None:
        models.sort(key=lambda model: (predicted(model, valid) - valid[1].double()).square().mean().item())
    return predicted(models[0], test)
