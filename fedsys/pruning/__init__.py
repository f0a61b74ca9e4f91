"""From one trained model to a portfolio of small dense variants (DNNShifter)."""
