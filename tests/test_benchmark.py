"""The yardstick of benchmark.py: what it counts of an operation."""

import torch

import benchmark


def test_count_is_of_products_and_of_bytes_that_move():
    a, b = torch.rand(8, 16), torch.rand(16, 4)
    with benchmark.Count() as count:
        c = (a @ b).t()  # a view moves nothing
        c += 1.0  # in place: read and written
    assert count.multiply_adds == 8 * 16 * 4
    assert count.moved == 4 * (8 * 16 + 16 * 4 + 8 * 4) + 2 * 4 * (8 * 4)
