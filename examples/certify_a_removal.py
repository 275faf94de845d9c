"""A removal with an (epsilon, delta) guarantee: what it says, and what it rests on.

python examples/certify_a_removal.py
"""

import expunge
from expunge import datasets
from expunge.certify import DERIVATIONS, Budget, NewtonHead, explain, recheck, settings_of


def main() -> None:
    """Remove three people of Adult, one after the other, under a budget agreed for 500 requests."""
    adult = datasets.get("adult")
    recipe = expunge.Recipe(model="softmax", epochs=2, batch_size=256, weight_decay=1e-3)
    trained = expunge.train(recipe, adult.train)

    method = NewtonHead(sigma=0.02, budget=Budget(epsilon=1.0, delta=1e-5, requests=500))
    model = method.begin(trained, adult.train)  # the first model has noise too
    for person in adult.train.ids[:3]:
        answer = method(model, adult.train, expunge.Request.remove([person]), rng=expunge.generator(0))
        model = answer.trained

    print(explain(answer.guarantee))
    problems = recheck(answer.guarantee, DERIVATIONS, settings_of(method, model.recipe))
    print("computed again from its constants:", "; ".join(problems) or "all holds")
    print(expunge.compare(trained, model, adult.train, adult.test))
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
