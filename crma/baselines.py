"""What a trained adapter has to beat on closed labels: a naive Bayes classifier."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial

from crma.data import Example
from crma.sources import words

NGRAMS = (3, 4)  # characters, within words


def naive_bayes(train: Sequence[Example], prompts: Sequence[str], *, smoothing: float = 0.1) -> list[str]:
    """The completions a multinomial naive Bayes classifier gives to prompts.

    Features are the words of a prompt and their character n-grams; `smoothing` is added to every count. Textbook form:
    argmax over labels c of log P(c) + sum over features f of n_f log P(f | c).
    """
    prior = Counter(example.completion for example in train)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for example in train:
        counts[example.completion].update(_features(example.prompt))
    vocabulary = set().union(*counts.values())
    totals = {label: count.total() + smoothing * len(vocabulary) for label, count in counts.items()}

    def log_odds(label: str, features: Sequence[str]) -> float:
        likelihoods = ((counts[label][feature] + smoothing) / totals[label] for feature in features)
        return math.log(prior[label]) + math.fsum(map(math.log, likelihoods))

    known = ([feature for feature in _features(prompt) if feature in vocabulary] for prompt in prompts)
    return [max(sorted(prior), key=partial(log_odds, features=features)) for features in known]


def _features(prompt: str) -> list[str]:
    parts = [f" {word} " for word in words(prompt)]
    return parts + [part[i : i + n] for part in parts for n in NGRAMS for i in range(len(part) - n + 1)]
