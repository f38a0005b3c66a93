"""What a trained adapter has to beat on closed labels: a naive Bayes classifier."""

from collections.abc import Sequence

import numpy as np

from crma.data.examples import Example
from crma.data.sources import words

NGRAMS = (3, 4)  # characters, within words


def naive_bayes(
    train: Sequence[Example], prompts: Sequence[str], *, smoothing: float = 0.1
) -> list[str]:
    """The completions a multinomial naive Bayes classifier gives to prompts.

    Features are the words of a prompt and their character n-grams; `smoothing` is added to every count. Textbook form:
    argmax over labels c of log P(c) + sum over features f of n_f log P(f | c).
    """
    labels = sorted({example.completion for example in train})
    vocabulary = {
        feature: i
        for i, feature in enumerate(sorted({f for e in train for f in _features(e.prompt)}))
    }
    counts = np.full((len(labels), len(vocabulary)), smoothing)
    prior = np.zeros(len(labels))
    for example in train:
        label = labels.index(example.completion)
        prior[label] += 1
        for feature in _features(example.prompt):
            counts[label, vocabulary[feature]] += 1
    log_likelihood = np.log(counts / counts.sum(axis=1, keepdims=True))
    log_prior = np.log(prior / prior.sum())
    known = ([vocabulary[f] for f in _features(prompt) if f in vocabulary] for prompt in prompts)
    return [
        labels[int(np.argmax(log_prior + log_likelihood[:, features].sum(axis=1)))]
        for features in known
    ]


def _features(prompt: str) -> list[str]:
    parts = [f" {word} " for word in words(prompt)]
    return parts + [
        part[i : i + n] for part in parts for n in NGRAMS for i in range(len(part) - n + 1)
    ]
