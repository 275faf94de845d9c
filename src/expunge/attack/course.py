r"""Requests over a horizon, with other people's requests in between: an optimal control problem.

The state is the parameters :math:`\theta_t`, the control what the attacker asks for at step t, the noise what others
ask for. With :math:`B` as in `victim`, each step moves the parameters by

.. math:: \theta_{t+1} = \theta_t + B\,\Big(\sum_i m_{ti} \nabla\ell_i(\theta_t)
          - \sum_i m_{ti} \nabla\ell(z_i + \delta_{ti}; \theta_t) + \sum_{j \in \xi_t} \nabla\ell_j(\theta_t)\Big),

the second sum only for requests that replace. B is frozen at the first state. Gradients come from the discrete
adjoint: :math:`\lambda_T = \nabla\Phi(\theta_T)` and, with :math:`q_t = B \lambda_{t+1}`,
:math:`\lambda_t = \lambda_{t+1} + \nabla^2[\cdots]_t\, q_t + \nabla c_t`: one Hessian product a step, and nothing is
ever differentiated through the steps. By m_ti it is :math:`\langle\nabla\ell_i(\theta_t), q_t\rangle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.attack.curvature import input_gradient
from expunge.attack.victim import Victim
from expunge.calculus.objective import second_derivatives
from expunge.core.errors import Misuse
from expunge.core.protocols import Target

_BATCH = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What is asked at each step, for the rows `mine` of one victim.

    Attributes:
        weights: (steps, n) of each row in each step's request, 1 for a row that is asked for.
        moved: (steps, n, ...) what the rows are replaced by, as the model reads them; None: they are removed.
    """

    weights: Float[Tensor, "steps n"]
    moved: Tensor | None = None

    def only(self, rows: Tensor) -> Plan:
        """What is asked of these rows."""
        return Plan(weights=self.weights[:, rows], moved=None if self.moved is None else self.moved[:, rows])

    def cut(self, steps: slice) -> Plan:
        """What is asked at these steps."""
        return Plan(weights=self.weights[steps], moved=None if self.moved is None else self.moved[steps])


