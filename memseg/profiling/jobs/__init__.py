"""Training steps as values that can be traced and measured: of our networks, of one card of a plan, of any module."""
