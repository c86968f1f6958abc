"""From the arguments of a trainer to what it trains with."""
