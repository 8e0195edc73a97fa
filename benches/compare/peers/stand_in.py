"""No framework at all: a peer that only keeps up the dialogue, for the harness' self-check."""

from peer import arguments, serve

from model import parameters_of, read

args = arguments(__doc__)


def step() -> float:
    """Keeps a core busy for a moment."""
    return sum(i * i for i in range(1000)) * 0.0


serve(step, version="stand-in", parameters=parameters_of(read(args.model)))
