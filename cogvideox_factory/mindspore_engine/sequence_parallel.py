"""One token stream over several processes."""

from cogvideox_factory.errors import FactoryError


def require_divisible_heads(size: int, num_heads: int) -> None:
    """Refuse `size` processes a stream that cannot divide the `num_heads` heads of the model.

    Raises:
        FactoryError: with the numbers that can.
    """
    if num_heads % size:
        fitting = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
        raise FactoryError(
            f"parallel.sequence={size} needs heads divisible by {size}; this model has {num_heads}. Use one of "
            f"{fitting}, or --engine torch, which also sends keys and values round a ring."
        )
