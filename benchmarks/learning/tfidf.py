"""What words alone say of which response people prefer: a Bradley-Terry model (Bradley and Terry 1952) over TF-IDF of
words and pairs of words, which has read nothing but the comparisons that it is fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import diags
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegressionCV

from rlhf_cluster.data.rows import ComparisonRow

STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # of the fit (the inverse of its L2 penalty), chosen by cross-validation


def accuracy(train: Sequence[ComparisonRow], heldout: Sequence[ComparisonRow], seed: int) -> float:
    """Share of the held-out pairs in which the preferred response has the higher score; ties are half."""
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    words.fit([text for row in train for text in row.responses])

    def difference(rows: Sequence[ComparisonRow]):  # type: ignore[no-untyped-def]
        better, worse = zip(*(pair for row in rows for pair in pairs(row)), strict=True)
        return words.transform(better) - words.transform(worse)

    apart = difference(train)
    turns = np.random.default_rng(seed).choice([-1.0, 1.0], apart.shape[0])  # which of a pair comes first is a coin's
    model = LogisticRegressionCV(
        Cs=STRENGTHS, fit_intercept=False, l1_ratios=(0,), scoring="neg_log_loss", use_legacy_attributes=False
    )
    model.fit(diags(turns) @ apart, turns > 0)
    margins = model.decision_function(difference(heldout))
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def pairs(row: ComparisonRow) -> list[tuple[str, str]]:
    """(preferred, other) of every two responses that do not tie."""
    ranked = list(zip(row.responses, row.ranks, strict=True))
    return [(one, other) for one, rank in ranked for other, lower in ranked if rank < lower]
