"""The learning rate along a run.

The paper lowers it polynomially from the first step to the last; a warm-up may come before it has its full height. As
plain functions of the step, and not objects that count steps of their own, they need no place in a checkpoint: a
resumed run cannot disagree with them.
"""


def poly_lr(base_lr: float, step: int, total_steps: int, power: float = 1.5) -> float:
    """The learning rate of one step: base_lr * (1 - step / total_steps) ** power.

    Args:
        base_lr: The rate of step 0.
        step: Steps already done, from 0 to `total_steps`.
        total_steps: Steps of the whole run.
        power: 1.5 in the paper; 1 falls in a straight line, 0 stays constant.

    Raises:
        ValueError: `step` lies outside the run.

    >>> [round(poly_lr(5e-4, step, 4), 8) for step in range(5)]
    [0.0005, 0.00032476, 0.00017678, 6.25e-05, 0.0]

    Source: Kreso et al., ICCV workshops 2017, section 4.
    """
    if not 0 <= step <= total_steps or total_steps < 1:
        raise ValueError(f"step must be between 0 and total_steps, got {step} of {total_steps}")
    return float(base_lr * (1 - step / total_steps) ** power)


def warm_up(step: int, warmup_steps: int) -> float:
    """What one step's rate is multiplied by: up to 1 in a straight line over the first steps, the first one above 0.

    Args:
        step: Steps already done.
        warmup_steps: After so many steps it is 1; 0 for no warm-up.

    >>> [warm_up(step, 4) for step in range(6)], warm_up(0, 0)
    ([0.25, 0.5, 0.75, 1.0, 1.0, 1.0], 1.0)

    Source: the gradual warm-up of Goyal et al., arXiv:1706.02677.
    """
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
