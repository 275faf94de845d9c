"""Prune first, then unlearn: the same requests on a dense and on a sparse model, beside exact retraining.

python examples/prune_then_unlearn.py
"""

from dataclasses import replace

import expunge
from expunge import datasets


def main() -> None:
    """Forget a class of handwritten digits by several methods, dense and 90 % sparse."""
    digits = datasets.optdigits()
    dense = expunge.Recipe(model="mlp", model_args={"hidden": [64]}, epochs=10)
    sparse = replace(dense, pruning=expunge.Pruning(sparsity=0.9, rewind=1))  # train, prune, rewind, train again
    request = expunge.Request.remove_class(3)
    for name, recipe in (("dense", dense), ("sparse", sparse)):
        trained = expunge.train(recipe, digits.train)
        split = request.split(digits.train)
        # Of a sparse model, retraining finds the mask anew: the old one was found with the rows that must go.
        methods = (expunge.Retrain(), expunge.FineTune(), expunge.L1Sparse(), expunge.InfluenceUnlearning())
        for method in methods:
            answer = method(trained, digits.train, request, rng=expunge.generator(0))
            row = expunge.measure(answer.trained, split.forget, split.retain, digits.test, method=method.name)
            print(f"{name:6} {method.name:20} right on forgotten rows: {row.forget:.0%} %, on test: {row.test:.0%} %")
    pruned = expunge.Pruned(sparsity=0.9, by=expunge.SynFlow(), then=expunge.FineTune())  # of the dense model, at once
    print(pruned(expunge.train(dense, digits.train), digits.train, request, rng=expunge.generator(0)))


if __name__ == "__main__":
    main()
