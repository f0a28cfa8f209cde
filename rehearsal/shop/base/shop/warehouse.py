"""The warehouse, which knows the stock. This sample stands in for its API by its waiting time alone."""

import random
import time

FASTEST_S = 0.020
SLOWEST_S = 0.040


def ask_stock() -> None:
    """Wait as long as the warehouse takes to answer."""
    time.sleep(random.uniform(FASTEST_S, SLOWEST_S))
