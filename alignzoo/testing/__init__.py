"""The conformance kit: whether a loss keeps the contract, as pytest tests and for `alignzoo conform`.

    from alignzoo.testing import conformance
    test_my_loss = conformance(MyLoss)

`make_batch("pairs")` makes a batch to feed a loss by hand.
"""

from alignzoo.testing.suite import CHECKS, Result, conformance, examine, make_batch

__all__ = ["CHECKS", "Result", "conformance", "examine", "make_batch"]
