"""The machine: everything of fedsys but the choice of strategies and clients."""