@dataclass(frozen=True, kw_only=True, eq=False)
class Course:
    """One model's way through the requests.

    Attributes:
        victim: the model; its `answer` is B, frozen.
        x: the rows that the attacker may ask for, as the model reads them.
        y: their labels.
        benign: for each scenario and step, the rows that others ask to be removed.
        starts: for each scenario, the parameters at the first step.
        along: weight of the adversary's loss at each state on the way, against 1 at the end.
    """

    victim: Victim
    x: Tensor
    y: Tensor
    benign: Sequence[Sequence[tuple[Tensor, Tensor]]]
    starts: Sequence[Float[Tensor, " p"]]
    along: float = 0.0

    def summed(self, scenario: int, step: int, at: Tensor, plan: Plan) -> Tensor:
        """The loss whose gradient B is applied to: of what leaves, less of what comes."""
        losses, weights = self.victim.objective.losses, plan.weights[step].to(at)
        others, labels = self.benign[scenario][step]
        total = losses(others, labels, at).sum() if len(labels) else 0.0 * at.sum()
        chosen = weights.nonzero().flatten()
        if len(chosen):
            total = total + torch.dot(weights[chosen], losses(self.x[chosen], self.y[chosen], at))
            if plan.moved is not None:
                moved = plan.moved[step][chosen]
                total = total - torch.dot(weights[chosen], losses(moved, self.y[chosen], at))
        return total

    def step(self, scenario: int, step: int, at: Tensor, plan: Plan) -> Tensor:
        """The parameters after one more step. Cost: a gradient of the rows that move, and a solve."""
        gradient: Tensor = torch.func.grad(lambda vector: self.summed(scenario, step, vector, plan))(at)
        return at + self.victim.answer(gradient)

    def states(self, scenario: int, plan: Plan) -> list[Tensor]:
        """The parameters before each step, and after the last."""
        states = [self.starts[scenario]]
        for step in range(len(plan.weights)):
            states.append(self.step(scenario, step, states[-1], plan))
        return states

    def advanced(self, now: Plan) -> Course:
        """The way from behind the first step, at which this was asked; of each scenario as it is predicted."""
        starts = [self.step(scenario, 0, start, now) for scenario, start in enumerate(self.starts)]
        return replace(self, starts=starts, benign=[steps[1:] for steps in self.benign])

    def value(self, target: Target, plan: Plan) -> float:
        """The adversary's loss at the end and, weighted, on the way; the mean over scenarios."""
        total = 0.0
        for scenario in range(len(self.starts)):
            *way, last = self.states(scenario, plan)
            total += float(self.victim.loss(target, last))
            if self.along:
                total += self.along * sum(float(self.victim.loss(target, state)) for state in way[1:])
        return total / len(self.starts)

    def adjoints(self, target: Target, scenario: int, plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
        """The states before each step, and ``q_t = B lambda_{t+1}`` of each. Cost: a Hessian product a step."""
        states = self.states(scenario, plan)
        costate, answers = self.victim.loss_gradient(target, states[-1]), list[Tensor]()
        for step in reversed(range(len(plan.weights))):
            here, answer = states[step], self.victim.answer(costate)
            answers.insert(0, answer)
            if not step:
                break
            costate = costate + self._hessian_product(scenario, step, here, plan, answer)
            if self.along:
                costate = costate + self.along * self.victim.loss_gradient(target, here)
        return states[:-1], answers

    def _hessian_product(self, scenario: int, step: int, at: Tensor, plan: Plan, v: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda vector: self.summed(scenario, step, vector, plan))
        with second_derivatives():
            product: Tensor = torch.func.jvp(gradient, (at,), (v,))[1]
        return product

    def weight_gradient(self, target: Target, plan: Plan) -> Float[Tensor, "steps n"]:
        """Of `value` by the plan's weights: the mean over scenarios.

        Cost: a scenario and step, a Hessian product of the rows that move and a forward-mode pass over all candidates.
        """
        total = torch.zeros(plan.weights.shape, dtype=self.victim.dtype)
        for scenario in range(len(self.starts)):
            for step, (at, answer) in enumerate(zip(*self.adjoints(target, scenario, plan), strict=True)):
                total[step] += self.scores(self.x, at, answer)
                if plan.moved is not None:
                    total[step] -= self.scores(plan.moved[step], at, answer)
        return total / len(self.starts)

    def scores(self, x: Tensor, at: Tensor, v: Tensor) -> Float[Tensor, " n"]:
        """``<gradient of row i at these parameters, v>`` of the candidates, standing at x."""
        losses, found = self.victim.objective.losses, list[Tensor]()
        with second_derivatives():
            for some, y in zip(x.split(_BATCH), self.y.split(_BATCH), strict=True):
                along = torch.func.jvp(lambda vector, a=some, b=y: losses(a, b, vector), (at,), (v,))[1]
                found.append(along)
        return torch.cat(found) if found else torch.zeros(0, dtype=self.victim.dtype)

    def moved_gradient(self, target: Target, plan: Plan) -> Tensor:
        """Of `value` by what the rows are replaced by: ``-grad_x <grad l(moved), q_t>``, reverse over forward."""
        if plan.moved is None:
            raise Misuse("this plan removes rows and replaces none; there is nothing to move")
        total = torch.zeros_like(plan.moved)
        for scenario in range(len(self.starts)):
            for step, (at, answer) in enumerate(zip(*self.adjoints(target, scenario, plan), strict=True)):
                chosen = plan.weights[step].nonzero().flatten()
                if len(chosen):
                    weights = plan.weights[step][chosen].to(at)
                    total[step, chosen] -= self.input_gradient(plan.moved[step][chosen], chosen, at, answer, weights)
        return total / len(self.starts)

    def input_gradient(self, x: Tensor, rows: Tensor, at: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        """By x, of the weighted sum of ``<gradient of the loss at x, v>``; x stands in for these rows."""
        return input_gradient(self.victim.objective, x, self.y[rows], v, at=at, weights=weights)


def assigned(costs: Float[Tensor, "steps n"], free: Tensor, per_step: int) -> Float[Tensor, "steps n"]:
    """`per_step` free rows for each step, none twice, of small total cost: the cheapest pair first (greedy).

    Of one step it is the optimum; of several at least half the best in gain where costs are below zero.

    Raises:
        Misuse: if there are not enough free rows.
    """
    steps, count = costs.shape
    if int(free.sum()) < steps * per_step:
        raise Misuse(f"{steps} requests of {per_step} rows need {steps * per_step}, of {int(free.sum())} free ones")
    chosen = torch.zeros(steps, count, dtype=torch.float64)
    left, taken = [per_step] * steps, (~free).tolist()
    for place in costs.flatten().argsort(stable=True).tolist():
        step, row = divmod(place, count)
        if left[step] and not taken[row]:
            chosen[step, row], taken[row] = 1.0, True
            left[step] -= 1
            if not any(left):
                break
    return chosen
