"""Serve a model from a workspace, honour an owner's request, and check the certificate as the owner would.

python examples/honour_a_request.py
"""

import tempfile
from pathlib import Path

import expunge
from expunge import datasets
from expunge.ledger.check import check_bundle
from expunge.workflow import Journey, Workspace


def main() -> None:
    """Forget the first patient of the Framingham teaching data, with a certificate."""
    patients = datasets.framingham().train
    recipe = expunge.Recipe(model="mlp", model_args={"hidden": [64]}, epochs=20, optimiser_args={"lr": 0.02})
    trained = expunge.train(recipe, patients, shards=20)

    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace.init(Path(folder) / "workspace")
        workspace.register("heart", trained, patients)

        who = patients.owners[0]
        filed, _ = workspace.file("heart", expunge.Request.remove_owner(who), key="letter of 1 March")
        print(f"request {filed.id}, due {filed.due_at}")

        journey = Journey(workspace, "heart", patients, method=expunge.Sisa(), exact=expunge.Sisa())
        print(journey.run("worker 1", now=True))

        bundle = workspace.ledger.certificates.bundle(filed.id)
        checked = check_bundle(bundle, [workspace.keys.signing.public_key()])
        print(checked)
        workspace.close()
    raise SystemExit(0 if checked.passed else 1)


if __name__ == "__main__":
    main()
