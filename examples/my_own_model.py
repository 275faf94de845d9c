"""A network of your own, rows of your own, and a model that was trained elsewhere.

python examples/my_own_model.py
"""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

import expunge


def make(shape: list[int], outputs: int) -> nn.Module:
    """Any module will do; its last linear layer is its head."""
    return nn.Sequential(nn.Linear(shape[0], 32), nn.Tanh(), nn.Linear(32, outputs))


def main() -> None:
    """Forget ten patients from a model made by `make`, exactly and by fine-tuning."""
    rows, labels = load_breast_cancer(return_X_y=True)
    scale = torch.tensor([50.0, 50, 200, 2500, 1, 1, 1, 1, 1, 1] * 3)  # fixed constants: the data's own would leak
    records = expunge.Records(torch.tensor(rows, dtype=torch.float32) / scale, labels)
    train, test = records.split(0.8, expunge.generator(0))

    recipe = expunge.Recipe(model=expunge.allow_code(make), epochs=30)
    trained = expunge.train(recipe, train)
    request = expunge.Request.remove(train.ids[:10])
    for method in (expunge.Retrain(), expunge.FineTune()):
        answer = method(trained, train, request, rng=expunge.generator(0))
        print(method.name, "·", answer)
        print(expunge.compare(trained, answer.trained, train, test, retrain=True), "\n")

    elsewhere = expunge.adopt(trained.module, recipe, train)  # as if somebody else had trained it
    try:
        expunge.Retrain()(elsewhere, train, request, rng=expunge.generator(0))
    except expunge.Unsupported as no:
        print("retrain:", no)
    print("fine-tune:", expunge.FineTune()(elsewhere, train, request, rng=expunge.generator(0)))


if __name__ == "__main__":
    main()
