"""Distribution of items over processes: every item belongs to one process."""


def owner_of(index: int, world_size: int) -> int:
    """Returns the rank that item ``index``, counted over all ranks, belongs to.

    Args:
        index: Number of the item, from 0.
        world_size: Number of processes.

    >>> [owner_of(index, 3) for index in range(5)]
    [0, 1, 2, 0, 1]
    """
    return index % world_size
