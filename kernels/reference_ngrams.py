"""The plain twin of ngrams.py: modified Kneser-Ney by dictionaries of tuples, from the definition."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np


def ngram_counts(text: list[int], order: int, end_of_text: int) -> list[Counter]:
    """counts[n - 1]: occurrences of the n-grams of each document, which begins with end_of_text, n = 1..order."""
    counts: list[Counter] = [Counter() for _ in range(order)]
    document = [end_of_text]
    for token in text:
        document.append(token)
        for n in range(1, min(order, len(document)) + 1):
            counts[n - 1][tuple(document[len(document) - n :])] += 1
        if token == end_of_text:
            document = [end_of_text]
    return counts


def _used(counts: list[Counter], end_of_text: int) -> list[dict]:
    """What the formulas count of the n-grams of each length: occurrences, or different tokens before them."""
    used: list[dict] = []
    for n, found in enumerate(counts, 1):
        if n == len(counts):
            used.append(dict(found))
            continue
        before = defaultdict(set)
        for gram in counts[n]:
            before[gram[1:]].add(gram[0])
        begins = {g: c for g, c in found.items() if n > 1 and g[0] == end_of_text}
        used.append({g: begins.get(g, len(before[g])) for g in found})
    return used


def kneser_ney(
    text: list[int], vocab_size: int, end_of_text: int, order: int, least: int = 1, without: int | None = None
):
    """A function (context, token) -> probability; see ngrams.count_ngrams.

    without : position in the text; see NgramModel.without_document
    """
    counts, alone = ngram_counts(text, order, end_of_text), set()
    used = _used(counts, end_of_text)
    discounts = [_discounts(list(u.values())) for u in used]
    if without is not None:
        begin = max((t + 1 for t in range(without) if text[t] == end_of_text), default=0)
        end = next((t for t in range(without, len(text)) if text[t] == end_of_text), len(text) - 1)
        own = ngram_counts(text[begin : end + 1], order, end_of_text)
        alone = {gram for n in range(1, order) for gram, c in own[n].items() if c == counts[n][gram]}
        document = [end_of_text, *text[begin : without + 1]]
        for n in range(2, min(order, len(document)) + 1):
            gram = tuple(document[len(document) - n :])
            counts[n - 1][gram] -= counts[n - 1][gram] if gram in alone else 1
            counts[n - 1] += Counter()  # drops what does not occur any more
        used = used[:1] + _used(counts, end_of_text)[1:]
    followers: list[dict] = [defaultdict(dict) for _ in range(order)]
    for n in range(2, order + 1):
        for gram, count in used[n - 1].items():
            followers[n - 1][gram[:-1]][gram[-1]] = count

    def kept(gram: tuple) -> bool:
        return len(gram) < 3 or all(counts[m - 1][gram[:m]] >= least for m in range(3, len(gram) + 1))

    def probability(context: list[int], token: int) -> float:
        total = max(sum(used[0].values()), 1)
        count = used[0].get((token,), 0)
        mass = sum(discounts[0](c) for c in used[0].values()) if used[0] else 1
        value = (count - discounts[0](count)) / total + mass / total / vocab_size
        for n in range(2, order + 1):
            if n - 1 > len(context):
                break
            h = tuple(context[len(context) - n + 1 :])
            found = followers[n - 1].get(h)
            if not found or not kept(h) or h in alone:
                continue
            total = sum(found.values())
            alpha = {w: (c - discounts[n - 1](c)) / total for w, c in found.items() if kept((*h, w))}
            value = alpha.get(token, 0) + (1 - sum(alpha.values())) * value
        return value

    return probability


def _discounts(counts: list[int]):
    n = [sum(c == i for c in counts) for i in range(5)]
    if not n[1] or not n[2]:
        values = [0, 0.5, 0.5, 0.5]
    else:
        share = n[1] / (n[1] + 2 * n[2])
        second = 2 - 3 * share * n[3] / n[2]
        third = 3 - 4 * share * n[4] / n[3] if n[3] else second
        values = [0, *np.clip([1 - 2 * share * n[2] / n[1], second, third], 0.1, [1, 2, 3])]
    return lambda count: float(values[min(count, 3)])
