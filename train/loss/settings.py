"""What a loss's numbers in YAML may be: a config is held to these before anything is loaded."""

from typing import Annotated

from annotated_types import Ge, Lt

Weight = Annotated[float, Ge(0)]  # below 0 training would move away from what the loss asks
Smoothing = Annotated[float, Ge(0), Lt(1)]  # the share of the target that goes to all the others
