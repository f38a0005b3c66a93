"""A baseline for tasks with closed labels: a naive Bayes classifier."""

from collections.abc import Sequence

import numpy as np

from crma.data.examples import Example
from crma.data.sources import words

NGRAMS = (3, 4)  # lengths in characters; n-grams do not cross words


def naive_bayes(
    train: Sequence[Example], prompts: Sequence[str], *, smoothing: float = 0.1
) -> list[str]:
    """Classify prompts with multinomial naive Bayes, the completions being the labels.

    Features are the words of a prompt and their character n-grams. Textbook form: the label c that
    maximises log P(c) + sum over features f of n_f log P(f | c).

    Args:
        train: labelled examples.
        prompts: [n] what to classify. Features that `train` does not have are ignored.
        smoothing: added to every feature count.

    Returns:
        [n] labels.
    """
    labels = sorted({example.completion for example in train})
    known: set[str] = set()
    for example in train:
        known.update(_features(example.prompt))
    vocabulary = {feature: i for i, feature in enumerate(sorted(known))}
    counts = np.full((len(labels), len(vocabulary)), smoothing)
    prior = np.zeros(len(labels))
    for example in train:
        label = labels.index(example.completion)
        prior[label] += 1
        for feature in _features(example.prompt):
            counts[label, vocabulary[feature]] += 1
    log_likelihood = np.log(counts / counts.sum(axis=1, keepdims=True))
    log_prior = np.log(prior / prior.sum())
    answers = []
    for prompt in prompts:
        indices = [vocabulary[feature] for feature in _features(prompt) if feature in vocabulary]
        scores = log_prior + log_likelihood[:, indices].sum(axis=1)
        answers.append(labels[int(np.argmax(scores))])
    return answers


def _features(prompt: str) -> list[str]:
    """Return the words of a prompt, then their n-grams; each as often as it occurs."""
    parts = [f" {word} " for word in words(prompt)]
    features = list(parts)
    for part in parts:
        for n in NGRAMS:
            features += [part[start : start + n] for start in range(len(part) - n + 1)]
    return features
