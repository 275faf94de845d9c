"""Train on real patients in shards, forget one of them, and check the bytes against training without that patient.

python examples/forget_a_patient.py
"""

import expunge
from expunge import datasets


def main() -> None:
    """Forget the first patient of the Framingham teaching data."""
    patients = datasets.framingham()
    recipe = expunge.Recipe(model="mlp", model_args={"hidden": [64]}, epochs=20, optimiser_args={"lr": 0.02})
    trained = expunge.train(recipe, patients.train, shards=20)

    who = patients.train.owners[0]
    answer = expunge.Sisa()(trained, patients.train, expunge.Request.remove_owner(who), rng=expunge.generator(0))
    print(answer)
    print(expunge.compare(trained, answer.trained, patients.train, patients.test))

    remaining = patients.train.without(patients.train.of_owner(who).ids)
    scratch = expunge.train(recipe, remaining, shards=20)
    same = scratch.digest() == answer.trained.digest()
    print("byte for byte the training without that patient:", "yes" if same else "NO")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
