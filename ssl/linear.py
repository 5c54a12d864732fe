"""Linear probe: logistic regression on standardised features."""

import warnings

import numpy as np
from threadpoolctl import threadpool_limits

# Chosen once, for standardised features, and the same for every backbone: tuning it on the test
# folds would bias the result, and an inner search would take ten times as many fits.
INVERSE_REGULARISATION = 0.01
MAX_ITERATIONS = 1000


def probe(
    x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Predictions of a logistic regression, (T,) int64, their probabilities, (T, num_classes)
    float64, and whether it converged.

    x_train: (n, F) float32; y_train: (n,) int64; x_test: (T, F) float32. A class missing in
    y_train has the probability 0.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(y_train)) == 1:  # the other classes have no patient in this fold
        guess = np.full(len(x_test), y_train[0])
        return guess, np.eye(num_classes)[guess], True
    # In float64: a constant feature, summed in float32, would have a wrong mean and a nonzero
    # deviation, and dividing by that rounding error would blow it up.
    mean, std = (f(x_train, axis=0, dtype=np.float64) for f in (np.mean, np.std))
    scale = np.where(std > 1e-6 * (np.abs(mean) + 1e-12), 1 / np.maximum(std, 1e-30), 0)
    mean, scale = mean.astype(x_train.dtype), scale.astype(x_train.dtype)
    model = LogisticRegression(
        C=INVERSE_REGULARISATION, class_weight="balanced", max_iter=MAX_ITERATIONS
    )
    # A fit is hundreds of products of small matrices, which a second BLAS thread slows down.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((x_train - mean) * scale, y_train)
    x_test = (x_test - mean) * scale
    probability = np.zeros((len(x_test), num_classes))
    # In float64: float32 rounds what is nearly certain to 1, which would be ties for the AUROC.
    probability[:, model.classes_] = model.predict_proba(x_test.astype(np.float64))
    return model.predict(x_test), probability, int(np.max(model.n_iter_)) < MAX_ITERATIONS
